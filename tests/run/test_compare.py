"""A comparison from a specification to its page: seeds, equal trials, nothing measured twice."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.tiny import TINY, invoke, tiny_cache

from palimpsest.audit.comparison import Comparison
from palimpsest.errors import SpecError, StorageError
from palimpsest.run import compare as room
from palimpsest.run.compare import compare, with_seed
from palimpsest.run.spec import make_spec

ASKED = TINY | {"methods": [{"name": "grad_diff", "learning_rate": 1e-3}, {"name": "npo", "seed": 7}]}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, Comparison]]:
    with tiny_cache(tmp_path_factory):
        folder = tmp_path_factory.mktemp("compared")
        with pytest.MonkeyPatch.context() as here:
            here.setattr(room, "search", None)  # in this process; what the two others leave undone would fail
            found = compare(make_spec(ASKED), (2, 3), 1, folder, processes=2)
        yield folder, found


def test_every_seed_has_its_own_models_and_every_model_its_numbers(finished: tuple[Path, Comparison]) -> None:
    _, found = finished
    assert found.names == ["original", "gold", "sham", "grad_diff", "npo"]
    for name in found.names:
        first, second = found.of(name)
        assert (first.seed, second.seed) == (2, 3) and first.values != second.values
        assert set(first.values) == {"forget", "reworded", "harm", "unseen", "from_gold"}
    for seed in (0, 1):
        original, gold, tuned = (found.of(name)[seed] for name in ("original", "gold", "grad_diff"))
        assert original.values["harm"] == pytest.approx(0, abs=1e-6)
        assert gold.values["from_gold"] == pytest.approx(0, abs=1e-6)
        assert gold.values["forget"] < original.values["forget"]
        assert tuned.reached == (tuned.values["forget"] <= gold.values["forget"] + 1e-6)


def test_what_is_on_record_is_not_measured_again(
    finished: tuple[Path, Comparison], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, found = finished
    monkeypatch.setattr(room, "search", None)
    monkeypatch.setattr(room, "measured", None)
    assert compare(make_spec(ASKED), (2, 3), 1, folder) == found
    assert json.loads((folder / "comparison.json").read_text()) == json.loads(json.dumps(found.to_json()))


def test_a_method_with_other_settings_is_measured_and_the_others_are_not(
    finished: tuple[Path, Comparison], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, found = finished
    made = []
    real = room.search
    monkeypatch.setattr(
        room, "search", lambda method, *rest, **more: made.append(method) or real(method, *rest, **more)
    )
    changed = ASKED | {"methods": [ASKED["methods"][0] | {"learning_rate": 2e-3}, ASKED["methods"][1]]}
    again = compare(make_spec(changed), (2,), 1, folder, processes=1)
    assert [method.name for method in made] == ["grad_diff"]
    assert again.of("npo") == [model for model in found.of("npo") if model.seed == 2]


def test_side_by_side_and_one_by_one_are_the_same(finished: tuple[Path, Comparison], tmp_path: Path) -> None:
    _, found = finished
    alone = compare(make_spec(ASKED), (2,), 1, tmp_path, processes=1)
    for model in alone.models:
        (beside,) = [other for other in found.models if (other.name, other.seed) == (model.name, model.seed)]
        assert beside.values == pytest.approx(model.values, rel=1e-4, abs=1e-6)


def test_another_seed_goes_wherever_none_was_named() -> None:
    spec = with_seed(make_spec(ASKED), 5)
    assert spec.seed == 5 and spec.model.training.seed == 5  # type: ignore[union-attr]
    assert [method.seed for method in spec.methods] == [5, 7]


def test_the_verb_prints_a_table_and_writes_the_page(finished: tuple[Path, Comparison], tmp_path: Path) -> None:
    import yaml

    folder, _ = finished
    spec = tmp_path / "tiny.yaml"
    spec.write_text(yaml.safe_dump(ASKED))
    code, out, _ = invoke("compare", spec, "--seeds", 2, "--first-seed", 2, "--out", folder)
    assert code == 0
    assert all(word in out for word in ("grad_diff", "reached", "KL", "Open the report")) and "2/2" in out
    assert (folder / "comparison.html").is_file() and (folder / "comparison.md").is_file()


def test_what_cannot_be_compared_is_refused_before_anything_is_trained(tmp_path: Path) -> None:
    aimless = make_spec(ASKED | {"stop": {"steps": 30, "forget_probability": None}})
    with pytest.raises(SpecError, match=r"one forget level; give stop\.forget_probability"):
        compare(aimless, (0,), 1, tmp_path / "new")
    with pytest.raises(SpecError, match="nothing is known of where to search kfade_paper's settings; ask for 1 trial"):
        compare(make_spec(ASKED | {"methods": ["kfade_paper"]}), (0,), 2, tmp_path / "new")
    (tmp_path / "letter.txt").write_text("dear")
    with pytest.raises(StorageError):
        compare(make_spec(ASKED), (0,), 1, tmp_path)
    assert not (tmp_path / "new").exists()
