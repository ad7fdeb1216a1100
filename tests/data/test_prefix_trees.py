"""Prefix trees against the set of all beginnings, which is what they claim to hold once each."""

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from palimpsest.data.batches import Encoded, collate
from palimpsest.data.prefix_trees import PADDED, Branching, end_to_end, forests, prefix_trees

ALWAYS, NEVER = Branching(widest=10**6, token_cost=10**6), Branching(widest=0, token_cost=10**6)


@st.composite
def rows(draw: st.DrawFn) -> list[Encoded]:
    """Rows over three tokens, so that many begin alike; targets are any stretch after the first token."""
    made = []
    for ids in draw(st.lists(st.lists(st.integers(0, 2), min_size=2, max_size=9), min_size=1, max_size=12)):
        start = draw(st.integers(1, len(ids) - 1))
        made.append(Encoded(tuple(ids), start, draw(st.integers(start + 1, len(ids)))))
    return made


def beginnings(encoded: list[Encoded]) -> set[tuple[int, ...]]:
    return {row.ids[:length] for row in encoded for length in range(1, row.stop)}


@given(rows(), st.sampled_from([ALWAYS, NEVER, Branching(6, 10**6), Branching(10**6, 2)]))
@settings(deadline=None)
def test_a_rows_path_spells_it_and_no_beginning_stands_in_a_tree_twice(
    encoded: list[Encoded], branching: Branching
) -> None:
    trees = prefix_trees(encoded, branching)
    assert sorted(place for tree in trees for place in tree.paths) == list(range(len(encoded)))
    for tree in trees:
        assert len(tree.ids) == len(beginnings([encoded[place] for place in tree.paths]))
        assert len(tree.ids) <= branching.widest or not tree.branches
        for place, path in tree.paths.items():
            assert tuple(tree.ids[token] for token in path) == encoded[place].ids[: encoded[place].stop - 1]
            assert [tree.positions[token] for token in path] == list(range(len(path)))


@given(rows())
@settings(deadline=None)
def test_where_branches_cost_nothing_rows_of_one_first_token_are_one_tree(encoded: list[Encoded]) -> None:
    trees = prefix_trees(encoded, ALWAYS)
    assert len(trees) == len({row.ids[0] for row in encoded})
    assert sum(len(tree.ids) for tree in trees) == len(beginnings(encoded))


LONG_AND_BRANCHED = [Encoded((0,) * 9, 1, 9), Encoded((1, 0, 0), 1, 3), Encoded((1, 1, 0), 1, 3)]


@given(rows(), st.integers(1, 20), st.sampled_from([ALWAYS, NEVER]))
@example(LONG_AND_BRANCHED, 20, ALWAYS)
@settings(deadline=None)
def test_a_token_sees_its_own_beginning_and_predicts_its_rows_targets(
    encoded: list[Encoded], batch_size: int, branching: Branching
) -> None:
    targets: dict[int, list[int]] = {place: [] for place in range(len(encoded))}
    for forest in forests(encoded, branching, batch_size=batch_size):
        assert len(forest.rows.unique()) <= batch_size or len(forest.ids) == 1
        assert forest.ids.numel() <= PADDED * int((forest.ends > 0).sum())
        assert len(forest.predicting.unique()) == len(forest.predicting)
        visible, width = forest.visible(), forest.ids.shape[1]
        assert bool(visible.diagonal(dim1=1, dim2=2).all())
        if not forest.branches:
            real = forest.ends > 0
            causal = torch.ones(width, width).tril().bool() & real[:, None, :]
            assert torch.equal(visible[real], causal[real])
        before = None
        for row, target, by in zip(
            forest.rows.tolist(), forest.targets.tolist(), forest.predicted_by.tolist(), strict=True
        ):
            if row != before:
                reached, before = encoded[row].start, row
            line, token = divmod(int(forest.predicting[by]), width)
            seen = visible[line, token].nonzero()[:, 0]
            assert tuple(forest.ids[line, seen].tolist()) == encoded[row].ids[:reached]
            assert forest.positions[line, seen].tolist() == list(range(reached))
            targets[row].append(target)
            reached += 1
    assert all(
        tuple(found) == encoded[row].ids[encoded[row].start : encoded[row].stop] for row, found in targets.items()
    )


@given(rows(), st.sampled_from(["left", "right"]))
@settings(deadline=None)
def test_end_to_end_each_target_is_predicted_from_its_own_rows_beginning(encoded: list[Encoded], side: str) -> None:
    encoded = [Encoded(row.ids[: row.stop], row.start, row.stop) for row in encoded]
    line = end_to_end(collate(encoded, range(len(encoded)), side=side))
    assert line.ids.shape == (1, sum(len(row.ids) - 1 for row in encoded))
    visible = line.visible()[0]
    expected = [(row, place) for row, one in enumerate(encoded) for place in range(one.start, one.stop)]
    assert line.rows.tolist() == [row for row, _ in expected]
    assert line.targets.tolist() == [encoded[row].ids[place] for row, place in expected]
    for (row, place), by in zip(expected, line.predicted_by.tolist(), strict=True):
        seen = visible[line.predicting[by]].nonzero()[:, 0]
        assert tuple(line.ids[0, seen].tolist()) == encoded[row].ids[:place]
        assert line.positions[0, seen].tolist() == list(range(place))


@pytest.mark.parametrize(("token_cost", "n_trees"), [(0, 3), (6, 3), (7, 2), (15, 2), (16, 1)])
def test_a_branch_must_save_more_than_it_costs(token_cost: int, n_trees: int) -> None:
    """Each row reads five tokens and shares two: 25 comparisons by itself, 64 in a tree of two rows, 121 of three."""
    encoded = [Encoded((1, 2, *[row] * 4), 2, 6) for row in (3, 4, 5)]
    expected = {1: 11**2, 2: 8**2 + 5**2, 3: 3 * 5**2}[n_trees]
    trees = prefix_trees(encoded, Branching(100, token_cost))
    assert len(trees) == n_trees and sum(len(tree.ids) ** 2 for tree in trees) == expected


def test_rows_that_repeat_or_continue_one_another_never_branch() -> None:
    encoded = [Encoded(tuple(range(length)), 1, length) for length in (7, 3, 5)]
    letters = [Encoded((9, 8, letter), 2, 3) for letter in (4, 5, 6)]
    trees = prefix_trees([*encoded, *letters], Branching(0, 0))
    assert [tree.ids for tree in trees] == [[0, 1, 2, 3, 4, 5], [9, 8]]
    assert not any(tree.branches for tree in trees)
