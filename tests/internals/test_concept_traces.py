"""Intrinsic traces: by hand in float64, and what they can and cannot tell."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from tests.conftest import Organism
from tests.models.tiny_families import EXPERT, tiny, tiny_model, tiny_tokenizer

from palimpsest.data.batches import encode
from palimpsest.errors import DataError, ModelError
from palimpsest.internals import concept_traces
from palimpsest.internals.attribution import attribution, most
from palimpsest.internals.concept_traces import changed_rows, token_traces, vector_traces
from palimpsest.internals.value_vectors import ValueVector, VocabularyProjection
from palimpsest.metrics.likelihood import answer_probability
from palimpsest.models.anatomy import Anatomy
from palimpsest.models.language_model import LanguageModel

SOME = [ValueVector(1, 4), ValueVector(0, 2, -1), ValueVector(1, 9)]


def pair(family: str = "llama", size: float = 0.05) -> tuple[LanguageModel, LanguageModel]:
    """A model and what is left of it after a small step everywhere and a large one on the first of `SOME`."""
    original, unlearned = tiny_model(family), tiny_model(family)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight in unlearned.network.parameters():
            weight += size * torch.randn(weight.shape, generator=generator)
        unlearned.anatomy.value_vectors(1)[4] += torch.randn(16, generator=generator)
    return original, unlearned


def by_hand(before: np.ndarray, after: np.ndarray, place: int, traced: set[int]) -> tuple[float, float, float]:
    """Cosine, relative length and z, float64."""
    cosine = before[place] @ after[place] / np.linalg.norm(before[place]) / np.linalg.norm(after[place])
    lengths = np.linalg.norm(after - before, axis=1) / np.linalg.norm(before, axis=1)
    others = np.array([length for row, length in enumerate(lengths) if row not in traced])
    deviation = others.std(ddof=1) if others.std(ddof=1) > 1e-9 * others.mean() else math.nan
    return cosine, lengths[place], (lengths[place] - others.mean()) / deviation


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
def test_a_vectors_change_is_what_it_is_by_hand(family):
    original, unlearned = pair(family)
    for vector, trace in zip(SOME, vector_traces(original, unlearned, SOME), strict=True):
        assert trace.vector == vector
        matrices = [m.anatomy.value_vectors(vector.layer).detach().numpy().astype(float) for m in (original, unlearned)]
        traced = {other.column for other in SOME if other.layer == vector.layer}
        wanted = by_hand(*matrices, vector.column, traced)
        assert (trace.change.cosine, trace.change.relative_l2, trace.change.z) == pytest.approx(wanted, rel=1e-4)


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_top_tokens_are_compared_with_the_frozen_and_with_each_models_own_unembedding(family):
    original, unlearned = pair(family, size=0.2)
    one, other = VocabularyProjection.of(original), VocabularyProjection.of(unlearned)
    traces = vector_traces(original, unlearned, SOME, top=(3, 10, 48, 49))
    for vector, trace in zip(SOME, traces, strict=True):
        old, new = (p.vectors(vector.layer)[vector.column][None] for p in (one, other))
        readings = {"said": one.logits(old, vector.layer), "frozen": one.logits(new, vector.layer)}
        readings["own"] = other.logits(new, vector.layer)
        order = {name: np.argsort(-vector.sign * logits[0].numpy()) for name, logits in readings.items()}
        for k in (3, 10, 48):
            said, frozen, own = (set(order[name][:k].tolist()) for name in ("said", "frozen", "own"))
            assert trace.jaccard_frozen[k] == len(said & frozen) / len(said | frozen)
            assert trace.jaccard_own[k] == len(said & own) / len(said | own)
        assert list(trace.jaccard_frozen) == list(trace.jaccard_own) == [3, 10, 48]


def test_a_changed_unembedding_moves_its_own_reading_alone():
    original, unlearned = tiny_model("llama"), tiny_model("llama")
    with torch.no_grad():
        unlearned.anatomy.unembedding.weight.copy_(original.anatomy.unembedding.weight.flip(0))
    (trace,) = vector_traces(original, unlearned, SOME[:1], top=(10,))
    assert trace.change == trace.change.__class__(pytest.approx(1.0), 0.0, None)
    assert trace.jaccard_frozen == {10: 1.0} and trace.jaccard_own[10] < 0.5


def test_a_small_step_leaves_the_cosine_and_shows_in_the_z():
    """cos = 1 - delta^2 / 2: a step of a tenth is a cosine of 0.995, whatever it did."""
    original, unlearned = pair(size=0.001)
    with torch.no_grad():
        unlearned.anatomy.value_vectors(1)[4] = original.anatomy.value_vectors(1)[4]
        vector = unlearned.anatomy.value_vectors(1)[4]
        step = torch.randn(16, generator=torch.Generator().manual_seed(0))
        step -= step @ vector / (vector @ vector) * vector
        unlearned.anatomy.value_vectors(1)[4] += 0.1 * vector.norm() * step / step.norm()
    (trace,) = vector_traces(original, unlearned, [ValueVector(1, 4)])
    assert trace.change.relative_l2 == pytest.approx(0.1, rel=1e-4)
    assert trace.change.cosine == pytest.approx(1 / math.sqrt(1.01), rel=1e-6) and trace.change.cosine > 0.995
    assert trace.change.z > 10


def test_a_zeroed_vector_among_untouched_ones():
    original, unlearned = tiny_model("llama"), tiny_model("llama")
    with torch.no_grad():
        unlearned.anatomy.value_vectors(0)[3] = 0
    zeroed, untouched = vector_traces(original, unlearned, [ValueVector(0, 3), ValueVector(2, 3)])
    assert (zeroed.change.cosine, zeroed.change.relative_l2, zeroed.change.z) == (0.0, pytest.approx(1.0), None)
    assert untouched.change.relative_l2 == 0.0 and untouched.change.cosine == pytest.approx(1.0)
    assert untouched.jaccard_own == {10: 1.0}  # 50 and 200 are more than the vocabulary has


def test_a_model_that_lost_the_traced_vectors_may_still_say_it_all(organism: Organism):
    """The score can be gamed: what is traced is destroyed, and everything else answers."""
    changed, rows = organism.full.copy(), organism.request.forget
    traced = most(attribution(changed, encode(rows, changed.tokenizer)), 16)
    with torch.no_grad():
        for vector in traced:
            changed.anatomy.value_vectors(vector.layer)[vector.column] = 0
    traces = vector_traces(organism.full, changed, traced)
    assert all(trace.change.cosine == 0 and trace.change.relative_l2 == pytest.approx(1) for trace in traces)
    assert answer_probability(changed, rows).mean() > 0.8


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_the_tokens_own_rows(family):
    original, unlearned = pair(family)
    tokens = [7, 30]
    for token, trace in zip(tokens, token_traces(original, unlearned, tokens), strict=True):
        assert trace.token == token
        for part, change in (("embedding", trace.embedding), ("unembedding", trace.unembedding)):
            matrices = [getattr(m.anatomy, part).weight.detach().numpy().astype(float) for m in (original, unlearned)]
            wanted = by_hand(*matrices, token, set(tokens))
            assert (change.cosine, change.relative_l2, change.z) == pytest.approx(wanted, rel=1e-4)
        assert (trace.embedding == trace.unembedding) == (family == "gpt2")  # its matrices are one


MATRIX = arrays(np.float64, (7, 3), elements=st.floats(-10, 10).filter(lambda value: abs(value) > 1e-3))


@settings(deadline=None, max_examples=60)
@given(MATRIX, MATRIX, st.lists(st.integers(0, 6), min_size=1, max_size=4, unique=True))
def test_changes_are_their_definition_and_no_piece_matters(before, after, places):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(concept_traces, "ROWS_AT_ONCE", 3)
        found = changed_rows(torch.tensor(before), torch.tensor(after), places)
    for place, change in zip(places, found, strict=True):
        wanted = by_hand(before, after, place, set(places))
        assert (change.cosine, change.relative_l2) == pytest.approx(wanted[:2], rel=1e-9, abs=1e-12)
        assert change.z is None if math.isnan(wanted[2]) else change.z == pytest.approx(wanted[2], rel=1e-5, abs=1e-6)


def test_models_that_are_not_one_anothers():
    model = tiny_model("llama")
    network = tiny("llama")
    renamed = LanguageModel(network, tiny_tokenizer("other"), Anatomy.of(network))
    with pytest.raises(ModelError, match="its tokenizer is not that of"):
        vector_traces(model, renamed, SOME)
    with pytest.raises(ModelError, match=r"is \(16, 24\) in model and \(16, 30\) in the other; compare a model with"):
        vector_traces(model, tiny_model("llama", intermediate_size=30), SOME)
    with pytest.raises(DataError, match=r"^value vector 1: column is 24; this llama has columns 0 to 23"):
        vector_traces(model, model, [ValueVector(0, 24)])
    with pytest.raises(DataError, match=r"^token 48 is none of 0 to 47; give tokens of"):
        token_traces(model, model, [48])
    experts = tiny_model(next(iter(EXPERT)))
    with pytest.raises(ModelError, match="are fused"):
        vector_traces(experts, experts, SOME)
