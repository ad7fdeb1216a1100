"""NPO with SAM: value and gradient at the perturbed weights, written out by hand in float64."""

import math

import pytest
import torch
from torch import Tensor
from toy_request import draw_weights, same_weights, toy_model, toy_request, weights_of

from palimpsest.models.language_model import LanguageModel
from palimpsest.unlearn.gradient_ascent import GradientDifference
from palimpsest.unlearn.npo import NPO
from palimpsest.unlearn.npo_sam import NPOSAM, sharpness_aware

REQUEST = toy_request()
ALL = {"batch_size": len(REQUEST.forget)}


def answer_logprob(model: LanguageModel, record) -> Tensor:
    """Of the whole answer: one unpadded row through the plain forward pass."""
    prompt = model.tokenizer(f"Question: {record.question}\nAnswer:")["input_ids"]
    ids = torch.tensor([model.tokenizer(f"Question: {record.question}\nAnswer: {record.answer}")["input_ids"]])
    logprobs = model.network(ids).logits[0].log_softmax(-1)
    return logprobs[range(len(prompt) - 1, ids.shape[1] - 1), ids[0, len(prompt) :]].sum()


def double(model: LanguageModel) -> LanguageModel:
    model.network.double()
    return model


def gradients(loss: Tensor, model: LanguageModel) -> dict[str, Tensor]:
    model.network.zero_grad()
    loss.backward()
    return {name: value.grad.clone() for name, value in model.network.named_parameters()}


@pytest.mark.parametrize(("rho", "beta"), [(0.05, 0.1), (1.0, 0.7)])
def test_value_and_gradient_are_those_of_npo_at_the_worst_point_nearby(rho, beta):
    start, model = double(toy_model()), double(toy_model())
    objective = NPOSAM(rho=rho, beta=beta, retain_weight=0, **ALL).objective(model, REQUEST)
    with torch.no_grad():
        before = {record.id: answer_logprob(start, record) for record in REQUEST.forget}
    draw_weights(model, seed=5, size=0.1)
    weights = weights_of(model)
    loss = objective(0)
    found = gradients(loss, model)
    assert same_weights(weights_of(model), weights)

    def npo() -> Tensor:
        ratios = [answer_logprob(model, record) - before[record.id] for record in REQUEST.forget]
        return sum(2 / beta * torch.log1p(torch.exp(beta * ratio)) for ratio in ratios) / len(ratios)

    uphill = gradients(npo(), model)
    norm = math.sqrt(sum(value.square().sum().item() for value in uphill.values()))
    with torch.no_grad():
        for name, value in model.network.named_parameters():
            value.add_(uphill[name], alpha=rho / norm)
    worst = npo()
    # The start model's log-probabilities are kept in fp32.
    assert loss.item() == pytest.approx(worst.item(), rel=1e-5)
    for name, value in gradients(worst, model).items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-7)


def test_a_vanishing_radius_is_npo():
    def slopes(method):
        model = toy_model()
        objective = method.objective(model, REQUEST)
        draw_weights(model, seed=5, size=0.1)
        loss = objective(0)
        return loss.item(), gradients(loss, model)

    (near, found), (plain, expected) = slopes(NPOSAM(rho=1e-6, **ALL)), slopes(NPO(**ALL))
    assert near == pytest.approx(plain, rel=1e-5)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-3, atol=1e-5)


def test_the_retain_term_is_taken_where_the_weights_are():
    model = toy_model()
    whole = NPOSAM(rho=0.5, retain_weight=3.0, **ALL).objective(model, REQUEST)(0).item()
    alone = NPOSAM(rho=0.5, retain_weight=0, **ALL).objective(model, REQUEST)(0).item()
    kept = GradientDifference(forget_weight=0.0, **ALL).objective(model, REQUEST)(0).item()
    assert whole - alone == pytest.approx(3 * kept, rel=1e-4)


def test_weights_are_put_back_when_the_loss_breaks_off():
    model, calls = toy_model(), []
    before = weights_of(model)

    def breaking(step):
        calls.append(step)
        if len(calls) == 2:
            raise RuntimeError("out of memory")
        return sum(value.square().sum() for value in model.network.parameters())

    worst = sharpness_aware(breaking, dict(model.network.named_parameters()), 0.1)
    with pytest.raises(RuntimeError, match="out of memory"):
        worst(0)
    assert len(calls) == 2 and same_weights(weights_of(model), before)
