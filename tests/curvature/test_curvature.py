"""The curvature as one object: fitted, solved with, and true of the model whatever way its weights are laid out."""

from copy import deepcopy

import numpy as np
import pytest
import torch
from tests.curvature.dense_fisher import (
    N_CARRYING,
    N_TARGETS,
    as_matrix,
    logits_of,
    relative,
    row_gradients,
    small_model,
    small_rows,
)
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from palimpsest.curvature.curvature import RetainCurvature
from palimpsest.curvature.quadratic import quadratic_form
from palimpsest.data.batches import Encoded, encode
from palimpsest.data.records import Passage
from palimpsest.errors import ModelError, SpecError
from palimpsest.models.anatomy import Anatomy
from palimpsest.models.language_model import LanguageModel

KINDS = ["kfac", "ekfac", "diagonal"]


def fit(model: LanguageModel, rows: list[Encoded] | None = None, **settings: object) -> RetainCurvature:
    return RetainCurvature.fit(model, rows or small_rows(), quiet=True, **settings)


def nll_gradient(model: LanguageModel, rows: list[Encoded]) -> dict[str, Tensor]:
    """The gradient of the mean NLL per target, by parameter."""
    model.network.zero_grad()
    mean_nll(model, rows).backward()
    gradient = {name: parameter.grad for name, parameter in model.network.named_parameters()}
    model.network.zero_grad()
    return gradient


def mean_nll(model: LanguageModel, rows: list[Encoded]) -> Tensor:
    logits = torch.cat([logits_of(model.network, row) for row in rows])
    return nn.functional.cross_entropy(
        logits, torch.tensor([token for row in rows for token in row.ids[row.start : row.stop]])
    )


@pytest.mark.parametrize("kind", KINDS)
def test_a_solve_is_the_dense_one_of_every_block_in_the_parameters_own_layout(kind: str) -> None:
    model = small_model("gpt2")
    curvature, gradient = fit(model, kind=kind), nll_gradient(model, small_rows(seed=1))
    n_parameters = sum(p.numel() for name, p in model.network.named_parameters() if ".c_" in name)
    dense = {}
    for name, block in curvature.blocks.items():
        m, d = block.spectrum.shape
        q = torch.kron(block.q_out, block.q_in) if kind != "diagonal" else torch.eye(m * d, dtype=torch.float64)
        dense[name] = q * block.spectrum.flatten() @ q.T
    mean = sum(matrix.trace() for matrix in dense.values()) / n_parameters
    assert curvature.mean_eigenvalue == pytest.approx(float(mean), rel=1e-12)
    solved = curvature.solve(gradient, 0.3)
    assert solved.keys() == {f"{name}.{part}" for name in dense for part in ("weight", "bias")}
    for name, matrix in dense.items():
        module = model.network.get_submodule(name)
        g = as_matrix(module, gradient[f"{name}.weight"], gradient[f"{name}.bias"])
        x = as_matrix(module, solved[f"{name}.weight"], solved[f"{name}.bias"])
        damped = matrix + 0.3 * mean * torch.eye(len(matrix), dtype=torch.float64)
        assert solved[f"{name}.weight"].shape == module.weight.shape
        assert relative(x, torch.linalg.solve(damped, g.flatten()).view_as(g)) < 1e-10


@pytest.mark.parametrize("kind", KINDS)
def test_gpt2s_conv1d_is_the_linear_map_that_it_is(kind: str) -> None:
    conv = small_model("gpt2")
    network = deepcopy(conv.network)
    for name, module in list(network.named_modules()):
        if isinstance(module, Conv1D):
            linear = nn.Linear(*module.weight.shape, dtype=torch.float64)
            linear.weight, linear.bias = nn.Parameter(module.weight.detach().T.contiguous()), module.bias
            parent, _, last = name.rpartition(".")
            setattr(network.get_submodule(parent), last, linear)
    linear_model = LanguageModel(network, conv.tokenizer, Anatomy.of(network))
    rows, forget = small_rows(), small_rows(seed=1)
    for row in rows:
        torch.testing.assert_close(logits_of(network, row), logits_of(conv.network, row), rtol=1e-12, atol=1e-12)
    one, other = fit(conv, kind=kind), fit(linear_model, kind=kind)
    assert one.blocks.keys() == other.blocks.keys() and len(one.blocks) == 8
    for name, block in one.blocks.items():
        w = torch.randn(block.spectrum.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        assert relative(other.blocks[name].apply(w), block.apply(w)) < 1e-12
    step, other_step = (
        curvature.solve(nll_gradient(model, forget), 0.1) for curvature, model in ((one, conv), (other, linear_model))
    )
    for name, change in step.items():
        assert relative(other_step[name].T if name.endswith("weight") else other_step[name], change) < 1e-9
    with torch.no_grad():
        for model, changes in ((conv, step), (linear_model, other_step)):
            for name, change in changes.items():
                model.network.get_parameter(name).add_(change, alpha=1e-2)
    for row in rows:
        torch.testing.assert_close(logits_of(network, row), logits_of(conv.network, row), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("kind", KINDS)
def test_batch_size_changes_nothing(kind: str) -> None:
    model = small_model("gpt2")
    expected = fit(model, kind=kind, batch_size=1, draws=2)
    for batch_size in (2, 4):
        found = fit(model, kind=kind, batch_size=batch_size, draws=2)
        assert (found.n_carrying, found.n_targets) == (expected.n_carrying, expected.n_targets)
        assert found.mean_eigenvalue == pytest.approx(expected.mean_eigenvalue, rel=1e-12)
        for name, block in expected.blocks.items():
            w = torch.randn(block.spectrum.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
            assert relative(found.blocks[name].apply(w), block.apply(w)) < 1e-9


def test_the_trace_of_ekfac_and_of_the_diagonal_is_the_fishers() -> None:
    model, rows = small_model("llama"), small_rows()
    gradients = row_gradients(model, rows)
    fitted = {kind: fit(model, kind=kind) for kind in KINDS}
    for name in fitted["kfac"].blocks:
        trace = float(gradients[name].square().sum()) / N_TARGETS
        assert fitted["ekfac"].blocks[name].trace == pytest.approx(trace, rel=1e-9)
        assert fitted["diagonal"].blocks[name].trace == pytest.approx(trace, rel=1e-9)
    assert fitted["kfac"].mean_eigenvalue == pytest.approx(fitted["ekfac"].mean_eigenvalue, rel=0.5)


@pytest.mark.parametrize("kind", KINDS)
def test_a_seed_is_the_same_labels_and_another_seed_is_others(kind: str) -> None:
    model = small_model("gpt2")
    one, again, other = (fit(model, kind=kind, seed=seed) for seed in (3, 3, 4))
    for name, block in one.blocks.items():
        assert torch.equal(again.blocks[name].spectrum, block.spectrum)
        assert relative(other.blocks[name].spectrum, block.spectrum) > 1e-3


def test_modules_choose_what_is_solved_for_and_what_the_mean_is_over() -> None:
    model = small_model("llama")
    whole, part = fit(model), fit(model, modules=["*.mlp.*"])
    assert [matrix.name for matrix in part.matrices] == [name for name in whole.blocks if ".mlp." in name]
    traces = {name: block.trace for name, block in whole.blocks.items() if ".mlp." in name}
    assert part.mean_eigenvalue == pytest.approx(sum(traces.values()) / (2 * 3 * 8 * 12), rel=1e-12)
    solved = part.solve(nll_gradient(model, small_rows(seed=1)), 1.0)
    assert solved.keys() == {f"{name}.weight" for name in traces}
    with pytest.raises(ModelError, match=r"'\*\.c_fc' matches none"):
        fit(model, modules=["*.c_fc"])


def test_damping_is_relative_so_that_the_logits_scale_is_no_matter() -> None:
    """A solve with curvature c F is 1/c of that with F at equal relative damping: no unit leaks into it."""
    model = small_model("gpt2")
    curvature, gradient = fit(model), nll_gradient(model, small_rows(seed=1))
    scaled = deepcopy(curvature)
    for name, block in scaled.blocks.items():
        out_values, in_values = block.eigenvalues
        scaled.blocks[name] = type(block)(block.q_out, block.q_in, (out_values * 50, in_values))
    for name, change in curvature.solve(gradient, 0.2).items():
        assert relative(scaled.solve(gradient, 0.2)[name] * 50, change) < 1e-10
    # And damping that outweighs all curvature leaves the gradient.
    for name, change in curvature.solve(gradient, 1e9).items():
        assert relative(change * 1e9 * curvature.mean_eigenvalue, gradient[name]) < 1e-5


@pytest.mark.parametrize("kind", ["kfac", "ekfac"])
def test_the_solve_climbs_further_than_the_gradient_for_what_it_truly_costs(kind: str) -> None:
    """By first-order gain at one price D'FD, both from the exact form; and the forget loss does rise."""
    model, rows, forget = small_model("gpt2"), small_rows([(8, 3, 8)] * 16), small_rows([(8, 3, 8)] * 4, seed=1)
    gradient = nll_gradient(model, forget)
    solved = fit(model, rows, kind=kind, draws=8).solve(gradient, 0.1)
    only = {name: gradient[name] for name in solved}

    def efficiency(direction: dict[str, Tensor]) -> float:
        gain = sum(float((direction[name] * slope).sum()) for name, slope in only.items())
        return gain / np.sqrt(quadratic_form(model, rows, direction))

    assert efficiency(solved) > 2 * efficiency(only) > 0
    before, size = mean_nll(model, forget).item(), np.sqrt(2e-4 / quadratic_form(model, rows, solved))
    with torch.no_grad():
        for name, change in solved.items():
            model.network.get_parameter(name).add_(change, alpha=size)
    predicted = size * sum(float((solved[name] * slope).sum()) for name, slope in only.items())
    assert mean_nll(model, forget).item() - before == pytest.approx(predicted, rel=0.25)


def test_records_are_encoded_as_for_scoring_and_counted() -> None:
    model = small_model("llama", vocab_size=48)
    passages = [Passage("w4 w9 w11 w30 w5", id="a"), Passage("w8 w7 w6", id="b")]
    from_text, from_tokens = (fit(model, texts) for texts in (passages, encode(passages, model.tokenizer)))
    assert from_text.n_targets == from_tokens.n_targets == 6
    assert all(torch.equal(from_text.blocks[n].spectrum, b.spectrum) for n, b in from_tokens.blocks.items())
    counted = fit(small_model("llama"))
    assert (counted.n_carrying, counted.n_targets) == (N_CARRYING, N_TARGETS)


def test_fp32_is_near_float64() -> None:
    model = small_model("gpt2")
    exact = fit(model, kind="ekfac")
    model.network.float()
    single = fit(model, kind="ekfac")
    for name, block in exact.blocks.items():
        assert single.blocks[name].spectrum.dtype == torch.float32
        assert single.blocks[name].trace == pytest.approx(block.trace, rel=1e-4)


def test_an_unknown_kind_is_refused_in_one_line() -> None:
    with pytest.raises(SpecError, match="curvature 'shampoo' is unknown; choose kfac, ekfac, diagonal"):
        fit(small_model(), kind="shampoo")
