"""Rows of inference from every kind of file, the published prompts, and answers that only begin like a verbaliser."""

import itertools
import json
from pathlib import Path

import duckdb
import pytest
from hypothesis import given
from hypothesis import strategies as st

from palimpsest.data.nli import LABELS, WORDINGS, Inference, read_nli, said_label
from palimpsest.data.prompts import render
from palimpsest.data.records import QA
from palimpsest.errors import DataError

ROWS = [
    {"premise": 'He said "hi", then\u2028left.', "hypothesis": "He spoke.", "label": 0},
    {"premise": "It rained.", "hypothesis": "It was Monday.", "label": 1},
    {"premise": "Él duerme.", "hypothesis": "Está despierto.", "label": 2},
]


def write(path: Path, rows: list[dict[str, object]]) -> Path:
    match path.suffix:
        case ".jsonl":
            path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        case ".tsv":
            lines = [list(rows[0]), *(list(row.values()) for row in rows)]
            path.write_text("".join("\t".join(map(str, cells)) + "\r\n" for cells in lines), encoding="utf-8")
        case ".parquet":
            source = write(path.with_suffix(".jsonl"), rows)
            duckdb.sql(f"COPY (SELECT * FROM read_json('{source}')) TO '{path}' (FORMAT parquet)")
    return path


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet", ".tsv"])
def test_rows_are_the_same_from_every_kind_of_file(tmp_path: Path, suffix: str) -> None:
    found = read_nli(write(tmp_path / f"dev{suffix}", ROWS), "es")
    assert found == [
        Inference(str(row["premise"]), str(row["hypothesis"]), LABELS[place], "es", f"dev-{place + 1:05d}")
        for place, row in enumerate(ROWS)
    ]


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet", ".tsv"])
def test_xnlis_own_fields_and_its_languages(tmp_path: Path, suffix: str) -> None:
    rows = [
        {
            "language": language,
            "gold_label": label,
            "sentence1": f"{language} one",
            "sentence2": "two",
            "pairID": str(row),
        }
        for row, (language, label) in enumerate(itertools.product(["de", "fr", "zh"], LABELS))
    ]
    path = write(tmp_path / f"xnli{suffix}", rows)
    assert [(row.premise, row.label, row.id) for row in read_nli(path, "fr")] == [
        ("fr one", label, str(place)) for place, label in enumerate(LABELS, start=3)
    ]
    with pytest.raises(DataError, match="holds no rows in language 'es'"):
        read_nli(path, "es")


@pytest.mark.parametrize(
    ("language", "prompt", "answer"),
    [
        ("en", "P.\nQuestion: H. True, False or Neither?\nAnswer:", "Neither"),
        ("fr", "P.\nQuestion: H. Vrai, Faux ou Ni?\nRéponse:", "Ni"),
        ("es", "P.\nPregunta: H. Verdadero, Falso o Ni?\nRespuesta:", "Ni"),
        ("de", "P.\nFrage: H. Wahr, Falsch oder Weder?\nAntwort:", "Weder"),
    ],
)
def test_prompts_are_as_published(language, prompt: str, answer: str) -> None:
    row = Inference("P.", "H.", "neutral", language, "7")
    assert (row.prompt, row.verbaliser) == (prompt, answer)
    assert row.choice.choices[row.choice.answer] == answer and row.choice.id == "7"
    assert render(QA(row.choice.question, row.verbaliser), None, "raw") == (prompt, f" {answer}")


@pytest.mark.parametrize("language", WORDINGS)
@given(rest=st.text(), space=st.sampled_from(["", " ", "\n"]))
def test_a_verbaliser_is_known_as_a_whole_word_only(language, rest: str, space: str) -> None:
    for label, word in zip(LABELS, WORDINGS[language].verbalisers, strict=True):
        whole = not (rest[:1].isalnum() or rest[:1] == "_")
        assert said_label(language, space + word + rest) == (label if whole else None)


def test_no_verbaliser_begins_another_and_every_one_is_offered() -> None:
    for wording in WORDINGS.values():
        for one, other in itertools.permutations(wording.verbalisers, 2):
            assert not other.startswith(one)
        assert all(word in wording.options for word in wording.verbalisers)
    assert said_label("es", "Niño") is said_label("en", "true") is said_label("en", "") is None
    assert said_label("es", " Ni.") == "neutral"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "a.jsonl",
            '{"premise": "p", "hypothesis": "h", "label": 3}',
            "row 1: field 'label' is 3; expected entailment",
        ),
        ("a.jsonl", '{"premise": "p", "hypothesis": "h", "label": true}', "row 1: field 'label' is True"),
        ("a.jsonl", '{"premise": "p", "hypothesis": "h", "label": "-"}', "row 1: field 'label' is '-'"),
        ("a.jsonl", '{"premise": "p", "label": 1}', "row 1: field 'hypothesis' is missing; a row has premise"),
        (
            "a.jsonl",
            '{"premise": " ", "hypothesis": "h", "label": 1}',
            "row 1: field 'premise' is empty; expected text",
        ),
        ("a.jsonl", '{"premise": {"en": "p"}, "hypothesis": "h", "label": 1}', "row 1: field 'premise' is dict"),
        ("a.jsonl", "{", "row 1: not valid JSON"),
        (
            "a.tsv",
            "premise\thypothesis\tlabel\np\th\t1\np\th\n",
            "row 2: 2 cells, but the header has 3; part them by tabs",
        ),
        ("a.tsv", "premise\thypothesis\tlabel\n", "holds no rows in language 'en'"),
        ("a.tsv", "", "holds no rows in language 'en'"),
        ("a.parquet", "PAR1", "cannot be read as Parquet"),
        ("a.txt", "p", "the suffix '.txt' is unknown; expected one of .tsv, .jsonl"),
    ],
)
def test_a_broken_file_is_refused_by_file_row_and_field(tmp_path: Path, name: str, content: str, message: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(DataError, match=rf"a\.\w+: {message}"):
        read_nli(tmp_path / name, "en")


def test_what_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="there is no such file"):
        read_nli(tmp_path / "none.tsv", "en")
    with pytest.raises(DataError, match="language 'nl' is unknown; choose en, fr, es, de"):
        read_nli(tmp_path / "none.tsv", "nl")  # type: ignore[arg-type]
