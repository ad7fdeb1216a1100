"""Causal tracing against embeddings that were noised by hand, and what must hold of every trace."""

import pytest
import torch
from tests.internals.pairs import SOME, hooks_and_forwards
from tests.models.tiny_families import LAYERS, tiny_model
from torch import Tensor

from palimpsest.data.batches import collate, encode
from palimpsest.data.records import QA
from palimpsest.errors import DataError
from palimpsest.internals.patching import window_plans
from palimpsest.internals.tracing import causal_traces, subject_tokens
from palimpsest.models.anatomy import Site
from palimpsest.models.hooks import Patch, capture, patched
from palimpsest.models.language_model import LanguageModel, evaluating

RECORDS = [
    QA("w4 w5 w6 w7", "w8 w9", subject="w5 w6", id="two"),
    QA("w20 w21 w22", "w23", subject="w21", id="one"),
]
OWN, LAST = frozenset([Site("resid", -1)]), frozenset([Site("resid", LAYERS - 1)])


def probability_by_hand(model: LanguageModel, record: QA, noise: Tensor, put_back: tuple[Site, int] | None) -> float:
    """Mean over samples of exp(mean log-probability), from embeddings [1, T, d] that were noised beforehand."""
    (row,) = encode([record], model.tokenizer, template="raw")
    ids = torch.tensor([row.ids])
    found = []
    for sample in noise:
        with evaluating(model) as network:
            patches = {}
            if put_back:
                site, token = put_back
                store = capture(model, collate([row], [0]), [site])
                where = torch.zeros_like(ids, dtype=torch.bool)
                where[0, token] = True
                patches = {site: Patch.of(store[site], where)}
            embedded = model.anatomy.embedding(ids).clone()
            place = row.ids.index(model.tokenizer.convert_tokens_to_ids(record.subject.split()[0]))
            embedded[0, place : place + len(sample)] += sample
            with patched(model.anatomy, patches):
                logits = network(inputs_embeds=embedded, use_cache=False).logits[0, row.start - 1 : -1]
        targets = torch.tensor(row.ids[row.start :])[:, None]
        found.append(logits.double().log_softmax(-1).gather(1, targets).mean().exp())
    return float(torch.stack(found).mean())


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox"])
def test_a_trace_is_what_noised_embeddings_and_one_hook_give(family: str) -> None:
    model = tiny_model(family)
    plans = [frozenset([Site("attn", 0)]), frozenset([Site("resid", 1)]), frozenset([Site("mlp", 2)])]
    traces = causal_traces(model, RECORDS, plans, template="raw", samples=3, noise=2.0, seed=5)
    subject_words = [word for record in RECORDS for word in record.subject.split()]
    ids = torch.tensor(model.tokenizer.convert_tokens_to_ids(subject_words))
    with torch.no_grad():
        scale = 2.0 * model.anatomy.embedding(ids).std()
    for record, trace in zip(RECORDS, traces, strict=True):
        n_subject = len(record.subject.split())
        drawn = torch.randn(3, n_subject, 16, generator=torch.Generator().manual_seed(5))
        noise = scale * drawn
        assert trace.clean == pytest.approx(probability_by_hand(model, record, 0 * noise, None), rel=1e-4)
        assert trace.corrupted == pytest.approx(probability_by_hand(model, record, noise, None), rel=1e-4)
        assert trace.restored.shape == (3, len(record.question.split()))
        for place, plan in enumerate(plans):
            (site,) = plan
            for token in (1, 2):
                expected = probability_by_hand(model, record, noise, (site, token))
                assert float(trace.restored[place, token]) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("family", SOME)
def test_what_the_noise_does_not_reach_restores_nothing_and_what_carries_it_all_everything(family: str) -> None:
    model = tiny_model(family)
    before = hooks_and_forwards(model)
    _, one = causal_traces(model, RECORDS, [OWN, LAST], template="raw", samples=4)
    assert hooks_and_forwards(model) == before
    assert one.subject == range(1, 2) and one.corrupted != pytest.approx(one.clean, rel=1e-3)
    own, last = one.restored
    # The only noised token, before anything has read it; and the token whose last state alone is unembedded.
    assert float(own[1]) == pytest.approx(one.clean, rel=1e-5)
    assert float(last[2]) == pytest.approx(one.clean, rel=1e-5)
    for token in (0, 2):
        assert float(own[token]) == one.corrupted
    for token in (0, 1):
        assert float(last[token]) == one.corrupted


def test_without_noise_nothing_happens() -> None:
    model = tiny_model("llama")
    plans = window_plans(model.anatomy, ("mlp",), 3)
    for trace in causal_traces(model, RECORDS, plans, template="raw", noise=0.0, samples=2):
        assert trace.corrupted == trace.clean and (trace.indirect_effect == 0).all()


def test_seeds_decide_the_noise_and_a_record_is_traced_alike_in_any_company() -> None:
    model = tiny_model("llama")
    plans = [frozenset([Site("mlp", 1)])]
    first, again, other = (causal_traces(model, RECORDS, plans, template="raw", seed=seed)[0] for seed in (1, 1, 2))
    assert torch.equal(first.restored, again.restored) and first.corrupted != other.corrupted
    backwards = causal_traces(model, RECORDS[::-1], plans, template="raw", seed=1)[1]
    torch.testing.assert_close(first.restored, backwards.restored, rtol=1e-4, atol=1e-6)


def test_the_subject_is_found_in_the_prompt_that_the_model_reads() -> None:
    tokenizer = tiny_model("llama").tokenizer
    (row,) = encode(RECORDS[:1], tokenizer)
    found = subject_tokens(RECORDS[0], tokenizer)
    assert tokenizer.decode([row.ids[place] for place in found]) == "w5 w6"


def test_a_question_without_its_subject_is_refused() -> None:
    model = tiny_model("llama")
    for subject in (None, "w40"):
        record = QA("w4 w5", "w6", subject=subject, id="r7")
        with pytest.raises(DataError, match=r"record 'r7': its subject .* does not stand in its question"):
            causal_traces(model, [record], [OWN])
    with pytest.raises(DataError, match="shorten the row"):
        causal_traces(model, [QA("w4 " * 70, "w6", subject="w4")], [OWN])
