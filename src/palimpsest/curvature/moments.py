"""The second pass over the rows: the second moment of every entry of the gradient, in a given basis.

Lambda = 1/M * sum over rows of (Q_out' G Q_in)^2 with G = sum of g a' over a row's positions: the Fisher matrix's
diagonal in that basis. In K-FAC's eigenbasis this is EK-FAC (George et al. 2018); in W's own, the diagonal Fisher.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from palimpsest.curvature.blocks import Block
from palimpsest.curvature.factors import with_ones
from palimpsest.curvature.modules import Matrix
from palimpsest.curvature.taps import backward, carrying, tapped
from palimpsest.data.batches import Encoded
from palimpsest.models.language_model import LanguageModel
from palimpsest.models.workers import Workers
from palimpsest.progress import Ticker

CHUNK = 2**22
"""Entries of [rows, out, in] held at a time."""


def collect_moments(
    model: LanguageModel,
    encoded: Sequence[Encoded],
    chosen: Sequence[Matrix],
    basis: Mapping[str, Block],
    *,
    seed: int,
    draws: int,
    batch_size: int,
    workers: Workers,
    ticker: Ticker,
) -> dict[str, Tensor]:
    """[out, in] by matrix, of the same labels as `collect_factors` draws with that seed."""
    device, dtype = model.device, torch.promote_types(model.network.dtype, torch.float32)
    moments = {matrix.name: torch.zeros(matrix.shape, dtype=dtype, device=device) for matrix in chosen}
    lengths: list[int] = []
    rotation, rotated = None, torch.empty(0)

    def see(matrix: Matrix, activations: Tensor, gradients: Tensor) -> None:
        nonlocal rotation, rotated
        block, total = basis[matrix.name], moments[matrix.name]
        # Rotating the vectors is cheaper than rotating each row's gradient while rows are shorter than matrices wide.
        if block.q_in is None or block.q_in is not rotation:  # else query, key and value, or gate and up, in a row
            read = (with_ones(activations) if matrix.has_bias else activations).to(dtype)
            rotation, rotated = block.q_in, read if block.q_in is None else read @ block.q_in
        back = gradients.to(dtype)
        add_squares(total, back if block.q_out is None else back @ block.q_out, rotated, lengths)

    with tapped(model, chosen, see) as forward:
        for batch in workers.batches(encoded, batch_size):
            batch = batch.to(device)
            logits = forward(batch).logits
            lengths = carrying(batch).sum(1).tolist()
            for draw in range(draws):
                rotation = None
                backward(logits, batch, seed, draw, last=draw + 1 == draws)
            ticker.advance(int(batch.attention.sum()))
    workers.add(moments.values())
    n_targets = sum(row.n_targets for row in encoded)
    return {name: total.div_(n_targets * draws) for name, total in moments.items()}


def add_squares(total: Tensor, gradients: Tensor, inputs: Tensor, lengths: Sequence[int]) -> None:
    """Add each row's squared gradient matrix, (sum of g a')^2, to `total` [m, d]; `lengths` positions are a row's."""
    if len(set(lengths)) == 1:  # rows of one length, as packed text has: several products at once
        stacked_g = gradients.view(len(lengths), lengths[0], -1)
        stacked_a = inputs.view(len(lengths), lengths[0], -1)
        rows = max(1, CHUNK // total.numel())
        for g, a in zip(stacked_g.split(rows), stacked_a.split(rows), strict=True):
            product = g.transpose(1, 2) @ a
            total += product.square_().sum(0)
        return
    for g, a in zip(gradients.split(list(lengths)), inputs.split(list(lengths)), strict=True):
        product = g.T @ a
        total.addcmul_(product, product)
