"""The study of language rewards judged on curves that were made up."""

from typing import Any

import pytest

from palimpsest.relearning.judgement import ProbeRow, RelearnSettings, judge
from palimpsest.rewards.language import LearnedLanguageReward
from palimpsest.studies import reward_relearning_language as study
from palimpsest.studies.claims import Claim

SEEDS, BUDGETS = (0, 1, 2, 3, 4), (25, 50)
NO_REWARD: Any = None  # what was shown for it is all that is judged


def measured(returns: float, accuracy: float, best_of: float) -> study.Measured:
    """Floor 1, ceiling 11, and an artefact's learner that gets so much, give or take a little a seed."""
    curves = {"artefact": returns, "floor": 1.0, "ceiling": 11.0}
    rows = [
        ProbeRow(who, seed, budget, {"gold": value + seed / 100})  # type: ignore[arg-type]
        for who, value in curves.items()
        for seed in SEEDS
        for budget in BUDGETS
    ]
    settings = RelearnSettings(budgets=BUDGETS, seeds=SEEDS, metric="gold", want="return", margin=study.MARGIN)
    learned = {
        seed: LearnedLanguageReward(NO_REWARD, accuracy + seed / 1000, 0.7, best_of + seed / 10) for seed in SEEDS
    }
    return study.Measured(judge(settings, rows), learned)


def claims(narrow: study.Measured, wide: study.Measured) -> dict[str, Claim]:
    return {claim.id: claim for claim in study.judge({"narrow": narrow, "wide": wide})}


def test_the_ranking_that_accuracy_gives_and_relearning_does_not() -> None:
    found = claims(measured(2.0, 0.95, 10.0), measured(10.0, 0.8, 9.0))
    assert {name: claim.verdict for name, claim in found.items()} == {
        "l1/accuracy": "reproduced",
        "l1/best-of": "reproduced",
        "l2/relearning": "reproduced",
        "l3/narrow": "reproduced",
        "l3/wide": "reproduced",
        "l4/off-distribution": "inconclusive",
    }
    assert found["l2/relearning"].estimate == pytest.approx(0.8)
    assert found["l3/narrow"].estimate == pytest.approx(0.9)
    assert found["l3/narrow"].note.startswith("FAIL: ") and found["l3/wide"].note.startswith("PASS: ")
    assert "after 50: 2.0 between 1.0 and 11.0" in found["l3/narrow"].note


def test_the_other_way_round_every_claim_is_contradicted() -> None:
    found = claims(measured(10.0, 0.8, 9.0), measured(2.0, 0.95, 10.0))
    assert {claim.verdict for name, claim in found.items() if name != "l4/off-distribution"} == {"contradicted"}
