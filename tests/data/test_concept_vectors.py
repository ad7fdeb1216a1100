"""ConceptVectors' published rows, and rows that are none."""

import json
import string
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from palimpsest.data.concept_vectors import Completion, Concept, read_concepts, read_translated_questions
from palimpsest.errors import DataError

SHARED_DATA = Path(__file__).resolve().parents[2].parent / "shared" / "data"
PUBLISHED, EXTRA = SHARED_DATA / "conceptvectors", SHARED_DATA / "conceptvectors_extra"
needs_published = pytest.mark.skipif(
    not PUBLISHED.is_dir() or not EXTRA.is_dir(), reason="the folder ../shared/data is not beside this project"
)
ROW = {"Concept": "Poland", "Layer": 23, "Dim": 743, "QA": [" What is it?\n"]}


def written(folder: Path, rows: object, name: str = "rows.json") -> Path:
    path = folder / name
    path.write_text(json.dumps(rows), encoding="utf-8")
    return path


@needs_published
@pytest.mark.parametrize(("model", "n"), [("llama2-7b", 10), ("olmo-7b", 18)])
def test_the_development_rows(model: str, n: int) -> None:
    concepts = read_concepts(PUBLISHED / f"{model}_concepts_dev.json")
    assert len({concept.name for concept in concepts}) == n == len(concepts)
    for concept in concepts:
        assert len(concept.questions) == 10 and len(concept.unrelated) == 50
        assert len(set(concept.unrelated)) >= 40 and 1 <= len(concept.completions) <= 10  # some stand there twice
        texts = [*concept.questions, *concept.unrelated, concept.page, *(c.first_half for c in concept.completions)]
        assert all(text == text.strip() != "" for text in texts)
        assert 0 <= concept.layer < 32 and 0 <= concept.column < 11008 and len(concept.page) > 10_000


@needs_published
def test_a_row_by_its_fields() -> None:
    poland, italy, *_ = read_concepts(PUBLISHED / "llama2-7b_concepts_dev.json")
    assert (poland.name, poland.layer, poland.column) == ("Poland", 23, 743)
    assert poland.questions[0] == "What is the capital city of Poland?"
    assert poland.unrelated[0] == "What is the capital city of Italy?"
    assert poland.completions[0].first_half.endswith("turned rule of the Second Polish")
    assert poland.completions[0].second_half.startswith("Republic over to the nonpartisan Sanacja")
    assert (poland.id, italy.id, poland.answers) == ("llama2-7b_concepts_dev-00001", "94", ())


@needs_published
def test_the_jailbreak_rows_and_the_draft() -> None:
    asked = read_concepts(EXTRA / "llama2-7b_10_jailbreak_test_concepts_with_gold.json")
    german = read_translated_questions(EXTRA / "llama_jailbreak_German_qa.json")
    assert {concept.name for concept in asked} == set(german)
    for concept in asked:
        assert len(concept.answers) == len(concept.questions) == len(german[concept.name]) == 10
    assert german["Harry Potter"][0] == "Wer ist der Autor der Harry-Potter-Buchreihe?"
    draft = read_concepts(EXTRA / "olmo-7b_concepts_DRAFT202_locations_qa.json")
    assert len(draft) == 202 and (draft[0].layer, draft[0].column) == (8, 6015)
    assert len([concept for concept in draft if concept.name == "Amazon (company)"]) > 1


WORDS = st.text(string.ascii_letters + "äé ?'", min_size=1, max_size=9).filter(str.strip)
SPACE = st.text(" \n\t", max_size=2)
PADDED = st.tuples(SPACE, WORDS, SPACE).map("".join)


@settings(deadline=None, max_examples=60)
@given(st.lists(st.tuples(PADDED, st.lists(PADDED, max_size=3), st.integers(0, 40)), min_size=1, max_size=4))
def test_white_space_is_all_that_is_lost(tmp_path_factory: pytest.TempPathFactory, rows: list) -> None:
    found = read_concepts(
        written(
            tmp_path_factory.mktemp("rows"),
            [
                {
                    "Concept": name,
                    "Layer": number,
                    "Dim": number + 1,
                    "QA": texts,
                    "text_completion": [{"First_half": text, "Second_half": name} for text in texts],
                }
                for name, texts, number in rows
            ],
        )
    )
    for place, (concept, (name, texts, number)) in enumerate(zip(found, rows, strict=True), start=1):
        stripped = tuple(text.strip() for text in texts)
        halves = tuple(Completion(text, name.strip()) for text in stripped)
        assert concept == Concept(
            name.strip(), number, number + 1, stripped, completions=halves, id=f"rows-{place:05d}"
        )


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"Concept": None}, "field 'Concept' is missing; a row of ConceptVectors has Concept, Layer, Dim and QA"),
        ({"Concept": " "}, "field 'Concept' is empty; expected text"),
        ({"Concept": 3}, "field 'Concept' is int; expected text"),
        ({"Layer": "23"}, "field 'Layer' is '23'; expected a whole number"),
        ({"Layer": True}, "field 'Layer' is True; expected a whole number"),
        ({"Dim": -1}, "field 'Dim' is -1; expected a whole number, counted from 0"),
        ({"Dim": None}, "field 'Dim' is missing"),
        ({"QA": "What?"}, "field 'QA' is no list of texts"),
        ({"QA": ["What?", 3]}, "field 'QA' is no list of texts"),
        ({"unrelated_QA": ["\n"]}, "field 'unrelated_QA' is no list of texts that are not empty"),
        ({"text_completion": "a"}, "field 'text_completion' is a str; expected a list"),
        ({"text_completion": ["a"]}, "field 'text_completion' holds something else than objects"),
        ({"text_completion": [{"First_half": "a"}]}, "field 'Second_half' is missing"),
    ],
)
def test_a_row_that_is_none_is_named(tmp_path: Path, change: dict, says: str) -> None:
    path = written(tmp_path, [ROW, ROW | change])
    with pytest.raises(DataError) as error:
        read_concepts(path)
    assert str(error.value).startswith(f"{path}: row 2: {says}") and "\n" not in str(error.value)


def test_files_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"gone.json: cannot be read"):
        read_concepts(tmp_path / "gone.json")
    with pytest.raises(DataError, match=r"rows.csv: ConceptVectors' rows are JSON"):
        read_concepts(tmp_path / "rows.csv")
    with pytest.raises(DataError, match="holds no concepts"):
        read_concepts(written(tmp_path, []))
    with pytest.raises(DataError, match="a JSON list stands there; expected an object, concept to questions"):
        read_translated_questions(written(tmp_path, []))
    with pytest.raises(DataError, match="field 'Poland' is no list of texts"):
        read_translated_questions(written(tmp_path, {"Poland": [""]}))
    (tmp_path / "broken.json").write_text("{")
    with pytest.raises(DataError, match="not valid JSON"):
        read_translated_questions(tmp_path / "broken.json")
