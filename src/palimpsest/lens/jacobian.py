"""The Jacobian lens: the mean derivative, over tokens, of what the final norm reads by what a layer reads.

It carries a small change at a layer to the end as the model itself would, so it reads nothing that the model does not
use; where the layers above bend much, it is far from the model's predictions. Ours differs from Anthropic's
(`anthropics/jacobian-lens`) in that it is centred: its bias makes the mean state the mean target.

One backward pass serves every layer and token: the gradient of a random vector's product with the target, times that
vector, has the Jacobian at the same token as its mean (Hutchinson 1989), and between tokens nothing. Shapes: L layers,
N tokens, d the model's width.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from palimpsest.data.batches import Batch, Encoded, batches
from palimpsest.models.anatomy import Site
from palimpsest.models.hooks import capturing
from palimpsest.models.inputs import forward_inputs
from palimpsest.models.language_model import LanguageModel, evaluating
from palimpsest.models.workers import Workers
from palimpsest.progress import Ticker

ERROR = 0.05
"""Of the estimate, as a share of the Jacobian's norm, about sqrt(d / N) for N random vectors."""
MOST_DRAWS = 16
"""Random vectors for a token."""


def mean_jacobians(
    model: LanguageModel,
    rows: Sequence[Encoded],
    *,
    seed: int,
    batch_size: int = 16,
    workers: Workers | None = None,
    ticker: Ticker | None = None,
) -> tuple[Tensor, Tensor]:
    """Changes [L, d, d] from the identity and biases [L, d].

    Where the texts have few tokens beside the model's width, every token is gone through with several random vectors.

    Args:
        model: whose layers.
        rows: texts of all processes.
        seed: of the random vectors, which belong to a row, however rows are batched.
        batch_size: rows at a time; it changes nothing.
        workers: those who share the rows.
        ticker: told the tokens that are done.
    """
    workers = workers or Workers()
    n, d = model.anatomy.n_layers, model.anatomy.d_model
    sites = [Site("resid", layer) for layer in range(-1, n)]
    jacobians = torch.zeros(n, d, d, dtype=torch.float64, device=model.device)
    sums = torch.zeros(n + 1, d, dtype=torch.float64, device=model.device)
    n_tokens = torch.zeros((), dtype=torch.float64, device=model.device)
    draws = min(MOST_DRAWS, max(1, math.ceil(d / ERROR**2 / sum(len(row.ids) for row in rows))))
    mine = range(workers.rank, len(rows), workers.count)
    for batch in batches([rows[row] for row in mine], batch_size=batch_size):
        real = batch.attention.to(model.device)
        for draw in range(draws):
            vectors = _vectors(batch, [mine[row] for row in batch.rows], d, seed * MOST_DRAWS + draw).to(model.device)
            states, gradients = _gradients(model, batch.to(model.device), vectors.to(model.network.dtype), sites)
            for layer, gradient in enumerate(gradients):
                jacobians[layer].addmm_(vectors[real].T.double(), gradient[real].double(), alpha=1 / draws)
        sums += torch.stack([state[real].double().sum(0) for state in states])
        n_tokens += real.sum()
        if ticker:
            ticker.advance(int(real.sum()) * workers.count)
    workers.add([jacobians, sums, n_tokens])
    jacobians, means = jacobians / n_tokens, sums / n_tokens
    biases = means[-1] - torch.einsum("lij,lj->li", jacobians, means[:-1])
    return jacobians - torch.eye(d).to(jacobians), biases


def _vectors(batch: Batch, rows: Sequence[int], d: int, seed: int) -> Tensor:
    """[B, T, d] a random vector for every token, of zeros at padding."""
    vectors = torch.zeros(*batch.ids.shape, d)
    for line, row in enumerate(rows):
        real = batch.attention[line]
        generator = torch.Generator().manual_seed(seed * 1_000_003 + row)
        vectors[line, real] = torch.randn(int(real.sum()), d, generator=generator)
    return vectors


def _gradients(
    model: LanguageModel, batch: Batch, vectors: Tensor, sites: Sequence[Site]
) -> tuple[list[Tensor], tuple[Tensor, ...]]:
    """What each site reads [B, T, d]; but for the last, the gradient by it of the last's product with the vectors."""
    with evaluating(model) as network, torch.inference_mode(False), torch.enable_grad():
        with capturing(model.anatomy, sites, batch.ids.shape, attached=True) as store:
            network(**forward_inputs(network, batch))
        product = (store[sites[-1]] * vectors).sum()
        gradients = torch.autograd.grad(product, [store[site] for site in sites[:-1]])
    return [store[site].detach() for site in sites], gradients
