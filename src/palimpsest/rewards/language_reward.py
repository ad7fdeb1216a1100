"""A reward model of texts, trained on comparisons by TRL's RewardTrainer, then frozen. Training needs TRL."""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import LlamaConfig, LlamaForSequenceClassification

from palimpsest.errors import DataError
from palimpsest.files import atomic_path
from palimpsest.models.language_model import tensor_bytes
from palimpsest.rewards.language_texts import BEGIN, LENGTH, TextComparisons, gold, letter_tokenizer


def small_llama(**more: Any) -> LlamaConfig:
    """Two layers of width 64, some 86 thousand parameters."""
    tokenizer = letter_tokenizer()
    return LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=LENGTH + 4,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        **more,
    )


class FrozenLanguageReward:
    """Scores texts; nothing changes it by being asked."""

    def __init__(self, network: LlamaForSequenceClassification) -> None:
        """The network is set to evaluate, and its parameters want no gradient any more."""
        self.network = network.eval().requires_grad_(False)

    @torch.no_grad()
    def __call__(self, texts: Sequence[str]) -> list[float]:
        """[n] the score of each text, in units of the log-odds of being preferred."""
        encoded = letter_tokenizer()([BEGIN + text for text in texts], padding=True, return_tensors="pt")
        scores: Tensor = self.network(input_ids=encoded["input_ids"], attention_mask=encoded["attention_mask"]).logits
        found: list[float] = scores[:, 0].double().tolist()
        return found

    def accuracy(self, comparisons: TextComparisons) -> float:
        """The share of comparisons that it calls as the judge did."""
        return float((np.array(self(comparisons.chosen)) > np.array(self(comparisons.rejected))).mean())

    def best_of(self, number: int, texts: Sequence[str]) -> float:
        """The mean gold of the best of so many texts by its score, out of texts in such groups."""
        scores = np.array(self(texts)).reshape(-1, number)
        worth = np.array(gold(texts)).reshape(-1, number)
        return float(worth[np.arange(len(worth)), scores.argmax(1)].mean())

    def fingerprint(self) -> str:
        """SHA-256 (hex) over names, shapes and bytes of parameters and buffers, and whether it evaluates."""
        digest = hashlib.sha256(str(self.network.training).encode())
        for name, tensor in sorted(self.network.state_dict().items()):
            digest.update(f"{name} {tuple(tensor.shape)}\n".encode())
            digest.update(tensor_bytes(tensor))
        return digest.hexdigest()

    def save(self, path: str | Path) -> None:
        """Write the weights as safetensors, whole or not at all."""
        with atomic_path(path) as temporary:
            save_file(self.network.state_dict(), temporary)

    @staticmethod
    def load(path: str | Path) -> "FrozenLanguageReward":
        """Read what `save` wrote.

        Raises:
            DataError: the file cannot be read, or holds something else.
        """
        network = LlamaForSequenceClassification(small_llama(num_labels=1))
        try:
            network.load_state_dict(load_file(path))
        except (OSError, SafetensorError, RuntimeError) as error:
            raise DataError(f"{path}: holds no reward model that was frozen here ({str(error)[:100]})") from None
        return FrozenLanguageReward(network)


class GoldReward:
    """What is truly meant: what the ceiling learns from."""

    def __call__(self, texts: Sequence[str]) -> list[float]:
        """[n] the gold of each text."""
        return gold(texts)

    def fingerprint(self) -> str:
        """It is a formula."""
        return "gold"


def train_reward(
    comparisons: TextComparisons, seed: int, *, epochs: int = 4, learning_rate: float = 1e-3
) -> FrozenLanguageReward:
    """A reward model of random weights, trained by Bradley-Terry's loss (Ouyang et al. 2022, arXiv 2203.02155, eq. 1).

    Args:
        comparisons: what was preferred to what.
        seed: of weights and order.
        epochs: over the comparisons.
        learning_rate: AdamW's, constant, without weight decay.

    Raises:
        SpecError: TRL or datasets is not installed.
    """
    from palimpsest.rewards.language_trainers import (
        ON_CPU,
        RewardConfig,
        RewardTrainer,
        rows,
        train_in_silence,
        trainers_folder,
    )

    tokenizer = letter_tokenizer()
    ids = {
        f"{side}_ids": tokenizer([BEGIN + text for text in texts])["input_ids"]
        for side, texts in (("chosen", comparisons.chosen), ("rejected", comparisons.rejected))
    }
    with trainers_folder(seed) as folder:
        network = LlamaForSequenceClassification(small_llama(num_labels=1))
        settings = RewardConfig(
            folder,
            num_train_epochs=epochs,
            per_device_train_batch_size=32,
            learning_rate=learning_rate,
            center_rewards_coefficient=0.01,
            logging_strategy="no",
            seed=seed,
            **ON_CPU,
        )
        train_in_silence(
            RewardTrainer(model=network, args=settings, train_dataset=rows(ids), processing_class=tokenizer)
        )
    return FrozenLanguageReward(network)
