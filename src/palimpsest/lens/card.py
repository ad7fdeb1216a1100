"""The report card of a lens: how near it is to the model, and whether it reads what the model uses.

A low KL alone does not show that a lens is faithful: least squares lowers it by reading whatever goes along with the
answer, and then moves where the model does not. So `causal_basis.calibration` stands beside it.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from scipy import stats
from torch import Tensor

from palimpsest.data.batches import Encoded
from palimpsest.lens.causal_basis import Calibration, calibration
from palimpsest.lens.hidden import Hidden, read_layers
from palimpsest.lens.lens import Lens
from palimpsest.lens.readout import Readout
from palimpsest.lens.trajectory import beliefs
from palimpsest.metrics.scores import Score
from palimpsest.metrics.statistics import clustered_mean
from palimpsest.models.language_model import LanguageModel

GROUPS = 10
"""Of texts, one of which at a time is left out for the interval of the bias."""


@dataclass(frozen=True)
class LayerCard:
    """One layer of a lens; intervals are over texts."""

    layer: int
    kl: Score
    """KL(model || lens), nats a token."""
    cross_entropy: Score
    """Of the token that follows, nats."""
    entropy: Score
    agreement: Score
    """Share of tokens at which lens and model take the same one to be likeliest."""
    bias: Score
    """KL between model and lens of what each predicts on average, nats: a preference that no text explains."""
    calibration: Calibration | None


def report_card(
    lens: Lens,
    model: LanguageModel,
    rows: Sequence[Encoded],
    *,
    fitted_to: LanguageModel | None = None,
    causal: Sequence[Encoded] = (),
    directions: int = 10,
    seed: int = 0,
) -> list[LayerCard]:
    """A card for every layer, and last one for the model itself, whose KL is 0.

    Args:
        lens: for this model's readout, or for that of `fitted_to`.
        model: which it is to be near; another than it was fitted to shows how it transfers.
        rows: texts, other than those that it was fitted to.
        fitted_to: whose norm and unembedding the lens reads by.
        causal: texts for the calibration, some hundreds of tokens; without any it is left out. It needs a lens for
            this model's own readout.
        directions: of the causal basis.
        seed: of the resampling and of the basis.
    """
    readout, own = lens.readout(fitted_to or model), Readout.of(model)
    lens = lens.to(model.device)
    n_layers, vocabulary = lens.n_layers, len(readout.weight)
    marginals = torch.zeros(GROUPS, n_layers + 1, vocabulary, dtype=torch.float64)
    tokens = torch.zeros(GROUPS, dtype=torch.float64)
    measured: list[Tensor] = []
    of_row: list[Tensor] = []
    for hidden in read_layers(model, rows):
        following = _following(hidden, rows).to(hidden.layers.device)
        of_row.append(hidden.row)
        for some, believed in beliefs(lens, readout, own, hidden.layers):
            group = hidden.row[some.cpu()] % GROUPS
            tokens.index_add_(0, group, torch.ones(len(group), dtype=torch.float64))
            for layer, log_q in enumerate(believed):
                marginals[:, layer].index_add_(0, group, log_q.exp().double().cpu())
            compared = [_measured(log_q, believed[-1], following[some]) for log_q in believed]
            measured.append(torch.stack(compared, 1).cpu())
    values, clusters = torch.cat(measured, 2).double().numpy(), [str(row) for row in torch.cat(of_row).tolist()]
    followed = np.flatnonzero(~np.isnan(values[1, 0]))
    cards = []
    for layer in range(n_layers + 1):
        kl, cross_entropy, entropy, agreement = values[:, layer]
        cards.append(
            LayerCard(
                layer,
                clustered_mean(kl, clusters, seed=seed),
                clustered_mean(cross_entropy[followed], [clusters[place] for place in followed], seed=seed),
                clustered_mean(entropy, clusters, seed=seed),
                clustered_mean(agreement, clusters, seed=seed),
                _bias(marginals[:, -1], marginals[:, layer], tokens, len(set(clusters))),
                calibration(lens, model, causal, layer, k=directions, seed=seed)
                if causal and layer < n_layers
                else None,
            )
        )
    return cards


def _following(hidden: Hidden, rows: Sequence[Encoded]) -> Tensor:
    """[N] the token that follows each; -1 where nothing does."""
    places = zip(hidden.row.tolist(), hidden.position.tolist(), strict=True)
    return torch.tensor([[*rows[row].ids, -1][place + 1] for row, place in places])


def _measured(log_q: Tensor, log_p: Tensor, following: Tensor) -> Tensor:
    """[4, n] KL, cross-entropy (NaN where nothing follows), entropy and agreement."""
    q, p = log_q.exp(), log_p.exp()
    surprise = -log_q.gather(1, following.clamp(min=0)[:, None])[:, 0]
    return torch.stack(
        [
            (p * (log_p - log_q)).sum(-1),
            surprise.where(following >= 0, torch.nan),
            -(q * log_q).sum(-1),
            (log_q.argmax(-1) == log_p.argmax(-1)).to(log_q),
        ]
    )


def _bias(model: Tensor, lens: Tensor, tokens: Tensor, n_texts: int) -> Score:
    """KL between the mean predictions, from sums [GROUPS, V], with a jackknife interval over the groups."""

    def kl(chosen: Tensor) -> float:
        p, q = (part[chosen].sum(0) / tokens[chosen].sum() for part in (model, lens))
        return (torch.xlogy(p, p) - torch.xlogy(p, q)).sum().item()

    here = tokens.nonzero()[:, 0]
    whole = kl(here)
    if len(here) < 2:
        return Score(whole, whole, whole, int(tokens.sum()), n_texts)
    left_out = torch.tensor([kl(here[here != group]) for group in here.tolist()], dtype=torch.float64)
    n = len(here)
    error = ((n - 1) / n * (left_out - left_out.mean()).square().sum()).sqrt().item()
    reach = float(stats.t.ppf(0.975, n - 1)) * error
    return Score(whole, max(0.0, whole - reach), whole + reach, int(tokens.sum()), n_texts)
