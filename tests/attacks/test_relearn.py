"""Relearning: the learner is `train` taken in pieces, lessons teach nothing of what they ask, and on the organism what
was suppressed comes back faster than gold learns it."""

from dataclasses import replace

import pytest
import torch
from tests.conftest import Organism

from palimpsest.attacks.relearn import (
    LESSON,
    METRIC,
    FineTuning,
    Relearning,
    forget_set,
    related,
    relearning,
    relearning_attack,
    retain_set,
    unrelated,
)
from palimpsest.data.batches import encode
from palimpsest.data.records import QA, Passage, subject_of
from palimpsest.errors import DataError, SpecError, TrainingError
from palimpsest.metrics.likelihood import answer_probability
from palimpsest.models.language_model import LanguageModel
from palimpsest.models.training import train
from palimpsest.relearning.judgement import worst_case
from palimpsest.unlearn.request import Request

GRID = Relearning(lessons=("related",), learning_rates=(2e-3,), steps=(0, 5, 10, 20), batch_size=16)


def said(model: LanguageModel, records: object) -> float:
    return float(answer_probability(model, records).mean())  # type: ignore[arg-type]


def test_the_learner_is_train_in_pieces_and_the_model_stays(organism: Organism) -> None:
    rows = encode(organism.request.forget, organism.full.tokenizer)
    settings, before = replace(GRID.training(1e-3, 5), batch_size=4), organism.full.fingerprint()
    learner = FineTuning(organism.full, rows, {METRIC: rows}, settings)
    for budget in (0, 2, 2, 5):
        learner.fit_to(budget)
        learner.probe()  # looking disturbs nothing
    at_once = train(organism.full.copy(), rows, replace(settings, steps=5))
    assert learner.model.weights_hash() == at_once.weights_hash()
    assert learner.probe()[METRIC] == pytest.approx(said(at_once, organism.request.forget), rel=1e-5)
    assert organism.full.fingerprint() == before
    assert FineTuning(organism.full, rows, {}, settings).model.weights_hash() == organism.full.weights_hash()


def test_related_rows_are_of_other_subjects_and_drawn_by_the_seed(organism: Organism) -> None:
    request, draws = organism.request, set()
    for seed in range(6):
        lesson = related(request, seed)
        taught, asked = ({subject_of(row) for row in rows} for rows in (lesson.taught, lesson.asked))
        assert not taught & asked and {*lesson.taught, *lesson.asked} == set(request.forget)
        assert (len(taught), len(asked)) == (2, 3)
        assert related(request, seed) == lesson
        draws.add(frozenset(taught))
    assert len(draws) > 2


def test_what_the_other_lessons_teach_and_ask(organism: Organism) -> None:
    request = organism.request
    lesson = forget_set(request, 0)
    assert lesson.taught == request.forget and lesson.asked == request.forget_reworded
    bare = replace(request, forget=tuple(replace(row, paraphrases=()) for row in request.forget))  # type: ignore[arg-type]
    assert forget_set(bare, 0).asked == bare.forget
    assert (retain_set(request, 0).taught, retain_set(request, 0).asked) == (request.retain, request.forget)
    text = [Passage("It rains.")]
    assert unrelated(text, request, 0).taught == tuple(text) and unrelated(text, request, 0).asked == request.forget


def test_one_subject_or_no_question_is_refused(organism: Organism) -> None:
    request = organism.request
    one = replace(request, forget=request.forget[:2])
    with pytest.raises(DataError, match="has one subject; at least 2"):
        related(one, 0)
    passages = replace(request, forget=(Passage("a b", id="1"), Passage("b a", id="2")))
    with pytest.raises(DataError, match="no question to ask"):
        retain_set(passages, 0)


def test_the_suppressed_comes_back_faster_than_gold_learns_and_gold_passes(
    organism: Organism, suppressed: LanguageModel
) -> None:
    """The taught are other people than the asked. Gold as its own artefact is the control that nothing comes back."""
    models = {"suppressed": suppressed, "gold": organism.gold}
    asked = organism.request.forget
    assert said(models["suppressed"], asked) < said(organism.gold, asked) + 0.05 < 0.5 < said(organism.full, asked)
    before = {name: model.fingerprint() for name, model in models.items()}
    told: list[tuple[int, int, str]] = []
    found = relearning(
        models, organism.gold, organism.full, organism.request, GRID, report=lambda *step: told.append(step)
    )
    report = found["suppressed"]["related, rate 0.002"]
    assert report.verdict == "FAIL" and report.failures == 5
    assert worst_case(found["suppressed"]) == "related, rate 0.002"
    came_back, learned = (report.curve(who)[:, 1] - report.curve(who)[:, 0] for who in ("artefact", "floor"))
    assert (came_back > learned + 0.05).all()
    control = found["gold"]["related, rate 0.002"]
    assert (control.curve("artefact") == control.curve("floor")).all()
    assert control.verdict == "PASS" and control.worst and control.worst.residual
    assert control.worst.residual.value == 0
    assert report.fingerprints["suppressed"] == before["suppressed"]
    assert {name: model.fingerprint() for name, model in models.items()} == before
    assert told[-1][:2] == (30, 30)
    for who in ("artefact", "floor"):
        lesson = report.curve(who, LESSON)  # type: ignore[arg-type]
        assert (lesson[:, -1] > lesson[:, 0] + 0.2).all()


def test_a_rate_that_does_nothing_is_no_pass(organism: Organism) -> None:
    grid = replace(GRID, learning_rates=(1e-7,), steps=(0, 1))
    found = relearning({"gold": organism.gold}, organism.gold, organism.full, organism.request, grid)
    report = found["gold"]["related, rate 1e-07"]
    assert (report.verdict, report.reason) == ("INCONCLUSIVE", "weak learner")


def test_few_examples_and_unrelated_rows(organism: Organism) -> None:
    """One curve: which rows are taught follows from the seed, so a model taught twice is the same twice."""
    grid = replace(GRID, lessons=(), learning_rates=(1e-4,), steps=(0, 1), seeds=(0,), examples=1)
    rows = [QA(f"What is {n}?", "tea", id=str(n)) for n in range(4)]
    reports = [
        relearning({"m": organism.full}, organism.gold, organism.full, organism.request, grid, unrelated_rows=rows)["m"]
        for _ in range(2)
    ]
    (point, report), *_ = reports[0].items()
    assert point == "unrelated, rate 0.0001" and reports[0] == reports[1]
    assert report.reason == "few seeds"
    assert report.curve("artefact").tolist() == report.curve("ceiling").tolist()


def test_a_point_of_the_grid_is_an_attack_on_any_model(organism: Organism) -> None:
    attack = relearning_attack("related", organism.request, GRID, learning_rate=1e-3, steps=2, seed=1)
    before = organism.gold.weights_hash()
    with attack.on_model(organism.gold) as target:
        taught = related(organism.request, 1).taught
        rows = encode(taught, organism.gold.tokenizer)
        expected = train(organism.gold.copy(), rows, replace(GRID.training(1e-3, 1), steps=2))
        assert target.weights_hash() == expected.weights_hash()
    assert attack.name == "relearn_related_0.001_2" and organism.gold.weights_hash() == before


def test_a_loss_that_is_not_finite_is_said_in_one_line(organism: Organism) -> None:
    broken = organism.full.copy("broken")
    with torch.no_grad():
        broken.anatomy.final_norm.weight.fill_(float("nan"))  # type: ignore[union-attr, operator]
    learner = FineTuning(broken, encode(organism.request.forget, broken.tokenizer), {}, GRID.training(1e-3, 0))
    with pytest.raises(TrainingError, match="step 1: the loss is nan"):
        learner.fit_to(1)


@pytest.mark.parametrize(
    "changes, complaint",
    [
        ({"lessons": ("all",)}, "lesson 'all' is unknown"),
        ({"learning_rates": ()}, "learning_rates is empty"),
        ({"learning_rates": (0.0,)}, "must be above 0"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"examples": 0}, "examples is 0"),
    ],
)
def test_settings_that_make_no_sense_are_refused(changes: dict, complaint: str) -> None:  # type: ignore[type-arg]
    with pytest.raises(SpecError, match=complaint):
        Relearning(**changes)


def test_a_request_is_needed_no_more_than_its_rows(organism: Organism) -> None:
    """Lessons look at the forget and retain sets alone: what is unseen stays unseen."""
    request = organism.request
    other = Request(request.forget, request.retain, request.retain_held_out[:1], request.retain_unseen[:1])
    for lesson in (related, forget_set, retain_set):
        assert lesson(request, 3) == lesson(other, 3)
