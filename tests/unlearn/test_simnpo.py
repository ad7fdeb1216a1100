"""SimNPO's loss and gradient against float64 transcriptions of Fan et al. 2024, equation 4."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from toy_request import answer_logprobs, draw_weights, toy_model, toy_request, true_logprobs

from palimpsest.data import batches
from palimpsest.errors import SpecError
from palimpsest.unlearn.gradient_ascent import GradientAscent
from palimpsest.unlearn.request import Request
from palimpsest.unlearn.simnpo import SimNPO, simnpo_loss

REQUEST = toy_request()
FORGET, RETAIN = REQUEST.forget, REQUEST.retain
START, NOW = toy_model(), toy_model()
draw_weights(NOW, seed=5, size=0.1)
ALL = {"batch_size": len(FORGET)}


def simnpo(records, beta, gamma):
    """-2/beta log sigmoid(x) with x = -(beta/|y|) log p - gamma, written as 2/beta log(1 + exp(-x))."""
    terms = []
    for record in records:
        logprobs = true_logprobs(NOW, record)
        x = -beta / len(logprobs) * logprobs.sum() - gamma
        terms.append(2 / beta * math.log1p(math.exp(-x)))
    return np.mean(terms)


def kept_nll():
    return -np.concatenate([true_logprobs(NOW, record) for record in RETAIN]).mean()


def kept_kl():
    divergences = []
    for record in RETAIN:
        (p, _), (q, _) = answer_logprobs(START, record), answer_logprobs(NOW, record)
        divergences.append((np.exp(p) * (p - q)).sum(-1))
    return np.concatenate(divergences).mean()


def loss_now(method, step=0, start=START):
    """The loss at NOW's weights of a run that started from `start`."""
    model = start.copy()
    objective = method.objective(model, REQUEST)
    model.network.load_state_dict(NOW.network.state_dict())
    return objective(step)


PARITY = {
    "default": (SimNPO(**ALL), lambda: simnpo(FORGET, 4.5, 0) + 8 * kept_nll()),
    "with a margin": (
        SimNPO(beta=0.7, gamma=1.5, retain_weight=0.5, **ALL),
        lambda: simnpo(FORGET, 0.7, 1.5) + 0.5 * kept_nll(),
    ),
    "KL": (
        SimNPO(beta=0.1, gamma=0.2, retain_weight=2, retain_term="kl", **ALL),
        lambda: simnpo(FORGET, 0.1, 0.2) + 2 * kept_kl(),
    ),
    "unkept": (SimNPO(beta=2.5, retain_weight=0, **ALL), lambda: simnpo(FORGET, 2.5, 0)),
}


@pytest.mark.parametrize("name", PARITY)
def test_loss_is_its_formula(name):
    method, expected = PARITY[name]
    assert loss_now(method).item() == pytest.approx(expected(), rel=2e-5, abs=2e-5)


def test_an_epoch_of_single_rows_gives_every_rows_own_loss():
    method = SimNPO(beta=0.7, gamma=1.0, retain_weight=0, batch_size=1)
    found = sorted(loss_now(method, step).item() for step in range(len(FORGET)))
    np.testing.assert_allclose(found, sorted(simnpo([record], 0.7, 1.0) for record in FORGET), rtol=2e-5)


def test_padding_on_the_left_moves_no_loss(monkeypatch):
    method = SimNPO(beta=0.7, gamma=1.0, **ALL)
    plain, collate = loss_now(method).item(), batches.collate
    monkeypatch.setattr(batches, "collate", lambda rows, places: collate(rows, places, pad_id=9, side="left"))
    assert loss_now(method).item() == pytest.approx(plain, rel=1e-5)


def test_where_the_run_started_is_no_part_of_the_loss():
    method = SimNPO(beta=0.7, **ALL)
    assert loss_now(method, start=START).item() == loss_now(method, start=NOW).item()


@pytest.mark.parametrize(("beta", "gamma"), [(0.01, 0.0), (0.3, 0.0), (0.7, 3.0)])
def test_its_gradient_is_ascent_on_each_answers_nll_a_token_less_where_it_is_gone(beta, gamma):
    model = NOW.copy()
    SimNPO(beta=beta, gamma=gamma, retain_weight=0, **ALL).objective(model, REQUEST)(0).backward()
    found = {name: value.grad.clone() for name, value in model.network.named_parameters()}
    model.network.zero_grad()
    for record in FORGET:
        mean = true_logprobs(NOW, record).mean()
        weight = 2 / (1 + math.exp(-beta * mean - gamma)) / len(FORGET)
        ascent = GradientAscent(batch_size=1).objective(model, Request((record,), RETAIN, RETAIN, RETAIN))(0)
        (weight * ascent).backward()
    assert any(gradient.abs().max() > 1e-4 for gradient in found.values())
    for name, value in model.network.named_parameters():
        torch.testing.assert_close(found[name], value.grad, rtol=2e-4, atol=1e-6)


@given(
    st.lists(st.floats(-300, 0), min_size=1, max_size=6),
    st.floats(0.01, 10.0),
    st.floats(-5.0, 5.0),
)
@settings(deadline=None, max_examples=80)
def test_the_loss_is_exact_and_its_slope_the_sigmoid_for_any_answers(logprobs, beta, gamma):
    rows = torch.tensor(logprobs, dtype=torch.float64, requires_grad=True)
    loss = simnpo_loss(rows, beta, gamma)
    loss.backward()
    x = beta * np.array(logprobs) + gamma
    assert loss.item() == pytest.approx(np.mean(2 / beta * np.logaddexp(0, x)), rel=1e-9, abs=1e-12)
    np.testing.assert_allclose(
        rows.grad.numpy(), 2 * np.exp(-np.logaddexp(0, -x)) / len(logprobs), rtol=1e-9, atol=1e-300
    )


def test_a_margin_goes_on_pushing_where_there_would_be_next_to_no_push():
    def push(gamma):
        gone = torch.tensor([-3.0], requires_grad=True)
        simnpo_loss(gone, 4.5, gamma).backward()
        return gone.grad.item()

    assert push(0.0) < 1e-5 < 1e-2 < push(9.0)


@pytest.mark.parametrize("beta", [0, -1.0, math.nan])
def test_a_beta_that_makes_no_loss_is_refused(beta):
    with pytest.raises(SpecError, match=f"^simnpo: beta is {beta}; it must be above 0$"):
        SimNPO(beta=beta)
