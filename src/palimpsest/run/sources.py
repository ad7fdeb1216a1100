"""Where a run's rows come from: a generated world, a benchmark or the user's files; as a request, and to train on."""

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from palimpsest.data.overlap import find_overlap
from palimpsest.data.passages import passages
from palimpsest.data.prompts import Template
from palimpsest.data.readers import read_records, with_block_subjects
from palimpsest.data.records import QA, Choice, Passage, Record, Text
from palimpsest.errors import DataError
from palimpsest.metrics.tofu import TofuSets
from palimpsest.models.organism import Corpus
from palimpsest.progress import console
from palimpsest.run.data import FactsSource, FileSource, TofuSource, WmdpSource
from palimpsest.run.spec import Spec
from palimpsest.unlearn.request import Request

QUESTIONS_PER_AUTHOR = 20
PLURALS: dict[type[Any], str] = {
    QA: "questions with answers",
    Passage: "passages of text",
    Choice: "multiple-choice questions",
}
OneKind = TypeVar("OneKind", bound=Record)


@dataclass(frozen=True)
class Source:
    """What to forget and keep, and the text from which a model of it can be trained."""

    request: Request
    corpus: Corpus
    tofu: TofuSets | None = None
    """For TOFU's own metrics, where the source is one of its splits."""


def open_source(spec: Spec) -> Source:
    """Read or generate a specification's rows.

    Raises:
        DataError: a file or row is not as expected, or forget and retain are the same.
    """
    match spec.data:
        case FactsSource():
            return _facts(spec.data, spec.template, spec.seed)
        case TofuSource():
            return _tofu(spec.data, spec.template, spec.seed)
        case WmdpSource():
            return _wmdp(spec.data, spec.template, spec.seed)
        case FileSource():
            return _files(spec.data, spec.template, spec.seed)


def request_from_files(
    forget: str | Path, retain: str | Path, *, format: str | None = None, template: Template = "plain", seed: int = 0
) -> Request:
    """A request from two files of questions with answers, or of passages.

    Raises:
        DataError: a file or row is not as expected, is neither, or forget and retain are the same.
    """
    forget_rows, retain_rows = _texts(forget, format), _texts(retain, format)
    _check_overlap(forget_rows, retain_rows)
    return Request.split(forget_rows, retain_rows, template=template, seed=seed)


def _facts(data: FactsSource, template: Template, seed: int) -> Source:
    world = data.world(seed)
    request = Request.split(
        world.facts(world.forget_subjects), world.facts(world.retain_subjects), template=template, seed=seed
    )
    corpus = Corpus(
        tuple(world.documents(world.forget_subjects)),
        tuple(world.documents(world.retain_subjects)),
        tuple(world.vocabulary_texts()),
    )
    return Source(request, corpus)


def _tofu(data: TofuSource, template: Template, seed: int) -> Source:
    """The forget authors are TOFU's last ones, whose rewordings and wrong answers are published; retain its first."""

    def part(name: str) -> list[QA]:
        path = Path(data.path)
        return _only(QA, path / f"{name}.json" if path.is_dir() else f"{data.path}:{name}")

    own = None
    if data.split:
        forget, retain = part(f"{data.split}_perturbed"), part(f"retain{100 - int(data.split[-2:])}")
        asked = with_block_subjects(part("retain_perturbed"), prefix="author")
        own = TofuSets(tuple(asked), tuple(part("real_authors_perturbed")), tuple(part("world_facts_perturbed")))
    else:
        n_forget = data.forget_authors * QUESTIONS_PER_AUTHOR
        n_retain = (data.authors - data.forget_authors) * QUESTIONS_PER_AUTHOR
        forget, retain = part("forget10_perturbed")[-n_forget:], part("full")[:n_retain]
    forget = with_block_subjects(forget, prefix="forget author")
    retain = with_block_subjects(retain, prefix="author")
    request = Request.split(forget, retain, template=template, seed=seed)
    return Source(request, Corpus(tuple(forget), tuple(retain)), own)


def _wmdp(data: WmdpSource, template: Template, seed: int) -> Source:
    """Texts are cut into passages; the retain corpus is parted by text. Questions are asked and never trained on."""
    forget, retain = (
        passages(_only(Passage, path), words=data.passage_words, most=data.max_passages)
        for path in (data.forget, data.retain)
    )
    _check_overlap(forget, retain)
    questions = _drawn(_only(Choice, data.questions), data.max_questions, seed)
    request = replace(
        Request.split(forget, retain, template=template, seed=seed),
        choices=tuple(replace(choice, subject=choice.subject or data.subject) for choice in questions),
        utility=tuple(_drawn(_only(Choice, data.utility), data.max_questions, seed)) if data.utility else (),
    )
    return Source(request, Corpus(request.forget, request.all_retain))


def _drawn(questions: list[Choice], most: int | None, seed: int) -> list[Choice]:
    """So many of the questions, in their order."""
    if most is None or most >= len(questions):
        return questions
    drawn = random.Random(f"questions/{seed}").sample(range(len(questions)), most)
    return [questions[place] for place in sorted(drawn)]


def _files(data: FileSource, template: Template, seed: int) -> Source:
    request = request_from_files(data.forget, data.retain, format=data.format, template=template, seed=seed)
    return Source(request, Corpus(request.forget, request.all_retain))


def _texts(path: str | Path, format: str | None) -> list[Text]:
    return _refuse_others(read_records(path, format=format), path, QA, Passage)  # type: ignore[arg-type]


def _only(kind: type[OneKind], path: str | Path) -> list[OneKind]:
    return _refuse_others(read_records(path), path, kind)


def _refuse_others(records: Sequence[Record], where: str | Path, *kinds: type[OneKind]) -> list[OneKind]:
    for record in records:
        if not isinstance(record, kinds):
            expected = " or ".join(PLURALS[kind] for kind in kinds)
            raise DataError(f"{where}: row {record.id!r} is a {type(record).__name__}; expected {expected} here")
    return [record for record in records if isinstance(record, kinds)]


def _check_overlap(forget: Sequence[Record], retain: Sequence[Record]) -> None:
    overlap = find_overlap(forget, retain)
    overlap.check()
    if not overlap.clean:
        console.print(f"note: {overlap.summary()}", style="yellow", markup=False, highlight=False, soft_wrap=True)
