"""Is forgetting by fine-tuning a shift in which task is inferred?

Kotha, Springer & Raghunathan 2024 (arXiv 2309.10105) say so. A network that does regression in context is fine-tuned on
a pool of tasks, and gets worse at all others. If that is because it now takes prompts for the pool's, a prompt that no
task of the pool could have made should bring the old skill back: conjugate prompting multiplies the labels, and divides
the prediction. The same is done here to a network that never met labels so large, where it can show nothing (`unit`),
and everything is laid beside the best predictors.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path

import numpy as np

from palimpsest.studies.cells import Cell, Cells, of_model
from palimpsest.studies.claims import Claim
from palimpsest.studies.implicit_inference_cells import CELLS, SETTINGS, Bench, Setting

SOURCE = "arXiv 2309.10105"
GAMMA = "2"
"""What labels are multiplied by where a claim does not say otherwise."""
NEAR = 1.5
"""At so many times ridge regression's loss a network is held to have come to regression."""

_claim = partial(Claim.over, source=SOURCE)


@dataclass(frozen=True)
class Plan:
    """What the study is to do."""

    seeds: Sequence[int]
    folder: Path
    """Keeps one JSON file a network; what is there is not measured again."""
    setting: Setting = SETTINGS["demo"]
    cells: Sequence[str] = CELLS
    """Which networks."""
    device: str | None = None
    """Where networks are; the GPU when there is one."""


def run(plan: Plan) -> list[Claim]:
    """Measure what is missing, then judge the claims."""
    return judge(
        {
            seed: Bench(plan.setting, seed, plan.folder / f"seed-{seed}", plan.device).measure(plan.cells)
            for seed in plan.seeds
        }
    )


def judge(cells: Cells) -> list[Claim]:
    """Every claim, from the cells by seed; those whose cells are missing are left out."""
    claims = [*_of_learning_alone(cells), *_of_pretraining(cells), *_of_fine_tuning(cells), *_of_scaling(cells)]
    return [claim for claim in (*claims, *_of_the_pools_lead(cells)) if claim.seeds]


def _of_learning_alone(cells: Cells) -> list[Claim]:
    return [
        _claim(
            f"a1/{name}",
            statement,
            "loss on its own tasks over the oracle's, at the end of training",
            of_model(cells, name, lambda cell: _end(cell)["own"] / cell["oracles"]["own"]),
            bound=1.1,
            below=True,
        )
        for name, statement in (
            ("continuous", "Trained on continuous tasks alone, it predicts as ridge regression does."),
            ("pool", "Trained on a pool of tasks alone, it predicts as the pool's posterior mean does."),
        )
    ]


def _of_pretraining(cells: Cells) -> list[Claim]:
    return [
        _claim(
            "a2/continuous",
            "Trained on the mixture, it comes within a tenth of the best predictor on continuous tasks.",
            "loss on continuous tasks over that of the mixture's posterior mean",
            of_model(cells, "scaled", lambda cell: _all(cell, "continuous") / _oracle(cell, "continuous", "mixture")),
            bound=1.1,
            below=True,
        ),
        _claim(
            "a2/discrete",
            "It does better on the pool's tasks than ridge regression.",
            "loss on the pool's tasks over ridge regression's",
            of_model(cells, "scaled", lambda cell: _all(cell, "discrete") / _oracle(cell, "discrete", "ridge")),
            bound=0.95,
            below=True,
        ),
        _claim(
            "a2/slowly",
            "It approaches the best predictor on the pool's tasks slowly: most of the way from ridge is still to go.",
            "share of the way from ridge's loss on the pool's tasks to that of the mixture's posterior mean",
            of_model(cells, "scaled", _share_of_the_way),
            bound=0.5,
            below=True,
        ),
    ]


def _of_fine_tuning(cells: Cells) -> list[Claim]:
    return [
        _claim(
            "a3/rise",
            "Fine-tuning on the pool soon raises the loss on continuous tasks.",
            "late loss on continuous tasks at the second checkpoint, over before fine-tuning",
            of_model(cells, "scaled", lambda cell: _late(cell, _steps(cell)[2]) / _late(cell, "0")),
            bound=1.05,
            note=_by_steps(cells, "scaled", lambda cell, steps: _late(cell, steps)),
        ),
        _claim(
            "a3/inference",
            "It comes to treat continuous tasks as the pool's.",
            "slope towards the pool's posterior mean (g_hat) on continuous tasks, after fine-tuning less before",
            of_model(cells, "scaled", lambda cell: _g_hat(cell, _steps(cell)[-1]) - _g_hat(cell, "0")),
            bound=0.0,
            note=_by_steps(cells, "scaled", _g_hat),
        ),
        _claim(
            "a3/prior",
            "All that changes is the prior: some mixture still explains its predictions as well as before.",
            "mean squared distance of the nearest mixture on continuous tasks, after fine-tuning over before",
            of_model(cells, "scaled", lambda cell: _residual(cell, _steps(cell)[-1]) / _residual(cell, "0")),
            bound=1.1,
            below=True,
            note=_joined("ours", "residual " + _by_steps(cells, "scaled", _residual), _effective(cells)),
        ),
        _claim(
            "a4/near",
            "Continuous tasks near the pool's are hurt more than those far from them.",
            "rise of the late loss at the end of fine-tuning, nearest fifth less farthest fifth",
            of_model(cells, "scaled", lambda cell: _rises(cell)[0] - _rises(cell)[-1]),
            bound=0.0,
            note=_bands(cells),
        ),
    ]


def _of_scaling(cells: Cells) -> list[Claim]:
    return [
        _claim(
            "a5/recovery",
            "Scaled labels bring back what early fine-tuning took.",
            f"share of the rise that gamma {GAMMA} takes back, at the first checkpoint",
            of_model(cells, "scaled", lambda cell: recovered(cell, _steps(cell)[1])),
            bound=0.3,
            note=_by_steps(cells, "scaled", recovered, tuned=True),
        ),
        _claim(
            "a5/difference",
            "They do so beyond what they do to the network before it is fine-tuned.",
            f"1 less the rise at gamma {GAMMA} over the rise at gamma 1, at the first checkpoint",
            of_model(cells, "scaled", lambda cell: difference_in_differences(cell, _steps(cell)[1])),
            bound=0.0,
            note=_joined("ours", _by_steps(cells, "scaled", difference_in_differences, tuned=True)),
        ),
        _claim(
            "a5/decay",
            "The longer fine-tuning lasts, the less they bring back.",
            "the same share, least fall from a checkpoint to the next",
            of_model(cells, "scaled", _least_fall),
            bound=0.0,
            note="ours: the paper has one length of fine-tuning",
        ),
        _claim(
            "a5/cost",
            "They cost the network nothing before it is fine-tuned.",
            f"late loss on continuous tasks before fine-tuning, gamma {GAMMA} over gamma 1",
            of_model(cells, "scaled", lambda cell: _late(cell, "0", GAMMA) / _late(cell, "0")),
            bound=1.03,
            below=True,
            note=_joined("ours", _by_gamma(cells, "scaled")),
        ),
        _claim(
            "a5/control",
            "Where pretraining never covered labels so large, they bring back nothing.",
            f"share of the rise that gamma {GAMMA} takes back, the best checkpoint, after pretraining at unit scale",
            of_model(cells, "unit", lambda cell: max(recovered(cell, steps) for steps in _steps(cell)[1:])),
            bound=0.0,
            below=True,
            note=_joined("ours", _by_steps(cells, "unit", recovered, tuned=True), _by_gamma(cells, "unit")),
        ),
    ]


def _of_the_pools_lead(cells: Cells) -> list[Claim]:
    both = {seed: {"both": dict(found)} for seed, found in cells.items() if {"continuous", "pool"} <= found.keys()}
    return [
        _claim(
            "a6/sooner",
            "A pool of tasks teaches ridge regression sooner than continuous tasks do.",
            f"steps until the loss on continuous tasks is {NEAR} of ridge's, by a pool over by those tasks",
            of_model(both, "both", lambda cell: _steps_to_ridge(cell, "pool") / _steps_to_ridge(cell, "continuous")),
            bound=1.0,
            below=True,
            note=_curves(both),
        ),
        _claim(
            "a6/leaves",
            "Then it leaves ridge regression for the pool.",
            "loss on continuous tasks at the end of training on a pool, over its lowest on the way",
            of_model(cells, "pool", lambda cell: _end(cell)["continuous"] / min(_curve(cell, "continuous"))),
            bound=1.1,
        ),
    ]


def recovered(cell: Cell, steps: str, gamma: str = GAMMA) -> float:
    """The share of the rise on continuous tasks that scaled labels take back; below 0 where they make it worse."""
    return (_late(cell, steps) - _late(cell, steps, gamma)) / (_late(cell, steps) - _late(cell, "0"))


def difference_in_differences(cell: Cell, steps: str, gamma: str = GAMMA) -> float:
    """1 less the rise under scaled labels over the rise without: what the scaling costs the base is taken out."""
    return 1 - (_late(cell, steps, gamma) - _late(cell, "0", gamma)) / (_late(cell, steps) - _late(cell, "0"))


def _late(cell: Cell, steps: str, gamma: str = "1") -> float:
    """Loss on continuous tasks at places that have seen as many pairs as a task has weights."""
    return float(cell["by_steps"][steps]["continuous"][gamma]["late"])


def _all(cell: Cell, kind: str) -> float:
    measured = cell["by_steps"]["0"]
    return float((measured["continuous"]["1"] if kind == "continuous" else measured["discrete"])["all"])


def _oracle(cell: Cell, kind: str, name: str) -> float:
    return float(cell["oracles"][kind][name]["all"])


def _share_of_the_way(cell: Cell) -> float:
    ridge, best = (_oracle(cell, "discrete", name) for name in ("ridge", "mixture"))
    return (ridge - _all(cell, "discrete")) / (ridge - best)


def _g_hat(cell: Cell, steps: str) -> float:
    return float(cell["by_steps"][steps]["inferred"]["continuous"]["g_hat"])


def _residual(cell: Cell, steps: str) -> float:
    return float(cell["by_steps"][steps]["inferred"]["continuous"]["residual"])


def _alpha(cell: Cell, steps: str) -> float:
    return float(cell["by_steps"][steps]["inferred"]["continuous"]["alpha"])


def _rises(cell: Cell) -> list[float]:
    """By distance from the pool, from near to far."""
    before, after = (cell["by_steps"][steps]["bands"] for steps in ("0", _steps(cell)[-1]))
    return [late - early for early, late in zip(before, after, strict=True)]


def _least_fall(cell: Cell) -> float:
    return min(early - late for early, late in pairwise(recovered(cell, steps) for steps in _steps(cell)[1:]))


def _steps(cell: Cell) -> list[str]:
    """The checkpoints, 0 among them, in order."""
    return sorted(cell["by_steps"], key=int)


def _end(cell: Cell) -> Cell:
    last: Cell = cell["curve"][max(cell["curve"], key=int)]
    return last


def _curve(cell: Cell, kind: str) -> list[float]:
    return [cell["curve"][step][kind] for step in sorted(cell["curve"], key=int)]


def _steps_to_ridge(cell: Cell, name: str) -> int:
    """The first look at which the network was near ridge regression; the whole of training if it never was."""
    curve, level = cell[name]["curve"], NEAR * cell["continuous"]["oracles"]["continuous"]
    steps = sorted(map(int, curve))
    return next((step for step in steps if curve[str(step)]["continuous"] <= level), steps[-1])


def _mean(cells: Cells, name: str, quantity: Callable[[Cell], Sequence[float]]) -> list[float]:
    """Several numbers of one network, each the mean over seeds; none where no seed has it."""
    found = [quantity(seed[name]) for seed in cells.values() if name in seed]
    return [float(value) for value in np.mean(found, axis=0)] if found else []


def _by_steps(cells: Cells, name: str, quantity: Callable[[Cell, str], float], *, tuned: bool = False) -> str:
    """At every checkpoint, or only at those after fine-tuning."""
    steps = next((_steps(seed[name])[tuned:] for seed in cells.values() if name in seed), [])
    means = _mean(cells, name, lambda cell: [quantity(cell, step) for step in steps])
    return ", ".join(f"{value:.3g} at {step}" for value, step in zip(means, steps, strict=False)) + " steps"


def _by_gamma(cells: Cells, name: str) -> str:
    """Before fine-tuning, the late loss by what labels are multiplied by."""
    gammas = next((list(seed[name]["by_steps"]["0"]["continuous"]) for seed in cells.values() if name in seed), [])
    means = _mean(cells, name, lambda cell: [_late(cell, "0", gamma) for gamma in gammas])
    told = ", ".join(f"{value:.3g} at gamma {gamma}" for value, gamma in zip(means, gammas, strict=False))
    return f"before fine-tuning {told}"


def _effective(cells: Cells) -> str:
    return "alpha " + _by_steps(cells, "scaled", _alpha)


def _bands(cells: Cells) -> str:
    return "from near to far " + ", ".join(f"{value:+.3f}" for value in _mean(cells, "scaled", _rises))


def _curves(both: Cells) -> str:
    """How many steps it took either network."""
    means = _mean(both, "both", lambda cell: [_steps_to_ridge(cell, name) for name in ("pool", "continuous")])
    return "{:.0f} steps against {:.0f}".format(*means) if means else ""


def _joined(*notes: str) -> str:
    return "; ".join(filter(None, notes))
