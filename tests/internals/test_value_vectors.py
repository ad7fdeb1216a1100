"""Value vectors as tokens, against the networks themselves: in float64, for every family."""

import numpy as np
import pytest
import torch
from tests.models.tiny_families import DENSE, EXPERT, INNER, VOCABULARY, WIDTH, tiny_model

from palimpsest.errors import DataError, ModelError
from palimpsest.internals import value_vectors as module
from palimpsest.internals.value_vectors import NormGain, ValueVector, VocabularyProjection, refuse_missing, top_tokens

LAYER_NORMS = {"stablelm", "olmo", "cohere", "phi", "gpt2", "gpt_neo", "gptj", "gpt_neox", "opt", "bloom", "falcon"}


def projected(model, layer: int) -> np.ndarray:
    """[d_ff, V] by the names that the families' own code uses, in float64."""

    def linear_part(norm, vectors: np.ndarray) -> np.ndarray:
        weight = getattr(norm, "weight", None)
        gain = np.ones(WIDTH) if weight is None else weight.detach().numpy().astype(np.float64)
        if model.anatomy.family.startswith("gemma"):
            gain = 1 + gain
        if model.anatomy.family in LAYER_NORMS:
            vectors = vectors - vectors.mean(-1, keepdims=True)
        return vectors * gain

    vectors = model.anatomy.value_vectors(layer).detach().numpy().astype(np.float64)
    if model.anatomy.family in ("gemma2", "gemma3_text", "olmo2", "olmo3"):
        vectors = linear_part(model.anatomy.blocks[layer].post_feedforward_layernorm, vectors)
    head = model.network.get_output_embeddings().weight.detach().numpy().astype(np.float64)
    return linear_part(model.anatomy.final_norm, vectors) @ head.T


@pytest.mark.parametrize("family", DENSE)
def test_every_column_is_projected_through_the_norms_that_stand_on_its_way(family, monkeypatch):
    monkeypatch.setattr(module, "LOGITS_AT_ONCE", 5 * VOCABULARY)  # five columns at a time, which do not divide them
    model = tiny_model(family)
    projection = VocabularyProjection.of(model)
    for layer in range(model.anatomy.n_layers):
        pieces = list(projection.by_columns(layer))
        assert [first for first, _ in pieces] == list(range(0, model.anatomy.d_ff, 5))
        np.testing.assert_allclose(
            torch.cat([logits for _, logits in pieces]).numpy(), projected(model, layer), 1e-4, 1e-5
        )


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2"])
def test_a_direction_in_the_vocabulary_is_taken_back_to_the_vectors(family):
    model = tiny_model(family)
    projection = VocabularyProjection.of(model)
    towards = projection.towards(projection.unembedding[[7, 30]], 1)
    found = projection.vectors(1) @ towards.T
    np.testing.assert_allclose(found.numpy(), projected(model, 1)[:, [7, 30]], 1e-4, 1e-5)


def test_an_odd_width_and_a_half_precision_norm():
    norm = torch.nn.LayerNorm(7)
    with torch.no_grad():
        norm.weight.copy_(torch.arange(7.0) - 3)
        norm.bias.fill_(5.0)
    found = NormGain.of(norm, 7, torch.device("cpu"))
    assert found.centred
    torch.testing.assert_close(found.gain, torch.arange(7.0) - 3, rtol=1e-5, atol=1e-5)
    norm = torch.nn.RMSNorm(6).to(torch.bfloat16)
    assert not NormGain.of(norm, 6, torch.device("cpu")).centred and norm.weight.dtype == torch.bfloat16


def test_both_ends_of_a_projection():
    model = tiny_model("llama")
    top, bottom = top_tokens(model, [ValueVector(2, 5), ValueVector(2, 5, -1)], k=4)
    logits = projected(model, 2)[5]
    order = logits.argsort()
    assert list(top.ids) == order[::-1][:4].tolist() and list(bottom.ids) == order[:4].tolist()
    assert top.logits == pytest.approx(logits[order[::-1][:4]], rel=1e-4)
    assert bottom.logits == pytest.approx(-logits[order[:4]], rel=1e-4)


def test_half_precision_is_projected_in_single():
    model = tiny_model("llama")
    model.network.to(torch.bfloat16)
    (_, logits), *_ = VocabularyProjection.of(model).by_columns(0)
    assert logits.dtype == torch.float32
    values = model.anatomy.value_vectors(0).detach().float().numpy().astype(np.float64)
    head = model.network.lm_head.weight.detach().float().numpy().astype(np.float64)
    gain = model.anatomy.final_norm.weight.detach().float().numpy().astype(np.float64)
    np.testing.assert_allclose(logits.numpy(), (values * gain) @ head.T, 1e-4, 1e-5)


@pytest.mark.parametrize(
    ("vector", "says"),
    [
        (ValueVector(3, 0), "layer is 3; this llama has layers 0 to 2"),
        (ValueVector(-1, 0), "layer is -1"),
        (ValueVector(0, INNER), f"column is {INNER}; this llama has columns 0 to {INNER - 1}"),
        (ValueVector(0, 0, 0), "sign is 0; it is 1 for the top"),
    ],
)
def test_vectors_that_a_model_does_not_have_are_named(vector, says):
    with pytest.raises(DataError, match=f"^value vector 2: {says}"):
        top_tokens(tiny_model("llama"), [ValueVector(0, 0), vector])
    with pytest.raises(DataError, match=f"^there: {says}"):
        refuse_missing(tiny_model("llama"), [vector], ["there"])


def test_nothing_to_read():
    with pytest.raises(DataError, match="no value vectors are given"):
        top_tokens(tiny_model("llama"), [])


@pytest.mark.parametrize("family", EXPERT)
def test_fused_experts_have_no_value_vectors(family):
    with pytest.raises(ModelError, match="are fused and have no value matrix"):
        VocabularyProjection.of(tiny_model(family))
    with pytest.raises(ModelError, match="are fused and have no value matrix"):
        top_tokens(tiny_model(family), [ValueVector(0, 0)])
