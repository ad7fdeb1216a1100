"""Second moments in a basis against the dense Fisher matrix of the same sampled labels."""

from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.curvature.dense_fisher import (
    EXACT,
    N_TARGETS,
    LeftPadded,
    fit_factors,
    relative,
    row_gradients,
    sampled_fisher,
    silent,
    small_model,
    small_rows,
)
from tests.models.tiny_families import EXPERT, FAMILIES, tiny_model
from torch import Tensor

from palimpsest.curvature import moments as moments_module
from palimpsest.curvature.blocks import Block
from palimpsest.curvature.curvature import RetainCurvature, kfac_blocks
from palimpsest.curvature.modules import matrices
from palimpsest.curvature.moments import add_squares, collect_moments
from palimpsest.data.batches import Encoded
from palimpsest.models.language_model import LanguageModel
from palimpsest.models.workers import Workers


def fit_moments(
    model: LanguageModel,
    rows: Sequence[Encoded],
    basis: dict[str, Block],
    *,
    draws: int = 1,
    batch_size: int = 2,
    workers: Workers | None = None,
) -> dict[str, Tensor]:
    how = {"seed": 0, "draws": draws, "batch_size": batch_size, "workers": workers or Workers(), "ticker": silent()}
    return collect_moments(model, rows, matrices(model), basis, **how)


@pytest.mark.parametrize("draws", [1, 3])
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_ekfac_is_the_diagonal_of_the_dense_fisher_in_kfacs_basis(family: str, draws: int) -> None:
    model, rows = small_model(family), small_rows()
    chosen, owners, factors = fit_factors(model, rows, draws=draws)
    basis = kfac_blocks(factors, owners)
    moments = fit_moments(model, rows, basis, draws=draws)
    gradients = row_gradients(model, rows, draws=draws)
    closer = []
    for matrix in chosen:
        block, found = basis[matrix.name], moments[matrix.name]
        u = torch.kron(block.q_out, block.q_in)
        fisher = sampled_fisher(gradients, [matrix.name], N_TARGETS * draws)
        assert relative(found.flatten(), (u.T @ fisher @ u).diagonal()) < EXACT[family]
        assert relative(found.sum(), fisher.trace()) < EXACT[family]
        kfac_error = (u * block.spectrum.flatten() @ u.T - fisher).norm()
        ekfac_error = (u * found.flatten() @ u.T - fisher).norm()
        assert ekfac_error <= kfac_error * (1 + 1e-12)
        closer.append(float(ekfac_error / kfac_error))
    assert min(closer) < 0.9


@pytest.mark.parametrize("family", FAMILIES)
def test_the_diagonal_is_the_mean_square_of_autograds_gradients_in_every_family(family: str) -> None:
    model, rows = tiny_model(family), small_rows()
    if family not in EXPERT:  # grouped products have no float64
        model.network.double()
    curvature = RetainCurvature.fit(model, rows, kind="diagonal", batch_size=3, quiet=True)
    gradients = row_gradients(model, rows)
    for matrix in curvature.matrices:
        expected = gradients[matrix.name].square().sum(0) / N_TARGETS
        assert expected.max() > 0
        assert relative(curvature.blocks[matrix.name].spectrum, expected) < (1e-4 if family in EXPERT else 1e-12)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_padding_side_and_batch_size_change_no_moment(family: str) -> None:
    model, rows = small_model(family), small_rows()
    _, owners, factors = fit_factors(model, rows)
    basis = kfac_blocks(factors, owners)
    expected = fit_moments(model, rows, basis, batch_size=1)
    for workers in (Workers(), LeftPadded()):
        for batch_size in (2, 3, 4):
            found = fit_moments(model, rows, basis, batch_size=batch_size, workers=workers)
            for name, moment in expected.items():
                assert relative(found[name], moment) < 1e-12


@given(
    lengths=st.lists(st.integers(1, 5), min_size=1, max_size=6),
    same=st.booleans(),
    chunk=st.sampled_from([1, 30, 2**24]),
    seed=st.integers(0, 99),
)
@settings(max_examples=60, deadline=None)
def test_squares_of_rows_of_like_and_unlike_length(lengths: list[int], same: bool, chunk: int, seed: int) -> None:
    """Each row's matrix is squared, not each position's."""
    lengths = [lengths[0]] * len(lengths) if same else lengths
    generator = torch.Generator().manual_seed(seed)
    g = torch.randn(sum(lengths), 3, generator=generator, dtype=torch.float64)
    a = torch.randn(sum(lengths), 4, generator=generator, dtype=torch.float64)
    expected, first = torch.ones(3, 4, dtype=torch.float64), 0
    for length in lengths:
        for i in range(3):
            for j in range(4):
                expected[i, j] += sum(g[p, i] * a[p, j] for p in range(first, first + length)) ** 2
        first += length
    total = torch.ones(3, 4, dtype=torch.float64)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(moments_module, "CHUNK", chunk)
        add_squares(total, g, a, lengths)
    torch.testing.assert_close(total, expected, rtol=1e-12, atol=1e-12)
