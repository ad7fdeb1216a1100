"""Every score of one model, item by item: the rows from which the audit's numbers are made."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from torch import Tensor

from palimpsest.audit.measures import measures
from palimpsest.data.records import QA
from palimpsest.metrics.divergence import kl_per_item
from palimpsest.metrics.generation import generate_answers
from palimpsest.metrics.likelihood import AnswerScores, answer_scores
from palimpsest.metrics.rouge import rouge
from palimpsest.metrics.scores import Measure, Row
from palimpsest.metrics.truth_ratio import forget_truth_ratio, truth_ratio, truth_ratio_definition
from palimpsest.models.language_model import LanguageModel
from palimpsest.unlearn.request import Request


@dataclass(frozen=True)
class Reading:
    """All that one model says and scores."""

    rows: tuple[Row, ...]
    said: dict[str, list[str]]
    """Greedy answers by set, in the set's order."""
    probability: dict[str, list[float]]
    """Answer probabilities by set, in the set's order."""
    nll: dict[str, list[float]]
    """Answer NLLs by set, nats/token, in the set's order."""


@dataclass(frozen=True)
class Battery:
    """The questions, and the models that divergences are measured from."""

    request: Request
    original: LanguageModel
    gold: LanguageModel | None
    max_new_tokens: int = 48

    @property
    def sets(self) -> dict[str, tuple[QA, ...]]:
        """The rows by set; rewordings only where there are any."""
        sets = {"forget": self.request.forget, "forget_reworded": self.request.forget_reworded}
        return {name: rows for name, rows in sets.items() if rows} | {"retain_unseen": self.request.retain_unseen}

    @property
    def measures(self) -> tuple[Measure, ...]:
        """What is measured."""
        return measures(
            gold=self.gold is not None,
            rewordings=bool(self.request.forget_reworded),
            truth_ratio=truth_ratio_definition(self.request.forget) if self._has_wrong_answers else None,
        )

    @property
    def steps(self) -> int:
        """How many steps `read` reports to its `tick`."""
        return 2 * len(self.sets) + 1

    def read(self, name: str, model: LanguageModel, tick: Callable[[], None]) -> Reading:
        """Measure everything on one model; `tick` is called after each part."""
        template = self.request.template
        values: dict[str, Tensor] = {}
        said: dict[str, list[str]] = {}
        scores: dict[str, AnswerScores] = {}
        for on, records in self.sets.items():
            scores[on] = answer_scores(model, records, template=template)
            values[f"{on}/answer_probability"] = scores[on].probability
            values[f"{on}/exact_match"] = scores[on].teacher_forced_exact_match
            values[f"{on}/nll"] = scores[on].nll
            tick()
            said[on] = generate_answers(model, records, template=template, max_new_tokens=self.max_new_tokens)
            overlap = rouge(said[on], [record.answer for record in records])
            values[f"{on}/rougeL_recall"], values[f"{on}/rougeL_f1"] = overlap.rougeL_recall, overlap.rougeL_f1
            tick()
        if self._has_wrong_answers:
            ratios = truth_ratio(model, self.request.forget, template=template)
            values["forget/truth_ratio"] = forget_truth_ratio(ratios)
        if self.gold is not None:
            values["forget/kl_from_gold"] = kl_per_item(self.gold, model, self.request.forget, template=template)
        unseen = self.request.retain_unseen
        values["retain_unseen/kl_from_original"] = kl_per_item(self.original, model, unseen, template=template)
        tick()
        rows = (
            row
            for measure in self.measures
            for row in _rows(name, measure, self.sets[measure.on], values[measure.key].tolist())
        )
        return Reading(
            tuple(rows),
            said,
            {on: score.probability.tolist() for on, score in scores.items()},
            {on: score.nll.tolist() for on, score in scores.items()},
        )

    @property
    def _has_wrong_answers(self) -> bool:
        """Whether every forget row has some: a truth ratio over a part of the rows would be another number."""
        return all(record.wrong for record in self.request.forget)


def _rows(model: str, measure: Measure, records: Sequence[QA], values: Iterable[float]) -> list[Row]:
    return [
        Row(model, measure.key, record.id, record.subject or record.id or record.question, float(value))
        for record, value in zip(records, values, strict=True)
    ]
