"""The forget matrix: ratios at their fixed points, variance shares whose cause is known, order, correlation."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from palimpsest.studies.forget_matrix import (
    clustered_order,
    forget_ratio,
    rank_correlation,
    spearman,
    variance_shares,
)


def test_nothing_lost_is_0_chance_is_1_and_the_mirror_image_is_1_of_flipped() -> None:
    assert forget_ratio([0.9, 0.8], [0.9, 0.5]).tolist() == pytest.approx([0.0, 1.0])
    assert forget_ratio(0.9, 0.1, flipped=True) == pytest.approx(1.0)
    assert forget_ratio(0.9, 0.1) == pytest.approx(2.0)


def test_columns_alone_explain_a_matrix_made_of_columns() -> None:
    draw = np.random.default_rng(0)
    column, row, noise = draw.normal(size=12), draw.normal(size=(12, 1)), 0.01 * draw.normal(size=(12, 12))
    made = column + 0 * row + noise
    np.fill_diagonal(made, 9.0)  # the own task is not looked at
    shares = variance_shares(made)
    assert shares.evaluated > 0.95 and shares.forgotten < 0.01
    turned = variance_shares(made.T)
    assert (turned.evaluated, turned.forgotten) == pytest.approx((shares.forgotten, shares.evaluated), abs=1e-9)


def test_shares_are_those_of_a_two_way_regression() -> None:
    draw = np.random.default_rng(1)
    matrix = draw.normal(size=8) + 0.5 * draw.normal(size=(8, 1)) + 0.3 * draw.normal(size=(8, 8))
    cells = [(i, j, matrix[i, j]) for i in range(8) for j in range(8) if i != j]
    y = np.array([value for *_, value in cells])

    def r2(*sides: int) -> float:
        x = np.array([[1.0] + [float(cell[side] == level) for side in sides for level in range(7)] for cell in cells])
        return float(1 - np.linalg.lstsq(x, y, rcond=None)[1][0] / ((y - y.mean()) ** 2).sum())

    shares = variance_shares(matrix)
    assert shares.evaluated == pytest.approx(r2(0, 1) - r2(0)) and shares.forgotten == pytest.approx(r2(0, 1) - r2(1))


def test_like_rows_stand_together() -> None:
    profiles = np.array([[0.0, 0], [5, 5], [0.1, 0], [5, 5.1], [0, 0.2]])
    order = clustered_order(profiles)
    assert {*order[:2]} in ({1, 3}, {0, 2}, {2, 4}, {0, 4}) and sorted(order) == [0, 1, 2, 3, 4]
    assert abs(order.index(1) - order.index(3)) == 1


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), min_size=3, max_size=20))
def test_spearman_is_scipys_and_0_where_nothing_is_ordered(pairs: list[tuple[int, int]]) -> None:
    x, y = [a for a, _ in pairs], [b for _, b in pairs]
    wanted = 0.0 if len(set(x)) < 2 or len(set(y)) < 2 else stats.spearmanr(x, y).statistic
    assert spearman(x, y) == pytest.approx(wanted, abs=1e-12)


def test_permutations_find_an_order_and_none_in_noise() -> None:
    draw = np.random.default_rng(2)
    x = draw.normal(size=15)
    rho, p = rank_correlation(x.tolist(), (-x + 0.1 * draw.normal(size=15)).tolist())
    assert rho < -0.9 and p < 0.001
    assert rank_correlation(x.tolist(), draw.normal(size=15).tolist())[1] > 0.05
    assert rank_correlation([1, 2, 3], [1, 2, 3])[1] == pytest.approx(1 / 3)  # both of six orders that are as extreme
