"""What a step costs: the quadratic form against the KL itself, dense Jacobians and dense sampled Fisher matrices."""

import numpy as np
import pytest
import torch
from tests.curvature.dense_fisher import (
    EXACT,
    N_TARGETS,
    exact_fisher,
    logits_of,
    relative,
    row_gradients,
    sampled_fisher,
    small_model,
    small_rows,
)
from tests.models.tiny_families import n_hooks
from torch import Tensor, nn

from palimpsest.curvature.modules import matrices
from palimpsest.curvature.quadratic import coupling, quadratic_form
from palimpsest.curvature.taps import sampled_label_gradient
from palimpsest.data.batches import Encoded
from palimpsest.models.language_model import LanguageModel

DENSE_PARTS = {"gpt2": ["*.c_fc", "*.h.1.attn.c_proj"], "llama": ["*.down_proj", "*.layers.0.self_attn.q_proj"]}


def random_directions(model: LanguageModel, patterns: list[str], k: int = 1, seed: int = 0) -> list[dict[str, Tensor]]:
    """k directions [out, in] by matrix, each matrix's as long as its weights are and so of unlike size."""
    generator = torch.Generator().manual_seed(seed)
    return [
        {
            m.name: torch.randn(m.shape, generator=generator, dtype=torch.float64) * (0.1 + place)
            for place, m in enumerate(matrices(model, patterns))
        }
        for _ in range(k)
    ]


def flat(direction: dict[str, Tensor]) -> Tensor:
    return torch.cat([part.flatten() for part in direction.values()])


def tangent(model: LanguageModel, direction: dict[str, Tensor]) -> dict[str, Tensor]:
    parts = [m.scatter(direction[m.name]) for m in matrices(model) if m.name in direction]
    return {name: value for part in parts for name, value in part.items()}


def moved(model: LanguageModel, direction: dict[str, Tensor], size: float) -> LanguageModel:
    other = model.copy()
    with torch.no_grad():
        for name, change in tangent(model, direction).items():
            other.network.get_parameter(name).add_(size * change)
    return other


def mean_kl(one: LanguageModel, other: LanguageModel, rows: list[Encoded]) -> float:
    """KL(one || other) in nats per target, float64."""
    total = 0.0
    with torch.no_grad():
        for row in rows:
            p, q = (logits_of(model.network, row).log_softmax(-1) for model in (one, other))
            total += float((p.exp() * (p - q)).sum())
    return total / N_TARGETS


def test_fisher_over_all_labels_is_the_gauss_newton_matrix_of_the_kl() -> None:
    """sum of p(y) g g' over labels, g as the library makes it, is the Hessian of KL(here || there) at here."""
    torch.manual_seed(0)
    x, (w1, w2) = torch.randn(3, 4).double(), (torch.randn(5, 4).double(), torch.randn(6, 5).double())
    parameters = torch.cat([w1.flatten(), w2.flatten()]).requires_grad_()

    def logits(vector: Tensor) -> Tensor:
        return torch.tanh(x @ vector[:20].view(5, 4).T) @ vector[20:].view(6, 5).T

    here = logits(parameters).detach().log_softmax(-1)
    hessian = torch.autograd.functional.hessian(
        lambda vector: nn.functional.kl_div(logits(vector).log_softmax(-1), here, log_target=True, reduction="sum"),
        parameters.detach(),
    )
    p, fisher = here.exp(), torch.zeros_like(hessian)
    middles = p.cumsum(-1) - p / 2  # in the middle of each label's interval
    for label in range(6):
        predicted = logits(parameters)
        drawn = sampled_label_gradient(predicted, middles[:, label])
        assert torch.equal(drawn.argmin(-1), torch.full((3,), label))
        for position in range(3):
            only = torch.zeros_like(drawn)
            only[position] = drawn[position]
            (slope,) = torch.autograd.grad(predicted, parameters, only, retain_graph=True)
            fisher += p[position, label] * torch.outer(slope, slope)
    assert relative(fisher, hessian) < 1e-12


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_the_form_is_the_dense_gauss_newton_matrixs(family: str) -> None:
    model, rows, parts = small_model(family), small_rows(), DENSE_PARTS[family]
    fisher = exact_fisher(model, rows, [m.name for m in matrices(model, parts)])
    for direction in random_directions(model, parts, k=3):
        d = flat(direction)
        expected = float(d @ fisher @ d)
        for batch_size in (1, 3):
            found = quadratic_form(model, rows, tangent(model, direction), batch_size=batch_size)
            assert found == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_the_kl_of_a_small_step_is_half_the_form_in_both_directions(family: str) -> None:
    model, rows = small_model(family), small_rows()
    (direction,) = random_directions(model, ["*"])
    form = quadratic_form(model, rows, tangent(model, direction))
    unit = form**-0.5  # a step of KL about size^2 / 2

    def off(size: float, *, backward: bool = False) -> float:
        other = moved(model, direction, size * unit)
        kl = mean_kl(other, model, rows) if backward else mean_kl(model, other, rows)
        return kl / (size**2 / 2) - 1

    for backward in (False, True):
        errors = [off(size, backward=backward) for size in (0.004, 0.002, 0.001)]
        assert abs(errors[-1]) < 0.01
        assert errors[0] / errors[1] == pytest.approx(2, rel=0.02)
        assert errors[1] / errors[2] == pytest.approx(2, rel=0.02)
    # The first order of the error falls out of the difference to both sides.
    size = 0.004
    both = sum(mean_kl(model, moved(model, direction, sign * size * unit), rows) for sign in (1, -1))
    assert both / (size * unit) ** 2 == pytest.approx(form, rel=1e-3)
    assert abs(both / size**2 - 1) < abs(off(size)) / 20


@pytest.mark.parametrize("draws", [1, 2])
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_coupling_is_the_dense_fishers_of_the_same_labels(family: str, draws: int) -> None:
    model, rows = small_model(family), small_rows()
    chosen = matrices(model)
    directions = random_directions(model, ["*"], k=3)
    directions[1] = {name: part for name, part in directions[1].items() if "h.0" in name or "layers.0" in name}
    gradients = row_gradients(model, rows, seed=5, draws=draws)
    fisher = sampled_fisher(gradients, [m.name for m in chosen], N_TARGETS * draws)
    d = torch.stack([flat({m.name: part.get(m.name, torch.zeros(m.shape)) for m in chosen}) for part in directions])
    expected = d @ fisher @ d.T
    for batch_size in (1, 2, 4):
        found = coupling(model, rows, chosen, directions, seed=5, draws=draws, batch_size=batch_size)
        assert found.shape == (3, 3) and relative(found, found.T) < 1e-14
        assert ((found - expected).abs() < EXACT[family] * expected.diagonal().max()).all()


def test_coupling_converges_to_the_form_as_one_over_the_root_of_draws() -> None:
    model, rows = small_model("gpt2", num_hidden_layers=1), small_rows()
    directions = random_directions(model, ["*"], k=2)
    exact = [quadratic_form(model, rows, tangent(model, direction)) for direction in directions]
    together = {name: part + directions[1][name] for name, part in directions[0].items()}
    cross = (quadratic_form(model, rows, tangent(model, together)) - sum(exact)) / 2
    expected = torch.tensor([[exact[0], cross], [cross, exact[1]]], dtype=torch.float64)
    scale = expected.diagonal().sqrt()
    errors = {
        draws: torch.stack(
            [
                (coupling(model, rows, matrices(model), directions, seed=seed, draws=draws) - expected)
                / torch.outer(scale, scale)
                for seed in range(repeats)
            ]
        )
        for draws, repeats in ((1, 60), (16, 20))
    }
    ratio = errors[1].square().mean(0).sqrt() / errors[16].square().mean(0).sqrt()
    assert ((ratio > 2.5) & (ratio < 6.4)).all()
    # And it is right on average: within three standard errors of every entry, off the diagonal too.
    mean, deviation = errors[16].mean(0), errors[16].std(0) / np.sqrt(20)
    assert (mean.abs() < 3 * deviation).all()


def test_blocks_alone_underestimate_what_a_joint_step_costs() -> None:
    """Every matrix up one gradient: the cross terms are positive and outweigh the blocks."""
    model, rows = small_model("llama"), small_rows()
    loss = sum(
        nn.functional.cross_entropy(logits_of(model.network, row), torch.tensor(row.ids[row.start : row.stop]))
        for row in rows
    )
    loss.backward()
    gradient = {name: p.grad for name, p in model.network.named_parameters()}
    chosen = matrices(model)
    each = [{m.name: m.gather(gradient)} for m in chosen]
    model.network.zero_grad()
    form = coupling(model, rows, chosen, each, draws=20)
    joint = quadratic_form(model, rows, {n: t for m in chosen for n, t in m.scatter(m.gather(gradient)).items()})
    assert form.sum() == pytest.approx(joint, rel=0.3)
    assert form.sum() > 2 * form.trace()


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_the_form_leaves_the_model_as_it_was(family: str) -> None:
    model, rows = small_model(family), small_rows()
    (direction,) = random_directions(model, ["*"])
    before, kernel = model.weights_hash(), model.network.config._attn_implementation
    assert kernel == "sdpa"
    model.network.train()
    quadratic_form(model, rows, tangent(model, direction))
    coupling(model, rows, matrices(model), [direction])
    with pytest.raises(IndexError):
        quadratic_form(model, [Encoded((3, 10_000), 1, 2)], tangent(model, direction))
    assert model.weights_hash() == before and model.network.training
    assert model.network.config._attn_implementation == kernel
    assert n_hooks(model.network) == 0
    assert all(p.requires_grad and p.grad is None for p in model.network.parameters())
