"""Low-rank factors in place of weights: exact beside every linear map, for every method that goes down a loss."""

import numpy as np
import pytest
import torch
from tests.models.tiny_families import DENSE, tiny_batch, tiny_model
from toy_request import same_weights, toy_model, toy_request, true_logprobs, weights_of

from palimpsest.errors import SpecError, TrainingError
from palimpsest.models.inputs import forward_inputs
from palimpsest.models.language_model import LanguageModel
from palimpsest.unlearn import descent
from palimpsest.unlearn.distillation import UNDIAL
from palimpsest.unlearn.gradient_ascent import GradientAscent, KLMinimization
from palimpsest.unlearn.lora import low_rank, merged
from palimpsest.unlearn.methods import METHODS
from palimpsest.unlearn.npo import NPO
from palimpsest.unlearn.rmu import RMU
from palimpsest.unlearn.stopping import Stop
from palimpsest.unlearn.weights import trainable

DESCENTS = [name for name, method in METHODS.items() if issubclass(method, descent.Descent)]
REQUEST = toy_request()
STOP = Stop(6, measure_every=2)
ALL = {"batch_size": len(REQUEST.forget)}


def untouched(model) -> bool:
    """No factor, no hook, and nothing frozen."""
    hooks = any(module._forward_hooks or module._forward_pre_hooks for module in model.network.modules())
    names = dict(model.network.named_parameters())
    return not hooks and not any("lora" in name for name in names) and all(p.requires_grad for p in names.values())


def logits(network, batch):
    with torch.no_grad():
        return network(**forward_inputs(network, batch)).logits[batch.attention]


def draw(factors, seed=0):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for value in factors.values():
            value.copy_(0.3 * torch.randn(value.shape, generator=generator))


@pytest.mark.parametrize("family", DENSE)
def test_the_model_with_factors_is_the_model_with_their_products_in_its_weights(family):
    model, batch = tiny_model(family), tiny_batch(5, 9)
    plain = logits(model.network, batch)
    with low_rank(model, trainable(model), 2, 0, method="x") as factors:
        torch.testing.assert_close(logits(model.network, batch), plain, rtol=0, atol=0)
        draw(factors)
        beside, changes = logits(model.network, batch), merged(model, factors)
    assert untouched(model)
    torch.testing.assert_close(logits(model.network, batch), plain, rtol=0, atol=0)
    parameters = dict(model.network.named_parameters())
    with torch.no_grad():
        for name, change in changes.items():
            parameters[name].add_(change)
    assert (beside - plain).abs().max() > 1e-2
    torch.testing.assert_close(logits(model.network, batch), beside, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_the_gradient_of_b_is_the_weights_gradient_times_a(family):
    model, batch = tiny_model(family), tiny_batch(5, 9)

    def loss():
        return model.network(**forward_inputs(model.network, batch)).logits[batch.attention].square().mean()

    loss().backward()
    whole = {name: value.grad.clone() for name, value in model.network.named_parameters()}
    model.network.zero_grad()
    with low_rank(model, trainable(model), 3, 0, method="x") as factors:
        loss().backward()
        assert not any(value.grad is not None for name, value in model.network.named_parameters() if "lora" not in name)
        for name in (name.removesuffix(".lora_B") for name in factors if name.endswith("B")):
            slope = whole[f"{name}.weight"].T if family == "gpt2" else whole[f"{name}.weight"]
            expected = slope @ factors[f"{name}.lora_A"].detach().T
            torch.testing.assert_close(factors[f"{name}.lora_B"].grad, expected, rtol=1e-3, atol=1e-6)
            assert factors[f"{name}.lora_A"].grad.abs().max() == 0  # B is 0


@pytest.mark.parametrize("name", DESCENTS)
def test_every_descent_can_do_with_a_low_rank(name):
    model, before = toy_model(), weights_of(toy_model())
    update = METHODS[name](rank=2, learning_rate=1e-2, **ALL).run(model, REQUEST, STOP)
    assert same_weights(weights_of(model), before) and untouched(model) and not model.network.training
    assert update.delta
    for parameter, change in update.delta.items():
        assert "_proj.weight" in parameter and before[parameter].shape == change.shape
        assert torch.linalg.matrix_rank(change.double(), rtol=1e-5) <= 2
    whole = METHODS[name](learning_rate=1e-2, **ALL).run(model, REQUEST, STOP)
    first, other = (made.provenance["trace"][0] for made in (update, whole))
    assert first == other and update.identity != whole.identity
    # Merged, it is the model that was measured.
    probability = update.provenance["trace"][-1]["forget_probability"]
    with update.applied(model):
        found = np.mean([np.exp(true_logprobs(model, record).mean()) for record in REQUEST.forget])
    assert found == pytest.approx(probability, rel=1e-4)
    assert probability != first["forget_probability"]


@pytest.mark.parametrize(
    "method",
    [KLMinimization(**ALL), RMU(alpha=3.0, **ALL), UNDIAL(batch_size=5), NPO(retain_term="kl", **ALL)],
    ids=lambda method: method.name,
)
def test_the_model_without_its_factors_is_the_start_model_and_no_copy_is_made(method, monkeypatch):
    request = toy_request(400) if isinstance(method, UNDIAL) else REQUEST  # more predictions than weights
    model, now = toy_model(), toy_model()
    objective_of_all = method.objective(now, request)
    monkeypatch.setattr(LanguageModel, "copy", None)
    with low_rank(model, trainable(model), 2, 0, method="x") as factors:
        objective = method.objective(model, request)
        draw(factors)
        changes, loss = merged(model, factors), objective(0)
        loss.backward()
        assert all(value.grad.abs().max() > 0 for name, value in factors.items() if "layers.0" in name)
        assert model.network.training is False
    with torch.no_grad():
        for name, change in changes.items():
            now.network.get_parameter(name).add_(change)
    assert loss.item() == pytest.approx(objective_of_all(0).item(), rel=1e-4)


def test_a_copy_keeps_factors_of_its_own():
    model = toy_model()
    with low_rank(model, trainable(model), 2, 0, method="x") as factors:
        twin = model.copy()
        before = true_logprobs(twin, REQUEST.forget[0])
        draw(factors)
        assert np.array_equal(true_logprobs(twin, REQUEST.forget[0]), before)
        assert not np.allclose(true_logprobs(model, REQUEST.forget[0]), before, atol=1e-2)


def test_a_method_that_changes_few_matrices_has_factors_beside_those_alone():
    update = RMU(rank=1, layer=1, learning_rate=1e-2, **ALL).run(toy_model(), REQUEST, STOP)
    assert set(update.delta) == {f"model.layers.{layer}.mlp.down_proj.weight" for layer in range(2)}


def test_factors_follow_from_the_seed():
    def run(seed):
        torch.rand(5)
        return NPO(rank=2, seed=seed, **ALL).run(toy_model(), REQUEST, STOP).delta

    assert same_weights(run(1), run(1)) and not same_weights(run(1), run(2))


@pytest.mark.parametrize(("after", "resumes_at"), [(1, 0), (3, 2), (5, 4)])
def test_an_interrupted_run_ends_as_an_uninterrupted_one(after, resumes_at, tmp_path, monkeypatch):
    method, model, step = NPO(rank=3, batch_size=3), toy_model(), descent._Run._step
    whole, taken = method.run(model, REQUEST, STOP), []

    def stepping(run):
        if len(taken) == after:
            raise KeyboardInterrupt
        taken.append(run.step)
        step(run)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(descent._Run, "_step", stepping)
        method.run(model, REQUEST, STOP, folder=tmp_path / "run")
    assert untouched(model) and same_weights(weights_of(model), weights_of(toy_model()))
    monkeypatch.setattr(descent._Run, "_step", lambda run: taken.append(run.step) or step(run))
    resumed = method.run(model, REQUEST, STOP, folder=tmp_path / "run")
    assert taken[after:] == list(range(resumes_at, 6))
    assert same_weights(resumed.delta, whole.delta) and resumed.identity == whole.identity


def test_a_run_that_breaks_leaves_no_factors():
    model = toy_model()
    with pytest.raises(TrainingError, match="Lower the learning rate"):
        GradientAscent(rank=2, learning_rate=1e30).run(model, REQUEST, STOP)
    assert untouched(model) and same_weights(weights_of(model), weights_of(toy_model()))


def test_parameters_that_were_frozen_are_frozen_after():
    model = toy_model()
    for name, parameter in model.network.named_parameters():
        parameter.requires_grad_("mlp" in name)
    update = GradientAscent(rank=2).run(model, REQUEST, STOP)
    assert update.delta and all("mlp" in name for name in update.delta)
    assert {name for name, value in model.network.named_parameters() if value.requires_grad} == set(
        name for name, _ in model.network.named_parameters() if "mlp" in name
    )


def test_a_level_is_met_with_factors_too():
    model = toy_model()
    start = GradientAscent().run(model, REQUEST, Stop(0)).provenance["trace"][0]["forget_probability"]
    update = NPO(rank=2, learning_rate=1e-2).run(model, REQUEST, Stop(100, 0.5 * start))
    assert 0.48 * start < update.provenance["trace"][-1]["forget_probability"] <= 0.5 * start


@pytest.mark.parametrize("rank", [0, -2])
def test_a_rank_that_is_none_is_refused(rank):
    with pytest.raises(SpecError, match=f"^npo: rank is {rank}; it must be above 0$"):
        NPO(rank=rank)


def test_a_rank_without_a_linear_map_is_refused():
    model = toy_model()
    for name, parameter in model.network.named_parameters():
        parameter.requires_grad_("norm" in name)
    with pytest.raises(SpecError, match=r"^npo: nothing that it may change is a linear map"):
        NPO(rank=2).run(model, REQUEST, STOP)
