"""The Unlearning Depth Score: do the layers of an unlearned model still tell the original what was forgotten?

`recovery` asks what the original's states do in the unlearned model; this asks what the unlearned model's states do in
the original, which can read them. At each layer the residual stream of another model is put into the original ("full")
model at the positions from which the fact's tokens are predicted. What the original then loses of their log-probability
is what that layer no longer tells; its loss with gold's states is the scale (UDS, arXiv 2605.24614).

A patch of the last layer is made before the final norm; the released code takes a state that has been through it.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from palimpsest.data.batches import Encoded, batches, encode
from palimpsest.data.prompts import Template
from palimpsest.data.records import QA
from palimpsest.errors import DataError
from palimpsest.internals.patching import MEMORY, patched_predictions, refuse_unlike
from palimpsest.internals.recording import Recording, residual_stream
from palimpsest.models.language_model import LanguageModel
from palimpsest.models.scoring import Predictions
from palimpsest.progress import Report

THRESHOLD = 0.05
"""Nats a token that gold's states must cost the original at a layer, or the layer does not count (the paper's tau)."""


@dataclass(frozen=True, eq=False)
class UnlearningDepth:
    """How far each of n facts is gone from L layers: 0 is the original, 1 gold or further."""

    gold_drops: Tensor
    """[n, L] what the original loses with gold's states, nats a token."""
    drops: Tensor
    """[n, L] what it loses with the unlearned model's."""
    threshold: float = THRESHOLD

    @property
    def encoding(self) -> Tensor:
        """[n, L] bool, the layers in which the original knows the fact and gold does not: those that count."""
        return self.gold_drops > self.threshold

    @property
    def counted(self) -> Tensor:
        """[n] bool, the facts of which a layer counts."""
        return self.encoding.any(1)

    @property
    def excluded(self) -> int:
        """How many facts have no layer that counts."""
        return int((~self.counted).sum())

    @property
    def by_row(self) -> Tensor:
        """[n] the share of gold's drop that the unlearned model reaches; NaN where no layer counts.

        Clipped to 0..1 at each layer, and the layers weighed by gold's drop.
        """
        return self._weighted((self.drops / self.gold_drops).clamp(0, 1))

    @property
    def score(self) -> float | None:
        """The mean over the facts that count; None where there are none."""
        return float(self.by_row[self.counted].double().mean()) if self.counted.any() else None

    @property
    def unclipped_by_row(self) -> Tensor:
        """[n] the same without clipping: the ratio of the sums of both drops over the layers that count.

        Well above 1 where states are not so much emptied as broken, below 0 where they tell more than the original's.
        """
        return self._weighted(self.drops / self.gold_drops)

    @property
    def unclipped_median(self) -> float | None:
        """The median of `unclipped_by_row`; None where no fact counts."""
        return float(self.unclipped_by_row[self.counted].median()) if self.counted.any() else None

    def _weighted(self, ratios: Tensor) -> Tensor:
        """[n] means of ratios [n, L] over the layers that count, weighed by gold's drops."""
        weights = self.gold_drops.where(self.encoding, 0.0)
        # Where gold loses nothing, the ratio may be infinite.
        return (weights * ratios.where(self.encoding, 0.0)).sum(1) / weights.sum(1)


def unlearning_depth(
    gold_drops: Tensor,
    source: LanguageModel,
    full: LanguageModel,
    rows: Sequence[Encoded],
    *,
    threshold: float = THRESHOLD,
    batch_size: int = 16,
    report: Report | None = None,
) -> UnlearningDepth:
    """The depth of every row's fact in a model.

    Args:
        gold_drops: [n, L] `logprob_drops` of gold, measured once for all models that are judged by it.
        source: the model that is judged.
        full: the original.
        rows: n rows whose targets are the fact's tokens, see `fact_rows`.
        threshold: nats a token, see `THRESHOLD`.
        batch_size: rows at a time; it changes nothing.
        report: called with (layers done, of how many, a note), a layer once for every batch.

    Raises:
        ModelError: the models are not built alike.
        DataError: gold's drops are of other rows, or a row is longer than the positions that the model was made for.
    """
    expected = (len(rows), full.anatomy.n_layers)
    if gold_drops.shape != expected:
        raise DataError(
            f"gold's drops are {tuple(gold_drops.shape)}, but there are {expected[0]} rows and {expected[1]} layers; "
            "measure them on the same rows and original"
        )
    drops = logprob_drops(source, full, rows, batch_size=batch_size, report=report)
    return UnlearningDepth(gold_drops, drops, threshold)


def logprob_drops(
    source: LanguageModel,
    full: LanguageModel,
    rows: Sequence[Encoded],
    *,
    batch_size: int = 16,
    memory: int = MEMORY,
    report: Report | None = None,
) -> Tensor:
    """[n, L] what `full` loses of its rows' targets, nats a token, with what each block of `source` gives to the next.

    The residual stream is replaced at the positions that predict a target, after one block at a time. fp32 on the CPU;
    all 0 with `full` itself as the source.

    Args:
        source: whose states are put in.
        full: the model that reads them.
        rows: n rows.
        batch_size: rows at a time; it changes nothing.
        memory: bytes, see `patching.MEMORY`; it changes nothing.
        report: called with (layers done, of how many, a note), a layer once for every batch.

    Raises:
        ModelError: the models are not built alike.
        DataError: a row is longer than the positions that the model was made for.
    """
    refuse_unlike(source, full)
    sites = residual_stream(full.anatomy)
    plans = [frozenset([site]) for site in sites]
    drops, done, in_all = torch.empty(len(rows), len(sites)), 0, len(sites) * -(-len(rows) // batch_size)
    for batch in batches(rows, batch_size=batch_size):
        states, own = Recording.of(source, batch, sites), Recording.of(full, batch, sites)
        places, before = list(batch.rows), _logprobs(own.predictions, len(batch.rows))
        for layer, patched in patched_predictions(states, own, plans, positions="predicting", memory=memory):
            drops[places, layer] = before - _logprobs(patched, len(places))
            done += 1
            if report:
                report(done, in_all, f"layer {layer}")
    return drops


def fact_rows(
    records: Sequence[QA], tokenizer: PreTrainedTokenizerBase, *, template: Template = "plain"
) -> list[Encoded]:
    """Each record's question and answer, the targets being the tokens that carry the fact.

    They are those of the entity, or of the whole answer where a record has no `entity_span`.

    Raises:
        DataError: a record without an answer.
    """
    encoded: dict[int, Encoded] = {}
    for entities in (True, False):
        places = [place for place, record in enumerate(records) if (record.entity_span is not None) == entities]
        chosen = encode([records[place] for place in places], tokenizer, template=template, entities=entities)
        encoded.update(zip(places, chosen, strict=True))
    return [encoded[place] for place in range(len(records))]


def _logprobs(predictions: Predictions, n_rows: int) -> Tensor:
    """[B] mean log-probability of each row's targets, nats, on the CPU."""
    return predictions.mean_by_row(predictions.logprobs(), n_rows).cpu()
