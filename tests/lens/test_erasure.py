"""The candidate attack and the erasure ratio on made-up ranks and probabilities, and on the suite's organism."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from palimpsest.data.batches import Encoded, encode
from palimpsest.lens.erasure import answer_statistic, erasure_ratio, found_by_candidates
from palimpsest.lens.lens import Lens
from palimpsest.lens.trajectory import Trajectory, trajectories

ROW = Encoded((5, 6, 7, 8), 2, 4)


def ranked(*layers: tuple[int, int]) -> Trajectory:
    """An answer of two tokens after two others, with their ranks at each layer."""
    ranks = torch.tensor([[9, first, second, 0] for first, second in layers])
    return Trajectory(torch.tensor(ROW.ids), ranks[..., None], ranks[..., None], {"rank": ranks})


@pytest.mark.parametrize(("budget", "found"), [(3, False), (5, False), (6, True), (60, True)])
def test_every_token_must_be_among_the_candidates_of_some_layer(budget: int, found: bool) -> None:
    trajectory = ranked((1, 40), (30, 2), (50, 60))
    assert found_by_candidates([trajectory], [ROW], budget).tolist() == [found]


def test_a_statistic_is_read_where_the_answer_is_predicted() -> None:
    assert answer_statistic(ranked((1, 40), (30, 2)), ROW, "rank").tolist() == [[1, 40], [30, 2]]


def layers(*values: float) -> torch.Tensor:
    return torch.tensor(values)[:, None].expand(-1, 3)


def test_layers_weigh_by_what_there_was_to_lose() -> None:
    original, gold = layers(-1.0, -1.0, -1.0), layers(-1.01, -2.0, -4.0)
    assert erasure_ratio(original, gold, original) == 0
    assert erasure_ratio(original, gold, gold) == pytest.approx(1)
    # The first layer does not count, the second lost half of 1, the last all of 3.
    assert erasure_ratio(original, gold, layers(-9, -1.5, -4.0)) == pytest.approx(3.5 / 4)
    assert erasure_ratio(original, original, gold) is None


@given(*(st.lists(st.floats(-9, 0), min_size=4, max_size=4) for _ in range(3)))
def test_it_is_a_share(original: list[float], gold: list[float], unlearned: list[float]) -> None:
    found = erasure_ratio(layers(*original), layers(*gold), layers(*unlearned))
    assert found is None or 0 <= found <= 1 + 1e-9


def test_the_organisms_answers_are_found_in_full_and_not_in_gold(trained) -> None:
    rows = encode(trained.request.forget, trained.full.tokenizer)
    read = [trajectories(Lens.logit(model), model, rows) for model in (trained.full, trained.gold)]
    full, gold = (found_by_candidates(found, rows, 6).double().mean().item() for found in read)
    assert full > 0.9 and gold < 0.7 < full
    ratios = [
        erasure_ratio(*(answer_statistic(part, row, "logprob") for part in (one, other, other)))
        for one, other, row in zip(*read, rows, strict=True)
    ]
    assert all(ratio is None or ratio == pytest.approx(1) for ratio in ratios) and any(ratios)
