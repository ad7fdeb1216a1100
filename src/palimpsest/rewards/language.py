"""Does a reward model of texts teach a fresh language model what was meant? In a generated language, by TRL.

One reward model is trained on what a competent writer compares, another on what writers good and bad do. What is
usually shown for them is their accuracy on comparisons held out and what the best of n texts by their score is worth;
here a model of random weights learns from each alone, beside one that learns from gold and one that learns nothing.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import get_args

import numpy as np

from palimpsest.relearning.judgement import RelearnSettings
from palimpsest.relearning.protocol import RelearnSpec
from palimpsest.rewards.language_learner import METRIC, GRPOLearner, GRPOSettings, TextReward
from palimpsest.rewards.language_reward import FrozenLanguageReward, GoldReward, train_reward
from palimpsest.rewards.language_texts import Writer, compared, written
from palimpsest.rewards.randomness import stream_seed

_COMPARED, _NETWORK, _HELD_OUT, _LEARNER = 1, 2, 3, 4  # purposes of seeds


@dataclass(frozen=True, kw_only=True)
class LanguageSettings:
    """Reward models and their fresh learners; about 30 CPU-seconds a seed with both writers."""

    comparisons: int = 800
    held_out: int = 400
    """Comparisons of each writer."""
    best_of: int = 64
    """n, of texts of the narrow writer."""
    groups: int = 32
    """Of n texts."""
    budgets: tuple[int, ...] = (25, 50, 100)
    """Steps of a fresh learner; with gold it is done by the second."""
    grpo: GRPOSettings = field(default_factory=GRPOSettings)


@dataclass(frozen=True)
class LearnedLanguageReward:
    """A frozen reward model, and what is usually shown for it."""

    reward: FrozenLanguageReward
    accuracy: float
    """On comparisons held out, of the writer whose comparisons it was trained on."""
    accuracy_on_wide: float
    """On those of the wide writer."""
    best_of: float
    """The mean gold of the best of n of the narrow writer's texts, by its score: the incumbent."""


def learn_language_reward(writer: Writer, settings: LanguageSettings, seed: int) -> LearnedLanguageReward:
    """Train a reward model on a writer's comparisons; what is held out is the same for both writers of a seed.

    Raises:
        SpecError: an unknown writer, or TRL or datasets is not installed.
    """
    comparisons = compared(writer, settings.comparisons, np.random.default_rng([seed, _COMPARED]))
    reward = train_reward(comparisons, stream_seed(seed, _NETWORK))
    rng = np.random.default_rng([seed, _HELD_OUT])
    accuracy = {each: reward.accuracy(compared(each, settings.held_out, rng)) for each in get_args(Writer)}
    texts = written("narrow", settings.best_of * settings.groups, rng)
    return LearnedLanguageReward(reward, accuracy[writer], accuracy["wide"], reward.best_of(settings.best_of, texts))


def language_spec(
    settings: LanguageSettings, learned: Mapping[int, LearnedLanguageReward], *, margin: float = 0.2
) -> RelearnSpec:
    """The experiment that `relearn` runs: fresh language models on each seed's reward model.

    Args:
        settings: those that the rewards were learned with.
        learned: one a seed.
        margin: the share of the way from floor to ceiling that a good reward may miss.
    """
    protocol = RelearnSettings(
        budgets=settings.budgets,
        seeds=tuple(learned),
        metric=METRIC,
        want="return",
        incumbent=float(np.mean([each.best_of for each in learned.values()])),
        margin=margin,
    )

    def fresh(reward: TextReward | None, seed: int) -> GRPOLearner:
        return GRPOLearner(settings.grpo, reward, stream_seed(seed, _LEARNER))

    return RelearnSpec(
        protocol,
        lambda seed: fresh(learned[seed].reward, seed),
        lambda seed: fresh(None, seed),
        lambda seed: fresh(GoldReward(), seed),
        {f"the reward of seed {seed}": each.reward for seed, each in learned.items()},
    )
