"""Can someone get it back, by which attack, and does anything cheap tell beforehand?

Of every model of `unlearned_models`: rounding, pruning and shaking its weights, other prompts, projecting directions
out, and relearning on related facts, on the forget set and on retain rows. What an attack recovers is a share of the
way from gold to the original, both attacked alike.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

import numpy as np

from palimpsest.metrics.auc import auc
from palimpsest.studies.cells import Cell, Cells, joined, mean
from palimpsest.studies.claims import Claim
from palimpsest.studies.recovery_cells import GRID, Bench
from palimpsest.studies.regimes import REGIMES
from palimpsest.studies.unlearned_models import CELLS, METHODS, fine_tuning
from palimpsest.unlearn.kfade import KFade
from palimpsest.unlearn.rmu import RMU

RELEARNING, QUANTISATION, UNRELATED, RMU_SHALLOW = (
    "arXiv 2410.08827",
    "arXiv 2410.16454",
    "arXiv 2409.18025",
    "arXiv 2406.11717",
)
REGIME = "people"
SMALLEST_GAP = 0.2
"""Of answer probability, between original and gold: where they are closer, the attack broke one or taught the other."""
MARGIN = 0.1
"""A share that counts as none."""
FOUR_BITS = ("int4", "int4_grouped", "nf4")
_claim = partial(Claim.over, source=RELEARNING)

Seed = Mapping[str, Cell]


def run(seeds: Sequence[int], folder: Path, cells: Sequence[str] = CELLS) -> list[Claim]:
    """Measure what is missing of these cells, then judge the claims.

    Args:
        seeds: of models, methods and relearning.
        folder: keeps one JSON file a model; what is there is not measured again.
        cells: which models.
    """
    benches = {seed: Bench(lambda seed: REGIMES[REGIME](seed, None), seed, folder / f"seed-{seed}") for seed in seeds}
    return judge({seed: bench.measure(cells) for seed, bench in benches.items()})


def judge(cells: Cells) -> list[Claim]:
    """Every claim, from the cells by seed; those whose cells are missing are left out."""
    claims = [*_of_relearning(cells), *_of_other_attacks(cells), *_of_prediction(cells)]
    return [claim for claim in claims if claim.seeds]


def _of_relearning(cells: Cells) -> list[Claim]:
    """On related facts, asked about other subjects: of all lessons the one that tells nothing of what is asked."""
    names = [*(method.name for method in METHODS), "sham"]
    by_name = {name: _shares(cells, name, lambda seed, name: relearned(seed, name, "related")) for name in names}
    order = ", ".join(
        f"{name} {mean(values):.2f}"
        for name, values in sorted(by_name.items(), key=lambda item: -mean(item[1] or [0.0]))
        if values
    )
    methods = [
        _claim(
            f"a/{name}",
            f"What {name} forgot does not come back by relearning about other forgotten subjects.",
            "share of the way from gold to original, at the rate and budget where it is largest",
            values,
            bound=MARGIN,
            below=True,
            note=order if name == KFade.name else "",
        )
        for name, values in by_name.items()
        if name != "sham"
    ]
    sham = _claim(
        "a/sham",
        "The measure finds what a sham never forgot.",
        "the same share, of sham",
        by_name["sham"],
        bound=0.5,
        note="ours",
    )
    benign = {name: _shares(cells, name, lambda seed, name: relearned(seed, name, "retain")) for name in fine_tuning()}
    return [
        *methods,
        sham,
        _claim(
            "b/benign",
            "Training on retain rows alone brings forgotten answers back.",
            "share of the way from gold to original, mean over fine-tuning methods",
            _mean_by_seed(benign),
            bound=MARGIN,
            source=UNRELATED,
            note=_told(benign),
        ),
    ]


def _of_other_attacks(cells: Cells) -> list[Claim]:
    names = fine_tuning()

    def best(seed: Seed, name: str, prefixes: tuple[str, ...]) -> float | None:
        found = [
            share
            for attack in seed[name]["attacked"]
            if attack.startswith(prefixes) and (share := recovered(seed, name, attack)) is not None
        ]
        return max(found, default=None)

    def of(prefixes: tuple[str, ...], models: Sequence[str]) -> dict[str, list[float]]:
        return {name: _shares(cells, name, partial(best, prefixes=prefixes)) for name in models}

    rounded, prompts = of(FOUR_BITS, names), of(("paraphrase", "prefix", "few_shot", "hint"), names)
    shaken, projected = of(("pruned", "noise"), names), of(("direction",), [*names, RMU.name])
    return [
        _claim(
            "c/four_bits",
            "Rounding the weights to four bits brings back what fine-tuning methods forgot.",
            "share of the way from gold to original, the best of three roundings, mean over methods",
            _mean_by_seed(rounded),
            bound=MARGIN,
            source=QUANTISATION,
            note=_told(rounded),
        ),
        _claim(
            "c/perturbed",
            "So does pruning or shaking them.",
            "the same, the best of three shares pruned and three sizes of noise",
            _mean_by_seed(shaken),
            bound=MARGIN,
            note=joined("ours", _told(shaken)),
        ),
        _claim(
            "c/prompts",
            "So do other prompts: rewordings, prefixes, examples, hints.",
            "the same, the best prompt",
            _mean_by_seed(prompts),
            bound=MARGIN,
            source="arXiv 2402.16835",
            note=joined("those under which the original still answers", _told(prompts)),
        ),
        _claim(
            "c/direction",
            "Projecting one direction out of the residual stream undoes RMU.",
            "the same, the best direction, of RMU",
            projected[RMU.name],
            bound=0.5,
            source=RMU_SHALLOW,
            note=_told(projected),
        ),
    ]


def _of_prediction(cells: Cells) -> list[Claim]:
    """Models of all seeds together: does a score tell those that relearn from those that do not?"""
    names = [*(method.name for method in METHODS), "sham", "needle"]
    models = [
        (share, seed[name]["inside"])
        for seed in cells.values()
        for name in names
        if {name, "full", "gold"} <= seed.keys() and (share := relearned(seed, name, "related")) is not None
    ]
    back = [share > MARGIN for share, _ in models]
    told = []
    for score in ("depth", "not_patched_back", "distance", "silence"):
        values = [(inside[score], comes) for (_, inside), comes in zip(models, back, strict=True)]
        stays = [value for value, comes in values if not comes and value is not None]
        returns = [value for value, comes in values if comes and value is not None]
        if stays and returns:
            told.append((score, auc(returns, stays)))
    if not told:
        return []
    # A model that relearns should have the lower score, which `auc` calls the cheaper.
    best, value = max(told, key=lambda pair: pair[1].value)
    return [
        Claim(
            "d/cheap",
            "A score that needs no training tells the models that relearn from those that do not.",
            "ours",
            f"AUC of the best of {len(told)} scores ({best}), models of all seeds together",
            value.value,
            value.low,
            value.high,
            len(cells),
            0.5,
            False,
            ", ".join(f"{score} {found.value:.2f} ({found.low:.2f} to {found.high:.2f})" for score, found in told),
        )
    ]


def recovered(seed: Seed, name: str, attack: str) -> float | None:
    """What an attack brings back, as a share; None where it leaves original and gold alike."""
    low, high = (seed[end]["attacked"].get(attack) for end in ("gold", "full"))
    if low is None or high is None or high - low < SMALLEST_GAP:
        return None
    return float((seed[name]["attacked"][attack] - low) / (high - low))


def relearned(seed: Seed, name: str, lesson: str) -> float | None:
    """The largest share over rates and budgets; None where original and gold are nowhere apart."""
    shares: list[float] = []
    for rate in GRID.learning_rates:
        curves = [
            np.array(seed[who]["relearning"][f"{lesson}, rate {rate:g}"]["asked"]) for who in (name, "gold", "full")
        ]
        own, low, high = curves
        apart = high - low >= SMALLEST_GAP
        shares += ((own - low)[apart] / (high - low)[apart]).tolist()
    return max(shares, default=None)


def _shares(cells: Cells, name: str, share: Callable[[Seed, str], float | None]) -> list[float]:
    """Seed by seed; without those in which a model is missing or nothing can be told."""
    found = [share(seed, name) for seed in cells.values() if {name, "full", "gold"} <= seed.keys()]
    return [value for value in found if value is not None]


def _mean_by_seed(by_name: Mapping[str, Sequence[float]]) -> list[float]:
    """The mean over models, seed by seed; nothing where a model is missing in some seed."""
    counts = {len(values) for values in by_name.values()}
    return [mean(values) for values in zip(*by_name.values(), strict=True)] if len(counts) == 1 else []


def _told(by_name: Mapping[str, Sequence[float]]) -> str:
    return ", ".join(f"{name} {mean(values):.2f}" for name, values in by_name.items() if values)
