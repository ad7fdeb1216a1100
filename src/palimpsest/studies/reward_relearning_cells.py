"""What the study of learned rewards measures: arms that each change one thing of a base, in blocks of seeds.

A cell is one arm and one block. It holds, seed by seed, the sampler's return, the curves of every relearner between its
floor and its ceiling, every signal, and what repair made of it.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path

import numpy as np

from palimpsest.relearning.judgement import ProbeRow, RelearnReport, RelearnSettings, Who, judge
from palimpsest.rewards.gridworlds import WORLDS, GridWorld
from palimpsest.rewards.preference_loop import PreferenceSettings, Source, learn_reward
from palimpsest.rewards.relearning import FAILED, METRIC, RELEARNERS, Rate, relearn_reward
from palimpsest.rewards.reward_models import Kind, RewardSettings
from palimpsest.rewards.signals import repair, signals
from palimpsest.studies.cells import Cell, kept

BLOCK = 80
"""Seeds that are computed side by side; how many makes no difference to any of them."""
ENDS: tuple[Who, ...] = ("artefact", "floor", "ceiling")
KINDS: tuple[Kind, ...] = ("table", "mlp")
SOURCES: tuple[Source, ...] = ("random", "expert", "mixed", "everywhere")
REPAIRED = ("table", "mlp")
"""Arms whose rewards are repaired as well."""


@dataclass(frozen=True)
class Arm:
    """One way to learn a reward."""

    settings: PreferenceSettings
    world: str = "near"
    horizon: int = 30
    times: int = 1
    """How many times the seeds asked for: small rates and small differences between rates need more."""
    relearners: tuple[str, ...] = ("planner", "q_learner")


def _arms() -> dict[str, Arm]:
    arms: dict[str, Arm] = {}
    for kind in KINDS:
        base, members = RewardSettings(kind=kind), 10 if kind == "table" else 5
        designs = {
            "": base,
            "_l2_1e-3": replace(base, l2=1e-3),
            "_mean": replace(base, members=members),
            "_pessimism": replace(base, members=members, pessimism=1.0),
        }
        if kind == "table":
            designs |= {
                "_begins_at_0": replace(base, deviation=0.0),
                "_l2_1e-4": replace(base, l2=1e-4),
                "_l2_1e-2": replace(base, l2=1e-2),
                "_mean_of_3": replace(base, members=3),
                "_pessimism_2": replace(base, members=members, pessimism=2.0),
            }
        for name, reward in designs.items():
            times = {"": 4, "_l2_1e-3": 4, "_pessimism": 2}.get(name, 1)
            arms[kind + name] = Arm(PreferenceSettings(reward=reward), times=times, relearners=tuple(RELEARNERS))
        plain = PreferenceSettings(reward=base)
        data = {
            "hyperbolic": replace(plain, schedule="hyperbolic"),
            "newest_quarter": replace(plain, newest=0.25),
            "half_random": replace(plain, random_episodes=0.5),
            "half_random_starts": replace(plain, random_starts=0.5),
            "few": replace(plain, comparisons=150),
            "many": replace(plain, comparisons=2400),
            "noisy": replace(plain, temperature=3.0),
            **{f"offline_{source}": replace(plain, offline=source) for source in SOURCES},
        }
        arms |= {
            f"{kind}_{name}": Arm(settings, times=2 if name == "offline_everywhere" else 1)
            for name, settings in data.items()
        }
        alone = partial(Arm, relearners=("planner",))
        arms |= {f"{kind}_horizon_{horizon}": alone(plain, horizon=horizon) for horizon in (15, 60)}
        for world in ("stay", "slope"):
            arms[f"{world}_{kind}"] = alone(plain, world)
            arms[f"{world}_{kind}_l2"] = alone(replace(plain, reward=replace(base, l2=1e-3)), world)
    return arms | {
        name: Arm(_long(rounds, steps), times=4, relearners=("planner",))
        for name, (rounds, steps) in LENGTHS.items()
        if name != "mlp"
    }


LENGTHS = {
    "rounds_10": (10, 40),
    "mlp": (30, 40),
    "rounds_90": (90, 40),
    "rounds_10_matched": (10, 97),
    "rounds_90_matched": (90, 14),
    "steps_16": (30, 16),
    "steps_111": (30, 111),
}
"""Rounds of the sampler and steps of the reward a round, of a network.

The first round has five times as many, so there are steps (rounds + 4) in all: 560, 1360 and 3760 where they are tied
to the sampler's length; 1358 and 1316 where 10 and 90 rounds are matched with 30; 544 and 3774 in 30 rounds, to go with
those of 10 and of 90."""


def _long(rounds: int, steps: int) -> PreferenceSettings:
    return PreferenceSettings(rounds=rounds, reward=RewardSettings(kind="mlp", steps=steps, first_steps=5 * steps))


ARMS = _arms()
"""By name."""


def measure(name: str, seeds: Sequence[int], folder: Path) -> list[Cell]:
    """The cells of an arm, measured where they are missing: a block of at most `BLOCK` of its seeds each."""
    every = range(seeds[0], seeds[0] + ARMS[name].times * len(seeds))
    blocks = [every[first : first + BLOCK] for first in range(0, len(every), BLOCK)]
    return [
        kept(
            folder / name / f"seeds-{block[0]}-{block[-1]}.json",
            f"{name}, seeds {block[0]} to {block[-1]}",
            partial(measured, name, block),
        )
        for block in blocks
    ]


def measured(name: str, seeds: Sequence[int]) -> Cell:
    """One block of seeds of one arm."""
    arm = ARMS[name]
    learned = learn_reward(world_of(arm.world, arm.horizon), arm.settings, seeds)
    relearned: Cell = {}
    for relearner in arm.relearners:
        found = relearn_reward(learned, RELEARNERS[relearner])
        report = found.report
        relearned[relearner] = {
            "seeds": list(found.seeds),
            "bad_samplers": len(found.bad_samplers),
            "weak_learners": len(found.weak_learners),
            "budgets": list(report.settings.budgets) if report else [],
            "curves": {who: report.curve(who).tolist() for who in ENDS} if report else {},
        }
    online = learned.policy is not None
    cell: Cell = {
        "seeds": list(seeds),
        "reward_steps": arm.settings.reward_steps,
        "sampler": learned.sampler_score.tolist() if online else None,
        "signals": {signal: values.tolist() for signal, values in signals(learned).items()} if online else {},
        "relearned": relearned,
    }
    if name in REPAIRED:
        cell["repaired"] = {
            how: repair(learned, targeted=targeted).scores.tolist()
            for how, targeted in (("targeted", True), ("elsewhere", False))
        }
    return cell


@cache
def world_of(name: str, horizon: int) -> GridWorld:
    """One and the same, so that references are learned once."""
    return WORLDS[name](horizon)


def scores(cells: Sequence[Cell], relearner: str, who: Who = "artefact") -> dict[int, float]:
    """By seed that says something, the relearner's true return at the sampler's own budget."""
    found = {}
    for cell in cells:
        of_kind = cell["relearned"].get(relearner, {"seeds": []})
        for seed, curve in zip(of_kind["seeds"], of_kind.get("curves", {}).get(who, []), strict=True):
            found[seed] = curve[min(1, len(curve) - 1)]
    return found


def failures(cells: Sequence[Cell], relearner: str = "planner") -> Rate:
    """Relearners that failed, of those seeds that say something."""
    found = scores(cells, relearner)
    return Rate(sum(value < FAILED for value in found.values()), len(found))


def of_seeds(cells: Sequence[Cell], name: str) -> dict[int, float]:
    """By seed, a signal."""
    return {
        seed: value
        for cell in cells
        if cell["signals"]
        for seed, value in zip(cell["seeds"], cell["signals"][name], strict=True)
    }


def report(cells: Sequence[Cell], relearner: str) -> RelearnReport | None:
    """The protocol's report over all blocks; None where no seed says anything."""
    rows: list[ProbeRow] = []
    seeds: list[int] = []
    budgets: tuple[int, ...] = ()
    for cell in cells:
        found = cell["relearned"][relearner]
        if not found["seeds"]:
            continue
        seeds += found["seeds"]
        budgets = tuple(found["budgets"])
        for who, curves in found["curves"].items():
            for seed, curve in zip(found["seeds"], curves, strict=True):
                rows += [
                    ProbeRow(who, seed, budget, {METRIC: value}) for budget, value in zip(budgets, curve, strict=True)
                ]
    if not seeds:
        return None
    own = {
        seed: value
        for cell in cells
        if cell["sampler"]
        for seed, value in zip(cell["seeds"], cell["sampler"], strict=True)
    }
    incumbent = float(np.mean([own[seed] for seed in seeds])) if own else None
    settings = RelearnSettings(
        budgets=budgets, seeds=tuple(seeds), metric=METRIC, want="return", incumbent=incumbent, smallest_gap=FAILED
    )
    return judge(settings, rows)
