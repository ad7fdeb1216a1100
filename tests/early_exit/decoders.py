"""Tiny decoders of every family, what transformers says with them, and whole rows gone through with given exits."""

from collections.abc import Sequence

import torch
from tests.models.tiny_families import tiny_model, tiny_rows
from torch import Tensor

from palimpsest.data.batches import Batch
from palimpsest.early_exit.stack import Stack
from palimpsest.metrics.generation import stop_ids
from palimpsest.models.language_model import LanguageModel

LAYERS = 4


def decoder(family: str, **changes: object) -> LanguageModel:
    window = {"sliding_window": None} if family == "mistral" else {}
    return tiny_model(family, **(window | {"num_hidden_layers": LAYERS} | changes))


def prompts(*lengths: int, seed: int = 1) -> list[tuple[int, ...]]:
    return [row.ids for row in tiny_rows(*lengths, seed=seed)]


def greedy(model: LanguageModel, prompt: Sequence[int], n: int) -> tuple[int, ...]:
    """What transformers' own `generate` says, without the stop."""
    stops = sorted(stop_ids(model.tokenizer))
    said = model.network.generate(
        torch.tensor([prompt]),
        attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
        do_sample=False,
        max_new_tokens=n,
        eos_token_id=stops,
        pad_token_id=0,
    )[0, len(prompt) :].tolist()
    return tuple(said[:-1] if said[-1] in stops else said)


def frozen(stack: Stack, batch: Batch, exits: Tensor) -> Tensor:
    """[B, T, d] the states of whole rows, each token's frozen after `exits` [B, T] blocks."""
    hidden, given = stack.enter(batch)
    for layer in range(stack.n_layers):
        after = stack.run(layer, hidden, given)
        hidden = torch.stack(
            [
                torch.stack([new if exit > layer else old for new, old, exit in zip(*line, strict=True)])
                for line in zip(after, hidden, exits.tolist(), strict=True)
            ]
        )
    return hidden
