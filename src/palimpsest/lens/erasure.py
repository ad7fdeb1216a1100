"""What layers still give away of an answer: to anyone who reads them, to an attacker who may try candidates.

An answer's tokens are read as they follow one another, the earlier ones given. Shapes: L layers and then the model
itself, N tokens of an answer.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from palimpsest.data.batches import Encoded
from palimpsest.lens.hidden import read_layers
from palimpsest.lens.lens import Lens
from palimpsest.lens.readout import Readout
from palimpsest.lens.trajectory import beliefs
from palimpsest.models.language_model import LanguageModel

THRESHOLD = 0.05
"""Nats a token by which the original must know an answer better than gold at a layer, or the layer does not count."""


@dataclass(frozen=True, eq=False)
class AnswerReading:
    """One answer, as every layer reads it."""

    logprobs: Tensor
    """[L + 1, N] of the answer's tokens, nats."""
    ranks: Tensor
    """[L + 1, N] of the answer's tokens, from 1."""

    @property
    def probability(self) -> Tensor:
        """[L + 1] P(answer | question)^(1 / tokens) at each layer."""
        return self.logprobs.mean(1).exp()

    @property
    def right(self) -> Tensor:
        """[L + 1] bool, whether a layer's likeliest tokens are the answer, each after those before it."""
        return (self.ranks == 1).all(1)


def read_answers(
    lens: Lens,
    model: LanguageModel,
    rows: Sequence[Encoded],
    *,
    fitted_to: LanguageModel | None = None,
    batch_size: int = 16,
) -> list[AnswerReading]:
    """Every row's targets as each layer reads them, in the rows' order.

    Args:
        lens: a lens for this model's readout, or for that of `fitted_to`.
        model: whose layers are read.
        rows: questions whose answers are the targets.
        fitted_to: read the layers by this model's norm and unembedding, as an unlearned model's are with the lens of
            the original. The model's own predictions are always made by its own.
        batch_size: rows at a time; it changes nothing.

    Raises:
        ModelError: the lens was made for another readout.
    """
    readout, own_readout = lens.readout(fitted_to or model), Readout.of(model)
    lens, found = lens.to(model.device), dict[int, AnswerReading]()
    starts, stops = torch.tensor([(row.start, row.stop) for row in rows]).unbind(1)
    for hidden in read_layers(model, rows, batch_size=batch_size):
        row, position = hidden.row.cpu(), hidden.position.cpu()
        predicts = (position >= starts[row] - 1) & (position < stops[row] - 1)
        row, position, layers = row[predicts], position[predicts], hidden.layers[:, predicts.to(hidden.layers.device)]
        following = zip(row.tolist(), position.tolist(), strict=True)
        targets = torch.tensor([rows[text].ids[place + 1] for text, place in following], device=layers.device)
        pieces = [
            _of_targets(believed, targets[some]) for some, believed in beliefs(lens, readout, own_readout, layers)
        ]
        logprobs, ranks = (torch.cat(parts, 1).cpu() for parts in zip(*pieces, strict=True))
        for text in row.unique().tolist():
            found[text] = AnswerReading(logprobs[:, row == text], ranks[:, row == text])
    return [found[text] for text in range(len(rows))]


def found_by_candidates(readings: Sequence[AnswerReading], per_layer: int) -> Tensor:
    """[n] whether an attacker who tries so many tokens from each layer, and from the model, has each answer among them.

    The candidates are each layer's likeliest tokens (Patil et al. 2023, arXiv 2309.17410, there for answers of one
    token): a budget of `per_layer` times L + 1 for each token. An answer is found where each of its tokens is.
    """
    return torch.tensor([bool((reading.ranks.min(0).values <= per_layer).all()) for reading in readings])


def erasure_ratio(
    original: AnswerReading, gold: AnswerReading, unlearned: AnswerReading, *, threshold: float = THRESHOLD
) -> float | None:
    """The share of what the original's layers knew beyond gold's that the unlearned model's no longer tell.

    0 is the original, 1 is gold or less; layers weigh by how much there was to lose; None where no layer counts. It is
    the logit-lens score beside UDS (arXiv 2605.24614), which takes the tokens that carry the fact.

    Args:
        original: the answer as the original's layers read it.
        gold: the same of a model that never knew it.
        unlearned: the same of the model in question.
        threshold: nats a token.
    """
    knew, told, tells = (reading.logprobs.double().mean(1) for reading in (original, gold, unlearned))
    there, lost = knew - told, knew - tells
    counts = there > threshold
    if not counts.any():
        return None
    there, lost = there[counts], lost[counts]
    return ((lost / there).clamp(0, 1) * there).sum().item() / there.sum().item()


def _of_targets(believed: Sequence[Tensor], targets: Tensor) -> tuple[Tensor, Tensor]:
    """[L + 1, n] log-probabilities and ranks of the targets [n] in beliefs [n, V], one a layer."""
    logprobs = [belief.gather(1, targets[:, None]) for belief in believed]
    ranks = [(belief > own).sum(1) + 1 for belief, own in zip(believed, logprobs, strict=True)]
    return torch.cat(logprobs, 1).T, torch.stack(ranks)
