"""The battery: every measure of every item, with the very numbers that the metrics give when asked directly."""

from collections import Counter
from dataclasses import replace

import pytest
import torch
from tests.conftest import Organism

from palimpsest.audit import battery as battery_module
from palimpsest.audit.battery import Battery, Reading
from palimpsest.data.records import QA, Choice, Passage
from palimpsest.metrics.divergence import kl_per_item
from palimpsest.metrics.generation import generate_answers
from palimpsest.metrics.likelihood import answer_nll, answer_probability, answer_scores
from palimpsest.metrics.multiple_choice import multiple_choice
from palimpsest.metrics.rouge import rouge
from palimpsest.metrics.tofu import TofuSets, utility_scores
from palimpsest.metrics.truth_ratio import truth_ratio
from palimpsest.models.language_model import LanguageModel
from palimpsest.unlearn.request import Request

TOKENS = 4
EVERYTHING = {
    "forget": "answer_probability exact_match exact_memorization extraction_strength "
    "nll rougeL_recall rougeL_f1 truth_ratio kl_from_gold",
    "forget_reworded": "answer_probability exact_match nll rougeL_recall",
    "retain_unseen": "answer_probability exact_match rougeL_recall nll kl_from_original",
}
ALL_KEYS = [f"{on}/{name}" for on, names in EVERYTHING.items() for name in names.split()]


def short(request: Request, n: int = 7) -> Request:
    """The same request with few rows, so that it is read in no time."""
    return replace(request, forget=request.forget[:n], retain_unseen=request.retain_unseen[: n + 2])


@pytest.fixture(scope="module")
def battery(trained: Organism) -> Battery:
    return Battery(short(trained.request), trained.full, trained.gold, TOKENS)


@pytest.fixture(scope="module")
def reading(battery: Battery) -> Reading:
    """Gold's: it differs from the original everywhere."""
    assert battery.gold is not None
    return battery.read("gold", battery.gold, lambda: None)


def values(reading: Reading, key: str) -> list[float]:
    return [row.value for row in reading.rows if row.measure == key]


def read(battery: Battery, model: LanguageModel) -> dict[str, list[float]]:
    reading = battery.read("model", model, lambda: None)
    return {key: values(reading, key) for key in {row.measure: 0 for row in reading.rows}}


def test_every_measure_has_a_row_for_every_item_in_order(battery: Battery, reading: Reading) -> None:
    assert [measure.key for measure in battery.measures] == ALL_KEYS
    expected = [
        ("gold", measure.key, record.id, record.subject)
        for measure in battery.measures
        for record in battery.sets[measure.on]
    ]
    assert [(row.model, row.measure, row.item, row.cluster) for row in reading.rows] == expected
    assert len(expected) == 9 * 7 + 4 * 7 + 5 * 9


def test_rewordings_keep_the_id_of_their_fact_however_many_there_are(trained: Organism) -> None:
    first, *others = trained.request.forget[:3]
    twice = replace(first, paraphrases=(*first.paraphrases, f"Tell me: {first.question}"))
    request = replace(short(trained.request), forget=(twice, *others))
    reading = Battery(request, trained.full, None, TOKENS).read("full", trained.full, lambda: None)
    items = Counter(row.item for row in reading.rows if row.measure == "forget_reworded/nll")
    assert items == {first.id: 2, others[0].id: 1, others[1].id: 1}
    assert len(values(reading, "forget/nll")) == 3


def test_values_are_those_of_the_metrics(battery: Battery, reading: Reading) -> None:
    gold, original = battery.gold, battery.original
    assert gold is not None
    for on, records in battery.sets.items():
        scores = answer_scores(gold, records, batch_size=3)
        said = generate_answers(gold, records, max_new_tokens=TOKENS)
        overlap = rouge(said, [record.answer for record in records])
        direct = {
            "answer_probability": answer_probability(gold, records),
            "exact_match": scores.teacher_forced_exact_match,
            "exact_memorization": scores.exact_memorization,
            "extraction_strength": scores.extraction_strength,
            "nll": answer_nll(gold, records),
            "rougeL_recall": overlap.rougeL_recall,
            "rougeL_f1": overlap.rougeL_f1,
        }
        for name in set(direct) & set(EVERYTHING[on].split()):
            assert values(reading, f"{on}/{name}") == pytest.approx(direct[name].tolist(), abs=1e-5), (on, name)
        assert reading.said[on] == said
        assert reading.probability[on] == values(reading, f"{on}/answer_probability")
        assert reading.nll[on] == values(reading, f"{on}/nll")
    ratios = truth_ratio(gold, battery.request.forget)
    assert values(reading, "forget/truth_ratio") == pytest.approx([min(r, 1 / r) for r in ratios.tolist()])
    unseen = battery.request.retain_unseen
    moved = kl_per_item(original, gold, unseen).tolist()
    assert values(reading, "retain_unseen/kl_from_original") == pytest.approx(moved, abs=1e-6)
    assert min(moved) > 0


def test_a_model_is_at_no_distance_from_itself(battery: Battery, reading: Reading) -> None:
    assert values(reading, "forget/kl_from_gold") == [0.0] * 7
    own = read(battery, battery.original)
    assert own["retain_unseen/kl_from_original"] == [0.0] * 9
    assert battery.gold is not None
    from_gold = kl_per_item(battery.gold, battery.original, battery.request.forget).tolist()
    assert own["forget/kl_from_gold"] == pytest.approx(from_gold, abs=1e-6) and min(from_gold) > 0


def test_the_organism_knows_and_gold_does_not(battery: Battery, reading: Reading) -> None:
    original = read(battery, battery.original)
    knows, does_not = original["forget/answer_probability"], values(reading, "forget/answer_probability")
    assert sum(knows) / len(knows) > 0.8 and sum(does_not) / len(does_not) < 0.5
    assert original["forget/rougeL_recall"] == original["forget/exact_match"]  # answers of one word


def test_the_size_of_batches_changes_no_number(
    battery: Battery, reading: Reading, monkeypatch: pytest.MonkeyPatch
) -> None:
    def one_at_a_time(name: str) -> None:
        whole = getattr(battery_module, name)
        monkeypatch.setattr(battery_module, name, lambda *given, **named: whole(*given, **named, batch_size=1))

    for name in ("answer_scores", "generate_answers", "truth_ratio", "kl_per_item"):
        one_at_a_time(name)
    assert battery.gold is not None
    alone = battery.read("gold", battery.gold, lambda: None)
    assert alone.said == reading.said
    assert [row.value for row in alone.rows] == pytest.approx([row.value for row in reading.rows], abs=2e-5)


def test_the_progress_is_told_as_often_as_was_announced(battery: Battery) -> None:
    ticks: list[None] = []
    battery.read("original", battery.original, lambda: ticks.append(None))
    assert len(ticks) == battery.steps == 7


def test_reading_leaves_a_model_as_it_was(battery: Battery) -> None:
    before = battery.original.fingerprint()
    battery.original.network.train()
    battery.read("original", battery.original, lambda: None)
    assert battery.original.network.training
    battery.original.network.eval()
    assert battery.original.fingerprint() == before


def without(request: Request, **emptied: tuple[str, ...]) -> Request:
    """The request with fields of its first forget row emptied."""
    return replace(request, forget=(replace(request.forget[0], **emptied), *request.forget[1:]))  # type: ignore[arg-type]


def keys(request: Request, trained: Organism, gold: bool = True) -> list[str]:
    battery = Battery(request, trained.full, trained.gold if gold else None, TOKENS)
    reading = battery.read("full", trained.full, lambda: None)
    assert list(dict.fromkeys(row.measure for row in reading.rows)) == [measure.key for measure in battery.measures]
    return [measure.key for measure in battery.measures]


def test_one_row_without_wrong_answers_is_enough_to_leave_the_truth_ratio_out(trained: Organism) -> None:
    left = [key for key in ALL_KEYS if key != "forget/truth_ratio"]
    assert keys(without(short(trained.request), wrong=()), trained) == left


def test_without_gold_nothing_is_measured_from_gold(trained: Organism) -> None:
    assert keys(short(trained.request), trained, gold=False) == [key for key in ALL_KEYS if "kl_from_gold" not in key]


PASSAGES = tuple(Passage(f"{text} is a baker.", id=f"p{place}") for place, text in enumerate(("Anna", "Ben", "Cyd")))


def test_of_passages_the_likelihood_is_measured_and_nothing_that_needs_a_question(trained: Organism) -> None:
    request = replace(short(trained.request), forget=PASSAGES)
    battery = Battery(request, trained.full, trained.gold, TOKENS)
    assert keys(request, trained) == [
        *(f"forget/{name}" for name in ("answer_probability", "nll", "kl_from_gold")),
        *(key for key in ALL_KEYS if key.startswith("retain_unseen")),
    ]
    reading = battery.read("gold", trained.gold, lambda: None)
    assert values(reading, "forget/nll") == pytest.approx(answer_nll(trained.gold, PASSAGES).tolist(), abs=1e-6)
    assert list(reading.said) == ["retain_unseen"]
    definitions = {measure.key: measure.definition.split(":")[0] for measure in battery.measures}
    assert definitions["forget/nll"] == "nll@passage" and definitions["retain_unseen/nll"] == "nll@answer"


def test_one_passage_among_questions_leaves_out_what_not_every_row_has(trained: Organism) -> None:
    request = short(trained.request)
    mixed = replace(request, retain_unseen=(*request.retain_unseen, PASSAGES[0]))
    left = [key for key in keys(mixed, trained) if key.startswith("retain_unseen")]
    assert left == [f"retain_unseen/{name}" for name in ("answer_probability", "nll", "kl_from_original")]
    mixed = replace(request, forget=(*request.forget, PASSAGES[0]))
    assert "forget/truth_ratio" not in keys(mixed, trained) and "forget_reworded/nll" in keys(mixed, trained)


def test_choices_have_sets_of_their_own_and_each_is_a_unit(trained: Organism) -> None:
    choices = tuple(Choice(f"q{place}", ("a", "b"), place % 2, "biology", f"c{place}") for place in range(4))
    request = replace(short(trained.request), choices=choices, utility=choices[:3])
    ticks: list[None] = []
    battery = Battery(request, trained.full, None, TOKENS)
    reading = battery.read("full", trained.full, lambda: ticks.append(None))
    assert len(ticks) == battery.steps
    found = multiple_choice(trained.full, choices)
    assert values(reading, "forget_choices/accuracy") == found.correct.tolist()
    assert values(reading, "utility_choices/choice_probability") == pytest.approx(found.probability[:3].tolist())
    clusters = [row.cluster for row in reading.rows if row.measure == "forget_choices/accuracy"]
    assert clusters == ["c0", "c1", "c2", "c3"]
    assert reading.said["forget_choices"] == [choices[i].choices[k] for i, k in enumerate(found.chosen.tolist())]


def test_the_fact_itself_is_scored_where_every_row_marks_it(trained: Organism) -> None:
    request = short(trained.request)
    marked = tuple(replace(row, entity_span=(0, len(row.answer))) for row in request.forget)
    battery = Battery(replace(request, forget=marked), trained.full, None, TOKENS)
    of_fact = read(battery, trained.gold)
    assert of_fact["forget/entity_probability"] == pytest.approx(of_fact["forget/answer_probability"])
    one_less = Battery(replace(request, forget=(request.forget[0], *marked[1:])), trained.full, None, TOKENS)
    assert "forget/entity_probability" not in read(one_less, trained.gold)


def test_tofus_metrics_come_with_its_sets(trained: Organism) -> None:
    rows = tuple(replace(row, wrong=row.wrong[:2]) for row in trained.request.retain[:3])
    ticks: list[None] = []
    for gold in (trained.gold, None):
        battery = Battery(short(trained.request), trained.full, gold, TOKENS, TofuSets(rows, rows[:2], rows[1:]))
        reading = battery.read("full", trained.full, lambda: ticks.append(None))
        assert len(ticks) == battery.steps
        ticks.clear()
        whole = {row.measure: (row.item, row.cluster) for row in reading.rows if row.measure.startswith("tofu/")}
        expected = ["tofu/model_utility", "tofu/forget_quality"][: 2 if gold else 1]
        assert whole == dict.fromkeys(expected, ("all", "all"))
        offered = utility_scores(trained.full, rows[:2], offered=True, max_new_tokens=TOKENS)
        assert values(reading, "tofu_real_authors/utility_probability") == pytest.approx(offered.probability.tolist())


def test_without_rewordings_there_is_no_such_set(trained: Organism) -> None:
    request = short(trained.request)
    plain = replace(request, forget=tuple(replace(row, paraphrases=()) for row in request.forget))
    assert keys(plain, trained) == [key for key in ALL_KEYS if "reworded" not in key]


def test_the_truth_ratios_definition_says_where_the_answer_stood_in_for_its_paraphrase(trained: Organism) -> None:
    request = short(trained.request)

    def definition(request: Request) -> str:
        battery = Battery(request, trained.full, trained.gold)
        return next(measure.definition for measure in battery.measures if measure.name == "truth_ratio")

    assert definition(request) == "truth_ratio@tofu_paper+answer"
    worded = tuple(replace(row, paraphrased_answer=f"It is {row.answer}") for row in request.forget)
    assert definition(replace(request, forget=worded)) == "truth_ratio@tofu_paper"


def test_rows_without_a_subject_are_clusters_of_their_own(trained: Organism) -> None:
    request = short(trained.request)
    named = tuple(replace(row, subject=None) for row in request.forget)
    nameless = tuple(QA(row.question, row.answer) for row in request.retain_unseen)
    request = replace(request, forget=named, retain_unseen=nameless)
    rows = Battery(request, trained.full, None, TOKENS).read("full", trained.full, lambda: None).rows
    clusters = {on: [row.cluster for row in rows if row.measure == f"{on}/nll"] for on in ("forget", "retain_unseen")}
    assert clusters["forget"] == [row.id for row in named]
    assert len(set(clusters["retain_unseen"])) == len({row.question for row in nameless})


def test_the_measures_explain_themselves(battery: Battery) -> None:
    for measure in battery.measures:
        assert measure.definition.split("@")[0].rstrip("+answer") and "@" in measure.definition
        assert measure.label and measure.explanation.endswith(".") and measure.unit
    better = {measure.key: measure.better for measure in battery.measures}
    assert better["retain_unseen/nll"] == better["retain_unseen/kl_from_original"] == "lower"
    assert better["forget/nll"] == "toward gold" and better["retain_unseen/exact_match"] == "higher"


def test_values_are_finite_numbers(reading: Reading) -> None:
    assert torch.isfinite(torch.tensor([row.value for row in reading.rows])).all()
