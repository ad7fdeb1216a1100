"""Perturbation: what a forgotten answer does when weights are pruned or shaken, which no attacker need even intend.

A suppression that hangs by small weights falls off with them. Training on retain rows, the third perturbation that
happens by itself, is relearning on retain rows (`attacks.relearn`).
"""

from functools import partial

import torch
from torch import Tensor

from palimpsest.attacks.attack import Attack, with_other_matrices
from palimpsest.errors import SpecError
from palimpsest.models.language_model import LanguageModel

SHARES = (0.1, 0.3, 0.5)
NOISES = (0.05, 0.1, 0.2)


def pruned(model: LanguageModel, share: float) -> LanguageModel:
    """A copy without the smallest weights of each linear map inside the blocks (magnitude pruning, Han et al. 2015).

    Args:
        model: left as it is.
        share: of each matrix's weights that become 0, to the nearest whole number of them.

    Raises:
        SpecError: it is no share.
    """
    if not 0 <= share <= 1:
        raise SpecError(f"pruning: share is {share}; give 0 to 1")

    def prune(matrix: Tensor) -> Tensor:
        values = matrix.flatten().clone()
        order = values.abs().argsort(stable=True)
        values[order[: round(share * len(order))]] = 0.0
        return values.reshape(matrix.shape)

    return with_other_matrices(model, f"{model.name}, {share:g} pruned", prune)


def shaken(model: LanguageModel, noise: float, *, seed: int) -> LanguageModel:
    """A copy with a Gaussian added to each linear map inside the blocks, of `noise` standard deviations of the matrix.

    The draws follow from the seed and the matrices' shapes, so models that are built alike are shaken alike.

    Raises:
        SpecError: noise below 0.
    """
    if noise < 0:
        raise SpecError(f"noise: {noise} deviations; give 0 or more")
    generator = torch.Generator().manual_seed(seed)

    def shake(matrix: Tensor) -> Tensor:
        drawn = torch.randn(matrix.shape, generator=generator).to(matrix.device)
        return matrix + noise * matrix.std() * drawn

    return with_other_matrices(model, f"{model.name}, noise {noise:g}", shake)


def perturbation_attacks(*, seed: int) -> list[Attack]:
    """Pruning at every share, and noise of every size."""
    pruning = [
        Attack.by_copy(
            f"pruned_{share:g}", f"the smallest {share:.0%} of the weights removed", partial(pruned, share=share)
        )
        for share in SHARES
    ]
    shaking = [
        Attack.by_copy(
            f"noise_{noise:g}",
            f"Gaussian noise of {noise:g} deviations on every matrix",
            partial(shaken, noise=noise, seed=seed),
        )
        for noise in NOISES
    ]
    return [*pruning, *shaking]
