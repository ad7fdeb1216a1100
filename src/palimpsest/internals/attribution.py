"""Attribution: which neurons' writing makes a model answer, and which merely fire most on its questions.

One vector seldom carries a concept, so what is ablated is a set of them. A neuron's direct contribution to an answer's
token is its coefficient times what its value vector adds to that token's logit, beyond what it adds to every logit
(direct logit attribution; Geva et al. 2022, arXiv 2203.14680). The final norm's division by the stream's length is left
out: at one token it is the same for every neuron.

Shapes: L layers, d_ff neurons of each; N tokens to be predicted.
"""

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from palimpsest.data.batches import Batch, Encoded, batches
from palimpsest.internals.value_vectors import ValueVector, VocabularyProjection
from palimpsest.models.anatomy import Site
from palimpsest.models.hooks import capture
from palimpsest.models.language_model import LanguageModel


def attribution(model: LanguageModel, encoded: Sequence[Encoded], *, batch_size: int = 16) -> Tensor:
    """[L, d_ff] what each neuron contributes to the rows' answers: coef * (E_t - mean E) . v, logits before the norm.

    Coefficients are those at the positions that predict the answers' tokens t. It is averaged over a row's tokens, then
    over the rows.

    Args:
        model: the model.
        encoded: questions with their answers as targets.
        batch_size: rows at a time; it never changes a score.

    Raises:
        ModelError: a mixture of fused experts has no value vectors.
    """
    projection = VocabularyProjection.of(model)
    mean, total = projection.unembedding.mean(0), _nothing(model)
    for batch, coefficients in _coefficients(model, encoded, batch_size):
        share = _share_of_row(batch)
        directions = projection.unembedding[batch.ids[batch.targets]] - mean
        for layer, coefficient in enumerate(coefficients):
            written = projection.towards(directions, layer) @ projection.vectors(layer).T
            total[layer] += (share[:, None] * coefficient * written).sum(0).double().cpu()
    return total / len(encoded)


def selectivity(
    model: LanguageModel, encoded: Sequence[Encoded], others: Sequence[Encoded], *, batch_size: int = 16
) -> Tensor:
    """[L, d_ff] how much more each neuron writes when it predicts these rows' answers than others', whatever it writes.

    The mean of |coefficient| there less that for the other rows, times the value vector's length. The control for
    ablating what a projection or an attribution chose: any neuron that fires hard on a concept's questions breaks
    something when it is changed.

    Args:
        model: the model.
        encoded: questions with their answers as targets.
        others: unrelated ones.
        batch_size: rows at a time; it never changes a score.
    """
    lengths = torch.stack(
        [model.anatomy.value_vectors(layer).detach().float().norm(dim=1) for layer in range(model.anatomy.n_layers)]
    )
    firing = mean_firing(model, encoded, batch_size=batch_size) - mean_firing(model, others, batch_size=batch_size)
    return firing * lengths.double().cpu()


def mean_firing(model: LanguageModel, encoded: Sequence[Encoded], *, batch_size: int = 16) -> Tensor:
    """[L, d_ff] mean |coefficient| of each neuron where the rows' answers are predicted; rows weigh alike."""
    return _mean_coefficient(model, encoded, batch_size, torch.abs)


def mean_coefficient(model: LanguageModel, encoded: Sequence[Encoded], *, batch_size: int = 16) -> Tensor:
    """[L, d_ff] mean coefficient of each neuron where the rows' answers are predicted; rows weigh alike."""
    return _mean_coefficient(model, encoded, batch_size, torch.positive)


def most(scores: Tensor, k: int) -> list[ValueVector]:
    """The k neurons with the highest scores [L, d_ff], highest first."""
    _, d_ff = scores.shape
    top = scores.flatten().topk(min(k, scores.numel())).indices.tolist()
    return [ValueVector(*divmod(place, d_ff)) for place in top]


def _mean_coefficient(
    model: LanguageModel, encoded: Sequence[Encoded], batch_size: int, reading: Callable[[Tensor], Tensor]
) -> Tensor:
    total = _nothing(model)
    for batch, coefficients in _coefficients(model, encoded, batch_size):
        share = _share_of_row(batch)
        for layer, coefficient in enumerate(coefficients):
            total[layer] += (share[:, None] * reading(coefficient)).sum(0).double().cpu()
    return total / len(encoded)


def _coefficients(
    model: LanguageModel, encoded: Sequence[Encoded], batch_size: int
) -> Iterator[tuple[Batch, list[Tensor]]]:
    """Batch by batch every layer's coefficients [N, d_ff] at the positions that predict targets, fp32."""
    sites = model.anatomy.sites("coef")
    model.anatomy.module(Site("coef", 0))  # refuses fused experts
    for batch in batches(encoded, batch_size=batch_size):
        batch = batch.to(model.device)
        predicting = torch.zeros_like(batch.targets)
        predicting[:, :-1] = batch.targets[:, 1:]
        store = capture(model, batch, sites)
        yield batch, [store[site][predicting].float() for site in sites]


def _share_of_row(batch: Batch) -> Tensor:
    """[N] one over the number of targets of the row that each target stands in."""
    row, _ = batch.targets.nonzero().unbind(1)
    return 1 / batch.targets.sum(1)[row]


def _nothing(model: LanguageModel) -> Tensor:
    return torch.zeros(model.anatomy.n_layers, model.anatomy.d_ff, dtype=torch.float64)
