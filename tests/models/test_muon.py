"""Muon in fp32 takes torch's steps, to bf16's rounding, and its orthogonalisation is the polynomial it says it is."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from palimpsest.models import muon as module
from palimpsest.models.muon import MuonInFp32, muon, orthogonalised

COEFFICIENTS = (3.4445, -4.775, 2.0315)


@given(rows=st.integers(1, 12), columns=st.integers(1, 12), seed=st.integers(0, 99))
def test_orthogonalising_maps_singular_values_by_the_polynomial(rows: int, columns: int, seed: int) -> None:
    matrix = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    left, values, right = np.linalg.svd(matrix.numpy(), full_matrices=False)
    values = values / np.sqrt((values**2).sum())
    a, b, c = COEFFICIENTS
    for _ in range(5):
        values = a * values + b * values**3 + c * values**5
    found = orthogonalised(matrix, COEFFICIENTS, 5, 1e-7, rounded=lambda each: each).numpy()
    np.testing.assert_allclose(found, (left * values) @ right, atol=1e-10)


@pytest.mark.parametrize("shape", [(24, 8), (8, 24), (16, 16)])
def test_its_steps_are_torchs_to_bf16s_rounding(shape: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(0)
    start, gradients = torch.randn(shape, generator=generator), torch.randn(6, *shape, generator=generator)
    ours, theirs = (torch.nn.Parameter(start.clone()) for _ in range(2))
    optimizers = [
        kind([matrix], lr=0.02, weight_decay=0.1) for kind, matrix in ((MuonInFp32, ours), (torch.optim.Muon, theirs))
    ]
    for gradient in gradients:
        for matrix, optimizer in zip((ours, theirs), optimizers, strict=True):
            matrix.grad = gradient.clone()
            optimizer.step()
    moved = (theirs - start).norm()
    assert (ours - theirs).norm() < 0.02 * moved
    states = [optimizer.state_dict()["state"][0] for optimizer in optimizers]
    assert torch.equal(states[0]["momentum_buffer"], states[1]["momentum_buffer"])


@pytest.mark.parametrize(("fast", "kind"), [(True, torch.optim.Muon), (False, MuonInFp32)])
def test_bf16_is_used_where_it_is_fast(monkeypatch: pytest.MonkeyPatch, fast: bool, kind: type) -> None:
    monkeypatch.setattr(module, "bf16_is_fast", lambda device: fast)
    assert type(muon([torch.zeros(2, 3)], 0.1, 0.0)) is kind


def test_a_closure_is_refused_and_a_matrix_without_gradient_is_left_alone() -> None:
    matrix = torch.nn.Parameter(torch.ones(2, 2))
    optimizer = MuonInFp32([matrix], lr=0.1)
    optimizer.step()
    assert torch.equal(matrix, torch.ones(2, 2)) and not optimizer.state_dict()["state"]
    with pytest.raises(ValueError, match="closure"):
        optimizer.step(lambda: None)
