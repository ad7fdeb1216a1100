"""AUC, its interval and thresholds against sums over all pairs, simulation, and DeLong's own formula in loops."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from palimpsest.errors import DataError
from palimpsest.metrics.auc import auc, best_threshold

costs = st.lists(st.integers(0, 6).map(float), min_size=1, max_size=9)


def pairs(members: list[float], nonmembers: list[float]) -> np.ndarray:
    """[m, n] 1 where the member costs less, 1/2 where both cost the same."""
    return np.array([[(one < other) + (one == other) / 2 for other in nonmembers] for one in members])


def delong_variance(members: np.ndarray, nonmembers: np.ndarray) -> float:
    """DeLong et al. 1988, equations 4 to 6, for one curve."""
    won = pairs(members.tolist(), nonmembers.tolist())
    (m, n), area = won.shape, won.mean()
    s10 = sum((won[i].mean() - area) ** 2 for i in range(m)) / (m - 1)
    s01 = sum((won[:, j].mean() - area) ** 2 for j in range(n)) / (n - 1)
    return float(s10 / m + s01 / n)


@given(costs, costs)
@settings(deadline=None, max_examples=80)
def test_the_area_is_the_share_of_pairs_won_and_turns_over_with_the_sides(
    members: list[float], nonmembers: list[float]
) -> None:
    found = auc(members, nonmembers)
    assert found.value == pytest.approx(pairs(members, nonmembers).mean())
    assert found.value == pytest.approx(
        stats.mannwhitneyu(nonmembers, members).statistic / len(members) / len(nonmembers)
    )
    assert 0 <= found.low <= found.value + 1e-12 and found.value - 1e-12 <= found.high <= 1
    turned = auc(nonmembers, members)
    assert (turned.value, turned.low, turned.high) == pytest.approx((1 - found.value, 1 - found.high, 1 - found.low))
    monotone = auc([np.exp(cost) for cost in members], [np.exp(cost) for cost in nonmembers])
    assert (monotone.low, monotone.high) == (found.low, found.high)


def test_the_interval_is_delongs_on_the_log_odds() -> None:
    draws = np.random.default_rng(0)
    members, nonmembers = draws.normal(0, 1, 30), draws.normal(0.8, 1.4, 45)
    found = auc(members, nonmembers)
    error = np.sqrt(delong_variance(members, nonmembers)) / (found.value * (1 - found.value))
    log_odds = np.log(found.value / (1 - found.value))
    ends = log_odds + np.array([-1, 1]) * stats.t.ppf(0.975, 29) * error
    assert [found.low, found.high] == pytest.approx(1 / (1 + np.exp(-ends)), rel=1e-9)


def test_repeating_every_item_leaves_a_clustered_interval_as_it_was() -> None:
    draws = np.random.default_rng(1)
    members, nonmembers = draws.normal(0, 1, 12), draws.normal(1, 1, 15)
    once = auc(members, nonmembers)
    names = [f"m{place}" for place in range(12)], [f"n{place}" for place in range(15)]
    copies = auc(np.tile(members, 4), np.tile(nonmembers, 4), names[0] * 4, names[1] * 4)
    assert (copies.value, copies.low, copies.high) == pytest.approx((once.value, once.low, once.high))
    assert (copies.members, copies.member_clusters, copies.nonmember_clusters) == (48, 12, 15)
    naive = auc(np.tile(members, 4), np.tile(nonmembers, 4))
    assert naive.high - naive.low < 0.6 * (once.high - once.low)


def covered(draw: np.random.Generator, *, shared: bool, rounds: int = 300) -> tuple[float, float]:
    """How often the truth, 1/2, lies in the clustered and in the naive interval where subjects sway their items."""
    inside = naive = 0
    for _ in range(rounds):
        sway = draw.normal(size=(2, 25, 1))
        if shared:
            sway[1] = sway[0]
        sides = sway + draw.normal(size=(2, 25, 8))
        names = [[f"{'' if shared else side}{s}" for s in range(25) for _ in range(8)] for side in range(2)]
        found = auc(sides[0].ravel(), sides[1].ravel(), *names)
        alone = auc(sides[0].ravel(), sides[1].ravel())
        inside += found.low <= 0.5 <= found.high
        naive += alone.low <= 0.5 <= alone.high
    return inside / rounds, naive / rounds


def test_the_clustered_interval_covers_the_truth_where_the_naive_one_does_not() -> None:
    clustered, naive = covered(np.random.default_rng(2), shared=False)
    assert 0.91 <= clustered <= 0.985 and naive < 0.8


def test_subjects_with_items_on_both_sides_make_the_difference_surer() -> None:
    """What sways both sides cancels; without the covariance the interval would cover nearly always."""
    clustered, _ = covered(np.random.default_rng(3), shared=True)
    assert 0.91 <= clustered <= 0.985


def test_where_every_pair_is_won_the_interval_is_that_of_independent_pairs() -> None:
    found = auc([0.0, 0.1, 0.2, 0.3], [1.0, 1.1, 1.2, 1.3, 1.4])
    assert (found.value, found.high) == (1, 1)
    assert found.low == pytest.approx(0.025 ** (1 / 4))
    lost = auc([1.0, 1.1, 1.2], [0.0, 0.1, 0.2])
    assert (lost.value, lost.low) == (0, 0) and lost.high == pytest.approx(1 - 0.025 ** (1 / 3))
    constant = auc([1.0] * 6, [1.0] * 6)
    assert constant.value == 0.5
    ends = stats.beta.ppf([0.025, 0.975], [3, 4], [4, 3])
    assert (constant.low, constant.high) == pytest.approx(tuple(ends))
    alone = auc([1.0, 2.0], [3.0, 4.0], ["a", "a"], ["b", "c"])
    assert (alone.value, alone.low, alone.high) == (1, 0, 1)


@given(costs, costs)
@settings(deadline=None, max_examples=80)
def test_no_threshold_calls_more_items_rightly(members: list[float], nonmembers: list[float]) -> None:
    found = best_threshold(members, nonmembers)

    def balanced(threshold: float) -> float:
        return (np.mean(np.array(members) <= threshold) + np.mean(np.array(nonmembers) > threshold)) / 2

    assert found.balanced_accuracy == pytest.approx(balanced(found.value))
    assert found.balanced_accuracy >= max(balanced(cost) for cost in [-1.0, *members, *nonmembers]) - 1e-12
    assert found.balanced_accuracy >= 0.5


def test_infinite_costs_are_ordered_and_what_is_no_number_is_refused() -> None:
    assert auc([1.0, 2.0], [np.inf, 3.0]).value == 1
    assert best_threshold([1.0, 2.0], [np.inf, np.inf]).balanced_accuracy == 1
    with pytest.raises(DataError, match=r"^item 1 of the non-members costs nan; the model is broken there"):
        auc([1.0], [1.0, np.nan])
    with pytest.raises(DataError, match=r"^there are no members; "):
        auc([], [1.0])
