"""Kronecker factors of the retain set's Fisher matrix: what every matrix reads, and what gradient comes back.

For y = W a and one label drawn from the model at every target, the block of W is approximated by S (x) A (Martens &
Grosse 2015, arXiv 1503.05671; with a sequence dimension, K-FAC-expand of Eschenhagen et al. 2023, arXiv 2311.00636):

    A = 1/C * sum of a a' over the C carrying positions        [in, in]
    S = 1/M * sum of g g' over them; M targets                 [out, out]

so that S (x) A is the Gauss-Newton matrix of the mean KL per target, in nats.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from palimpsest.curvature.modules import Matrix
from palimpsest.curvature.taps import backward, tapped
from palimpsest.data.batches import Encoded
from palimpsest.errors import TrainingError
from palimpsest.models.language_model import LanguageModel
from palimpsest.models.workers import Workers
from palimpsest.progress import Ticker

TRIANGLE = 1024
"""Width from which only the blocks on and above the diagonal of a Gram matrix are computed."""
BLOCKS = 4


@dataclass(frozen=True, eq=False)
class Factors:
    """Both factors of every matrix, fp32 or the model's own type if that is wider."""

    inputs: dict[str, Tensor]
    """A by the first matrix that reads those inputs (`shared_inputs`)."""
    outputs: dict[str, Tensor]
    """S by matrix."""


def collect_factors(
    model: LanguageModel,
    encoded: Sequence[Encoded],
    chosen: Sequence[Matrix],
    owners: Mapping[str, str],
    *,
    seed: int,
    draws: int,
    batch_size: int,
    workers: Workers,
    ticker: Ticker,
) -> Factors:
    """One pass over the rows; `draws` labels a target, each with a backward pass of its own.

    Raises:
        TrainingError: an activation or gradient that is not finite.
    """
    device, dtype = model.device, torch.promote_types(model.network.dtype, torch.float32)
    outputs = {matrix.name: torch.zeros(*2 * [matrix.shape[0]], dtype=dtype, device=device) for matrix in chosen}
    inputs = {
        matrix.name: torch.zeros(*2 * [matrix.shape[1]], dtype=dtype, device=device)
        for matrix in chosen
        if owners[matrix.name] == matrix.name
    }
    draw = 0

    def see(matrix: Matrix, activations: Tensor, gradients: Tensor) -> None:
        add_gram(outputs[matrix.name], gradients)
        if draw == 0 and matrix.name in inputs:
            add_gram(inputs[matrix.name], with_ones(activations) if matrix.has_bias else activations)

    with tapped(model, chosen, see) as forward:
        for batch in workers.batches(encoded, batch_size):
            batch = batch.to(device)
            logits = forward(batch).logits
            for draw in range(draws):
                backward(logits, batch, seed, draw, last=draw + 1 == draws)
            ticker.advance(int(batch.attention.sum()))
    workers.add([*inputs.values(), *outputs.values()])
    n_targets, n_carrying = sum(row.n_targets for row in encoded), sum(row.stop - 1 for row in encoded)
    for totals, count in ((inputs, n_carrying), (outputs, n_targets * draws)):
        for name, total in totals.items():
            _finish(total.div_(count), name)
    return Factors(inputs, outputs)


def add_gram(total: Tensor, rows: Tensor) -> None:
    """Add x'x to `total` [d, d] for rows x [P, d], summed in `total`'s type; from `TRIANGLE` on the upper part only."""
    width = rows.shape[1]
    if width < TRIANGLE:
        _addmm(total, rows, rows)
        return
    edges = [width * block // BLOCKS for block in range(BLOCKS + 1)]
    for begin, end in pairwise(edges):
        _addmm(total[begin:end, begin:], rows[:, begin:end], rows[:, begin:])


def with_ones(activations: Tensor) -> Tensor:
    """[P, in + 1]: the constant that a bias reads, as a last column."""
    return torch.cat([activations, activations.new_ones(len(activations), 1)], 1)


def _addmm(total: Tensor, left: Tensor, right: Tensor) -> None:
    if left.dtype == total.dtype:
        total.addmm_(left.T, right)
    elif left.is_cuda:  # bf16 products summed in fp32: no cast of the inputs
        total.copy_(torch.addmm(total, left.T, right, out_dtype=total.dtype))
    else:
        total.addmm_(left.T.to(total.dtype), right.to(total.dtype))


def _finish(total: Tensor, name: str) -> None:
    """Make the lower part the upper one's mirror image, in place."""
    if not torch.isfinite(total).all():
        raise TrainingError(f"curvature: {name} has an activation or gradient that is not finite; the model is damaged")
    total.triu_()
    total += total.triu(1).T
