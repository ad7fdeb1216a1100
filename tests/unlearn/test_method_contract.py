"""What every method keeps to, whatever its loss. A new method is tested by being in METHODS."""

import json
from collections.abc import Iterator
from dataclasses import FrozenInstanceError

import pytest
from toy_request import Recording, same_weights, weights_of

from palimpsest.errors import TrainingError
from palimpsest.metrics.likelihood import answer_probability
from palimpsest.models.language_model import LanguageModel
from palimpsest.unlearn.descent import Descent
from palimpsest.unlearn.methods import METHODS
from palimpsest.unlearn.stopping import Stop
from palimpsest.unlearn.update import Update

every_method = pytest.mark.parametrize("name", METHODS)
DESCENTS = {name: method for name, method in METHODS.items() if issubclass(method, Descent)}
every_descent = pytest.mark.parametrize("name", DESCENTS)
BUDGET = 200
"""Steps within which every method must bring the organism down to gold's level, all descents at the same rate."""
SHORT = Stop(4, 0.01, measure_every=2)


@pytest.fixture(scope="module")
def level(trained) -> float:
    return answer_probability(trained.gold, trained.request.forget).mean().item()


@pytest.fixture(scope="module")
def at_gold(trained, level) -> Iterator[dict[str, Update]]:
    """Every method's update at gold's forget level."""
    made = {}
    for name, method in METHODS.items():
        before = trained.full.weights_hash()
        settings = {"learning_rate": 1e-3} if name in DESCENTS else {}
        made[name] = method(**settings).run(trained.full, trained.request, Stop(BUDGET, level))
        assert trained.full.weights_hash() == before, f"{name} changed the model"
    return made


@every_method
def test_it_reaches_golds_forget_level_within_the_budget(name, at_gold, level, trained):
    made = at_gold[name].provenance
    last = made["trace"][-1]
    assert made["stopped"].startswith("the forget set was down")
    assert level - 0.02 < last["forget_probability"] <= level < made["trace"][-2]["forget_probability"]
    assert last["step"] < BUDGET


@every_method
def test_the_update_applied_is_the_model_that_was_measured(name, at_gold, trained):
    last = at_gold[name].provenance["trace"][-1]["forget_probability"]
    with at_gold[name].applied(trained.full.copy()) as model:
        assert answer_probability(model, trained.request.forget).mean().item() == pytest.approx(last, abs=1e-5)


@every_method
def test_the_update_knows_where_it_came_from(name, at_gold, trained):
    made = at_gold[name].provenance
    assert made["method"]["name"] == name
    assert made["request"] == trained.request.hash
    assert (made["base"], made["base_weights"]) == (trained.full.fingerprint(), trained.full.weights_hash())
    assert made["seconds"] > 0
    assert json.loads(json.dumps(made)) == made


@every_method
def test_it_survives_the_disk(name, at_gold, trained, tmp_path):
    loaded = Update.load(at_gold[name].save(tmp_path / name))
    assert loaded.identity == at_gold[name].identity
    assert same_weights(
        weights_of(loaded.apply(trained.full.copy())), weights_of(at_gold[name].apply(trained.full.copy()))
    )


@every_method
def test_the_same_seed_gives_the_same_bytes_and_another_others(name, trained, tmp_path):
    def run(seed, label):
        update = METHODS[name](seed=seed).run(trained.full, trained.request, SHORT)
        return update.identity, (update.save(tmp_path / label) / "delta.safetensors").read_bytes()

    first, again, other = run(3, "first"), run(3, "again"), run(4, "other")
    assert first == again
    assert first[0] != other[0] and first[1] != other[1]


@every_method
def test_the_model_is_left_as_it_was(name, organism, tmp_path):
    before = organism.full.fingerprint()
    METHODS[name]().run(organism.full, organism.request, SHORT, folder=tmp_path / "run")
    assert organism.full.fingerprint() == before
    assert organism.full.updates == []
    assert not organism.full.network.training


@every_method
def test_settings_make_the_method_again(name):
    own = {"learning_rate": 0.5, "clip": 2.0} if name in DESCENTS else {"damping": 0.5, "modules": ["*.mlp.*"]}
    changed = {"batch_size": 3, "seed": 9, **own}
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
    METHODS[name](batch_size=35).run(spied, organism.request, SHORT)
    read = "\n".join(recording.texts)

    def questions_read(rows):
        return sum(f"Question: {row.question}\n" in read for row in rows)

    request = organism.request
    assert questions_read(request.retain_unseen) == 0
    assert questions_read(request.forget) == len(request.forget)
    assert questions_read(request.retain_held_out) == len(request.retain_held_out)
    assert questions_read(request.retain) == (0 if name == "grad_ascent" else len(request.retain))


@every_descent
def test_held_out_retain_rows_are_measured_but_not_trained_on(name, organism):
    model = organism.full
    method = METHODS[name](batch_size=35)
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
        METHODS[name](learning_rate=1e30).run(organism.full, organism.request, SHORT, folder=tmp_path / "run")
    assert "\n" not in str(error.value)
    assert organism.full.fingerprint() == before and not organism.full.network.training
    assert list(tmp_path.iterdir()) == []
