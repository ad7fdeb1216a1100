"""Every score of one model, item by item: the rows from which the audit's numbers are made."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from torch import Tensor, tensor

from palimpsest.audit.internals import Internals
from palimpsest.audit.layers import Layers
from palimpsest.audit.measures import TOFU_SETS, measures
from palimpsest.audit.recovery import Recovery
from palimpsest.data.records import QA, Choice, Record, Text, subject_of
from palimpsest.metrics.divergence import kl_per_item
from palimpsest.metrics.entity import entity_scores
from palimpsest.metrics.generation import generate_answers
from palimpsest.metrics.likelihood import AnswerScores, answer_scores
from palimpsest.metrics.multiple_choice import ChoiceScores, multiple_choice
from palimpsest.metrics.rouge import rouge
from palimpsest.metrics.scores import Measure, Row
from palimpsest.metrics.statistics import ks_forget_quality
from palimpsest.metrics.tofu import TofuSets, UtilityScores, model_utility, utility_scores
from palimpsest.metrics.truth_ratio import forget_truth_ratio, truth_ratio, truth_ratio_definition
from palimpsest.models.language_model import LanguageModel
from palimpsest.unlearn.request import Request

WHOLE = "all"
"""The item and the cluster of a number that is one for a whole benchmark."""


@dataclass(frozen=True)
class Reading:
    """All that one model says and scores."""

    rows: tuple[Row, ...]
    said: dict[str, list[str]]
    """Greedy answers, or the choices taken, by set, in the set's order; passages have none."""
    probability: dict[str, list[float]]
    """Answer probabilities by set, in the set's order."""
    nll: dict[str, list[float]]
    """Answer NLLs by set, nats/token, in the set's order."""

    def with_rows(self, more: Sequence[Row]) -> "Reading":
        """The same with further rows."""
        return replace(self, rows=(*self.rows, *more))


@dataclass(frozen=True)
class Battery:
    """The questions, and the models that divergences are measured from."""

    request: Request
    original: LanguageModel
    gold: LanguageModel | None
    max_new_tokens: int = 48
    tofu: TofuSets | None = None
    """The sets of TOFU's own metrics, where those are wanted."""
    layers: Layers | None = None
    """How the layers are read, where that is wanted."""
    internals: Internals | None = None
    """What is patched, where that is wanted."""
    recovery: Recovery | None = None
    """How the models are attacked, where that is wanted."""

    @property
    def sets(self) -> dict[str, tuple[Text, ...]]:
        """The rows by set; rewordings only where there are any."""
        sets = {"forget": self.request.forget, "forget_reworded": self.request.forget_reworded}
        return {name: rows for name, rows in sets.items() if rows} | {"retain_unseen": self.request.retain_unseen}

    @property
    def choices(self) -> dict[str, tuple[Choice, ...]]:
        """The multiple-choice questions by set, those there are."""
        sets = {"forget_choices": self.request.choices, "utility_choices": self.request.utility}
        return {name: rows for name, rows in sets.items() if rows}

    @property
    def measures(self) -> tuple[Measure, ...]:
        """What is measured."""
        return (*self._of_behaviour, *(measure for beyond in self._beyond for measure in beyond.measures))

    @property
    def _of_behaviour(self) -> tuple[Measure, ...]:
        return measures(
            gold=self.gold is not None,
            rewordings=bool(self.request.forget_reworded),
            truth_ratio=truth_ratio_definition(self._wrongly_answered) if self._wrongly_answered else None,
            entities=bool(self._spanned),
            passages=[on for on, records in self.sets.items() if not _questions(records)],
            choices=self.choices,
            tofu=self.tofu is not None,
        )

    @property
    def _beyond(self) -> list[Layers | Internals | Recovery]:
        """What is measured beyond behaviour."""
        return [beyond for beyond in (self.layers, self.internals, self.recovery) if beyond]

    @property
    def steps(self) -> int:
        """How many steps `read` reports to its `tick`."""
        return 2 * len(self.sets) + len(self.choices) + len(self._tofu_sets) + 1 + len(self._beyond)

    def read(self, name: str, model: LanguageModel, tick: Callable[[], None]) -> Reading:
        """Measure everything on one model; `tick` is called after each part."""
        template = self.request.template
        values: dict[str, Tensor] = {}
        said: dict[str, list[str]] = {}
        scores: dict[str, AnswerScores] = {}
        taken: dict[str, ChoiceScores] = {}
        for on, records in self.sets.items():
            scores[on] = answer_scores(model, records, template=template)
            values[f"{on}/answer_probability"] = scores[on].probability
            values[f"{on}/exact_match"] = scores[on].teacher_forced_exact_match
            values[f"{on}/exact_memorization"] = scores[on].exact_memorization
            values[f"{on}/extraction_strength"] = scores[on].extraction_strength
            values[f"{on}/nll"] = scores[on].nll
            tick()
            if questions := _questions(records):
                said[on] = generate_answers(model, questions, template=template, max_new_tokens=self.max_new_tokens)
                overlap = rouge(said[on], [record.answer for record in questions])
                values[f"{on}/rougeL_recall"], values[f"{on}/rougeL_f1"] = overlap.rougeL_recall, overlap.rougeL_f1
            tick()
        for on, choices in self.choices.items():
            taken[on] = multiple_choice(model, choices)
            values[f"{on}/accuracy"], values[f"{on}/choice_probability"] = taken[on].correct, taken[on].probability
            said[on] = [choice.choices[k] for choice, k in zip(choices, taken[on].chosen.tolist(), strict=True)]
            tick()
        if self._spanned:
            values["forget/entity_probability"] = entity_scores(model, self._spanned, template=template).probability
        if self._wrongly_answered:
            ratios = truth_ratio(model, self._wrongly_answered, template=template)
            values["forget/truth_ratio"] = forget_truth_ratio(ratios)
            if self.tofu is not None and self.gold is not None:
                values["tofu/forget_quality"] = tensor([ks_forget_quality(ratios, self._gold_truth_ratios).p])
        if self.gold is not None:
            values["forget/kl_from_gold"] = kl_per_item(self.gold, model, self.request.forget, template=template)
        unseen = self.request.retain_unseen
        values["retain_unseen/kl_from_original"] = kl_per_item(self.original, model, unseen, template=template)
        tick()
        values |= self._utility(model, tick)
        rows = [row for each in self._of_behaviour for row in self._rows(name, each, values[each.key].tolist())]
        for beyond in self._beyond:
            rows += beyond.rows(name, model)
            tick()
        return Reading(
            tuple(rows),
            said,
            {on: score.probability.tolist() for on, score in (scores | taken).items()},
            {on: score.nll.tolist() for on, score in scores.items()},
        )

    def _utility(self, model: LanguageModel, tick: Callable[[], None]) -> dict[str, Tensor]:
        """What TOFU's Model Utility is made of, set by set, and the one number."""
        values: dict[str, Tensor] = {}
        found: list[UtilityScores] = []
        for on, records in self._tofu_sets.items():
            found.append(
                utility_scores(
                    model,
                    records,
                    offered=on != TOFU_SETS[0],
                    template=self.request.template,
                    max_new_tokens=self.max_new_tokens,
                )
            )
            values[f"{on}/utility_probability"] = found[-1].probability
            values[f"{on}/rougeL_recall"] = found[-1].rougeL_recall
            values[f"{on}/utility_truth_ratio"] = found[-1].truth_ratio
            tick()
        return values | ({"tofu/model_utility": tensor([model_utility(found)])} if found else {})

    def _rows(self, model: str, measure: Measure, values: Iterable[float]) -> list[Row]:
        if measure.on == "tofu":
            return [Row(model, measure.key, WHOLE, WHOLE, value) for value in values]
        records: Mapping[str, Sequence[Record]] = {**self.sets, **self.choices, **self._tofu_sets}
        return [
            Row(model, measure.key, record.id, _cluster(record), float(value))
            for record, value in zip(records[measure.on], values, strict=True)
        ]

    @property
    def _tofu_sets(self) -> dict[str, tuple[QA, ...]]:
        tofu = self.tofu
        return dict(zip(TOFU_SETS, (tofu.retain, tofu.real_authors, tofu.world_facts), strict=True)) if tofu else {}

    @cached_property
    def _gold_truth_ratios(self) -> Tensor:
        assert self.gold is not None
        return truth_ratio(self.gold, self._wrongly_answered, template=self.request.template)

    @property
    def _spanned(self) -> list[QA]:
        """The forget rows if all mark what carries the fact."""
        questions = _questions(self.request.forget)
        return questions if all(record.entity_span for record in questions) else []

    @property
    def _wrongly_answered(self) -> list[QA]:
        """The forget rows if all have wrong answers: a truth ratio over a part of them would be another number."""
        questions = _questions(self.request.forget)
        return questions if all(record.wrong for record in questions) else []


def _questions(records: Sequence[Text]) -> list[QA]:
    """The rows if all are questions, else none."""
    questions = [record for record in records if isinstance(record, QA)]
    return questions if len(questions) == len(records) else []


def _cluster(record: Record) -> str:
    """Multiple-choice questions of one subject share a field, not a fact, so each is a unit of its own."""
    return record.id or record.question if isinstance(record, Choice) else subject_of(record)
