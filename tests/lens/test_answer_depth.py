"""Depths of many answers at once, against the definitions spelt out layer by layer."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from palimpsest.lens.depth import _depth, depth_table

LAYERS = 4
answers = st.lists(st.lists(st.integers(0, 2), min_size=LAYERS, max_size=LAYERS), min_size=1, max_size=8)


@given(answers)
def test_a_table_has_what_each_answer_has_alone(said: list[list[int]]) -> None:
    """A class is right if it is 0; layers are called 3, 6, 9, 12."""
    classes, layers = torch.tensor(said), (3, 6, 9, 12)
    right, same = classes == 0, classes == classes[:, -1:]
    table = depth_table(right, same, layers)
    for row in range(len(said)):
        alone = _depth(right[row], same[row])
        for name in ("first_hit", "memorised", "predicted", "suppressed"):
            place = getattr(alone, name)
            expected = 0 if place is None else [*layers, 13][place]
            assert int(getattr(table, name)[row]) == expected, name


def test_what_was_right_and_is_wrong_at_the_end_was_suppressed() -> None:
    right = torch.tensor([[0, 1, 1, 0], [0, 0, 0, 0], [1, 0, 1, 1], [1, 1, 1, 1]]).bool()
    table = depth_table(right, right, (1, 2, 3, 4))
    assert table.first_hit.tolist() == [2, 0, 1, 1]
    assert table.memorised.tolist() == [0, 0, 3, 1]
    assert table.suppressed.tolist() == [4, 0, 0, 0]
