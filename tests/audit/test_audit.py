"""The audit: controls and methods side by side, every number recomputed from its rows, every role in its place."""

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tests.conftest import Organism

from palimpsest.audit import audit as audit_module
from palimpsest.audit.audit import NOT_COMPARED, Candidate, audit, unlearned
from palimpsest.audit.evidence import RunFolder
from palimpsest.audit.internals import RECOVERY
from palimpsest.audit.recovery import RELEARNED, TAUGHT
from palimpsest.audit.results import Audit, TracePoint
from palimpsest.audit.verify import verify
from palimpsest.data.records import QA, Choice, Passage
from palimpsest.errors import EvidenceError, ModelError, SpecError
from palimpsest.metrics.likelihood import answer_probability
from palimpsest.models.language_model import LanguageModel
from palimpsest.models.organism import train_sham
from palimpsest.models.tokenizers import word_tokenizer
from palimpsest.unlearn.gradient_ascent import GradientAscent, GradientDifference
from palimpsest.unlearn.npo import NPO
from palimpsest.unlearn.random_labels import RandomLabels
from palimpsest.unlearn.request import Request
from palimpsest.unlearn.stopping import Stop
from palimpsest.unlearn.update import Update

SPEC = {"seed": 5, "what": "a test"}
METHODS = (
    GradientAscent(learning_rate=3e-3),
    GradientDifference(learning_rate=1e-3),
    NPO(learning_rate=1e-3),
    RandomLabels(learning_rate=1e-3),
)


@pytest.fixture(scope="module")
def controls(trained: Organism) -> list[Candidate]:
    sham = train_sham(trained.full, trained.request.retain, template="plain", steps=10, learning_rate=3e-4)
    return [
        Candidate("original", "original", "Trained on everything.", trained.full),
        Candidate("gold", "gold", "Trained without the forget set.", trained.gold),
        Candidate("sham", "sham", "Trained further on retain rows alone.", sham),
    ]


@pytest.fixture(scope="module")
def updates(trained: Organism) -> dict[str, Update]:
    """Gradient ascent goes far beyond any reason; the others stop at gold's level."""
    level = answer_probability(trained.gold, trained.request.forget).mean().item()
    stops = {"grad_ascent": Stop(steps=30)}
    original = trained.full.copy("original")
    return {m.name: m.run(original, trained.request, stops.get(m.name, Stop(60, level))) for m in METHODS}


@pytest.fixture(scope="module")
def run(
    trained: Organism,
    controls: list[Candidate],
    updates: dict[str, Update],
    tmp_path_factory: pytest.TempPathFactory,
) -> RunFolder:
    """The audit of all of them, in its folder."""
    run = RunFolder(tmp_path_factory.mktemp("audits") / "run")
    methods = [unlearned(trained.full, update, f"By {name}.") for name, update in updates.items()]
    found = audit(trained.request, [*controls, *methods], run, title="A test", spec=SPEC, max_new_tokens=4)
    assert found == run.read_audit()
    return run


@pytest.fixture(scope="module")
def found(run: RunFolder) -> Audit:
    return run.read_audit()


def small(trained: Organism) -> Request:
    """Two rows of each set: enough where the numbers do not matter."""
    request = trained.request
    return replace(request, forget=request.forget[:2], retain_unseen=request.retain_unseen[:2])


Auditor = Callable[..., Audit]


@pytest.fixture
def audit_small(trained: Organism, tmp_path: Path) -> Auditor:
    def examine(candidates: list[Candidate], request: Request | None = None) -> Audit:
        folder = RunFolder(tmp_path / "run")
        return audit(request or small(trained), candidates, folder, title="", spec={}, max_new_tokens=1)

    return examine


# Everything together.


def test_every_number_is_recomputed_from_its_rows(run: RunFolder, found: Audit) -> None:
    verification = verify(run.path)
    assert verification.ok, verification.failures
    numbers = [check for check in verification.checks if check.name.startswith("scores of")]
    assert [check.name.removeprefix("scores of ") for check in numbers] == [model.name for model in found.models]
    rows = run.read_scores()
    for model in found.models:
        for key, score in model.scores.items():
            values = [row.value for row in rows if (row.model, row.measure) == (model.name, key)]
            assert score.value == pytest.approx(math.fsum(values) / len(values), rel=1e-12)
            assert score.n == len(values) and score.low <= score.value <= score.high


def test_names_and_roles_are_as_given_and_every_model_has_every_measure(found: Audit) -> None:
    assert [(model.name, model.role) for model in found.models] == [
        *[(name, name) for name in ("original", "gold", "sham")],
        *[(method.name, "unlearned") for method in METHODS],
    ]
    keys = {measure.key for measure in found.measures}
    recovery = {key for key in keys if key.startswith(RECOVERY)}
    lessons = {key for key in keys if key.startswith((RELEARNED, TAUGHT))}
    assert recovery and lessons
    for model in found.models:  # in the original there is nothing to recover, and not every model is taught
        taught = model.name == "gold" or model.name == "original" or (model.recovered and model.recovered.relearned)
        expected = keys - recovery if model.role == "original" else keys
        assert set(model.scores) == (expected if taught else expected - lessons)
    assert found.title == "A test" and found.spec == SPEC and found.environment["torch"] == torch.__version__
    assert found.request["forget"]["rows"] == 25 and found.request["forget"]["subjects"] == 5


def test_the_forget_side_alone_is_compared_with_gold(found: Audit) -> None:
    for model in found.models:
        compared = set(model.against_gold)
        if model.role == "gold":
            assert compared == set()
        else:
            forget = {key for key in model.scores if key.startswith("forget") and not key.startswith(NOT_COMPARED)}
            assert compared == forget - {"forget/kl_from_gold"}
    original, gold = found.model("original"), found.model("gold")
    for key, equivalence in original.against_gold.items():
        distance = original.scores[key].value - gold.scores[key].value
        assert equivalence.difference == pytest.approx(distance, rel=1e-6)
        assert equivalence.margin == pytest.approx(0.1 * abs(distance))


def test_the_verdicts_tell_the_controls_and_the_ruin_apart(found: Audit) -> None:
    outcomes = {model.name: model.verdict.outcome for model in found.models if model.verdict}
    assert outcomes["original"] == outcomes["sham"] == "remembered"
    assert outcomes["gold"] in ("erased", "inconclusive")
    assert outcomes["grad_ascent"] == "broken"
    assert len(outcomes) == 7 and "erased" not in [outcomes[method.name] for method in METHODS]
    for name in ("grad_diff", "npo", "random_labels"):
        assert outcomes[name] != "remembered"


def test_fingerprints_are_those_of_the_models_that_were_read(
    found: Audit, trained: Organism, updates: dict[str, Update]
) -> None:
    assert found.model("original").fingerprint == trained.full.fingerprint()
    with updates["npo"].applied(trained.full.copy("again")) as again:
        assert found.model("npo").fingerprint == again.fingerprint()
    assert len({model.fingerprint for model in found.models}) == 7


def test_a_method_brings_its_path_its_time_and_why_it_stopped(found: Audit, updates: dict[str, Update]) -> None:
    for name, update in updates.items():
        model = found.model(name)
        made = update.provenance["trace"]
        assert model.seconds == update.provenance["seconds"]
        why = update.provenance["stopped"]
        slowed = update.provenance["last_rate"] < update.provenance["method"]["learning_rate"]
        assert model.stopped.startswith(f"{why}; it went too fast at a learning rate of 0.001" if slowed else why)
        assert [point.retain_kl for point in model.trace] == [point["retain_kl"] for point in made]
        start = found.model("original").scores["forget/answer_probability"].value
        assert model.trace[0] == TracePoint(0, pytest.approx(start), pytest.approx(0, abs=1e-6))
        end = model.scores["forget/answer_probability"].value
        assert model.trace[-1].forget_probability == pytest.approx(end, abs=1e-5)
    for control in ("original", "gold", "sham"):
        assert (found.model(control).trace, found.model(control).seconds, found.model(control).stopped) == (
            (),
            None,
            "",
        )


def test_a_fractional_last_step_counts_as_the_step_it_was_part_of(found: Audit, updates: dict[str, Update]) -> None:
    ends = {name: update.provenance["trace"][-1]["step"] for name, update in updates.items()}
    assert ends["grad_ascent"] == 30 and any(end != int(end) for end in ends.values())
    for name, end in ends.items():
        steps = [point.step for point in found.model(name).trace]
        assert steps == sorted(set(steps))  # never the step of the measurement before
        assert 0 <= steps[-1] - end < 1 and all(isinstance(step, int) for step in steps)


def test_examples_show_what_each_model_said(found: Audit, trained: Organism, run: RunFolder) -> None:
    sets = {"forget": trained.request.forget, "forget_reworded": trained.request.forget_reworded}
    rows = {(row.model, row.measure, row.item): row.value for row in run.read_scores()}
    for on, records in (sets | {"retain_unseen": trained.request.retain_unseen}).items():
        examples = [example for example in found.examples if example.on == on]
        assert [(example.question, example.answer) for example in examples] == [
            (record.question, record.answer) for record in records
        ]
        for example in examples:
            assert set(example.said) == set(example.probability) == {model.name for model in found.models}
            for name, probability in example.probability.items():
                assert probability == rows[name, f"{on}/answer_probability", example.id]
    said = [example.said["original"] == example.answer for example in found.examples if example.on == "forget"]
    assert sum(said) > 20


def test_json_and_back_is_the_same_audit(found: Audit) -> None:
    assert Audit.from_json(json.loads(json.dumps(found.to_json()))) == found
    assert Audit.from_json(found.to_json()).to_json() == found.to_json()


def test_the_same_models_audited_again_give_the_same_bytes(
    trained: Organism, controls: list[Candidate], tmp_path: Path
) -> None:
    files = []
    for name in ("one", "two"):
        folder = RunFolder(tmp_path / name)
        audit(small(trained), controls, folder, title="A test", spec=SPEC, max_new_tokens=2)
        files.append((folder.path / "audit.json").read_bytes())
    assert files[0] == files[1]


# What is missing is said.


def test_notes_name_what_is_missing(controls: list[Candidate], audit_small: Auditor, trained: Organism) -> None:
    original, gold, sham = controls

    def notes(candidates: list[Candidate], request: Request | None = None) -> set[str]:
        found = audit_small(candidates, request)
        return {note.split(":")[0].split(" have")[0] for note in found.notes}

    worded = small(trained)
    plain = replace(worded, forget=tuple(replace(row, paraphrases=()) for row in worded.forget))
    few, untried = "Relearning was not tried", "Recovery was not tried"  # two rows are of one subject
    long = "The attack few_shot was left out"
    assert notes([original, gold, sham]) == {few, long}
    assert notes([original, sham]) == {"No gold", untried}
    assert notes([original, gold]) == {"No sham", few, long}
    assert notes([original], plain) == {"No gold", "No sham", "The forget rows", untried}


def test_passages_and_choices_are_shown_and_what_the_verdict_does_with_them_is_noted(
    controls: list[Candidate], audit_small: Auditor, trained: Organism
) -> None:
    texts = tuple(Passage(f"{place} is a {'x' * 400}.", id=f"p{place}") for place in range(3))
    choices = (Choice("q", ("a", "b"), 1, id="c"),)
    found = audit_small(controls, replace(small(trained), retain_unseen=texts, choices=choices))
    notes = [note.split(";")[0] for note in found.notes[2:]]
    assert notes[0].startswith("Accuracy on the 1 multiple-choice questions about the forget set stands among")
    assert notes[1].startswith("Some rows are passages")
    shown = {example.on: example for example in found.examples}
    text = shown["retain_unseen"]
    assert (text.question, text.said, len(text.answer), text.answer[-1]) == ("", {}, 301, "…")
    assert set(text.probability) == {"original", "gold", "sham"}
    assert shown["forget_choices"].answer == "b" and set(shown["forget_choices"].said.values()) <= {"a", "b"}
    for model in found.models:
        assert model.verdict and model.scores["retain_unseen/nll"].n == 3


def test_an_update_made_for_another_split_is_noted(
    found: Audit,
    controls: list[Candidate],
    updates: dict[str, Update],
    audit_small: Auditor,
    trained: Organism,
) -> None:
    said = "npo was made for other rows or another split"
    assert not any(note.startswith(said) for note in found.notes)  # the very request it was made for
    elsewhere = audit_small([*controls, unlearned(trained.full, updates["npo"], "By npo.")])
    assert any(note.startswith(said) for note in elsewhere.notes)


def test_without_gold_there_is_no_comparison_and_no_verdict_better_than_inconclusive(
    controls: list[Candidate], audit_small: Auditor, trained: Organism, updates: dict[str, Update]
) -> None:
    found = audit_small([controls[0], unlearned(trained.full, updates["npo"], "By NPO.")])
    for model in found.models:
        assert model.against_gold == {}
        assert model.verdict and model.verdict.outcome in ("remembered", "suppressed", "broken", "inconclusive")
    assert "kl_from_gold" not in {measure.name for measure in found.measures}


def test_a_long_set_is_listed_in_part_and_scored_whole(
    controls: list[Candidate], audit_small: Auditor, monkeypatch: pytest.MonkeyPatch, trained: Organism
) -> None:
    monkeypatch.setattr(audit_module, "EXAMPLES_PER_SET", 1)
    found = audit_small(controls[:1])
    assert [example.on for example in found.examples] == ["forget", "forget_reworded", "retain_unseen"]
    assert found.models[0].scores["forget/nll"].n == 2


def test_one_subject_is_audited_but_nothing_is_claimed(controls: list[Candidate], audit_small: Auditor) -> None:
    rows = tuple(QA(f"Who is {n}?", "baker", subject="Mira", id=str(n)) for n in range(2))
    others = tuple(QA(f"Where is {n}?", "Oslo", subject=f"s{n}", id=f"r{n}") for n in range(3))
    found = audit_small(controls, Request(rows, others[:1], others[1:2], others[2:]))
    for model in found.models:
        assert model.scores["forget/nll"].clusters == 1
        assert model.verdict and not any(
            item.passed
            for item in model.verdict.findings
            if item.statement.startswith("Asked") and model.role != "gold"
        )


# Mistakes.


@pytest.mark.parametrize(
    ("chosen", "says"),
    [
        (["gold", "sham"], "needs a model in the role 'original'"),
        ([], "needs a model in the role 'original'"),
        (["original", "original"], "two share one"),
        (["original", "gold", "other gold"], "two share one"),
        (["original", "npo", "npo"], "two audited models are called 'npo'"),
        (["original", "unlearned original"], "two audited models are called 'original'"),
    ],
)
def test_a_wrong_cast_is_refused_before_any_work(
    chosen: list[str], says: str, trained: Organism, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cast = {
        **{name: Candidate(name, name, "", trained.full) for name in ("original", "gold", "sham")},
        "other gold": Candidate("other", "gold", "", trained.gold),
        "npo": Candidate("npo", "unlearned", "", trained.full),
        "unlearned original": Candidate("original", "unlearned", "", trained.full),
    }
    monkeypatch.setattr(audit_module, "_read_all", lambda *_: pytest.fail("something was measured"))
    with pytest.raises(SpecError, match=says) as error:
        audit(trained.request, [cast[name] for name in chosen], RunFolder(tmp_path / "run"), title="", spec={})
    assert "\n" not in str(error.value)
    assert list(tmp_path.iterdir()) == []


def test_a_model_with_another_tokenizer_is_refused_before_any_work(
    controls: list[Candidate], audit_small: Auditor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(audit_module, "_read_all", lambda *_: pytest.fail("something was measured"))
    model = controls[1].model
    other = replace(model, tokenizer=word_tokenizer(["Question: who?\nAnswer: nobody"]))
    with pytest.raises(ModelError, match="other: its tokenizer is not the original's; audit models that share one"):
        audit_small([*controls[:1], Candidate("other", "unlearned", "", other)])


def test_a_model_of_broken_numbers_is_named_and_nothing_is_written(
    controls: list[Candidate], audit_small: Auditor, trained: Organism, tmp_path: Path
) -> None:
    damaged: LanguageModel = trained.full.copy("damaged")
    with torch.no_grad():
        damaged.network.get_input_embeddings().weight.fill_(math.nan)
    with pytest.raises(EvidenceError, match=r"model 'damaged', measure 'forget/answer_probability'.*is nan"):
        audit_small([*controls[:1], Candidate("damaged", "unlearned", "", damaged)])
    assert not (tmp_path / "run" / "scores.parquet").exists() and not (tmp_path / "run" / "audit.json").exists()
