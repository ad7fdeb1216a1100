"""The Unlearning Depth Score against its definition in numpy, and what must hold of its drops."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.internals.pairs import SOME, pair
from tests.models.tiny_families import FAMILIES, LAYERS, tiny_model, tiny_rows
from torch import Tensor

from palimpsest.data.batches import Encoded, collate, encode
from palimpsest.data.records import QA
from palimpsest.errors import DataError, ModelError
from palimpsest.internals.depth import UnlearningDepth, fact_rows, logprob_drops, unlearning_depth
from palimpsest.metrics.likelihood import target_nll
from palimpsest.models.inputs import forward_inputs
from palimpsest.models.language_model import LanguageModel, evaluating


def released_formula(gold_drops: Tensor, drops: Tensor, tau: float = 0.05) -> tuple[float | None, list[float]]:
    """UDS as the paper has it, row by row in plain Python: the mean, and the rows that count."""
    scores = []
    for of_gold, of_model in zip(gold_drops.tolist(), drops.tolist(), strict=True):
        encoding = [layer for layer, drop in enumerate(of_gold) if drop > tau]
        if encoding:
            ratio = {layer: min(max(of_model[layer] / of_gold[layer], 0.0), 1.0) for layer in encoding}
            weight = sum(of_gold[layer] for layer in encoding)
            scores.append(sum(of_gold[layer] * ratio[layer] for layer in encoding) / weight)
    return (float(np.mean(scores)) if scores else None), scores


def drops_by_hand(source: LanguageModel, full: LanguageModel, row: Encoded) -> list[float]:
    """One row's drops: each block's output replaced by a hook of our own, the log-probabilities in float64."""
    batch = collate([row], [0])
    states: list[Tensor] = []

    def hidden(output: object) -> Tensor:
        return output[0] if isinstance(output, tuple) else output

    def logprob() -> float:
        with evaluating(full) as network:
            logits = network(**forward_inputs(network, batch)).logits[0].double()
        at = logits.log_softmax(-1)[row.start - 1 : row.stop - 1]
        return float(at.gather(1, batch.ids[0, row.start : row.stop, None]).mean())

    handles = [
        block.register_forward_hook(lambda _, __, output: states.append(hidden(output).clone()))
        for block in source.anatomy.blocks
    ]
    with evaluating(source) as network:
        network(**forward_inputs(network, batch))
    for handle in handles:
        handle.remove()
    own, found = logprob(), []
    for layer, block in enumerate(full.anatomy.blocks):

        def put(_: object, __: object, output: object, state: Tensor = states[layer]) -> object:
            changed = hidden(output).clone()
            changed[0, row.start - 1 : row.stop - 1] = state[0, row.start - 1 : row.stop - 1]
            return (changed, *output[1:]) if isinstance(output, tuple) else changed

        handle = block.register_forward_hook(put)
        found.append(own - logprob())
        handle.remove()
    return found


@pytest.mark.parametrize("family", SOME)
def test_drops_are_what_hooks_one_at_a_time_give(family: str) -> None:
    source, full = pair(family)
    rows = tiny_rows(7, 4, 9, 5)
    found = logprob_drops(source, full, rows, batch_size=3)
    expected = [drops_by_hand(source, full, row) for row in rows]
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=2e-5)
    assert found.dtype == torch.float32 and found.shape == (4, LAYERS)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_models_own_states_cost_it_nothing_at_any_layer(family: str) -> None:
    model, _ = pair(family)
    assert torch.equal(logprob_drops(model, model.copy(), tiny_rows(7, 4, 5)), torch.zeros(3, LAYERS))


def test_the_last_layer_is_patched_before_the_final_norm() -> None:
    source, full = pair("llama")
    for part in ("final_norm", "unembedding"):
        getattr(full.anatomy, part).load_state_dict(getattr(source.anatomy, part).state_dict())
    rows = tiny_rows(7, 4, 9, 5)
    drops = logprob_drops(source, full, rows)[:, -1]
    # The source's last state, read by what is the source's own norm and unembedding, is the source's answer.
    torch.testing.assert_close(drops, target_nll(source, rows) - target_nll(full, rows), rtol=1e-4, atol=1e-5)


SIXTEENTHS = st.integers(-32, 99).map(lambda n: n / 16)  # none of them is the threshold, in whatever precision


@settings(deadline=None)
@given(
    gold=st.lists(st.lists(SIXTEENTHS, min_size=3, max_size=3), min_size=1, max_size=6),
    ours=st.lists(st.lists(SIXTEENTHS, min_size=3, max_size=3), min_size=6, max_size=6),
)
def test_the_score_is_the_papers(gold: list[list[float]], ours: list[list[float]]) -> None:
    of_gold, drops = torch.tensor(gold), torch.tensor(ours[: len(gold)])
    depth = UnlearningDepth(of_gold, drops)
    expected, rows = released_formula(of_gold, drops)
    assert depth.score == (None if expected is None else pytest.approx(expected, abs=1e-6))
    assert depth.excluded == len(gold) - len(rows)
    torch.testing.assert_close(depth.by_row[depth.counted], torch.tensor(rows), rtol=1e-5, atol=1e-6)
    assert depth.by_row[~depth.counted].isnan().all()


def test_clipping_hides_what_the_unclipped_ratio_shows() -> None:
    of_gold = torch.tensor([[1.0, 3.0], [2.0, 0.01], [0.0, -1.0], [1.0, 1.0]])
    broken = UnlearningDepth(of_gold, torch.tensor([[4.0, 8.0], [6.0, 9.0], [5.0, 5.0], [-1.0, 3.0]]))
    assert broken.score == pytest.approx((1 + 1 + 0.5) / 3) and broken.excluded == 1
    torch.testing.assert_close(broken.unclipped_by_row[:2], torch.tensor([12 / 4, 6 / 2]))
    assert broken.unclipped_median == pytest.approx(3.0)
    assert broken.unclipped_by_row[3] == pytest.approx(1.0)


def test_the_threshold_decides_which_layers_count() -> None:
    of_gold, drops = torch.tensor([[0.04, 0.06, 2.0]]), torch.tensor([[0.04, 0.0, 2.0]])
    assert UnlearningDepth(of_gold, drops).encoding.tolist() == [[False, True, True]]
    assert UnlearningDepth(of_gold, drops).score == pytest.approx(2.0 / 2.06)
    assert UnlearningDepth(of_gold, drops, threshold=1.0).score == pytest.approx(1.0)
    assert UnlearningDepth(of_gold, drops, threshold=3.0).score is None


@settings(deadline=None, max_examples=8)
@given(size=st.integers(1, 6), order=st.permutations(range(5)))
def test_neither_batches_nor_the_order_of_rows_move_a_drop(size: int, order: list[int]) -> None:
    source, full = pair("opt")
    rows = tiny_rows(8, 5, 6, 3, 9)
    whole = logprob_drops(source, full, rows)
    parts = logprob_drops(source, full, [rows[place] for place in order], batch_size=size, memory=0)
    torch.testing.assert_close(parts, whole[list(order)], rtol=1e-4, atol=1e-5)


# The tokens that carry the fact.


def test_facts_are_entities_and_whole_answers_where_no_entity_is_marked() -> None:
    model = tiny_model("llama")
    records = [
        QA("w4 w5 w6", "w7 w8 w9 w10", entity_span=(3, 8)),
        QA("w4 w5", "w7 w8"),
        QA("w4", "w11 w12", entity_span=(4, 7)),
    ]
    rows = fact_rows(records, model.tokenizer)
    words = [model.tokenizer.decode(row.ids[row.start : row.stop]) for row in rows]
    assert words == ["w8 w9", "w7 w8", "w12"]
    assert fact_rows(records[1:2], model.tokenizer) == encode(records[1:2], model.tokenizer)


# What is refused.


def test_golds_drops_of_other_rows_are_refused() -> None:
    source, full = pair("llama")
    with pytest.raises(DataError, match=r"gold's drops are \(2, 3\), but there are 1 rows and 3 layers"):
        unlearning_depth(torch.zeros(2, 3), source, full, tiny_rows(4))


def test_an_answer_longer_than_the_context_and_another_architecture_are_refused() -> None:
    source, full = pair("llama")
    with pytest.raises(DataError, match="shorten the row"):
        logprob_drops(source, full, tiny_rows(80))
    with pytest.raises(ModelError, match="give models of one architecture"):
        logprob_drops(tiny_model("gpt2"), full, tiny_rows(4))
