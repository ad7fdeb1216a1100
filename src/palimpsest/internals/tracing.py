"""Causal tracing: which activations of an undisturbed pass bring an answer back once its subject is blurred.

Noise on the embeddings of the subject's tokens takes the answer away; then the undisturbed activations of one token are
put back, a layer or a window of layers at a time (Meng et al. 2022, ROME, arXiv 2202.05262, section 2). Where a trace
peaks says where a fact passes, not where a change of the weights would best remove it (Hase et al. 2023, arXiv
2301.04213).
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from palimpsest.data.batches import Batch, Encoded, collate, encode
from palimpsest.data.prompts import Template, render
from palimpsest.data.records import QA
from palimpsest.errors import DataError
from palimpsest.internals.patching import Plan, patched_predictions
from palimpsest.internals.recording import Recording, residual_stream
from palimpsest.models.language_model import LanguageModel
from palimpsest.models.scoring import Predictions
from palimpsest.progress import Report

NOISE = 3.0
"""Standard deviations of the embeddings of all subjects' tokens."""


@dataclass(frozen=True, eq=False)
class CausalTrace:
    """What one answer's probability is, per token (the geometric mean) and over the noise's samples (the mean)."""

    clean: float
    """Without noise."""
    corrupted: float
    """With noise on the subject."""
    restored: Tensor
    """[plans, T] with noise, and a plan's sites restored at one of the prompt's T tokens."""
    subject: range
    """The subject's tokens."""

    @property
    def indirect_effect(self) -> Tensor:
        """[plans, T] what restoring brings back; clean - corrupted is the total effect."""
        return self.restored - self.corrupted


def causal_traces(
    model: LanguageModel,
    records: Sequence[QA],
    plans: Sequence[Plan],
    *,
    template: Template = "plain",
    noise: float = NOISE,
    samples: int = 10,
    seed: int = 0,
    report: Report | None = None,
) -> list[CausalTrace]:
    """The trace of every record's answer, in the records' order.

    Args:
        model: the model that is traced.
        records: questions with a subject that stands in them.
        plans: what is restored together at one token; ROME takes `resid` one layer at a time, and `mlp` or `attn` in
            windows of ten (see `window_plans`).
        template: how question and answer are joined.
        noise: standard deviation of the noise, in those of the embeddings of the subjects' tokens.
        samples: of the noise.
        seed: of the noise, which is the same for every record of as many subject tokens.
        report: called with (records done, of how many, a note).

    Raises:
        ModelError: a site that this model does not have.
        DataError: a record without a subject in its question, or longer than the positions that the model was made for.
    """
    rows = encode(records, model.tokenizer, template=template)
    subjects = [subject_tokens(record, model.tokenizer, template=template) for record in records]
    scale = noise * _deviation(model, rows, subjects)
    found = []
    for row, subject in zip(rows, subjects, strict=True):
        drawn = torch.randn(
            samples,
            len(subject),
            model.anatomy.embedding.get_parameter("weight").shape[1],
            generator=torch.Generator().manual_seed(seed),
        )
        found.append(_trace(model, row, subject, scale * drawn, plans))
        if report:
            report(len(found), len(rows), f"{len(row.prompt_ids)} tokens")
    return found


def subject_tokens(record: QA, tokenizer: PreTrainedTokenizerBase, *, template: Template = "plain") -> range:
    """The tokens of a record, as `encode` gives them, that touch the first mention of its subject.

    Raises:
        DataError: the record has no subject, or its question does not name it.
    """
    prompt, completion = render(record, tokenizer, template)
    start = prompt.find(record.subject) if record.subject else -1
    if start < 0:
        raise DataError(
            f"record {record.id!r}: its subject {record.subject!r} does not stand in its question; "
            "give the subject as the question names it"
        )
    stop = start + len(record.subject or "")
    offsets = tokenizer(prompt + completion, add_special_tokens=template != "chat", return_offsets_mapping=True)
    touching = [place for place, (first, last) in enumerate(offsets["offset_mapping"]) if last > start and first < stop]
    return range(touching[0], touching[-1] + 1)


def _deviation(model: LanguageModel, rows: Sequence[Encoded], subjects: Sequence[range]) -> float:
    """Standard deviation of all numbers in the embeddings of all subjects' tokens."""
    ids = [row.ids[place] for row, subject in zip(rows, subjects, strict=True) for place in subject]
    with torch.no_grad():
        embedded: Tensor = model.anatomy.embedding(torch.tensor(ids, device=model.device))
    return float(embedded.float().std())


def _trace(model: LanguageModel, row: Encoded, subject: range, noise: Tensor, plans: Sequence[Plan]) -> CausalTrace:
    """With noise [samples, subject tokens, d], each sample a row of one batch."""
    batch = collate([row] * len(noise), range(len(noise))).to(model.device)
    sites = list(dict.fromkeys(site for plan in plans for site in plan))
    clean = Recording.of(model, batch, sites)
    cells = [(plan, token) for plan in range(len(plans)) for token in range(row.start)]
    restored = torch.empty(len(plans), row.start)
    with _blurred(model.anatomy.embedding, subject, noise):
        corrupted = Recording.of(model, batch, residual_stream(model.anatomy))
        together = [plans[plan] for plan, _ in cells]
        for cell, predictions in patched_predictions(
            clean, corrupted, together, positions=[_only(batch, token) for _, token in cells]
        ):
            restored[cells[cell]] = _probability(predictions, len(noise))
    before, after = (_probability(one.predictions, len(noise)) for one in (clean, corrupted))
    return CausalTrace(before, after, restored, subject)


@contextmanager
def _blurred(embedding: nn.Module, subject: range, noise: Tensor) -> Iterator[None]:
    """Add noise [B, S, d] to a range of S tokens in every forward pass inside, over copies of B rows."""

    def add(module: nn.Module, inputs: tuple[Any, ...], embedded: Tensor) -> Tensor:
        blurred = embedded.clone()
        blurred[:, subject.start : subject.stop] += noise.to(embedded).repeat(len(embedded) // len(noise), 1, 1)
        return blurred

    handle = embedding.register_forward_hook(add)
    try:
        yield
    finally:
        handle.remove()


def _only(batch: Batch, token: int) -> Tensor:
    """[B, T] bool, one token of every row."""
    mask = torch.zeros_like(batch.attention)
    mask[:, token] = True
    return mask


def _probability(predictions: Predictions, n_rows: int) -> float:
    return float(predictions.mean_by_row(predictions.logprobs(), n_rows).exp().mean())
