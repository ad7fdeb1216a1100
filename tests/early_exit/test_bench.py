"""Time on paper: a batch is gone through as classification goes through it, from parts that are timed beforehand."""

from dataclasses import replace

import pytest
import torch
from tests.early_exit.test_classifier import examples, model

from palimpsest.early_exit.bench import Costs, Planned, bench, break_even, costs, predicted
from palimpsest.early_exit.classifier import ExitClassifier
from palimpsest.early_exit.rules import Confident, Fixed

# A row takes 1 ms to enter, 2 a block and .1 an exit; of four rows, what is theirs is twice that.
PARTS = Costs(
    layers=(1, 2, 3),
    rows=(1, 4),
    timed=(1, 2, 3),
    whole=(7.0, 13.0),
    until=((3.1, 5.2), (5.2, 9.4), (7.2, 13.4)),
    leave=0.5,
)


def test_rows_that_leave_make_the_blocks_after_them_cheaper() -> None:
    # Of four rows one leaves after the first block (the rest is a quarter less, and moved), two after the second, one
    # at the end. Three rows cost what lies two thirds of the way from one to four.
    first = 5.2 + 0.5
    second = 2.1 + (4.2 - 2.1) * 2 / 3 + 0.5
    third = 2.0
    assert predicted(PARTS, [1, 3, 2, 2], 4) * 4 == pytest.approx(first + second + third)


def test_rows_are_not_moved_before_a_quarter_of_them_has_left() -> None:
    parts = Costs((1, 2), (1, 8), (1, 2), (2.0, 16.0), ((1.0, 8.0), (2.0, 16.0)), 0.0)
    assert predicted(parts, [1] + [2] * 7, 8) * 8 == pytest.approx(8 + 8)
    assert predicted(parts, [1, 1] + [2] * 6, 8) * 8 == pytest.approx(8 + 6)


def test_each_batch_is_gone_through_by_itself() -> None:
    assert predicted(PARTS, [3] * 8, 4) * 8 == pytest.approx(2 * 13.4)
    assert predicted(PARTS, [3] * 5, 4) * 5 == pytest.approx(13.4 + 7.2)
    assert predicted(PARTS, [1, 2, 3], 1) * 3 == pytest.approx(3.1 + 5.2 + 7.2)


def test_break_even_counts_what_is_asked_on_the_way() -> None:
    assert break_even(PARTS) == pytest.approx({1: 13 / 5.2, 2: 13 / 9.4, 3: 13 / 13.4})


def test_exits_that_were_not_timed_lie_between_those_that_were() -> None:
    some = replace(PARTS, timed=(1, 3), until=(PARTS.until[0], PARTS.until[2]))
    assert some.to(1, 4) == pytest.approx((5.2 + 13.4) / 2) and some.to(1, 2) == pytest.approx((3.8 + 9.2666667) / 2)
    assert (some.to(0, 4), some.to(2, 1)) == (5.2, 7.2)


def test_an_asked_rule_is_asked_and_lets_shares_leave() -> None:
    asked = []

    class Counted(Fixed):
        def leaves(self, exit: int, states: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
            asked.append(len(states))
            return super().leaves(exit, states, logits)

    rule = Counted(0)
    exits, rows = ExitClassifier.of(model(), ("even", "odd")), examples(8).rows
    shares = Planned(rule, (0.5, 1.0))
    assert sorted(exits.classify(rows, rule=shares, batch_size=8).layers.tolist()) == [1] * 4 + [2] * 4
    assert asked == [8, 4]
    assert exits.classify(rows, rule=Planned(rule, ()), batch_size=8).layers.unique().tolist() == [exits.stack.n_layers]


@pytest.mark.parametrize("family", ["gpt2", "bert"])
def test_parts_are_timed_before_anything_is_trained(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("palimpsest.early_exit.bench.IN_A_ROW", 1.0)
    exits = ExitClassifier.of(model(family), ("even", "odd"))
    parts = costs(exits, examples(14).rows, 6)
    assert parts.rows == (1, 2, 3, 6) and parts.layers == parts.timed == exits.layers and parts.leave >= 0
    assert {len(until) for until in parts.until} == {len(parts.whole)} == {4} and min(parts.whole) > 0
    found = bench(exits, examples(14).rows, rule=Confident("entropy", -0.5), batch_size=6, repeats=3)
    assert found.ratio[1] <= found.ratio[0] <= found.ratio[2] and found.predicted_ratio > 0


def test_a_single_exit_has_nothing_to_save(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("palimpsest.early_exit.bench.IN_A_ROW", 1.0)
    network = model()
    exits = ExitClassifier.of(network, ("even", "odd"), [network.network.config.num_hidden_layers])
    parts = costs(exits, examples(4).rows, 2)
    assert parts.leave == 0 and list(break_even(parts)) == [exits.stack.n_layers]
