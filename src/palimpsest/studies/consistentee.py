"""ConsistentEE: does a learned policy beat confidence at equal depth, and does training the exits for it add anything?

Claims of Zeng et al. 2024 (arXiv 2312.11882), in a world whose questions need one block a hop, and some of which
nothing answers. Every rule is chosen on held-out questions and told on others, and every network has had equally many
steps.
"""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from palimpsest.studies.cells import Cell, Cells, joined, of_model, over_models
from palimpsest.studies.claims import Claim
from palimpsest.studies.consistentee_cells import BUDGETS, CELLS, WAYS, Networks, Sizes

PAPER = "arXiv 2312.11882"
NONE = 0.01
"""An accuracy that counts as none: one point."""
_claim = partial(Claim.over, source=PAPER)


def run(seeds: Sequence[int], folder: Path, cells: Sequence[str] = CELLS, sizes: Sizes | None = None) -> list[Claim]:
    """Measure what is missing of these cells, then judge the claims.

    Args:
        seeds: of worlds, networks and policies.
        folder: keeps one JSON file a network and one set of weights a seed; what is there is not made again.
        cells: which networks.
        sizes: how much is trained and asked; the study's own unless given.
    """
    sizes = sizes or Sizes()
    return judge({seed: Networks(seed, folder / f"seed-{seed}", sizes).measure(cells) for seed in seeds})


def judge(cells: Cells) -> list[Claim]:
    """Every claim, from the cells by seed; those whose cells are missing are left out."""
    claims = [*_of_the_policy(cells), *_of_joint_training(cells), *_of_hardness(cells), *_of_where_depth_goes(cells)]
    return [claim for claim in claims if claim.seeds]


def _of_the_policy(cells: Cells) -> list[Claim]:
    def ahead(budget: float, other: str) -> list[float]:
        return of_model(cells, "matched", lambda cell: accuracy(cell["exact"], budget) - accuracy(cell[other], budget))

    def layers(name: str) -> list[float]:
        return of_model(cells, "matched", lambda cell: cell[name].get("nearly full", {}).get("layers", float("nan")))

    fewer = of_model(cells, "matched", lambda cell: _nearly_full(cell, "entropy") - _nearly_full(cell, "exact"))
    return [
        _claim(
            "a/policy",
            "At 2 of 6 blocks a learned policy is 3 points more accurate than an entropy threshold.",
            "accuracy of the policy minus that of the threshold, on the same network",
            ahead(2.0, "entropy"),
            bound=0.03,
            note=_by_budget(cells),
        ),
        _claim(
            "a/half",
            "At 3 of 6 blocks it is not: the gain is at high speed-up.",
            "the same difference",
            ahead(3.0, "entropy"),
            bound=NONE,
            below=True,
            note="a summary of the paper says that its gain is greatest at high speed-up",
        ),
        _claim(
            "a/patience",
            "It needs fewer blocks for full accuracy less one point than patience does.",
            "blocks of patience minus blocks of the policy",
            of_model(cells, "matched", lambda cell: _nearly_full(cell, "patience") - _nearly_full(cell, "exact")),
            bound=0.0,
            note=joined("ours", _means("patience", layers("patience"))),
        ),
        _claim(
            "a/layers",
            "It needs fewer blocks for full accuracy less one point than an entropy threshold does.",
            "blocks of the threshold minus blocks of the policy",
            fewer,
            bound=0.0,
            note=_means("entropy", layers("entropy")) + ", " + _means("policy", layers("exact")),
        ),
        _claim(
            "a/reinforce",
            "Sampling the exits (REINFORCE) finds no better policy than the exact objective.",
            "accuracy at 2 blocks, sampled minus exact",
            of_model(cells, "matched", lambda cell: accuracy(cell["reinforce"], 2.0) - accuracy(cell["exact"], 2.0)),
            bound=NONE,
            below=True,
            note="ours",
        ),
    ]


def _of_joint_training(cells: Cells) -> list[Claim]:
    def over_matched(name: str, quantity: Callable[[Cell], float]) -> list[float]:
        found = over_models(cells, ["matched", name], quantity)
        return [seed[name] - seed["matched"] for seed in found]

    def policy_or_entropy(cell: Cell) -> float:
        return accuracy(cell["policy" if "policy" in cell else "entropy"], 3.0)

    return [
        _claim(
            "b/paper",
            "ConsistentEE, all of its stages, beats a weighted sum with an entropy threshold.",
            "accuracy at 3 blocks minus that of the network trained as long for all exits",
            over_matched("consistentee", policy_or_entropy),
            bound=0.0,
            note=f"it keeps to 2 blocks in {_reaching(cells, 2.0)} of {len(cells)} seeds at any price tried: time is "
            "free for what nothing answers",
        ),
        _claim(
            "b/consistentee",
            "Training network and heads for the exits that are taken, as the paper does, needs fewer blocks than a "
            "policy that is trained after the fact on a network trained for all exits.",
            "blocks at full accuracy less a point, minus those of that policy",
            over_matched("consistentee", lambda cell: _nearly_full(cell, _policy(cell))),
            bound=0.0,
            below=True,
        ),
        _claim(
            "b/exact",
            "Training them so, exactly and with uniform cost, is more accurate than that policy.",
            "accuracy at 2 blocks minus that of the policy trained after the fact",
            over_matched("exact", lambda cell: accuracy(cell[_policy(cell)], 2.0)),
            bound=0.0,
            note="ours",
        ),
        _claim(
            "b/classifiers",
            "Heads that are trained only where they are used are better at full depth.",
            "accuracy of the last exit, ConsistentEE minus all exits at once",
            over_matched("consistentee", lambda cell: float(cell["full"])),
            bound=0.0,
        ),
    ]


def _of_hardness(cells: Cells) -> list[Claim]:
    def against_uniform(name: str) -> list[float]:
        return of_model(cells, "matched", lambda cell: _nearly_full(cell, name) - _nearly_full(cell, "exact"))

    return [
        _claim(
            f"c/{name}",
            f"Weighing time by hardness ({name}) needs fewer blocks than uniform cost.",
            "blocks at full accuracy less a point, minus those under uniform cost; policies after the fact",
            against_uniform(name),
            bound=0.0,
            below=True,
            note="" if name == "memorized" else "ours: no time for what the last layer gets wrong",
        )
        for name in WAYS
        if name in ("memorized", "solvable")
    ]


def _of_where_depth_goes(cells: Cells) -> list[Claim]:
    def spent(rule: str, kind: str) -> list[float]:
        return of_model(cells, "matched", lambda cell: _nearly(cell, rule, kind))

    def saved(kind: str) -> list[float]:
        return of_model(cells, "matched", lambda cell: _nearly(cell, "entropy", kind) - _nearly(cell, "exact", kind))

    return [
        _claim(
            "d/noise",
            "What the policy saves, it saves on questions that nothing answers.",
            "blocks spent on noise at nearly full accuracy, entropy minus policy",
            saved("noise"),
            bound=1.0,
            note=_means("entropy", spent("entropy", "noise")) + ", " + _means("policy", spent("exact", "noise")),
        ),
        _claim(
            "d/solvable",
            "On two hops, which it solves, it saves nothing.",
            "blocks spent on questions of two hops at nearly full accuracy, entropy minus policy",
            saved("2 hops"),
            bound=0.25,
            below=True,
            note="ours",
        ),
    ]


def accuracy(frontier: Cell, budget: float) -> float:
    """At a budget; not a number where no rule keeps to it."""
    return float(frontier.get(f"{budget:g}", {}).get("accuracy", float("nan")))


def _accuracy_of(name: str, budget: float, cell: Cell) -> float:
    return accuracy(cell[name], budget)


def _policy(cell: Cell) -> str:
    """Where a cell keeps its policy: one that was trained jointly, or else after the fact."""
    return "policy" if "policy" in cell else "exact"


def _nearly_full(cell: Cell, name: str) -> float:
    return float(cell[name].get("nearly full", {}).get("layers", float("nan")))


def _nearly(cell: Cell, name: str, kind: str) -> float:
    return float(cell[name].get("nearly full", {}).get("layers_by_kind", {}).get(kind, float("nan")))


def _reaching(cells: Cells, budget: float) -> int:
    """In how many seeds ConsistentEE keeps to a budget."""
    return len(of_model(cells, "consistentee", lambda cell: accuracy(cell["policy"], budget)))


def _means(name: str, values: Sequence[float]) -> str:
    return f"{name} {sum(values) / len(values):.2f}" if values else f"{name} none"


def _by_budget(cells: Cells) -> str:
    """The table of accuracies, in words."""
    told = []
    for name in ("entropy", "patience", "exact", "memorized"):
        at = [of_model(cells, "matched", partial(_accuracy_of, name, budget)) for budget in BUDGETS]
        told.append(f"{name} " + "/".join(f"{sum(found) / len(found):.3f}" if found else "-" for found in at))
    return f"at {'/'.join(f'{budget:g}' for budget in BUDGETS)} blocks: " + ", ".join(told)
