"""Policies in small environments of known truth: rewards in place, early ends, drift, and learners too weak to tell."""

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from palimpsest.errors import SpecError
from palimpsest.relearning.protocol import relearn

os.environ.setdefault("MUJOCO_GL", "disable")
gymnasium = pytest.importorskip("gymnasium", reason="gymnasium is not installed (palimpsest[rl])")
pytest.importorskip("stable_baselines3", reason="stable-baselines3 is not installed (palimpsest[rl])")

from palimpsest.rewards.control import (  # noqa: E402
    SETTINGS,
    ControlSettings,
    LearnedReward,
    control_spec,
    fresh_policy,
    learn_reward,
)
from palimpsest.rewards.control_environments import (  # noqa: E402
    FrozenRewardVecEnv,
    horizon,
    make_environments,
    play,
)
from palimpsest.rewards.control_learner import METRIC, PROXY, PolicyLearner, PPOSettings  # noqa: E402
from palimpsest.rewards.control_rewards import (  # noqa: E402
    ConstantReward,
    Floats,
    NetworkSettings,
)

LINE, ENDS_EARLY, HORIZON = "PalimpsestLine-v0", "PalimpsestLineThatEnds-v0", 5


class Line(gymnasium.Env):  # type: ignore[misc]
    """A point that is pushed along a line for five steps; it is worth minus its distance from 0 after each."""

    def __init__(self, ends: bool = False) -> None:
        self.ends = ends
        self.observation_space = gymnasium.spaces.Box(-10, 10, (2,), np.float32)
        self.action_space = gymnasium.spaces.Box(-1, 1, (1,), np.float32)
        self.place = 0.0

    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        super().reset(seed=seed)
        self.place, self.steps = float(self.np_random.uniform(-2, 2)), 0
        return self._seen(), {}

    def step(self, action: Any) -> Any:
        self.place += float(action[0])
        self.steps += 1
        return self._seen(), -abs(self.place), self.ends and self.steps == 3, False, {}

    def _seen(self) -> Any:
        return np.array([self.place, 1.0], np.float32)


for name, ends in ((LINE, False), (ENDS_EARLY, True)):
    gymnasium.register(name, entry_point=Line, max_episode_steps=HORIZON, kwargs={"ends": ends})
gymnasium.register("PalimpsestLineForever-v0", entry_point=Line)

SMALL = ControlSettings(
    environment=LINE,
    sampler_steps=256,
    rounds=2,
    comparisons=40,
    fragment=3,
    reward_steps=20,
    network=NetworkSettings(width=8),
    ppo=PPOSettings(environments=4, rollout=8, batch_size=32, epochs=4, evaluated=4, learning_rate=3e-3),
)


class Distance:
    """The line's true reward as a reward of transitions: exact only if the arrival is the true one."""

    def __call__(self, observations: Floats, actions: Floats, next_observations: Floats) -> Floats:
        np.testing.assert_allclose(next_observations[:, 0], observations[:, 0] + actions[:, 0], atol=1e-5)
        return -np.abs(next_observations[:, 0])

    def fingerprint(self) -> str:
        return "distance"


class Drifting(Distance):
    """A reward that is never the same again after it was asked."""

    asked = 0

    def __call__(self, observations: Floats, actions: Floats, next_observations: Floats) -> Floats:
        self.asked += 1
        return super().__call__(observations, actions, next_observations)

    def fingerprint(self) -> str:
        return f"asked {self.asked} times"


def learned(reward: Any, sampler_return: float = -1.0) -> LearnedReward:
    return LearnedReward(reward, sampler_return, 0.0, 1.0)


def test_the_reward_in_place_is_of_the_transition_that_was_made_also_where_episodes_end() -> None:
    environments = FrozenRewardVecEnv(make_environments(LINE, 3), Distance())
    environments.seed(0)
    environments.reset()
    rng, ended = np.random.default_rng(0), 0
    for _ in range(3 * HORIZON + 2):
        _, rewards, done, infos = environments.step(rng.uniform(-1, 1, (3, 1)).astype(np.float32))
        np.testing.assert_allclose(rewards, [info["true_reward"] for info in infos], atol=1e-6)
        ended += int(done.sum())
    assert ended == 9


def test_another_reward_hides_the_true_one_and_none_leaves_it() -> None:
    actions = np.zeros((3, 1), np.float32)
    seen = {}
    for reward in (ConstantReward(), None):
        environments = FrozenRewardVecEnv(make_environments(LINE, 3), reward)
        environments.seed(0)
        environments.reset()
        _, rewards, _, infos = environments.step(actions)
        seen[reward is None] = rewards.tolist(), [info["true_reward"] for info in infos]
    assert seen[False][0] == [0.0] * 3 and seen[False][1] == seen[True][1] == seen[True][0]
    assert min(seen[True][0]) < 0


def test_episodes_are_whole_and_follow_from_the_seed() -> None:
    environments = make_environments(LINE, 4)
    first, again, other = (play(environments, lambda seen: -seen[:, :1].clip(-1, 1), seed) for seed in (3, 3, 50))
    assert horizon(environments) == HORIZON and first.transitions.shape == (4, HORIZON, 5)
    assert np.array_equal(first.transitions, again.transitions)
    assert not np.array_equal(first.transitions, other.transitions)
    np.testing.assert_allclose(first.rewards, -np.abs(first.transitions[..., 3]), atol=1e-6)
    assert np.array_equal(first.transitions[:, 1:, :2], first.transitions[:, :-1, 3:])
    assert first.mean_return == pytest.approx(first.rewards.sum() / 4)


def test_an_environment_that_ends_early_is_refused_with_the_reason() -> None:
    reason = r"PalimpsestLineThatEnds-v0: an episode ended before its horizon.*termination leaks the reward"
    with pytest.raises(SpecError, match=reason):
        learn_reward(replace(SMALL, environment=ENDS_EARLY), 0)
    learner = PolicyLearner(ENDS_EARLY, SMALL.ppo, None, 0)
    with pytest.raises(SpecError, match=reason):
        learner.fit_to(SMALL.ppo.steps)
    with pytest.raises(SpecError, match="no fixed horizon"):
        make_environments("PalimpsestLineForever-v0", 1)


@pytest.mark.parametrize(
    ("name", "message"), [("NoSuch-v0", "gymnasium cannot make it"), ("CartPole-v1", "its actions are Discrete")]
)
def test_an_environment_that_cannot_serve_is_refused(name: str, message: str) -> None:
    with pytest.raises(SpecError, match=message):
        make_environments(name, 1)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"sampler_steps": 250}, "multiple of 128"),
        ({"rounds": 3}, "parted for its rounds"),
        ({"comparisons": 1}, "comparisons as rounds"),
    ],
)
def test_settings_that_do_not_fit_are_refused(changed: dict[str, int], message: str) -> None:
    with pytest.raises(SpecError, match=message):
        replace(SMALL, **changed)


def test_a_budget_between_two_updates_is_refused() -> None:
    with pytest.raises(SpecError, match="40 steps are no multiple of the 32"):
        fresh_policy(SMALL, None, 0).fit_to(40)


def test_learning_is_the_same_in_one_stretch_or_several_and_whatever_else_draws() -> None:
    straight, stretches = (fresh_policy(SMALL, Distance(), 1) for _ in range(2))
    straight.fit_to(96)
    for budget in (32, 64, 96):
        stretches.fit_to(budget)
        stretches.probe()
        stretches.compared(0)
        np.random.random()
    assert straight.probe() == stretches.probe()
    assert straight.probe() != fresh_policy(SMALL, Distance(), 1).probe()


def test_the_true_reward_in_place_teaches_what_the_true_one_does() -> None:
    """Nothing but the reward differs between learners of a seed, and the proxy is its own return."""
    probes = []
    for reward in (Distance(), None):
        learner = fresh_policy(SMALL, reward, 2)
        learner.fit_to(64)
        probes.append(learner.probe())
    assert probes[0][METRIC] == pytest.approx(probes[1][METRIC], rel=1e-3)
    assert probes[0][PROXY] == pytest.approx(probes[0][METRIC], rel=1e-4)
    assert fresh_policy(SMALL, ConstantReward(), 2).probe()[PROXY] == 0.0


def test_a_reward_learned_from_comparisons_is_frozen_and_follows_from_the_seed() -> None:
    settings = replace(SMALL, reward_steps=100, network=NetworkSettings(width=8, learning_rate=0.01))
    first, again, other = (learn_reward(settings, seed) for seed in (0, 0, 1))
    assert first.reward.fingerprint() == again.reward.fingerprint() != other.reward.fingerprint()
    assert (first.sampler_return, first.sampler_proxy) == (again.sampler_return, again.sampler_proxy)
    assert 0.6 < first.accuracy <= 1


def test_the_true_reward_passes_and_its_opposite_fails() -> None:
    """Five seeds on the line, whose ceiling is far above its floor."""

    class Opposite(Distance):
        def __call__(self, observations: Floats, actions: Floats, next_observations: Floats) -> Floats:
            return -super().__call__(observations, actions, next_observations)

    settings = replace(SMALL, sampler_steps=512)
    reports = [
        relearn(control_spec(settings, {seed: learned(reward) for seed in range(5)}))
        for reward in (Distance(), Opposite())
    ]
    assert [report.verdict for report in reports] == ["PASS", "FAIL"], [report.summary for report in reports]
    assert reports[1].failures == 5


def test_a_reward_that_drifts_has_no_verdict() -> None:
    rewards = {seed: learned(Drifting() if seed == 1 else Distance()) for seed in range(5)}
    spec = control_spec(replace(SMALL, sampler_steps=128), rewards)
    report = relearn(spec)
    assert (report.verdict, report.reason) == ("INCONCLUSIVE", "changed")
    assert "the reward of seed 1 changed" in report.summary and "seed 0" not in report.summary


def test_a_learner_that_learns_nothing_has_no_verdict() -> None:
    crippled = replace(SMALL, sampler_steps=128, ppo=replace(SMALL.ppo, learning_rate=1e-12))
    report = relearn(control_spec(crippled, {seed: learned(Distance()) for seed in range(5)}))
    assert (report.verdict, report.reason) == ("INCONCLUSIVE", "weak learner")


def test_pendulums_true_reward_matches_its_formula_across_resets() -> None:
    """An environment that others wrote: -(angle^2 + 0.1 speed^2 + 0.001 torque^2) of the state before the step."""

    class Pendulum:
        def __call__(self, observations: Floats, actions: Floats, next_observations: Floats) -> Floats:
            angle = np.arctan2(observations[:, 1], observations[:, 0])
            rewards: Floats = -(angle**2 + 0.1 * observations[:, 2] ** 2 + 0.001 * actions[:, 0] ** 2)
            return rewards

        def fingerprint(self) -> str:
            return "pendulum"

    environments = FrozenRewardVecEnv(make_environments("Pendulum-v1", 2), Pendulum())
    environments.seed(0)
    environments.reset()
    rng = np.random.default_rng(0)
    for _ in range(450):
        _, rewards, _, infos = environments.step(rng.uniform(-2, 2, (2, 1)).astype(np.float32))
        np.testing.assert_allclose(rewards, [info["true_reward"] for info in infos], atol=1e-4)


def test_every_setting_can_be_parted_into_rollouts() -> None:
    assert {name: settings.budgets[2] for name, settings in SETTINGS.items()} == {
        "reacher": 81_920,
        "pendulum": 163_840,
        "half_cheetah": 32_768_000,
    }


@pytest.mark.slow
def test_reacher_end_to_end_has_a_verdict(tmp_path: Path) -> None:
    """Five preference loops and fifteen learners. How far seeds agree is not known, so the verdict itself is open."""
    pytest.importorskip("mujoco", reason="mujoco is not installed (palimpsest[rl])")
    from palimpsest.studies.reward_relearning_control import ALONE, measure

    found = measure(SETTINGS["reacher"], ALONE, range(5), tmp_path)
    assert found.report.reason in ("", "undecided"), found.report.summary
    assert found.report.points[-1].rho is not None  # the learner is strong enough to tell
    again = measure(SETTINGS["reacher"], ALONE, range(5), tmp_path)
    assert again.report == found.report  # played back from the folder
