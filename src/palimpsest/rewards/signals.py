"""What might tell beforehand that a reward fails its relearners, and the one signal that raises an alarm without truth.

A proxy gap is what an optimiser that begins afresh finds in the learned reward beyond what the sampler found: where the
reward is right there is little more to find. It is read in deviations of the reward over what was compared, a step,
and only beside a sampler that was optimised: beside an untrained one any good reward shows a gap.

Shapes: S seeds, n cells.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from palimpsest.errors import SpecError
from palimpsest.rewards.comparisons import accuracy, compare
from palimpsest.rewards.gridworlds import Floats, plan, score, visits
from palimpsest.rewards.preference_loop import LearnedReward, episodes, generators, refitted

ALARM = 0.3
"""The proxy gap from which a reward is not to be trusted."""
RARE = 0.05
"""A cell is rarely compared if it has less than this share of what it would have if all were compared alike."""

FAILS_WHEN: Mapping[str, int] = {
    "accuracy": -1,
    "sampler_return": -1,
    "unseen": 1,
    "rarely_compared": 1,
    "spread": 1,
    "correlation_on_data": -1,
    "correlation_everywhere": -1,
    "proxy_gap": 1,
}
"""1 where a high value should mean that relearners fail, -1 where a low one should."""
NEEDS_TRUTH = ("sampler_return", "correlation_on_data", "correlation_everywhere")
"""Signals that nobody has outside of a world whose truth is known."""


def signals(learned: LearnedReward) -> dict[str, Floats]:
    """[S] every signal by name; `FAILS_WHEN` says how each is to be read.

    Raises:
        SpecError: a reward that was learned offline, beside which no sampler can be shown.
    """
    world, reward, comparisons = learned.world, learned.reward, learned.comparisons
    if learned.policy is None:
        raise SpecError("signals: a reward that was learned offline has no sampler; there is nothing to compare with")
    compared = comparisons.visits / comparisons.visits.sum(-1, keepdims=True)
    fresh = visits(world, plan(world, reward.values)).mean(1)
    even = np.full_like(compared, 1 / compared.shape[1])
    return {
        "accuracy": accuracy(comparisons, reward.values),
        "sampler_return": learned.sampler_score,
        "unseen": (compared == 0).mean(-1),
        "rarely_compared": np.where(compared < RARE * even, fresh, 0.0).sum(-1),
        "spread": (fresh * reward.spread).sum(-1),
        "correlation_on_data": correlation(reward.values, world.reward, compared),
        "correlation_everywhere": correlation(reward.values, world.reward, even),
        "proxy_gap": (fresh * reward.values).sum(-1) - _sampled(learned),
    }


def proxy_gap(learned: LearnedReward) -> Floats:
    """[S] the learned return a step of the best policy for the learned reward, less the sampler's."""
    best = visits(learned.world, plan(learned.world, learned.reward.values)).mean(1)
    gap: Floats = (best * learned.reward.values).sum(-1) - _sampled(learned)
    return gap


def correlation(rewards: Floats, truth: Floats, weights: Floats) -> Floats:
    """[S] Pearson's correlation of [S, n] rewards with the [n] true ones under weights [S, n] that sum to 1.

    For rewards of cells alone, and every cell alike, this is what EPIC's distance is made of (Gleave et al. 2021, arXiv
    2006.13900): there is no shaping to take away. 0 where either side is constant.
    """
    ours, theirs = (
        values - (values * weights).sum(-1, keepdims=True)
        for values in (rewards, np.broadcast_to(truth, rewards.shape))
    )
    scale = np.sqrt((ours**2 * weights).sum(-1) * (theirs**2 * weights).sum(-1))
    together = (ours * theirs * weights).sum(-1)
    return np.divide(together, scale, out=np.zeros_like(together), where=scale > 1e-12)


@dataclass(frozen=True)
class Repair:
    """What became of a reward whose relearners were watched: [R + 1, S], before and after each round."""

    gaps: Floats
    """The proxy gap: all that is known without truth."""
    scores: Floats
    """The true return of the best policy for the reward, between uniform and best."""
    labels: int
    """Comparisons that were made in a round."""


def repair(learned: LearnedReward, *, rounds: int = 8, labels: int = 20, targeted: bool = True) -> Repair:
    """Compare what an optimiser of the learned reward does with what the sampler does, and fit the reward again.

    The optimiser goes where the reward is wrongest in its favour, so a few labels there are worth many elsewhere.

    Args:
        learned: the reward; it is left as it was.
        rounds: of comparing and fitting.
        labels: comparisons a round.
        targeted: if not, the sampler is compared with itself, which is what as many labels do elsewhere.
    """
    world, judge = learned.world, generators(learned.seeds, "repair")
    gaps, scores = [], []
    for left in range(rounds, -1, -1):
        best = plan(world, learned.reward.values)
        gaps.append(proxy_gap(learned))
        scores.append(score(world, best))
        if left:
            policy = _sampler(learned)
            theirs = episodes(world, policy, labels, judge)
            ours = episodes(world, best if targeted else policy, labels, judge)
            made = compare(
                *(ours, theirs, world.reward, labels, judge),
                length=learned.settings.length,
                temperature=learned.settings.temperature,
                members=learned.settings.reward.members,
            )
            learned = refitted(learned, made, learned.settings.reward.steps)
    return Repair(np.stack(gaps), np.stack(scores), labels)


def _sampled(learned: LearnedReward) -> Floats:
    """[S] the sampler's learned return a step."""
    sampled: Floats = (visits(learned.world, _sampler(learned)).mean(1) * learned.reward.values).sum(-1)
    return sampled


def _sampler(learned: LearnedReward) -> Floats:
    if learned.policy is None:
        raise SpecError("this reward was learned offline, without a sampler; learn it beside one to compare with")
    return learned.policy
