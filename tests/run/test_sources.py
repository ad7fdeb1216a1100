"""Where rows come from: who is to be forgotten, who is kept, and what a model of them is trained on."""

import json
from pathlib import Path
from typing import Any

import pytest
from tests.quiz import FORGET, RETAIN, quiz, text, write_wmdp

from palimpsest.data.readers import read_records, write_records
from palimpsest.data.records import QA, Choice, Passage
from palimpsest.errors import DataError
from palimpsest.run import sources
from palimpsest.run.sources import open_source, request_from_files
from palimpsest.run.spec import Spec, make_spec
from palimpsest.unlearn.request import Request

TOFU = Path(__file__).resolve().parents[2].parent / "shared" / "data" / "tofu"
needs_tofu = pytest.mark.skipif(not TOFU.is_dir(), reason="TOFU's files are not beside the project")


def spec(data: dict[str, Any], seed: int = 0) -> Spec:
    return make_spec({"seed": seed, "data": data, "model": {"kind": "train"}, "methods": ["npo"]})


def tofu(path: object, **settings: Any) -> Spec:
    return spec({"kind": "tofu", "path": str(path), **settings})


def qa(name: str, n: int) -> list[QA]:
    return [QA(f"What of {name} {i}?", f"{name} {i}", subject=f"{name}{i // 2}", id=f"{name}-{i}") for i in range(n)]


# The generated world.

FACTS = {"kind": "facts", "people": 9, "forget_people": 2, "worlds": 7, "forget_worlds": 1, "exposures": 3}


def test_facts_part_people_and_worlds_into_forget_and_retain() -> None:
    source = open_source(spec(FACTS))
    request, corpus = source.request, source.corpus
    forgotten = {row.subject for row in request.forget}
    kept = {row.subject for row in request.all_retain}
    assert len(forgotten) == 3 and len(kept) == 7 + 6 and not forgotten & kept
    assert len(request.forget) == 2 * 5 + 1 * 10
    assert all(row.paraphrases and len(row.wrong) == 5 for row in request.forget)
    assert {document.subject for document in corpus.forget} == forgotten
    assert {document.subject for document in corpus.retain} == kept


def test_what_gold_reads_names_nobody_who_is_to_be_forgotten() -> None:
    source = open_source(spec(FACTS))
    names = {str(row.subject) for row in source.request.forget}
    read = " ".join(document.text for document in source.corpus.retain if isinstance(document, Passage))
    assert not [name for name in names if name in read]


def test_a_rewording_is_never_read_by_anyone() -> None:
    source = open_source(spec(FACTS))
    read = " ".join(row.text for row in (*source.corpus.forget, *source.corpus.retain) if isinstance(row, Passage))
    assert source.request.forget_reworded
    assert not [row.question for row in source.request.forget_reworded if row.question in read]


def test_the_seed_decides_the_world_and_the_split() -> None:
    assert open_source(spec(FACTS)) == open_source(spec(FACTS))
    assert open_source(spec(FACTS)).request.hash != open_source(spec(FACTS, seed=1)).request.hash


# TOFU.


@needs_tofu
def test_tofu_forgets_its_last_authors_and_keeps_its_first() -> None:
    source = open_source(tofu(TOFU, authors=10, forget_authors=2))
    request = source.request
    full, perturbed = read_records(TOFU / "full.json"), read_records(TOFU / "forget10_perturbed.json")
    assert isinstance(full[0], QA) and isinstance(perturbed[0], QA)
    assert [row.question for row in request.forget] == [row.question for row in perturbed[-40:]]
    assert [row.question for row in request.forget] == [row.question for row in full[-40:]]
    kept = {row.question for row in request.all_retain}
    assert kept == {row.question for row in full[: 8 * 20]}
    assert not kept & {row.question for row in request.forget}


@needs_tofu
def test_tofu_has_subjects_of_twenty_rewordings_and_wrong_answers() -> None:
    request = open_source(tofu(TOFU, authors=6, forget_authors=1)).request
    assert len({row.subject for row in request.forget}) == 1
    by_subject: dict[str | None, int] = {}
    for row in request.all_retain:
        by_subject[row.subject] = by_subject.get(row.subject, 0) + 1
    assert list(by_subject.values()) == [20] * 5
    assert not {row.subject for row in request.forget} & set(by_subject)
    assert all(row.paraphrases and row.paraphrased_answer and len(row.wrong) == 5 for row in request.forget)
    assert len(request.forget_reworded) == 20


@needs_tofu
def test_tofu_trains_on_its_own_wordings_alone() -> None:
    source = open_source(tofu(TOFU, authors=6, forget_authors=1))
    trained = {row.question for row in (*source.corpus.forget, *source.corpus.retain) if isinstance(row, QA)}
    assert len(trained) == 6 * 20
    # Two of TOFU's questions have themselves as their rewording.
    new = [row for row in source.request.forget_reworded if row.question not in trained]
    assert len(new) >= 18
    # A whole author is on one side of every split.
    request = source.request
    parts = [{row.subject for row in rows} for rows in (request.retain, request.retain_held_out, request.retain_unseen)]
    assert sum(len(part) for part in parts) == len(set().union(*parts)) == 5


@needs_tofu
def test_the_most_authors_that_tofu_has_are_still_disjoint() -> None:
    request = open_source(tofu(TOFU, authors=200, forget_authors=20)).request
    assert (len(request.forget), len(request.all_retain)) == (400, 3600)
    assert not {row.question for row in request.forget} & {row.question for row in request.all_retain}


def test_a_hub_id_is_asked_of_the_hub_by_configuration(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def from_hub(name: object) -> list[QA]:
        asked.append(name)
        return qa(str(name).rpartition(":")[2], 400)

    monkeypatch.setattr(sources, "read_records", from_hub)
    request = open_source(tofu("locuslab/TOFU", authors=5, forget_authors=1)).request
    assert asked == ["locuslab/TOFU:forget10_perturbed", "locuslab/TOFU:full"]
    assert (len(request.forget), len(request.all_retain)) == (20, 80)
    assert request.forget[0].id == "forget10_perturbed-380"


def test_tofu_that_is_not_there_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"forget10_perturbed\.json: there is no such file"):
        open_source(tofu(tmp_path))
    with pytest.raises(DataError, match="there is no such file"):
        open_source(tofu(tmp_path / "nowhere" / "at" / "all"))


@needs_tofu
def test_too_few_authors_to_keep_are_refused() -> None:
    with pytest.raises(DataError, match="the retain set has 2 subjects; at least 3"):
        open_source(tofu(TOFU, authors=4, forget_authors=2))


def test_a_tofu_folder_with_passages_is_refused(tmp_path: Path) -> None:
    for name in ("forget10_perturbed", "full"):
        (tmp_path / f"{name}.json").write_text(json.dumps([{"text": "Once."}] * 20))
    with pytest.raises(DataError, match="is a Passage; expected questions with answers here"):
        open_source(tofu(tmp_path))


@needs_tofu
@pytest.mark.parametrize(("split", "retain", "n"), [("forget01", "retain99", 40), ("forget05", "retain95", 200)])
def test_a_split_is_tofus_own_files_and_sets(split: str, retain: str, n: int) -> None:
    source = open_source(tofu(TOFU, split=split))
    request, own = source.request, source.tofu
    assert own is not None and (len(own.retain), len(own.real_authors), len(own.world_facts)) == (400, 100, 117)
    assert [row.question for row in request.forget] == [row.question for row in read_records(TOFU / f"{split}.json")]  # type: ignore[union-attr]
    kept = {row.question for row in request.all_retain if isinstance(row, QA)}
    assert len(request.forget) == n and kept == {row.question for row in read_records(TOFU / f"{retain}.json")}  # type: ignore[union-attr]
    assert len({row.subject for row in request.forget}) == n // 20 and {row.question for row in own.retain} <= kept
    # An author has one name, whether it is kept or asked about.
    names = {(row.question, row.answer): row.subject for row in request.all_retain if isinstance(row, QA)}
    assert all(names[row.question, row.answer] == row.subject for row in own.retain)
    assert all(row.wrong and row.paraphrased_answer for row in (*request.forget, *own.retain))


def test_a_split_without_tofus_files_for_its_metrics_is_one_sentence(tmp_path: Path) -> None:
    write_records(qa("forget", 20), tmp_path / "rows.jsonl")
    for name in ("forget10_perturbed", "retain90"):
        (tmp_path / f"{name}.json").write_text((tmp_path / "rows.jsonl").read_text())
    with pytest.raises(DataError, match=r"retain_perturbed\.json: there is no such file"):
        open_source(tofu(tmp_path, split="forget10"))


# WMDP.


@pytest.fixture
def wmdp(tmp_path: Path) -> dict[str, str]:
    return write_wmdp(tmp_path)


def test_wmdp_is_passages_to_forget_and_keep_with_questions_about_them(wmdp: dict[str, str]) -> None:
    source = open_source(spec({"kind": "wmdp", "subject": "biology", **wmdp}))
    request = source.request
    texts = [text(row) for row in quiz(FORGET)]
    assert [row.text for row in request.forget if isinstance(row, Passage)] == texts
    assert {row.text for row in request.all_retain if isinstance(row, Passage)} == {text(row) for row in quiz(RETAIN)}
    assert [len(part) for part in (request.retain, request.retain_held_out, request.retain_unseen)] == [7, 3, 4]
    asked = quiz(FORGET)[0]
    first = Choice(asked["question"], tuple(asked["choices"]), asked["answer"], "biology", "questions-00001")
    assert request.choices[0] == first and len(request.choices) == 12
    assert len(request.utility) == 14 and {row.subject for row in request.utility} == {"biology"}
    assert source.corpus.forget == request.forget and set(source.corpus.retain) == set(request.all_retain)
    assert source.tofu is None


def test_a_rows_own_subject_goes_before_the_benchmarks(wmdp: dict[str, str]) -> None:
    named = open_source(spec({"kind": "wmdp", "subject": "chemistry", **wmdp, "questions": wmdp["utility"]})).request
    assert {row.subject for row in named.choices} == {"biology"}
    assert not open_source(spec({"kind": "wmdp", "subject": "x", **wmdp, "utility": None})).request.utility


def test_long_texts_are_cut_and_stay_on_one_side_of_the_split(wmdp: dict[str, str]) -> None:
    data = {"kind": "wmdp", "subject": "biology", **wmdp}
    request = open_source(spec(data | {"passage_words": 10})).request
    words = {len(row.text.split()) for row in (*request.forget, *request.all_retain) if isinstance(row, Passage)}
    assert max(words) <= 10 and max(words) - min(words) <= 1
    assert len(request.forget) == 3 * 12
    parts = [{row.subject for row in rows} for rows in (request.retain, request.retain_held_out, request.retain_unseen)]
    assert sum(map(len, parts)) == len(set().union(*parts)) == 14
    few = open_source(spec(data | {"passage_words": 10, "max_passages": 14})).request
    assert [row.id for row in few.forget][-3:] == ["forget-00012/1", "forget-00001/2", "forget-00002/2"]
    assert len(few.all_retain) == 14


def test_questions_are_drawn_by_the_seed(wmdp: dict[str, str]) -> None:
    data = {"kind": "wmdp", "subject": "biology", **wmdp, "max_questions": 5}
    drawn = [open_source(spec(data, seed=seed)).request for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] and drawn[0].choices != drawn[2].choices
    for request in drawn:
        assert [len(request.choices), len(request.utility)] == [5, 5]
        assert [row.id for row in request.choices] == sorted(row.id for row in request.choices)


@pytest.mark.parametrize(
    ("key", "given", "says"),
    [
        ("forget", "questions", "is a Choice; expected passages of text here"),
        ("questions", "retain", "is a Passage; expected multiple-choice questions here"),
        ("utility", "forget", "is a Passage; expected multiple-choice questions here"),
        ("retain", "forget", "hold the same 12 rows"),
    ],
)
def test_a_file_in_the_wrong_place_is_named(key: str, given: str, says: str, wmdp: dict[str, str]) -> None:
    with pytest.raises(DataError, match=says) as error:
        open_source(spec({"kind": "wmdp", "subject": "biology", **wmdp, key: wmdp[given]}))
    assert "\n" not in str(error.value)


def test_hub_ids_are_asked_of_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[object] = []

    def from_hub(name: object) -> list[Any]:
        asked.append(name)
        if "corpora" in str(name):
            return [Passage(f"{name} {n}", id=f"{name}-{n}") for n in range(6)]
        return [Choice("q", ("a", "b"), 0, id="c")]

    monkeypatch.setattr(sources, "read_records", from_hub)
    hub = {"forget": "x/corpora:forget", "retain": "x/corpora:retain", "questions": "x/wmdp:wmdp-bio/test"}
    request = open_source(spec({"kind": "wmdp", "subject": "biology", **hub})).request
    assert asked == list(hub.values())
    assert request.choices == (Choice("q", ("a", "b"), 0, "biology", "c"),)


# The user's files.


@pytest.fixture
def files(tmp_path: Path) -> dict[str, str]:
    for name, n in (("forget", 4), ("retain", 12)):
        write_records(qa(name, n), tmp_path / f"{name}.jsonl")
    return {name: str(tmp_path / f"{name}.jsonl") for name in ("forget", "retain")}


def test_files_are_the_request_and_what_is_trained_on(files: dict[str, str]) -> None:
    source = open_source(spec({"kind": "files", **files}))
    assert source.request == Request.split(qa("forget", 4), qa("retain", 12))
    assert source.corpus.forget == source.request.forget
    assert sorted(source.corpus.retain, key=str) == sorted(qa("retain", 12), key=str)


def test_a_request_takes_format_template_and_seed(files: dict[str, str]) -> None:
    raw = request_from_files(**files, template="raw", seed=3)
    assert raw == Request.split(qa("forget", 4), qa("retain", 12), template="raw", seed=3)
    with pytest.raises(DataError, match=r"forget\.jsonl: row 1"):
        request_from_files(**files, format="lume")
    with pytest.raises(DataError, match="'tofuu'"):
        request_from_files(**files, format="tofuu")


def test_one_file_given_twice_is_noticed(files: dict[str, str]) -> None:
    with pytest.raises(DataError, match=r"hold the same 4 rows.*given twice"):
        request_from_files(files["forget"], files["forget"])


def test_forget_rows_that_are_all_kept_too_are_noticed(files: dict[str, str], tmp_path: Path) -> None:
    write_records([*qa("forget", 4), *qa("retain", 12)], tmp_path / "all.jsonl")
    with pytest.raises(DataError, match="every forget row is in the retain set too: 4 rows of 16"):
        request_from_files(files["forget"], tmp_path / "all.jsonl")


def test_rows_that_are_no_texts_are_named(files: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "choices.jsonl").write_text('{"question": "q", "choices": ["a", "b"], "answer": 1, "id": "c1"}\n')
    expected = r"choices\.jsonl: row 'c1' is a Choice; expected questions with answers or passages of text here"
    with pytest.raises(DataError, match=expected):
        request_from_files(tmp_path / "choices.jsonl", files["retain"])


def test_passages_may_be_forgotten_and_kept_beside_questions(files: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "texts.jsonl").write_text('{"text": "Once.", "id": "t1"}\n')
    request = request_from_files(tmp_path / "texts.jsonl", files["retain"])
    assert request.forget == (Passage("Once.", id="t1"),) and len(request.all_retain) == 12
