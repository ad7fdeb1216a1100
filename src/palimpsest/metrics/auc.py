"""How well a number tells members from non-members: the area under the ROC curve, its interval, and a threshold.

Every number here is a *cost*: low for what a model finds familiar. So 1 means that every member costs less than every
non-member, and 1/2 that they cannot be told apart (the sign of MIMIR, Duan et al. 2024, arXiv:2402.07841, and of
OpenUnlearning; MUSE counts the other way, see `muse`).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike
from scipy import special, stats

from palimpsest.errors import DataError
from palimpsest.metrics.statistics import Floats, clustered_standard_error

LEVEL = 0.05
"""One minus the coverage of the intervals."""


@dataclass(frozen=True, slots=True)
class Auc:
    """P(a member costs less than a non-member), ties counted as one half, with its 95 % interval."""

    value: float
    low: float
    high: float
    members: int
    """Items."""
    nonmembers: int
    member_clusters: int
    """Subjects."""
    nonmember_clusters: int


@dataclass(frozen=True, slots=True)
class Threshold:
    """What calls an item a member."""

    value: float
    """In the unit of the costs."""
    balanced_accuracy: float
    """Mean of the shares of members and of non-members that it calls rightly, on the items it was chosen on."""


def auc(
    member_costs: ArrayLike,
    nonmember_costs: ArrayLike,
    member_clusters: Sequence[str] | None = None,
    nonmember_clusters: Sequence[str] | None = None,
) -> Auc:
    """The area under the curve with DeLong's interval (DeLong et al. 1988), clustered as Obuchowski (1997) does it.

    The variance is that of each item's share of pairs won, totalled within subjects, also where a subject has items on
    both sides; with a subject an item it is DeLong's. The interval is one of t on the scale of log-odds, with the
    degrees of freedom of the side with fewer subjects.

    Where the variance is 0 (every pair won, say) that would be a point. The interval is then the exact one of a share
    (Clopper & Pearson 1934) of as many independent pairs as the smaller side has subjects. With fewer than two
    subjects on a side it is [0, 1].

    Args:
        member_costs: [m] one number an item.
        nonmember_costs: [n] the same of items that were never trained on.
        member_clusters: [m] each item's subject; each its own where None.
        nonmember_clusters: [n] the same.

    Raises:
        DataError: no items on a side, or a cost that is not a number.
    """
    members, nonmembers = _costs(member_costs, "members"), _costs(nonmember_costs, "non-members")
    subjects = (
        _labels(member_clusters, len(members), "member"),
        _labels(nonmember_clusters, len(nonmembers), "non-member"),
    )
    won_by_member = 1 - _share_below(members, nonmembers)
    won_by_nonmember = _share_below(nonmembers, members)
    value = float(won_by_member.mean())
    clusters = [len(set(labels)) for labels in subjects]
    if min(clusters) < 2:
        low, high = 0.0, 1.0
    else:
        variance = clustered_standard_error(won_by_member, subjects[0]) ** 2
        variance += clustered_standard_error(won_by_nonmember, subjects[1]) ** 2
        variance += 2 * _covariance(won_by_member - value, won_by_nonmember - value, subjects)
        low, high = _interval(value, variance, min(clusters))
    return Auc(value, low, high, len(members), len(nonmembers), *clusters)


def best_threshold(member_costs: ArrayLike, nonmember_costs: ArrayLike) -> Threshold:
    """The cost up to which an item is called a member such that most are called rightly, both sides weighing the same.

    It lies half-way between two costs; of equally good ones the lowest is taken.

    Raises:
        DataError: no items on a side, or a cost that is not a number.
    """
    members, nonmembers = np.sort(_costs(member_costs, "members")), np.sort(_costs(nonmember_costs, "non-members"))
    costs = np.unique(np.concatenate([members, nonmembers]))
    middles = (costs[:-1] + costs[1:]) / 2
    called = np.concatenate([[-np.inf], np.where(np.isfinite(middles), middles, costs[:-1]), [np.inf]])
    found = members.searchsorted(called, side="right") / len(members)
    spared = 1 - nonmembers.searchsorted(called, side="right") / len(nonmembers)
    best = int((found + spared).argmax())
    return Threshold(float(called[best]), float((found + spared)[best] / 2))


def _share_below(costs: Floats, others: Floats) -> Floats:
    """[costs] the share of `others` that cost less than each, ties counted as one half."""
    ranked = np.sort(others)
    return (ranked.searchsorted(costs, side="left") + ranked.searchsorted(costs, side="right")) / (2 * len(ranked))


def _covariance(members: Floats, nonmembers: Floats, subjects: tuple[Sequence[str], Sequence[str]]) -> float:
    """Of the two sides' means, through subjects that have items on both; 0 where none has."""
    everyone = np.unique([*subjects[0], *subjects[1]])
    totals = [
        np.bincount(everyone.searchsorted(np.array(labels)), weights=values, minlength=len(everyone)) / len(values)
        for labels, values in zip(subjects, (members, nonmembers), strict=True)
    ]
    return float(len(everyone) / (len(everyone) - 1) * (totals[0] * totals[1]).sum())


def _interval(value: float, variance: float, clusters: int) -> tuple[float, float]:
    if variance <= 1e-18 or not 0 < value < 1:
        won = value * clusters
        low = stats.beta.ppf(LEVEL / 2, won, clusters - won + 1) if won > 0 else 0.0
        high = stats.beta.ppf(1 - LEVEL / 2, won + 1, clusters - won) if won < clusters else 1.0
        return float(low), float(high)
    reach = stats.t.ppf(1 - LEVEL / 2, clusters - 1) * np.sqrt(variance) / (value * (1 - value))
    middle = special.logit(value)
    return float(special.expit(middle - reach)), float(special.expit(middle + reach))


def _costs(values: ArrayLike, side: str) -> Floats:
    costs = np.asarray(values, dtype=np.float64)
    if not len(costs):
        raise DataError(f"there are no {side}; membership inference needs items that were and were not trained on")
    broken = np.flatnonzero(np.isnan(costs))
    if len(broken):
        raise DataError(f"item {broken[0]} of the {side} costs nan; the model is broken there, so nothing can be said")
    return costs


def _labels(clusters: Sequence[str] | None, n: int, side: str) -> Sequence[str]:
    """Each item's subject; without subjects, a name for each item that the other side does not have."""
    return [f"{side} {place}" for place in range(n)] if clusters is None else clusters
