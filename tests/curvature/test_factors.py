"""Kronecker factors against dense Fisher matrices, and that nothing but the rows decides them."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.curvature.dense_fisher import (
    EXACT,
    N_CARRYING,
    N_TARGETS,
    LeftPadded,
    drawn_label_gradient,
    fit_factors,
    jacobian,
    logits_of,
    relative,
    row_gradients,
    sampled_fisher,
    small_model,
    small_rows,
)
from tests.models.tiny_families import tiny_tokenizer
from torch import Tensor, nn

from palimpsest.curvature import factors as factors_module
from palimpsest.curvature import taps
from palimpsest.curvature.factors import Factors, add_gram
from palimpsest.curvature.modules import Matrix, matrices
from palimpsest.curvature.taps import uniforms
from palimpsest.data.batches import Encoded, collate
from palimpsest.models.anatomy import Anatomy
from palimpsest.models.language_model import LanguageModel
from palimpsest.models.workers import Workers


def kronecker(factors: Factors, owners: dict[str, str], name: str) -> Tensor:
    return torch.kron(factors.outputs[name], factors.inputs[owners[name]])


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_one_carrying_position_is_exact_and_seven_are_not(family: str) -> None:
    model, draws = small_model(family), 3
    errors = {}
    for n in (1, 7):
        rows = small_rows([(2, 1, 2)] * n)
        chosen, owners, factors = fit_factors(model, rows, draws=draws)
        gradients = row_gradients(model, rows, draws=draws)
        errors[n] = [
            relative(kronecker(factors, owners, m.name), sampled_fisher(gradients, [m.name], n * draws))
            for m in chosen
            # With one token to attend to, queries and keys move nothing: their curvature is zero, or rounding.
            if not any(part in m.name for part in ("q_proj", "k_proj"))
        ]
    assert max(errors[1]) < EXACT[family]
    assert min(errors[7]) > 0.05


def test_a_deep_linear_net_with_a_squared_loss_is_exact_and_one_with_tanh_is_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The Gauss-Newton matrix of |y|^2 / 2 is the mean of J'J; one draw for each output gives it without sampling."""

    def unit(logits: Tensor, draws: Tensor, out: Tensor) -> Tensor:
        return nn.functional.one_hot(draws.long(), logits.shape[1]).to(logits)

    monkeypatch.setattr(taps, "uniforms", lambda batch, seed, draw: torch.full((int(batch.targets.sum()),), draw))
    monkeypatch.setattr(taps, "sampled_label_gradient", unit)
    rows = small_rows([(length, 1, length) for length in (2, 5, 3, 4)])
    errors = {}
    for activation in (nn.Identity(), nn.Tanh()):
        model = pointwise_net(activation)
        chosen, owners, factors = fit_factors(model, rows, draws=WIDE)
        for matrix in chosen:
            slopes = torch.cat([jacobian(model, row, matrix.name) for row in rows])
            exact = (slopes.transpose(1, 2) @ slopes).mean(0)
            errors[type(activation), matrix.name] = relative(WIDE * kronecker(factors, owners, matrix.name), exact)
    assert len(errors) == 6
    assert max(error for (kind, _), error in errors.items() if kind is nn.Identity) < 1e-12
    assert errors[nn.Tanh, "blocks.0.map"] > 0.01


WIDE = 7


class _Pointwise(nn.Module):
    """Linear maps in a row, token by token, that can be asked like a language model."""

    def __init__(self, activation: nn.Module) -> None:
        super().__init__()
        self.config, self.dtype, self.device = SimpleNamespace(), torch.float64, torch.device("cpu")
        self.embedding = nn.Embedding(11, 4)
        self.blocks = nn.ModuleList(
            nn.ModuleDict({"map": nn.Linear(a, b, bias), "act": activation})
            for a, b, bias in [(4, 6, True), (6, 5, False), (5, 4, True)]
        )
        self.head = nn.Linear(4, WIDE)

    def get_output_embeddings(self) -> nn.Module:
        return self.head

    def forward(self, input_ids: Tensor, attention_mask: Tensor, use_cache: bool) -> SimpleNamespace:
        hidden = self.embedding(input_ids)
        for block in self.blocks:
            hidden = block["act"](block["map"](hidden))
        return SimpleNamespace(logits=self.head(hidden))


def pointwise_net(activation: nn.Module) -> LanguageModel:
    torch.manual_seed(0)
    network = _Pointwise(activation).double()
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.5)
    anatomy = Anatomy("toy", tuple(network.blocks), (), (), nn.Identity(), network.embedding, network.head, 1.0, None)
    return LanguageModel(network, tiny_tokenizer(), anatomy)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_input_factors_are_the_mean_over_carrying_positions(family: str) -> None:
    """Prompts counted, what follows the last target not; against what hooks see in one unpadded row at a time."""
    model, rows = small_model(family), small_rows()
    chosen, _, factors = fit_factors(model, rows)
    totals = {name: torch.zeros_like(factor) for name, factor in factors.inputs.items()}

    def see(matrix: Matrix, a: Tensor) -> None:
        a = torch.cat([a, torch.ones(len(a), 1)], 1) if matrix.has_bias else a
        totals[matrix.name] += torch.einsum("ti,tj->ij", a, a) / N_CARRYING

    for row in rows:
        handles = [
            m.module.register_forward_pre_hook(lambda _, inputs, m=m, stop=row.stop: see(m, inputs[0][0, : stop - 1]))
            for m in chosen
            if m.name in totals
        ]
        with torch.no_grad():
            logits_of(model.network, row)
        for handle in handles:
            handle.remove()
    for name, total in totals.items():
        assert relative(factors.inputs[name], total) < 1e-13
        assert torch.equal(factors.inputs[name], factors.inputs[name].T)


def test_a_prompt_of_any_length_is_seen_by_the_inputs_factor() -> None:
    """Rows that differ in a prompt token alone have other factors: prompts carry gradient through attention."""
    model = small_model()
    row = Encoded((3, 4, 5, 6, 7), 4, 5)
    other = Encoded((3, 8, 5, 6, 7), 4, 5)
    _, _, one = fit_factors(model, [row])
    _, _, two = fit_factors(model, [other])
    first = "transformer.h.0.attn.c_attn"
    assert relative(one.inputs[first], two.inputs[first]) > 0.05
    # While a token behind the last target is nothing to it.
    _, _, longer = fit_factors(model, [Encoded((*row.ids, 9, 10), 4, 5)])
    assert all(relative(longer.inputs[name], factor) < 1e-13 for name, factor in one.inputs.items())
    assert all(relative(longer.outputs[name], factor) < 1e-12 for name, factor in one.outputs.items())


def test_the_output_factor_converges_to_the_exact_fishers_as_one_over_the_root_of_draws() -> None:
    model, rows, name = small_model("gpt2", num_hidden_layers=1), small_rows(), "transformer.h.0.mlp.c_fc"
    exact = exact_output_factor(model, rows, name)
    error = {
        draws: np.sqrt(
            np.mean(
                [
                    relative(fit_factors(model, rows, [name], seed=seed, draws=draws)[2].outputs[name], exact) ** 2
                    for seed in range(repeats)
                ]
            )
        )
        for draws, repeats in ((1, 40), (10, 12), (100, 3))
    }
    assert 2.4 < error[1] / error[10] < 4.2
    assert 2.4 < error[10] / error[100] < 4.2
    assert error[100] < 0.15


def exact_output_factor(model: LanguageModel, rows: list[Encoded], name: str) -> Tensor:
    """1/M * sum over targets, their labels y and positions of p(y) g g', g the gradient of that one -log p(y)."""
    total, captured = 0.0, []
    handle = model.network.get_submodule(name).register_forward_hook(lambda _, inputs, output: captured.append(output))
    for row in rows:
        captured.clear()
        logits = logits_of(model.network, row)
        log_p = logits.log_softmax(-1)
        seeds = torch.eye(log_p.numel(), dtype=log_p.dtype).view(-1, *log_p.shape)
        (slopes,) = torch.autograd.grad(-log_p, captured, seeds, is_grads_batched=True)
        total = total + torch.einsum("y,ytm,ytn->mn", log_p.detach().exp().flatten(), slopes[:, 0], slopes[:, 0])
    handle.remove()
    return total / N_TARGETS


@pytest.mark.parametrize(
    ("family", "attention", "dtype", "tolerance"),
    [
        ("gpt2", "sdpa", torch.float64, 1e-12),
        ("gpt2", "eager", torch.float64, 1e-12),
        ("llama", "sdpa", torch.float64, 1e-12),
        # Its eager softmax is fp32 whatever the weights are, where the least float64 of a mask is minus infinity.
        ("llama", "eager", torch.float32, 1e-5),
    ],
)
def test_padding_side_and_batch_size_change_nothing(
    family: str, attention: str, dtype: torch.dtype, tolerance: float
) -> None:
    model, rows = small_model(family, attn_implementation=attention), small_rows()
    model.network.to(dtype)
    _, _, expected = fit_factors(model, rows, batch_size=1, draws=2)
    for workers in (Workers(), LeftPadded()):
        for batch_size in (2, 3, 4):
            _, _, found = fit_factors(model, rows, batch_size=batch_size, draws=2, workers=workers)
            for name, factor in expected.inputs.items():
                assert relative(found.inputs[name], factor) < tolerance
            for name, factor in expected.outputs.items():
                assert relative(found.outputs[name], factor) < tolerance


def test_draws_are_averaged() -> None:
    model, rows, draws = small_model(), small_rows(), 3
    _, _, several = fit_factors(model, rows, draws=draws)
    _, _, single = fit_factors(model, rows)
    by_row = [row_outputs(model, rows, draw) for draw in range(draws)]
    for name, factor in several.outputs.items():
        expected = sum(part[name] for part in by_row) / (N_TARGETS * draws)
        assert relative(factor, expected) < 1e-12
    assert all(torch.equal(factor, single.inputs[name]) for name, factor in several.inputs.items())


def row_outputs(model: LanguageModel, rows: list[Encoded], draw: int) -> dict[str, Tensor]:
    """Sum of g g' by matrix for one draw, by autograd on every output of every row."""
    totals: dict[str, Tensor] = {}
    outputs: dict[str, Tensor] = {}
    handles = [
        m.module.register_forward_hook(lambda _, inputs, output, m=m: outputs.update({m.name: output}))
        for m in matrices(model)
    ]
    for place, row in enumerate(rows):
        logits = logits_of(model.network, row)
        points = uniforms(collate([row], [place]), 0, draw).numpy()
        slopes = torch.autograd.grad(logits, list(outputs.values()), drawn_label_gradient(logits, points))
        for name, slope in zip(outputs, slopes, strict=True):
            totals[name] = totals.get(name, 0.0) + slope[0].T @ slope[0]
    for handle in handles:
        handle.remove()
    return totals


@given(
    width=st.integers(1, 23),
    n=st.integers(0, 9),
    blocks=st.integers(1, 5),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16]),
)
@settings(max_examples=80, deadline=None)
def test_a_gram_matrix_by_triangles_is_the_whole_one(width: int, n: int, blocks: int, dtype: torch.dtype) -> None:
    rows = torch.randn(n, width, generator=torch.Generator().manual_seed(width)).to(dtype)
    sum_type = torch.promote_types(dtype, torch.float32)
    exact = np.ones((width, width)) + rows.double().numpy().T @ rows.double().numpy()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(factors_module, "BLOCKS", blocks)
        for threshold in (width, width + 1):
            patch.setattr(factors_module, "TRIANGLE", threshold)
            total = torch.ones(width, width, dtype=sum_type)
            add_gram(total, rows)
            np.testing.assert_allclose(total.triu(), np.triu(exact), rtol=1e-5, atol=1e-5)


def test_triangles_are_made_whole_again(monkeypatch: pytest.MonkeyPatch) -> None:
    model, rows = small_model(), small_rows()
    _, _, expected = fit_factors(model, rows)
    monkeypatch.setattr(factors_module, "TRIANGLE", 1)
    _, _, found = fit_factors(model, rows)
    for whole, parts in ((expected.inputs, found.inputs), (expected.outputs, found.outputs)):
        assert all(relative(parts[name], factor) < 1e-14 for name, factor in whole.items())


def test_bf16_sums_do_not_stall() -> None:
    """512 batches of ones: a bf16 total would stop growing at 256."""
    total = torch.zeros(2, 2)
    for _ in range(512):
        add_gram(total, torch.ones(1, 2, dtype=torch.bfloat16))
    assert total.tolist() == [[512, 512], [512, 512]]


def test_factors_of_a_bf16_network_are_fp32_and_near_the_exact_ones() -> None:
    model, rows = small_model(), small_rows()
    _, _, exact = fit_factors(model, rows)
    model.network.to(torch.bfloat16)
    _, _, found = fit_factors(model, rows)
    for name, factor in exact.inputs.items():
        assert found.inputs[name].dtype == torch.float32
        assert relative(found.inputs[name].double(), factor) < 0.05
