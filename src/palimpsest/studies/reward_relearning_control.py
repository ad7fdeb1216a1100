"""Does a learned reward hold for a fresh learner, in continuous control? One network, and a pessimistic ensemble.

Of every seed: a preference loop with its sampler, then fresh policies on the frozen reward, on a constant one and on
the true one, each with a quarter of the sampler's steps, as many, and four times as many.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from palimpsest.relearning.judgement import RelearnReport
from palimpsest.rewards.control import SETTINGS, ControlSettings, LearnedReward, control_spec, learn_reward
from palimpsest.rewards.control_learner import PROXY
from palimpsest.rewards.control_rewards import FrozenNetworkReward, NetworkSettings
from palimpsest.studies.cells import Cell, kept
from palimpsest.studies.claims import Claim
from palimpsest.studies.relearning_cells import kept_relearning

FRAGILITY, REPAIR = "arXiv 2301.03652", "after 2301.03652"
ALONE, PESSIMISTIC = "alone", "pessimistic"
ARMS = {ALONE: NetworkSettings(), PESSIMISTIC: NetworkSettings(members=5, pessimism=1.0)}
"""Designs of the reward: one network; the mean of five less their standard deviation."""
MARGIN = 0.2
"""The share of the way from floor to ceiling that a good reward may miss: returns are means of few episodes."""
TIMES = ("0.25x", "1x", "4x")
"""Budgets of a fresh learner, in units of the sampler's."""
_claim = partial(Claim.over, source=FRAGILITY)


@dataclass(frozen=True)
class Measured:
    """One design of the reward."""

    report: RelearnReport
    learned: Mapping[int, LearnedReward]
    """By seed."""


def control_claims(
    seeds: Sequence[int], folder: Path, *, setting: str = "reacher", arms: Sequence[str] = tuple(ARMS)
) -> list[Claim]:
    """Measure what is missing, then judge the claims.

    Args:
        seeds: of samplers, judges, rewards and fresh learners; the protocol gives no verdict below five.
        folder: keeps rewards, one JSON file a curve, and each design's report; what is there is not measured again.
        setting: a name in `palimpsest.rewards.control.SETTINGS`.
        arms: which designs of the reward.
    """
    return judge({arm: measure(SETTINGS[setting], arm, seeds, folder / setting) for arm in arms})


def measure(settings: ControlSettings, arm: str, seeds: Sequence[int], folder: Path) -> Measured:
    """One design's rewards and curves, kept in the folder."""
    settings = replace(settings, network=ARMS[arm])
    learned = {seed: _kept_reward(settings, seed, folder / arm) for seed in seeds}
    spec = control_spec(settings, learned, margin=MARGIN)
    report = kept_relearning(spec, folder, arm, lambda seed: learned[seed].reward.fingerprint(), ceiling="true")
    return Measured(report, learned)


def judge(measured: Mapping[str, Measured]) -> list[Claim]:
    """Every claim that the designs tell something of."""
    claims = [claim for arm, found in measured.items() for claim in _of_arm(arm, found)]
    if {ALONE, PESSIMISTIC} <= measured.keys():
        claims.append(
            _claim(
                "c4/design",
                "A pessimistic ensemble's reward loses less to a fresh learner than one network's.",
                "share of the way missing at four times the sampler's steps, of one network less of the ensemble",
                [*(_missing(measured[ALONE], -1) - _missing(measured[PESSIMISTIC], -1))],
                bound=0.0,
                note="the paper's ensembles are means, in tabular worlds",
            )
        )
    return claims


def _of_arm(arm: str, measured: Measured) -> list[Claim]:
    report, learned = measured.report, [*measured.learned.values()]
    floor, ceiling = (report.curve(who)[:, 1].mean() for who in ("floor", "ceiling"))  # type: ignore[arg-type]
    returns = np.array([each.sampler_return for each in learned])
    sampler = (returns - floor) / (ceiling - floor)
    proxy = report.curve("artefact", PROXY)[:, -1] - [each.sampler_proxy for each in learned]
    accuracy = np.mean([each.accuracy for each in learned])
    curves = "; ".join(
        f"{point.budget}: {point.artefact:.2f} between {point.floor:.2f} and {point.ceiling:.2f}"
        for point in report.points
    )
    return [
        _claim(
            f"c1/{arm}/sampler",
            "The policy trained beside the reward does what was meant.",
            "share of the way from floor to ceiling at as many steps, by the sampler's true return",
            [*sampler],
            bound=0.5,
            note=f"{(sampler >= 0.5).sum()} of {len(sampler)} go half the way; true return "
            f"{returns.mean():.2f}; the reward calls {accuracy:.2f} of comparisons as the judge did",
        ),
        *(
            _claim(
                f"c2/{arm}/{times}",
                f"A policy that starts afresh on the frozen reward falls short at {times} the sampler's steps.",
                "share of the way from floor to ceiling that is missing",
                [*_missing(measured, place)],
                bound=MARGIN,
                note=f"{report.verdict}: {report.summary}; {curves}" if place == 2 else "",
            )
            for place, times in enumerate(TIMES)
        ),
        _claim(
            f"c3/{arm}/proxy",
            "The reward itself says that the fresh policy does better than the sampler did.",
            "return by the learned reward at 4x less the sampler's, in deviations of that reward on what was compared",
            [*proxy],
            bound=0.0,
            source=REPAIR,
            note="needs no true reward",
        ),
        _claim(
            f"c3/{arm}/longer",
            "Learning longer from the frozen reward than the sampler did makes the policy truly worse.",
            "true return at four times the steps less at as many, as a share of the way at four times",
            [*((report.curve("artefact")[:, -1] - report.curve("artefact")[:, 1]) / report.points[-1].gap.value)],
            bound=0.0,
            below=True,
            source=REPAIR,
        ),
    ]


def _missing(measured: Measured, place: int) -> NDArray[np.float64]:
    """[S] how far below the true reward's learner of the same seed, in units of the mean gap."""
    report = measured.report
    below: NDArray[np.float64] = report.curve("ceiling")[:, place] - report.curve("artefact")[:, place]
    return below / report.points[place].gap.value


def _kept_reward(settings: ControlSettings, seed: int, folder: Path) -> LearnedReward:
    path = folder / f"reward-{seed}.safetensors"

    def learned() -> Cell:
        found = learn_reward(settings, seed)
        found.reward.save(path)
        return {
            "sampler_return": found.sampler_return,
            "sampler_proxy": found.sampler_proxy,
            "accuracy": found.accuracy,
        }

    cell = kept(folder / f"reward-{seed}.json", f"seed {seed}: {folder.name}, the reward", learned)
    return LearnedReward(reward=FrozenNetworkReward.load(path), **cell)
