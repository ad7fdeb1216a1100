"""The run folder's evidence: what is written comes back, and whatever is changed afterwards is found and named."""

import hashlib
import json
import math
import random
import signal
import subprocess
import sys
import time
from dataclasses import asdict, replace
from functools import cache
from pathlib import Path

import duckdb
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from palimpsest.audit.environment import code_hash, environment
from palimpsest.audit.evidence import RunFolder
from palimpsest.audit.ledger import Ledger
from palimpsest.audit.results import Audit, Audited
from palimpsest.audit.verify import verify
from palimpsest.errors import EvidenceError, StorageError
from palimpsest.metrics.scores import Measure, Row
from palimpsest.metrics.statistics import clustered_mean, equivalence

MODELS = {"original": "original", "gold": "gold", "npo": "unlearned"}
MEASURES = tuple(
    Measure("answer_probability", on, "answer_probability@1", "probability", "Answer probability", "…", "toward gold")
    for on in ("forget", "retain_unseen")
)
SEED = 7


def make_rows() -> list[Row]:
    draw = random.Random(0)
    return [
        Row(model, measure.key, f"q{item:02}", f"person {item % 5}", draw.random())
        for model in MODELS
        for measure in MEASURES
        for item in range(12 + 8 * (measure.on == "forget"))
    ]


@cache
def make_audit() -> Audit:
    rows = make_rows()

    def of(model: str, measure: Measure) -> tuple[list[float], list[str]]:
        mine = [row for row in rows if (row.model, row.measure) == (model, measure.key)]
        return [row.value for row in mine], [row.cluster for row in mine]

    def audited(name: str, role: str) -> Audited:
        scores = {measure.key: clustered_mean(*of(name, measure), seed=SEED) for measure in MEASURES}
        against = {
            measure.key: equivalence(of(name, measure)[0], *of("gold", measure), margin=0.05)
            for measure in MEASURES
            if name != "gold"
        }
        return Audited(name, role, "made for a test", "f" * 64, scores, against, None)

    models = tuple(audited(name, role) for name, role in MODELS.items())
    return Audit("a test", models, MEASURES, (), {"forget": 20}, {"seed": SEED})


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    """A finished run, its last line that of the report."""
    run = RunFolder(tmp_path / "run")
    run.write_run({"seed": SEED}, seeds={"all": SEED}, environment={"python": "3"}, hashes={"forget": "0" * 64})
    (run.path / "models/gold").mkdir(parents=True)
    (run.path / "models/gold/model.safetensors").write_bytes(b"weights")
    run.record("model saved", "models/gold", fingerprint="f" * 64)
    (run.path / "update/npo").mkdir(parents=True)
    (run.path / "update/npo/delta.safetensors").write_bytes(b"delta")
    (run.path / "update/npo/update.json").write_text("{}")
    run.add_folder("update/npo", "update saved")
    run.write_scores(make_rows())
    run.write_audit(make_audit())
    (run.path / "report.html").write_text("<html>")
    run.add_file("report.html", "report written")
    return run


def failures(run: RunFolder) -> dict[str, str]:
    """Messages of the failed checks, by name; several of one name are joined."""
    found: dict[str, str] = {}
    for check in verify(run.path).failures:
        found[check.name] = f"{found.get(check.name, '')} {check.message}".strip()
    return found


def lines(run: RunFolder) -> list[str]:
    return run.ledger.path.read_text().splitlines()


def put_lines(run: RunFolder, lines: list[str]) -> None:
    run.ledger.path.write_text("".join(f"{line}\n" for line in lines))


# What is written comes back.


def test_a_finished_run_verifies_and_every_file_is_named(run: RunFolder) -> None:
    verification = verify(run.path)
    assert verification.ok and verification.failures == ()
    assert [check.name for check in verification.checks] == [
        "ledger.jsonl",
        "run.json",
        "update/npo/delta.safetensors",
        "update/npo/update.json",
        "scores.parquet",
        "audit.json",
        "report.html",
        "other files",
        "scores of original",
        "scores of gold",
        "scores of npo",
    ]
    assert json.loads(json.dumps(verification.to_json()))["ok"] is True


def test_rows_audit_and_run_come_back_as_they_were(run: RunFolder) -> None:
    assert run.read_scores() == make_rows()
    assert run.read_audit() == make_audit()
    assert run.read_run()["hashes"] == {"forget": "0" * 64}


@settings(deadline=None, max_examples=25)
@given(
    st.lists(
        st.builds(
            Row,
            model=st.text(max_size=8),
            measure=st.text(max_size=8),
            item=st.sampled_from(["00123", "1999-01-01", "true", "null", "NaN", "it's", '"', "\\n", "{}", ""])
            | st.text(max_size=8),
            cluster=st.text(max_size=8),
            value=st.floats(allow_nan=False, allow_infinity=False),
        ),
        max_size=30,
    )
)
def test_any_rows_survive_exactly_and_in_order(tmp_path_factory: pytest.TempPathFactory, rows: list[Row]) -> None:
    run = RunFolder(tmp_path_factory.mktemp("it's a run"))
    run.write_scores(rows)
    assert run.read_scores() == rows


def test_the_same_rows_give_the_same_bytes(tmp_path: Path) -> None:
    first, second = (RunFolder(tmp_path / name).write_scores(make_rows()).read_bytes() for name in "ab")
    assert first == second


def test_a_value_that_is_not_finite_is_refused_and_the_old_scores_stay(run: RunFolder) -> None:
    broken = [replace(make_rows()[0], value=math.nan)]
    with pytest.raises(EvidenceError, match=r"'original'.*'forget/answer_probability'.*'q00'.*nan"):
        run.write_scores(broken)
    assert verify(run.path).ok


def test_a_file_is_recorded_under_the_same_name_however_its_path_is_given(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    run = RunFolder("run")
    run.path.mkdir()
    (run.path / "a.txt").write_text("a")
    entries = [run.add_file("a.txt", "x"), run.add_file(Path("run/a.txt"), "x"), *run.add_folder("run", "x")[:1]]
    assert [entry.subject for entry in entries] == ["a.txt"] * 3


# The chain.


def test_every_line_holds_the_hash_of_its_content_and_of_the_line_before(run: RunFolder) -> None:
    previous = "0" * 64
    for n, line in enumerate(lines(run)):
        entry = json.loads(line)
        own = entry.pop("hash")
        spelled = json.dumps(entry, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
        assert (entry["n"], entry["previous"]) == (n, previous)
        assert own == hashlib.sha256(spelled.encode()).hexdigest()
        previous = own


def test_facts_are_remembered_with_their_hash(tmp_path: Path) -> None:
    entry = RunFolder(tmp_path).record("model saved", "models/gold", fingerprint="ab", tokens=3)
    assert entry.facts == {"fingerprint": "ab", "tokens": 3}
    assert entry.sha256 == hashlib.sha256(b'{"fingerprint":"ab","tokens":3}').hexdigest()


@pytest.mark.parametrize("place", range(7))
def test_an_edited_line_is_found(run: RunFolder, place: int) -> None:
    changed = lines(run)
    changed[place] = changed[place].replace('"event":"', '"event":"not ')
    put_lines(run, changed)
    assert f"line {place + 1} (not " in failures(run)["ledger.jsonl"]
    assert "was edited" in failures(run)["ledger.jsonl"]


def test_an_edited_line_whose_hash_was_made_to_fit_breaks_the_next(run: RunFolder) -> None:
    entries, _ = run.ledger.examine()
    forged = replace(entries[2], sha256="1" * 64)
    forged = replace(forged, hash=forged.own_hash())
    changed = lines(run)
    changed[2] = json.dumps(asdict(forged))
    put_lines(run, changed)
    assert failures(run)["ledger.jsonl"].startswith("line 4 (")
    assert "update/npo/delta.safetensors" in failures(run)


@pytest.mark.parametrize("place", range(7))
def test_a_dropped_line_is_found(run: RunFolder, place: int) -> None:
    changed = lines(run)
    gone = json.loads(changed.pop(place))
    put_lines(run, changed)
    found = failures(run)
    if place < 6:
        assert f"line {place + 1} (" in found["ledger.jsonl"] and "dropped" in found["ledger.jsonl"]
    if gone["facts"] is None:
        assert "not in the ledger" in found[gone["subject"]]


@pytest.mark.parametrize("place", range(6))
def test_lines_that_changed_places_are_found(run: RunFolder, place: int) -> None:
    changed = lines(run)
    changed[place], changed[place + 1] = changed[place + 1], changed[place]
    put_lines(run, changed)
    assert f"line {place + 1} (" in failures(run)["ledger.jsonl"]


def test_a_line_that_was_added_or_damaged_is_found(run: RunFolder) -> None:
    whole = lines(run)
    put_lines(run, [*whole[:3], whole[2], *whole[3:]])
    assert "line 4 (" in failures(run)["ledger.jsonl"]
    put_lines(run, [*whole[:3], "[]", *whole[4:]])
    assert "line 4 was damaged" in failures(run)["ledger.jsonl"]


@pytest.mark.parametrize("kept", [1, 20, 100, -1])
def test_a_torn_last_line_is_reported_with_its_mend_and_the_next_line_drops_it(run: RunFolder, kept: int) -> None:
    whole = run.ledger.path.read_bytes()
    last = whole.splitlines(keepends=True)[-1]
    run.ledger.path.write_bytes(whole[: -len(last)] + last[:kept])
    assert "line 7 is cut short" in failures(run)["ledger.jsonl"]
    assert "Run that command again" in failures(run)["ledger.jsonl"]
    assert run.add_file("report.html", "report written").n == 6
    assert verify(run.path).ok


def test_appending_survives_kill_9(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    script = (
        "import sys; from palimpsest.audit.ledger import Ledger\n"
        "while True: Ledger(sys.argv[1]).append('event', 'subject', facts={'text': 'x' * 20000})"
    )
    process = subprocess.Popen([sys.executable, "-c", script, str(path)])
    give_up = time.monotonic() + 20
    while (not path.exists() or path.stat().st_size < 100_000) and time.monotonic() < give_up:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    entries, faults = Ledger(path).examine()
    assert len(entries) >= 4
    assert all("cut short" in fault for fault in faults)
    assert Ledger(path).append("went on", "subject", facts={}).n == len(entries)
    assert Ledger(path).examine()[1] == []


def test_nothing_can_follow_a_damaged_last_line(run: RunFolder) -> None:
    put_lines(run, [*lines(run), "scribble"])
    with pytest.raises(EvidenceError, match="line 8 is no ledger entry"):
        run.record("went on")


def test_a_ledger_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="cannot be appended to"):
        Ledger(tmp_path / "file" / "ledger.jsonl").append("event", "subject", facts={})


# Files.

FILES = ["run.json", "scores.parquet", "audit.json", "report.html", "update/npo/delta.safetensors"]


@pytest.mark.parametrize("name", FILES)
def test_a_missing_file_is_named(run: RunFolder, name: str) -> None:
    (run.path / name).unlink()
    assert "is missing" in failures(run)[name]


@pytest.mark.parametrize("name", FILES)
def test_a_changed_file_is_named(run: RunFolder, name: str) -> None:
    content = bytearray((run.path / name).read_bytes())
    content[len(content) // 2] ^= 1
    (run.path / name).write_bytes(content)
    assert "was changed" in failures(run)[name]


def test_the_newest_record_of_a_file_counts(run: RunFolder) -> None:
    (run.path / "report.html").write_text("<html>new")
    assert "was changed" in failures(run)["report.html"]
    run.add_file("report.html", "report drawn again")
    assert verify(run.path).ok


def test_a_file_that_the_ledger_does_not_know_is_named(run: RunFolder) -> None:
    (run.path / "update/npo/better.json").write_text("{}")
    (run.path / "models/other").mkdir()
    (run.path / "models/other/model.safetensors").write_bytes(b"")
    (run.path / "models/gold/tokenizer.json").write_text("{}")  # known by its folder's fingerprint
    (run.path / ".audit.json.x1").mkdir()  # left by a write that was killed
    (run.path / ".audit.json.x1/audit.json").write_text("{}")
    assert set(failures(run)) == {"update/npo/better.json", "models/other/model.safetensors"}


# Numbers: the forger below also records the changed file, so that chain and hashes fit.


@pytest.mark.parametrize(
    ("group", "field"),
    [("scores", field) for field in ("value", "low", "high", "n", "clusters")]
    + [("against_gold", field) for field in ("difference", "low", "high", "p", "smallest_effect")],
)
def test_a_number_that_its_rows_do_not_give_is_named(run: RunFolder, group: str, field: str) -> None:
    data = run.read_audit().to_json()
    number = data["models"][2][group]["forget/answer_probability"]
    number[field] += 1 if isinstance(number[field], int) else 1e-6
    run.write_audit(Audit.from_json(data))
    found = failures(run)
    assert set(found) == {"scores of npo"}
    assert "forget/answer_probability" in found["scores of npo"] and f"says {field} " in found["scores of npo"]


def test_a_flipped_equivalence_is_named(run: RunFolder) -> None:
    data = run.read_audit().to_json()
    data["models"][0]["against_gold"]["forget/answer_probability"]["equivalent"] ^= True
    run.write_audit(Audit.from_json(data))
    assert set(failures(run)) == {"scores of original"}


def test_edited_rows_are_found_by_the_numbers_that_they_no_longer_give(run: RunFolder) -> None:
    rows = [
        replace(row, value=row.value / 2) if row.model == "npo" and row.item == "q03" else row for row in make_rows()
    ]
    run.write_scores(rows)
    assert set(failures(run)) == {"scores of npo"}
    assert "retain_unseen/answer_probability: " in failures(run)["scores of npo"]


def test_edited_clusters_change_the_interval_alone(run: RunFolder) -> None:
    run.write_scores([replace(row, cluster=row.item) for row in make_rows()])
    message = failures(run)["scores of gold"]
    assert "clusters 5" in message and "clusters 20" in message and "value" not in message


def test_dropped_rows_and_rows_without_a_partner_in_gold_are_found(run: RunFolder) -> None:
    run.write_scores([row for row in make_rows() if row.model != "npo"])
    assert "has no rows" in failures(run)["scores of npo"]
    run.write_scores([row for row in make_rows() if (row.model, row.item) != ("gold", "q00")])
    assert "same items" in failures(run)["scores of npo"]
    assert "n 20" in failures(run)["scores of gold"] and "n 19" in failures(run)["scores of gold"]


def test_without_audit_or_readable_rows_the_numbers_never_pass(run: RunFolder) -> None:
    (run.path / "audit.json").write_text('{"title": "cut sh')
    assert "audit.json: is not JSON" in failures(run)["scores"]
    (run.path / "audit.json").write_text("[]")
    assert "does not hold an audit" in failures(run)["scores"]
    run.write_audit(make_audit())
    (run.path / "scores.parquet").write_bytes(b"PAR1")
    assert "cannot be read as a table" in failures(run)["scores"]
    (run.path / "scores.parquet").unlink()
    assert "no such file" in failures(run)["scores"]


def test_a_parquet_file_with_a_missing_value_is_refused(run: RunFolder) -> None:
    path = str(run.path / "scores.parquet")
    with duckdb.connect() as connection:
        connection.execute(
            "CREATE TABLE rows AS SELECT * REPLACE (NULL::DOUBLE AS value) FROM read_parquet($1)", [path]
        )
        connection.execute("COPY rows TO $1 (FORMAT parquet)", [path])
    with pytest.raises(EvidenceError, match="the value is None"):
        run.read_scores()


def test_a_folder_without_a_ledger_is_no_run(tmp_path: Path) -> None:
    with pytest.raises(EvidenceError, match=r"no ledger\.jsonl"):
        verify(tmp_path)


# The environment.


def test_the_environment_is_text_and_names_the_code(tmp_path: Path) -> None:
    found = environment()
    assert all(isinstance(value, str) and value for value in found.values())
    assert found["python"] == ".".join(map(str, sys.version_info[:3]))
    assert found["code"] == code_hash() and len(found["code"]) == 64


def test_the_codes_hash_follows_content_and_names_but_no_caches(tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text("x = 1")
    before = code_hash(tmp_path)
    (tmp_path / "__pycache__").mkdir()
    (tmp_path / "__pycache__/a.pyc").write_bytes(b"x")
    assert code_hash(tmp_path) == before
    (tmp_path / "a.py").write_text("x = 2")
    edited = code_hash(tmp_path)
    (tmp_path / "a.py").rename(tmp_path / "b.py")
    assert len({before, edited, code_hash(tmp_path)}) == 3
