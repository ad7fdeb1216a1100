"""The fused KL against autograd through the whole vocabulary, and the readout against every family's own logits."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import log_softmax, logsumexp, softmax
from tests.models.tiny_families import FAMILIES, WIDTH, tiny_batch, tiny_model
from torch import Tensor
from torch.nn import functional as F

from palimpsest.lens import readout as readout_module
from palimpsest.lens.readout import Readout
from palimpsest.models.anatomy import Site
from palimpsest.models.hooks import capture
from palimpsest.models.inputs import forward_inputs

HEADS = ["llama", "gemma2", "cohere", "granite", "gptj", "phi"]
"""Plain, capped, scaled, divided, with a bias."""


def double(family: str):
    model = tiny_model(family)
    model.network.double()
    return model


def residuals(n: int, seed: int) -> Tensor:
    return torch.randn(n, WIDTH, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("family", FAMILIES)
def test_what_the_final_norm_reads_gives_the_models_own_logits(family: str) -> None:
    model, batch = tiny_model(family), tiny_batch(7, 5)
    last = capture(model, batch, [Site("resid", model.anatomy.n_layers - 1)])
    with torch.no_grad():
        expected = model.network(**forward_inputs(model.network, batch)).logits[batch.attention]
    readout = Readout.of(model)
    found = readout.logits(readout.z(next(iter(last.values()))[batch.attention]))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", HEADS)
@given(n=st.integers(1, 9), seed=st.integers(0, 99), piece=st.sampled_from((1, 7, 48, 4096)), tokens=st.integers(1, 9))
@settings(deadline=None, max_examples=12)
def test_kl_and_gradient_are_those_of_autograd(family: str, n: int, seed: int, piece: int, tokens: int) -> None:
    readout = Readout.of(double(family))
    theirs, ours = residuals(n, seed), residuals(n, seed + 1)
    z = readout.z(ours).detach().requires_grad_()
    p, q = (readout.logits(part).log_softmax(-1) for part in (readout.z(theirs), z))
    expected = F.kl_div(q, p, reduction="none", log_target=True).sum(-1)
    (gradient,) = torch.autograd.grad(expected.sum(), z)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(readout_module, "PIECE", piece)
        patch.setattr(readout_module, "TOKENS", tokens)
        teacher = readout.teacher(theirs)
        kl, fused = readout.kl_and_slope(z.detach(), teacher)
        alone = readout.kl(z.detach(), teacher)
    assert (kl - expected).abs().max() < 1e-10 and (alone - expected).abs().max() < 1e-10
    assert (fused - gradient).abs().max() < 1e-10


@pytest.mark.parametrize("family", HEADS)
def test_expectations_are_scipys(family: str) -> None:
    readout = Readout.of(double(family))
    z = readout.z(residuals(6, 3))
    logits = readout.logits(z).numpy()
    found = readout.expected(z)
    p = softmax(logits, -1)
    assert np.allclose(found.log_partition, logsumexp(logits, -1), atol=1e-12)
    assert np.allclose(found.entropy, -(p * log_softmax(logits, -1)).sum(-1), atol=1e-12)
    if readout.cap is None:
        assert np.allclose(found.row, p @ readout.weight.numpy() * readout.scale, atol=1e-12)


@pytest.mark.parametrize("family", HEADS)
def test_a_drawn_labels_score_is_that_of_autograd(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readout_module, "SAMPLED", 4)
    readout, uniform = Readout.of(double(family)), torch.rand(9, generator=torch.Generator().manual_seed(1)).double()
    z = readout.z(residuals(9, 0)).detach().requires_grad_()
    logprobs = readout.logits(z).log_softmax(-1)
    labels = [
        int((np.cumsum(p) < u).sum()) for p, u in zip(logprobs.exp().detach().numpy(), uniform.numpy(), strict=True)
    ]
    (expected,) = torch.autograd.grad(logprobs[range(9), labels].sum(), z)
    assert (readout.sampled(z.detach(), uniform) - expected).abs().max() < 1e-10


def test_a_model_agrees_with_itself() -> None:
    readout = Readout.of(double("gemma2"))
    teacher = readout.teacher(residuals(5, 0))
    kl, gradient = readout.kl_and_slope(teacher.z, teacher)
    assert kl.abs().max() < 1e-12 and gradient.abs().max() < 1e-12


def test_products_in_bf16_keep_the_gradients_direction() -> None:
    model = tiny_model("llama")
    exact, fast = Readout.of(model), Readout.of(model).with_products(torch.bfloat16)
    theirs, ours = residuals(64, 0).float(), residuals(64, 1).float()
    teacher = exact.teacher(theirs)
    kl, gradient = exact.kl_and_slope(exact.z(ours), teacher)
    quick_kl, quick = fast.kl_and_slope(fast.z(ours), teacher)
    assert F.cosine_similarity(gradient.flatten(), quick.flatten(), dim=0) > 0.999
    assert (kl - quick_kl).abs().max() < 0.05 * kl.mean()


def test_the_hash_is_of_every_byte() -> None:
    model = tiny_model("phi")
    seen = {Readout.of(model).hash()}
    for tensor in (Readout.of(model).weight[20], Readout.of(model).bias, model.anatomy.final_norm.weight):
        with torch.no_grad():
            tensor.view(-1)[3] += 1e-6
        seen.add(Readout.of(model).hash())
    assert len(seen) == 4
    assert Readout.of(tiny_model("phi")).hash() in seen


def test_the_unembedding_is_not_copied() -> None:
    model = tiny_model("gpt2")
    assert Readout.of(model).weight.data_ptr() == model.anatomy.embedding.weight.data_ptr()
