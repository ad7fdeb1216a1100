"""From values per item to a mean with its interval, an equivalence test, and the smallest effect that could be seen.

Questions about one subject rise and fall together, so subjects, not questions, are the independent units: intervals
resample whole subjects and standard errors sum within them.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from sys import float_info
from typing import TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import optimize, special, stats

from palimpsest.errors import DataError
from palimpsest.metrics.scores import Equivalence, Score

Floats: TypeAlias = NDArray[np.float64]

LEVEL = 0.05
"""The level of each one-sided equivalence test and of the two-sided test whose power is stated."""


@dataclass(frozen=True, slots=True)
class ForgetQuality:
    """TOFU's Forget Quality with what it takes to read it."""

    p: float
    """The p-value of the two-sample Kolmogorov-Smirnov test: TOFU's number. It rises as items get fewer."""
    statistic: float
    """D, the largest gap between the two distribution functions; unlike p it means the same at any sample size."""
    n: int
    """Items of the model under test."""
    n_retain: int
    """Items of the retain model."""


def clustered_mean(values: ArrayLike, clusters: Sequence[str], *, seed: int, resamples: int = 2000) -> Score:
    """The mean over items with a 95 % percentile interval from a bootstrap over clusters (Davison & Hinkley 1997).

    With one cluster nothing can be said about other subjects; the interval is then the range of that subject's items,
    and `clusters == 1` tells so. Below about 20 clusters a percentile interval is somewhat too narrow.

    Args:
        values: [n] one number an item.
        clusters: [n] each item's subject.
        seed: of the resampling; the same seed gives the same interval.
        resamples: how many bootstrap samples.

    Raises:
        DataError: no items, or a value that is not finite.
    """
    items = _finite(values)
    sums, counts = _cluster_totals(items, clusters)
    n_clusters = len(sums)
    if n_clusters == 1:
        low, high = items.min(), items.max()
    else:
        draws = _cluster_draws(n_clusters, seed, resamples)
        means = np.concatenate([sums[drawn].sum(1) / counts[drawn].sum(1) for drawn in draws])
        low, high = np.percentile(means, [2.5, 97.5])
    return Score(float(items.mean()), float(low), float(high), len(items), n_clusters)


def clustered_ratio(
    values: ArrayLike, of: ArrayLike, clusters: Sequence[str], *, seed: int, resamples: int = 2000
) -> Score:
    """mean(values) / mean(of) with a 95 % percentile interval, both resampled together from a bootstrap over clusters.

    For a denominator that is surely above 0: the few samples in which it is not are left out. With one cluster the
    ends are the ratio itself, nothing is known of other subjects, and `clusters == 1` tells so.

    Args:
        values: [n] one number an item.
        of: [n] what they are a share of, for the same items.
        clusters: [n] each item's subject.
        seed: of the resampling; the same seed gives the same interval.
        resamples: how many bootstrap samples.

    Raises:
        DataError: no items, a value that is not finite, or a denominator that is not above 0.
    """
    shares, wholes = _finite(values), _finite(of)
    if wholes.mean() <= 0:
        raise DataError(f"a share of {wholes.mean():.3g}, which is not above 0, says nothing")
    totals = [_cluster_totals(items, clusters)[0] for items in (shares, wholes)]
    n_clusters = len(totals[0])
    draws = _cluster_draws(n_clusters, seed, resamples)
    above, below = np.concatenate([[total[drawn].sum(1) for total in totals] for drawn in draws], axis=1)
    low, high = np.percentile(above[below > 0] / below[below > 0], [2.5, 97.5])
    return Score(float(shares.sum() / wholes.sum()), float(low), float(high), len(shares), n_clusters)


def equivalence(values: ArrayLike, gold_values: ArrayLike, clusters: Sequence[str], *, margin: float) -> Equivalence:
    """Two one-sided t tests (TOST; Schuirmann 1987) that the mean paired difference from gold lies within +-margin.

    The standard error is the cluster-robust one of a mean: residuals are totalled within clusters, and t has
    clusters - 1 degrees of freedom. With clusters of equal size this is the one-sample t test on cluster means.

    With fewer than two clusters there is no test: `equivalent` is False, p is 1, low and high are the range of the
    differences, and the smallest effect is the largest float, since no difference, however large, would show.

    Args:
        values: [n] the model's value for each item.
        gold_values: [n] gold's value for the same items in the same order.
        clusters: [n] each item's subject.
        margin: the largest difference that would not matter, in the values' unit, above 0.

    Raises:
        DataError: no items, or a value that is not finite.
    """
    differences = _finite(values) - _finite(gold_values)
    difference = float(differences.mean())
    n_clusters = len(set(clusters))
    if n_clusters < 2:
        low, high = float(differences.min()), float(differences.max())
        return Equivalence(difference, low, high, margin, 1.0, float_info.max, False)
    error, freedom = clustered_standard_error(differences, clusters), n_clusters - 1
    p = _tost_p(difference, error, freedom, margin)
    reach = float(stats.t.ppf(1 - LEVEL, freedom)) * error
    return Equivalence(
        difference=difference,
        low=difference - reach,
        high=difference + reach,
        margin=margin,
        p=p,
        smallest_effect=minimum_detectable_effect(error, n_clusters),
        equivalent=p < LEVEL,
    )


def clustered_standard_error(values: ArrayLike, clusters: Sequence[str]) -> float:
    """Standard error of the mean over items when items within a cluster go together (Liang & Zeger 1986).

    sqrt(C / (C - 1) * sum over clusters of (sum of residuals)^2) / n, for C >= 2 clusters and n items.
    """
    items = _finite(values)
    totals, _ = _cluster_totals(items - items.mean(), clusters)
    n_clusters = len(totals)
    return float(np.sqrt(n_clusters / (n_clusters - 1) * (totals**2).sum()) / len(items))


def minimum_detectable_effect(
    standard_error: float, clusters: int, *, power: float = 0.8, level: float = LEVEL
) -> float:
    """The smallest true mean that a two-sided one-sample t test finds with this power, by the noncentral t.

    Before a run, `standard_error` is the expected standard deviation between subjects over sqrt(clusters).

    Args:
        standard_error: of the mean, in the values' unit.
        clusters: independent units, at least 2.
        power: the chance to find the effect.
        level: the test's level.
    """
    freedom = clusters - 1
    critical = float(stats.t.ppf(1 - level / 2, freedom))
    # The noncentral t as a mixture over equally likely estimated deviations: scipy's own is NaN at few clusters.
    deviation = np.sqrt(stats.chi2.ppf((np.arange(4000) + 0.5) / 4000, freedom) / freedom)

    def excess_power(effect: float) -> float:
        found = special.ndtr(effect - critical * deviation) + special.ndtr(-effect - critical * deviation)
        return float(found.mean()) - power

    return standard_error * float(optimize.brentq(excess_power, 0.0, 10 * critical))


def ks_forget_quality(truth_ratios: ArrayLike, retain_truth_ratios: ArrayLike) -> ForgetQuality:
    """Forget Quality (TOFU, Maini et al. 2024, §2.2.2): do truth ratios look as if drawn from the retain model's?

    Args:
        truth_ratios: [n] the model's, one for each forget question.
        retain_truth_ratios: [m] the retain model's; the test is unpaired, so m may differ from n.

    Raises:
        DataError: no items, or a value that is not finite.
    """
    ours, retain = _finite(truth_ratios), _finite(retain_truth_ratios)
    test = stats.ks_2samp(ours, retain)
    return ForgetQuality(float(test.pvalue), float(test.statistic), len(ours), len(retain))


def over_seeds(values: Sequence[float], *, ratio: bool = False) -> tuple[float | None, float | None, float | None]:
    """Mean and 95 % t-interval over seeds; of a ratio, the geometric ones. Fewer than two seeds give no interval.

    Args:
        values: one a seed.
        ratio: take logarithms, so that a half and a double weigh alike.
    """
    if len(values) < 2 or (ratio and min(values) <= 0):
        return (values[0] if values else None), None, None
    taken = [math.log(value) for value in values] if ratio else list(values)
    middle = float(np.mean(taken))
    half = float(stats.t.ppf(0.975, len(taken) - 1) * np.std(taken, ddof=1)) / math.sqrt(len(taken))
    found = (middle, middle - half, middle + half)
    return tuple(math.exp(value) for value in found) if ratio else found  # type: ignore[return-value]


def _tost_p(difference: float, error: float, freedom: int, margin: float) -> float:
    if error == 0:
        return 0.0 if abs(difference) < margin else 1.0
    not_above = stats.t.cdf((difference - margin) / error, freedom)
    not_below = stats.t.sf((difference + margin) / error, freedom)
    return float(max(not_above, not_below))


def _finite(values: ArrayLike) -> Floats:
    items = np.asarray(values, dtype=np.float64)
    if not len(items):
        raise DataError("no items to average; the set of records is empty")
    broken = np.flatnonzero(~np.isfinite(items))
    if len(broken):
        raise DataError(f"item {broken[0]} is {items[broken[0]]}, not a finite number; the model is broken there")
    return items


def _cluster_draws(n_clusters: int, seed: int, resamples: int) -> Iterator[NDArray[np.int64]]:
    """[R, C] clusters drawn with replacement: whole samples at a time, never more than about a million draws."""
    draws, at_once = np.random.default_rng(seed), max(1, 1_000_000 // n_clusters)
    for first in range(0, resamples, at_once):
        yield draws.integers(n_clusters, size=(min(at_once, resamples - first), n_clusters))


def _cluster_totals(items: Floats, clusters: Sequence[str]) -> tuple[Floats, Floats]:
    """[C] sums and [C] counts, in the clusters' sorted order."""
    _, cluster = np.unique(np.asarray(clusters, dtype=str), return_inverse=True)
    return np.bincount(cluster, weights=items).astype(np.float64), np.bincount(cluster).astype(np.float64)
