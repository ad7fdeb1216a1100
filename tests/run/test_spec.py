"""The specification: defaults, a round trip through JSON, and a sentence for every mistake."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from palimpsest.cli.run import DEMO
from palimpsest.errors import SpecError
from palimpsest.models.organism import Architecture, Recipe
from palimpsest.models.training import TrainingSettings
from palimpsest.run.data import TofuSource
from palimpsest.run.spec import Spec, TrainedModel, check_template, make_method, make_spec, read_spec
from palimpsest.unlearn.methods import METHODS
from palimpsest.unlearn.npo import NPO
from palimpsest.unlearn.random_labels import RandomLabels
from palimpsest.unlearn.stopping import Stop

EXAMPLES = sorted((Path(__file__).resolve().parents[2] / "examples").glob("*.yaml"))
WMDP = {"kind": "wmdp", "forget": "a", "retain": "b", "questions": "c", "subject": "biology"}
LEAST: dict[str, Any] = {"data": {"kind": "facts"}, "model": {"kind": "train"}, "methods": ["npo"]}
WITH_A_RATE = sorted(name for name, method in METHODS.items() if "learning_rate" in method.setting_names())


def again(spec: Spec) -> Spec:
    """The specification made from what it resolved to, by way of a file."""
    return make_spec(json.loads(json.dumps(spec.resolved())))


# What a specification says.


def test_the_least_specification_is_filled_up_with_defaults() -> None:
    spec = make_spec(LEAST)
    assert isinstance(spec.model, TrainedModel) and spec.model.recipe() == Recipe()
    assert spec.methods == (NPO(),)
    assert spec.sham is not None and spec.sham.steps == 60
    assert spec.stop.stop(0.25) == Stop(200, 0.25, None, 5)
    assert spec.stop.stop(None) == Stop(200, None, None, 5)


def test_methods_are_names_or_names_with_settings_and_keep_their_order() -> None:
    chosen = ["random_labels", {"name": "npo", "beta": 0.5, "learning_rate": "3e-4"}]
    assert make_spec(LEAST | {"methods": chosen}).methods == (RandomLabels(), NPO(beta=0.5, learning_rate=3e-4))


def test_settings_reach_the_recipe() -> None:
    model = {
        "kind": "train",
        "architecture": {"layers": 2, "width": 64},
        "tokenizer": "bpe",
        "pack": None,
        "training": {"epochs": 3, "betas": [0.8, 0.9]},
    }
    spec = make_spec(LEAST | {"model": model})
    assert isinstance(spec.model, TrainedModel)
    training = TrainingSettings(epochs=3, betas=(0.8, 0.9))
    assert spec.model.recipe() == Recipe(Architecture(layers=2, width=64), "bpe", 2048, None, training)


def test_the_runs_seed_is_everyones_who_names_none() -> None:
    model = {"kind": "train", "training": {"epochs": 2}}
    methods = ["npo", {"name": "random_labels", "seed": 1}, {"name": "grad_diff"}]
    spec = make_spec(LEAST | {"seed": 7, "model": model, "methods": methods})
    assert isinstance(spec.model, TrainedModel)
    assert spec.model.training == TrainingSettings(epochs=2, seed=7)
    assert [method.seed for method in spec.methods] == [7, 1, 7]
    for training, seed in (({}, 7), ({"seed": 9}, 9)):
        model = {"kind": "train", "training": training}
        assert make_spec(LEAST | {"seed": 7, "model": model}).model.training.seed == seed  # type: ignore[union-attr]
    assert make_spec(LEAST | {"seed": 7}).model.training.seed == 7  # type: ignore[union-attr]


def test_stop_levels() -> None:
    for given_level, gold, level in [("gold", 0.2, 0.2), ("gold", None, None), (0.3, 0.2, 0.3), (None, 0.2, None)]:
        stop = make_spec(LEAST | {"stop": {"forget_probability": given_level}}).stop
        assert stop.stop(gold).forget_probability == level


def test_a_split_of_tofu_says_how_many_authors_there_are() -> None:
    for split, forgotten in (("forget01", 2), ("forget05", 10), ("forget10", 20)):
        data = make_spec(LEAST | {"data": {"kind": "tofu", "path": "x", "split": split}}).data
        assert isinstance(data, TofuSource) and (data.authors, data.forget_authors) == (200, forgotten)
    some = make_spec(LEAST | {"data": {"kind": "tofu", "path": "x"}}).data
    assert isinstance(some, TofuSource) and (some.split, some.authors, some.forget_authors) == (None, 40, 4)


def test_an_accuracy_to_stop_at_reaches_the_methods() -> None:
    stop = make_spec(LEAST | {"data": WMDP, "stop": {"forget_accuracy": 0.3}}).stop
    assert stop.stop(0.2) == Stop(200, 0.2, None, 5, 0.3)


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_the_examples_parse(path: Path) -> None:
    spec = read_spec(path)
    assert spec.methods and again(spec) == spec


def test_there_are_examples_and_data_can_be_put_in_place() -> None:
    assert EXAMPLES
    tofu = next(path for path in EXAMPLES if path.name == "tofu.yaml")
    assert read_spec(tofu, data="elsewhere").data.path == "elsewhere"  # type: ignore[union-attr]


# The round trip.


def test_a_resolved_specification_makes_the_same_run_again() -> None:
    specs = [
        DEMO,
        LEAST | {"seed": 3, "sham": None, "methods": [*METHODS]},
        {
            "data": {"kind": "tofu", "path": "x"},
            "model": {"kind": "load", "path": "m", "gold": "g"},
            "methods": ["npo"],
        },
        LEAST | {"data": WMDP, "stop": {"forget_accuracy": 0.3, "forget_probability": None}},
        LEAST | {"data": {"kind": "tofu", "path": "x", "split": "forget01"}},
        {"data": {"kind": "files", "forget": "a", "retain": "b"}, "model": {"kind": "train"}, "methods": ["npo"]},
    ]
    for settings_ in specs:
        spec = make_spec(settings_)
        assert again(spec) == spec and again(spec).resolved() == spec.resolved()
        assert spec.resolved() == json.loads(json.dumps(spec.resolved()))  # plain data, lists included


@settings(deadline=None, max_examples=60)
@given(
    seed=st.integers(0, 2**31),
    people=st.integers(6, 50),
    exposures=st.integers(1, 9),
    pack=st.none() | st.integers(2, 99),
    epochs=st.floats(0.1, 50),
    level=st.none() | st.just("gold") | st.floats(0.001, 0.999),
    names=st.lists(st.sampled_from(WITH_A_RATE), min_size=1, unique=True),
    rate=st.floats(1e-8, 10),
    title=st.text(max_size=20),
)
def test_any_specification_survives_json(
    seed: int, people: int, exposures: int, pack: int, epochs: float, level: Any, names: list, rate: float, title: str
) -> None:
    spec = make_spec(
        {
            "title": title,
            "seed": seed,
            "data": {"kind": "facts", "people": people, "forget_people": people // 3, "exposures": exposures},
            "model": {"kind": "train", "pack": pack, "training": {"epochs": epochs, "learning_rate": rate}},
            "methods": [names[0], *({"name": name, "learning_rate": rate} for name in names[1:])],
            "stop": {"forget_probability": level},
        }
    )
    assert again(spec) == spec and again(spec).resolved() == spec.resolved()


# Mistakes.


def change(path: str, value: Any) -> dict[str, Any]:
    """The least specification with one key changed, e.g. `model.training.epochs`."""
    changed: dict[str, Any] = json.loads(json.dumps(LEAST))
    place = changed
    *sections, key = path.split(".")
    for section in sections:
        place = place.setdefault(section, {})
    place[key] = value
    return changed


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        # Unknown keys, at each level.
        ("titel", "x", "unknown key 'titel'; did you mean 'title'?"),
        ("data.peple", 3, "unknown key 'data.peple'; did you mean 'people'?"),
        ("data.path", "x", "unknown key 'data.path'; known are exposures, forget_people, forget_worlds, kind"),
        ("model.tokeniser", "bpe", "unknown key 'model.tokeniser'; did you mean 'tokenizer'?"),
        ("model.architecture.layer", 3, "unknown key 'model.architecture.layer'; did you mean 'layers'?"),
        ("model.training.epoch", 3, "unknown key 'model.training.epoch'; did you mean 'epochs'?"),
        ("stop.step", 3, "unknown key 'stop.step'; did you mean 'steps'?"),
        ("sham.step", 3, "unknown key 'sham.step'; did you mean 'steps'?"),
        # Kinds.
        ("data", {"people": 12}, "key 'data.kind' is missing"),
        ("model", {}, "key 'model.kind' is missing"),
        ("data.kind", "fact", "data.kind: unknown 'fact'; did you mean 'facts'?"),
        ("model.kind", "lode", "model.kind: unknown 'lode'; did you mean 'load'?"),
        ("model.kind", "load", "key 'model.path' is missing"),
        # Types and limits.
        ("data", "facts", "data: expected a mapping of keys to values, not 'facts'"),
        ("model.training", 3, "model.training: expected a mapping of keys to values, not 3"),
        ("data.people", "many", "data.people: input should be a valid integer, not 'many'"),
        ("data", {"kind": "wmdp", "forget": "a", "retain": "b", "subject": "x"}, "key 'data.questions' is missing"),
        ("data", {"kind": "wmdp", "retian": "b"}, "key 'data.forget' is missing"),
        ("data", WMDP | {"max_pasages": 9}, "unknown key 'data.max_pasages'; did you mean 'max_passages'?"),
        ("data", WMDP | {"max_passages": 2}, "data.max_passages: input should be greater than or equal to 3, not 2"),
        ("data", {"kind": "tofu", "path": "x", "split": "forget1"}, "data.split: unknown 'forget1'; did you mean"),
        (
            "data",
            {"kind": "tofu", "path": "x", "split": "forget05", "forget_authors": 4},
            "data: split forget05 has forget_authors 10, not 4; leave forget_authors out",
        ),
        ("data.people", 2, "data.people: input should be greater than or equal to 4, not 2"),
        ("data.forget_people", 130, "facts: forget_people is 130, but there are 120 people"),
        ("seed", "x", "seed: input should be a valid integer, not 'x'"),
        ("title", None, "title: input should be a valid string, not None"),
        ("template", "plan", "template: unknown 'plan'; did you mean 'plain'?"),
        ("template", "raw", "template: a model of kind train reads plain questions, so it cannot be raw"),
        ("model.tokenizer", "word", "model.tokenizer: unknown 'word'; did you mean 'words'?"),
        ("model.architecture.heads", 3, "architecture: width 128"),
        ("model.training.batch_size", 0, "training: batch_size is 0; it must be above 0"),
        ("stop.forget_probability", "golden", "between 0 and 1, gold or null, not 'golden'"),
        ("stop.forget_probability", 1.5, "between 0 and 1, gold or null, not 1.5"),
        ("stop.forget_probability", [1], "between 0 and 1, gold or null, not [1]"),
        ("stop.forget_accuracy", 1.5, "stop.forget_accuracy: input should be less than 1, not 1.5"),
        ("stop.forget_accuracy", 0.3, "stop.forget_accuracy: data of kind facts has no multiple-choice questions"),
        ("stop.steps", 0, "stop.steps: input should be greater than or equal to 1, not 0"),
        # Methods.
        ("methods", [], "methods: expected at least 1 in the list"),
        ("methods", "npo", "methods: expected a list, not 'npo'"),
        ("methods", ["npo", "npoo"], "methods.1: unknown method 'npoo'; did you mean 'npo'?"),
        ("methods", ["zzz"], "methods.0: unknown method 'zzz'; known are altpo, ceu, dpo, grad_ascent, "),
        ("methods", [{"beta": 1}], "methods.0: expected a method's name, or a mapping with its name and settings"),
        ("methods", [3], "methods.0: expected a method's name, or a mapping with its name and settings, not 3"),
        ("methods", [{"name": ["npo"]}], "methods.0: expected a method's name"),
        ("methods", [{"name": "npo", "bta": 1}], "methods.0: method npo has no setting 'bta'; did you mean 'beta'?"),
        ("methods", [{"name": "npo", 3: 1}], "methods.0: method npo has no setting 3; known are batch_size, beta"),
        ("methods", [{"name": "npo", "beta": "x"}], "methods.0.beta: input should be a valid number, not 'x'"),
        ("methods", [{"name": "npo", "retain_term": "x"}], "methods.0.retain_term: unknown 'x'; known are kl, nll"),
        ("methods", [{"name": "npo", "learning_rate": -1}], "npo: learning_rate is -1.0; it must be above 0"),
        ("methods", ["npo", {"name": "npo", "beta": 0.2}], "methods: npo stands there twice"),
    ],
)
def test_a_mistake_is_one_sentence_with_its_place(path: str, value: Any, message: str) -> None:
    with pytest.raises(SpecError) as error:
        make_spec(change(path, value), "my.yaml")
    assert str(error.value).startswith("my.yaml: ") and message in str(error.value)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 250


@pytest.mark.parametrize("key", ["data", "model", "methods"])
def test_a_missing_section_is_named(key: str) -> None:
    with pytest.raises(SpecError, match=f"specification: key '{key}' is missing"):
        make_spec({name: value for name, value in LEAST.items() if name != key})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "a specification is a mapping with the keys title, seed, data"),
        ("- npo", "a specification is a mapping with the keys title, seed, data"),
        ("data: {kind: facts\nmodel: 3", "is not valid YAML: .*line 2"),
        ("title: \x07", "is not valid YAML"),
        ("!!python/object/apply:os.getcwd []", "is not valid YAML"),
        ("3: 4\ndata: {kind: facts}\nmodel: {kind: train}\nmethods: [npo]", "3: keys should be strings"),
    ],
)
def test_a_file_that_is_no_specification(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(text)
    with pytest.raises(SpecError, match=message) as error:
        read_spec(path)
    assert str(error.value).startswith(f"{path}: ") and "\n" not in str(error.value)


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match=r"run\.yaml: cannot be read \(No such file"):
        read_spec(tmp_path / "run.yaml")
    with pytest.raises(SpecError, match=r"cannot be read \(Is a directory"):
        read_spec(tmp_path)
    (tmp_path / "latin.yaml").write_bytes("title: café".encode("latin-1"))
    with pytest.raises(SpecError, match=r"latin\.yaml: cannot be read .*utf-8"):
        read_spec(tmp_path / "latin.yaml")


@pytest.mark.parametrize("data", ["{kind: facts}", "{kind: files, forget: a, retain: b}", "facts"])
def test_data_can_replace_only_a_path(data: str, tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(f"data: {data}\nmodel: {{kind: train}}\nmethods: [npo]\n")
    with pytest.raises(SpecError, match=r"--data replaces data\.path, but this specification's data has no path"):
        read_spec(path, data="x")


# A method from the command line.


def test_a_method_by_name_with_settings_as_text() -> None:
    assert make_method("npo", ["beta=0.2", "learning_rate=1e-3", "retain_term=kl"], seed=4) == NPO(
        beta=0.2, learning_rate=1e-3, retain_term="kl", seed=4
    )
    assert make_method("random_labels", ["seed=9"], seed=4).seed == 9


@pytest.mark.parametrize(
    ("name", "setting", "message"),
    [
        ("npoo", "beta=1", "method npoo: unknown method 'npoo'; did you mean 'npo'?"),
        ("npo", "beta", "--set beta: write it as NAME=VALUE"),
        ("npo", "=3", "--set =3: write it as NAME=VALUE"),
        ("npo", "name=grad_diff", "--set name=grad_diff: a method is chosen with --method"),
        ("npo", "bta=1", "method npo: method npo has no setting 'bta'; did you mean 'beta'?"),
        ("npo", "beta=", "method npo: beta: input should be a valid number, not None"),
        ("npo", "beta=[", "method npo: beta: input should be a valid number, not '['"),
        ("npo", "beta=0", "npo: beta is 0.0; it must be above 0"),
        ("npo", "learning_rate=nan", "npo: learning_rate is nan; it must be above 0"),
        ("npo", "batch_size=1.5", "method npo: batch_size: input should be a valid integer"),
    ],
)
def test_a_mistaken_setting(name: str, setting: str, message: str) -> None:
    with pytest.raises(SpecError) as error:
        make_method(name, [setting])
    assert message in str(error.value) and "\n" not in str(error.value)


def test_templates_are_checked_by_name() -> None:
    assert check_template("chat") == "chat"
    with pytest.raises(SpecError, match=r"--template chatt: unknown; did you mean 'chat'\?"):
        check_template("chatt")
