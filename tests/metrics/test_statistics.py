import json
import math
from dataclasses import asdict

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from palimpsest.errors import DataError
from palimpsest.metrics.statistics import (
    clustered_mean,
    clustered_ratio,
    clustered_standard_error,
    equivalence,
    ks_forget_quality,
    minimum_detectable_effect,
    over_seeds,
)


def clustered(draws: np.random.Generator, clusters: int, size: int, mean: float = 0.0) -> tuple[np.ndarray, list[str]]:
    """Items that share half of their variance with their subject."""
    values = mean + draws.normal(size=(clusters, 1)) + draws.normal(size=(clusters, size))
    return values.ravel(), [f"s{number}" for number in range(clusters) for _ in range(size)]


def test_mean_is_over_items_and_counts_both() -> None:
    score = clustered_mean([1, 2, 3, 10], ["a", "a", "a", "b"], seed=0)
    assert score.value == 4.0
    assert (score.n, score.clusters) == (4, 2)
    # Two subjects can be drawn in three ways: a a (mean 2), a b (4), b b (10).
    assert (score.low, score.high) == (2.0, 10.0)


def test_a_ratio_is_of_sums_and_its_interval_that_of_an_independent_bootstrap() -> None:
    draws = np.random.default_rng(4)
    of, clusters = clustered(draws, 25, 6, mean=4.0)
    values = 0.3 * of + draws.normal(size=len(of))
    score = clustered_ratio(values, of, clusters, seed=1, resamples=4000)
    assert score.value == pytest.approx(values.sum() / of.sum()) and (score.n, score.clusters) == (150, 25)
    above, below = values.reshape(25, 6), of.reshape(25, 6)
    drawn = [draws.integers(25, size=25) for _ in range(20_000)]
    ratios = [above[places].sum() / below[places].sum() for places in drawn]
    assert (score.low, score.high) == pytest.approx(np.percentile(ratios, [2.5, 97.5]), abs=0.01)
    same = clustered_ratio(of, of, clusters, seed=1)
    assert (same.value, same.low, same.high) == pytest.approx((1, 1, 1))


def test_two_subjects_give_three_ratios_and_a_denominator_below_0_none() -> None:
    score = clustered_ratio([1, 1, 9], [2, 2, 10], ["a", "a", "b"], seed=0)
    assert (score.value, score.low, score.high) == pytest.approx((11 / 14, 0.5, 0.9))
    alone = clustered_ratio([1.0, 2.0], [4.0, 4.0], ["a", "a"], seed=0)
    assert (alone.low, alone.high, alone.clusters) == (0.375, 0.375, 1)
    with pytest.raises(DataError, match="a share of -1, which is not above 0"):
        clustered_ratio([1.0], [-1.0], ["a"], seed=0)


def test_interval_is_that_of_an_independent_bootstrap_with_more_resamples() -> None:
    draws = np.random.default_rng(3)
    values, clusters = clustered(draws, 25, 6)
    score = clustered_mean(values, clusters, seed=1, resamples=4000)
    by_subject = values.reshape(25, 6)
    means = [by_subject[draws.integers(25, size=25)].mean() for _ in range(20_000)]
    assert [score.low, score.high] == pytest.approx(np.percentile(means, [2.5, 97.5]), abs=0.03)


def test_interval_is_deterministic_by_seed_and_indifferent_to_row_order() -> None:
    values, clusters = clustered(np.random.default_rng(0), 12, 4)
    score = clustered_mean(values, clusters, seed=7)
    assert clustered_mean(values, clusters, seed=7) == score
    assert clustered_mean(values, clusters, seed=8).low != score.low
    order = np.random.default_rng(1).permutation(len(values))
    shuffled = clustered_mean(values[order], [clusters[place] for place in order], seed=7)
    assert asdict(shuffled) == pytest.approx(asdict(score))


def test_interval_covers_the_truth_of_clustered_data_where_a_naive_one_would_not() -> None:
    draws = np.random.default_rng(0)
    covered = naive = 0
    for seed in range(200):
        values, clusters = clustered(draws, 40, 8)
        score = clustered_mean(values, clusters, seed=seed, resamples=400)
        covered += score.low <= 0 <= score.high
        items = clustered_mean(values, [str(place) for place in range(len(values))], seed=seed, resamples=400)
        naive += items.low <= 0 <= items.high
    assert 0.89 <= covered / 200 <= 0.985
    assert naive / 200 < 0.75


def test_one_subject_gives_the_range_of_its_items() -> None:
    score = clustered_mean([0.2, 0.4, 0.9], ["a"] * 3, seed=0)
    assert (score.low, score.value, score.high, score.clusters) == (0.2, 0.5, 0.9, 1)
    assert clustered_mean([0.3], ["a"], seed=0).low == 0.3


@given(st.lists(st.tuples(st.floats(-10, 10), st.sampled_from("abcd")), min_size=1, max_size=12))
@settings(deadline=None, max_examples=40)
def test_every_result_is_ordered_and_is_json(rows: list[tuple[float, str]]) -> None:
    values, clusters = [value for value, _ in rows], [cluster for _, cluster in rows]
    score = clustered_mean(values, clusters, seed=0, resamples=50)
    assert min(values) - 1e-9 <= score.low <= score.high <= max(values) + 1e-9
    found = equivalence(values, [0.5] * len(values), clusters, margin=0.3)
    assert found.low <= found.difference + 1e-9 and found.difference <= found.high + 1e-9
    assert 0 <= found.p <= 1
    json.dumps([asdict(score), asdict(found)], allow_nan=False)


@pytest.mark.parametrize("values", [[], [0.1, float("nan")], [0.1, float("inf")]])
def test_nothing_to_average_or_a_broken_value_is_one_line(values: list[float]) -> None:
    with pytest.raises(DataError) as caught:
        clustered_mean(values, ["a"] * len(values), seed=0)
    assert "\n" not in str(caught.value)
    if values:
        assert "item 1" in str(caught.value)


def test_tost_is_two_one_sided_t_tests_on_subject_means() -> None:
    draws = np.random.default_rng(5)
    values, clusters = clustered(draws, 15, 4, mean=0.2)
    gold = draws.normal(size=len(values)) * 0.1
    found = equivalence(values, gold, clusters, margin=0.7)
    means = (values - gold).reshape(15, 4).mean(1)
    below = stats.ttest_1samp(means, 0.7, alternative="less")
    above = stats.ttest_1samp(means, -0.7, alternative="greater")
    interval = stats.ttest_1samp(means, 0).confidence_interval(0.9)
    assert found.p == pytest.approx(max(below.pvalue, above.pvalue), rel=1e-9)
    assert (found.low, found.high) == pytest.approx((interval.low, interval.high), rel=1e-9)
    assert found.difference == pytest.approx(means.mean())


@given(st.integers(0, 10_000), st.floats(0.05, 2))
@settings(deadline=None, max_examples=30)
def test_equivalent_exactly_when_the_90_percent_interval_lies_within_the_margin(seed: int, margin: float) -> None:
    draws = np.random.default_rng(seed)
    values, clusters = draws.normal(size=20), list(map(str, draws.integers(8, size=20)))
    found = equivalence(values, draws.normal(size=20), clusters, margin=margin)
    assert found.equivalent == (-margin < found.low and found.high < margin) == (found.p < 0.05)


def test_unequal_subjects_have_the_robust_standard_error_by_hand() -> None:
    values, clusters = [1.0, 2.0, 4.0, 0.0, 3.0, 8.0], ["a", "b", "b", "c", "c", "c"]
    # Mean 3: residual totals are -2 (a), 0 (b), 2 (c); 3/2 * (4 + 0 + 4) / 36.
    assert clustered_standard_error(values, clusters) == pytest.approx(np.sqrt(12 / 36))


def test_a_true_difference_of_the_margin_is_called_equivalent_in_at_most_5_percent() -> None:
    draws = np.random.default_rng(11)
    wrong = 0
    for _ in range(500):
        values, clusters = clustered(draws, 12, 3, mean=1.0)
        wrong += equivalence(values, np.zeros(36), clusters, margin=1.0).equivalent
    assert wrong / 500 <= 0.075  # 5 % and two and a half standard errors of 500 draws


def test_a_true_difference_of_none_is_found_equivalent_when_there_is_power() -> None:
    draws = np.random.default_rng(12)
    values, clusters = clustered(draws, 60, 3)
    assert equivalence(values, np.zeros(180), clusters, margin=0.8).equivalent
    assert not equivalence(values, np.zeros(180), clusters, margin=0.01).equivalent


def test_equal_values_are_equivalent_and_a_shift_beyond_the_margin_is_not() -> None:
    same = equivalence([0.5] * 4, [0.5] * 4, list("abcd"), margin=0.1)
    assert same.equivalent and same.p == 0 and same.smallest_effect == 0
    assert equivalence([0.5] * 4, [0.0] * 4, list("abcd"), margin=0.1).p == 1


def test_one_subject_is_never_equivalent() -> None:
    found = equivalence([0.5, 0.5], [0.5, 0.5], ["a", "a"], margin=1.0)
    assert not found.equivalent and found.p == 1
    assert found.smallest_effect > 1e300


@pytest.mark.parametrize(("clusters", "effect"), [(34, 0.4950), (20, 0.66044), (5, 1.68200)])
def test_minimum_detectable_effect_is_that_of_the_noncentral_t(clusters: int, effect: float) -> None:
    found = minimum_detectable_effect(1 / np.sqrt(clusters), clusters)
    assert found == pytest.approx(effect, rel=1e-4)
    critical = stats.t.ppf(0.975, clusters - 1)
    noncentrality = found * np.sqrt(clusters)
    power = stats.nct.sf(critical, clusters - 1, noncentrality) + stats.nct.cdf(-critical, clusters - 1, noncentrality)
    assert power == pytest.approx(0.8, abs=1e-4)


def test_an_effect_of_half_a_deviation_needs_34_subjects() -> None:
    # The textbook example of 80 % power (two-sided 5 %, one-sample t; Cohen 1988).
    needed = next(n for n in range(2, 100) if minimum_detectable_effect(1 / np.sqrt(n), n) <= 0.5)
    assert needed == 34


def test_power_holds_in_simulation_for_two_subjects() -> None:
    effect = minimum_detectable_effect(1 / np.sqrt(2), 2)
    draws = np.random.default_rng(0).normal(effect, 1, size=(20_000, 2))
    assert (stats.ttest_1samp(draws, 0, axis=1).pvalue < 0.05).mean() == pytest.approx(0.8, abs=0.01)


def test_forget_quality_is_the_two_sample_kolmogorov_smirnov_test() -> None:
    draws = np.random.default_rng(0)
    ours, retain = draws.normal(size=50), draws.normal(0.5, size=70)
    found = ks_forget_quality(ours, retain)
    places = np.sort(np.concatenate([ours, retain]))
    gaps = [abs((ours <= place).mean() - (retain <= place).mean()) for place in places]
    assert found.statistic == pytest.approx(max(gaps))
    assert found.p == stats.ks_2samp(ours, retain).pvalue
    assert (found.n, found.n_retain) == (50, 70)
    assert ks_forget_quality(ours, ours).p == 1


@given(st.lists(st.floats(-5, 5), min_size=2, max_size=9))
def test_the_interval_over_seeds_is_students(values: list[float]) -> None:
    middle, low, high = over_seeds(values)
    spread = stats.sem(values)
    assert middle == pytest.approx(sum(values) / len(values), abs=1e-12)
    expected = stats.t.interval(0.95, len(values) - 1, middle, spread) if spread > 0 else (middle, middle)
    assert (low, high) == pytest.approx(expected, abs=1e-9)


@given(st.lists(st.floats(0.01, 100), min_size=2, max_size=9))
def test_a_half_and_a_double_weigh_alike_in_a_ratio(ratios: list[float]) -> None:
    middle, low, high = over_seeds(ratios, ratio=True)
    inverse, inverse_low, inverse_high = over_seeds([1 / ratio for ratio in ratios], ratio=True)
    assert inverse == pytest.approx(1 / middle)
    assert (inverse_low, inverse_high) == pytest.approx((1 / high, 1 / low))
    assert math.prod(ratios) ** (1 / len(ratios)) == pytest.approx(middle)


@pytest.mark.parametrize(
    ("values", "ratio", "middle"), [([], False, None), ([3.0], True, 3.0), ([0.0, 2.0], True, 0.0)]
)
def test_what_gives_no_interval(values, ratio, middle) -> None:
    assert over_seeds(values, ratio=ratio) == (middle, None, None)
