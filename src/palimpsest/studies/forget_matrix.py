"""How much of every task is gone after each was forgotten: the matrix, what explains it, and its order.

Rows are the forgotten tasks, columns the evaluated ones (arXiv 2409.02228, figure 3). A ratio explodes where there was
little to lose, so tasks near chance are left out before anything is computed of it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats
from scipy.cluster.hierarchy import leaves_list, linkage

Floats: TypeAlias = NDArray[np.float64]

DEFINITION = "forget_ratio@accuracy"
CHANCE = 0.5
LEARNED = 0.6
"""Accuracy below which a task counts as not learned: a ratio to what was learned would be noise."""


def forget_ratio(before: ArrayLike, after: ArrayLike, *, flipped: bool = False) -> Floats:
    """The share of what was learned that is gone: 1 at chance, 0 untouched; of flipped labels 1 is the mirror image.

    (before - after) / (before - 1/2), and for flipped labels (before - after) / (before - (1 - before)).

    Args:
        before: accuracy of the model that learned, above chance.
        after: accuracy of the model that forgot; broadcast against `before`.
        flipped: whether the labels were flipped rather than random.
    """
    before, after = np.asarray(before, float), np.asarray(after, float)
    return (before - after) / (2 * before - 1 if flipped else before - CHANCE)


@dataclass(frozen=True)
class Shares:
    """Of the off-diagonal variance of a matrix, what each side explains beyond the other (they may overlap)."""

    evaluated: float
    """R² of both sides less R² of the forgotten tasks alone."""
    forgotten: float
    """R² of both sides less R² of the evaluated tasks alone."""


def variance_shares(matrix: Floats) -> Shares:
    """How far the evaluated task (column) and the forgotten task (row) decide a square matrix off its diagonal.

    Both have as many levels, so chance favours neither.

    Args:
        matrix: [n, n] forget ratios of n >= 3 tasks.
    """
    n = len(matrix)
    off = ~np.eye(n, dtype=bool)
    rows, columns = (places[off] for places in np.indices((n, n)))
    by_row, by_column = np.eye(n)[rows], np.eye(n)[columns]
    both = _explained(np.hstack([by_row, by_column]), matrix[off])
    return Shares(both - _explained(by_row, matrix[off]), both - _explained(by_column, matrix[off]))


def clustered_order(profiles: Floats) -> list[int]:
    """The order of the rows of [n, d] in a UPGMA tree over their Euclidean distances."""
    return [int(place) for place in leaves_list(linkage(profiles, method="average", optimal_ordering=True))]


def spearman(x: Sequence[float], y: Sequence[float]) -> float:
    """Spearman's rho; 0 where either side is constant, which orders nothing."""
    if len(set(x)) < 2 or len(set(y)) < 2:
        return 0.0
    return float(stats.spearmanr(x, y).statistic)


def rank_correlation(x: Sequence[float], y: Sequence[float], *, seed: int = 0) -> tuple[float, float]:
    """Spearman's rho and its two-sided p from 9,999 permutations; rho is 0 where nothing is ordered."""
    first, second = (values - values.mean() for values in (stats.rankdata(x), stats.rankdata(y)))
    scale = np.sqrt((first**2).sum() * (second**2).sum()) or 1.0
    found = stats.permutation_test(
        (first,),
        lambda permuted, axis: (permuted * second).sum(axis) / scale,
        permutation_type="pairings",
        vectorized=True,
        n_resamples=9999,
        rng=np.random.default_rng(seed),
    )
    return float(found.statistic), float(found.pvalue)


def _explained(design: Floats, values: Floats) -> float:
    design = np.hstack([design, np.ones((len(values), 1))])
    residual = values - design @ np.linalg.lstsq(design, values, rcond=None)[0]
    total = ((values - values.mean()) ** 2).sum()
    return float(1 - (residual**2).sum() / total) if total > 0 else 0.0
