"""Comparisons of two fragments of episodes, as an imperfect judge makes them, and the loss that a reward is fitted by.

The judge prefers the first of two fragments with probability sigmoid((R1 - R2) / temperature), R being the sum of true
rewards (Bradley & Terry 1952; Christiano et al. 2017, arXiv 1706.03741, §2.2.3). Rewards are of cells, so all that
matters of a fragment is how often it arrives in each.

Shapes: S seeds, N comparisons, K members of an ensemble, n cells.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray
from scipy.special import expit

from palimpsest.errors import SpecError
from palimpsest.rewards.gridworlds import Floats, Ints


@dataclass(frozen=True, eq=False)
class Comparisons:
    """What was compared, and which was preferred."""

    counts: NDArray[np.int16]
    """[S, N, 2, n] how often each of two fragments arrives in each cell."""
    first: Floats
    """[S, N] 1 where the first was preferred, 0 where the second was."""
    weights: Floats
    """[S, N, K] how often each member of an ensemble sees it."""

    def __len__(self) -> int:
        """N."""
        return self.first.shape[1]

    @cached_property
    def differences(self) -> Floats:
        """[S, N, n] arrivals of the first less those of the second."""
        return (self.counts[:, :, 0] - self.counts[:, :, 1]).astype(np.float64)

    @cached_property
    def visits(self) -> Floats:
        """[S, n] how often each cell was compared."""
        return self.counts.sum((1, 2), dtype=np.float64)

    def newest(self, share: float) -> "Comparisons":
        """Those that came last."""
        first = len(self) - max(1, round(share * len(self)))
        return Comparisons(self.counts[:, first:], self.first[:, first:], self.weights[:, first:])


def joined(parts: Sequence[Comparisons]) -> Comparisons:
    """All of them, in order."""
    return Comparisons(
        np.concatenate([part.counts for part in parts], axis=1),
        np.concatenate([part.first for part in parts], axis=1),
        np.concatenate([part.weights for part in parts], axis=1),
    )


def compare(
    first: Ints,
    second: Ints,
    rewards: Floats,
    number: int,
    rngs: Sequence[np.random.Generator],
    *,
    length: int = 10,
    temperature: float = 1.0,
    members: int = 1,
) -> Comparisons:
    """Draw pairs of fragments, one from each side, and ask which is better.

    Args:
        first: [S, E, H] the cells that episodes arrive in.
        second: the same of the other side; may be the same episodes.
        rewards: [n] the true ones.
        number: of pairs a seed.
        rngs: [S] what each seed draws from.
        length: of a fragment, in steps.
        temperature: of the judge, in units of reward; the higher, the more labels are wrong.
        members: of the ensemble. One sees every comparison once; of more, each sees it as often as a draw from
            Poisson(1) says, which is a bootstrap of comparisons that are still coming in (Oza & Russell 2001).

    Raises:
        SpecError: fragments longer than episodes.
    """
    horizon = first.shape[2]
    if not 1 <= length <= horizon:
        raise SpecError(
            f"comparisons: fragments of {length} steps out of episodes of {horizon}; give at most {horizon}"
        )
    fragments = []
    for side in (first, second):
        episodes = np.stack([rng.integers(side.shape[1], size=number) for rng in rngs])
        begins = np.stack([rng.integers(horizon - length + 1, size=number) for rng in rngs])
        steps = begins[..., None] + np.arange(length)
        fragments.append(side[np.arange(len(side))[:, None, None], episodes[..., None], steps])
    counts = _counts(np.stack(fragments, 2), len(rewards))
    gains = (counts * rewards).sum(-1)
    preferred = expit((gains[..., 0] - gains[..., 1]) / temperature)
    drawn = np.stack([rng.random(number) for rng in rngs])
    seen = [rng.poisson(1.0, (number, members)) if members > 1 else np.ones((number, 1)) for rng in rngs]
    return Comparisons(counts, (drawn < preferred).astype(np.float64), np.stack(seen).astype(np.float64))


def bradley_terry(comparisons: Comparisons, rewards: Floats) -> tuple[Floats, Floats]:
    """The negative log-likelihood [S, K] of rewards [S, K, n], and its gradient [S, K, n].

    In nats a comparison: the sum over those that a member sees, divided by N.
    """
    logits = comparisons.differences @ rewards.swapaxes(1, 2)
    first, weights = comparisons.first[..., None], comparisons.weights
    nll = (weights * (np.logaddexp(0, logits) - first * logits)).mean(1)
    slopes = weights * (expit(logits) - first)
    return nll, slopes.swapaxes(1, 2) @ comparisons.differences / len(comparisons)


def accuracy(comparisons: Comparisons, rewards: Floats) -> Floats:
    """[S] the share of comparisons that [S, n] rewards call as the judge did; a tie is called half rightly."""
    sign = np.sign((comparisons.differences @ rewards[..., None])[..., 0])
    share: Floats = ((sign + 1) / 2 * (2 * comparisons.first - 1) + 1 - comparisons.first).mean(1)
    return share


def _counts(cells: Ints, n: int) -> NDArray[np.int16]:
    """[..., n] how often each cell stands in the last axis."""
    rows = cells.reshape(-1, cells.shape[-1])
    flat = np.arange(len(rows))[:, None] * n + rows
    return np.bincount(flat.ravel(), minlength=len(rows) * n).astype(np.int16).reshape(*cells.shape[:-1], n)
