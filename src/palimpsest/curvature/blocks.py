"""The curvature of one matrix in its eigenbasis, and the solve with it.

A block is Q diag(L) Q' with Q = Q_out (x) Q_in and one eigenvalue for each entry of the matrix: L = l_out l_in' for
K-FAC, the measured second moment of the rotated gradient for EK-FAC (George et al. 2018, arXiv 1806.03884). The
diagonal approximation is the same without the rotation. Shapes: m = out, d = in (the bias's column counted).
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from palimpsest.errors import TrainingError

RESIDUAL = 1e-5
"""How far an fp32 eigendecomposition may be off, relative to the matrix; beyond that it is made in fp64."""
PROBES = 8


@dataclass(frozen=True, eq=False)
class Block:
    """The curvature of one matrix W [m, d]."""

    q_out: Tensor | None
    """[m, m] eigenvectors as columns; None where the basis is W's own."""
    q_in: Tensor | None
    """[d, d]"""
    eigenvalues: Tensor | tuple[Tensor, Tensor]
    """[m, d], or ([m], [d]) whose outer product they are."""

    @property
    def spectrum(self) -> Tensor:
        """[m, d] eigenvalues."""
        return torch.outer(*self.eigenvalues) if isinstance(self.eigenvalues, tuple) else self.eigenvalues

    @property
    def trace(self) -> float:
        """Sum of the eigenvalues."""
        if isinstance(self.eigenvalues, tuple):
            left, right = self.eigenvalues
            return (left.double().sum() * right.double().sum()).item()
        return self.eigenvalues.double().sum().item()

    def to(self, device: torch.device) -> "Block":
        """The same block on another device; nothing is copied where it is there already."""
        q_out, q_in = (part if part is None else part.to(device) for part in (self.q_out, self.q_in))
        if isinstance(self.eigenvalues, tuple):
            left, right = self.eigenvalues
            return Block(q_out, q_in, (left.to(device), right.to(device)))
        return Block(q_out, q_in, self.eigenvalues.to(device))

    def rotate(self, matrix: Tensor) -> Tensor:
        """Q_out' W Q_in."""
        rotated = matrix if self.q_out is None else self.q_out.T @ matrix
        return rotated if self.q_in is None else rotated @ self.q_in

    def unrotate(self, matrix: Tensor) -> Tensor:
        """Q_out W Q_in'."""
        rotated = matrix if self.q_out is None else self.q_out @ matrix
        return rotated if self.q_in is None else rotated @ self.q_in.T

    def solve(self, matrix: Tensor, damping: float, spectral_power: float = 1.0) -> Tensor:
        """(block + damping I)^-1 applied to W [m, d]: exact damping, not one of each factor.

        With a spectral power below 1, the singular values of the whitened W, between the two halves of the solve, are
        raised to it first; see `flattened`.
        """
        here = self.to(matrix.device)
        root = (here.spectrum + damping).sqrt()
        return here.unrotate(flattened(here.rotate(matrix) / root, spectral_power) / root)

    def apply(self, matrix: Tensor) -> Tensor:
        """The block applied to W [m, d]."""
        return self.unrotate(self.rotate(matrix) * self.spectrum)


def flattened(matrix: Tensor, power: float) -> Tensor:
    """[m, d] the same singular vectors, the singular values (the largest set to 1) raised to a power.

    1 leaves the matrix as it is; towards 0 all directions count alike, as in Muon (Jordan et al. 2024).
    """
    if power == 1:
        return matrix
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    largest = values[:1].clamp(min=torch.finfo(values.dtype).tiny)
    return left * (values / largest) ** power @ right * largest


def eigen(factor: Tensor, name: str) -> tuple[Tensor, Tensor]:
    """Eigenvalues [n], none below 0, and eigenvectors [n, n] as columns of a symmetric factor, ascending.

    In the factor's own precision if that proves good enough, else in fp64.

    Raises:
        TrainingError: the factor is not finite.
    """
    if not torch.isfinite(factor).all():
        raise TrainingError(f"curvature: a factor of {name} is not finite; the model is damaged")
    try:
        values, vectors = torch.linalg.eigh(factor)
        good = _residual(factor, values, vectors) <= RESIDUAL * torch.linalg.matrix_norm(factor).item()
    except torch.linalg.LinAlgError:  # type: ignore[attr-defined]
        good = False
    if not good:
        values, vectors = (part.to(factor.dtype) for part in torch.linalg.eigh(factor.double()))
    return values.clamp(min=0), vectors


def _residual(factor: Tensor, values: Tensor, vectors: Tensor) -> float:
    """Frobenius norm of F V - V L, estimated from its products with a few random vectors (Hutchinson 1989)."""
    probes = torch.randn(len(factor), PROBES, generator=torch.Generator().manual_seed(0)).to(factor)
    off = factor @ (vectors @ probes) - vectors @ (values[:, None] * probes)
    return (torch.linalg.matrix_norm(off) / PROBES**0.5).item()
