"""The estimated Jacobians against autograd, one token and one coordinate at a time."""

import pytest
import torch
from tests.models.tiny_families import tiny_model, tiny_rows

from palimpsest.data.batches import collate
from palimpsest.lens import jacobian
from palimpsest.lens.hidden import read_layers
from palimpsest.lens.jacobian import mean_jacobians
from palimpsest.models.anatomy import Site
from palimpsest.models.hooks import Patch, capturing, patched
from palimpsest.models.inputs import forward_inputs


def double(family: str):
    model = tiny_model(family)
    model.network.double()
    return model


def exact(model, row, layer: int) -> torch.Tensor:
    """[d, d] mean over a row's tokens of d target / d state at the same token."""
    batch = collate([row], [0])
    states = next(read_layers(model, [row])).layers[layer]
    end, site = Site("resid", model.anatomy.n_layers - 1), Site("resid", layer - 1)

    def target(values: torch.Tensor) -> torch.Tensor:
        with patched(model.anatomy, {site: Patch(batch.attention, values)}):
            with capturing(model.anatomy, [end], batch.ids.shape, attached=True) as store:
                model.network(**forward_inputs(model.network, batch))
        return store[end][0]

    whole = torch.autograd.functional.jacobian(target, states)
    return torch.stack([whole[token, :, token] for token in range(len(states))]).mean(0)


@pytest.mark.parametrize("family", ["llama", "gpt2", "bloom", "gemma2"])
def test_the_estimate_has_the_exact_jacobian_as_its_mean(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, (row,) = double(family), tiny_rows(3)
    expected = torch.stack([exact(model, row, layer) for layer in range(model.anatomy.n_layers)])
    # With one coordinate of one token at a time in place of random vectors, the sum over all of them is exact.
    total = torch.zeros_like(expected)
    for token in range(3):
        for coordinate in range(16):
            one = torch.zeros(1, 3, 16)
            one[0, token, coordinate] = 1
            monkeypatch.setattr(jacobian, "MOST_DRAWS", 1)
            monkeypatch.setattr(jacobian, "_vectors", lambda *_, one=one: one)
            total += mean_jacobians(model, [row], seed=0)[0] + torch.eye(16)
    assert (total - expected).abs().max() < 1e-9 * expected.abs().max()


def test_many_random_vectors_come_near_it() -> None:
    model, (row,) = double("llama"), tiny_rows(3)
    found, _ = mean_jacobians(model, [row] * 4000, seed=1, batch_size=500)
    expected = exact(model, row, 2)
    assert (found[2] + torch.eye(16) - expected).abs().max() < 0.1 * expected.abs().max()


def test_few_tokens_are_gone_through_with_several_vectors(monkeypatch: pytest.MonkeyPatch) -> None:
    model, rows, seeds = double("llama"), tiny_rows(50, 50), []
    real = jacobian._vectors
    monkeypatch.setattr(jacobian, "_vectors", lambda *given: (seeds.append(given[-1]), real(*given))[1])
    mean_jacobians(model, rows, seed=2)
    assert len(seeds) == 16 and set(seeds) == set(range(32, 48))
    monkeypatch.setattr(jacobian, "ERROR", 0.2)  # 400 vectors for 100 tokens
    seeds.clear()
    mean_jacobians(model, rows, seed=2)
    assert seeds == list(range(32, 36))


def test_the_bias_makes_the_mean_state_the_mean_target() -> None:
    model, rows = double("llama"), tiny_rows(6, 4)
    changes, biases = mean_jacobians(model, rows, seed=0)
    hidden = next(read_layers(model, rows)).layers
    means = hidden.mean(1)
    for layer in range(model.anatomy.n_layers):
        assert torch.allclose(means[layer] + changes[layer] @ means[layer] + biases[layer], means[-1], atol=1e-9)


def test_batches_change_nothing_and_the_seed_does() -> None:
    model, rows = double("llama"), tiny_rows(6, 4, 5, 7)
    one, other = (mean_jacobians(model, rows, seed=0, batch_size=size)[0] for size in (1, 4))
    assert torch.allclose(one, other, atol=1e-9)
    assert not torch.allclose(one, mean_jacobians(model, rows, seed=1)[0], atol=1e-3)
    assert all(parameter.grad is None for parameter in model.network.parameters())
