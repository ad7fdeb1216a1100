"""The pipeline: one specification from nothing to a report, again without doing anything twice, and on after a kill."""

import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tests.conftest import Organism
from tests.tiny import TINY, bytes_of, tiny_cache

from palimpsest.audit.audit import Candidate
from palimpsest.audit.evidence import RunFolder
from palimpsest.audit.results import Audit, Role
from palimpsest.audit.verify import verify
from palimpsest.data.readers import write_records
from palimpsest.errors import DataError, ModelError, SpecError, StorageError, TrainingError, UpdateError
from palimpsest.lens.lens import Lens
from palimpsest.metrics.likelihood import answer_probability
from palimpsest.run import lenses, pipeline
from palimpsest.run.pipeline import audit_candidates, describe, forget_level, load_candidates, make_update, run
from palimpsest.run.spec import make_spec
from palimpsest.unlearn.descent import Descent
from palimpsest.unlearn.gradient_ascent import GradientAscent
from palimpsest.unlearn.npo import NPO
from palimpsest.unlearn.random_labels import RandomLabels
from palimpsest.unlearn.stopping import Stop
from palimpsest.unlearn.update import Update

FILES = ("run.json", "scores.parquet", "audit.json", "report.html", "report.md", "ledger.jsonl")


def times_of(folder: Path) -> dict[Path, int]:
    """When every file was last written."""
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Where this module's trained models are kept."""
    with tiny_cache(tmp_path_factory) as folder:
        yield folder


@pytest.fixture(scope="module")
def finished(cache: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Audit]:
    """The tiny specification, carried out."""
    folder = tmp_path_factory.mktemp("runs") / "tiny"
    return folder, run(make_spec(TINY), folder)


# One specification from nothing to a report.


def test_a_run_leaves_evidence_report_and_updates_that_verify(finished: tuple[Path, Audit]) -> None:
    folder, audit = finished
    assert all((folder / name).is_file() for name in FILES)
    assert sorted(path.name for path in (folder / "update").iterdir()) == ["grad_diff", "random_labels"]
    assert verify(folder).ok
    assert [model.name for model in audit.models] == ["original", "gold", "sham", "grad_diff", "random_labels"]
    assert audit.title == "Tiny" and audit.spec == make_spec(TINY).resolved()


def test_the_controls_know_and_do_not_know(finished: tuple[Path, Audit]) -> None:
    _, audit = finished
    known = {model.name: model.scores["forget/answer_probability"].value for model in audit.models}
    assert known["original"] > 3 * known["gold"] and known["sham"] > 3 * known["gold"]
    # The methods stopped at gold's level, or earlier for want of steps.
    for name in ("grad_diff", "random_labels"):
        model = audit.model(name)
        assert known["original"] > known[name] == pytest.approx(model.trace[-1].forget_probability, abs=1e-5)
        if "was down to" in model.stopped:
            assert known[name] == pytest.approx(known["gold"], rel=0.2)
            assert known[name] <= known["gold"] + 1e-6


def test_what_was_asked_is_written_down_so_that_it_can_be_run_again(finished: tuple[Path, Audit]) -> None:
    folder, audit = finished
    described = json.loads((folder / "run.json").read_text())
    assert make_spec(described["spec"]) == make_spec(TINY)
    assert described["seeds"] == {"run": 2} and described["spec"]["model"]["training"]["seed"] == 2
    for control in ("original", "gold", "sham"):
        assert described["hashes"][control] == audit.model(control).fingerprint
    assert audit.model("sham").how.startswith("The original, trained for 10 more steps")
    assert audit.model("random_labels").how == describe(RandomLabels(seed=2))


def test_a_second_run_trains_nothing_and_finds_the_same(
    finished: tuple[Path, Audit], cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, audit = finished
    written = times_of(cache) | times_of(folder / "update")
    monkeypatch.setattr(Descent, "run", lambda *_, **__: pytest.fail("a method ran again"))
    monkeypatch.setattr(pipeline, "train_sham", lambda *_, **__: pytest.fail("sham was trained again"))
    monkeypatch.setattr(lenses, "fit", lambda *_, **__: pytest.fail("a lens was fitted again"))
    assert run(make_spec(TINY), folder) == audit
    assert written == times_of(cache) | times_of(folder / "update")
    assert verify(folder).ok


def test_the_order_of_keys_and_what_is_left_to_defaults_make_no_other_run(
    finished: tuple[Path, Audit], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, audit = finished
    monkeypatch.setattr(Descent, "run", lambda *_, **__: pytest.fail("a method ran again"))
    described = json.loads((folder / "run.json").read_text())["spec"]
    assert run(make_spec(dict(reversed(described.items()))), folder) == audit


def test_the_layers_of_every_model_are_read_and_the_lenses_kept(finished: tuple[Path, Audit]) -> None:
    folder, audit = finished
    assert sorted(path.name for path in (folder / "lens").iterdir()) == ["gold", "original"]
    assert Lens.load(folder / "lens" / "gold").provenance["model"] == audit.model("gold").fingerprint
    for model in audit.models:
        assert model.scores["forget/legible_probability"].value >= model.scores["forget/answer_probability"].value


def test_every_model_is_patched_and_the_report_shows_it(finished: tuple[Path, Audit]) -> None:
    folder, audit = finished
    depths = {model.name: model.scores["forget/unlearning_depth"].value for model in audit.models}
    assert (depths["original"], depths["gold"]) == (0, 1)
    assert depths["sham"] < min(depths["grad_diff"], depths["random_labels"])
    for model in audit.models[1:]:
        assert "forget_recovery/patch_coefficients_and_attention_lpr" in model.scores
    assert "Still inside" in (folder / "report.html").read_text()
    assert "Unlearning depth" in (folder / "report.md").read_text()


def test_a_lens_of_other_rows_is_fitted_again(finished: tuple[Path, Audit], trained: Organism, tmp_path: Path) -> None:
    evidence = RunFolder(tmp_path / "run")
    controls: dict[Role, Candidate] = {"original": Candidate("original", "original", "", trained.full)}
    first = lenses.lenses_of("ridge", controls, trained.request, evidence, seed=0).original
    request = replace(trained.request, retain=trained.request.retain[1:])
    second = lenses.lenses_of("ridge", controls, request, evidence, seed=0).original
    assert first.provenance["texts"] != second.provenance["texts"]
    assert lenses.lenses_of("logit", controls, request, evidence, seed=0).original.kind == "logit"


def test_rows_that_tell_of_the_forget_set_are_kept_from_the_lens(trained: Organism, tmp_path: Path) -> None:
    told = replace(trained.request, retain=(*trained.request.retain, *trained.request.forget))
    controls: dict[Role, Candidate] = {"original": Candidate("original", "original", "", trained.full)}
    found = [
        lenses.lenses_of("ridge", controls, request, RunFolder(tmp_path / name), seed=0).original
        for name, request in (("clean", trained.request), ("told", told))
    ]
    assert found[0].provenance["texts"] == found[1].provenance["texts"]


# Refusals.


@pytest.mark.parametrize("changed", [{"seed": 3}, {"stop": {"steps": 31}}, {"methods": ["npo"]}, {"title": "Other"}])
def test_a_folder_of_another_run_is_refused_and_left_alone(
    changed: dict[str, Any], finished: tuple[Path, Audit]
) -> None:
    folder, _ = finished
    before = bytes_of(folder)
    with pytest.raises(SpecError, match="holds a run of another specification; choose another folder with --out"):
        run(make_spec(TINY | changed), folder)
    assert bytes_of(folder) == before


@pytest.mark.parametrize("text", ["[]", "{}", '{"spec": 3}'])
def test_a_run_json_of_something_else_is_another_run(text: str, tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text(text)
    with pytest.raises(SpecError, match="another specification"):
        run(make_spec(TINY), tmp_path)
    assert bytes_of(tmp_path).keys() == {"run.json"}


def test_a_place_that_cannot_be_written_is_refused_before_any_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipeline, "open_source", lambda _: pytest.fail("work was begun"))
    (tmp_path / "file").write_text("mine")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "thesis.tex").write_text("mine")
    for place, says in (("file", "is a file"), ("file/run", "is a file"), ("folder", "holds other files")):
        with pytest.raises(StorageError, match=says):
            run(make_spec(TINY), tmp_path / place)
    monkeypatch.setattr("os.access", lambda *_: False)
    with pytest.raises(StorageError, match="choose a folder that you may write to"):
        run(make_spec(TINY), tmp_path / "new" / "run")
    assert bytes_of(tmp_path).keys() == {"file", "folder", "folder/thesis.tex"}


def test_a_mistake_in_the_data_leaves_no_folder(tmp_path: Path) -> None:
    files = {"kind": "files", "forget": str(tmp_path / "no.jsonl"), "retain": str(tmp_path / "no.jsonl")}
    with pytest.raises(DataError, match="there is no such file"):
        run(make_spec(TINY | {"data": files}), tmp_path / "run")
    assert not (tmp_path / "run").exists()


# A run that was killed.


class Killed(BaseException):
    """What a kill is to the code it hits."""


def test_a_run_killed_between_methods_goes_on_with_the_next(
    finished: tuple[Path, Audit], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, audit = finished
    ran: list[str] = []
    whole = Descent.run

    def noted(method: Descent, *given: Any, **named: Any) -> Update:
        ran.append(method.name)
        if method.name == "random_labels" and len(ran) == 2:
            raise Killed
        return whole(method, *given, **named)

    monkeypatch.setattr(Descent, "run", noted)
    with pytest.raises(Killed):
        run(make_spec(TINY), tmp_path / "run")
    assert not (tmp_path / "run" / "audit.json").exists()
    found = run(make_spec(TINY), tmp_path / "run")
    assert ran == ["grad_diff", "random_labels", "random_labels"]
    assert verify(tmp_path / "run").ok
    assert [model.fingerprint for model in found.models] == [model.fingerprint for model in audit.models]


def test_a_run_killed_inside_a_method_goes_on_from_its_last_measurement(
    finished: tuple[Path, Audit], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, audit = finished
    unfinished = tmp_path / "run" / "update" / ".random_labels.checkpoint"
    steps: list[int] = []
    objective = RandomLabels.objective

    def watched(method: RandomLabels, *given: Any) -> Any:
        loss, lives = objective(method, *given), unfinished.exists()

        def at(step: int) -> Any:
            if unfinished.exists() and not lives:
                raise Killed
            steps.append(step)
            return loss(step)

        return at

    monkeypatch.setattr(RandomLabels, "objective", watched)
    with pytest.raises(Killed):
        run(make_spec(TINY), tmp_path / "run")
    assert unfinished.is_dir() and steps == list(range(len(steps)))
    done = len(steps)
    found = run(make_spec(TINY), tmp_path / "run")
    assert steps == list(range(len(steps))) and len(steps) > done > 0  # no step was taken twice
    assert found.model("random_labels").fingerprint == audit.model("random_labels").fingerprint
    assert sorted(path.name for path in (tmp_path / "run" / "update").iterdir()) == ["grad_diff", "random_labels"]
    assert verify(tmp_path / "run").ok


def test_a_damaged_update_is_made_again(finished: tuple[Path, Audit], tmp_path: Path) -> None:
    shutil.copytree(finished[0], tmp_path / "run")
    weights = tmp_path / "run" / "update" / "grad_diff" / "delta.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    assert not verify(tmp_path / "run").ok
    found = run(make_spec(TINY), tmp_path / "run")
    assert found.model("grad_diff").fingerprint == finished[1].model("grad_diff").fingerprint
    assert verify(tmp_path / "run").ok


# Updates.


def test_an_update_is_taken_from_its_folder_only_if_all_that_made_it_is_the_same(
    organism: Organism, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    method, stop, request = NPO(learning_rate=1e-3), Stop(steps=2), organism.request
    made = make_update(method, organism.full, request, stop, tmp_path / "npo")
    assert [path.name for path in tmp_path.iterdir()] == ["npo"]
    with monkeypatch.context() as patch:
        patch.setattr(Descent, "run", lambda *_, **__: pytest.fail("it ran again"))
        kept = make_update(method, organism.full, request, stop, tmp_path / "npo")
        assert kept.identity == made.identity
    ran: list[str] = []
    whole = Descent.run
    monkeypatch.setattr(Descent, "run", lambda m, *given, **named: ran.append(m.name) or whole(m, *given, **named))
    for other in (
        (replace(method, beta=0.2), organism.full, request, stop),
        (method, organism.full, request, Stop(steps=1)),
        (method, organism.full, replace(request, forget=request.forget[:5]), stop),
        (method, organism.gold, request, stop),
    ):
        make_update(method, organism.full, request, stop, tmp_path / "npo")
        ran.clear()
        make_update(*other, tmp_path / "npo")
        assert ran == ["npo"]


def test_a_loss_that_is_not_finite_leaves_nothing_behind(organism: Organism, tmp_path: Path) -> None:
    before = organism.full.fingerprint()
    wild = GradientAscent(learning_rate=1e30)
    with pytest.raises(TrainingError, match=r"nothing was saved.*Lower the learning rate \(now 1e\+30\)") as error:
        make_update(wild, organism.full, organism.request, Stop(steps=20), tmp_path / "update")
    assert "\n" not in str(error.value)
    assert list(tmp_path.iterdir()) == [] and organism.full.fingerprint() == before


# Models that exist.


@pytest.fixture
def given_files(trained: Organism, tmp_path: Path) -> dict[str, str]:
    request = trained.request
    for name, rows in (("forget", request.forget), ("retain", request.all_retain)):
        write_records(list(rows), tmp_path / f"{name}.jsonl")
    return {name: str(tmp_path / f"{name}.jsonl") for name in ("forget", "retain")}


def test_given_models_are_used_as_they_are(trained: Organism, given_files: dict[str, str], tmp_path: Path) -> None:
    settings: dict[str, Any] = {
        "data": {"kind": "files", **given_files},
        "model": {"kind": "load", "path": str(trained.folder / "full")},
        "sham": None,
        "methods": [{"name": "npo", "learning_rate": 1e-3}],
        "stop": {"steps": 10},
        "max_new_tokens": 2,
    }
    found = run(make_spec(settings), tmp_path / "run")
    assert [model.name for model in found.models] == ["original", "npo"]
    assert found.models[0].how == "Loaded from full." and found.models[0].fingerprint == trained.full.fingerprint()
    assert {note.split(":")[0] for note in found.notes} == {"Recovery was not tried", "No gold", "No sham"}
    assert found.model("npo").stopped == "its 10 steps were used up"  # without gold there is no level to stop at
    assert verify(tmp_path / "run").ok


def test_golds_level_is_what_matched_forgetting_means(trained: Organism) -> None:
    level = forget_level(trained.gold, trained.request)
    assert level == pytest.approx(answer_probability(trained.gold, trained.request.forget).mean().item())
    assert 0 < level < forget_level(trained.full, trained.request)


def test_candidates_from_folders(trained: Organism, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    full, gold = str(trained.folder / "full"), str(trained.folder / "gold")
    update = NPO().run(trained.full.copy(), trained.request, Stop(steps=1))
    update.save(tmp_path / "change")

    def cast(model: str, **controls: str | None) -> list[tuple[str, str]]:
        found = load_candidates(model, **{"original": full, "gold": None, "sham": None} | controls)
        return [(candidate.name, candidate.role) for candidate in found]

    assert cast(str(tmp_path / "change"), gold=gold, sham=full) == [
        *[(name, name) for name in ("original", "gold", "sham")],
        ("npo", "unlearned"),
    ]
    assert cast(gold) == [("original", "original"), ("gold", "unlearned")]
    assert cast(gold, gold=gold)[-1] == ("unlearned", "unlearned")  # 'gold' is the control's name
    monkeypatch.chdir(trained.folder / "full")
    assert cast(".")[-1] == ("full", "unlearned")


def test_candidates_that_do_not_belong_together(trained: Organism, tmp_path: Path) -> None:
    full, gold = str(trained.folder / "full"), str(trained.folder / "gold")
    NPO().run(trained.full.copy(), trained.request, Stop(steps=1)).save(tmp_path / "change")
    with pytest.raises(UpdateError, match="was made for other weights"):
        load_candidates(str(tmp_path / "change"), original=gold, gold=None, sham=None)
    with pytest.raises(ModelError, match="there is no such model folder"):
        load_candidates(str(tmp_path / "nowhere"), original=full, gold=None, sham=None)


def test_an_audit_of_given_models_is_a_run_folder_too(trained: Organism, tmp_path: Path) -> None:
    folders = {"original": str(trained.folder / "full"), "gold": str(trained.folder / "gold"), "sham": None}
    request = replace(trained.request, forget=trained.request.forget[:3], retain_unseen=trained.request.retain[:3])
    asked = {"seed": 1, "max_new_tokens": 2, **folders}
    candidates = load_candidates(folders["gold"] or "", **folders)  # type: ignore[arg-type]
    for _ in range(2):
        found = audit_candidates(request, candidates, tmp_path / "run", title="T", spec=asked)
    assert [model.name for model in found.models] == ["original", "gold", "unlearned"]
    assert json.loads((tmp_path / "run" / "run.json").read_text())["spec"] == asked
    assert verify(tmp_path / "run").ok
    with pytest.raises(SpecError, match="another specification"):
        audit_candidates(request, candidates, tmp_path / "run", title="T", spec=asked | {"seed": 2})
    assert verify(tmp_path / "run").ok


def test_a_method_is_described_with_its_paper_and_settings() -> None:
    told = describe(NPO(beta=0.25, learning_rate=3e-4))
    assert told.startswith("NPO (Zhang et al. 2024, arXiv 2404.05868") and told.endswith(".")
    assert "learning_rate 0.0003" in told and "beta 0.25" in told and "retain_term nll" in told and "name" not in told
