"""Solves in the eigenbasis against dense linear algebra in numpy."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.curvature.dense_fisher import fit_factors, relative, small_model, small_rows
from torch import Tensor

from palimpsest.curvature import blocks as blocks_module
from palimpsest.curvature.blocks import Block, eigen
from palimpsest.curvature.curvature import kfac_blocks
from palimpsest.curvature.factors import Factors
from palimpsest.errors import TrainingError


def factor(size: int, rank: int, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """A random symmetric matrix with no negative eigenvalue."""
    root = torch.randn(size, rank, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return (root @ root.T / rank).to(dtype)


def kronecker_block(s: Tensor, a: Tensor) -> Block:
    (out_values, q_out), (in_values, q_in) = eigen(s, "s"), eigen(a, "a")
    return Block(q_out, q_in, (out_values, in_values))


def dense(block: Block) -> np.ndarray:
    """[m * d, m * d] Q diag(L) Q' written out."""
    m, d = block.spectrum.shape
    q_out = np.eye(m) if block.q_out is None else block.q_out.numpy()
    q_in = np.eye(d) if block.q_in is None else block.q_in.numpy()
    q = np.kron(q_out, q_in)
    return q @ np.diag(block.spectrum.numpy().ravel()) @ q.T


@given(
    m=st.integers(1, 6), d=st.integers(1, 6), rank=st.integers(1, 6), seed=st.integers(0, 999), power=st.integers(-6, 2)
)
@settings(max_examples=60, deadline=None)
def test_a_solve_is_the_dense_one_with_damping_on_the_product(m: int, d: int, rank: int, seed: int, power: int) -> None:
    s, a, damping = factor(m, rank, seed), factor(d, rank, seed + 1), 10.0**power
    w = torch.randn(m, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    damped = torch.kron(s, a) + damping * torch.eye(m * d, dtype=torch.float64)
    block = kronecker_block(s, a)
    found = block.solve(w, damping)
    expected = torch.from_numpy(np.linalg.solve(damped.numpy(), w.numpy().ravel()).reshape(m, d))
    # As exact as float64 allows: fewer digits by those of the condition number.
    assert relative(found, expected) < 1e-14 * np.linalg.cond(damped)
    size = torch.linalg.matrix_norm(damped, 2)
    assert (block.apply(found) + damping * found - w).norm() < 1e-13 * size * found.norm()
    assert (block.apply(w) - s @ w @ a).norm() < 1e-13 * size * w.norm()


@given(
    m=st.integers(1, 6), d=st.integers(1, 6), seed=st.integers(0, 999), spectral_power=st.sampled_from((0.1, 0.5, 0.9))
)
@settings(max_examples=60, deadline=None)
def test_a_spectral_power_acts_on_the_whitened_matrix(m: int, d: int, seed: int, spectral_power: float) -> None:
    s, a, damping = factor(m, m + 1, seed), factor(d, d + 1, seed + 1), 0.1
    w = torch.randn(m, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    block = kronecker_block(s, a)
    root = np.sqrt(block.spectrum.numpy() + damping)
    found = block.rotate(block.solve(w, damping, spectral_power)).numpy() * root
    whitened = block.rotate(w).numpy() / root
    left, values, right = np.linalg.svd(whitened, full_matrices=False)
    assert np.allclose(left.T @ found @ right.T, np.diag(values[0] * (values / values[0]) ** spectral_power), atol=1e-9)


def test_a_matrix_of_zeros_stays_one_at_any_spectral_power() -> None:
    block = kronecker_block(factor(3, 3, 0), factor(4, 4, 1))
    assert block.solve(torch.zeros(3, 4, dtype=torch.float64), 0.1, 0.5).abs().max() == 0


def test_damping_of_each_factor_is_another_operator() -> None:
    s, a, damping = factor(4, 6, 0), factor(5, 7, 1), 0.1
    w = torch.randn(4, 5, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    exact = torch.from_numpy(
        np.linalg.solve(np.kron(s.numpy(), a.numpy()) + damping * np.eye(20), w.numpy().ravel()).reshape(4, 5)
    )
    # Factored Tikhonov with the heuristic split of Martens & Grosse 2015, section 6.3.
    split = ((a.trace() / 5) / (s.trace() / 4)).sqrt()
    root = damping**0.5
    factored = torch.linalg.solve(s + root / split * torch.eye(4), w) @ torch.linalg.inv(
        a + root * split * torch.eye(5)
    )
    assert relative(kronecker_block(s, a).solve(w, damping), exact) < 1e-13
    assert relative(factored, exact) > 0.2


@pytest.mark.parametrize("kind", ["kfac", "ekfac", "diagonal"])
def test_every_kind_of_block_is_the_symmetric_matrix_it_says(kind: str) -> None:
    generator = torch.Generator().manual_seed(3)
    values = torch.rand(4, 5, generator=generator, dtype=torch.float64)
    kfac = kronecker_block(factor(4, 9, 0), factor(5, 9, 1))
    block = {
        "kfac": kfac,
        "ekfac": Block(kfac.q_out, kfac.q_in, values),
        "diagonal": Block(None, None, values),
    }[kind]
    matrix = dense(block)
    w = torch.randn(4, 5, generator=generator, dtype=torch.float64)
    damped = matrix + 0.3 * np.eye(20)
    np.testing.assert_allclose(block.apply(w).ravel(), matrix @ w.numpy().ravel(), rtol=0, atol=1e-13)
    np.testing.assert_allclose(block.solve(w, 0.3).ravel(), np.linalg.solve(damped, w.numpy().ravel()), atol=1e-12)
    np.testing.assert_allclose(block.unrotate(block.rotate(w)), w, rtol=0, atol=1e-14)
    assert block.trace == pytest.approx(np.trace(matrix), rel=1e-13)
    np.testing.assert_allclose(np.sort(block.spectrum.numpy().ravel()), np.linalg.eigvalsh(matrix), atol=1e-12)


def test_the_solves_direction_gains_most_for_its_cost() -> None:
    """At one price d'Fd = 2 eps no direction climbs g faster; it climbs by sqrt(2 eps g'F^-1 g)."""
    s, a, price = factor(4, 8, 5), factor(6, 9, 6), 2e-4
    generator = torch.Generator().manual_seed(7)
    g = torch.randn(4, 6, generator=generator, dtype=torch.float64)
    block = kronecker_block(s, a)
    fisher = torch.kron(s, a)

    def gain(directions: Tensor) -> Tensor:
        flat = directions.flatten(1)
        cost = ((flat @ fisher) * flat).sum(1)
        return flat @ g.flatten() * (price / cost).sqrt()

    best = gain(block.solve(g, 0.0)[None]).item()
    bound = (price * g.flatten() @ torch.linalg.solve(fisher, g.flatten())).sqrt().item()
    others = gain(torch.randn(20_000, 4, 6, generator=generator, dtype=torch.float64))
    assert best == pytest.approx(bound, rel=1e-9)
    assert best > others.max() > 0
    assert best > 1.5 * gain(g[None]).item() > 0
    nudged = block.solve(g, 0.0) + 0.05 * torch.randn(2000, 4, 6, generator=generator, dtype=torch.float64)
    assert best > gain(nudged).max()


def test_a_factor_without_full_rank_solves_to_something_finite() -> None:
    s, a = factor(5, 2, 0), torch.zeros(4, 4, dtype=torch.float64)
    a[0, 0] = 1e-30
    w = torch.randn(5, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    block = kronecker_block(s, a)
    assert (block.spectrum >= 0).all()
    # Where there is no curvature, damping alone decides.
    torch.testing.assert_close(block.solve(w, 1e-8), w * 1e8, rtol=1e-10, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_eigenvalues_are_never_negative_and_the_factor_is_put_together_again(dtype: torch.dtype) -> None:
    for size, rank in ((1, 1), (30, 3), (40, 60)):
        matrix = factor(size, rank, size, dtype)
        values, vectors = eigen(matrix, "f")
        accuracy = size * torch.finfo(dtype).eps * 10
        assert values.dtype == vectors.dtype == dtype
        assert (values >= 0).all() and (values.diff() >= 0).all()
        assert relative(vectors * values @ vectors.T, matrix) < accuracy
        assert (vectors.T @ vectors - torch.eye(size, dtype=dtype)).norm() < accuracy * size


@pytest.mark.parametrize("failure", ["imprecise", "raised"])
def test_an_fp32_decomposition_that_fails_is_made_in_fp64(failure: str, monkeypatch: pytest.MonkeyPatch) -> None:
    matrix, eigh, asked = factor(20, 40, 0, torch.float32), torch.linalg.eigh, []

    def bad_in_fp32(factor: Tensor) -> tuple[Tensor, Tensor]:
        asked.append(factor.dtype)
        if factor.dtype == torch.float32 and failure == "raised":
            raise torch.linalg.LinAlgError("did not converge")
        values, vectors = eigh(factor)
        return (values, vectors.roll(1, 1)) if factor.dtype == torch.float32 else (values, vectors)

    monkeypatch.setattr(blocks_module.torch.linalg, "eigh", bad_in_fp32)
    values, vectors = eigen(matrix, "f")
    assert asked == [torch.float32, torch.float64]
    assert values.dtype == vectors.dtype == torch.float32
    assert relative(vectors * values @ vectors.T, matrix) < 1e-6


def test_a_factor_that_is_not_finite_is_refused_by_name() -> None:
    for damage in (torch.nan, torch.inf):
        matrix = factor(3, 3, 0)
        matrix[1, 2] = damage
        with pytest.raises(TrainingError, match=r"a factor of h\.0\.mlp is not finite"):
            eigen(matrix, "h.0.mlp")


def test_kfac_blocks_are_the_factors_product_and_share_what_is_read() -> None:
    _, owners, factors = fit_factors(small_model("llama"), small_rows())
    blocks = kfac_blocks(Factors({**factors.inputs}, {**factors.outputs}), owners)
    assert blocks.keys() == factors.outputs.keys()
    for name, block in blocks.items():
        assert (block.spectrum >= 0).all()
        assert block.q_in is blocks[owners[name]].q_in
        expected = np.kron(factors.outputs[name].numpy(), factors.inputs[owners[name]].numpy())
        np.testing.assert_allclose(dense(block), expected, rtol=0, atol=1e-12 * np.abs(expected).max())
        assert block.trace == pytest.approx(np.trace(expected), rel=1e-12)


def test_fewer_tokens_than_inputs_leave_a_null_space_that_solves_to_something_finite() -> None:
    model, damping = small_model("gpt2"), 1e-6
    chosen, owners, factors = fit_factors(model, small_rows([(3, 2, 3)]))
    blocks = kfac_blocks(Factors({**factors.inputs}, {**factors.outputs}), owners)
    for matrix in chosen:
        block = blocks[matrix.name]
        assert torch.linalg.matrix_rank(factors.inputs[owners[matrix.name]]) <= 2 < matrix.shape[1]
        w = torch.randn(matrix.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        solved = block.solve(w, damping)
        assert torch.isfinite(solved).all() and relative(block.apply(solved) + damping * solved, w) < 1e-9
