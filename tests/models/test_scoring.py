import numpy as np
import pytest
import torch
from tiny_families import FAMILIES, n_hooks, tiny, tiny_batch, tiny_model, tiny_rows

from palimpsest.data.batches import Encoded, collate
from palimpsest.errors import DataError
from palimpsest.models.scoring import Predictions, predict, score_rows

CLOSE = {"rtol": 1e-5, "atol": 1e-5}
VARIANTS = [
    *((family, {}) for family in FAMILIES),
    ("falcon", {"alibi": True}),
    ("falcon", {"new_decoder_architecture": True, "num_kv_heads": 1}),
    ("gpt_neox", {"use_parallel_residual": False}),
    ("llama", {"tie_word_embeddings": True}),
]


def plain_logits(network, ids):
    """What the network gives for one unpadded row, asked in the simplest way."""
    row = torch.tensor([ids])
    return network(input_ids=row, attention_mask=torch.ones_like(row), use_cache=False).logits[0]


@pytest.mark.parametrize(("family", "changes"), VARIANTS)
def test_logits_and_gradients_are_those_of_the_plain_forward_pass(family, changes):
    rows, network = tiny_rows(4, 7, 9), tiny(family, **changes)
    expected = torch.cat([plain_logits(network, row.ids)[row.start - 1 : row.stop - 1] for row in rows])
    targets = torch.tensor([token for row in rows for token in row.ids[row.start : row.stop]])
    torch.nn.functional.cross_entropy(expected, targets).backward()
    gradients = {name: parameter.grad.clone() for name, parameter in network.named_parameters()}
    scale = max(float(gradient.abs().max()) for gradient in gradients.values())
    for side in ("right", "left"):
        network.zero_grad()
        found = predict(network, collate(rows, range(3), side=side))
        assert found.targets.tolist() == targets.tolist()
        assert found.row.tolist() == [0] * 2 + [1] * 4 + [2] * 5
        torch.testing.assert_close(found.logits, expected, **CLOSE)
        (-found.logprobs().mean()).backward()
        for name, parameter in network.named_parameters():
            torch.testing.assert_close(parameter.grad, gradients[name], rtol=1e-4, atol=1e-5 * scale)
    assert n_hooks(network) == 0


def test_only_the_scored_positions_reach_the_unembedding():
    network, seen = tiny("llama"), []
    network.lm_head.register_forward_hook(lambda _, inputs, output: seen.append((inputs[0].shape, output.shape)))
    with torch.no_grad():
        predict(network, tiny_batch(4, 9))
    assert seen == [((1, 7, 16), (1, 7, 48))]


def test_a_single_target_keeps_its_shape():
    with torch.no_grad():
        found = predict(tiny("llama"), collate([Encoded((5, 6, 7), 2, 3)], [0]))
    assert found.logits.shape == (1, 48) and found.targets.tolist() == [7] and found.row.tolist() == [0]


def test_logits_of_a_bf16_network_are_fp32():
    with torch.no_grad():
        assert predict(tiny("llama").to(torch.bfloat16), tiny_batch(4)).logits.dtype == torch.float32


def test_logprobs_and_row_sums_against_float64():
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(5, 11)).astype(np.float32) * 20
    targets, row = np.array([3, 0, 10, 3, 7]), np.array([0, 0, 2, 2, 2])
    exact = logits.astype(np.float64)[range(5), targets] - np.logaddexp.reduce(logits.astype(np.float64), axis=1)
    found = Predictions(torch.tensor(logits), torch.tensor(targets), torch.tensor(row))
    np.testing.assert_allclose(found.logprobs(), exact, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(
        found.sum_by_row(found.logprobs(), 3), [exact[:2].sum(), 0, exact[2:].sum()], rtol=1e-5, atol=1e-4
    )
    means = found.mean_by_row(found.logprobs(), 3)
    np.testing.assert_allclose(means[[0, 2]], [exact[:2].mean(), exact[2:].mean()], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", ["llama", "gpt2", "bloom"])
@pytest.mark.parametrize("batch_size", [1, 2, 64])
def test_scores_come_in_the_records_order_whatever_the_batch_size(family, batch_size):
    model, rows = tiny_model(family), tiny_rows(9, 3, 7, 3, 5)
    expected = []
    for row in rows:
        logprobs = torch.log_softmax(plain_logits(model.network, row.ids), -1)
        expected.append(
            sum(float(logprobs[place - 1, row.ids[place]].detach()) for place in range(row.start, row.stop))
        )
    model.network.train()
    found = score_rows(model, rows, lambda p, n: p.sum_by_row(p.logprobs(), n), batch_size=batch_size)
    assert found.dtype == torch.float32
    assert found.tolist() == pytest.approx(expected, rel=1e-4)
    assert model.network.training


def test_no_hook_is_left_after_an_exception_in_the_forward_pass():
    network, batch = tiny("llama"), tiny_batch(4)
    batch.ids[0, 1] = 10_000
    with pytest.raises(IndexError):
        predict(network, batch)
    assert n_hooks(network) == 0

    def fail(*_):
        raise ZeroDivisionError

    with network.lm_head.register_forward_hook(fail), pytest.raises(ZeroDivisionError):
        predict(network, tiny_batch(4))
    assert n_hooks(network) == 0


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_a_row_longer_than_the_models_positions_is_refused_in_one_line(family):
    network = tiny(family)
    limit = network.config.max_position_embeddings
    long = Encoded((3,) * (limit + 1), 1, limit + 1)
    with pytest.raises(DataError, match=f"a row has {limit + 1} tokens, but the model has {limit} positions"):
        predict(network, collate([long], [0]))
