"""`palimpsest lens`: fit and show, as a person types them."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
from tests.conftest import Organism
from tests.tiny import bytes_of, invoke

from palimpsest.data.readers import write_records
from palimpsest.lens.detection import DETECTORS
from palimpsest.lens.lens import Lens
from palimpsest.models.language_model import load


@pytest.fixture(scope="module")
def room(trained: Organism, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A user's folder: two models and their rows."""
    room = tmp_path_factory.mktemp("room")
    for name in ("full", "gold"):
        (room / name).symlink_to(trained.folder / name)
    write_records(list(trained.request.forget), room / "forget.jsonl")
    write_records(list(trained.request.retain), room / "retain.jsonl")
    return room


@pytest.fixture(scope="module")
def lens(room: Path) -> Path:
    quick = ["--steps", 4, "--tokens-per-step", 128]
    code, out, error = invoke("lens", "fit", room / "full", room / "retain.jsonl", "--out", room / "lens", *quick)
    assert code == 0, error
    header, *rows = [line.split() for line in out.splitlines() if line.strip() and "─" not in line]
    assert header == ["layer", "logit", "ridge", "tuned"] and rows[-1] == [str(room / "lens")]
    assert [row[0] for row in rows[:-1]] == ["0", "1"]
    return room / "lens"


def test_the_fitted_lens_is_the_models_and_leaves_nothing_else_behind(room: Path, lens: Path) -> None:
    Lens.load(lens).readout(load(room / "full"))
    assert {path.name for path in room.iterdir() if "lens" in path.name} == {"lens"}


def test_the_closed_form_and_numbers_for_machines(room: Path, tmp_path: Path) -> None:
    asked = [
        "lens",
        "fit",
        room / "full",
        room / "retain.jsonl",
        "--kind",
        "ridge",
        "--json",
        "--out",
        tmp_path / "ridge",
    ]
    code, out, _ = invoke(*asked)
    found = json.loads(out)
    assert code == 0 and set(found["kl"]) == {"logit", "ridge"} and found["steps"] == 0
    assert Lens.load(found["lens"]).kind == "ridge"


def test_a_lens_for_the_tuned_lens_package_is_shown_too(room: Path, tmp_path: Path) -> None:
    folder, page = tmp_path / "theirs", tmp_path / "page.html"
    rest = ["--kind", "ridge", "--tuned-lens", "--out", folder]
    code, _, _ = invoke("lens", "fit", room / "full", room / "retain.jsonl", *rest)
    assert code == 0 and {path.name for path in folder.iterdir()} == {"config.json", "params.pt"}
    code, out, _ = invoke("lens", "show", room / "full", "--lens", folder, "--text", "Who is it?", "--out", page)
    assert code == 0 and out.strip() == str(page)
    assert "the tuned lens of full" in page.read_text()


def test_models_are_shown_side_by_side(room: Path, lens: Path, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    rows = ["--rows", room / "forget.jsonl", "--limit", 2]
    code, _, error = invoke(
        "lens", "show", room / "full", room / "gold", "--lens", lens, "--lens", "logit", *rows, "--out", page
    )
    assert code == 0, error
    text = page.read_text()
    assert re.findall(r"<h2>(.*?)</h2>", text) == ["full, row 1", "gold, row 1", "full, row 2", "gold, row 2"]
    assert "Read with the tuned lens of full, the logit lens of gold." in text


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["show", "full"], "error: give either --text or --rows, what is to be read"),
        (["show", "full", "--text", "a", "--rows", "forget.jsonl"], "error: give either --text or --rows"),
        (
            ["show", "full", "gold", "full", "--lens", "logit", "--lens", "logit", "--text", "Who?"],
            "error: --lens is given 2 times for 3 models; give one, or one for each",
        ),
        (["show", "full", "--text", "Who?", "--lens", "retain.jsonl"], "cannot be read as tensors alone"),
        (["show", "full", "--text", "Who?", "--lens", "."], "no config.json there"),
        (["show", "gold", "--text", "Who?", "--lens", "lens"], "this lens was made for another unembedding"),
        (["fit", "full", "forget.jsonl", "--forget", "forget.jsonl", "--out", "new"], "texts tell of the forget set"),
        (["fit", "full", "retain.jsonl", "--kind", "affine", "--out", "new"], "kind 'affine' is unknown; choose ridge"),
        (["fit", "full", "retain.jsonl", "--out", "full"], "holds other files, which would be lost"),
        (["detect", "full", "--normal", "retain.jsonl", "--suspects", "no.jsonl"], "no.jsonl: there is no such file"),
        (
            ["detect", "gold", "--normal", "retain.jsonl", "--suspects", "forget.jsonl", "--lens", "lens"],
            "this lens was made for another unembedding",
        ),
        (
            ["detect", "full", "--normal", "retain.jsonl", "--suspects", "retain.jsonl", "--lens", "."],
            "no config.json there",
        ),
    ],
)
def test_mistakes_are_one_line_and_nothing_is_written(
    words: list[str], says: str, room: Path, lens: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(room)
    before = bytes_of(room)
    code, out, error = invoke("lens", *words)
    assert code == 2 and out == ""
    (line,) = [line for line in error.splitlines() if line.strip()]
    assert line.startswith("error: ") and says in line
    assert bytes_of(room) == before


def test_a_report_card_stands_beside_the_logit_lens(room: Path, lens: Path) -> None:
    asked = ["lens", "eval", room / "full", room / "forget.jsonl", "--lens", lens, "--causal", 3, "--directions", 3]
    code, out, error = invoke(*asked)
    assert code == 0, error
    assert out.index("logit") < out.index(str(lens)) and out.count("model") >= 2
    code, out, _ = invoke(*asked, "--json")
    cards = json.loads(out)
    assert list(cards) == ["logit", str(lens)] and [card["layer"] for card in cards["logit"]] == [0, 1, 2]
    ours, plain = (sum(card["kl"]["value"] for card in cards[name]) for name in (str(lens), "logit"))
    assert ours < plain
    for card in cards["logit"][:-1]:
        assert card["calibration"]["low"] <= card["calibration"]["ratio"] <= card["calibration"]["high"]


def test_a_lens_is_tried_on_another_model(room: Path, lens: Path) -> None:
    code, out, error = invoke(
        "lens", "eval", room / "gold", room / "forget.jsonl", "--lens", lens, "--fitted-to", room / "full", "--json"
    )
    assert code == 0, error
    assert all(card["calibration"] is None for cards in json.loads(out).values() for card in cards)


def test_suspects_are_told_from_normal_rows_that_were_held_out(room: Path, lens: Path, trained: Organism) -> None:
    asked = ["lens", "detect", room / "full", "--normal", room / "retain.jsonl", "--suspects", room / "forget.jsonl"]
    code, out, error = invoke(*asked, "--lens", lens, "--seed", 1)
    assert code == 0, error
    header, *rows = [line.split() for line in out.splitlines() if line.strip() and "─" not in line]
    assert header == ["detector", "AUROC"] and [row[0] for row in rows] == list(DETECTORS)
    assert all(float(low) <= float(value) <= float(high) for _, value, low, high in (numbers(row) for row in rows))
    code, out, error = invoke(*asked, "--lens", lens, "--seed", 1, "--json")
    found = json.loads(out)
    assert code == 0 and list(found["detectors"]) == list(DETECTORS) and found["lens"] == "tuned"
    assert [suspect["id"] for suspect in found["suspects"]] == [record.id for record in trained.request.forget]
    assert all(
        list(row["scores"]) == list(DETECTORS) and row["compared"] for row in found["suspects"] + found["held_out"]
    )
    assert len(found["held_out"]) + found["fitted_to"] == len(trained.request.retain)
    for row, (name, auc) in zip(rows, found["detectors"].items(), strict=True):
        assert numbers(row)[:2] == [name, f"{auc['auroc']:.3f}"]
        sides = [[row["scores"][name] for row in found[side]] for side in ("held_out", "suspects")]
        won = [(normal < suspect) + (normal == suspect) / 2 for normal in sides[0] for suspect in sides[1]]
        assert sum(won) / len(won) == pytest.approx(auc["auroc"])


def numbers(row: list[str]) -> list[str]:
    """A detector, its AUROC, and its interval's ends."""
    name, value, interval = row
    return [name, value, *interval.strip("()").split("-")]


def test_a_length_that_gives_suspects_away_is_said(room: Path, trained: Organism, tmp_path: Path) -> None:
    normal = [replace(row, subject=None) for row in trained.request.retain]
    longer = [replace(row, question=f"{row.question} Now say so.", id=f"{row.id} too") for row in normal]
    for name, rows in {"normal": normal, "longer": longer, "both": longer + normal}.items():
        write_records(rows, tmp_path / f"{name}.jsonl")
    asked = ["lens", "detect", room / "full", "--normal", tmp_path / "normal.jsonl", "--suspects"]
    code, out, error = invoke(*asked, tmp_path / "longer.jsonl")
    assert code == 0 and "length" in out
    (line,) = [line for line in error.splitlines() if line.strip()]
    assert line.startswith("warning: length alone has an AUROC of ")
    assert "suspects are longer than normal rows" in line
    code, out, error = invoke(*asked, tmp_path / "both.jsonl", "--json")
    found = json.loads(out)
    left_out = sum(not row["compared"] for row in found["suspects"])
    assert code == 0 and left_out == found["fitted_to"] == len(normal) // 2 and error.count("warning: ") == 2
    assert found["notes"][1].startswith(f"{left_out} of {2 * len(normal)} suspects are about subjects that the detect")


def test_rows_of_the_same_length_are_not_warned_of(room: Path, trained: Organism, tmp_path: Path) -> None:
    write_records(
        [replace(row, subject=None, id=f"{row.id} too") for row in trained.request.retain], tmp_path / "s.jsonl"
    )
    asked = ["lens", "detect", room / "full", "--normal", room / "retain.jsonl", "--suspects", tmp_path / "s.jsonl"]
    code, _, error = invoke(*asked)
    assert code == 0 and error.strip() == ""
