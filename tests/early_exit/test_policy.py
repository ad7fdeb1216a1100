"""The objective against numpy and against itself: exact, sampled, and by the recursion of optimal stopping."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import expit

from palimpsest.early_exit.policy import (
    Policy,
    exact_objective,
    hardness_weights,
    log_exit_probabilities,
    priced,
    reinforce_objective,
)

sizes = st.tuples(st.integers(1, 5), st.integers(2, 7), st.integers(0, 2**16))


def drawn(n: int, e: int, seed: int, scale: float = 2.0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    gates = scale * torch.randn(n, e - 1, generator=generator, dtype=torch.float64)
    return gates.requires_grad_(), torch.rand(n, e, generator=generator, dtype=torch.float64).requires_grad_()


@given(sizes)
def test_exit_probabilities_are_those_of_walking_down_the_exits(size: tuple[int, int, int]) -> None:
    n, e, _ = size
    gates, _ = drawn(*size)
    expected = np.zeros((n, e))
    for row, logits in enumerate(gates.detach().numpy()):
        reached = 1.0
        for exit in range(e):
            p = expit(logits[exit]) if exit < e - 1 else 1.0
            expected[row, exit] = reached * p
            reached *= 1 - p
    found = log_exit_probabilities(gates).exp().detach().numpy()
    np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(found.sum(1), 1)


def test_gates_that_are_sure_leave_finite_gradients() -> None:
    gates = torch.full((1, 40), 80.0, requires_grad=True)
    exact_objective(gates, torch.rand(1, 41)).backward()
    assert gates.grad is not None and gates.grad.isfinite().all()


@given(sizes)
def test_the_gradient_is_exit_now_minus_the_value_of_going_on(size: tuple[int, int, int]) -> None:
    n, e, _ = size
    gates, costs = drawn(*size)
    exact_objective(gates, costs).backward()
    p, c = expit(gates.detach().numpy()), costs.detach().numpy()
    for row in range(n):
        value, values = c[row, -1], np.zeros(e)
        for exit in range(e - 2, -1, -1):
            values[exit] = value  # of going on
            value = p[row, exit] * c[row, exit] + (1 - p[row, exit]) * value
        reached = np.cumprod([1.0, *(1 - p[row])])
        expected = [reached[t] * p[row, t] * (1 - p[row, t]) * (c[row, t] - values[t]) / n for t in range(e - 1)]
        np.testing.assert_allclose(gates.grad[row].numpy(), expected, atol=1e-12)
        used = np.append(reached[:-1] * p[row], reached[-1]) / n
        np.testing.assert_allclose(costs.grad[row].numpy(), used, atol=1e-12)


def test_reinforce_has_the_exact_gradient_on_average() -> None:
    gates, costs = drawn(3, 4, 0, scale=0.7)
    exact = torch.autograd.grad(exact_objective(gates, costs), (gates, costs))
    many, generator = 4000, torch.Generator().manual_seed(0)
    objective = reinforce_objective(gates.repeat(many, 1), costs.repeat(many, 1), generator, samples=4)
    sampled = torch.autograd.grad(objective, (gates, costs))
    for found, expected in zip(sampled, exact, strict=True):
        assert (found - expected).abs().max() < 0.03 * expected.abs().max()


def test_a_new_policy_makes_every_exit_as_likely() -> None:
    policy = Policy(6, 8)
    gates = policy(torch.randn(3, 5, 8), torch.zeros(3))
    torch.testing.assert_close(log_exit_probabilities(gates).exp(), torch.full((3, 6), 1 / 6))


@given(sizes)
@settings(max_examples=20)
def test_one_gate_gives_what_all_of_them_give(size: tuple[int, int, int]) -> None:
    n, e, seed = size
    policy = Policy(e, 8, seed=seed)
    torch.nn.init.normal_(policy.outer)
    states, price = torch.randn(n, e - 1, 8), torch.randn(n)
    gates = policy(states, price)
    for exit in range(e - 1):
        torch.testing.assert_close(policy.at(exit, states[:, exit], price), gates[:, exit])


@pytest.mark.parametrize("estimator", ["exact", "reinforce"])
@pytest.mark.parametrize(("price", "expected"), [(1e-4, 3), (10.0, 0)])
def test_time_for_nothing_buys_the_best_exit_and_dear_time_the_first(
    estimator: str, price: float, expected: int
) -> None:
    losses, times = torch.tensor([[2.0, 1.0, 0.5, 0.1, 0.2]]).repeat(64, 1), torch.arange(1, 6) / 5
    gates = torch.zeros(1, 4, requires_grad=True)
    optimizer, generator = torch.optim.Adam([gates], lr=0.2), torch.Generator().manual_seed(0)
    costs = priced(losses, torch.full((64,), price), times)
    for _ in range(200):
        every = gates.expand(64, 4)
        loss = exact_objective(every, costs) if estimator == "exact" else reinforce_objective(every, costs, generator)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert int(log_exit_probabilities(gates).argmax()) == expected


def test_hardness_spares_what_is_decided_late_and_only_the_papers_what_never_is() -> None:
    memorised, solved = torch.tensor([1, 4, 6, 6]), torch.tensor([True, True, True, False])
    assert hardness_weights(memorised, solved, 6, "none").tolist() == [1, 1, 1, 1]
    torch.testing.assert_close(hardness_weights(memorised, solved, 6, "memorized"), torch.tensor([5 / 6, 1 / 3, 0, 0]))
    torch.testing.assert_close(hardness_weights(memorised, solved, 6, "solvable"), torch.tensor([5 / 6, 1 / 3, 0, 1]))
