"""PDU's dual variable: its recurrence, and that it survives interruptions and stretches that are taken back."""

import numpy as np
import pytest
from toy_request import same_weights, toy_model, toy_request, true_logprobs

from palimpsest.unlearn import descent
from palimpsest.unlearn.gradient_ascent import GradientAscent
from palimpsest.unlearn.pdu import PDU
from palimpsest.unlearn.stopping import Stop

REQUEST = toy_request()
ALL = {"batch_size": len(REQUEST.forget)}


def duals(method, steps):
    """The dual before each step, of a model that stays as it is."""
    objective, seen = method.objective(toy_model(), REQUEST), []
    for step in range(steps):
        seen.append(objective.memory["dual"])
        objective(step)
    return seen


@pytest.mark.parametrize(("over", "warmup", "step"), [(0.3, 0, 0.5), (-0.4, 2, 1.0), (1.0, 5, 2.0)])
def test_the_dual_rises_by_what_is_over_the_limit_and_never_falls_below_0(over, warmup, step):
    model = toy_model()
    nll = -np.concatenate([true_logprobs(model, record) for record in REQUEST.retain]).mean()
    method = PDU(limit=nll - over, dual=0.7, dual_step=step, warmup_epochs=warmup, **ALL)
    expected, dual = [], 0.7
    for at in range(8):
        expected.append(dual)
        dual = max(0.0, dual + step * over) if at >= warmup else dual  # a batch is an epoch here
    assert duals(method, 8) == pytest.approx(expected, abs=1e-5)
    assert over > 0 or expected[-1] == 0.0


def test_the_warmup_is_counted_in_passes_through_the_forget_set():
    seen = duals(PDU(limit=0.1, warmup_epochs=2, batch_size=2), 9)
    changed = [step for step in range(1, 9) if seen[step] != seen[step - 1]]
    assert changed == [8]  # 7 rows, two a step: the second pass ends with the seventh step, step 6; step 7 moves it


class Count:
    """An objective that counts its calls in its memory, and keeps what it counted."""

    def __init__(self, ascent):
        self.ascent, self.memory, self.seen = ascent, {"steps": 0}, []

    def __call__(self, step):
        self.seen.append(self.memory["steps"])
        self.memory["steps"] += 1
        return self.ascent(step)


def test_a_stretch_that_is_taken_back_is_forgotten(monkeypatch):
    model, made, objective = toy_model(), [], GradientAscent.objective
    monkeypatch.setattr(GradientAscent, "objective", lambda *args: made.append(Count(objective(*args))) or made[-1])
    level = GradientAscent().run(model, REQUEST, Stop(0)).provenance["trace"][0]["forget_probability"] / 4
    update = GradientAscent(learning_rate=3e-2).run(model, REQUEST, Stop(40, level, None, 2))
    halvings = round(np.log2(3e-2 / update.provenance["last_rate"]))
    assert halvings > 0
    # Two steps a stretch: where one was taken back, the count goes on from two before.
    steps = np.diff(made[-1].seen)
    assert sorted(steps) == [-1] * halvings + [1] * (len(steps) - halvings)


@pytest.mark.parametrize("after", [3, 7])
def test_an_interrupted_run_goes_on_with_its_dual(after, tmp_path, monkeypatch):
    method, model, step = PDU(warmup_epochs=0, limit=0.5, batch_size=3), toy_model(), descent._Run._step
    stop, taken = Stop(10, measure_every=2), []
    whole = method.run(model, REQUEST, stop)

    def stepping(run):
        if len(taken) == after:
            raise KeyboardInterrupt
        taken.append(run.memory["dual"])
        step(run)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(descent._Run, "_step", stepping)
        method.run(model, REQUEST, stop, folder=tmp_path / "run")
    assert len(set(taken)) == after, "the dual moves with every step"
    resumed = method.run(model, REQUEST, stop, folder=tmp_path / "run")
    assert same_weights(resumed.delta, whole.delta) and resumed.identity == whole.identity
