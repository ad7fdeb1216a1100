"""Scores of the fact alone: the characters of an answer that carry it, not the sentence that they stand in.

Most tokens of an answer ("The author's full name is …") can be guessed without knowing anything, which is why a model
that never saw TOFU's authors has half of an answer right. `QA.entity_span` marks the rest; spans of TOFU's forget10 are
published with the Unlearning Depth Score (`read_records` knows their file).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from palimpsest.data.batches import encode
from palimpsest.data.prompts import Template
from palimpsest.data.records import QA
from palimpsest.errors import DataError
from palimpsest.metrics.generation import generate_answers
from palimpsest.metrics.likelihood import AnswerScores, target_scores
from palimpsest.metrics.rouge import rouge
from palimpsest.models.language_model import LanguageModel

DEFINITION = "entity@span"
"""The versioned name: tokens that touch the span are scored, the answer before them being given."""


@dataclass(frozen=True, eq=False)
class EntitySaid:
    """Of the greedy answers to n questions, each [n] in float64 on the CPU, from 0 to 1."""

    rougeL_recall: Tensor
    """How much of the entity's words were said in their order, with stemming; what is said besides does not count."""
    verbatim: Tensor
    """1 where the entity stands in the answer letter for letter, case aside, else 0."""


def entity_scores(
    model: LanguageModel, records: Sequence[QA], *, template: Template = "plain", batch_size: int = 64
) -> AnswerScores:
    """Every teacher-forced score over the tokens of each record's entity, given the question and the answer before it.

    A token that holds a part of the entity counts as a whole, whatever else is in it.

    Args:
        model: the model to score with.
        records: n questions with an `entity_span`.
        template: how question and answer are joined.
        batch_size: rows at a time; it never changes a score.

    Raises:
        DataError: a record without an entity span.
    """
    encoded = encode(records, model.tokenizer, template=template, entities=True)
    return target_scores(model, encoded, batch_size=batch_size)


def entity_said(answers: Sequence[str], records: Sequence[QA]) -> EntitySaid:
    """Whether n answers hold the entities of n records.

    Raises:
        DataError: a record without an entity span.
    """
    entities = [entity(record) for record in records]
    verbatim = [named.lower() in answer.lower() for named, answer in zip(entities, answers, strict=True)]
    return EntitySaid(rouge(answers, entities).rougeL_recall, torch.tensor(verbatim, dtype=torch.float64))


def generated_entities(
    model: LanguageModel,
    records: Sequence[QA],
    *,
    template: Template = "plain",
    max_new_tokens: int = 48,
    batch_size: int = 32,
) -> EntitySaid:
    """Whether a model's own greedy answers hold the entities; arguments as `generate_answers` takes them."""
    answers = generate_answers(model, records, template=template, max_new_tokens=max_new_tokens, batch_size=batch_size)
    return entity_said(answers, records)


def entity(record: QA) -> str:
    """The part of an answer that carries the fact.

    Raises:
        DataError: the record has no entity span.
    """
    if record.entity_span is None:
        raise DataError(
            f"record {record.id!r}: field 'entity_span' is missing; give the characters that carry the fact"
        )
    return record.answer[slice(*record.entity_span)]
