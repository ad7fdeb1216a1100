"""Interventions and causal bases against brute force."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.lens.test_lens import random_lens
from tests.models.tiny_families import tiny_batch, tiny_model, tiny_rows
from torch import nn

from palimpsest.lens.alignment import aitchison_cosine, alignment
from palimpsest.lens.causal_basis import Calibration, calibration, causal_basis
from palimpsest.lens.hidden import read_layers
from palimpsest.lens.intervention import derangement, influence_in_the_model, mean_ablated, resampled, streams
from palimpsest.lens.lens import Lens
from palimpsest.lens.readout import Readout
from palimpsest.models.inputs import forward_inputs


def orthonormal(k: int, d: int, seed: int = 0) -> torch.Tensor:
    drawn = torch.randn(d, k, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return torch.linalg.qr(drawn).Q.T


def small_readout(d: int = 3, vocabulary: int = 7) -> Readout:
    weight = torch.randn(vocabulary, d, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return Readout(nn.Identity(), weight, None, 1.0, None, torch.float64, torch.float64)


def small_states(n: int = 60, d: int = 3) -> torch.Tensor:
    drawn = torch.randn(n, d, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    return drawn * torch.tensor([2.0, 0.3, 1.0], dtype=torch.float64)[:d] + 0.5


def kl_by_hand(logits: torch.Tensor, changed: torch.Tensor) -> float:
    p, q = logits.log_softmax(-1), changed.log_softmax(-1)
    return (p.exp() * (p - q)).sum(-1).mean().item()


def test_mean_ablation_leaves_the_mean_along_the_directions_and_all_else() -> None:
    hidden, vectors, mean = small_states(), orthonormal(2, 3), small_states().mean(0)
    changed = mean_ablated(hidden, vectors, mean)
    assert torch.allclose(changed @ vectors.T, (mean @ vectors.T).expand(60, 2))
    rest = torch.eye(3).double() - vectors.T @ vectors
    assert torch.allclose(changed @ rest, hidden @ rest)


def test_resampling_permutes_along_the_directions_and_leaves_all_else() -> None:
    hidden, vectors = small_states(), orthonormal(2, 3)
    changed = resampled(hidden, vectors, 3)
    assert torch.allclose((changed @ vectors.T).sort(0).values, (hidden @ vectors.T).sort(0).values)
    assert not torch.isclose(changed @ vectors.T, hidden @ vectors.T).all(1).any()
    rest = torch.eye(3).double() - vectors.T @ vectors
    assert torch.allclose(changed @ rest, hidden @ rest)


@given(st.integers(2, 40), st.integers(0, 999))
def test_a_derangement_moves_everything(n: int, seed: int) -> None:
    drawn = derangement(n, seed)
    assert sorted(drawn.tolist()) == list(range(n)) and not (drawn == torch.arange(n)).any()


def test_the_first_direction_is_the_best_of_all_on_the_sphere() -> None:
    """In three dimensions all of them can be tried."""
    readout, hidden = small_readout(), small_states()
    lens = Lens("logit", 2, readout.hash())
    basis = causal_basis(lens, readout, hidden, 0, k=3)
    tried = torch.randn(4000, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    tried = tried / tried.norm(dim=1, keepdim=True)
    logits, mean = readout.logits(hidden), hidden.mean(0)
    energies = [kl_by_hand(logits, readout.logits(mean_ablated(hidden, v[None], mean))) for v in tried]
    influence = basis.influence.mean(1)
    assert influence[0] >= max(energies) - 1e-9
    assert np.allclose(basis.vectors @ basis.vectors.T, np.eye(3), atol=1e-9)
    assert (influence.diff() <= 0).all()
    by_hand = [kl_by_hand(logits, readout.logits(mean_ablated(hidden, v[None], mean))) for v in basis.vectors]
    assert np.allclose(influence, by_hand, atol=1e-9)


def test_directions_do_not_depend_on_where_labels_fell() -> None:
    readout, hidden = small_readout(), small_states()
    lens = Lens("logit", 2, readout.hash())
    one, other = (causal_basis(lens, readout, hidden, 0, k=2, seed=seed).influence for seed in (0, 1))
    assert torch.allclose(one.mean(1), other.mean(1), rtol=1e-3)


@pytest.mark.parametrize("family", ["llama", "gpt2", "bloom", "gemma2"])
def test_where_the_final_norm_reads_lens_and_model_are_one(family: str) -> None:
    """So the influence in both is the same; the model's runs through its own hooks."""
    model, rows = tiny_model(family), tiny_rows(7, 5, 6)
    found = calibration(Lens.logit(model), model, rows, model.anatomy.n_layers, k=4)
    assert torch.allclose(found.in_lens, found.in_model, rtol=1e-3, atol=1e-6)
    assert found.ratio == pytest.approx(1, abs=1e-3) and found.spearman == pytest.approx(1)


@pytest.mark.parametrize("family", ["llama", "gpt2", "bloom", "falcon"])
@pytest.mark.parametrize("layer", [0, 2])
def test_a_stream_that_is_not_changed_ends_as_it_did_and_one_that_is_follows_the_model(family: str, layer: int) -> None:
    model, rows = tiny_model(family), tiny_rows(6, 6)
    (stream,) = streams(model, rows, layer)
    torch.testing.assert_close(stream.after(stream.hidden), stream.last, rtol=1e-4, atol=1e-5)
    swapped = stream.hidden.reshape(2, 6, -1).flip(0).reshape(12, -1)
    torch.testing.assert_close(
        stream.after(swapped), stream.last.reshape(2, 6, -1).flip(0).reshape(12, -1), rtol=1e-4, atol=1e-4
    )


def test_influence_in_the_model_by_hand() -> None:
    model, rows, layer = tiny_model("llama"), tiny_rows(6, 6), 1
    vectors, mean = orthonormal(2, 16).float(), torch.randn(16)
    found = influence_in_the_model(model, Readout.of(model), rows, layer, vectors, mean).mean(1)
    batch = tiny_batch(6, 6)
    with torch.no_grad():
        before = model.network(**forward_inputs(model.network, batch)).logits.flatten(0, 1)
        for vector, influence in zip(vectors, found, strict=True):
            handle = model.anatomy.blocks[layer].register_forward_pre_hook(
                lambda _, given, v=vector: (mean_ablated(given[0], v[None], mean), *given[1:])
            )
            after = model.network(**forward_inputs(model.network, batch)).logits.flatten(0, 1)
            handle.remove()
            assert influence.item() == pytest.approx(kl_by_hand(before, after), rel=1e-4)


def test_calibration_is_summed_influence_and_rank() -> None:
    in_lens, in_model = torch.tensor([[4.0], [2.0], [1.0]]), torch.tensor([[1.0], [2.0], [0.5]])
    found = Calibration(in_lens.double(), in_model.double(), torch.tensor([0]))
    assert found.ratio == pytest.approx(2.0) and found.spearman == pytest.approx(0.5)


def test_the_interval_of_a_ratio_resamples_texts() -> None:
    """Tokens of one text that are all alike count as one; a ratio that is the same in every text has no width."""
    generator = torch.Generator().manual_seed(0)
    in_model, row = torch.rand(2, 40, generator=generator, dtype=torch.float64), torch.arange(8).repeat_interleave(5)
    assert Calibration(3 * in_model, in_model, row).interval() == pytest.approx((3, 3))
    noise = torch.rand(8, generator=generator, dtype=torch.float64)[row]
    low, high = Calibration(in_model * noise, in_model, row).interval()
    assert low < Calibration(in_model * noise, in_model, row).ratio < high
    parted = Calibration(in_model * noise, in_model, torch.arange(40)).interval()
    assert high - low > parted[1] - parted[0]


# Stimulus and response.


def test_the_cosine_is_that_of_centred_log_ratios() -> None:
    rng = np.random.default_rng(0)
    left, right, weights = rng.normal(size=(3, 5)), rng.normal(size=(3, 5)), rng.dirichlet(np.ones(5), 3)
    found = aitchison_cosine(*(torch.tensor(part) for part in (left, right, weights)))
    for row, cosine in enumerate(found.tolist()):
        root = np.sqrt(weights[row])
        one, other = (root * (part[row] - weights[row] @ part[row]) for part in (left, right))
        assert cosine == pytest.approx(one @ other / np.linalg.norm(one) / np.linalg.norm(other))
    shifted = aitchison_cosine(torch.tensor(left + 7), torch.tensor(right), torch.tensor(weights))
    assert torch.allclose(found, shifted)


def test_a_lens_where_the_final_norm_reads_foresees_everything() -> None:
    model, rows = tiny_model("llama"), tiny_rows(7, 6)
    vectors = orthonormal(3, 16).float()
    end = alignment(Lens.logit(model), model, rows, model.anatomy.n_layers, vectors)
    assert len(end) == 13 and torch.allclose(end, torch.ones(13), atol=1e-4)
    before = alignment(random_lens(model), model, rows, 0, vectors)
    assert before.abs().max() <= 1 + 1e-5 and before.mean() < 0.9


def test_states_that_read_layers_gives_are_those_that_streams_changes() -> None:
    model, rows = tiny_model("llama"), tiny_rows(5)
    (stream,) = streams(model, rows, 1)
    assert torch.equal(stream.hidden, next(read_layers(model, rows)).layers[1])
