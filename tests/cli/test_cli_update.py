"""`palimpsest update`: show, reapply and adapter, as a person types them."""

import json
import re
from dataclasses import asdict
from pathlib import Path

import pytest
from tests.conftest import Organism
from tests.tiny import bytes_of, invoke

from palimpsest.data.readers import write_records
from palimpsest.metrics.likelihood import answer_probability
from palimpsest.models.language_model import load
from palimpsest.models.organism import train_sham
from palimpsest.unlearn.adapter import export_adapter
from palimpsest.unlearn.random_labels import RandomLabels
from palimpsest.unlearn.stopping import Stop
from palimpsest.unlearn.update import Update

Words = list[object]


@pytest.fixture(scope="module")
def room(trained: Organism, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A user's folder: a model, an update made from it, the same model trained further, and the rows."""
    room = tmp_path_factory.mktemp("room")
    for name in ("full", "gold"):
        (room / name).symlink_to(trained.folder / name)
    request = trained.request
    write_records(request.forget, room / "forget.jsonl")
    write_records(request.all_retain, room / "retain.jsonl")
    full = load(room / "full", check=False)
    stop = Stop(60, forget_probability=0.2, retain_kl=3.0)
    RandomLabels(learning_rate=1e-3).run(full, request, stop).save(room / "change")
    train_sham(full, request.forget, template="plain", steps=30, learning_rate=1e-3).save(room / "further")
    return room


def reapply(room: Path, out: Path, *more: object) -> Words:
    rows = ["--forget", room / "forget.jsonl", "--retain", room / "retain.jsonl"]
    return ["update", "reapply", room / "change", "--model", room / "further", *rows, "--out", out, *more]


def adapter(room: Path, out: Path, *more: object) -> Words:
    return ["update", "adapter", room / "change", "--model", room / "full", "--out", out, *more]


def only_line(words: Words, unchanged: Path) -> str:
    """The one line of error that these words give."""
    before = bytes_of(unchanged)
    code, out, err = invoke(*words)
    lines = err.splitlines()
    assert (code, out) == (2, "") and "Traceback" not in err
    assert [line for line in lines if line.startswith("error: ")] == lines[-1:]
    assert bytes_of(unchanged) == before
    return lines[-1]


# Show.


def test_show_gives_origin_budget_and_norms(room: Path) -> None:
    code, out, _ = invoke("update", "show", room / "change", "--json")
    found, update = json.loads(out), Update.load(room / "change")
    assert code == 0
    assert (found["identity"], found["method"], found["factor"]) == (update.identity, "random_labels", 1.0)
    assert found["base"] == load(room / "full", check=False).fingerprint()
    assert found["budget"] == asdict(Stop(60, forget_probability=0.2, retain_kl=3.0))
    norms = {row["name"]: row["norm"] for row in found["parameters"]}
    assert norms == pytest.approx({name: delta.norm().item() for name, delta in update.delta.items()}, rel=1e-6)
    assert found["norm"] == pytest.approx(sum(norm**2 for norm in norms.values()) ** 0.5)
    assert not any("relative" in row for row in found["parameters"])


def test_show_beside_a_model_gives_shares_of_its_weights(room: Path) -> None:
    found = json.loads(invoke("update", "show", room / "change", "--model", room / "further", "--json")[1])
    weights = dict(load(room / "further", check=False).network.named_parameters())
    for row in found["parameters"]:
        assert row["relative"] == pytest.approx(row["norm"] / weights[row["name"]].norm().item(), rel=1e-5)


def test_show_for_people_is_lines_and_a_table(room: Path, tmp_path: Path) -> None:
    code, out, _ = invoke("update", "show", room / "change")
    update = Update.load(room / "change")
    lines = out.splitlines()
    assert code == 0 and lines[:2] == [f"Update: {update.identity}", "Method: random_labels"]
    assert lines[3] == "Budget: steps 60, forget_probability 0.2, retain_kl 3, measure_every 5"
    rows = {line.split()[0]: line.split()[1:] for line in lines if re.search(r"\.weight\s", line)}
    assert {name: shown for name, (shown,) in rows.items()} == {
        name: f"{delta.norm().item():.4g}" for name, delta in update.delta.items()
    }
    assert lines[-2 if not lines[-1].strip() else -1].split()[0] == "all" and "‖W‖" not in out
    assert "‖Δ‖/‖W‖" in invoke("update", "show", room / "change", "--model", room / "full")[1]
    whole = Update.compose([update, update.scale(0.5)]).save(tmp_path / "sum")
    out = invoke("update", "show", whole)[1]
    assert "Method: random_labels+random_labels" in out and "Stopped: it is the sum of 2 updates" in out


# Reapply.


def test_reapply_meets_golds_level_and_keeps_the_update_for_the_model_as_it_is(
    room: Path, trained: Organism, tmp_path: Path
) -> None:
    code, out, err = invoke(*reapply(room, tmp_path / "again", "--gold", room / "gold", "--json"))
    assert code == 0, err
    found = json.loads(out)
    level = answer_probability(trained.gold, trained.request.forget).mean().item()
    assert found["update"] == str(tmp_path / "again") and found["stopped"].startswith("the forget set was down")
    assert level - 0.02 < found["forget_probability"] <= level < 0.9 < found["forget_probability_before"]
    assert found["rounding"]["overall"] < 1e-5
    update, model = Update.load(tmp_path / "again"), load(room / "further", check=False)
    assert update.provenance["reapplied"]["update"] == Update.load(room / "change").identity
    assert update.provenance["reapplied"]["scale"] == update.factor == found["scale"]
    forgotten = answer_probability(update.apply(model), trained.request.forget).mean().item()
    assert forgotten == pytest.approx(found["forget_probability"], abs=1e-6)
    model.save(tmp_path / "changed")
    words = [tmp_path / "changed" if word == room / "further" else word for word in reapply(room, tmp_path / "new")]
    assert "already, as it was made or at another scale; undo it" in only_line(words, tmp_path)


def test_reapply_within_a_budget_and_to_a_level_given_as_a_number(room: Path, tmp_path: Path) -> None:
    budget = ["--retain-kl", 0.01, "--forget-probability", 0.3]
    code, out, _ = invoke(*reapply(room, tmp_path / "again", *budget))
    lines = out.splitlines()
    assert code == 0 and re.fullmatch(r"Scale 0\.\d{3}: the budget of 0\.01 nats/token .* was used up\.", lines[0])
    assert re.fullmatch(r"Forget set: answer probability 0\.9\d\d before, 0\.\d{3} with the update\.", lines[1])
    spent = Update.load(tmp_path / "again").provenance["trace"][-1]["retain_kl"]
    assert spent < 0.01 and lines[2] == f"Held-out retain rows: KL {spent:.4f} nats/token."
    assert lines[3] == f"Update: {tmp_path / 'again'}"
    again = json.loads(invoke(*reapply(room, tmp_path / "again", "--forget-probability", 0.3, "--json"))[1])
    assert 0.28 < again["forget_probability"] <= 0.3  # and what stood there was replaced


def test_reapply_with_mistakes(room: Path, tmp_path: Path) -> None:
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.tex").write_text("years of work")
    both = ["--gold", room / "gold", "--forget-probability", 0.3]
    assert "--gold and --forget-probability both name a level" in only_line(
        reapply(room, tmp_path / "x", *both), tmp_path
    )
    assert "holds other files" in only_line(reapply(room, tmp_path / "thesis"), tmp_path)
    words = reapply(room, tmp_path / "x")
    words[2] = room / "gold"
    assert "not a whole update" in only_line(words, tmp_path)


# Adapter.


def test_adapter_writes_the_folder_and_says_what_is_lost(room: Path, tmp_path: Path) -> None:
    code, out, _ = invoke(*adapter(room, tmp_path / "adapter", "--rank", 4, "--json"))
    found = json.loads(out)
    update, model = Update.load(room / "change"), load(room / "full", check=False)
    expected = export_adapter(update, model, tmp_path / "expected", 4)
    assert code == 0 and found == {"adapter": str(tmp_path / "adapter"), **asdict(expected)}
    assert bytes_of(tmp_path / "adapter") == bytes_of(tmp_path / "expected")
    code, out, _ = invoke(*adapter(room, tmp_path / "adapter"))
    lines = out.splitlines()
    assert code == 0
    assert re.fullmatch(r"Rank 16, 15 modules: \d+\.\d% of the norm is lost\.", lines[0])
    assert lines[1].startswith("Left out, with ") and "model.embed_tokens.weight" in lines[1]
    assert lines[2] == f"Adapter: {tmp_path / 'adapter'}"


def test_adapter_with_mistakes(room: Path, tmp_path: Path) -> None:
    words = adapter(room, tmp_path / "adapter")
    words[4] = room / "gold"
    assert "was made for other weights" in only_line(words, tmp_path)
    (tmp_path / "file").write_text("x")
    assert "is a file; choose another folder" in only_line(adapter(room, tmp_path / "file"), tmp_path)
    code, out, err = invoke(*adapter(room, tmp_path / "adapter", "--rank", 0))
    assert (code, out) == (2, "") and "--rank" in err and "Traceback" not in err
