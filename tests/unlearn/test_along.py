"""Task vectors and Needle: their directions, and that they go exactly as far along them as they must."""

import math

import pytest
import torch
from tests.models.tiny_families import EXPERT, tiny_model
from toy_request import same_weights, toy_model, toy_request, true_logprobs, weights_of

from palimpsest.errors import ModelError, SpecError, TrainingError
from palimpsest.models.language_model import LanguageModel
from palimpsest.unlearn.along import DOUBLINGS
from palimpsest.unlearn.needle import Needle
from palimpsest.unlearn.stopping import Stop
from palimpsest.unlearn.task_vector import TaskVector

REQUEST = toy_request()
TASK = TaskVector(alpha=0.1, tuning_steps=6, learning_rate=1e-3)
EVERYWHERE = Needle(vectors=[(layer, number) for layer in range(2) for number in range(24)], noise=0.01)
METHODS = pytest.mark.parametrize("method", [TASK, EVERYWHERE], ids=["task_vector", "needle"])


def nll(model: LanguageModel) -> float:
    return -sum(true_logprobs(model, record).sum() for record in REQUEST.forget)


def last(update):
    return update.provenance["trace"][-1]


def start_level(model) -> float:
    return TASK.run(model, REQUEST, Stop(0)).provenance["trace"][0]["forget_probability"]


@METHODS
def test_without_a_level_it_goes_as_far_as_it_is_set(method):
    update = method.run(toy_model(), REQUEST)
    size = method.alpha if method is TASK else method.noise
    assert update.provenance["stopped"] == f"no level was asked for, so it went {size:g} far"
    assert last(update)["step"] == size and update.delta


@METHODS
def test_every_length_is_along_one_direction(method):
    model = toy_model()
    near, far = method.run(model, REQUEST), method.run(model, REQUEST, Stop(200, 0.6 * start_level(model)))
    ratio = last(far)["step"] / last(near)["step"]
    assert ratio > 1.5
    assert near.delta.keys() == far.delta.keys()
    for name, change in near.delta.items():
        torch.testing.assert_close(far.delta[name], change * ratio, rtol=1e-3, atol=1e-6 * ratio)


@METHODS
def test_it_stops_at_the_level_and_no_farther(method):
    model = toy_model()
    before, level = weights_of(model), 0.6 * start_level(model)
    update = method.run(model, REQUEST, Stop(200, level))
    trace = update.provenance["trace"]
    assert trace[-1]["forget_probability"] <= level < trace[-2]["forget_probability"]
    assert trace[-1]["forget_probability"] > 0.95 * level
    assert same_weights(weights_of(model), before) and not model.network.training
    with update.applied(model):
        measured = [math.exp(true_logprobs(model, record).mean()) for record in REQUEST.forget]
    assert sum(measured) / len(measured) == pytest.approx(trace[-1]["forget_probability"], rel=1e-4)


@METHODS
def test_a_budget_is_used_but_never_overrun(method):
    update = method.run(toy_model(), REQUEST, Stop(200, None, 0.05))
    assert 0.9 * 0.05 < last(update)["retain_kl"] < 0.05
    assert update.provenance["stopped"] == "the budget of 0.05 nats/token on held-out retain rows was used up"


@METHODS
def test_a_level_that_is_met_at_once_changes_nothing(method):
    update = method.run(toy_model(), REQUEST, Stop(200, 1.0))
    assert update.delta == {} and len(update.provenance["trace"]) == 1


@METHODS
def test_a_damaged_model_is_told_so(method):
    model = toy_model()
    with torch.no_grad():
        model.network.model.norm.weight[0] = math.nan
    with pytest.raises(TrainingError, match="the model's own weights are damaged") as error:
        method.run(model, REQUEST)
    assert "\n" not in str(error.value)


# Task vectors


def test_it_goes_away_from_where_training_on_the_forget_set_leads():
    model = toy_model()
    start = nll(model)
    update = TASK.run(model, REQUEST)
    with update.applied(model):
        away = nll(model)
    with update.scale(-1).applied(model):
        towards = nll(model)
    assert towards < start - 0.3 < start + 0.3 < away


def test_it_tunes_for_no_more_steps_than_the_run_may_take():
    model = toy_model()
    capped = TaskVector(tuning_steps=50).run(model, REQUEST, Stop(2))
    assert same_weights(capped.delta, TaskVector(tuning_steps=2).run(model, REQUEST).delta)
    assert not same_weights(capped.delta, TaskVector(tuning_steps=3).run(model, REQUEST).delta)


# Needle


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "opt", "falcon"])  # gpt2 stores its vectors as rows
def test_only_the_given_vectors_change_however_they_are_stored(family):
    model = tiny_model(family)
    vectors = [(0, 3), (1, 0), (1, 5)]
    before = [model.anatomy.value_vectors(layer).detach().clone() for layer in range(model.anatomy.n_layers)]
    update = Needle(vectors=vectors, noise=0.5).run(model, REQUEST)
    update.apply(model)
    changed = set()
    for layer, matrix in enumerate(before):
        moved = (model.anatomy.value_vectors(layer) != matrix).any(1).nonzero()[:, 0].tolist()
        changed |= {(layer, number) for number in moved}
    assert changed == set(vectors)
    assert len(update.delta) == 2


def test_the_noise_is_gaussian_with_the_deviation_it_is_given():
    model = toy_model()
    numbers = [(layer, number) for layer in range(2) for number in range(24)]
    update = Needle(vectors=numbers, noise=0.2).run(model, REQUEST)
    delta = torch.cat([change.flatten() for change in update.delta.values()])
    assert len(delta) == 2 * 24 * 16
    assert delta.std().item() == pytest.approx(0.2, rel=0.1) and abs(delta.mean().item()) < 0.03
    assert 0.6 < (delta.abs() < 0.2).double().mean().item() < 0.76  # 0.683 within a deviation


def test_a_vector_that_holds_nothing_does_not_reach_the_level():
    model = toy_model()
    with torch.no_grad():
        model.anatomy.blocks[1].mlp.gate_proj.weight[4] = 0  # silu(0) = 0: its coefficient is 0 whatever comes
    update = Needle(vectors=[(1, 4)]).run(model, REQUEST, Stop(200, 1e-6))
    assert update.provenance["stopped"].startswith("the level was not reached at any length")
    assert update.delta == {} and last(update)["retain_kl"] == 0.0


def test_where_the_level_is_out_of_reach_it_ends_at_the_lowest_point():
    model = toy_model()
    update = Needle(vectors=[(1, 4)]).run(model, REQUEST, Stop(200, 1e-9))
    trace = [point["forget_probability"] for point in update.provenance["trace"]]
    assert trace[-1] == min(trace) and len(trace) <= DOUBLINGS + 2


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "opt", "falcon"])
@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_vectors_are_taken_out_whole(family, precision):
    model = tiny_model(family)
    model.network.to(precision)
    before = [model.anatomy.value_vectors(layer).detach().clone() for layer in range(model.anatomy.n_layers)]
    update = Needle(vectors=[(0, 3), (1, 5)], zero=True).run(model, REQUEST)
    update.apply(model)
    for layer, matrix in enumerate(before):
        for number, vector in ((3, 0), (5, 1)):
            if layer == vector:
                matrix[number] = 0
        assert torch.equal(model.anatomy.value_vectors(layer), matrix)
    assert last(update)["step"] == 1.0


def test_no_more_of_a_vector_is_taken_away_than_there_is():
    model = toy_model()
    alone = {number: Needle(vectors=[(1, number)], zero=True).run(model, REQUEST) for number in range(24)}
    start = alone[0].provenance["trace"][0]["forget_probability"]
    helpful = [(1, number) for number, update in alone.items() if last(update)["forget_probability"] < start]
    whole = Needle(vectors=helpful, zero=True).run(model, REQUEST, Stop(200, 1e-9))
    assert whole.provenance["stopped"].startswith("the level was not reached at any length")
    assert last(whole)["step"] == 1.0 == max(point["step"] for point in whole.provenance["trace"])
    level = (start + last(whole)["forget_probability"]) / 2
    half = Needle(vectors=helpful, zero=True).run(model, REQUEST, Stop(200, level))
    assert 0 < last(half)["step"] < 1 and last(half)["forget_probability"] == pytest.approx(level, rel=0.05)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "vectors is empty; give at least one pair"),
        ({"vectors": [(2, 0)]}, "there is no value vector 0 in layer 2; this .* has layers 0 to 1 and vectors 0 to 23"),
        ({"vectors": [(0, 24)]}, "there is no value vector 24 in layer 0"),
        ({"vectors": [3]}, r"vectors is \[3\]; it is a list of pairs"),
        ({"vectors": [(0, 1, 2)]}, r"vectors is \[\(0, 1, 2\)\]; it is a list of pairs, layer and number"),
        ({"vectors": [(0, 1)], "noise": 0.0}, "noise is 0.0; it must be above 0"),
    ],
)
def test_vectors_that_are_not_there_are_refused(settings, message):
    with pytest.raises(SpecError, match=f"^needle: {message}") as error:
        Needle(**settings).run(toy_model(), REQUEST)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("setting", ["alpha", "tuning_steps", "learning_rate", "batch_size", "clip"])
def test_a_task_vectors_settings_are_positive(setting):
    with pytest.raises(SpecError, match=f"^task_vector: {setting} is 0; it must be above 0$"):
        TaskVector(**{setting: 0})


def test_fused_experts_have_no_value_vectors():
    with pytest.raises(ModelError, match=r"the experts of a .* are fused"):
        Needle(vectors=[(0, 0)]).run(tiny_model(next(iter(EXPERT))), REQUEST)
