"""Quantisation: rounding the weights may undo an unlearning that moved them by little (Zhang et al. 2024).

Of methods that must keep the model's use, 21 % of the forgotten knowledge is left in full precision and 83 % at 4 bits
(arXiv 2410.16454). Weights are rounded and multiplied out again, so any model runs them. Nothing is calibrated:
round-to-nearest with a scale a row or a group of a row's weights, and NF4 (Dettmers et al. 2023, QLoRA, arXiv
2305.14314, §3), whose levels are quantiles of a normal distribution.
"""

from collections.abc import Callable
from functools import cache, partial

import torch
from torch import Tensor
from torch.nn.functional import pad

from palimpsest.attacks.attack import Attack, with_other_matrices
from palimpsest.errors import SpecError
from palimpsest.models.language_model import LanguageModel

NF4_BLOCK = 64
"""Weights that share a scale, as in QLoRA."""
NF4_OFFSET = 1 - (1 / 32 + 1 / 30) / 2
"""The outermost quantile: the mean of what 16 and 15 equal shares of the normal's mass would have it."""


def round_to_nearest(matrix: Tensor, bits: int, *, group: int | None = None) -> Tensor:
    """[out, in] the matrix on a symmetric grid of 2^bits - 1 levels; no weight moves by more than half a step.

    The step is max|w| / (2^(bits - 1) - 1), of a row, or of `group` neighbours in a row (the last group of a row may
    have fewer).

    Raises:
        SpecError: fewer than 2 bits, or a group of nothing.
    """
    if bits < 2 or (group is not None and group < 1):
        raise SpecError(
            f"quantisation: {bits} bits in groups of {group}; give at least 2 bits and groups of at least 1"
        )
    n_out, n_in = matrix.shape
    width = group or n_in
    blocks = pad(matrix, (0, -n_in % width)).reshape(n_out, -1, width)
    steps = blocks.abs().amax(-1, keepdim=True) / (2 ** (bits - 1) - 1)
    rounded = (blocks / steps.where(steps > 0, 1.0)).round() * steps
    return rounded.reshape(n_out, -1)[:, :n_in]


def nf4(matrix: Tensor, *, block: int = NF4_BLOCK) -> Tensor:
    """[out, in] each weight at the nearest of 16 levels times the largest |w| of its block of `block` weights.

    Blocks go through the matrix row by row and may cross from one row into the next, as in QLoRA's code.

    Raises:
        SpecError: a block of nothing.
    """
    if block < 1:
        raise SpecError(f"quantisation: blocks of {block}; give at least 1 weight a block")
    flat = matrix.reshape(-1)
    blocks = pad(flat, (0, -len(flat) % block)).reshape(-1, block)
    scales = blocks.abs().amax(1, keepdim=True)
    levels = nf4_levels().to(matrix)
    middles = (levels[1:] + levels[:-1]) / 2
    rounded = levels[torch.bucketize(blocks / scales.where(scales > 0, 1.0), middles)] * scales
    return rounded.reshape(-1)[: len(flat)].reshape(matrix.shape)


@cache
def nf4_levels() -> Tensor:
    """[16] NormalFloat's levels in rising order: over the largest, eight quantiles above an exact 0 and seven below."""
    normal = torch.distributions.Normal(torch.zeros((), dtype=torch.float64), torch.ones((), dtype=torch.float64))

    def quantiles(n: int) -> Tensor:
        shares = torch.linspace(NF4_OFFSET, 0.5, n + 1, dtype=torch.float64)[:-1]
        return normal.icdf(shares)

    above, below, zero = quantiles(8), -quantiles(7), torch.zeros(1, dtype=torch.float64)
    return (torch.cat([below, zero, above.flip(0)]) / above.max()).float()


def quantised(model: LanguageModel, name: str, rounding: Callable[[Tensor], Tensor]) -> LanguageModel:
    """A copy whose linear maps inside the blocks are rounded; which those are, see `with_other_matrices`."""
    return with_other_matrices(model, f"{model.name}, {name}", rounding)


ROUNDINGS: dict[str, tuple[str, Callable[[Tensor], Tensor]]] = {
    "int8": ("8 bits a weight, a scale a row", partial(round_to_nearest, bits=8)),
    "int4": ("4 bits a weight, a scale a row", partial(round_to_nearest, bits=4)),
    "int4_grouped": ("4 bits a weight, a scale for every 32", partial(round_to_nearest, bits=4, group=32)),
    "nf4": (f"4 bits a weight, a scale for every {NF4_BLOCK}", nf4),
}
"""By name: what it costs, and how it rounds."""


def quantisation_attacks() -> list[Attack]:
    """Every rounding there is, as attacks."""
    return [
        Attack.by_copy(name, budget, partial(quantised, name=name, rounding=rounding))
        for name, (budget, rounding) in ROUNDINGS.items()
    ]
