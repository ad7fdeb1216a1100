"""Where a run's rows come from: a generated world, TOFU, or the user's files; as a request, and as text to train on."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from palimpsest.data.overlap import find_overlap
from palimpsest.data.prompts import Template
from palimpsest.data.readers import read_records, with_block_subjects
from palimpsest.data.records import QA, Record
from palimpsest.errors import DataError
from palimpsest.models.organism import Corpus
from palimpsest.progress import console
from palimpsest.run.spec import FactsSource, FileSource, Spec, TofuSource
from palimpsest.unlearn.request import Request

QUESTIONS_PER_AUTHOR = 20


@dataclass(frozen=True)
class Source:
    """What to forget and keep, and the text from which a model of it can be trained."""

    request: Request
    corpus: Corpus


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
        case FileSource():
            return _files(spec.data, spec.template, spec.seed)


def request_from_files(
    forget: str | Path, retain: str | Path, *, format: str | None = None, template: Template = "plain", seed: int = 0
) -> Request:
    """A request from two files of questions and answers.

    Raises:
        DataError: a file or row is not as expected, is no QA, or forget and retain are the same.
    """
    forget_rows, retain_rows = _questions(forget, format), _questions(retain, format)
    overlap = find_overlap(forget_rows, retain_rows)
    overlap.check()
    if not overlap.clean:
        console.print(f"note: {overlap.summary()}", style="yellow", markup=False, highlight=False, soft_wrap=True)
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
    folder = Path(data.path)

    def part(name: str) -> list[Record]:
        return read_records(folder / f"{name}.json" if folder.is_dir() else f"{data.path}:{name}")

    n_forget = data.forget_authors * QUESTIONS_PER_AUTHOR
    n_retain = (data.authors - data.forget_authors) * QUESTIONS_PER_AUTHOR
    forget = with_block_subjects(
        _only_questions(part("forget10_perturbed"), data.path)[-n_forget:], prefix="forget author"
    )
    retain = with_block_subjects(_only_questions(part("full"), data.path)[:n_retain], prefix="author")
    return Source(Request.split(forget, retain, template=template, seed=seed), Corpus(tuple(forget), tuple(retain)))


def _files(data: FileSource, template: Template, seed: int) -> Source:
    request = request_from_files(data.forget, data.retain, format=data.format, template=template, seed=seed)
    return Source(request, Corpus(request.forget, request.all_retain))


def _questions(path: str | Path, format: str | None) -> list[QA]:
    return _only_questions(read_records(path, format=format), str(path))  # type: ignore[arg-type]


def _only_questions(records: Sequence[Record], where: str) -> list[QA]:
    for record in records:
        if not isinstance(record, QA):
            kind = type(record).__name__
            raise DataError(f"{where}: row {record.id!r} is a {kind}; a request is made of questions with answers")
    return [record for record in records if isinstance(record, QA)]
