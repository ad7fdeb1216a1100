"""Does what was unlearned in one language come back in another?

Kotha, Springer & Raghunathan 2024 (arXiv 2309.10105): fine-tuning changes which task a prompt is taken for more than
what the model can do, so what it lost in English is often still said in a language that fine-tuning left alone. Here
facts about invented people are unlearned in one of the two languages that a small model reads, down to what gold says,
and asked in the other, beside the original in both, a gold that never knew, a sham, and a language that nobody reads.

What comes back, and what goes with it, should depend on how far a fact is one memory. So it is measured how much of
what was told in one language is known in the other, in models that read the languages apart and in models that read
them mixed as well. Names are the same in both languages, so whatever acts on the person acts in both.
"""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from operator import itemgetter
from pathlib import Path

import numpy as np

from palimpsest.attacks.conjugate import NOTHING, SMALL_COST, Conjugation, TwoByTwo
from palimpsest.attacks.conjugate import judge as judge_form
from palimpsest.metrics.scores import Score
from palimpsest.studies.cells import Cell, Cells, by_model, joined, mean, means, of_model, over_models
from palimpsest.studies.claims import Claim
from palimpsest.studies.conjugate_cells import APART, FIRST, MIXED, SECOND, TELLINGS, UNREAD, Bench, bilingual
from palimpsest.studies.unlearned_models import CELLS, METHODS
from palimpsest.unlearn.kfade import KFade
from palimpsest.unlearn.needle import Needle

SOURCE = "arXiv 2309.10105"
CONTROLS = {"full", "gold"}
"""The models between which every other is read."""
_claim = partial(Claim.over, source=SOURCE)

Seed = Mapping[str, Cell]


def run(seeds: Sequence[int], folder: Path, cells: Sequence[str] = CELLS) -> list[Claim]:
    """Measure what is missing of these cells, then judge the claims.

    Args:
        seeds: of worlds, languages, models and methods.
        folder: keeps one JSON file a model; what is there is not measured again.
        cells: which models.
    """
    return judge(
        {
            told: {
                seed: Bench(bilingual(told, seed), seed, folder / told / f"seed-{seed}").measure(cells)
                for seed in seeds
            }
            for told in TELLINGS
        }
    )


def judge(measured: Mapping[str, Cells]) -> list[Claim]:
    """Every claim; those whose cells are missing are left out, and seeds without full or gold.

    Args:
        measured: by how the languages are told, of `TELLINGS`, the cells by seed.
    """
    seeds = {
        told: {n: seed for n, seed in cells.items() if CONTROLS <= seed.keys()} for told, cells in measured.items()
    }
    compared = {
        told: {n: {name: _compared(seed, name) for name in seed} for n, seed in cells.items()}
        for told, cells in seeds.items()
    }
    claims = [
        replace(claim, id=f"{claim.id}/{told}", quantity=f"languages {told}: {claim.quantity}")
        for told, cells in compared.items()
        for claim in (
            *_of_the_original(seeds[told]),
            *_of_methods(cells),
            *_of_carrying_over(cells),
            *_of_controls(cells),
        )
    ]
    return [claim for claim in (*claims, *_of_memory(seeds, compared)) if claim.seeds]


def conjugation(seed: Seed, name: str, language: str = SECOND) -> Conjugation:
    """What asking in a language brings back of what a model does not say in the first.

    Args:
        seed: one seed's cells, `full` and `gold` among them.
        name: the model.
        language: which of `BilingualWorld.codecs`.
    """

    def asked(model: str, language: str) -> np.ndarray:
        return np.array(seed[model]["asked"][language])

    return judge_form(
        TwoByTwo(
            codec=language,
            items=tuple(seed["full"]["items"]),
            clusters=tuple(seed["full"]["subjects"]),
            original_plain=asked("full", FIRST),
            original_encoded=asked("full", language),
            unlearned_plain=asked(name, FIRST),
            unlearned_encoded=asked(name, language),
            gold_plain=asked("gold", FIRST),
            gold_encoded=asked("gold", language),
        )
    )


def _compared(seed: Seed, name: str) -> Cell:
    """One model's numbers; NaN are the shares of a drop that cannot be seen."""
    second, unread = conjugation(seed, name), conjugation(seed, name, UNREAD)
    known = _mean(seed, "full", FIRST) - _mean(seed, "gold", FIRST)
    return {
        "net": _value(second.net),
        "carried": 1 - _value(second.difference_in_differences),
        "cost": _value(second.relative_cost),
        "unread": _value(unread.net),
        "gain": (_mean(seed, name, SECOND) - _mean(seed, name, FIRST)) / known,
        **{f"kept {where}": share / seed["full"]["kept"][where] for where, share in seed[name]["kept"].items()},
        "verdict": second.verdict,
        "reached": seed[name].get("reached", True),
    }


def _of_the_original(seeds: Cells) -> list[Claim]:
    def known(seed: Seed, language: str) -> float:
        return _mean(seed, "full", language) - _mean(seed, "gold", language)

    levels = [
        {
            f"{name} {language}": _mean(seed, name, language)
            for name in ("full", "gold")
            for language in (FIRST, SECOND, UNREAD)
        }
        for seed in seeds.values()
    ]
    return [
        _claim(
            "a/reads",
            "The original knows the facts in both languages.",
            "answer probability beyond gold's, in the language where it is less",
            [min(known(seed, FIRST), known(seed, SECOND)) for seed in seeds.values()],
            bound=0.5,
            note=joined("ours", by_model(levels)),
        )
    ]


def _of_methods(compared: Cells) -> list[Claim]:
    by_name = {name: of_model(compared, name, itemgetter("net")) for name in (*_methods(), Needle.name)}
    found = sorted(((mean(values), name) for name, values in by_name.items() if values), reverse=True)
    order = ", ".join(f"{name} {value:.2f}" for value, name in found)
    return [
        _claim(
            f"b/{name}",
            f"What {name} unlearned in one language comes back in the other.",
            "net recovery, a share of what was lost in the language of the unlearning",
            values,
            bound=NOTHING,
            note=joined(_verdicts(compared, name), _short(compared, name), order if name == KFade.name else ""),
        )
        for name, values in by_name.items()
    ]


def _of_carrying_over(compared: Cells) -> list[Claim]:
    methods = _methods()
    carried = over_models(compared, methods, itemgetter("carried"))
    kept, kept_in_first = (
        over_models(compared, methods, itemgetter(f"kept {language}")) for language in (SECOND, FIRST)
    )
    costs = over_models(compared, methods, itemgetter("cost"))
    return [
        _claim(
            "c/smaller",
            "Less is forgotten in the language in which nothing was unlearned.",
            "drop in the second language over drop in the first, mean over methods",
            means(carried),
            bound=1 - NOTHING,
            below=True,
            note=by_model(carried),
        ),
        _claim(
            "c/carries",
            "Some of the forgetting carries over to it.",
            "the same",
            means(carried),
            bound=NOTHING,
            note="ours",
        ),
        _claim(
            "c/kept",
            "The methods leave the second language as it was, so that it can be asked in.",
            "answer probability in it of facts that nothing was trained on, over the original's, mean over methods",
            means(kept),
            bound=1 - NOTHING,
            note=joined("ours", by_model(kept), f"in the first language {by_model(kept_in_first)}"),
        ),
        _claim(
            "c/cost",
            "The second language itself costs the original little.",
            "the original's loss by it over the drop in the first, mean over methods",
            means(costs),
            bound=SMALL_COST,
            below=True,
            note="ours",
        ),
    ]


def _of_controls(compared: Cells) -> list[Claim]:
    """Where nothing can come back nothing does."""
    unread = over_models(compared, _methods(), itemgetter("unread"))
    return [
        _claim(
            "d/unread",
            "A language that the model does not read brings nothing back.",
            "net recovery by it, mean over methods",
            means(unread),
            bound=NOTHING,
            below=True,
            note=joined("ours", by_model(unread)),
        ),
        *(
            _claim(
                f"d/{name}",
                statement,
                "what it says more in the second language, as a share of what the original knows beyond gold",
                of_model(compared, name, itemgetter("gain")),
                bound=NOTHING,
                below=True,
                note="ours",
            )
            for name, statement in (
                ("sham", "A sham, which unlearned nothing, has nothing that the other language could bring back."),
                ("gold", "Nor has gold, which never knew: the other language does not help to guess."),
            )
        ),
    ]


def _of_memory(seeds: Mapping[str, Cells], compared: Mapping[str, Cells]) -> list[Claim]:
    """How much of a fact the two languages have in common, and what that does to what comes back."""

    def shared(seed: Seed) -> float:
        first, second = (seed["full"]["once"][name] - _mean(seed, "gold", name) for name in (FIRST, SECOND))
        return float(second / first)

    def mean_net(values: Mapping[str, float], told: str) -> float:
        return mean([values[f"{told} {name}"] for name in _methods()])

    apart, mixed = ([shared(seed) for seed in seeds[told].values()] for told in (APART, MIXED))
    people = "answer probability beyond gold's of people told of in the first language alone, second over first"
    paired = {
        n: {f"{told} {name}": cell for told in (APART, MIXED) for name, cell in compared[told][n].items()}
        for n in sorted(compared[APART].keys() & compared[MIXED].keys())
    }
    names = [f"{told} {name}" for told in (APART, MIXED) for name in _methods()]
    nets = over_models(paired, names, itemgetter("net"))
    return [
        _claim(
            "e/twice",
            "A model that reads the languages apart learns every fact twice.",
            f"languages apart: {people}",
            apart,
            bound=NOTHING,
            below=True,
            note="ours",
        ),
        _claim(
            "e/once",
            "A model that also reads them mixed learns part of a fact once for both.",
            f"languages mixed: {people}",
            mixed,
            bound=NOTHING,
            note="ours",
        ),
        _claim(
            "e/less",
            "Less comes back where part of a fact is one memory.",
            "net recovery, languages apart less languages mixed, mean over methods",
            [mean_net(values, APART) - mean_net(values, MIXED) for values in nets],
            bound=NOTHING,
            note="ours",
        ),
    ]


def _methods() -> list[str]:
    return [method.name for method in METHODS]


def _mean(seed: Seed, name: str, language: str) -> float:
    return float(np.mean(seed[name]["asked"][language]))


def _value(score: Score | None) -> float:
    return math.nan if score is None else score.value


def _verdicts(compared: Cells, name: str) -> str:
    """How many seeds were judged how."""
    found = Counter(seed[name]["verdict"] for seed in compared.values() if name in seed)
    return ", ".join(f"{verdict} in {n}" for verdict, n in found.most_common())


def _short(compared: Cells, name: str) -> str:
    n = sum(not seed[name]["reached"] for seed in compared.values() if name in seed)
    return f"short of gold's level in {n}" if n else ""
