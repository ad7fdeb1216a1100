import random
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_families import EXPERT, FAMILIES, VOCABULARY, n_hooks, tiny, tiny_batch, tiny_model, tiny_rows, tiny_tokenizer
from transformers import MambaConfig, MambaForCausalLM

from palimpsest.data.batches import Encoded, collate
from palimpsest.errors import DataError
from palimpsest.models.anatomy import Anatomy
from palimpsest.models.language_model import LanguageModel
from palimpsest.models.scoring import Predictions, predict, predict_unpadded, row_logprobs

VARIANTS = [
    *((family, {}) for family in FAMILIES),
    ("falcon", {"alibi": True}),
    ("falcon", {"new_decoder_architecture": True, "num_kv_heads": 1}),
    ("gpt_neox", {"use_parallel_residual": False}),
    ("llama", {"tie_word_embeddings": True}),
]
WINDOWS = [
    ("mistral", {"sliding_window": 60}),
    ("gemma2", {"sliding_window": 60}),
    ("gemma3_text", {"sliding_window": 60}),
    ("olmo3", {"sliding_window": 60}),
    ("gpt_neo", {"window_size": 60}),
    ("gpt2", {"attn_implementation": "eager"}),
    ("qwen2", {"attn_implementation": "eager"}),
]
PLAIN = {"bloom", "mistral", "olmo3", "gemma2", "gemma3_text", "gpt_neo"}
"""Families that the tiny models of which cannot branch: by ALiBi, or by a window of four tokens."""


def is_plain(family, changes):
    return (family in PLAIN and (family, changes) not in WINDOWS) or changes.get("alibi", False)


def plain_logits(network, ids):
    """What the network gives for one unpadded row, asked in the simplest way."""
    row = torch.tensor([ids])
    return network(input_ids=row, attention_mask=torch.ones_like(row), use_cache=False).logits[0]


def tokens_embedded(model, run):
    """What `run()` gives, and how many tokens were embedded for it."""
    read = []
    handle = model.network.get_input_embeddings().register_forward_pre_hook(lambda _, ids: read.append(ids[0].numel()))
    found = run()
    handle.remove()
    return found, sum(read)


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize(("family", "changes"), [*VARIANTS, *WINDOWS])
def test_logits_and_gradients_are_those_of_the_plain_forward_pass(family, changes, side):
    rows, model = tiny_rows(4, 7, 9), tiny_model(family, **changes)
    network, batch = model.network, collate(rows, range(3), side=side)
    expected = torch.cat([plain_logits(network, row.ids)[row.start - 1 : row.stop - 1] for row in rows])
    targets = torch.tensor([token for row in rows for token in row.ids[row.start : row.stop]])
    torch.nn.functional.cross_entropy(expected, targets).backward()
    gradients = {name: parameter.grad.clone() for name, parameter in network.named_parameters()}
    scale = max(float(gradient.abs().max()) for gradient in gradients.values())
    n_unpadded = 3 * 9 if is_plain(family, changes) else 3 + 6 + 8
    ways = [(lambda: predict(network, batch), 3 * 9), (lambda: predict_unpadded(model, batch), n_unpadded)]
    for way, n_tokens in ways:
        network.zero_grad()
        found, n_read = tokens_embedded(model, way)
        assert n_read == n_tokens
        assert found.targets.tolist() == targets.tolist()
        assert found.row.tolist() == [0] * 2 + [1] * 4 + [2] * 5
        # With experts the plain pass itself is 3e-5 from its float64.
        torch.testing.assert_close(found.logits, expected, rtol=1e-5, atol=5e-5 if family in EXPERT else 1e-5)
        (-found.logprobs().mean()).backward()
        for name, parameter in network.named_parameters():
            torch.testing.assert_close(parameter.grad, gradients[name], rtol=1e-4, atol=1e-5 * scale)
    assert n_hooks(network) == 0


@pytest.mark.parametrize(
    ("lengths", "n_read"),
    [
        ((30,), 29),  # one row is its own line, without the token that nothing reads
        ((12, 30), 11 + 29),
        ((30, 30), 60),  # 58 tokens on a line are compared 3,364 times, which is 1,564 more for two tokens less
        ((33, 33, 4), 3 * 33),  # 67 tokens are wider than the positions that the model has
    ],
)
def test_rows_go_on_one_line_where_that_is_cheaper_and_it_is_no_wider_than_the_model(lengths, n_read):
    model = tiny_model("llama")
    found, read = tokens_embedded(model, lambda: predict_unpadded(model, tiny_batch(*lengths)))
    assert read == n_read and len(found.logits) == sum(length - length // 2 for length in lengths)


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


def answers(prompt, n, seed=0):
    """Rows of one prompt of this many tokens and n answers to it, which themselves begin alike."""
    draw = random.Random(seed)

    def words(k):
        return [draw.randrange(4, VOCABULARY) for _ in range(k)]

    asked, answer = words(prompt), words(5)
    told = [asked + answer[: draw.randrange(4)] + words(draw.randint(1, 4)) for _ in range(n)]
    return [Encoded(tuple(ids), prompt, len(ids)) for ids in told]


def plain_logprobs(network, rows):
    """Each row by itself, and its log-probability in float64."""
    found = []
    for row in rows:
        with torch.no_grad():
            logprobs = plain_logits(network, row.ids).double().log_softmax(-1)
        found.append(sum(float(logprobs[place - 1, row.ids[place]]) for place in range(row.start, row.stop)))
    return found


def tokens_read(model, rows, **settings):
    """The rows' log-probabilities, and how many tokens were embedded for them, padding left out."""
    found, n_read = tokens_embedded(model, lambda: row_logprobs(model, rows, batch_size=1, **settings))
    return found.tolist(), n_read


QUESTIONS = [*answers(12, 4), *answers(9, 3, seed=1), *answers(30, 8, seed=2), *tiny_rows(6, 11)]
BEGINNINGS = len({row.ids[:length] for row in QUESTIONS for length in range(1, row.stop)})


@pytest.mark.parametrize(("family", "changes"), [*VARIANTS, *WINDOWS])
def test_every_family_scores_many_answers_as_it_scores_each_alone(family, changes):
    model = tiny_model(family, **changes)
    found, n_read = tokens_read(model, QUESTIONS)
    assert found == pytest.approx(plain_logprobs(model.network, QUESTIONS), rel=1e-5, abs=1e-5)
    assert (n_read > 2 * BEGINNINGS) if is_plain(family, changes) else (n_read == BEGINNINGS)
    assert n_hooks(model.network) == 0


def test_a_network_with_a_state_in_place_of_attention_reads_each_row_alone():
    sizes = {"vocab_size": VOCABULARY, "hidden_size": 16, "num_hidden_layers": 2, "state_size": 4}
    torch.manual_seed(0)
    network = MambaForCausalLM(MambaConfig(**sizes, initializer_range=0.5)).eval()
    blocks, head = tuple(network.backbone.layers), network.get_output_embeddings()
    anatomy = Anatomy("mamba", blocks, (), (), network.backbone.norm_f, head, head, 1.0, None)
    found, n_read = tokens_read(LanguageModel(network, tiny_tokenizer(), anatomy), QUESTIONS)
    assert found == pytest.approx(plain_logprobs(network, QUESTIONS), rel=1e-5, abs=1e-5)
    assert n_read > 2 * BEGINNINGS


MODELS = {family: tiny_model(family) for family in ("llama", "gpt2", "bloom")}
ALONE = {family: plain_logprobs(model.network, QUESTIONS) for family, model in MODELS.items()}


@pytest.mark.parametrize("family", MODELS)
@given(batch_size=st.integers(1, 70), order=st.permutations(range(len(QUESTIONS))))
@settings(deadline=None, max_examples=12)
def test_neither_batch_size_nor_order_changes_a_score(family, batch_size, order):
    found = row_logprobs(MODELS[family], [QUESTIONS[place] for place in order], batch_size=batch_size)
    assert found.dtype == torch.float32
    assert found.tolist() == pytest.approx([ALONE[family][place] for place in order], rel=1e-5, abs=1e-5)


def test_targets_may_begin_and_end_anywhere_in_rows_that_begin_alike():
    rows = [replace(row, start=start) for row in answers(12, 3) for start in (1, 7, len(row.ids) - 1)]
    rows += [replace(row, stop=14, start=11) for row in rows[:4]]
    found = row_logprobs(MODELS["llama"], rows)
    assert found.tolist() == pytest.approx(plain_logprobs(MODELS["llama"].network, rows), rel=1e-5, abs=1e-5)


def test_no_row_at_all_has_no_score():
    assert row_logprobs(MODELS["llama"], []).shape == (0,)


def test_a_network_is_left_in_the_mode_it_was_in():
    model = tiny_model("llama")
    model.network.train()
    row_logprobs(model, QUESTIONS[:2])
    assert model.network.training


def test_a_bf16_network_reads_trees_too():
    model = tiny_model("llama")
    model.network.to(torch.bfloat16)
    found, n_read = tokens_read(model, QUESTIONS)
    assert found == pytest.approx(ALONE["llama"], rel=0.1) and n_read == BEGINNINGS


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
    model = tiny_model(family)
    longer = Encoded((3,) * (limit + 2), 1, limit + 2)  # its last token is not read
    with pytest.raises(DataError, match=f"a row has {limit + 1} tokens, but the model has {limit} positions"):
        row_logprobs(model, [longer, Encoded((*longer.ids[:-2], 4, 5), 1, limit + 2)])
