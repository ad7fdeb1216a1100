"""Linear regression in context, where what the best predictor infers is known exactly (Kotha et al. 2024, §2).

A task is a vector of weights w. A prompt of it is a row of pairs, x ~ N(0, I) and y = <w, x> + noise, and each y is to
be predicted from its x and the pairs before it. From which prior tasks are drawn decides what the best prediction is:
with few tasks one recognises the task, with a continuum one fits weights (arXiv 2309.10105).
"""

from dataclasses import dataclass, replace
from functools import cached_property
from typing import TypeAlias

import torch
from torch import Generator, Tensor

from palimpsest.errors import SpecError


@dataclass(frozen=True, eq=False)
class Discrete:
    """One of a fixed pool of tasks, each as likely as the others."""

    pool: Tensor
    """[m, d] weights, float64."""

    @classmethod
    def drawn(cls, tasks: int, dim: int, seed: int) -> "Discrete":
        """A pool drawn from N(0, I)."""
        if tasks < 1:
            raise SpecError(f"regression: a pool of {tasks} tasks; it must have at least 1")
        return cls(torch.randn(tasks, dim, dtype=torch.float64, generator=Generator().manual_seed(seed)))

    @property
    def dim(self) -> int:
        """Of x."""
        return self.pool.shape[1]

    def sample(self, n: int, generator: Generator) -> Tensor:
        """[n, d] weights, with replacement."""
        return self.pool[torch.randint(len(self.pool), (n,), generator=generator)]


@dataclass(frozen=True)
class Gaussian:
    """Any task: w ~ N(0, scale^2 I)."""

    dim: int
    scale: float = 1.0

    def __post_init__(self) -> None:
        if not self.scale > 0:
            raise SpecError(f"regression: the scale of a Gaussian prior is {self.scale}; it must be above 0")

    def sample(self, n: int, generator: Generator) -> Tensor:
        """[n, d] weights."""
        return self.scale * torch.randn(n, self.dim, dtype=torch.float64, generator=generator)


@dataclass(frozen=True)
class ScaleMixture:
    """Any task at one of several scales, each as likely as the others: it covers prompts whose labels are scaled."""

    dim: int
    scales: tuple[float, ...]

    def __post_init__(self) -> None:
        if not self.scales:
            raise SpecError("regression: a scale mixture needs at least one scale")

    @cached_property
    def parts(self) -> tuple[Gaussian, ...]:
        """One Gaussian a scale."""
        return tuple(Gaussian(self.dim, scale) for scale in self.scales)

    def sample(self, n: int, generator: Generator) -> Tensor:
        """[n, d] weights."""
        scales = torch.tensor(self.scales, dtype=torch.float64)
        drawn = scales[torch.randint(len(scales), (n,), generator=generator)]
        return drawn.unsqueeze(-1) * torch.randn(n, self.dim, dtype=torch.float64, generator=generator)


@dataclass(frozen=True, eq=False)
class Mixture:
    """With probability alpha a task of the pool, else any task."""

    discrete: Discrete
    continuous: Gaussian | ScaleMixture
    alpha: float

    def __post_init__(self) -> None:
        if not 0 <= self.alpha <= 1:
            raise SpecError(f"regression: alpha is {self.alpha}; it is a probability, from 0 to 1")
        if self.discrete.dim != self.continuous.dim:
            raise SpecError(
                f"regression: the pool's tasks have {self.discrete.dim} weights, the others {self.continuous.dim}; "
                "a mixture needs them alike"
            )

    @property
    def dim(self) -> int:
        """Of x."""
        return self.discrete.dim

    def at(self, alpha: float) -> "Mixture":
        """The same tasks, mixed otherwise."""
        return replace(self, alpha=alpha)

    def sample(self, n: int, generator: Generator) -> Tensor:
        """[n, d] weights."""
        from_pool = torch.rand(n, 1, dtype=torch.float64, generator=generator) < self.alpha
        pool, others = self.discrete.sample(n, generator), self.continuous.sample(n, generator)
        return torch.where(from_pool, pool, others)


TaskPrior: TypeAlias = Discrete | Gaussian | ScaleMixture | Mixture


@dataclass(frozen=True, eq=False)
class Prompts:
    """Prompts of T pairs each, in float64."""

    x: Tensor
    """[n, T, d]."""
    y: Tensor
    """[n, T] with noise."""
    weights: Tensor
    """[n, d] the tasks."""

    @property
    def target(self) -> Tensor:
        """[n, T] what y would be without its noise."""
        return torch.einsum("ntd,nd->nt", self.x, self.weights)

    def squared_errors(self, predictions: Tensor) -> Tensor:
        """[n, T] squared distances from the target: the excess of a prediction's risk over the noise."""
        return (predictions - self.target).square()


def sample_prompts(prior: TaskPrior, n: int, points: int, noise: float, seed: int) -> Prompts:
    """Draw n prompts of so many pairs; the same arguments give the same prompts.

    Args:
        prior: from which each prompt's task is drawn.
        n: prompts.
        points: pairs in a prompt.
        noise: standard deviation of the noise in y.
        seed: of everything that is drawn.
    """
    generator = Generator().manual_seed(seed)
    weights = prior.sample(n, generator)
    x = torch.randn(n, points, prior.dim, dtype=torch.float64, generator=generator)
    clean = Prompts(x, x.new_empty(n, points), weights)
    return replace(clean, y=clean.target + noise * torch.randn(n, points, dtype=torch.float64, generator=generator))
