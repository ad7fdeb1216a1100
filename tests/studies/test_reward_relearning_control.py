"""The study of control rewards judged on curves that were made up."""

from typing import Any

import pytest

from palimpsest.relearning.judgement import ProbeRow, RelearnSettings, judge

pytest.importorskip("gymnasium", reason="gymnasium is not installed (palimpsest[rl])")
pytest.importorskip("stable_baselines3", reason="stable-baselines3 is not installed (palimpsest[rl])")

from palimpsest.rewards.control import LearnedReward
from palimpsest.studies import reward_relearning_control as study

SEEDS, BUDGETS = (0, 1, 2, 3, 4), (1, 4, 16)
NO_REWARD: Any = None  # what was shown for it is all that is judged


def measured(returns: tuple[float, float, float], proxy: float = 60.0) -> study.Measured:
    """Floor -20, ceiling -10; the sampler has -12, and 40 by its reward."""
    curves = {"artefact": returns, "floor": (-20.0,) * 3, "ceiling": (-10.0,) * 3}
    rows = [
        ProbeRow(who, seed, budget, {"return": value + seed / 100, "proxy": proxy + seed})  # type: ignore[arg-type]
        for who, values in curves.items()
        for seed in SEEDS
        for budget, value in zip(BUDGETS, values, strict=True)
    ]
    settings = RelearnSettings(budgets=BUDGETS, seeds=SEEDS, metric="return", want="return", margin=study.MARGIN)
    learned = {seed: LearnedReward(NO_REWARD, -12.0 + seed / 100, 40.0, 0.8) for seed in SEEDS}
    return study.Measured(judge(settings, rows), learned)


def test_a_reward_that_misleads_for_longer_is_told_from_one_that_holds() -> None:
    found = {
        claim.id: claim
        for claim in study.judge(
            {study.ALONE: measured((-11.0, -13.0, -19.0)), study.PESSIMISTIC: measured((-11.0, -11.0, -10.5), 30.0)}
        )
    }
    verdicts = {name: claim.verdict for name, claim in found.items()}
    assert verdicts["c1/alone/sampler"] == "reproduced"
    assert found["c1/alone/sampler"].estimate == pytest.approx(0.8, abs=0.01)
    assert [verdicts[f"c2/alone/{times}"] for times in study.TIMES] == ["contradicted", "reproduced", "reproduced"]
    assert [found[f"c2/alone/{times}"].estimate for times in study.TIMES] == pytest.approx([0.1, 0.3, 0.9])
    assert verdicts["c3/alone/proxy"] == "reproduced" and verdicts["c3/pessimistic/proxy"] == "contradicted"
    assert found["c3/alone/longer"].estimate == pytest.approx(-0.6)
    assert verdicts["c3/alone/longer"] == "reproduced" and verdicts["c3/pessimistic/longer"] == "contradicted"
    assert verdicts["c4/design"] == "reproduced" and found["c4/design"].estimate == pytest.approx(0.85)
    assert "FAIL: after 16" in found[f"c2/alone/{study.TIMES[-1]}"].note


def test_one_design_alone_has_no_claim_of_designs() -> None:
    assert "c4/design" not in {claim.id for claim in study.judge({study.ALONE: measured((-11.0, -11.0, -11.0))})}
