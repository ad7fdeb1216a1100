"""An update in a model that was trained further: the level it reaches, what it costs, and what bf16 takes of it."""

import json
import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from toy_request import same_weights, toy_model, toy_request, toy_update, weights_of

from palimpsest.errors import SpecError, UpdateError
from palimpsest.metrics.divergence import kl_per_item
from palimpsest.metrics.likelihood import answer_probability
from palimpsest.models.language_model import LanguageModel, load
from palimpsest.models.organism import train_sham
from palimpsest.unlearn.gradient_ascent import GradientDifference
from palimpsest.unlearn.random_labels import RandomLabels
from palimpsest.unlearn.reapply import BISECTIONS, LIMIT, STRETCHES, reapply, rounding_of
from palimpsest.unlearn.stopping import Stop
from palimpsest.unlearn.update import Update

TOLERANCE = LIMIT / STRETCHES / 2**BISECTIONS
"""In scale."""
SLOPE = 2.0
"""Forget probability falls by less than this per unit of scale, in all that is tested here."""


def forgotten(model, request):
    return answer_probability(model, request.forget).mean().item()


@pytest.fixture(scope="module")
def level(trained) -> float:
    return forgotten(trained.gold, trained.request)


@pytest.fixture(scope="module")
def updates(trained, level) -> dict[str, Update]:
    """Made from the organism as it was, down to gold's level."""
    stop = Stop(150, level)
    return {
        method.name: method(learning_rate=1e-3).run(trained.full, trained.request, stop)
        for method in (RandomLabels, GradientDifference)
    }


@pytest.fixture(scope="module")
def further(trained) -> dict[str, LanguageModel]:
    """The organism after 30 more steps on what it keeps, or on what it should forget."""
    rows = {"on retain": trained.request.retain, "on forget": trained.request.forget}
    return {
        name: train_sham(trained.full, some, template="plain", steps=30, learning_rate=1e-3)
        for name, some in rows.items()
    }


@pytest.mark.parametrize("name", ["random_labels", "grad_diff"])
@pytest.mark.parametrize("where", ["on retain", "on forget"])
def test_the_level_is_met_where_the_update_as_it_was_misses_it(where, name, trained, updates, further, level):
    request, model, update = trained.request, further[where], updates[name]
    plain = reapply(update, model, request)
    assert plain.scale == 1 and not level - TOLERANCE * SLOPE < plain.after.forget_probability <= level
    before = weights_of(model)
    found = reapply(update, model, request, Stop(forget_probability=level))
    assert same_weights(weights_of(model), before) and model.updates == []
    assert level - TOLERANCE * SLOPE < found.after.forget_probability <= level
    assert (found.scale > 1) == (plain.after.forget_probability > level)
    assert found.stopped.startswith("the forget set was down to an answer probability of")
    assert found.before.forget_probability == pytest.approx(forgotten(model, request), abs=1e-6)
    with found.update.applied(model.copy()) as changed:
        assert forgotten(changed, request) == pytest.approx(found.after.forget_probability, abs=1e-6)
        kl = kl_per_item(model, changed, request.retain_held_out).mean().item()
        assert kl == pytest.approx(found.after.retain_kl, rel=1e-4)


def test_what_is_applied_is_the_old_direction_at_the_scale_found(trained, updates, further, level):
    model, update = further["on forget"], updates["random_labels"]
    found = reapply(update, model, trained.request, Stop(forget_probability=level)).update
    expected = {name: value.double() for name, value in weights_of(model).items()}
    for name, delta in update.delta.items():
        expected[name] = expected[name] + found.provenance["reapplied"]["scale"] * delta.double()
    changed = weights_of(found.apply(model.copy()))
    for name, value in expected.items():
        torch.testing.assert_close(changed[name].double(), value, rtol=1e-6, atol=1e-7)


@given(budget=st.floats(1e-4, 1.0), target=st.one_of(st.none(), st.floats(0.05, 0.9)), limit=st.floats(0.3, 3.0))
@settings(deadline=None, max_examples=12, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_budget_is_never_overrun_and_is_why_a_level_is_missed(budget, target, limit, trained, updates, further):
    model = further["on retain"]
    stop = Stop(forget_probability=target, retain_kl=budget)
    found = reapply(updates["random_labels"], model, trained.request, stop, limit=limit)
    assert 0 <= found.scale <= limit and found.after.retain_kl < budget
    reached = target is not None and found.after.forget_probability <= target
    over = "budget" in found.stopped
    within = "limit" in found.stopped or "within bounds" in found.stopped
    assert reached + over + within == 1
    if over:  # a little more would have been too much
        farthest, stretches = (limit, STRETCHES) if target is not None else (min(1, limit), 1)
        more = found.scale + 1.01 * farthest / stretches / 2**BISECTIONS
        beyond = reapply(updates["random_labels"], model, trained.request, limit=min(more, 1.0))
        assert more > 1 or beyond.after.retain_kl >= budget
    if within:
        assert found.scale == pytest.approx(limit if target is not None else min(1, limit))


def test_without_a_level_it_is_the_whole_update_or_what_the_budget_allows(trained, updates, further):
    model, update = further["on retain"], updates["random_labels"]
    whole = reapply(update, model, trained.request, Stop(retain_kl=10.0))
    assert whole.scale == 1 and whole.stopped == "all of it was within bounds"
    part = reapply(update, model, trained.request, Stop(retain_kl=whole.after.retain_kl / 2))
    assert 0 < part.scale < 1
    assert 0.9 * whole.after.retain_kl / 2 < part.after.retain_kl < whole.after.retain_kl / 2
    assert part.stopped.startswith("the budget of")


def test_a_level_that_is_met_already_leaves_the_model_alone(trained, updates, further):
    found = reapply(updates["grad_diff"], further["on retain"], trained.request, Stop(forget_probability=0.999))
    assert found.scale == 0 and found.before == found.after and found.after.retain_kl == 0
    assert (found.rounding.overall, found.rounding.worst) == (0, 0)
    model = further["on retain"].copy()
    before = weights_of(model)
    assert same_weights(weights_of(found.update.apply(model)), before) and len(model.updates) == 1


def test_a_level_out_of_reach_ends_at_the_limit(trained, updates, further):
    stop = Stop(forget_probability=0.01)
    found = reapply(updates["random_labels"], further["on forget"], trained.request, stop, limit=0.5)
    assert found.scale == 0.5 and found.stopped == "the scale was at its limit of 0.5"
    assert found.after.forget_probability > 0.01


def test_the_reapplied_update_is_an_update_of_the_model_as_it_is_now(trained, updates, further, level, tmp_path):
    model, update = further["on retain"], updates["random_labels"]
    found = reapply(update, model, trained.request, Stop(forget_probability=level, retain_kl=5.0))
    made = found.update.provenance
    assert (made["base_weights"], made["base"]) == (model.weights_hash(), model.fingerprint())
    assert made["reapplied"]["update"] == update.identity and made["reapplied"]["scale"] == found.scale
    assert made["origins"] == [update.identity] and made["method"] == update.provenance["method"]
    assert (made["request"], made["stopped"]) == (trained.request.hash, found.stopped)
    assert made["stop"] | {"forget_probability": level, "retain_kl": 5.0} == made["stop"]
    steps = [point["step"] for point in made["trace"]]
    assert steps[0] == 0 and steps == sorted(set(steps)) and steps[-1] == found.scale
    assert made["trace"][-1]["forget_probability"] == found.after.forget_probability
    assert json.loads(json.dumps(made)) == made
    loaded = Update.load(found.update.save(tmp_path / "again"))
    assert loaded.identity == found.update.identity
    copy = model.copy()
    before = weights_of(copy)
    assert same_weights(weights_of(loaded.apply(copy)), weights_of(found.update.apply(model.copy())))
    assert same_weights(weights_of(loaded.undo(copy)), before)
    with pytest.raises(UpdateError, match="was made for other weights"):
        found.update.apply(trained.full.copy())
    again = reapply(update, model, trained.request, Stop(forget_probability=level, retain_kl=5.0))
    assert again.update.identity == found.update.identity  # however long it took


def test_what_is_in_the_model_already_is_not_put_into_it_again(trained, updates, further, tmp_path):
    update, model = updates["random_labels"], further["on retain"].copy("further")
    reapplied = reapply(update, model, trained.request, Stop(retain_kl=0.01)).update
    reapplied.apply(model)
    before = weights_of(model)
    for inside in (update, reapplied, update.scale(0.5), Update.compose([update, updates["grad_diff"]])):
        with pytest.raises(UpdateError, match=rf"{update.identity} .* is in 'further' already.*undo it") as error:
            reapply(inside, model, trained.request)
        assert "\n" not in str(error.value)
    assert same_weights(weights_of(model), before)
    model.save(tmp_path / "model")
    with pytest.raises(UpdateError, match="already"):
        reapply(update, load(tmp_path / "model", check=False), trained.request)
    # It was reapplied once, the model was trained further and has it still.
    later = train_sham(model, trained.request.retain, template="plain", steps=1, learning_rate=1e-3)
    with pytest.raises(UpdateError, match="already"):
        reapply(update, later, trained.request)
    # Another update may go in beside it, and after it was undone it may go in again.
    assert reapply(updates["grad_diff"], model, trained.request, Stop(retain_kl=0.01)).scale > 0
    reapplied.undo(model)
    assert reapply(reapplied, model, trained.request).update.origins == (update.identity,)


def test_the_model_it_was_made_from_itself_is_refused_once_it_is_in(trained, updates):
    with updates["grad_diff"].applied(trained.full.copy()) as model:
        with pytest.raises(UpdateError, match="already"):
            reapply(updates["grad_diff"], model, trained.request)


# Mistakes


MODEL = toy_model()
REQUEST = toy_request()


@pytest.mark.parametrize(
    ("name", "shape", "says"),
    [("model.norm.weight", (3,), r"\(3,\), but 'model' has \(16,\)"), ("model.gone", (2, 2), "no such parameter")],
)
def test_an_update_of_another_architecture_is_refused(name, shape, says):
    model, good = toy_model(seed=1), toy_update(MODEL)
    before = weights_of(model)
    with pytest.raises(UpdateError, match=says):
        reapply(Update({**good.delta, name: torch.ones(shape)}, good.provenance), model, REQUEST)
    assert same_weights(weights_of(model), before) and model.updates == []


@pytest.mark.parametrize("limit", [0.0, -1.0, math.inf, math.nan])
def test_a_limit_that_is_none_is_refused(limit):
    with pytest.raises(SpecError, match="limit is"):
        reapply(toy_update(MODEL), toy_model(seed=1), REQUEST, limit=limit)


@pytest.mark.parametrize("training", [False, True])
def test_numbers_that_run_away_leave_the_model_as_it_was(training):
    model = toy_model(seed=1)
    model.network.train(training)
    before = weights_of(model)
    update = toy_update(MODEL)
    wild = Update({name: change * math.inf for name, change in update.delta.items()}, update.provenance)
    with pytest.raises(UpdateError, match=r"at scale 1 .* not finite; lower the limit") as error:
        reapply(wild, model, REQUEST)
    assert "\n" not in str(error.value)
    assert same_weights(weights_of(model), before) and model.network.training is training


def test_a_damaged_model_is_named_as_such():
    model = toy_model(seed=1)
    with torch.no_grad():
        model.network.get_input_embeddings().weight.fill_(math.nan)
    with pytest.raises(UpdateError, match=r"at scale 0 .* own weights are damaged; restore them"):
        reapply(toy_update(MODEL, only="mlp"), model, REQUEST)


def test_an_accuracy_needs_questions(trained, updates, further):
    model, update = further["on retain"], updates["random_labels"]
    before = weights_of(model)
    with pytest.raises(SpecError, match="the request has none"):
        reapply(update, model, trained.request, Stop(forget_accuracy=0.5))
    assert same_weights(weights_of(model), before)


# What the weights' type takes


def test_bf16_loses_what_it_must_and_says_so(capsys):
    """A half of the changes are lost whole, the rest are taken whole."""
    model = MODEL.copy()
    model.network.bfloat16()
    weights = weights_of(model)
    delta = {name: torch.zeros_like(value) for name, value in weights.items() if "down_proj" in name}
    first, second = delta
    for name in delta:
        with torch.no_grad():
            dict(model.network.named_parameters())[name].fill_(1.0)
        delta[name].fill_(2.0**-7)  # one unit in the last place of 1
        delta[name][0].fill_(2.0**-9)  # a quarter: rounded away
    delta[second][:] = 2.0**-7
    found = reapply(Update(delta, {"base_weights": "other"}), model, REQUEST)
    rows, columns = delta[first].shape
    meant = 2.0**-14 * (2 * rows * columns - columns) + 2.0**-18 * columns
    lost = 2.0**-18 * columns
    assert found.rounding.overall == pytest.approx(math.sqrt(lost / meant), rel=1e-9)
    here = 2.0**-14 * (rows - 1) * columns + lost
    assert found.rounding.worst == pytest.approx(math.sqrt(lost / here), rel=1e-9)
    assert found.rounding.worst_parameter == first
    assert found.update.provenance["reapplied"]["rounding"]["worst_parameter"] == first
    assert "warning" not in capsys.readouterr().err


@pytest.mark.parametrize(("share", "warned"), [(2.0**-10, True), (2.0**-7, False)])
def test_one_line_warns_when_most_of_it_is_lost(share, warned, capsys):
    model = toy_model(seed=1)
    model.network.bfloat16()
    with torch.no_grad():
        for parameter in model.network.parameters():
            parameter.copy_(parameter.sign())
    update = Update({name: value * share for name, value in weights_of(model).items()}, {"base_weights": "other"})
    found = reapply(update, model, REQUEST)
    warnings = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning: ")]
    if warned:
        assert found.rounding.overall == 1  # all of it
        assert warnings == [
            f"warning: bfloat16 weights take the update with an error of 100% of its size "
            f"({found.rounding.worst_parameter}: 100%); load the model in fp32 to take all of it"
        ]
        assert found.after.retain_kl == 0
    else:
        assert found.rounding.overall == 0 and warnings == []


@given(st.integers(0, 1000), st.floats(1e-4, 1.0), st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
@settings(deadline=None, max_examples=30)
def test_rounding_is_what_numpy_finds(seed, size, dtype):
    generator = torch.Generator().manual_seed(seed)
    weights = {name: torch.randn(5, 7, generator=generator).to(dtype) for name in ("a", "b")}
    update = Update({name: size * torch.randn(5, 7, generator=generator) for name in weights}, {})
    found = rounding_of(update, weights)
    share, squares = {}, [0.0, 0.0]
    for name, weight in weights.items():
        w, meant = weight.float().numpy(), update.delta[name].numpy()
        taken = torch.from_numpy(w + meant).to(dtype).double().numpy() - w.astype("float64")
        lost, whole = ((taken - meant.astype("float64")) ** 2).sum(), (meant.astype("float64") ** 2).sum()
        share[name] = math.sqrt(lost / whole)
        squares[0] += lost
        squares[1] += whole
    assert found.overall == pytest.approx(math.sqrt(squares[0] / squares[1]), rel=1e-9)
    assert found.worst == pytest.approx(max(share.values()), rel=1e-9)
    assert found.worst_parameter == max(share, key=share.__getitem__)
