"""Rounding against numpy row by row, its error bounds, NF4's published levels, and which weights are rounded."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from tests.models.tiny_families import EXPERT, tiny_model

from palimpsest.attacks.attack import linear_maps
from palimpsest.attacks.quantisation import (
    ROUNDINGS,
    nf4,
    nf4_levels,
    quantisation_attacks,
    quantised,
    round_to_nearest,
)
from palimpsest.errors import SpecError

PUBLISHED = [
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635),
    *(-0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634),
    *(0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
]
"""QLoRA, appendix E."""


def matrix(n_out: int, n_in: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(n_out, n_in, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("bits, group", [(8, None), (4, None), (4, 8), (3, 5), (2, 1)])
def test_rounding_is_numpys_group_by_group(bits: int, group: int | None) -> None:
    weights = matrix(6, 21)
    ours, steps = round_to_nearest(weights, bits, group=group).numpy(), {}
    for row, values in enumerate(weights.numpy().astype(np.float64)):
        for first in range(0, 21, group or 21):
            part = values[first : first + (group or 21)]
            steps[row, first] = step = np.abs(part).max() / (2 ** (bits - 1) - 1)
            np.testing.assert_allclose(ours[row, first : first + len(part)], np.rint(part / step) * step, atol=1e-6)
            assert (np.abs(ours[row, first : first + len(part)] - part) <= step / 2 * (1 + 1e-5)).all()
    assert len(steps) == 6 * -(-21 // (group or 21))


@settings(max_examples=40)
@given(st.integers(1, 5), st.integers(1, 40), st.integers(2, 8), st.integers(1, 50), st.floats(1e-6, 1e4))
def test_no_weight_moves_by_more_than_half_a_step(n_out: int, n_in: int, bits: int, group: int, size: float) -> None:
    weights = size * matrix(n_out, n_in, seed=n_in)
    weights[0] = 0.0
    rounded = round_to_nearest(weights, bits, group=group)
    assert torch.isfinite(rounded).all() and (rounded[0] == 0).all()
    largest = weights.abs().amax(1, keepdim=True)  # no group's step is larger than the row's
    assert ((weights - rounded).abs() <= largest / (2 ** (bits - 1) - 1) / 2 * (1 + 1e-5)).all()
    assert len(rounded[-1][: group or 1].unique()) <= 2**bits - 1
    torch.testing.assert_close(round_to_nearest(rounded, bits, group=group), rounded)  # nothing is left to round


def test_nf4_has_the_published_levels() -> None:
    levels = nf4_levels()
    np.testing.assert_allclose(levels.numpy(), PUBLISHED, atol=3e-7)
    assert levels[0] == -1 and levels[7] == 0 and levels[15] == 1  # exactly: both ends, and zero
    assert (levels.diff() > 0).all()
    offset = 1 - (1 / 32 + 1 / 30) / 2
    above, below = (stats.norm.ppf(np.linspace(offset, 0.5, n))[:-1] for n in (9, 8))
    expected = np.sort([*above, 0.0, *-below]) / stats.norm.ppf(offset)
    np.testing.assert_allclose(levels.numpy(), expected, atol=3e-7)


def test_nf4_takes_the_nearest_level_block_by_block() -> None:
    """Blocks of 10 through rows of 7: they cross rows, and the last is not full."""
    weights = matrix(5, 7)
    ours, flat = nf4(weights, block=10).numpy().ravel(), weights.numpy().astype(np.float64).ravel()
    for first in range(0, 35, 10):
        part = flat[first : first + 10]
        scale = np.abs(part).max()
        nearest = np.abs(part[:, None] / scale - np.array(PUBLISHED)).argmin(1)
        np.testing.assert_allclose(ours[first : first + 10], np.array(PUBLISHED)[nearest] * scale, atol=1e-6)
    widest = np.diff(PUBLISHED).max()
    assert (np.abs(ours - flat) <= widest / 2 * np.abs(flat).max() + 1e-6).all()
    assert (nf4(torch.zeros(2, 3)) == 0).all()


def test_more_bits_and_smaller_groups_are_nearer() -> None:
    weights = matrix(64, 256)
    errors = {name: float((rounding(weights) - weights).square().mean()) for name, (_, rounding) in ROUNDINGS.items()}
    assert errors["int8"] < errors["nf4"] < errors["int4_grouped"] * 1.2 < errors["int4"] * 1.2
    assert errors["int4_grouped"] < errors["int4"]


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox", "opt", *EXPERT])
def test_only_linear_maps_inside_the_blocks_are_rounded(family: str) -> None:
    """By rows of [out, in] also where the weight is stored the other way round; fused experts one by one."""
    model = tiny_model(family)
    before = model.fingerprint()
    rounded = quantised(model, "int4", ROUNDINGS["int4"][1])
    assert model.fingerprint() == before
    rows = [[len(row.unique()) for row in matrix] for matrix in linear_maps(rounded)]
    assert all(count <= 15 for counts in rows for count in counts)
    pairs = zip(model.network.named_parameters(), rounded.network.parameters(), strict=True)
    changed = {name for (name, old), new in pairs if not torch.equal(old, new)}
    kept = {name for name, _ in model.network.named_parameters()} - changed
    assert changed and all(any(part in name for part in ("attn", "attention", "mlp", "fc")) for name in changed)
    assert all(model.network.get_parameter(name).ndim >= 2 for name in changed)
    ends = {id(model.anatomy.embedding.weight), id(model.anatomy.unembedding.weight)}
    assert not ends & {id(model.network.get_parameter(name)) for name in changed}
    # What stays is an embedding, a norm, a bias or a router.
    left = [name for name in kept if model.network.get_parameter(name).ndim > 1]
    words = ("emb", "wte", "wpe", "lm_head", "mlp.gate.weight")
    assert all(any(word in name for word in words) for name in left), left


def test_a_matrix_in_bf16_is_rounded_in_fp32() -> None:
    model = tiny_model("llama")
    model.network.to(torch.bfloat16)
    rounded = quantised(model, "int8", ROUNDINGS["int8"][1])
    for old, new in zip(linear_maps(model), linear_maps(rounded), strict=True):
        assert torch.equal(new, round_to_nearest(old.float(), 8).bfloat16())


def test_attacks_round_and_leave_the_model_alone() -> None:
    model = tiny_model("llama")
    before = model.weights_hash()
    for attack in quantisation_attacks():
        with attack.on_model(model) as target:
            assert target.weights_hash() != before and target.name == f"model, {attack.name}"
    assert model.weights_hash() == before


def test_settings_that_make_no_sense_are_refused() -> None:
    for bits, group in ((1, None), (4, 0)):
        with pytest.raises(SpecError, match="quantisation"):
            round_to_nearest(matrix(2, 2), bits, group=group)
    with pytest.raises(SpecError, match="blocks of 0"):
        nf4(matrix(2, 2), block=0)
