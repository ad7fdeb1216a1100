"""Answers as the layers read them, the candidate attack and the erasure ratio: made up, and on the suite's organism."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.conftest import Organism

from palimpsest.data.batches import encode
from palimpsest.errors import ModelError
from palimpsest.lens.erasure import AnswerReading, erasure_ratio, found_by_candidates, read_answers
from palimpsest.lens.fit import fit
from palimpsest.lens.lens import Lens
from palimpsest.lens.trajectory import trajectories
from palimpsest.metrics.likelihood import answer_probability


def ranked(*layers: tuple[int, int]) -> AnswerReading:
    """An answer of two tokens with their ranks at each layer."""
    return AnswerReading(torch.zeros(len(layers), 2), torch.tensor(layers))


@pytest.mark.parametrize(("per_layer", "found"), [(1, False), (2, True), (60, True)])
def test_every_token_must_be_among_the_candidates_of_some_layer(per_layer: int, found: bool) -> None:
    assert found_by_candidates([ranked((1, 40), (30, 2), (50, 60))], per_layer).tolist() == [found]


def test_one_token_out_of_reach_is_enough() -> None:
    assert found_by_candidates([ranked((1, 40), (1, 30)), ranked((1, 1), (9, 9))], 5).tolist() == [False, True]


def test_answers_are_read_where_a_trajectory_reads_them(trained: Organism) -> None:
    rows = encode(trained.request.forget[:7], trained.full.tokenizer)
    lens = fit(trained.full, trained.request.retain, kind="ridge", quiet=True)
    read = read_answers(lens, trained.gold, rows, fitted_to=trained.full, batch_size=3)
    whole = trajectories(lens, trained.gold, rows, fitted_to=trained.full)
    for row, reading, trajectory in zip(rows, read, whole, strict=True):
        at = slice(row.start - 1, row.stop - 1)
        torch.testing.assert_close(reading.logprobs, trajectory.statistics["logprob"][:, at])
        assert torch.equal(reading.ranks, trajectory.statistics["rank"][:, at])


def test_the_last_row_is_the_models_own_answer_and_batches_change_nothing(trained: Organism) -> None:
    records = trained.request.forget[:9]
    rows, lens = encode(records, trained.full.tokenizer), Lens.logit(trained.full)
    read, again = (read_answers(lens, trained.full, rows, batch_size=size) for size in (1, 4))
    own = torch.stack([reading.probability[-1] for reading in read])
    torch.testing.assert_close(own, answer_probability(trained.full, records))
    for one, other in zip(read, again, strict=True):
        torch.testing.assert_close(one.logprobs, other.logprobs)


def test_another_models_lens_is_refused_unless_its_model_is_named(trained: Organism) -> None:
    with pytest.raises(ModelError, match="another unembedding"):
        read_answers(Lens.logit(trained.full), trained.gold, encode(trained.request.forget[:1], trained.full.tokenizer))


def layers(*values: float) -> AnswerReading:
    logprobs = torch.tensor(values)[:, None].expand(-1, 3)
    return AnswerReading(logprobs, torch.ones(logprobs.shape))


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


def test_the_organisms_answers_are_found_in_full_and_not_in_gold(trained: Organism) -> None:
    rows = encode(trained.request.forget, trained.full.tokenizer)
    full, gold = (read_answers(Lens.logit(model), model, rows) for model in (trained.full, trained.gold))
    reached = [found_by_candidates(read, 1).double().mean().item() for read in (full, gold)]
    assert reached[0] > 0.9 and reached[1] < 0.7
    ratios = [erasure_ratio(one, other, other) for one, other in zip(full, gold, strict=True)]
    assert all(ratio is None or ratio == pytest.approx(1) for ratio in ratios) and any(ratios)
