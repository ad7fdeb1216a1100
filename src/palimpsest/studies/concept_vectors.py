"""Is a concept one vector, does the model use it, and does what becomes of it tell forgetting from keeping silent?

Hong et al. 2024 (ConceptVectors, arXiv 2406.11614) find value vectors whose projection to the vocabulary is one
concept, hurt the model's answers with noise on them, and judge unlearning by how far they were moved. The same is done
here in a model that read about fictional worlds, beside what the paper has not: the same search for random tokens and
in gold, ablation in place of noise, a neuron that merely fires, a sham, and relearning.
"""

from collections.abc import Sequence
from functools import partial
from pathlib import Path

from palimpsest.studies.cells import Cell, Cells, by_model, joined, mean, of_model, over_models
from palimpsest.studies.claims import Claim
from palimpsest.studies.concept_cells import ABLATED, CELLS, Bench
from palimpsest.studies.forget_matrix import spearman
from palimpsest.studies.regimes import lore
from palimpsest.studies.unlearned_models import METHODS, fine_tuning
from palimpsest.unlearn.needle import Needle

SOURCE = "arXiv 2406.11614"
_claim = partial(Claim.over, source=SOURCE)


def run(seeds: Sequence[int], folder: Path, cells: Sequence[str] = CELLS) -> list[Claim]:
    """Measure what is missing of these cells, then judge the claims.

    Args:
        seeds: of models, methods and relearning.
        folder: keeps one JSON file a model; what is there is not measured again.
        cells: which models.
    """
    benches = {seed: Bench(lore, seed, folder / f"seed-{seed}") for seed in seeds}
    return judge({seed: bench.measure(cells) for seed, bench in benches.items()})


def judge(cells: Cells) -> list[Claim]:
    """Every claim, from the cells by seed; those whose cells are missing are left out."""
    claims = [*_of_finding(cells), *_of_causes(cells), *_of_traces(cells), *_of_ablation(cells), *_of_forgetting(cells)]
    return [claim for claim in claims if claim.seeds]


def _of_finding(cells: Cells) -> list[Claim]:
    precision = of_model(cells, "full", lambda cell: float(cell["found"]["precision"]))
    null = of_model(cells, "full", lambda cell: float(cell["found"]["null"]))
    return [
        _claim(
            "a/found",
            "A concept has value vectors of its own: what they say most is its tokens.",
            "precision of the best vector less that of the best for random tokens, mean over the concepts to forget",
            of_model(cells, "full", _above_the_null),
            bound=0.0,
            note=f"{mean(precision):.2f} against {mean(null):.2f}" if precision else "",
        ),
        _claim(
            "a/gold",
            "A model that never read of the concept has none.",
            "the same in gold",
            of_model(cells, "gold", _above_the_null),
            bound=0.1,
            below=True,
            note="ours",
        ),
    ]


def _of_causes(cells: Cells) -> list[Claim]:
    """Log-probability of the concept's own answers against that of other concepts'."""

    def change(cell: Cell, ablation: str, neurons: str = "concept", rows: str = "own") -> float:
        return float(cell["ablations"][ablation][neurons][rows])

    def of(ablation: str, less: tuple[str, str]) -> list[float]:
        return of_model(cells, "full", lambda cell: change(cell, ablation) - change(cell, ablation, *less))

    alone = of_model(cells, "full", partial(change, ablation="single"))
    return [
        _claim(
            "b/noise",
            "Noise on the best vector harms the concept's answers more than others'.",
            "change of the true answers' log-probability per token, the concept's less others'",
            of("noise", ("concept", "unrelated")),
            bound=0.0,
            below=True,
        ),
        _claim(
            "b/fires",
            "It harms them more than noise on the neuron that fires most on the concept's questions, whatever it says.",
            "change of the own answers' log-probability, the best vector's less that neuron's",
            of("noise", ("selective", "own")),
            bound=0.0,
            below=True,
            note="ours: noise measures how hard a neuron fires",
        ),
        _claim(
            "b/single",
            "The concept is in that vector: without it, the answers go.",
            "change of the own answers' log-probability with the best vector at zero, nats per token",
            alone,
            bound=-0.5,
            below=True,
        ),
        _claim(
            "b/set",
            "It is in a set of vectors, those to which the answers owe most.",
            "change of the own answers' log-probability with 64 vectors at zero, less that of others' answers",
            of("set", ("concept", "unrelated")),
            bound=-0.5,
            below=True,
            note="ours",
        ),
    ]


def _of_traces(cells: Cells) -> list[Claim]:
    """The intrinsic test, on the best vectors."""
    names = fine_tuning()
    cosines = over_models(cells, names, partial(_traced, of="cosine"))
    common = over_models(cells, [*names, "sham"], partial(_traced, of="jaccard"))
    still = over_models(cells, [*names, "sham", "gold"], _above_the_null)
    return [
        _claim(
            "c/cosine",
            "Fine-tuning methods leave concept vectors as they were.",
            "mean cosine of the best vectors with the original's, the method where it is lowest",
            [min(values.values()) for values in cosines],
            bound=0.98,
            note=joined(by_model(cosines), f"Jaccard of the top 20 tokens {by_model(common)}" if common else ""),
        ),
        _claim(
            "c/still",
            "What can be found in an unlearned model is the concept still.",
            "precision of the best vector less the null's, mean over fine-tuning methods",
            [mean([values[name] for name in names]) for values in still],
            bound=0.0,
            note=by_model(still),
        ),
        _claim(
            "c/sham",
            "So does training on retain rows alone: as they were is no evidence that something is only suppressed.",
            "mean cosine of the best vectors with the original's, sham",
            of_model(cells, "sham", partial(_traced, of="cosine")),
            bound=0.98,
            note="ours",
        ),
    ]


def _of_ablation(cells: Cells) -> list[Claim]:
    """Needle on the best vectors passes the test; taking out the attributed set makes the model forget."""
    kept = over_models(cells, ["full", Needle.name], _forget)
    taken = over_models(cells, ["full", ABLATED], _forget)
    others = over_models(cells, ["full", ABLATED], lambda cell: float(cell["unseen"]))
    return [
        _claim(
            "d/passes",
            "Noise on the best vectors alone passes for unlearning by the intrinsic score.",
            "mean cosine of the best vectors with the original's, after Needle",
            of_model(cells, Needle.name, partial(_traced, of="cosine")),
            bound=0.5,
            below=True,
            note="ours: together with d/answers, the score can be met without forgetting",
        ),
        _claim(
            "d/answers",
            "It leaves a model that still answers.",
            "forget probability, after Needle over before",
            [values[Needle.name] / values["full"] for values in kept],
            bound=0.5,
            note="ours",
        ),
        _claim(
            "d/set",
            "Taking out a set of 64 vectors a concept costs the forgotten answers more than others.",
            "share of the answers' probability that is left, forgotten less unseen ones",
            [
                own[ABLATED] / own["full"] - other[ABLATED] / other["full"]
                for own, other in zip(taken, others, strict=True)
            ],
            bound=0.0,
            below=True,
            note=joined(
                "ours", f"forgotten: {by_model(taken)}; unseen: {by_model(others)}" if taken and others else ""
            ),
        ),
    ]


def _of_forgetting(cells: Cells) -> list[Claim]:
    names = [*(method.name for method in METHODS), Needle.name]
    cosines = over_models(cells, names, partial(_traced, of="cosine"))
    returns = over_models(cells, names, _comes_back)
    beside_gold = over_models(cells, [*fine_tuning(), "gold"], _comes_back)
    orders = [spearman([*cosine.values()], [*back.values()]) for cosine, back in zip(cosines, returns, strict=True)]
    return [
        _claim(
            "e/order",
            "The intrinsic score tells what is erased: the less a vector was moved, the more comes back.",
            "Spearman correlation over methods of the cosine with what relearning other concepts brings back",
            orders,
            bound=0.0,
            note=joined("ours", f"cosine {by_model(cosines)}", f"relearned {by_model(returns)}") if cosines else "",
        ),
        _claim(
            "e/returns",
            "Relearning some forgotten concepts brings others back, more than in a model that never knew them.",
            "held-out concepts' probability after relearning, mean over fine-tuning methods less gold",
            [mean([values[name] for name in fine_tuning()]) - values["gold"] for values in beside_gold],
            bound=0.0,
            source="arXiv 2410.08827",
            note=joined("a world's answers are its own words: nothing can be guessed", by_model(beside_gold)),
        ),
    ]


def _above_the_null(cell: Cell) -> float:
    return float(cell["found"]["precision"] - cell["found"]["null"])


def _traced(cell: Cell, of: str) -> float:
    return float(cell["traced"][of])


def _forget(cell: Cell) -> float:
    return float(cell["forget"])


def _comes_back(cell: Cell) -> float:
    return float(cell["relearned"]["held_out"]["after"])
