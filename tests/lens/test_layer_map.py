"""The steps' gradient against autograd, and that they go down."""

import numpy as np
import pytest
import torch
from tests.models.tiny_families import WIDTH, tiny_model
from torch.nn import functional as F

from palimpsest.curvature.factors import with_ones
from palimpsest.lens.layer_map import RATE, LayerMap, divergence, slope
from palimpsest.lens.readout import Readout


def readout_of(family: str) -> Readout:
    model = tiny_model(family)
    model.network.double()
    return Readout.of(model)


def states(n: int, seed: int) -> torch.Tensor:
    return torch.randn(n, WIDTH, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2", "cohere"])
def test_the_slope_is_that_of_autograd_through_norm_and_vocabulary(family: str) -> None:
    readout, hidden, last = readout_of(family), states(9, 0), states(9, 1)
    teacher = readout.teacher(last)
    map = (0.1 * states(WIDTH, 2)).new_zeros(WIDTH, WIDTH + 1).normal_(0, 0.1).requires_grad_()
    p = readout.logits(teacher.z).log_softmax(-1)
    q = readout.logits(readout.z(hidden + with_ones(hidden) @ map.T)).log_softmax(-1)
    expected = F.kl_div(q, p, reduction="none", log_target=True).sum(-1)
    (gradient,) = torch.autograd.grad(expected.sum(), map)
    assert (slope(map.detach(), hidden, readout, teacher) - gradient).abs().max() < 1e-10
    assert (divergence(map.detach(), hidden, readout, teacher) - expected).abs().max() < 1e-10


def test_steps_go_down_to_a_teacher_that_is_a_map_of_the_states() -> None:
    readout, hidden = readout_of("llama"), states(600, 0)
    truth = torch.cat([0.3 * states(WIDTH, 3), states(WIDTH, 4)[:, :1]], 1)
    teacher = readout.teacher(hidden + with_ones(hidden) @ truth.T)
    scores = readout.sampled(teacher.z, torch.rand(600, generator=torch.Generator().manual_seed(5)))
    layer = LayerMap.start(torch.zeros(WIDTH, WIDTH + 1, dtype=torch.float64), hidden, readout, scores, damping=0.2)
    before = divergence(layer.map, hidden, readout, teacher).mean()
    for step in range(60):
        layer.step(slope(layer.map, hidden, readout, teacher) / 600, average=step >= 50)
    assert divergence(layer.averaged, hidden, readout, teacher).mean() < 0.02 * before
    assert layer.n_summed == 10


def test_a_step_is_the_gradient_through_both_damped_moments() -> None:
    """By numpy, and so: along directions that hardly vary, or hardly matter, a map hardly moves."""
    readout, hidden = readout_of("llama"), states(300, 0) * torch.logspace(-2, 1, WIDTH, dtype=torch.float64)
    scores = readout.sampled(readout.z(hidden), torch.rand(300, generator=torch.Generator().manual_seed(5)))
    start, gradient = torch.zeros(WIDTH, WIDTH + 1, dtype=torch.float64), states(WIDTH + 1, 6).T.contiguous()
    layer = LayerMap.start(start, hidden, readout, scores, damping=2.0)
    layer.step(gradient, average=False)
    residual = hidden.clone().requires_grad_()
    (given,) = torch.autograd.grad((readout.z(residual) * scores).sum(), residual)
    sides = []
    for rows in (given.numpy(), np.concatenate([hidden.numpy(), np.ones((300, 1))], 1)):
        moment = rows.T @ rows / 300
        sides.append(np.linalg.inv(moment + 2.0 * np.trace(moment) / len(moment) * np.eye(len(moment))))
    assert np.allclose(layer.map.numpy(), -RATE * sides[0] @ gradient.numpy() @ sides[1], rtol=1e-9, atol=1e-15)
    moved = layer.map.norm(dim=0)
    assert moved[0] / gradient[:, 0].norm() > 5 * moved[WIDTH - 1] / gradient[:, WIDTH - 1].norm()


def test_before_anything_is_averaged_the_latest_stands() -> None:
    map = torch.randn(2, 3)
    layer = LayerMap(map, torch.eye(3), torch.eye(2), torch.zeros(2, 3))
    layer.step(torch.zeros(2, 3), average=False)
    assert torch.equal(layer.averaged, map)
