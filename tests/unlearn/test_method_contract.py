"""What every method keeps to, whatever its loss. A new method is tested by being in METHODS."""

import json
from collections.abc import Callable
from dataclasses import FrozenInstanceError
from functools import cache

import pytest
from toy_request import Recording, same_weights, weights_of

from palimpsest.errors import TrainingError
from palimpsest.metrics.likelihood import answer_probability
from palimpsest.models.language_model import LanguageModel
from palimpsest.unlearn.descent import Descent
from palimpsest.unlearn.method import Method
from palimpsest.unlearn.methods import METHODS
from palimpsest.unlearn.stopping import Stop
from palimpsest.unlearn.update import Update

every_method = pytest.mark.parametrize("name", METHODS)
DESCENTS = {name: method for name, method in METHODS.items() if issubclass(method, Descent)}
every_descent = pytest.mark.parametrize("name", DESCENTS)
BUDGET = 400
"""Steps within which every method must bring the organism down to the level, all descents at the same rate."""
SHORT_OF_GOLD = {"satimp": 0.3}
"""The level of a method that need not come down to gold's: tokens that are unlikely already weigh little in SatImp."""
SHORT = Stop(4, 0.01, measure_every=2)
NEEDED = {
    # An organism that follows no instruction goes on saying what it knows unless it is warmed up.
    "altpo": {"temperature": 4.0},
    # What is known by heart rises by next to nothing when it is trained further.
    "whp": {"alpha": 100.0, "tuning_rate": 3e-3},
    "needle": {"vectors": [[layer, number] for layer in range(2) for number in range(256)]},
}
"""What cannot be left at its default."""
OWN = {
    **{name: {"batch_size": 3, "learning_rate": 0.5, "clip": 2.0} for name in DESCENTS},
    **{name: {"batch_size": 3, "damping": 0.5, "modules": ["*.mlp.*"]} for name in ("kfade", "kfade_paper")},
    "whp": {"batch_size": 3, "learning_rate": 0.5, "clip": 2.0, "alpha": 2.0, "tuning_steps": 7, "tuning_rate": 1e-3},
    "task_vector": {"batch_size": 3, "alpha": 0.3, "tuning_steps": 7},
    "needle": {"vectors": [[1, 7], [0, 2]], "noise": 0.3},
}
"""Settings other than the defaults, as JSON has them."""
KEEPS_NOTHING = {"grad_ascent", "undial", "ceu", "task_vector", "needle"}
"""Methods that read no retain row but those held out, which everything is measured on."""


def made(name, **settings) -> Method:
    """A method by name, with those of the settings that it has and those that it needs."""
    known = METHODS[name].setting_names()
    return METHODS[name](**NEEDED.get(name, {}), **{key: value for key, value in settings.items() if key in known})


@pytest.fixture(scope="module")
def level(trained) -> Callable[[str], float]:
    """Gold's answer probability on the forget set, but for `SHORT_OF_GOLD`."""
    gold = answer_probability(trained.gold, trained.request.forget).mean().item()
    return lambda name: SHORT_OF_GOLD.get(name, gold)


@pytest.fixture(scope="module")
def at_level(trained, level) -> Callable[[str], Update]:
    """A method's update at the level, run once."""

    @cache
    def update(name: str) -> Update:
        before = trained.full.weights_hash()
        method = made(name, learning_rate=1e-3) if name in DESCENTS else made(name)
        found = method.run(trained.full, trained.request, Stop(BUDGET, level(name)))
        assert trained.full.weights_hash() == before, f"{name} changed the model"
        return found

    return update


@every_method
def test_it_reaches_the_level_within_the_budget_and_stops_there(name, at_level, level):
    found = at_level(name).provenance
    last = found["trace"][-1]
    assert found["stopped"].startswith("the forget set was down")
    assert level(name) - 0.02 < last["forget_probability"] <= level(name) < found["trace"][-2]["forget_probability"]
    assert last["step"] < BUDGET


@every_method
def test_the_update_applied_is_the_model_that_was_measured(name, at_level, trained):
    last = at_level(name).provenance["trace"][-1]["forget_probability"]
    with at_level(name).applied(trained.full.copy()) as model:
        assert answer_probability(model, trained.request.forget).mean().item() == pytest.approx(last, abs=1e-5)


@every_method
def test_the_update_knows_where_it_came_from(name, at_level, trained):
    found = at_level(name).provenance
    assert found["method"]["name"] == name
    assert found["request"] == trained.request.hash
    assert (found["base"], found["base_weights"]) == (trained.full.fingerprint(), trained.full.weights_hash())
    assert found["seconds"] > 0
    assert json.loads(json.dumps(found)) == found


@every_method
def test_it_survives_the_disk(name, at_level, trained, tmp_path):
    loaded = Update.load(at_level(name).save(tmp_path / name))
    assert loaded.identity == at_level(name).identity
    assert same_weights(
        weights_of(loaded.apply(trained.full.copy())), weights_of(at_level(name).apply(trained.full.copy()))
    )


@every_method
def test_the_same_seed_gives_the_same_bytes_and_another_others(name, trained, tmp_path):
    def run(seed, label):
        update = made(name, seed=seed).run(trained.full, trained.request, SHORT)
        return update.identity, (update.save(tmp_path / label) / "delta.safetensors").read_bytes()

    first, again, other = run(3, "first"), run(3, "again"), run(4, "other")
    assert first == again
    assert first[0] != other[0] and first[1] != other[1]


@every_method
def test_the_model_is_left_as_it_was(name, organism, tmp_path):
    before = organism.full.fingerprint()
    made(name).run(organism.full, organism.request, SHORT, folder=tmp_path / "run")
    assert organism.full.fingerprint() == before
    assert organism.full.updates == []
    assert not organism.full.network.training


@every_method
def test_settings_make_the_method_again(name):
    changed = {"seed": 9, **OWN[name]}
    for method in (METHODS[name](), METHODS[name](**changed)):
        settings = json.loads(json.dumps(method.settings()))
        assert settings.pop("name") == name
        assert sorted(settings) == sorted(METHODS[name].setting_names())
        assert METHODS[name](**settings) == method
    assert METHODS[name](**changed).settings().items() >= changed.items()


@every_method
def test_it_is_frozen_named_and_sourced(name):
    method = METHODS[name]()
    with pytest.raises(FrozenInstanceError):
        method.seed = 1
    assert method.name == name and method.source and METHODS[name].__doc__


@every_method
def test_unseen_retain_rows_are_never_touched(name, organism):
    recording = Recording(organism.full.tokenizer)
    spied = LanguageModel(organism.full.network, recording, organism.full.anatomy)
    made(name, batch_size=35).run(spied, organism.request, SHORT)
    read = "\n".join(recording.texts)

    def questions_read(rows):
        return sum(f"Question: {row.question}\n" in read for row in rows)

    request = organism.request
    assert questions_read(request.retain_unseen) == 0
    assert questions_read(request.forget) == len(request.forget)
    assert questions_read(request.retain_held_out) == len(request.retain_held_out)
    assert questions_read(request.retain) == (0 if name in KEEPS_NOTHING else len(request.retain))


@every_descent
def test_held_out_retain_rows_are_measured_but_not_trained_on(name, organism):
    model = organism.full
    method = made(name, batch_size=35)
    recording = Recording(model.tokenizer)
    objective = method.objective(LanguageModel(model.network, recording, model.anatomy), organism.request)
    for step in range(2):
        objective(step)
    read = "\n".join(recording.texts)
    assert not any(f"Question: {row.question}\n" in read for row in organism.request.retain_held_out)


@every_descent
def test_it_ends_in_one_line_when_the_numbers_break(name, organism, tmp_path):
    before = organism.full.fingerprint()
    with pytest.raises(TrainingError, match=f"^{name}, step .*Lower the learning rate") as error:
        made(name, learning_rate=1e30).run(organism.full, organism.request, SHORT, folder=tmp_path / "run")
    assert "\n" not in str(error.value)
    assert organism.full.fingerprint() == before and not organism.full.network.training
    assert list(tmp_path.iterdir()) == []
