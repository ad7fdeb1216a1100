"""The search on methods whose outcome is a known function of their settings, and on a real one."""

import builtins
import importlib.util
import json
import math
import shutil
import sys
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import optuna
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from toy_request import Recording, same_weights, toy_model, toy_request

from palimpsest.errors import EvidenceError, SpecError, StorageError, TrainingError, UpdateError
from palimpsest.metrics.likelihood import answer_probability
from palimpsest.models.language_model import LanguageModel
from palimpsest.unlearn import search as searching
from palimpsest.unlearn.descent import Descent
from palimpsest.unlearn.method import Method
from palimpsest.unlearn.methods import METHODS
from palimpsest.unlearn.npo import NPO
from palimpsest.unlearn.search import SPACES, Between, Trial, search
from palimpsest.unlearn.stopping import Stop
from palimpsest.unlearn.update import Update

LEVEL = 0.3
STOP = Stop(6, LEVEL, measure_every=3)
MODEL, REQUEST = toy_model(), toy_request()


def outcome(strength, kind):
    """(forget probability, KL): the stronger, the less is left and the more it costs; kind b costs more."""
    if strength > 8:
        return None
    return max(0.9 - 0.3 * strength, 0.25), strength**2 + (0.5 if kind == "b" else 0.0)


@dataclass(frozen=True, kw_only=True)
class Fake(Method):
    """A method that does no work. Its own settings do not reach the level."""

    name: ClassVar[str] = "fake"
    source: ClassVar[str] = "none"
    runs: ClassVar[list] = []

    strength: float = 0.5
    kind: str = "b"

    def run(self, model, request, stop=None, *, folder=None):
        self.runs.append(self)
        if (found := outcome(self.strength, self.kind)) is None:
            raise TrainingError("fake, step 1: the loss is nan")
        measured = dict(zip(("forget_probability", "retain_kl"), found, strict=True))
        started = {"step": 0, "forget_probability": 0.9, "retain_kl": 0.0}
        made = {"method": self.settings(), "trace": [started, {"step": 1, **measured}], "stopped": "done"}
        delta = {"lm_head.weight": torch.full((2, 2), self.strength)}
        return Update(delta, {**made, "base_weights": "none"})


SPACE = {"strength": Between(0.1, 10), "kind": ("a", "b")}


@pytest.fixture(autouse=True)
def _forget_runs():
    Fake.runs.clear()


def find(trials, seed=0, *, space=SPACE, stop=STOP, folder=None):
    return search(Fake(), space, MODEL, REQUEST, stop, trials, seed, folder=folder)


def without_seconds(trials):
    return [{key: value for key, value in vars(trial).items() if key != "seconds"} for trial in trials]


@pytest.mark.parametrize("seed", range(3))
def test_the_best_is_the_least_kl_among_the_trials_that_reach_the_level(seed):
    found = find(16, seed)
    ends = [outcome(run.strength, run.kind) for run in Fake.runs]
    reaching = [(end[1], number) for number, end in enumerate(ends) if end and end[0] <= LEVEL]
    _, best = min(reaching)
    assert len(Fake.runs) == len(found.trials) == 16
    assert any(end and end[0] > LEVEL and end[1] < ends[best][1] for end in ends), "no other trial was a temptation"
    assert found.method == Fake.runs[best] and found.best is found.trials[best] and found.best.reached
    assert found.update.provenance["method"] == found.method.settings()
    assert found.update.delta["lm_head.weight"][0, 0].item() == pytest.approx(found.method.strength)


def test_every_trial_says_what_it_tried_and_where_it_ended():
    found = find(25)
    for run, trial in zip(Fake.runs, found.trials, strict=True):
        end = outcome(run.strength, run.kind)
        assert trial.settings == {"strength": run.strength, "kind": run.kind}
        assert (trial.forget_probability, trial.dev_kl) == (end or (None, None))
        assert trial.reached == bool(end and end[0] <= LEVEL)
        assert trial.stopped == ("done" if end else "fake, step 1: the loss is nan") and trial.seconds >= 0
    assert {trial.dev_kl is None for trial in found.trials} == {True, False}, "no run broke off, or all"


def test_where_no_trial_reaches_the_level_the_nearest_is_shown_and_said_to_fall_short():
    found = find(12, stop=Stop(6, 0.01, measure_every=3))
    nearest = min(trial.forget_probability for trial in found.trials if trial.forget_probability is not None)
    assert not found.best.reached and found.best.forget_probability == nearest


def test_where_every_run_breaks_off_there_is_nothing_to_give_back():
    with pytest.raises(TrainingError, match=r"^fake: no trial of 3 came to an end.*the loss is nan$") as error:
        # The default is the first trial, so it must break off too.
        search(Breaking(), {"strength": Between(9, 10)}, MODEL, REQUEST, STOP, 3, 0)
    assert "\n" not in str(error.value)


@dataclass(frozen=True, kw_only=True)
class Breaking(Fake):
    """It always breaks off."""

    strength: float = 9.5


def test_the_first_trial_has_the_methods_own_settings_and_the_rest_stay_in_the_space():
    found = find(12, space={"strength": Between(0.4, 3)})
    first, *others = Fake.runs
    assert first == Fake()
    assert all(0.4 <= run.strength <= 3 and run.kind == "b" for run in others)
    assert len({run.strength for run in Fake.runs}) == 12
    assert find(1).method == Fake() and len(found.trials) == 12


def test_a_few_values_are_each_tried_once_and_then_it_ends():
    found = find(12, space={"kind": ("a", "b")})
    assert [run.kind for run in Fake.runs] == ["b", "a"] and len(found.trials) == 2


def test_the_seed_decides_what_is_tried_and_is_that_of_every_run():
    one, again, other = find(8, 5), find(8, 5), find(8, 6)
    assert without_seconds(one.trials) == without_seconds(again.trials)
    assert [trial.settings for trial in one.trials[1:]] != [trial.settings for trial in other.trials[1:]]
    assert [run.seed for run in Fake.runs] == [5] * 16 + [6] * 8


def test_it_learns_from_the_trials_before():
    """TPE after its 10 random trials does less harm than random search; the least is 4, at strength 2 and kind a."""
    generator = np.random.default_rng(0)
    harm = []
    for seed in range(5):
        found = find(30, seed)
        drawn = np.exp(generator.uniform(math.log(0.1), math.log(10), (400, 30)))
        kinds = generator.choice(["a", "b"], (400, 30))
        by_chance = [
            min((end[1] for end in map(outcome, *trial) if end and end[0] <= LEVEL), default=math.inf)
            for trial in zip(drawn, kinds, strict=True)
        ]
        harm.append((found.best.dev_kl, np.median(by_chance)))
    assert sum(tuned < random for tuned, random in harm) >= 4


ENDS = st.one_of(st.none(), st.tuples(st.floats(0, 1), st.floats(0, 50)))


@given(st.lists(ENDS, min_size=1, max_size=8), st.floats(0, 1))
@settings(deadline=None, max_examples=100)
def test_the_order_is_the_level_first_then_the_harm(ends, level):
    trials = [Trial({}, bool(end and end[0] <= level), *(end or (None, None)), 0.0, "") for end in ends]
    best = min(trials, key=lambda trial: trial.order)
    if reaching := [trial for trial in trials if trial.reached]:
        assert best.reached and best.dev_kl == min(trial.dev_kl for trial in reaching)
    elif whole := [trial for trial in trials if trial.dev_kl is not None]:
        assert best.forget_probability == min(trial.forget_probability for trial in whole)


# The folder


@pytest.mark.parametrize("before", [1, 7, 11])
def test_a_search_goes_on_where_it_was_and_runs_nothing_twice(before, tmp_path):
    whole = find(12)
    Fake.runs.clear()
    find(before, folder=tmp_path / "search")
    resumed = find(12, folder=tmp_path / "search")
    assert len(Fake.runs) == 12
    assert without_seconds(resumed.trials) == without_seconds(whole.trials)
    assert resumed.method == whole.method and resumed.update.provenance == whole.update.provenance
    assert same_weights(resumed.update.delta, whole.update.delta)
    again = find(12, folder=tmp_path / "search")
    assert len(Fake.runs) == 12
    assert again.trials == resumed.trials and again.update.provenance == whole.update.provenance


@pytest.mark.parametrize("fatal", range(1, 9))
def test_a_search_that_is_killed_at_any_write_ends_the_same(fatal, tmp_path, monkeypatch):
    """Killed before its n-th write, whatever that was: an update, the trials, or what the search is."""
    whole, writes = find(3), []

    def dying(write):
        def wrapped(*args):
            writes.append(args)
            if len(writes) == fatal:
                raise KeyboardInterrupt
            return write(*args)

        return wrapped

    with monkeypatch.context() as patch:
        patch.setattr(searching, "write_text", dying(searching.write_text))
        patch.setattr(searching, "write_json", dying(searching.write_json))
        patch.setattr(Update, "save", dying(Update.save))
        try:
            find(3, folder=tmp_path / "search")
        except KeyboardInterrupt:
            pass
    resumed = find(3, folder=tmp_path / "search")
    assert without_seconds(resumed.trials) == without_seconds(whole.trials)
    assert resumed.update.provenance == whole.update.provenance


def test_the_folder_holds_a_line_a_trial_and_the_best_update_alone(tmp_path):
    found = find(9, folder=tmp_path / "search")
    lines = (tmp_path / "search" / "trials.jsonl").read_text().splitlines()
    assert [json.loads(line)["settings"] for line in lines] == [trial.settings for trial in found.trials]
    assert sorted(path.name for path in (tmp_path / "search").iterdir()) == [
        "search.json",
        "trials.jsonl",
        f"update-{found.trials.index(found.best)}",
    ]


def test_another_search_is_not_taken_up(tmp_path):
    find(2, folder=tmp_path / "search")
    for changed in ({"seed": 1}, {"space": {"strength": Between(0.1, 9)}}, {"stop": Stop(6, 0.4, measure_every=3)}):
        with pytest.raises(SpecError, match="holds another search") as error:
            find(2, **changed, folder=tmp_path / "search")
        assert "\n" not in str(error.value)
    with pytest.raises(SpecError, match="holds 2 trials already"):
        find(1, folder=tmp_path / "search")


def test_a_folder_of_other_things_is_left_alone(tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(StorageError, match="holds other files"):
        find(2, folder=tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


@pytest.mark.parametrize("name", ["search.json", "trials.jsonl"])
@pytest.mark.parametrize("text", ["", "{", "[1]\n", '{"settings": {}}\n'])
def test_a_damaged_record_is_said_to_be_one(name, text, tmp_path):
    find(2, folder=tmp_path / "search")
    if name == "trials.jsonl" and not text:
        text = "\x00"
    (tmp_path / "search" / name).write_text(text)
    with pytest.raises((EvidenceError, SpecError)) as error:
        find(2, folder=tmp_path / "search")
    assert "\n" not in str(error.value) and str(tmp_path / "search") in str(error.value)


def test_an_update_that_is_gone_is_missed(tmp_path):
    found = find(2, folder=tmp_path / "search")
    shutil.rmtree(tmp_path / "search" / f"update-{found.trials.index(found.best)}")
    with pytest.raises(UpdateError, match="not a whole update"):
        find(2, folder=tmp_path / "search")


# What is asked for


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"stop": Stop(5)}, "fake: a search compares trials at one forget level, but stop has no forget_probability"),
        ({"trials": 0}, "fake: a search of 0 trials finds nothing; ask for at least 1"),
        ({"space": {"weight": Between(1, 2)}}, "fake: has no setting 'weight' to search; it has seed, strength, kind"),
        ({"space": {"strength": Between(1, 2)}}, "fake: the first trial has strength 0.5, which is not in its space"),
        ({"space": {"kind": ("a", "c")}}, "fake: the first trial has kind b, which is not in its space"),
    ],
)
def test_what_cannot_be_searched_is_refused_before_anything_runs(changes, message, tmp_path):
    with pytest.raises(SpecError) as error:
        find(**({"trials": 2, "folder": tmp_path / "search"} | changes))
    assert str(error.value).startswith(message) and "\n" not in str(error.value)
    assert not Fake.runs and not list(tmp_path.iterdir())


@pytest.mark.parametrize(("low", "high", "log"), [(0, 1, True), (-1, 1, True), (2, 1, False), (1, 1, True)])
def test_a_range_that_is_none_is_refused(low, high, log):
    with pytest.raises(SpecError, match=f"^{low} to {high} is no "):
        Between(low, high, log)


def test_without_optuna_it_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(SpecError, match=r"^a search needs optuna.*pip install palimpsest\[search\]$"):
        find(2)
    assert not Fake.runs


def test_a_single_trial_proposes_nothing_and_needs_no_optuna(monkeypatch):
    monkeypatch.setitem(sys.modules, "optuna", None)
    found = find(1).best.settings
    assert found == {name: Fake().settings()[name] for name in SPACE}


def test_the_module_alone_does_not_need_optuna(monkeypatch):
    real = builtins.__import__

    def without(name, *args, **kwargs):
        assert not name.startswith("optuna")
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    spec = importlib.util.spec_from_file_location("a_second_search", searching.__file__)
    monkeypatch.setitem(sys.modules, "a_second_search", module := importlib.util.module_from_spec(spec))
    spec.loader.exec_module(module)
    assert module.SPACES.keys() == SPACES.keys()


def test_the_users_own_optuna_logging_is_put_back():
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    try:
        find(3)
        assert optuna.logging.get_verbosity() == optuna.logging.ERROR
    finally:
        optuna.logging.set_verbosity(optuna.logging.INFO)


# Real methods


def test_every_method_that_descends_has_a_space_that_holds_its_own_settings():
    descending = {name: method for name, method in METHODS.items() if issubclass(method, Descent)}
    assert set(SPACES) == {*descending, "kfade"}
    for name, method in descending.items():
        searching._refuse_unless_searchable(method(), SPACES[name], STOP, 1)
        assert "learning_rate" in SPACES[name]


@pytest.mark.parametrize("name", SPACES)
def test_what_a_space_proposes_makes_a_method(name):
    done = [Trial({key: METHODS[name]().settings()[key] for key in SPACES[name]}, True, 0.1, 0.2, 1.0, "")]
    for number in range(min(20, searching._size(SPACES[name]) - 1)):
        proposed = searching._proposed(METHODS[name], SPACES[name], done, 3)
        assert proposed not in [trial.settings for trial in done]
        assert METHODS[name](**proposed).settings().items() >= proposed.items()
        assert json.loads(json.dumps(proposed)) == proposed
        done.append(Trial(proposed, True, 0.1, float(number), 1.0, ""))


def test_a_real_search_meets_the_level_and_never_reads_the_unseen_rows(organism):
    request, before = organism.request, organism.full.fingerprint()
    recording = Recording(organism.full.tokenizer)
    spied = LanguageModel(organism.full.network, recording, organism.full.anatomy)
    space = {"learning_rate": Between(3e-4, 2e-3), "retain_weight": Between(0.3, 10), "batch_size": (8, 16)}
    found = search(NPO(), space, spied, request, Stop(60, 0.6), 3, 0)
    read = "\n".join(recording.texts)
    assert not any(f"Question: {row.question}\n" in read for row in request.retain_unseen)
    assert all(f"Question: {row.question}\n" in read for row in request.retain_held_out)

    assert organism.full.fingerprint() == before
    reaching = [trial for trial in found.trials if trial.reached]
    assert len(reaching) >= 2 and found.best.dev_kl == min(trial.dev_kl for trial in reaching)
    with found.update.applied(organism.full.copy()) as model:
        probability = answer_probability(model, request.forget).mean().item()
    assert probability == pytest.approx(found.best.forget_probability, abs=1e-5)
    assert 0.58 < probability <= 0.6 + 1e-5
    assert found.update.identity == found.method.run(organism.full, request, Stop(60, 0.6)).identity
