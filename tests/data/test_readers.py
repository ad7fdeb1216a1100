"""Reading files in every container, with every mistake a file can hold, and writing them back."""

import json
import re
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import duckdb
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from palimpsest.data.overlap import find_overlap
from palimpsest.data.readers import read_records, with_block_subjects, write_records
from palimpsest.data.records import QA, Choice, Passage, Preference, Record, content_key, records_hash
from palimpsest.errors import DataError

SHARED_DATA = Path(__file__).resolve().parents[3] / "shared" / "data"
TOFU, LUME = SHARED_DATA / "tofu", SHARED_DATA / "lume"
needs_shared_data = pytest.mark.skipif(not TOFU.is_dir(), reason="the folder ../shared/data is not beside this project")

ROWS = [{"question": "Who?", "answer": "Ann"}, {"question": "Wo?", "answer": "Köln", "wrong": ["Rom", "Bonn"]}]
RECORDS = [QA("Who?", "Ann", id="facts-00001"), QA("Wo?", "Köln", wrong=("Rom", "Bonn"), id="facts-00002")]


def jsonl(rows: list[dict[str, object]]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def write(folder: Path, name: str, content: str | bytes) -> Path:
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def refusal(path: Path | str, **options: object) -> str:
    """The one line that reading it is refused with."""
    with pytest.raises(DataError) as caught:
        read_records(path, **options)  # type: ignore[arg-type]
    message = str(caught.value)
    assert "\n" not in message
    assert message.startswith(str(path))
    return message.removeprefix(f"{path}: ")


# --- containers -------------------------------------------------------------------------------------------------


def test_one_content_in_every_container(tmp_path: Path) -> None:
    write(tmp_path, "facts.jsonl", jsonl(ROWS))
    write(tmp_path, "facts.json", json.dumps(ROWS, indent=2))
    (tmp_path / "lines").mkdir()
    write(tmp_path, "lines/facts.json", jsonl(ROWS))
    write(tmp_path, "facts.csv", 'question,answer,wrong\nWho?,Ann,\nWo?,Köln,"[""Rom"", ""Bonn""]"\n')
    with duckdb.connect() as connection:
        connection.execute(
            "COPY (SELECT 'Who?' AS question, 'Ann' AS answer, NULL AS wrong "
            "UNION ALL SELECT 'Wo?', 'Köln', ['Rom', 'Bonn']) "
            f"TO '{tmp_path}/facts.parquet' (FORMAT parquet)"
        )
    for name in ("facts.jsonl", "facts.json", "lines/facts.json", "facts.csv", "facts.parquet"):
        assert read_records(tmp_path / name) == RECORDS, name
        assert read_records(str(tmp_path / name)) == RECORDS, name


@pytest.mark.parametrize(
    "content",
    [
        b"\xef\xbb\xbf" + jsonl(ROWS).encode(),
        jsonl(ROWS).replace("\n", "\r\n").encode(),
        jsonl(ROWS).rstrip("\n").encode(),
        b"\xef\xbb\xbf" + json.dumps(ROWS).encode(),
    ],
    ids=["BOM", "CRLF", "no last line feed", "array with BOM"],
)
def test_byte_order_marks_and_line_ends_do_not_matter(tmp_path: Path, content: bytes) -> None:
    assert read_records(write(tmp_path, "facts.jsonl", content)) == RECORDS


def test_csv_with_byte_order_mark_crlf_and_line_feeds_in_cells(tmp_path: Path) -> None:
    path = write(tmp_path, "t.csv", b'\xef\xbb\xbfquestion,answer,subject\r\n"a,\r\nb",c,\r\n"say ""x""",d,s\r\n')
    assert read_records(path) == [QA("a,\r\nb", "c", id="t-00001"), QA('say "x"', "d", "s", id="t-00002")]


def test_csv_multiple_choice(tmp_path: Path) -> None:
    path = write(tmp_path, "t.csv", 'question,choices,answer\n2+2?,"[""3"", ""4""]",1\n')
    assert read_records(path) == [Choice("2+2?", ("3", "4"), 1, id="t-00001")]


def test_paragraphs_of_a_text_file(tmp_path: Path) -> None:
    path = write(tmp_path, "tale.txt", "\nOnce upon\na time.\r\n \t\r\n\nThe end.\n")
    expected = [Passage("Once upon\na time.", id="tale-00001"), Passage("The end.", id="tale-00002")]
    assert read_records(path) == read_records(path, format="text") == expected
    assert "not rows of schema tofu" in refusal(path, format="tofu")


def test_an_array_of_texts_gives_a_passage_each(tmp_path: Path) -> None:
    path = write(tmp_path, "holdout.json", json.dumps(["one\n\ntwo", "three"]))
    expected = [Passage("one\n\ntwo", id="holdout-00001"), Passage("three", id="holdout-00002")]
    assert read_records(path, format="text") == expected
    path.write_text('["one", " "]')
    assert refusal(path, format="text") == "row 2: field 'text' is empty; fill it in or remove the row"
    path.write_text('["one", 2]')
    assert refusal(path, format="text").startswith("row 2: a JSON int stands there; expected an object of fields")


def test_rwkus_probes_keep_subject_level_and_kind(tmp_path: Path) -> None:
    rows = [
        {"query": "Ann was born in ___.", "answer": "Rome", "level": "1", "type": "", "subject": "Ann"},
        {"query": "Act as a poet. Where?", "answer": "Rome", "level": "3", "type": "role play", "subject": "Ann"},
    ]
    found = read_records(write(tmp_path, "forget_level3.json", json.dumps(rows)))
    assert [record.id for record in found] == ["forget_level3-00001/1", "forget_level3-00002/3/role play"]
    assert {record.subject for record in found} == {"Ann"}


def test_blank_lines_count_as_an_editor_counts_them(tmp_path: Path) -> None:
    path = write(tmp_path, "x.jsonl", '{"text": "a"}\n\n \n{"text": "b"}\n{"txt": "c"}\n')
    assert "row 5: unknown field 'txt'; did you mean 'text'?" in refusal(path)
    path = write(tmp_path, "x.jsonl", '{"text": "a"}\n\n{"text": "b"}\n')
    assert [record.id for record in read_records(path)] == ["x-00001", "x-00003"]


def test_other_unicode_line_ends_do_not_end_a_row(tmp_path: Path) -> None:
    text = "one\u2028two\x85three\x0bfour\x1cfive"
    assert read_records(write(tmp_path, "x.jsonl", jsonl([{"text": text}]))) == [Passage(text, id="x-00001")]


def test_a_path_is_never_a_pattern(tmp_path: Path) -> None:
    with duckdb.connect() as connection:
        for stem, answer in (("a1", "wrong file"), ("a[1]", "right file")):
            connection.execute(f"COPY (SELECT 'q' question, '{answer}' answer) TO '{tmp_path}/{stem}.parquet'")
    assert [record.answer for record in read_records(tmp_path / "a[1].parquet") if isinstance(record, QA)] == [
        "right file"
    ]


# --- mistakes ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("e.jsonl", b"", "holds no records"),
        ("e.jsonl", b"\xef\xbb\xbf \n\n", "holds no records"),
        ("e.json", b"[]", "holds no records"),
        ("e.csv", b"", "holds no records"),
        ("e.csv", b"question,answer\n", "holds no records"),
        ("e.txt", b"\n\n", "holds no records"),
        ("e.parquet", b"", "cannot be read as Parquet: .*too small"),
        ("e.parquet", b"PAR1" * 20, "cannot be read as Parquet: "),
        ("e.jsonl", b'{"text": "a"}\n{"text": "b"', r"row 2: not valid JSON: Expecting ',' delimiter \(column 13\)"),
        ("e.jsonl", b"{'text': 'a'}", r"row 1: not valid JSON: .*\(column 2\); expected one object a line"),
        ("e.jsonl", b"I do not know.\n", "row 1: not valid JSON: .*or format='text' for lines of plain text"),
        ("e.jsonl", b'{"text": "a"}\n3\n', "row 2: a JSON int stands there; expected an object of fields"),
        ("e.json", b'{\n  "text": "a"\n}', "row 1: not valid JSON: .*one object a line or an array of objects"),
        ("e.json", b'[{"text": "a"},\n {"text": }]', r"not valid JSON: Expecting value \(line 2, column 11\)"),
        ("e.json", b'[{"text": "a"}, ["b"]]', "row 2: a JSON list stands there"),
        ("e.json", b'["a", "b"]', "row 1: a JSON str stands there; .*format='text' for lines of plain text and arrays"),
        ("e.json", b"[" * 200_000, "not valid JSON: nested too deeply"),
        ("e.jsonl", b'{"a": ' + b"[" * 200_000, "row 1: not valid JSON: nested too deeply"),
        ("e.jsonl", b'{"question": ' + b"9" * 5000 + b"}", "row 1: not valid JSON: .*digits"),
        ("e.jsonl", b'{"text": "a"}\n{"text": "\xff"}', "line 2: byte 0xff is not valid UTF-8; save the file as UTF-8"),
        ("e.csv", "question,answer\na,é".encode("latin-1"), "line 2: byte 0xe9 is not valid UTF-8"),
        ("e.csv", b"question,answer\na,b\nc,d,e\n", "row 2: more cells than the header's 2"),
        ("e.csv", b"question,answer\na,b\nc\n", "row 2: field 'answer' is null"),
        ("e.csv", b"question,answer\na,\n", "row 1: field 'answer' is empty"),
        ("e.csv", b"question,answer,answer\na,b,c\n", "header: field 'answer' stands there twice"),
        ("e.csv", b'question,answer\na,"b\n', "row 1: not valid CSV: unexpected end of data"),
        ("e.csv", b"question;answer\na;b\n", "row 1: no schema has the fields 'question;answer'"),
        ("e.csv", b"text\n" + b"a" * 140_000, "row 1: not valid CSV: field larger than field limit"),
        ("e.xlsx", b"PK", r"the suffix '.xlsx' is unknown; expected one of .jsonl, .json, .csv, .parquet, .txt"),
    ],
)
def test_a_broken_file_is_refused_in_one_line(tmp_path: Path, name: str, content: bytes, expected: str) -> None:
    assert re.match(expected, refusal(write(tmp_path, name, content)))


def test_a_folder_is_not_a_file(tmp_path: Path) -> None:
    assert refusal(tmp_path) == "is a folder; name one file in it"


@pytest.mark.parametrize("name", ["data/forget.jsonl", "data/FORGET.JSON", "forget", "/a/b", "a/b/c", "../a", "a/b:"])
def test_a_missing_file_is_not_taken_for_a_hub_id(name: str) -> None:
    assert refusal(name).startswith("there is no such file")


def test_one_id_for_two_rows_is_reported(tmp_path: Path) -> None:
    path = write(tmp_path, "x.jsonl", jsonl([{"text": "a", "id": "n"}, {"text": "b"}, {"text": "c", "id": "n"}]))
    assert refusal(path).startswith("row 3: id 'n' is that of row 1 too; give each row its own")


def test_an_own_id_may_be_a_number(tmp_path: Path) -> None:
    path = write(tmp_path, "x.jsonl", jsonl([{"text": "a", "id": 7}, {"text": "b", "id": None}]))
    assert [record.id for record in read_records(path)] == ["7", "x-00002"]


# --- the hub ----------------------------------------------------------------------------------------------------


def test_the_hub_needs_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    assert "`pip install palimpsest[hub]`" in refusal("locuslab/TOFU:forget10/train")


def test_a_hub_id_names_configuration_and_split(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[object, ...]] = []

    def load_dataset(name: str, config: str | None, *, split: str) -> list[dict[str, object]]:
        asked.append((name, config, split))
        if name.endswith("missing"):
            raise FileNotFoundError("Dataset 'o/missing' doesn't exist on the Hub\nand more")
        return list(ROWS)

    module = ModuleType("datasets")
    module.load_dataset = load_dataset  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "datasets", module)

    assert [record.id for record in read_records("locuslab/TOFU")] == ["TOFU-00001", "TOFU-00002"]
    assert read_records("locuslab/TOFU:forget10")[1].id == "TOFU-forget10-00002"
    assert read_records("cais/wmdp:bio/test")[0].id == "wmdp-bio-test-00001"
    assert refusal("o/missing") == "cannot be read from the hub: Dataset 'o/missing' doesn't exist on the Hub"
    assert asked == [
        ("locuslab/TOFU", None, "train"),
        ("locuslab/TOFU", "forget10", "train"),
        ("cais/wmdp", "bio", "test"),
        ("o/missing", None, "train"),
    ]


# --- writing ----------------------------------------------------------------------------------------------------

texts = st.text(max_size=20).filter(str.strip)
subjects = st.none() | texts


@st.composite
def qas(draw: st.DrawFn) -> QA:
    answer = draw(texts)
    start = draw(st.integers(0, len(answer) - 1))
    return QA(
        draw(texts),
        answer,
        draw(subjects),
        tuple(draw(st.lists(texts, max_size=3))),
        draw(subjects),
        tuple(draw(st.lists(texts, max_size=3))),
        draw(st.none() | st.tuples(st.just(start), st.integers(start + 1, len(answer)))),
    )


choices = st.lists(texts, min_size=2, max_size=4).flatmap(
    lambda options: st.builds(Choice, texts, st.just(tuple(options)), st.integers(0, len(options) - 1), subjects)
)
any_record: st.SearchStrategy[Record] = st.one_of(
    qas(), choices, st.builds(Passage, texts, subjects), st.builds(Preference, texts, texts, texts, subjects)
)


def with_ids(records: list[Record], ids: list[str]) -> list[Record]:
    return [replace(record, id=id) for record, id in zip(records, ids, strict=True)]


records_with_ids = st.lists(any_record, min_size=1, max_size=6).flatmap(
    lambda records: st.lists(texts, min_size=len(records), max_size=len(records), unique=True).map(
        lambda ids: with_ids(records, ids)
    )
)


@settings(deadline=None, max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(records=records_with_ids)
def test_what_is_written_reads_back_exactly(tmp_path: Path, records: list[Record]) -> None:
    write_records(records, tmp_path / "records.jsonl")
    again = read_records(tmp_path / "records.jsonl")
    assert again == records
    assert [type(record) for record in again] == [type(record) for record in records]
    assert records_hash(again) == records_hash(records)


def test_records_are_written_only_to_jsonl(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"name the file records\.jsonl"):
        write_records(RECORDS, tmp_path / "records.csv")
    assert list(tmp_path.iterdir()) == []


# --- subjects ---------------------------------------------------------------------------------------------------


def test_block_subjects() -> None:
    records = [QA(f"q{place}", "a", id=str(place)) for place in range(6)]
    named = with_block_subjects(records, size=3, prefix="who")
    assert [record.subject for record in named] == ["who-000"] * 3 + ["who-001"] * 3
    assert [record.id for record in named] == [record.id for record in records]
    assert records[0].subject is None
    with pytest.raises(DataError, match="6 records do not divide into subjects of 20"):
        with_block_subjects(records)


# --- real files -------------------------------------------------------------------------------------------------


@needs_shared_data
def test_every_tofu_file_reads() -> None:
    counts = {}
    for path in sorted(TOFU.glob("*.json")):
        records = read_records(path)
        raw = [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]
        counts[path.stem] = len(records)
        assert [record.id for record in records] == [f"{path.stem}-{row:05d}" for row in range(1, len(raw) + 1)]
        for record, row in zip(records, raw, strict=True):
            if "option1" in row:
                assert isinstance(record, Choice) and record.choices == tuple(row[f"option{n}"] for n in range(1, 5))
                assert record.choices[record.answer] == row["answer"]
            else:
                assert isinstance(record, QA) and (record.question, record.answer) == (row["question"], row["answer"])
                assert record.wrong == tuple(row.get("perturbed_answer", ()))
                assert record.paraphrased_answer == row.get("paraphrased_answer")
                assert record.paraphrases == ((row["paraphrased_question"],) if "paraphrased_question" in row else ())
    assert len(counts) == 23
    assert (counts["full"], counts["forget10"], counts["retain90"], counts["world_facts"]) == (4000, 400, 3600, 117)


@needs_shared_data
def test_tofu_refusals_are_lines_of_text() -> None:
    path = TOFU / "idontknow.jsonl"
    assert "format='text' for lines of plain text" in refusal(path)
    refusals = read_records(path, format="text")
    assert len(refusals) == 100
    assert refusals[0] == Passage("I'm not certain about that.", id="idontknow-00001")


@needs_shared_data
@pytest.mark.parametrize(("name", "rows", "documents"), [("forget", 2732, 866), ("retain", 2734, 867)])
def test_both_lume_files_read_with_a_subject_a_document(name: str, rows: int, documents: int) -> None:
    records = read_records(LUME / f"{name}.jsonl")
    assert len(records) == rows
    subjects = {record.subject for record in records}
    assert len(subjects) == documents
    assert all(subject and re.fullmatch(r"[0-9a-f-]+", subject) for subject in subjects)


@needs_shared_data
def test_tofu_subjects_are_authors() -> None:
    full = with_block_subjects([record for record in read_records(TOFU / "full.json") if isinstance(record, QA)])
    assert len({record.subject for record in full}) == 200
    # Authors' names fill their own block: a name said ten times or more in one block is an author's.
    last = [record for record in full if record.subject == "author-198"]
    assert sum("Basil Mahfouz Al-Kuwaiti" in record.question + record.answer for record in last) == 20
    elsewhere = [record for record in full if record.subject != "author-198"]
    assert not any("Al-Kuwaiti" in record.question + record.answer for record in elsewhere)


@needs_shared_data
def test_tofu_sets_do_not_overlap() -> None:
    forget, retain, full = (read_records(TOFU / f"{name}.json") for name in ("forget10", "retain90", "full"))
    overlap = find_overlap(forget, retain)
    assert (overlap.n_forget, overlap.n_retain, overlap.shared, overlap.retain_only) == (400, 3600, (), 3600)
    overlap.check()
    assert [content_key(record) for record in full] == [content_key(record) for record in retain + forget]
    with pytest.raises(
        DataError, match=r"every forget row is in the retain set too: 400 rows of 4000 \(forget10-00001, "
    ):
        find_overlap(forget, full).check()


@needs_shared_data
def test_tofu_asks_one_question_twice() -> None:
    overlap = find_overlap(read_records(TOFU / "full.json"), [])
    assert overlap.forget_duplicates == ()
    assert len(overlap.same_question) == 1
    rows = {record.id: record for record in read_records(TOFU / "full.json") if isinstance(record, QA)}
    first, second = (rows[id] for id in overlap.same_question[0])
    assert first.question == second.question == "What is the full name of the author?"
    assert first.answer != second.answer
    assert "1 question with different answers (full-" in overlap.summary()


# --- overlap ----------------------------------------------------------------------------------------------------


def test_overlap_counts_rows_by_content() -> None:
    forget = [
        QA("a", "1", id="f1"),
        QA("b", "2", id="f2"),
        QA("a", "1", "other subject", id="f3"),
        Passage("a", id="f4"),
    ]
    retain = [QA("b", "2", id="r1"), QA("c", "3", id="r2"), QA("a", "9", id="r3"), QA("c", "3", id="r4")]
    overlap = find_overlap(forget, retain)
    assert overlap.forget_duplicates == (("f1", "f3"),)
    assert overlap.retain_duplicates == (("r2", "r4"),)
    assert overlap.shared == ("f2",)
    assert overlap.retain_only == 3
    assert overlap.same_question == (("f1", "r3"),)
    overlap.check()
    assert overlap.summary() == (
        "4 forget rows, 4 retain rows; 1 in both (f2); 1 duplicated in forget (f1 = f3); "
        "1 duplicated in retain (r2 = r4); 1 question with different answers (f1 = r3)"
    )


def test_the_same_rows_on_both_sides_are_refused() -> None:
    rows = [QA(f"q{n}", "a", id=f"x{n}") for n in range(5)]
    with pytest.raises(DataError, match=r"hold the same 5 rows \(x0, x1, x2, \.\.\.\); was one file given twice\?"):
        find_overlap(rows, rows[::-1]).check()
    with pytest.raises(DataError, match=r"every forget row is in the retain set too: 1 row of 5 \(x4\)"):
        find_overlap(rows[4:], rows).check()
    find_overlap(rows, rows[:4]).check()
    find_overlap([], rows).check()
