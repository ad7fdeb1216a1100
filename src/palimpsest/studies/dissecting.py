"""Does fine-tuning-based unlearning erase, and which measure would tell?

Hong et al. 2024 (arXiv 2410.06606) put the original's activations back into an unlearned model, see most of the answers
return, and conclude that the knowledge is still in its value vectors. The same is done here to a model that never
unlearned anything (sham), and beside two measures that have a scale of their own: the Unlearning Depth Score (UDS,
arXiv 2605.24614), and what relearning some subjects brings back of others.
"""

import math
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

import numpy as np

from palimpsest.studies.cells import Cell, Cells, by_model, joined, mean, means, over_models
from palimpsest.studies.claims import Claim
from palimpsest.studies.dissecting_cells import Bench, at_layer
from palimpsest.studies.forget_matrix import spearman
from palimpsest.studies.regimes import REGIMES
from palimpsest.studies.unlearned_models import CELLS, METHODS, fine_tuning
from palimpsest.unlearn.needle import Needle
from palimpsest.unlearn.rmu import RMU

SOURCE, DEPTH, TRACES, RELEARNING = "arXiv 2410.06606", "arXiv 2605.24614", "arXiv 2406.11614", "arXiv 2410.08827"
PROBES = "arXiv 2402.16835"
REGIME = "people"
BOTH = "coefficients and attention"
OTHER_FORMS = {"krs_of_sums": "as a ratio of sums", "krs_kl": "by the KL", "lpr": "by log-probability"}

_claim = partial(Claim.over, source=SOURCE)


def run(seeds: Sequence[int], folder: Path, cells: Sequence[str] = CELLS) -> list[Claim]:
    """Measure what is missing of these cells, then judge the claims.

    Args:
        seeds: of models, methods and relearning.
        folder: keeps one JSON file a model; what is there is not measured again.
        cells: which models.
    """
    return judge(
        {
            seed: Bench(lambda seed: REGIMES[REGIME](seed, None), seed, folder / f"seed-{seed}").measure(cells)
            for seed in seeds
        }
    )


def judge(cells: Cells) -> list[Claim]:
    """Every claim, from the cells by seed; those whose cells are missing are left out."""
    claims = [*_of_the_paper(cells), *_of_sham(cells), *_of_depth(cells), *_of_matrices(cells), *_of_needle(cells)]
    claims += [*_of_relearning(cells), *_of_everything_else(cells), *_of_probes(cells)]
    return [claim for claim in claims if claim.seeds]


def _of_the_paper(cells: Cells) -> list[Claim]:
    names = fine_tuning()
    gains = over_models(cells, names, lambda cell: _krs(cell, "coefficients") - _krs(cell, "value"))
    shares = over_models(cells, names, lambda cell: _krs(cell, "attention") / _krs(cell, "coefficients"))
    cosines = over_models(cells, names, _cosine)
    return [
        _claim(
            "a/coefficients",
            "The original's coefficients bring back more of the answers than its value vectors do.",
            "KRS, coefficients patched less value matrices restored, all layers, mean over fine-tuning methods",
            means(gains),
            bound=0.0,
            note=joined(_both(cells, names, "coefficients", "value"), _short_of_the_level(cells, names)),
        ),
        _claim(
            "a/attention",
            "Attention's outputs alone bring back little: less than half of what coefficients do.",
            "KRS, attention patched over coefficients patched, all layers, mean over fine-tuning methods",
            means(shares),
            bound=0.5,
            below=True,
            note=_both(cells, names, "attention", "coefficients"),
        ),
        _claim(
            "a/final",
            "Of single layers, the last one's coefficients bring back most.",
            "KRS, coefficients patched in one layer, the last less the best of the others, mean over the same methods",
            means(over_models(cells, names, _lead_of_the_last)),
            bound=0.0,
            note=_profile(cells, names),
        ),
        _claim(
            "a/cosine",
            "Fine-tuning methods leave the value vectors as they were.",
            "median cosine of the traced value vectors with the original's, the method where it is lowest",
            [min(values.values()) for values in cosines],
            bound=0.98,
            note=by_model(cosines),
        ),
    ]


def _of_sham(cells: Cells) -> list[Claim]:
    """What never unlearned anything shows as well is no evidence of knowledge that is only suppressed."""
    names = fine_tuning()
    sham, unlearned = (over_models(cells, some, lambda cell: _krs(cell, BOTH)) for some in (["sham"], [*names, "sham"]))
    ratios = [values["sham"] / mean([values[name] for name in names]) for values in unlearned]
    return [
        _claim(
            "b/recovery",
            "In a sham, which unlearned nothing, the original's activations bring back most of what they do elsewhere.",
            f"KRS of {BOTH} in all layers, sham over the mean of fine-tuning methods",
            ratios,
            bound=0.5,
            note=joined("ours: the paper has no such control", by_model(unlearned or sham)),
        ),
        _claim(
            "b/pattern",
            "In a sham, too, coefficients bring back more than value vectors do.",
            "KRS of sham, coefficients patched less value matrices restored, all layers",
            means(over_models(cells, ["sham"], lambda cell: _krs(cell, "coefficients") - _krs(cell, "value"))),
            bound=0.0,
            note=joined("ours", _both(cells, ["sham"], "coefficients", "value")),
        ),
        _claim(
            "b/cosine",
            "In a sham, too, value vectors are as they were.",
            "median cosine of the traced value vectors with the original's",
            means(over_models(cells, ["sham"], _cosine)),
            bound=0.98,
            note="ours",
        ),
    ]


def _of_depth(cells: Cells) -> list[Claim]:
    sham, gold = (over_models(cells, [name], _depth) for name in ("sham", "gold"))
    scores = over_models(cells, fine_tuning(), _depth)
    return [
        _claim(
            "c/sham",
            "The Unlearning Depth Score finds nothing unlearned in a sham.",
            "UDS of sham",
            means(sham),
            bound=0.2,
            below=True,
            source=DEPTH,
            note=by_model(scores),
        ),
        _claim(
            "c/gold",
            "It finds everything unlearned in gold, by which it is scaled.",
            "UDS of gold",
            means(gold),
            bound=0.99,
            source=DEPTH,
        ),
    ]


def _of_matrices(cells: Cells) -> list[Claim]:
    """Where a method worked is where restoring brings everything back, and RMU's scrambling passes for depth."""
    names = fine_tuning()
    restored = over_models(cells, names, lambda cell: _krs(cell, "value"))
    depths = over_models(cells, [RMU.name], _depth)
    return [
        _claim(
            "d/rmu",
            "Restoring the value matrices undoes RMU.",
            "KRS of RMU, value matrices restored in all layers",
            means(over_models(cells, [RMU.name], lambda cell: _krs(cell, "value"))),
            bound=0.9,
            note=joined("it changes no others, so by construction", f"UDS {mean(means(depths)):.2f}" if depths else ""),
        ),
        _claim(
            "d/others",
            "It does not undo methods that move every weight.",
            "KRS, value matrices restored in all layers, mean over fine-tuning methods",
            means(restored),
            bound=0.5,
            below=True,
            note=joined("ours", by_model(restored)),
        ),
    ]


def _of_needle(cells: Cells) -> list[Claim]:
    names = [Needle.name, "full"]
    kept = [seed["needle"]["forget"] / seed["full"]["forget"] for seed in cells.values() if set(names) <= seed.keys()]
    return [
        _claim(
            "e/trace",
            "Noise on the traced vectors alone passes for unlearning by the intrinsic score.",
            "median cosine of the traced value vectors with the original's, after Needle",
            means(over_models(cells, [Needle.name], _cosine)),
            bound=0.5,
            below=True,
            source=TRACES,
            note="ours: together with e/answers, the score can be met without forgetting",
        ),
        _claim(
            "e/answers",
            "It leaves a model that still answers.",
            "forget probability, after Needle over before",
            kept,
            bound=0.5,
            source=TRACES,
            note="ours",
        ),
    ]


def _of_relearning(cells: Cells) -> list[Claim]:
    names = [*(method.name for method in METHODS), Needle.name]
    back, taught = (over_models(cells, [*fine_tuning(), "gold"], quantity) for quantity in (_comes_back, _taught))
    depths, returns = over_models(cells, names, _depth), over_models(cells, names, _comes_back)
    return [
        _claim(
            "f/order",
            "The deeper UDS finds a method, the less of held-out subjects comes back by relearning others.",
            "Spearman correlation over methods of UDS with the held-out subjects' probability after relearning",
            [order for seed in cells.values() if (order := _order(seed, names)) is not None],
            bound=0.0,
            below=True,
            source=DEPTH,
            note=joined("ours", f"UDS {by_model(depths)}", f"relearned {by_model(returns)}") if depths else "",
        ),
        _claim(
            "g/returns",
            "Relearning some forgotten subjects brings others back, more than in a model that never knew them.",
            "held-out subjects' probability after relearning, mean over fine-tuning methods less gold",
            [mean([v for name, v in values.items() if name != "gold"]) - values["gold"] for values in back],
            bound=0.0,
            source=RELEARNING,
            note=joined(by_model(back), f"of the subjects taught {by_model(taught)}"),
        ),
    ]


def _of_everything_else(cells: Cells) -> list[Claim]:
    """Any training moves activations, so what unlearning does to other rows stands over what a sham does to them."""
    names = fine_tuning()
    moved = over_models(cells, [*names, "sham"], lambda cell: cell["moved"]["coef"]["unseen"])
    spills = over_models(cells, [*names, "sham"], lambda cell: _spill(cell, "coef"))
    harm = over_models(cells, [*names, "sham"], lambda cell: float(cell["kl_unseen"]))
    return [
        _claim(
            "h/everywhere",
            "Unlearning changes how a model reads everything else, more than training on retain rows does.",
            "relative change of coefficients on unseen rows, mean over fine-tuning methods over that of sham",
            [mean([v for name, v in values.items() if name != "sham"]) / values["sham"] for values in moved],
            bound=1.0,
            note=joined(
                f"change on unseen over change on forget rows: {by_model(spills)}" if spills else "",
                f"KL on unseen rows: {by_model(harm)}" if harm else "",
            ),
        )
    ]


def _of_probes(cells: Cells) -> list[Claim]:
    """At the layer at which the original is read best, so that no model has a layer chosen for it."""
    names = [*(method.name for method in METHODS), "gold"]
    leads = [
        {name: seed[name]["probe"][_best_read(seed["full"])]["lead"] for name in names}
        for seed in cells.values()
        if {*names, "full"} <= seed.keys()
    ]
    read = [seed["full"]["probe"][_best_read(seed["full"])]["lead"] for seed in cells.values() if "full" in seed]
    return [
        _claim(
            "i/probe",
            "A linear probe still reads forgotten answers that are no longer said.",
            "how far a probe of other subjects is above its controls, mean over methods less gold",
            [mean([v for name, v in values.items() if name != "gold"]) - values["gold"] for values in leads],
            bound=0.0,
            source=PROBES,
            note=joined(f"full {mean(read):.2f}" if read else "", by_model(leads)),
        )
    ]


def _best_read(full: Cell) -> int:
    leads = [layer["lead"] for layer in full["probe"]]
    return leads.index(max(leads))


def _spill(cell: Cell, kind: str) -> float:
    return float(cell["moved"][kind]["unseen"] / cell["moved"][kind]["forget"])


def _order(seed: Mapping[str, Cell], names: Sequence[str]) -> float | None:
    """How depth and what relearning brings back go together over methods; None where one of them has no depth."""
    depths, returns = (over_models({0: seed}, names, quantity) for quantity in (_depth, _comes_back))
    return spearman([*depths[0].values()], [*returns[0].values()]) if depths else None


def _krs(cell: Cell, what: str, form: str = "krs") -> float:
    """The paper's score; NaN where the model lost nothing that could come back."""
    value = cell["recovered"][what][form]
    return math.nan if value is None else float(value)


def _lead_of_the_last(cell: Cell) -> float:
    *others, last = _layers(cell)
    return last - max(others)


def _layers(cell: Cell) -> list[float]:
    return [_krs(cell, at_layer("coefficients", layer)) for layer in range(len(cell["depth"]["encoding"]))]


def _cosine(cell: Cell) -> float:
    return float(cell["vectors"]["cosine"])


def _depth(cell: Cell) -> float:
    score = cell["depth"]["score"]
    return math.nan if score is None else float(score)


def _comes_back(cell: Cell) -> float:
    return float(cell["relearned"]["held_out"]["after"])


def _taught(cell: Cell) -> float:
    """What it answers about the subjects that it relearned: where that is little, the relearner was too weak."""
    return float(cell["relearned"]["taught"]["after"])


def _both(cells: Cells, names: Sequence[str], one: str, other: str) -> str:
    """The two sides of a comparison in every form of the score."""
    told = []
    for form, how in {"krs": "KRS", **OTHER_FORMS}.items():
        sides = [means(over_models(cells, names, partial(_krs, what=what, form=form))) for what in (one, other)]
        if all(sides):
            told.append(f"{how} {mean(sides[0]):.2f} against {mean(sides[1]):.2f}")
    return ", ".join(told)


def _profile(cells: Cells, names: Sequence[str]) -> str:
    """Layer by layer, the mean over seeds and methods."""
    found = [_layers(seed[name]) for seed in cells.values() if set(names) <= seed.keys() for name in names]
    return "from the first layer " + ", ".join(f"{value:.2f}" for value in np.mean(found, axis=0)) if found else ""


def _short_of_the_level(cells: Cells, names: Sequence[str]) -> str:
    short = [name for name in names if any(name in seed and not seed[name]["reached"] for seed in cells.values())]
    return f"short of gold's level in some seed: {', '.join(short)}" if short else ""
