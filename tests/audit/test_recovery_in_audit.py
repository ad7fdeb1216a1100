"""Recovery in the audit: shares against a plain computation, what is left out and why, and rows that verify."""

import json
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
from tests.conftest import Organism

from palimpsest.attacks.attack import ATTACKED, attacked
from palimpsest.attacks.quantisation import quantisation_attacks
from palimpsest.attacks.relearn import METRIC, relearning
from palimpsest.audit import prediction
from palimpsest.audit import recovery as recovery_module
from palimpsest.audit.audit import Candidate, audit
from palimpsest.audit.evidence import RunFolder
from palimpsest.audit.recovery import PLAIN, RELEARNED, TAUGHT, Recovery, breaks, shares, why_no_recovery
from palimpsest.audit.results import Audit
from palimpsest.audit.verify import verify
from palimpsest.data.records import Passage, subject_of
from palimpsest.errors import TrainingError
from palimpsest.metrics.scores import Row
from palimpsest.models.language_model import LanguageModel
from palimpsest.unlearn.request import Request


@pytest.fixture(scope="module", autouse=True)
def _few_facts_are_enough() -> Iterator[None]:
    """To say which score would have told: of 25 facts few come back, and few of them by half."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prediction, "FEWEST", 1)
        patch.setattr(prediction, "BACK", 0.1)
        yield


@pytest.fixture(scope="module")
def recovery(trained: Organism) -> Recovery:
    return Recovery(trained.request, trained.full, trained.gold)


@pytest.fixture(scope="module")
def run(trained: Organism, suppressed: LanguageModel, tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """An audit of a model that is suppressed, and of one that never knew, under gold's weights."""
    run = RunFolder(tmp_path_factory.mktemp("recovery") / "run")
    candidates = [
        Candidate("original", "original", "", trained.full),
        Candidate("gold", "gold", "", trained.gold),
        Candidate("sham", "sham", "", trained.full.copy("sham")),
        Candidate("suppressed", "unlearned", "", suppressed),
        Candidate("never knew", "unlearned", "", trained.gold.copy("never knew")),
        Candidate("still says it", "unlearned", "", trained.full.copy("still says it")),
    ]
    request = replace(trained.request, retain_unseen=trained.request.retain_unseen[:6])
    audit(request, candidates, run, title="", spec={"seed": 3}, max_new_tokens=1)
    return run


@pytest.fixture(scope="module")
def found(run: RunFolder) -> Audit:
    return run.read_audit()


def test_every_number_is_recomputed_from_its_rows(run: RunFolder, found: Audit) -> None:
    verification = verify(run.path)
    assert verification.ok, verification.failures
    (said,) = [check.message for check in verification.checks if check.name == "scores of suppressed"]
    assert "attacks and 1 lessons recomputed" in said
    assert Audit.from_json(json.loads(json.dumps(found.to_json()))) == found


def test_a_changed_share_or_verdict_is_found(run: RunFolder, found: Audit) -> None:
    model = found.model("suppressed")
    assert model.recovered
    (point, report), key = next(iter(model.recovered.relearned.items())), model.recovered.worst_attack
    assert key
    lower = replace(model.recovered.shares[key], value=0.0)
    told, auc = next(iter(model.recovered.foretold.items()))
    before = (run.path / "audit.json").read_bytes()
    for changed, says in (
        (replace(model.recovered, shares={**model.recovered.shares, key: lower}), f"share brought back, {key}"),
        (replace(model.recovered, relearned={point: replace(report, verdict="PASS")}), f"relearning, {point}"),
        (replace(model.recovered, shares={}), "do not agree on which say anything"),
        (replace(model.recovered, foretold={told: replace(auc, value=0.1)}), "what would have told: audit.json has"),
        (replace(model.recovered, foretold={}), "what would have told: audit.json has"),
    ):
        models = tuple(replace(each, recovered=changed) if each == model else each for each in found.models)
        (run.path / "audit.json").write_text(json.dumps(replace(found, models=models).to_json()))
        messages = [check.message for check in verify(run.path).failures if check.name.startswith("scores of")]
        assert any(message.startswith(says) or says in message for message in messages), messages
    (run.path / "audit.json").write_bytes(before)
    assert verify(run.path).ok


def test_rows_are_those_of_direct_calls(
    run: RunFolder, recovery: Recovery, trained: Organism, suppressed: LanguageModel
) -> None:
    rows = [row for row in run.read_scores() if row.model == "suppressed"]
    int4 = next(attack for attack in quantisation_attacks() if attack.name == "int4")
    direct = [row.value for row in attacked([int4], {"it": suppressed}, trained.request.forget)]  # type: ignore[arg-type]
    assert [row.value for row in rows if row.measure == f"{ATTACKED}/int4"] == pytest.approx(direct, abs=1e-6)
    grid = replace(recovery.grid, seeds=(0, 1))
    reports = relearning({"it": suppressed}, trained.gold, trained.full, trained.request, grid)["it"]
    (report,) = reports.values()
    rate = grid.learning_rates[0]
    for probed in report.rows:
        if probed.learner == "artefact":
            key = f"{RELEARNED}/related_{rate:g}_{probed.budget}"
            (value,) = [row.value for row in rows if (row.measure, row.item) == (key, f"seed {probed.seed}")]
            assert value == pytest.approx(probed.values[METRIC], abs=1e-5)


def test_gold_comes_through_and_who_hides_it_does_not(found: Audit) -> None:
    verdicts = {model.name: model.verdict for model in found.models if model.verdict}
    gold = found.model("gold").recovered
    assert gold and {share.value for share in gold.shares.values()} == {0.0}
    assert [report.verdict for report in gold.relearned.values()] == ["PASS"]
    assert verdicts["gold"].outcome in ("erased", "inconclusive")
    never = found.model("never knew").recovered
    assert never and gold.shares == never.shares and [r.verdict for r in never.relearned.values()] == ["PASS"]
    hidden = found.model("suppressed").recovered
    assert hidden and [report.verdict for report in hidden.relearned.values()] == ["FAIL"]
    assert verdicts["suppressed"].outcome == "suppressed"
    assert found.model("original").recovered is None
    sham, kept = found.model("sham").recovered, found.model("still says it").recovered
    assert sham and sham.not_relearned == "it unlearned nothing" and min(s.value for s in sham.shares.values()) > 0.9
    assert kept and kept.relearned == {} and kept.not_relearned == "it still says what it should have forgotten"


def test_which_score_would_have_told_is_said_of_the_unlearned_alone(found: Audit) -> None:
    told = {model.name: model.recovered.foretold for model in found.models if model.recovered}
    assert told["gold"] == told["sham"] == told["never knew"] == {}
    assert {"forget/unlearning_depth", "forget_recovery/patch_coefficients_lpr"} < set(told["suppressed"])


def test_shares_are_ratios_of_sums_with_subjects_resampled(run: RunFolder, found: Audit) -> None:
    rows = run.read_scores()
    hidden = found.model("suppressed").recovered
    assert hidden

    def column(name: str, key: str) -> np.ndarray:
        return np.array([row.value for row in rows if (row.model, row.measure) == (name, key)])

    clusters = np.array([row.cluster for row in rows if (row.model, row.measure) == ("gold", f"{ATTACKED}/nf4")])
    subjects = sorted(set(clusters))
    whole = [f"{ATTACKED}/{name}" for name in ("int8", "nf4", "noise_0.1", "pruned_0.3")]
    assert whole[0] in hidden.shares
    for key in hidden.shares.keys() & set(whole):
        above = column("suppressed", key) - column("gold", key)
        below = column("original", key) - column("gold", key)
        sums = np.array([[values[clusters == subject].sum() for subject in subjects] for values in (above, below)])
        assert hidden.shares[key].value == pytest.approx(sums[0].sum() / sums[1].sum())
        drawn = np.random.default_rng(9).integers(len(subjects), size=(20_000, len(subjects)))
        low, high = np.percentile(sums[0][drawn].sum(1) / sums[1][drawn].sum(1), [2.5, 97.5])
        assert hidden.shares[key].low == pytest.approx(low, abs=0.05)
        assert hidden.shares[key].high == pytest.approx(high, abs=0.05)


# Made-up rows.


def rows(values: dict[str, list[float]]) -> dict[str, list[Row]]:
    return {
        key: [Row("m", key, f"i{place}", f"s{place // 2}", value) for place, value in enumerate(of)]
        for key, of in values.items()
    }


def test_an_attack_that_breaks_the_original_or_hides_the_gap_says_nothing() -> None:
    high, low, middle = [0.9, 0.8, 0.9, 0.8], [0.1, 0.1, 0.2, 0.1], [0.5, 0.5, 0.5, 0.4]
    fine, broken, blurred = (f"{ATTACKED}/{name}" for name in ("fine", "broken", "blurred"))
    original = rows({PLAIN: high, fine: high, broken: [0.4, 0.4, 0.4, 0.4], blurred: high})
    gold = rows({PLAIN: low, fine: low, broken: low, blurred: [0.9, 0.8, 0.8, 0.9]})
    own = rows({PLAIN: low, fine: middle, broken: low, blurred: low})
    found = shares(own, gold, original, seed=0)
    assert list(found) == [fine] and breaks(broken, original) and not breaks(blurred, original)
    assert found[fine].value == pytest.approx((1.9 - 0.5) / (3.4 - 0.5))
    assert shares(gold, gold, original, seed=0)[fine].value == 0


def test_what_breaks_is_judged_on_the_items_that_are_asked() -> None:
    key = f"{ATTACKED}/hint"
    original = rows({PLAIN: [0.9, 0.1, 0.1, 0.1], key: [0.4]})
    assert breaks(key, original)
    assert not breaks(key, {**original, PLAIN: [replace(row, value=0.7) for row in original[PLAIN]]})


# What is missing.


def test_without_gold_or_questions_nothing_is_tried(trained: Organism) -> None:
    passages = tuple(Passage("one two", id=f"p{place}") for place in range(5))
    assert why_no_recovery(trained.request, trained.gold) == ""
    assert "without gold" in why_no_recovery(trained.request, None)
    assert "no question" in why_no_recovery(replace(trained.request, forget=passages), trained.gold)


def test_few_subjects_and_large_models_are_not_taught(
    recovery: Recovery, trained: Organism, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert recovery.why_not_relearned == ""
    subjects = sorted({subject_of(row) for row in trained.request.forget})[:3]
    rows_of_three = tuple(row for row in trained.request.forget if subject_of(row) in subjects)
    few = replace(recovery, request=replace(trained.request, forget=rows_of_three))
    assert few.why_not_relearned.endswith("at least 4; here are 3")
    assert {measure.on for measure in few.measures} == {ATTACKED}
    untaught = few.relearn({"it": trained.full})
    assert untaught.reports == {} and untaught.of("it", "unlearned")[1] == few.why_not_relearned
    monkeypatch.setattr(recovery_module, "PARAMETERS", 1000)
    assert "more than 1e-06 are not" in recovery.why_not_relearned


def test_one_model_that_breaks_while_it_is_taught_hides_no_other(
    recovery: Recovery, trained: Organism, monkeypatch: pytest.MonkeyPatch
) -> None:
    taught: list[list[str]] = []

    def teach(models: dict[str, LanguageModel], *_: object, **__: object) -> dict:
        taught.append(list(models))
        if "broken" in models:
            raise TrainingError("the loss is nan")
        return {name: {"related, rate 0.002": name} for name in models}

    monkeypatch.setattr(recovery_module, "relearning", teach)
    found = recovery.relearn({"fine": trained.full, "broken": trained.full})
    assert taught == [["fine", "broken"], ["fine"], ["broken"]]
    assert found.reports == {"fine": {"related_0.002": "fine"}} and found.failed == {"broken": "the loss is nan"}


def test_the_rate_falls_with_the_width_and_attacks_that_do_not_fit_are_left_out(
    recovery: Recovery, trained: Organism
) -> None:
    assert recovery.grid.learning_rates == (0.002,) and len(recovery.grid.seeds) == 5
    names = {measure.name for measure in recovery.measures if measure.on == ATTACKED}
    assert {"int8", "int4", "nf4", "pruned_0.5", "noise_0.1", "direction", "direction_0"} <= names
    (why,) = recovery.left_out.values()
    assert "few_shot" not in names and "few_shot" in recovery.left_out and why.endswith("a model with 64 positions")
    request: Request = replace(trained.request, retain=trained.request.retain[:2])
    assert "few_shot" not in {measure.name for measure in replace(recovery, request=request).measures}
    sets = {measure.on for measure in recovery.measures}
    assert sets == {ATTACKED, RELEARNED, TAUGHT}
