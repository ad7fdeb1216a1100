"""Muon (Jordan 2024): momentum whose singular values are made alike, for the weights of hidden layers.

torch's own orthogonalises in bf16. A processor without bf16 instructions multiplies such matrices an order of magnitude
more slowly than fp32 ones, and training would be little else. There products are made in fp32 and rounded to bf16,
which is what bf16 instructions do, so that a model hardly depends on the processor that it was trained on.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from palimpsest.models.hardware import bf16_is_fast


def muon(matrices: Sequence[Tensor], learning_rate: float, weight_decay: float) -> torch.optim.Muon:
    """Torch's Muon with its default momentum, or the same in fp32 where bf16 is slow.

    Args:
        matrices: [rows, columns] each, all on one device.
        learning_rate: the rate.
        weight_decay: decoupled.
    """
    kind = torch.optim.Muon if bf16_is_fast(matrices[0].device) else MuonInFp32
    return kind(list(matrices), lr=learning_rate, weight_decay=weight_decay)


class MuonInFp32(torch.optim.Muon):
    """torch's Muon, orthogonalising in fp32; of its options the adjustment of the rate is always the original one."""

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        """Go one step down the gradients."""
        if closure is not None:
            raise ValueError("a closure is not called here; compute the gradients before the step")
        for group in self.param_groups:
            rate, momentum = group["lr"], group["momentum"]
            for matrix in group["params"]:
                if matrix.grad is None:
                    continue
                buffer = self.state[matrix].setdefault("momentum_buffer", torch.zeros_like(matrix.grad))
                buffer.lerp_(matrix.grad, 1 - momentum)
                update = matrix.grad.lerp(buffer, momentum) if group["nesterov"] else buffer
                update = orthogonalised(update.float(), group["ns_coefficients"], group["ns_steps"], group["eps"])
                rows, columns = matrix.shape
                matrix.mul_(1 - rate * group["weight_decay"])
                matrix.add_(update.to(matrix.dtype), alpha=-rate * math.sqrt(max(1, rows / columns)))


def to_bf16(matrix: Tensor) -> Tensor:
    """The nearest that bf16 has, in the type that it was."""
    return matrix.bfloat16().to(matrix.dtype)


def orthogonalised(
    matrix: Tensor,
    coefficients: tuple[float, float, float],
    steps: int,
    eps: float,
    rounded: Callable[[Tensor], Tensor] = to_bf16,
) -> Tensor:
    """[rows, columns] the matrix with singular values near 1, by Newton-Schulz iterations.

    Args:
        matrix: [rows, columns].
        coefficients: a, b, c of the iteration aX + b(XX')X + c(XX')(XX')X.
        steps: how many iterations.
        eps: the least norm that it is divided by.
        rounded: what every result passes.
    """
    a, b, c = coefficients
    tall = matrix.shape[0] > matrix.shape[1]
    wide = rounded(matrix.T if tall else matrix)
    wide = rounded(wide / rounded(wide.norm()).clamp(min=eps))  # no singular value above 1
    for _ in range(steps):
        gram = rounded(wide @ wide.T)
        wide = rounded(torch.addmm(wide, rounded(torch.addmm(gram, gram, gram, beta=b, alpha=c)), wide, beta=a))
    return wide.T if tall else wide
