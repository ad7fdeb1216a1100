"""Prediction trajectories: what every layer believes at every token, without keeping anything of the vocabulary's size.

Shapes: L layers and then the model itself, T tokens, k likeliest tokens.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from palimpsest.data.batches import Encoded
from palimpsest.lens.hidden import read_layers
from palimpsest.lens.lens import Lens
from palimpsest.lens.readout import SAMPLED, Readout
from palimpsest.models.language_model import LanguageModel

DIVERGENCES = ("entropy", "kl", "js", "tv")
STATISTICS = (*DIVERGENCES, "logprob", "rank")


@dataclass(frozen=True, eq=False)
class Trajectory:
    """One text's predictions, layer by layer; the last row of every table is the model's own.

    A column is a token and the prediction that is made there, of the next.
    """

    ids: Tensor
    """[T] the text."""
    top_ids: Tensor
    """[L + 1, T, k] likeliest next tokens, the likeliest first."""
    top_logprobs: Tensor
    """[L + 1, T, k]"""
    statistics: Mapping[str, Tensor]
    """[L + 1, T] by name. `entropy`; of the layer's prediction q and the model's p: `kl` (p || q), `js`, the
    Jensen-Shannon divergence, at most ln 2, all in nats, and `tv`, total variation, at most 1. Of the token that
    follows: `logprob`, and `rank` from 1; NaN and 0 in the last column, which nothing follows."""

    @property
    def predicted(self) -> Tensor:
        """[L + 1, T] the likeliest token."""
        return self.top_ids[..., 0]

    @property
    def depth(self) -> Tensor:
        """[T] the first layer from which on the likeliest token stays what it is in the end (prediction depth)."""
        return first_of_last_run(self.predicted == self.predicted[-1])

    def differences(self, name: str) -> Tensor:
        """[L, T] what each block changes in a statistic."""
        return self.statistics[name][1:] - self.statistics[name][:-1]


def trajectories(
    lens: Lens,
    model: LanguageModel,
    rows: Sequence[Encoded],
    *,
    fitted_to: LanguageModel | None = None,
    top_k: int = 5,
    batch_size: int = 16,
) -> list[Trajectory]:
    """The trajectory of every row, in the rows' order; each row of at least one token.

    Args:
        lens: a lens for this model's readout, or for that of `fitted_to`.
        model: whose layers are read.
        rows: the texts, as tokens.
        fitted_to: read the layers by this model's norm and unembedding, as an unlearned model's are with the lens of
            the original, whatever became of its own. The model's own predictions are always made by its own.
        top_k: how many likeliest tokens are kept.
        batch_size: rows at a time; it changes nothing.

    Raises:
        ModelError: the lens was made for another readout.
    """
    readout, own_readout, found = lens.readout(fitted_to or model), Readout.of(model), dict[int, Trajectory]()
    lens, top_k = lens.to(model.device), min(top_k, len(readout.weight))
    for hidden in read_layers(model, rows, batch_size=batch_size):
        for row in hidden.row.unique().tolist():
            own = hidden.row == row
            ids = torch.tensor(rows[row].ids)
            found[row] = _read(lens, readout, own_readout, hidden.layers[:, own], ids, top_k)
    return [found[row] for row in range(len(rows))]


def first_of_last_run(holds: Tensor) -> Tensor:
    """[...] the first place along the first dimension from which on `holds` [L + 1, ...] is true to the end.

    L + 1 where it is false at the end.
    """
    to_the_end = holds.flip(0).long().cumprod(0).sum(0)
    return len(holds) - to_the_end


@torch.no_grad()
def beliefs(
    lens: Lens, readout: Readout, own_readout: Readout, layers: Tensor
) -> Iterator[tuple[Tensor, list[Tensor]]]:
    """Of residual streams [L + 1, N, d], the places of a few tokens at a time and what is believed there.

    Log-probabilities [n, V], one tensor for each layer by the lens's readout, and last the model's by its own.
    """
    for some in torch.arange(layers.shape[1], device=layers.device).split(SAMPLED):
        read = [readout.z(lens.translate(states[some], layer)) for layer, states in enumerate(layers[:-1])]
        believed = [readout.logits(z).log_softmax(-1) for z in read]
        yield some, [*believed, own_readout.logits(own_readout.z(layers[-1, some])).log_softmax(-1)]


def divergences(log_q: Tensor, log_p: Tensor) -> tuple[Tensor, ...]:
    """[n] each of `DIVERGENCES`: of predictions [n, V], and of them from the model's own."""
    q, p = log_q.exp(), log_p.exp()
    log_mean = torch.logaddexp(log_q, log_p) - torch.log(log_q.new_tensor(2.0))
    js = ((q * (log_q - log_mean)).sum(-1) + (p * (log_p - log_mean)).sum(-1)) / 2
    return -(q * log_q).sum(-1), (p * (log_p - log_q)).sum(-1), js, (q - p).abs().sum(-1) / 2


def _read(lens: Lens, readout: Readout, own_readout: Readout, layers: Tensor, ids: Tensor, top_k: int) -> Trajectory:
    """From the residual stream [L + 1, T, d] at every token."""
    followed_by = torch.cat([ids[1:], ids.new_zeros(1)]).to(layers.device)
    parts = []
    for some, believed in beliefs(lens, readout, own_readout, layers):
        parts.append([_compared(log_q, believed[-1], followed_by[some], top_k) for log_q in believed])
    # Pieces of tokens, of layers, of tables: one table [L + 1, T, ...] each.
    tables = [
        torch.cat([torch.stack([layer[table] for layer in piece]) for piece in parts], 1).cpu()
        for table in range(len(STATISTICS) + 2)
    ]
    statistics = dict(zip(STATISTICS, tables[2:], strict=True))
    statistics["logprob"][:, -1], statistics["rank"][:, -1] = torch.nan, 0
    return Trajectory(ids, tables[0], tables[1], statistics)


def _compared(log_q: Tensor, log_p: Tensor, target: Tensor, top_k: int) -> tuple[Tensor, ...]:
    """What is kept of predictions [n, V] beside the model's own."""
    top = log_q.topk(top_k)
    logprob = log_q.gather(1, target[:, None])
    return (top.indices, top.values, *divergences(log_q, log_p), logprob[:, 0], (log_q > logprob).sum(-1) + 1)
