"""Knowledge recovery scores against their definitions in numpy, and what must hold of them on models that know."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.internals.pairs import SOME, pair
from tests.models.tiny_families import LAYERS, tiny_rows

from palimpsest.data.batches import Encoded, collate
from palimpsest.errors import ModelError
from palimpsest.internals.patching import window_plans
from palimpsest.internals.recovery import LossRecovery, minus_sham, patching_recovery
from palimpsest.models.anatomy import Site
from palimpsest.models.hooks import Patch, capture, patched
from palimpsest.models.inputs import forward_inputs
from palimpsest.models.language_model import LanguageModel, evaluating

Floats = np.ndarray[tuple[int, ...], np.dtype[np.float64]]


def logits_of(model: LanguageModel, row: Encoded, patches: dict[Site, Patch] | None = None) -> Floats:
    """[S, V] in float64, those before each target."""
    with evaluating(model) as network, patched(model.anatomy, patches or {}):
        logits = network(**forward_inputs(network, collate([row], [0]))).logits
    return logits[0, row.start - 1 : row.stop - 1].double().numpy()


def log_softmax(logits: Floats) -> Floats:
    return (
        logits
        - np.log(np.exp(logits - logits.max(-1, keepdims=True)).sum(-1, keepdims=True))
        - logits.max(-1, keepdims=True)
    )


def reference(original: Floats, model: Floats, row: Encoded) -> tuple[float, float, float]:
    """One row's three losses."""
    p, q = log_softmax(original), log_softmax(model)
    places, targets = np.arange(row.n_targets), np.array(row.ids[row.start : row.stop])
    return (
        float(np.mean((original - model) ** 2)),
        float(np.mean((np.exp(p) * (p - q)).sum(-1))),
        float(np.mean(p[places, targets] - q[places, targets])),
    )


@pytest.mark.parametrize("family", ["llama", "gpt_neo", "opt", "cohere"])
@pytest.mark.parametrize("positions", ["all", "predicting"])
def test_every_score_is_its_definition_row_by_row(family: str, positions: str) -> None:
    original, unlearned = pair(family)
    rows = tiny_rows(8, 5, 6, 4, 9, 7)
    plans = [*window_plans(original.anatomy, ("coef",), 1), frozenset(original.anatomy.sites("attn", "coef"))]
    found = patching_recovery(original, unlearned, rows, plans, positions=positions, batch_size=2)
    assert len(found) == len(plans)
    for plan, recovery in zip(plans, found, strict=True):
        before, after = [], []
        for row in rows:
            batch = collate([row], [0])
            where = batch.attention.clone()
            if positions == "predicting":
                where = torch.zeros_like(where)
                where[0, row.start - 1 : row.stop - 1] = True
            store = capture(original, batch, list(plan))
            patches = {site: Patch.of(store[site], where) for site in plan}
            goal = logits_of(original, row)
            before.append(reference(goal, logits_of(unlearned, row), row))
            after.append(reference(goal, logits_of(unlearned, row, patches), row))
        for recovered, lost, left in zip(
            (recovery.mse, recovery.kl, recovery.logprob), np.array(before).T, np.array(after).T, strict=True
        ):
            np.testing.assert_allclose(recovered.before, lost, rtol=1e-4, atol=1e-5)
            np.testing.assert_allclose(recovered.after, left, rtol=1e-4, atol=1e-5)
            counts = lost > 1e-6
            assert recovered.excluded == (~counts).sum()
            if not counts.any():  # a random model may like every answer better than the other does
                assert recovered.mean is None and recovered.of_sums is None
                continue
            # 1 less a ratio of fp32 losses is known to some 1e-6, however small it is.
            mean = np.mean(1 - left[counts] / lost[counts])
            np.testing.assert_allclose(recovered.mean, mean, rtol=1e-3, atol=1e-5)
            ratio_of_sums = 1 - left[counts].sum() / lost[counts].sum()
            np.testing.assert_allclose(recovered.of_sums, ratio_of_sums, rtol=1e-3, atol=1e-4)
        scores = (recovery.krs, recovery.krs_of_sums, recovery.krs_kl, recovery.lpr)
        assert scores == (recovery.mse.mean, recovery.mse.of_sums, recovery.kl.of_sums, recovery.logprob.of_sums)


def test_log_probability_recovery_is_gained_over_lost() -> None:
    # Three rows whose answers have these log-probabilities, of original, unlearned and patched model.
    original, unlearned, after = torch.tensor([[-0.1, -0.2, -0.3], [-4.0, -3.0, -0.1], [-2.0, -0.2, -5.0]])
    recovered = LossRecovery(original - unlearned, original - after)
    assert recovered.excluded == 1  # the unlearned model says the third better than the original
    assert recovered.of_sums == pytest.approx((2.0 + 2.8) / (3.9 + 2.8))
    assert recovered.mean == pytest.approx((2.0 / 3.9 + 1) / 2)


@settings(deadline=None)
@given(
    before=st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=9),
    shares=st.lists(st.floats(-3, 1), min_size=9, max_size=9),
    known=st.integers(0, 3),
)
def test_rows_average_to_the_scores_and_those_that_lost_nothing_change_neither(
    before: list[float], shares: list[float], known: int
) -> None:
    lost = torch.tensor(before, dtype=torch.float64)
    left = lost * (1 - torch.tensor(shares[: len(before)], dtype=torch.float64))
    alone = LossRecovery(lost, left)
    assert alone.mean == pytest.approx(float(alone.by_row.mean()), rel=1e-6, abs=1e-9)
    assert alone.of_sums == pytest.approx(float(1 - left.sum() / lost.sum()), rel=1e-6, abs=1e-9)
    nothing = torch.tensor([0.0, 1e-7, -1.0])[:known].double()
    together = LossRecovery(torch.cat([nothing, lost]), torch.cat([torch.full_like(nothing, 5.0), left]))
    assert together.excluded == known and together.counted.sum() == len(before)
    assert together.mean == pytest.approx(alone.mean) and together.of_sums == pytest.approx(alone.of_sums)
    assert together.by_row[:known].isnan().all() and together.weighted_by_row[:known].isnan().all()
    assert torch.equal(together.by_row[known:], alone.by_row)


def test_a_higher_bound_excludes_more() -> None:
    lost, left = torch.tensor([0.1, 1.0, 2.0]), torch.tensor([5.0, 0.5, 1.0])
    assert LossRecovery(lost, left).mean == pytest.approx((-49 + 0.5 + 0.5) / 3)
    bounded = LossRecovery(lost, left, nothing=0.5)
    assert bounded.mean == pytest.approx(0.5) and bounded.excluded == 1


def test_where_nothing_was_lost_there_is_no_score() -> None:
    recovered = LossRecovery(torch.zeros(3), torch.ones(3))
    assert recovered.mean is None and recovered.of_sums is None and recovered.excluded == 3
    assert recovered.by_row.isnan().all()


def test_minus_sham_is_a_difference_of_rows_that_both_lost() -> None:
    unlearned = LossRecovery(torch.tensor([4.0, 4.0, 0.0, 2.0]), torch.tensor([1.0, 2.0, 0.0, 3.0]))
    sham = LossRecovery(torch.tensor([2.0, 0.0, 1.0, 1.0]), torch.tensor([1.0, 0.0, 1.0, 1.0]))
    torch.testing.assert_close(
        minus_sham(unlearned, sham), torch.tensor([0.25, math.nan, math.nan, -0.5]), equal_nan=True
    )


# What must hold whatever the weights are.


@pytest.mark.parametrize("family", SOME)
def test_an_original_that_stands_for_the_unlearned_model_has_nothing_to_recover(family: str) -> None:
    original, _ = pair(family)
    (recovery,) = patching_recovery(original, original.copy(), tiny_rows(6, 5), [frozenset([Site("attn", 0)])])
    for recovered in (recovery.mse, recovery.kl, recovery.logprob):
        assert recovered.excluded == 2 and recovered.mean is None
        assert (recovered.after.abs() <= 1e-6).all()


@pytest.mark.parametrize("family", SOME)
def test_the_last_residual_recovers_everything_where_norm_and_readout_are_shared(family: str) -> None:
    original, unlearned = pair(family)
    for part in ("final_norm", "unembedding"):
        getattr(unlearned.anatomy, part).load_state_dict(getattr(original.anatomy, part).state_dict())
    last = frozenset([Site("resid", LAYERS - 1)])
    for positions in ("all", "predicting"):
        (recovery,) = patching_recovery(original, unlearned, tiny_rows(6, 5), [last], positions=positions)
        assert recovery.mse.excluded == 0
        for score in (recovery.krs, recovery.krs_of_sums, recovery.krs_kl):
            assert score == pytest.approx(1, abs=1e-5)
        np.testing.assert_allclose(recovery.logprob.after, 0, atol=1e-5)


@settings(deadline=None, max_examples=8)
@given(size=st.integers(1, 6), order=st.permutations(range(5)))
def test_neither_batches_nor_the_order_of_rows_move_a_score(size: int, order: list[int]) -> None:
    original, unlearned = pair("llama")
    rows = tiny_rows(8, 5, 6, 3, 9)
    plans = window_plans(original.anatomy, ("attn", "coef"), 3)
    whole = patching_recovery(original, unlearned, rows, plans)
    parts = patching_recovery(original, unlearned, [rows[place] for place in order], plans, batch_size=size)
    for one, other in zip(whole, parts, strict=True):
        for name in ("mse", "kl", "logprob"):
            for field in ("before", "after"):
                expected = getattr(getattr(one, name), field)[list(order)]
                torch.testing.assert_close(getattr(getattr(other, name), field), expected, rtol=1e-4, atol=1e-5)


def test_progress_counts_every_plan_of_every_batch() -> None:
    original, unlearned = pair("llama")
    plans, seen = window_plans(original.anatomy, ("attn",), 1), []
    patching_recovery(
        original, unlearned, tiny_rows(6, 5, 4), plans, batch_size=2, report=lambda *told: seen.append(told[:2])
    )
    assert seen == [(done, 6) for done in range(1, 7)]


def test_another_architecture_is_refused() -> None:
    with pytest.raises(ModelError, match="give models of one architecture"):
        patching_recovery(pair("gpt2")[0], pair("llama")[0], tiny_rows(4), [frozenset([Site("attn", 0)])])
