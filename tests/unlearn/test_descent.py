"""The loop: what it leaves alone, what it refuses, and that an interrupted run ends as an uninterrupted one."""

import math
from dataclasses import dataclass

import pytest
import torch
from toy_request import same_weights, toy_model, toy_request, weights_of
from transformers import GPT2Config, GPT2LMHeadModel

from palimpsest.errors import StorageError, TrainingError
from palimpsest.models.anatomy import Anatomy
from palimpsest.models.language_model import LanguageModel
from palimpsest.unlearn import descent
from palimpsest.unlearn.gradient_ascent import GradientAscent
from palimpsest.unlearn.methods import METHODS
from palimpsest.unlearn.npo import NPO
from palimpsest.unlearn.stopping import Stop

DESCENTS = [name for name, method in METHODS.items() if issubclass(method, descent.Descent)]
REQUEST = toy_request()
STOP = Stop(10, measure_every=2)


@dataclass(frozen=True, kw_only=True)
class Failing(GradientAscent):
    """Ascent whose loss is `loss` at step `at`."""

    at: int = 5
    loss: str = "nan"

    def objective(self, model, request):
        ascent = super().objective(model, request)
        return lambda step: ascent(step) * (float(self.loss) if step == self.at else 1.0)


def interrupt_after(monkeypatch, steps):
    """Let a run take so many steps and then stop it as Ctrl-C would."""
    step, taken = descent._Run._step, []

    def stepping(run):
        if len(taken) == steps:
            raise KeyboardInterrupt
        taken.append(run.step)
        step(run)

    monkeypatch.setattr(descent._Run, "_step", stepping)
    return taken


def test_batches_of_every_size_cover_the_forget_set(monkeypatch):
    """A batch is never larger than its set, and a smaller one goes through the set before it comes back."""
    for size in (1, 3, 100):
        update = GradientAscent(batch_size=size).run(toy_model(), REQUEST, Stop(2))
        assert update.provenance["trace"][-1]["step"] == 2 and update.delta


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("end", ["done", "failed"])
def test_mode_gradients_and_hooks_are_as_they_were(training, end):
    model = toy_model()
    model.network.train(training)
    if end == "done":
        NPO().run(model, REQUEST, Stop(3))
    else:
        with pytest.raises(TrainingError):
            Failing(at=1).run(model, REQUEST, Stop(3))
    assert model.network.training is training
    assert all(parameter.grad is None for parameter in model.network.parameters())
    modules = list(model.network.modules())
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in modules)


def test_a_gradient_is_held_no_longer_than_its_step_and_none_comes_from_outside(monkeypatch):
    model, held = toy_model(), []
    clean = NPO().run(model, REQUEST, STOP)
    measure = descent._Run._measure

    def measuring(run, step):
        held.extend(parameter.grad is not None for parameter in model.network.parameters())
        return measure(run, step)

    monkeypatch.setattr(descent._Run, "_measure", measuring)
    for parameter in model.network.parameters():
        parameter.grad = torch.ones_like(parameter)
    assert same_weights(NPO().run(model, REQUEST, STOP).delta, clean.delta)
    assert held and not any(held)


def test_frozen_parameters_stay_out_of_the_update():
    model = toy_model()
    for name, parameter in model.network.named_parameters():
        parameter.requires_grad_("mlp" in name)
    update = GradientAscent().run(model, REQUEST, Stop(2))
    assert update.delta and all("mlp" in name for name in update.delta)
    assert [parameter.requires_grad for _, parameter in model.network.named_parameters()].count(True) == 6


@pytest.fixture
def with_dropout():
    tokenizer = toy_model().tokenizer
    torch.manual_seed(0)
    size = {"vocab_size": len(tokenizer), "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 64}
    network = GPT2LMHeadModel(GPT2Config(**size, resid_pdrop=0.5, embd_pdrop=0.5, attn_pdrop=0.5)).eval()
    return LanguageModel(network, tokenizer, Anatomy.of(network))


@pytest.mark.parametrize("term", ["nll", "kl"])
def test_dropout_follows_from_the_seed_and_the_step(with_dropout, term, tmp_path, monkeypatch):
    method = NPO(retain_term=term)
    whole = method.run(with_dropout, REQUEST, STOP)
    torch.rand(7)  # someone else draws
    assert same_weights(method.run(with_dropout, REQUEST, STOP).delta, whole.delta)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        interrupt_after(patch, 7)
        method.run(with_dropout, REQUEST, STOP, folder=tmp_path / "run")
    resumed = method.run(with_dropout, REQUEST, STOP, folder=tmp_path / "run")
    assert same_weights(resumed.delta, whole.delta)


# What is not finite


def refused(method, model, stop, folder):
    before, mode = weights_of(model), model.network.training
    with pytest.raises(TrainingError) as error:
        method.run(model, REQUEST, stop, folder=folder)
    message = str(error.value)
    assert "\n" not in message and "nothing was saved and the model is as it was" in message
    after = weights_of(model)
    assert all(torch.equal(before[name], after[name]) or before[name].isnan().any() for name in before)
    assert model.network.training is mode and model.updates == []
    assert list(folder.parent.iterdir()) == []
    return message


@pytest.mark.parametrize("loss", ["nan", "inf"])
def test_a_loss_that_is_not_finite_ends_the_run(loss, tmp_path):
    """Three checkpoints were written by then; none is left to fail from again."""
    message = refused(Failing(at=6, loss=loss), toy_model(), STOP, tmp_path / "run")
    assert message.startswith("grad_ascent, step 7: the loss is") and "Lower the learning rate (now 0.0003)" in message


@pytest.mark.parametrize(("steps", "measure_every"), [(1, 1), (1, 5), (5, 1), (5, 2), (5, 5)])
def test_weights_that_overflow_are_never_given_out(steps, measure_every, tmp_path):
    """Also where the last step broke them, after which no loss is computed."""
    method = GradientAscent(learning_rate=1e30)
    message = refused(method, toy_model(), Stop(steps, 0.0, None, measure_every), tmp_path / "run")
    assert "Lower the learning rate (now 1e+30)" in message


def test_a_damaged_model_is_not_blamed_on_the_learning_rate(tmp_path):
    model = toy_model()
    with torch.no_grad():
        model.network.model.norm.weight[0] = math.nan
    message = refused(NPO(), model, STOP, tmp_path / "run")
    assert "step 0" in message and "the model's own weights are damaged" in message
    assert "learning rate" not in message


# Interrupted and resumed


@pytest.mark.parametrize("name", DESCENTS)
@pytest.mark.parametrize(("after", "resumes_at"), [(1, 0), (2, 2), (7, 6), (9, 8)])
def test_an_interrupted_run_ends_as_an_uninterrupted_one(name, after, resumes_at, tmp_path, monkeypatch):
    method, model, folder = METHODS[name](batch_size=3, learning_rate=1e-3), toy_model(), tmp_path / "run"
    whole = method.run(model, REQUEST, STOP)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        interrupt_after(patch, after)
        method.run(model, REQUEST, STOP, folder=folder)
    assert same_weights(weights_of(model), weights_of(toy_model()))
    with monkeypatch.context() as patch:
        taken = interrupt_after(patch, 100)
        resumed = method.run(model, REQUEST, STOP, folder=folder)
    assert taken == list(range(resumes_at, 10))
    assert same_weights(resumed.delta, whole.delta)
    assert resumed.provenance["trace"] == whole.provenance["trace"]
    assert resumed.identity == whole.identity


def test_a_run_interrupted_before_its_last_stretch_stops_at_the_same_level(tmp_path, monkeypatch):
    method, model = GradientAscent(learning_rate=1e-3), toy_model()
    start = method.run(model, REQUEST, Stop(0)).provenance["trace"][0]["forget_probability"]
    stop = Stop(100, start / 4, None, 4)
    whole = method.run(model, REQUEST, stop)
    steps = math.ceil(whole.provenance["trace"][-1]["step"])
    assert 4 < steps < 100
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        interrupt_after(patch, steps - 1)
        method.run(model, REQUEST, stop, folder=tmp_path / "run")
    resumed = method.run(model, REQUEST, stop, folder=tmp_path / "run")
    assert same_weights(resumed.delta, whole.delta) and resumed.provenance["trace"] == whole.provenance["trace"]


def test_the_time_before_an_interruption_counts(tmp_path, monkeypatch):
    clock = [1000.0]
    monkeypatch.setattr(descent.time, "monotonic", lambda: clock[0])
    step = descent._Run._step

    def slowly(run):
        clock[0] += 10
        step(run)

    monkeypatch.setattr(descent._Run, "_step", slowly)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        interrupt_after(patch, 7)
        GradientAscent().run(toy_model(), REQUEST, STOP, folder=tmp_path / "run")
    clock[0] = 5.0  # another boot
    resumed = GradientAscent().run(toy_model(), REQUEST, STOP, folder=tmp_path / "run")
    assert resumed.provenance["seconds"] == 100


@pytest.mark.parametrize(
    "changed",
    [
        {"method": GradientAscent(learning_rate=2e-3)},
        {"method": GradientAscent(seed=1)},
        {"method": NPO()},
        {"stop": Stop(12, measure_every=2)},
        {"model": toy_model(seed=1)},
        {"request": toy_request(wrong=2)},
    ],
)
def test_the_checkpoint_of_another_run_is_not_taken_up(changed, tmp_path, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        interrupt_after(patch, 7)
        GradientAscent().run(toy_model(), REQUEST, STOP, folder=tmp_path / "run")
    assert (tmp_path / "run").exists()
    run = {"method": GradientAscent(), "model": toy_model(), "request": REQUEST, "stop": STOP} | changed
    method, arguments = run["method"], (run["model"], run["request"], run["stop"])
    with monkeypatch.context() as patch:
        taken = interrupt_after(patch, 100)
        update = method.run(*arguments, folder=tmp_path / "run")
    assert taken[0] == 0
    assert same_weights(update.delta, method.run(*arguments).delta)


def test_a_finished_run_may_be_asked_again_until_its_update_is_saved(tmp_path):
    method, model = NPO(), toy_model()
    first = method.run(model, REQUEST, STOP, folder=tmp_path / "run")
    assert same_weights(method.run(model, REQUEST, STOP, folder=tmp_path / "run").delta, first.delta)


def test_a_folder_with_other_files_is_refused_before_the_first_step(tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(StorageError, match="holds other files, which would be lost"):
        NPO().run(toy_model(), REQUEST, STOP, folder=tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]
