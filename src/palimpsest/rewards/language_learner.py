"""A language model of random weights that TRL's GRPO teaches by one reward alone. Needs TRL and datasets.

Group-relative policy optimisation is Shao et al. 2024 (DeepSeekMath, arXiv 2402.03300, §4.1).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import LlamaForCausalLM

from palimpsest.rewards.language_reward import small_llama
from palimpsest.rewards.language_texts import BEGIN, LENGTH, gold, letter_tokenizer
from palimpsest.rewards.randomness import drawing_from, stream_seed

METRIC, PROXY = "gold", "proxy"
"""What is probed: the mean gold of texts that the model writes, and their mean by the reward that it learned from."""
_EVALUATED = 1
EVALUATED = 256
"""Texts of a probe."""
TextReward = Callable[[Sequence[str]], list[float]]


@dataclass(frozen=True, kw_only=True)
class GRPOSettings:
    """What decides how a model is taught; the rest is TRL's default."""

    learning_rate: float = 3e-3
    """Adam's, constant."""
    batch_size: int = 32
    """Texts a step."""
    group: int = 8
    """Texts whose rewards are compared with each other."""


class GRPOLearner:
    """A learner: GRPO on a fresh model; its budget is in steps.

    A constant reward gives no text an advantage, so GRPO moves nothing by it: such a learner stays as it began and
    takes no time. What is drawn follows from the seed and from the step at which a stretch begins.
    """

    def __init__(self, settings: GRPOSettings, reward: TextReward | None, seed: int) -> None:
        """`reward` None is a constant one."""
        self.settings, self.reward, self.seed, self.steps = settings, reward, seed, 0
        with drawing_from(stream_seed(seed)):
            self.network = LlamaForCausalLM(small_llama())
        self.optimizer = torch.optim.Adam(self.network.parameters(), lr=settings.learning_rate)
        self.history: list[tuple[int, float, float]] = []
        """By step, what TRL logged of the texts that it learned from: their mean by the reward, and their gold."""

    def fit_to(self, budget: int) -> None:
        """Go on until `budget` steps are done in all.

        Raises:
            SpecError: TRL or datasets is not installed.
        """
        if self.reward is not None and budget > self.steps:
            self._train(budget - self.steps, self.reward)
        self.steps = budget

    def probe(self) -> dict[str, float]:
        """Of texts that it writes by chance, with draws that are the same for every learner of a seed."""
        texts = self.written(EVALUATED, stream_seed(self.seed, _EVALUATED))
        worth, scores = gold(texts), self.reward(texts) if self.reward else [0.0]
        return {METRIC: sum(worth) / len(worth), PROXY: sum(scores) / len(scores)}

    @torch.no_grad()
    def written(self, number: int, seed: int) -> list[str]:
        """Texts of at most twelve letters, sampled at temperature 1."""
        tokenizer = letter_tokenizer()
        begin = torch.full((number, 1), tokenizer.bos_token_id)
        self.network.eval()
        with drawing_from(seed):
            ids = self.network.generate(  # type: ignore[misc]
                begin, attention_mask=torch.ones_like(begin), do_sample=True, top_k=0, max_new_tokens=LENGTH
            )
        texts: list[str] = tokenizer.batch_decode(ids[:, 1:], skip_special_tokens=True)
        return texts

    def _train(self, steps: int, reward: TextReward) -> None:
        from palimpsest.rewards.language_trainers import (
            ON_CPU,
            GRPOConfig,
            GRPOTrainer,
            rows,
            train_in_silence,
            trainers_folder,
        )

        def proxy(completions: list[str], **_: Any) -> list[float]:
            return reward(completions)

        def true(completions: list[str], **_: Any) -> list[float]:
            return gold(completions)

        seed = stream_seed(self.seed, self.steps)
        with trainers_folder(seed) as folder:
            settings = GRPOConfig(
                folder,
                max_steps=steps,
                per_device_train_batch_size=self.settings.batch_size,
                num_generations=self.settings.group,
                max_completion_length=LENGTH,
                reward_weights=[1.0, 0.0],  # gold is logged and teaches nothing
                logging_steps=1,
                seed=seed,
                **ON_CPU,
            )
            trainer = GRPOTrainer(
                model=self.network,
                reward_funcs=[proxy, true],
                args=settings,
                train_dataset=rows({"prompt": [BEGIN] * self.settings.batch_size}),
                processing_class=letter_tokenizer(),
                optimizers=(self.optimizer, torch.optim.lr_scheduler.ConstantLR(self.optimizer, 1.0, 1)),
            )
            logs = train_in_silence(trainer)
        self.history += [
            (self.steps + log["step"], log["rewards/proxy/mean"], log["rewards/true/mean"])
            for log in logs
            if "rewards/true/mean" in log
        ]
