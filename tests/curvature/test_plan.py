"""The memory plan: what fits, what is parted, what cannot be."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.curvature.dense_fisher import small_model

from palimpsest.curvature.modules import matrices, shared_inputs
from palimpsest.curvature.plan import Kind, memory_plan, needed
from palimpsest.errors import ModelError

MODEL = small_model("llama")
CHOSEN = matrices(MODEL)
OWNERS = shared_inputs(MODEL, CHOSEN)
LARGEST = max(
    needed([m for m in CHOSEN if OWNERS[m.name] == owner], "ekfac", 8, OWNERS) for owner in set(OWNERS.values())
)


def test_what_is_needed_is_the_factors_once_the_moments_and_the_largest_decomposition() -> None:
    """q [8, 8], k and v [4, 8] share one input factor; o [8, 8] has its own."""
    moments, factors, workspace = 64 + 32 + 32 + 64, 64 + 16 + 16 + 64 + 2 * 64, 3 * 64
    layer = [matrix for matrix in CHOSEN if ".0.self_attn" in matrix.name]
    assert needed(layer, "diagonal", 4, OWNERS) == 4 * moments
    assert needed(layer, "kfac", 4, OWNERS) == 4 * (factors + workspace)
    assert needed(layer, "ekfac", 4, OWNERS) == 4 * (factors + workspace + moments)


@given(st.integers(LARGEST, 40 * LARGEST), st.sampled_from(["kfac", "ekfac", "diagonal"]))
def test_groups_hold_every_matrix_once_in_order_and_none_takes_more_than_there_is(room: int, kind: Kind) -> None:
    plan = memory_plan(CHOSEN, OWNERS, kind, 8, room)
    assert [matrix for group in plan.groups for matrix in group] == list(CHOSEN)
    assert max(plan.needs) <= room
    for group in plan.groups:
        names = {matrix.name for matrix in group}
        assert {OWNERS[name] for name in names} <= names, "matrices that share inputs were parted"


def test_all_of_it_is_one_group_where_it_fits_and_the_plan_can_be_read() -> None:
    plan = memory_plan(CHOSEN, OWNERS, "kfac", 4, 10**10)
    assert len(plan.groups) == 1
    assert str(plan).endswith("of the 10.0 GB there are, at once")
    assert "one after the other" in str(memory_plan(CHOSEN, OWNERS, "ekfac", 8, LARGEST))


def test_a_matrix_that_never_fits_is_named() -> None:
    with pytest.raises(
        ModelError, match=r"curvature of model\.layers\.0\.self_attn\.q_proj takes .* there are 0\.0 MB"
    ):
        memory_plan(CHOSEN, OWNERS, "kfac", 4, 100)
