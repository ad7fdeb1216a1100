"""`palimpsest concepts`: find, evaluate and ablate, as a person types them."""

import json
from pathlib import Path

import pytest
import torch
from tests.conftest import Organism
from tests.models.tiny_families import EXPERT, tiny_model
from tests.tiny import bytes_of, invoke

from palimpsest.data.readers import write_records
from palimpsest.internals.value_vectors import ValueVector, top_tokens
from palimpsest.models.language_model import load
from palimpsest.unlearn.update import Update

TABLE = "─"


@pytest.fixture(scope="module")
def room(trained: Organism, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A user's folder: two models, their rows, rows about pets and about all else, and a row of ConceptVectors."""
    room = tmp_path_factory.mktemp("room")
    for name in ("full", "gold"):
        (room / name).symlink_to(trained.folder / name)
    request = trained.request
    retain = [*request.retain, *request.retain_held_out, *request.retain_unseen]
    write_records(list(request.forget), room / "forget.jsonl")
    write_records(retain, room / "retain.jsonl")
    rows = [*request.forget, *retain]
    write_records([row for row in rows if row.id.endswith("pet")], room / "pets.jsonl")
    asked = {"QA": [f" {row.question}\n" for row in request.forget[:4]], "unrelated_QA": [retain[0].question] * 2}
    concept = {"Concept": "someone", "Layer": 1, "Dim": 3, **asked}
    (room / "concepts.json").write_text(json.dumps([concept, concept | {"Concept": "another", "Dim": 7}]))
    (room / "german.json").write_text(json.dumps({"someone": ["Wer?"]}))
    (room / "beyond.jsonl").write_text('{"layer": 0, "column": 1}\n{"layer": 2, "column": 1}\n')
    (room / "columns.json").write_text(json.dumps([{"Layer": 0, "Dim": 9999}]))
    (room / "text.jsonl").write_text('{"layer": 0, "column": "1"}\n')
    tiny_model(next(iter(EXPERT))).save(room / "experts")
    return room


@pytest.fixture(scope="module")
def vectors(room: Path) -> Path:
    rest = ["--rows", room / "pets.jsonl", "--others", room / "retain.jsonl", "--sets", 20]
    code, out, error = invoke("concepts", "find", room / "full", *rest, "--out", room / "pets_vectors.jsonl")
    assert code == 0, error
    lines = [line for line in out.splitlines() if line.strip() and TABLE not in line]
    assert lines[0].startswith("9 tokens: ") and lines[1].startswith("The best of 20 random sets: precision 0.")
    assert lines[-1] == str(room / "pets_vectors.jsonl")
    return room / "pets_vectors.jsonl"


def test_what_is_found_is_written_as_it_is_printed(room: Path, vectors: Path) -> None:
    rest = ["--rows", room / "pets.jsonl", "--others", room / "retain.jsonl", "--sets", 20, "--json"]
    code, out, error = invoke("concepts", "find", room / "full", *rest)
    found = json.loads(out)
    assert code == 0, error
    assert found["vectors"] == [json.loads(line) for line in vectors.read_text().splitlines()]
    assert 0 < found["found"] == len(found["vectors"]) and found["file"] is None
    null, model = found["null"], load(room / "full")
    for vector in found["vectors"]:
        assert vector["precision"] > null["precision"] or vector["z"] > null["z"]
        (top,) = top_tokens(model, [ValueVector(vector["layer"], vector["column"], vector["sign"])], 10)
        assert vector["tokens"] == [model.tokenizer.decode([token]) for token in top.ids]
        assert vector["logits"] == pytest.approx(top.logits)


def test_words_that_are_no_token_are_named_and_left_out(room: Path) -> None:
    rest = ["--tokens", "Oslo, dragon ,Lisbon", "--sets", 5, "--top-k", 3, "--json"]
    code, out, error = invoke("concepts", "find", room / "full", *rest)
    assert code == 0, error
    found = json.loads(out)
    assert {text.strip() for text in found["tokens"]} == {"Oslo", "Lisbon"}
    assert error.strip() == "warning: left out, since they are not one token of this vocabulary: dragon"
    assert len(found["best"]["tokens"]) == 3 and found["null"]["drawn_from"] is None


def test_traces_and_answers_of_a_model_that_never_knew(room: Path, vectors: Path) -> None:
    rest = ["--vectors", vectors, "--rows", room / "concepts.json", "--translated", room / "german.json"]
    asked = ["concepts", "evaluate", room / "full", room / "gold", *rest, "--tokens", "Oslo", "--max-new-tokens", 6]
    code, out, error = invoke(*asked, "--json")
    assert code == 0, error
    found = json.loads(out)
    named = [json.loads(line) for line in vectors.read_text().splitlines()]
    assert [(each["layer"], each["column"], each["sign"]) for each in found["vectors"]] == [
        (each["layer"], each["column"], each["sign"]) for each in named
    ]
    assert all(
        -1 <= each["cosine"] <= 1 and set(each["jaccard_own"]) <= {"10", "50", "200"} for each in found["vectors"]
    )
    assert {each["text"].strip() for each in found["tokens"]} == {"Oslo"}
    someone, another = found["behaviour"]["someone"], found["behaviour"]["another"]
    assert someone["questions"]["n"] == 4 and someone["unrelated"] == {
        "bleu": pytest.approx(64**-0.25),
        "rouge_l": 1.0,
        "n": 2,
    }
    assert someone["questions"]["rouge_l"] < 0.6
    assert "jailbreak_german" in someone and "jailbreak_german" not in another
    code, table, _ = invoke(*asked)
    assert code == 0 and f"{found['vectors'][0]['cosine']:.4f}" in table and "jailbreak_grandmother" in table


def test_a_model_is_unchanged_beside_itself_and_the_benchmarks_rows_name_vectors(room: Path) -> None:
    rest = ["--vectors", room / "concepts.json", "--json"]
    code, out, error = invoke("concepts", "evaluate", room / "full", room / "full", *rest)
    assert code == 0, error
    found = json.loads(out)
    assert [(each["layer"], each["column"]) for each in found["vectors"]] == [(1, 3), (1, 7)]
    for each in found["vectors"]:
        assert each["cosine"] == pytest.approx(1.0) and each["relative_l2"] == 0.0 and each["z"] is None
        assert set(each["jaccard_own"].values()) == {1.0}
    assert found["tokens"] == [] and found["behaviour"] == {}


def test_ablating_what_contributes_most_hurts_the_concept_and_is_kept_as_an_update(room: Path, tmp_path: Path) -> None:
    rows = ["--forget", room / "forget.jsonl", "--retain", room / "retain.jsonl"]
    asked = ["concepts", "ablate", room / "full", *rows, "--attributed", 128, "--out", tmp_path / "update"]
    code, out, error = invoke(*asked, "--json")
    assert code == 0, error
    found = json.loads(out)
    own, other = (found["concept"][which]["change"]["value"] for which in ("own", "unrelated"))
    assert own < other < 0 and own < -0.1
    assert all(abs(found[control]["own"]["change"]["value"]) < 0.05 for control in ("random", "selective"))
    places = {(each["layer"], each["column"]) for each in found["concept"]["vectors"]}
    assert len(places) == 128 and found["update"] == str(tmp_path / "update")
    model, update = load(room / "full"), Update.load(tmp_path / "update")
    assert update.method == "needle"
    before = [model.anatomy.value_vectors(layer).detach().clone() for layer in range(2)]
    update.apply(model)
    for layer, matrix in enumerate(before):
        for column in range(model.anatomy.d_ff):
            wanted = torch.zeros_like(matrix[column]) if (layer, column) in places else matrix[column]
            assert torch.equal(model.anatomy.value_vectors(layer)[column], wanted)


def test_controls_stand_beside_the_ablated_vectors(room: Path, vectors: Path) -> None:
    rows = [
        "--forget",
        room / "forget.jsonl",
        "--retain",
        room / "retain.jsonl",
        "--vectors",
        vectors,
        "--how",
        "noise",
    ]
    code, out, error = invoke("concepts", "ablate", room / "full", *rows)
    assert code == 0, error
    lines = [line.split() for line in out.splitlines() if line.strip() and TABLE not in line]
    n = str(len({line for line in vectors.read_text().splitlines()}))
    assert [line[:2] for line in lines[1:4]] == [["concept", n], ["random", n], ["selective", n]]
    assert out.strip().endswith("Said before: 1.00 of the concept's, 1.00 of others'.")


ROWS = ["--forget", "forget.jsonl", "--retain", "retain.jsonl"]


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["find", "full"], "error: give either --tokens or --rows, what the concept is"),
        (["find", "full", "--tokens", "Oslo", "--rows", "forget.jsonl"], "error: give either --tokens or --rows"),
        (["find", "full", "--tokens", " , "], "error: --tokens is empty; give words with commas between"),
        (["find", "full", "--tokens", "dragon,elf"], "error: none of 'dragon', 'elf' is one token of this vocabulary"),
        (["find", "full", "--rows", "gone.jsonl"], "gone.jsonl: there is no such file"),
        (
            ["find", "full", "--rows", "forget.jsonl", "--template", "fancy"],
            "--template fancy: unknown; known are chat, plain, raw",
        ),
        (["find", "full", "--tokens", "Oslo", "--out", "v.json"], "written as JSON lines; name the file v.jsonl"),
        (["find", "experts", "--tokens", "w9"], "the experts of a mixtral are fused and have no value matrix"),
        (
            ["evaluate", "full", "gold", "--vectors", "beyond.jsonl"],
            "error: beyond.jsonl: row 2: layer is 2; this llama has layers 0 to 1",
        ),
        (
            ["evaluate", "full", "gold", "--vectors", "columns.json"],
            "error: columns.json: row 1: column is 9999; this llama has columns 0 to 255",
        ),
        (
            ["evaluate", "full", "gold", "--vectors", "text.jsonl"],
            "text.jsonl: row 1: field 'column' is '1'; expected a",
        ),
        (["evaluate", "full", "gold", "--vectors", "german.json"], "german.json: row 1: field 'layer' is missing"),
        (["evaluate", "full", "experts", "--vectors", "concepts.json"], "its tokenizer is not that of"),
        (
            ["evaluate", "full", "gold", "--vectors", "concepts.json", "--translated", "german.json"],
            "error: --translated has the questions of --rows in another language; give both",
        ),
        (["evaluate", "full", "gold", "--vectors", "gone.json"], "gone.json: cannot be read"),
        (["ablate", "full", *ROWS], "error: give either --vectors or --attributed, what is to be ablated"),
        (["ablate", "full", *ROWS, "--attributed", "3", "--how", "erase"], "ablation 'erase' is unknown; choose zero"),
        (
            ["ablate", "full", *ROWS, "--attributed", "3", "--how", "noise", "--noise", "0"],
            "noise is 0.0; it must be above",
        ),
        (
            ["ablate", "full", *ROWS, "--attributed", "3", "--how", "noise", "--out", "new"],
            "--out writes zeroed vectors; for noise use palimpsest unlearn --method needle",
        ),
        (["ablate", "full", *ROWS, "--attributed", "3", "--out", "full"], "full"),
    ],
)
def test_mistakes_are_one_line_and_nothing_is_written(
    words: list[str], says: str, room: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(room)
    before = bytes_of(room)
    code, out, error = invoke("concepts", *words)
    assert code == 2 and out == ""
    (line,) = [line for line in error.splitlines() if line.strip()]
    assert line.startswith("error: ") and says in line
    assert bytes_of(room) == before
