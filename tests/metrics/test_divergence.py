import json
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import log_softmax, rel_entr
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from palimpsest.data.batches import Encoded, encode
from palimpsest.data.records import QA, Passage
from palimpsest.errors import ModelError
from palimpsest.metrics import divergence
from palimpsest.metrics.divergence import kl_per_item, reference_logprobs, token_kl
from palimpsest.models.language_model import LanguageModel

Reference = Callable[[LanguageModel, Encoded], np.ndarray]
Build = Callable[..., LanguageModel]


def expected_kl(p: LanguageModel, q: LanguageModel, encoded: list[Encoded], reference: Reference) -> list[float]:
    return [rel_entr(np.exp(reference(p, row)), np.exp(reference(q, row))).sum(-1).mean() for row in encoded]


def test_kl_is_scipys_relative_entropy_on_the_full_logits(
    model: LanguageModel, other_model: LanguageModel, records: list[QA], reference: Reference
) -> None:
    expected = expected_kl(model, other_model, encode(records, model.tokenizer), reference)
    found = kl_per_item(model, other_model, records, batch_size=4)
    assert found.tolist() == pytest.approx(expected, rel=1e-5)
    backwards = kl_per_item(other_model, model, records)
    assert not torch.allclose(found, backwards, rtol=0.01)


def test_the_cached_reference_gives_the_same_at_every_batch_size(
    model: LanguageModel, other_model: LanguageModel, records: list[QA], reference: Reference
) -> None:
    passages = [Passage(record.question + " " + record.answer, id=record.id) for record in records]
    encoded = encode(passages, model.tokenizer)
    kept = reference_logprobs(model, encoded, batch_size=3)
    assert kept.logprobs.shape == (sum(row.n_targets for row in encoded), len(model.tokenizer))
    expected = expected_kl(model, other_model, encoded, reference)
    for batch_size in (1, 4, 64):
        assert kept.kl(other_model, batch_size=batch_size).tolist() == pytest.approx(expected, rel=1e-5)
    assert kept.kl(model).max() < 1e-6


def test_a_model_does_not_diverge_from_itself(model: LanguageModel, records: list[QA]) -> None:
    assert kl_per_item(model, model, records).tolist() == [0.0] * len(records)


@given(st.integers(0, 1000), st.sampled_from([0.01, 1.0, 30.0]))
@settings(deadline=None, max_examples=30)
def test_token_kl_in_chunks_is_scipys_and_never_negative(seed: int, spread: float) -> None:
    draws = np.random.default_rng(seed)
    p, q = draws.normal(scale=spread, size=(2, 13, 17))
    expected = rel_entr(np.exp(log_softmax(p, -1)), np.exp(log_softmax(q, -1))).sum(-1)
    before, divergence.CHUNK = divergence.CHUNK, 50  # two tokens at a time
    try:
        found = token_kl(torch.tensor(p, dtype=torch.float32).log_softmax(-1), torch.tensor(q, dtype=torch.float32))
    finally:
        divergence.CHUNK = before
    assert found.numpy() == pytest.approx(expected, rel=1e-4, abs=1e-6)


def test_impossible_tokens_contribute_nothing_and_gradients_reach_q() -> None:
    p = torch.tensor([[0.5, 0.5, 0.0]]).log()
    q = torch.tensor([[0.0, 1.0, -torch.inf]])
    expected = rel_entr([0.5, 0.5], np.exp(log_softmax([0.0, 1.0]))).sum()
    assert token_kl(p, q).item() == pytest.approx(expected, rel=1e-5)
    free = torch.tensor([[0.0, 1.0, 2.0]], requires_grad=True)
    token_kl(p, free).sum().backward()
    # The gradient of KL(p || softmax(z)) in z is softmax(z) - p.
    torch.testing.assert_close(free.grad, free.detach().softmax(-1) - p.exp())


def test_another_vocabulary_is_refused_in_one_line(model: LanguageModel, build: Build, records: list[QA]) -> None:
    larger = replace(build(3, vocab_size=len(model.tokenizer) + 8), name="larger")
    with pytest.raises(ModelError, match="larger: its vocabulary has 54 entries, the reference's 46") as caught:
        kl_per_item(model, larger, records)
    assert "\n" not in str(caught.value)
    with pytest.raises(ModelError, match="vocabulary"):
        reference_logprobs(model, encode(records, model.tokenizer)).kl(larger)


def test_a_tokenizer_of_the_same_size_but_other_tokens_is_refused(
    model: LanguageModel,
    build: Build,
    tokenizer_ending_with: Callable[[str], PreTrainedTokenizerFast],
    records: list[QA],
) -> None:
    other = tokenizer_ending_with("<end>")
    vocabulary = other.get_vocab()
    state = json.loads(other.backend_tokenizer.to_str())
    state["model"]["vocab"] = vocabulary | {" w1": vocabulary[" w2"], " w2": vocabulary[" w1"]}
    swapped = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(state)), eos_token="<end>")
    assert len(swapped) == len(model.tokenizer)
    expected = r"^gold: its tokenizer is not that of tiny0 \(token ' w1' is 8 in one and 7 in the other\); compare"
    with pytest.raises(ModelError, match=expected):
        kl_per_item(model, replace(build(3, swapped), name="gold"), records)
