"""Where a run ends: at the first level that is crossed, never over the budget, and why it says it ended."""

import itertools
import math
from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from palimpsest.data.records import Passage
from palimpsest.errors import SpecError
from palimpsest.metrics.divergence import kl_per_item
from palimpsest.metrics.likelihood import answer_probability
from palimpsest.unlearn.descent import FARTHEST, _Run
from palimpsest.unlearn.gradient_ascent import GradientAscent
from palimpsest.unlearn.random_labels import RandomLabels, relabelled
from palimpsest.unlearn.stopping import Measurement, Stop

ASCENT = GradientAscent(learning_rate=1e-3)
STRETCH = 16
"""Steps of ascent that take the organism from knowing to well below gold, in one stretch of measurements."""
TOLERANCE = 1 / 256


def levels(organism, model):
    """Forget probability and KL on held-out retain rows, by the metrics room."""
    return (
        answer_probability(model, organism.request.forget).mean().item(),
        kl_per_item(organism.full, model, organism.request.retain_held_out).mean().item(),
    )


@pytest.fixture(scope="module")
def line(trained):
    """Levels along the straight line of one stretch, by share of it: [(share, forget probability, KL)]."""
    whole = ASCENT.run(trained.full, trained.request, Stop(STRETCH, measure_every=STRETCH))
    found = []
    for share in torch.linspace(0, 1, 17).tolist():
        with whole.scale(share).applied(trained.full.copy()) as model:
            found.append((share, *levels(trained, model)))
    assert all(one[1] > other[1] and one[2] < other[2] for one, other in itertools.pairwise(found))
    return found


def run(trained, method=ASCENT, **stop):
    made = method.run(trained.full, trained.request, Stop(**stop)).provenance
    return made["trace"], made["stopped"]


@pytest.mark.parametrize("method", [ASCENT, RandomLabels(learning_rate=1e-3)])
@pytest.mark.parametrize("measure_every", [1, 5])
def test_the_target_is_met_to_the_bisections_tolerance(trained, method, measure_every):
    trace, why = run(trained, method, steps=80, forget_probability=0.3, measure_every=measure_every)
    before, last = trace[-2], trace[-1]
    assert before["forget_probability"] > 0.3 >= last["forget_probability"]
    assert last["forget_probability"] > 0.3 - 3 * TOLERANCE
    assert before["step"] < last["step"] <= before["step"] + measure_every
    assert why == "the forget set was down to an answer probability of 0.300"


@pytest.mark.parametrize("budget", [0.02, 0.2, 1.0])
@pytest.mark.parametrize("measure_every", [1, 7])
def test_the_budget_is_used_up_and_never_overrun(trained, budget, measure_every):
    update = ASCENT.run(trained.full, trained.request, Stop(60, None, budget, measure_every))
    trace = update.provenance["trace"]
    assert all(point["retain_kl"] < budget for point in trace)
    # A stretch of seven steps is coarse: its 256th part may be some per cent of a small budget.
    assert trace[-1]["retain_kl"] > budget * 0.9
    with update.applied(trained.full.copy()) as model:
        assert levels(trained, model)[1] < budget
    expected = f"the budget of {budget:g} nats/token on held-out retain rows was used up"
    assert update.provenance["stopped"] == expected


@given(st.integers(1, 15), st.integers(1, 15))
@settings(deadline=None, max_examples=12, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_the_first_level_on_the_way_ends_the_run(trained, line, target_at, budget_at):
    """Both levels are crossed within one stretch; its end is beyond both, and says nothing about which was first."""
    target, budget = line[target_at][1], line[budget_at][2]
    trace, why = run(trained, steps=STRETCH, measure_every=STRETCH, forget_probability=target, retain_kl=budget)
    last = trace[-1]
    assert last["retain_kl"] < budget
    assert last["step"] / STRETCH == pytest.approx(line[min(target_at, budget_at)][0], abs=2 * TOLERANCE)
    if target_at < budget_at:
        assert why.startswith("the forget set was down") and last["forget_probability"] <= target
    elif budget_at < target_at:
        assert why.startswith("the budget") and last["forget_probability"] > target


def test_a_run_without_levels_uses_its_steps(trained):
    trace, why = run(trained, steps=7, measure_every=3)
    assert [point["step"] for point in trace] == [0, 3, 6, 7]
    assert why == "its 7 steps were used up"
    trace, why = run(trained, steps=4, forget_probability=0.01, retain_kl=50.0, measure_every=2)
    assert [point["step"] for point in trace] == [0, 2, 4] and why == "its 4 steps were used up"


def test_measuring_more_rarely_than_the_steps_still_measures_the_end(trained):
    trace, why = run(trained, steps=3, measure_every=100)
    assert [point["step"] for point in trace] == [0, 3] and why == "its 3 steps were used up"
    trace, _ = run(trained, steps=STRETCH, measure_every=100, forget_probability=0.5)
    assert trace[-1]["forget_probability"] == pytest.approx(0.5, abs=3 * TOLERANCE) and trace[-1]["step"] < STRETCH


def test_a_level_crossed_at_the_last_step_is_the_reason(trained):
    free, _ = run(trained, steps=10)
    # One stretch to the end, which there is no going back on.
    trace, why = run(trained, steps=10, measure_every=10, forget_probability=free[-1]["forget_probability"])
    assert why.startswith("the forget set was down") and trace[-1]["step"] > 9


@pytest.mark.parametrize(
    ("stop", "why"),
    [
        ({"forget_probability": 0.999}, "the forget set was down to an answer probability of 0.999"),
        ({"forget_probability": 1.0}, "the forget set was down to an answer probability of 1.000"),
        ({"retain_kl": 0.0}, "the budget of 0 nats/token on held-out retain rows was used up"),
        ({"steps": 0}, "its 0 steps were used up"),
    ],
)
def test_what_is_reached_at_the_start_takes_no_step(trained, stop, why):
    update = ASCENT.run(trained.full, trained.request, Stop(**stop))
    assert update.delta == {}
    assert [point["step"] for point in update.provenance["trace"]] == [0]
    assert update.provenance["stopped"] == why


def test_a_budget_too_small_for_any_step_leaves_the_model_alone(trained):
    update = ASCENT.run(trained.full, trained.request, Stop(20, retain_kl=1e-9))
    assert update.delta == {} and update.provenance["stopped"].startswith("the budget of 1e-09")
    assert [point["step"] for point in update.provenance["trace"]] == [0]


def test_the_trace_is_what_the_metrics_say(trained):
    update = ASCENT.run(trained.full, trained.request, Stop(6, measure_every=6))
    start, end = update.provenance["trace"]
    assert (start["forget_probability"], start["retain_kl"]) == pytest.approx(levels(trained, trained.full), abs=1e-6)
    with update.applied(trained.full.copy()) as model:
        assert (end["forget_probability"], end["retain_kl"]) == pytest.approx(levels(trained, model), abs=1e-5)


@pytest.mark.parametrize("every", [0, -5])
def test_measuring_never_is_refused(every):
    with pytest.raises(SpecError, match=f"measure_every is {every}; .* at least 1"):
        Stop(measure_every=every)


def test_a_rate_that_goes_too_fast_is_halved_until_it_does_not(trained):
    target = 0.2
    update = GradientAscent(learning_rate=0.01).run(trained.full, trained.request, Stop(300, target))
    made = update.provenance
    levels_on_the_way = [point["forget_probability"] for point in made["trace"]]
    way = levels_on_the_way[0] - target
    drops = [before - after for before, after in itertools.pairwise(levels_on_the_way)]
    assert max(drops) <= FARTHEST * way + 1e-6
    assert levels_on_the_way[-1] == pytest.approx(target, abs=3 * TOLERANCE)
    halvings = math.log2(made["method"]["learning_rate"] / made["last_rate"])
    assert halvings >= 2 and halvings == round(halvings)


def test_a_gentle_rate_is_left_alone(trained):
    update = GradientAscent(learning_rate=1e-4).run(trained.full, trained.request, Stop(60, 0.2))
    assert update.provenance["last_rate"] == 1e-4


def test_an_interrupted_run_remembers_that_its_rate_was_halved(trained, tmp_path, monkeypatch):
    method, stop = GradientAscent(learning_rate=0.01), Stop(300, 0.2)
    whole = method.run(trained.full, trained.request, stop)
    step = _Run._step

    def interrupted(self):
        if self.halvings == 2:
            raise KeyboardInterrupt
        step(self)

    monkeypatch.setattr(_Run, "_step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        method.run(trained.full, trained.request, stop, folder=tmp_path / "run")
    monkeypatch.undo()
    again = method.run(trained.full, trained.request, stop, folder=tmp_path / "run")
    assert again.provenance["last_rate"] == whole.provenance["last_rate"]
    assert all(torch.equal(change, again.delta[name]) for name, change in whole.delta.items())


# Accuracy on multiple-choice questions.


def at(probability, accuracy, kl=0.0):
    return Measurement(0, probability, kl, accuracy)


def test_an_accuracy_that_is_reached_is_the_reason():
    stop = Stop(forget_accuracy=0.3)
    assert stop.reason(at(0.9, 0.31)) == ""
    for reached in (0.3, 0.1):
        why = "accuracy on the forget set's multiple-choice questions was down to 0.300"
        assert stop.reason(at(0.9, reached)) == why
    both = Stop(forget_probability=0.5, retain_kl=1.0, forget_accuracy=0.3)
    assert both.reason(at(0.4, 0.2)).startswith("the forget set was down")
    assert both.reason(at(0.6, 0.2)).startswith("accuracy")
    assert both.reason(at(0.6, 0.2, kl=1.0)).startswith("the budget")


def test_the_way_is_that_of_the_level_of_which_most_was_covered():
    start, before, now = at(0.9, 1.0), at(0.8, 0.9), at(0.7, 0.6)
    probability, accuracy = Stop(forget_probability=0.5), Stop(forget_accuracy=0.2)
    assert Stop().share_of_the_way(start, before, now, 0.1) == 0
    assert probability.share_of_the_way(start, before, now, 0.1) == pytest.approx(0.1 / 0.4)
    assert accuracy.share_of_the_way(start, before, now, 0.0) == pytest.approx(0.3 / 0.8)
    assert accuracy.share_of_the_way(start, before, now, 0.1) == pytest.approx(0.2 / 0.8)  # but for what is noise
    both = Stop(forget_probability=0.5, forget_accuracy=0.2)
    assert both.share_of_the_way(start, before, now, 0.1) == pytest.approx(0.25)
    assert both.share_of_the_way(start, now, before, 0.1) == 0


def test_an_accuracy_without_questions_is_refused_before_any_step(trained, monkeypatch):
    monkeypatch.setattr(_Run, "_step", lambda _: pytest.fail("a step was taken"))
    with pytest.raises(SpecError, match="forget_accuracy needs multiple-choice questions, but the request has none"):
        ASCENT.run(trained.full, trained.request, Stop(20, forget_accuracy=0.3))


def test_random_labels_refuse_a_passage_before_any_step(trained, monkeypatch):
    monkeypatch.setattr(_Run, "_step", lambda _: pytest.fail("a step was taken"))
    texts = (*trained.request.forget, Passage("Anna is a baker.", id="p7"))
    with pytest.raises(SpecError, match="forget row 'p7' is a passage, which has no answer to replace"):
        RandomLabels().run(trained.full, replace(trained.request, forget=texts), Stop(3))


def test_random_labels_draw_answers_from_questions_alone(trained):
    request = replace(trained.request, retain=(Passage("Anna is a baker."),))
    plain = [replace(row, wrong=()) for row in trained.request.forget[:6]]
    request = replace(request, forget=tuple(plain))
    drawn = {relabelled(request, row, epoch, 0).answer for row in range(6) for epoch in range(20)}
    assert drawn == {row.answer for row in plain}
