"""Trajectories against scipy over whole distributions, and depths against a plain loop."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.spatial.distance import jensenshannon
from scipy.special import log_softmax
from scipy.stats import entropy, rankdata
from tests.lens.test_lens import random_lens
from tests.models.tiny_families import VOCABULARY, tiny_model, tiny_rows

from palimpsest.data.batches import Encoded
from palimpsest.errors import ModelError
from palimpsest.lens import trajectory as trajectory_module
from palimpsest.lens.depth import answer_depth, chance_of_a_hit
from palimpsest.lens.hidden import read_layers
from palimpsest.lens.lens import Lens
from palimpsest.lens.trajectory import Trajectory, first_of_last_run, trajectories


@pytest.mark.parametrize("family", ["llama", "gemma2", "gptj"])
def test_statistics_are_scipys(family: str) -> None:
    model, rows = tiny_model(family), tiny_rows(6, 4)
    lens = random_lens(model)
    for row, found in zip(rows, trajectories(lens, model, rows, top_k=3), strict=True):
        hidden = next(read_layers(model, [row]))
        readout = lens.readout(model)
        logits = [readout.logits(readout.z(lens.translate(h, n))).numpy() for n, h in enumerate(hidden.layers)]
        log_q = log_softmax(np.stack(logits).astype(np.float64), -1)
        q = np.exp(log_q)
        for layer in range(lens.n_layers + 1):
            for place in range(len(row.ids)):
                mine, model_s = q[layer, place], q[-1, place]
                expected = {
                    "entropy": entropy(mine),
                    "kl": entropy(model_s, mine),
                    "js": jensenshannon(mine, model_s) ** 2,
                    "tv": 0.5 * np.abs(mine - model_s).sum(),
                }
                if place + 1 < len(row.ids):
                    target = row.ids[place + 1]
                    expected |= {"logprob": log_q[layer, place, target], "rank": rankdata(-mine, "min")[target]}
                for name, value in expected.items():
                    assert found.statistics[name][layer, place].item() == pytest.approx(value, rel=1e-3, abs=2e-5)
                likeliest = np.argsort(-mine)[:3]
                assert found.top_ids[layer, place].tolist() == likeliest.tolist()
                assert np.allclose(found.top_logprobs[layer, place], log_q[layer, place, likeliest], atol=1e-4)


def test_the_last_row_is_the_model_and_the_last_column_has_no_target() -> None:
    model, rows = tiny_model("llama"), tiny_rows(6)
    (found,) = trajectories(random_lens(model), model, rows)
    for name in ("kl", "js", "tv"):
        assert found.statistics[name][-1].abs().max() < 1e-6
    assert found.statistics["js"].max() <= math.log(2) + 1e-6 and found.statistics["tv"].max() <= 1 + 1e-6
    assert found.statistics["logprob"][:, -1].isnan().all() and (found.statistics["rank"][:, -1] == 0).all()


def test_batches_pieces_and_other_rows_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model, rows = tiny_model("llama"), tiny_rows(7, 3, 5, 1)
    lens = random_lens(model)
    together = trajectories(lens, model, rows)
    monkeypatch.setattr(trajectory_module, "SAMPLED", 2)
    for row, expected in zip(rows, together, strict=True):
        (alone,) = trajectories(lens, model, [row], batch_size=1)
        assert torch.equal(alone.top_ids, expected.top_ids)
        for name, values in expected.statistics.items():
            torch.testing.assert_close(alone.statistics[name], values, rtol=1e-4, atol=1e-5, equal_nan=True)


def test_differences_are_what_each_block_changes() -> None:
    model = tiny_model("llama")
    (found,) = trajectories(Lens.logit(model), model, tiny_rows(5))
    assert torch.allclose(
        found.statistics["entropy"][0] + found.differences("entropy").sum(0), found.statistics["entropy"][-1], atol=1e-5
    )


def test_no_more_tokens_are_kept_than_there_are() -> None:
    model = tiny_model("llama")
    (found,) = trajectories(Lens.logit(model), model, tiny_rows(3), top_k=1000)
    assert found.top_ids.shape[-1] == VOCABULARY


@given(st.lists(st.lists(st.booleans(), min_size=5, max_size=5), min_size=1, max_size=6))
def test_the_last_run_by_a_plain_loop(columns: list[list[bool]]) -> None:
    found = first_of_last_run(torch.tensor(columns).T)
    for column, place in zip(columns, found.tolist(), strict=True):
        expected = len(column)
        while expected > 0 and column[expected - 1]:
            expected -= 1
        assert place == expected


def depth_of(*answers: str) -> tuple:
    """Depths of an answer `ab` (ids 1, 2) that follows one prompt token, from what each layer says (? is neither)."""
    ids = {"a": 1, "b": 2, "?": 3, "!": 4}
    predicted = torch.tensor([[ids[letter] for letter in answer] + [0] for answer in answers])
    trajectory = Trajectory(torch.tensor([9, 1, 2]), predicted[..., None], predicted[..., None], {})
    found = answer_depth(trajectory, Encoded((9, 1, 2), 1, 3))
    return tuple((d.first_hit, d.memorised, d.predicted, d.suppressed) for d in (found.answer, *found.tokens))


def test_a_fact_that_is_decided_on_the_way() -> None:
    answer, first, second = depth_of("??", "a?", "ab", "ab")
    assert (answer, first, second) == ((2, 2, 2, None), (1, 1, 1, None), (2, 2, 2, None))


def test_a_fact_that_is_known_and_then_suppressed() -> None:
    answer, first, second = depth_of("??", "ab", "ab", "a?", "!?")
    assert answer == (1, None, 4, 3) and first == (1, None, 4, 4) and second == (1, None, 3, 3)


def test_a_fact_that_is_nowhere_and_one_that_comes_at_the_end() -> None:
    assert depth_of("??", "!?", "!?")[0] == (None, None, 1, None)
    assert depth_of("??", "??", "ab")[0] == (2, 2, 2, None)


def test_a_hit_that_does_not_last_is_a_first_hit_alone() -> None:
    assert depth_of("ab", "??", "ab")[0] == (0, 2, 2, None)


def test_chance_grows_with_layers_and_falls_with_candidates() -> None:
    """The digest's toy: 32 candidates, 6 layers, 17 %."""
    assert chance_of_a_hit(32, 6) == pytest.approx(0.1735, abs=1e-4)
    rng = np.random.default_rng(0)
    assert (rng.integers(32, size=(20000, 6)) == 0).any(1).mean() == pytest.approx(chance_of_a_hit(32, 6), abs=0.01)


def test_an_unlearned_model_is_read_by_the_originals_readout_and_predicts_by_its_own() -> None:
    original, later, rows = tiny_model("llama"), tiny_model("llama"), tiny_rows(5)
    with torch.no_grad():
        later.anatomy.unembedding.weight.copy_(later.anatomy.unembedding.weight.flip(0))
    lens = random_lens(original)
    with pytest.raises(ModelError, match="made for another unembedding"):
        trajectories(lens, later, rows)
    (before,) = trajectories(lens, original, rows)
    (after,) = trajectories(lens, later, rows, fitted_to=original)
    assert torch.equal(after.top_ids[:-1], before.top_ids[:-1])
    assert torch.equal(after.predicted[-1], VOCABULARY - 1 - before.predicted[-1])
