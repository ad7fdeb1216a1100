"""Which schema a row has, and what is said when it has none."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from palimpsest.data.records import QA, Choice, Passage, Preference, Record
from palimpsest.data.schemas import SCHEMAS, Fields, check_format, recognise, to_record
from palimpsest.errors import DataError

QUESTION = {"question": "q", "answer": "a"}
OPTIONS = {"question": "q", "option1": "a", "option2": "b", "option3": "c", "option4": "d"}

GOOD: list[tuple[str, Fields, Record]] = [
    ("tofu", QUESTION, QA("q", "a", id="i")),
    (
        "tofu",
        {**QUESTION, "paraphrased_question": "Q", "paraphrased_answer": "A", "perturbed_answer": ["x", "y"]},
        QA("q", "a", None, ("Q",), "A", ("x", "y"), id="i"),
    ),
    ("tofu", {**QUESTION, "perturbed_answer": ["x"], "subject": "s"}, QA("q", "a", "s", wrong=("x",), id="i")),
    ("tofu_options", {**OPTIONS, "answer": "b"}, Choice("q", ("a", "b", "c", "d"), 1, id="i")),
    ("tofu_options", {**OPTIONS, "option4": None, "answer": "c"}, Choice("q", ("a", "b", "c"), 2, id="i")),
    (
        "palimpsest",
        {**QUESTION, "paraphrases": ["Q", "R"], "wrong": ["x"], "entity_span": [0, 1], "subject": "s", "id": "own"},
        QA("q", "a", "s", ("Q", "R"), None, ("x",), (0, 1), "own"),
    ),
    ("lume", {"id": "12qa3", "input": "q", "output": "a", "task": "Task2"}, QA("q", "a", "12", id="12qa3")),
    ("lume", {"id": '"a-b"sc1', "input": "q", "output": "a", "task": "Task1"}, QA("q", "a", "a-b", id='"a-b"sc1')),
    ("lume", {"id": "strange", "input": "q", "output": "a", "task": "Task1"}, QA("q", "a", id="strange")),
    ("input_output", {"input": "q", "output": "a"}, QA("q", "a", id="i")),
    ("prompt_completion", {"prompt": "q", "completion": "a"}, QA("q", "a", id="i")),
    ("text", {"text": "t", "meta": {"page": 3}}, Passage("t", id="i")),
    ("text", {"text": "t", "subject": "Ann"}, Passage("t", "Ann", id="i")),
    ("article", {"title": "T", "abstract": "a", "doi": "10/x"}, Passage("T\n\na", id="i")),
    ("article", {"title": "T", "abstract": "a", "text": "all of it"}, Passage("all of it", id="i")),
    ("choice", {"question": "q", "choices": ["a", "b"], "answer": 0}, Choice("q", ("a", "b"), 0, id="i")),
    ("preference", {"prompt": "p", "chosen": "c", "rejected": "r"}, Preference("p", "c", "r", id="i")),
    (
        "tofu_entities",
        {"idx": 45, "question": "q", "answer": "It is Ann.", "prefix": "It is", "entity": "Ann", "entity_span": {}},
        QA("q", "It is Ann.", "author-002", entity_span=(6, 9), id="i"),
    ),
    (
        "rwku",
        {"query": "q", "answer": "a", "level": "3", "type": "prefix injection", "subject": "s"},
        QA("q", "a", "s", id="i/3/prefix injection"),
    ),
    ("rwku", {"query": "q ___.", "answer": "a", "level": 1}, QA("q ___.", "a", id="i/1")),
    ("knowundo", {"text": "q", "labels": "a"}, QA("q", "a", id="i")),
    ("muse_verbmem", {"prompt": "p", "gt": "g"}, QA("p", "g", id="i")),
]


@pytest.mark.parametrize(("name", "fields", "record"), GOOD)
def test_a_row_is_known_by_its_fields_or_by_its_schemas_name(name: str, fields: Fields, record: Record) -> None:
    schema = recognise(frozenset(field for field, value in fields.items() if value is not None))
    assert schema is not None and schema.name == name
    assert to_record(fields, "i") == record
    assert to_record(fields, "i", name) == record  # type: ignore[arg-type]


def test_every_schema_is_tried() -> None:
    assert {name for name, _, _ in GOOD} == set(SCHEMAS)


@pytest.mark.parametrize(("name", "fields", "record"), GOOD)
def test_nulls_and_empty_optional_fields_are_as_if_left_out(name: str, fields: Fields, record: Record) -> None:
    # Parquet and CSV tables give every row every column.
    blank = {field: None for schema in SCHEMAS.values() for field in schema.fields if field not in fields}
    assert to_record({**fields, **blank}, "i") == record
    assert to_record({**fields, **dict.fromkeys(blank, "")}, "i") == record


def test_a_named_schema_overrules_the_fields() -> None:
    fields = {"prompt": "p", "chosen": "c", "rejected": "r", "completion": "done", "text": "t"}
    assert to_record(fields, "i") == Preference("p", "c", "r", id="i")
    assert to_record(fields, "i", "prompt_completion") == QA("p", "done", id="i")
    assert to_record(fields, "i", "text") == Passage("t", id="i")


@pytest.mark.parametrize(
    ("fields", "format", "message"),
    [
        ({"question": "q"}, None, "field 'answer' is missing; a row of schema tofu has question, answer"),
        ({"question": "q", "awnser": "a"}, None, "unknown field 'awnser'; did you mean 'answer'? A row of schema tofu"),
        ({"Question": "q", "Answer": "a"}, None, "unknown field 'Question'; did you mean 'question'?"),
        ({"question": "q", "answer": None}, None, "field 'answer' is null; a row of schema tofu has"),
        ({"question": "q", "answer": ""}, None, "field 'answer' is empty; a row of schema tofu has"),
        ({"question": "q", "answer": " \n"}, None, "field 'answer' is empty; fill it in or remove the row"),
        ({"question": "q", "answer": 12}, None, "field 'answer' holds a number (12); expected text"),
        ({"question": "q", "answer": ["a"]}, None, "field 'answer' holds a list (['a']); expected text"),
        ({"question": "q", "answer": float("nan")}, None, "field 'answer' holds a number (nan); expected text"),
        ({"question": {"a": "b" * 90}, "answer": "a"}, None, "field 'question' holds an object; expected text"),
        ({"question": "q", "answer": "\ud83d"}, None, r"field 'answer' holds '\ud83d', half of a surrogate pair"),
        ({"question": "q", "answer": "a", "subject": 3}, None, "field 'subject' holds a number (3); expected text"),
        ({"question": "q", "answer": "a", "id": True}, None, "field 'id' holds true or false (True); expected text"),
        ({**QUESTION, "wrong": "x"}, None, "field 'wrong' is text ('x'); expected a list of texts"),
        ({**QUESTION, "wrong": ["x", 1]}, None, "field 'wrong' holds a number (1); expected only texts in its list"),
        ({**QUESTION, "perturbed_answer": ["x", ""]}, None, "field 'perturbed_answer' holds an empty text"),
        ({**QUESTION, "entity_span": [0, 2]}, None, "field 'entity_span' is a list ([0, 2]); expected [start, stop]"),
        ({**QUESTION, "entity_span": [1, 1]}, None, "field 'entity_span' is a list ([1, 1])"),
        ({**QUESTION, "entity_span": [False, True]}, None, "field 'entity_span' is a list ([False, True])"),
        ({**OPTIONS, "answer": "e"}, None, "field 'answer' is text ('e'); expected the text of one of its options"),
        ({"question": "q", "choices": ["a"], "answer": 0}, None, "field 'choices' holds fewer than two choices"),
        (
            {"question": "q", "choices": ["a", "b"], "answer": 2},
            None,
            "field 'answer' is a number (2); expected the right choice's place, 0 to 1",
        ),
        ({"question": "q", "choices": ["a", "b"], "answer": "b"}, None, "field 'answer' is text ('b'); expected the"),
        ({"question": "q", "choices": ["a", "b"], "answer": True}, None, "field 'answer' is true or false (True)"),
        ({"prompt": "p"}, None, "field 'completion' is missing; a row of schema prompt_completion has"),
        ({"prompt": "p", "chosen": "c"}, None, "field 'rejected' is missing; a row of schema preference has"),
        ({"country": "Chad", "city": "N'Djamena"}, None, "no schema has the fields 'country', 'city'; expected one of"),
        ({}, None, "no schema has the fields (none)"),
        (
            {"idx": 0, "question": "q", "answer": "It is Ann.", "entity": "ann"},
            None,
            "field 'entity' is text ('ann'); expected a part of field 'answer', letter for letter",
        ),
        (
            {"idx": -1, "question": "q", "answer": "Ann", "entity": "Ann"},
            None,
            "field 'idx' is a number (-1); expected the question's place in forget10",
        ),
        ({"query": "q", "answer": "a", "level": 4}, None, "field 'level' is a number (4); expected 1 (fill in), 2"),
        ({"query": "q", "answer": "a", "level": 1.0}, None, "field 'level' is a number (1.0); expected 1"),
        ({"query": "q", "answer": "a", "level": True}, None, "field 'level' is true or false (True); expected 1"),
        ({"query": "q", "answer": " ", "level": 1}, None, "field 'answer' is empty; fill it in or remove the row"),
        ({"query": "q", "level": 1}, None, "field 'answer' is missing; a row of schema rwku has query, answer, level"),
        ({"text": "q", "labels": 3}, None, "field 'labels' holds a number (3); expected text"),
        ({"text": "q", "labels": ""}, "knowundo", "field 'labels' is empty; a row of schema knowundo has text, labels"),
        ({"prompt": "p", "gt": ["a"]}, None, "field 'gt' holds a list (['a']); expected text"),
        (QUESTION, "lume", "field 'id' is missing; a row of schema lume has id, input, output, task"),
        ({"question": "q", "answer": "a"}, "text", "field 'text' is missing; a row of schema text has text"),
    ],
)
def test_a_broken_row_is_told_by_field_and_mend(fields: Fields, format: str | None, message: str) -> None:
    with pytest.raises(DataError) as caught:
        to_record(fields, "i", format)  # type: ignore[arg-type]
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


def test_an_unknown_format_is_refused_with_the_nearest() -> None:
    with pytest.raises(DataError, match=r"format 'tofo' is unknown; did you mean 'tofu'\?"):
        check_format("tofo")
    with pytest.raises(DataError, match=r"format 'xyz' is unknown; choose .*preference"):
        check_format("xyz")
    check_format(None)
    check_format("lume")


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(), max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
    max_leaves=4,
)
known_fields = st.sampled_from(sorted({field for schema in SCHEMAS.values() for field in schema.fields}))


@settings(deadline=None, max_examples=300)
@given(fields=st.dictionaries(known_fields | st.text(max_size=8), json_values, max_size=8))
def test_any_json_object_is_a_record_or_refused_in_one_line(fields: Fields) -> None:
    try:
        record = to_record(fields, "fallback")
    except DataError as error:
        assert "\n" not in str(error)
        assert "field" in str(error)
    else:
        assert record.id
        hash(record)
