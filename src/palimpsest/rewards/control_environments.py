"""Environments of gymnasium with another reward in place of the true one, and episodes played in them.

Only fixed horizons are evidence: where an episode can end early, its length tells a learner the sign of the true reward
whatever the learned one says (Freire et al. 2020, arXiv 2012.01365). Needs gymnasium and stable-baselines3.

Shapes: E environments side by side, H steps of an episode.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from palimpsest.errors import SpecError
from palimpsest.rewards.control_rewards import Floats, TransitionReward, features

try:
    import gymnasium  # type: ignore[import-not-found,import-untyped]
    from stable_baselines3.common.vec_env import (  # type: ignore[import-not-found,import-untyped]
        DummyVecEnv,
        VecEnv,
        VecEnvWrapper,
    )
except ImportError as error:
    raise SpecError(f"continuous control needs {error.name}; pip install 'palimpsest[rl]'") from None


def make_environments(name: str, number: int) -> VecEnv:
    """So many environments of gymnasium's name, e.g. Pendulum-v1, stepped together.

    Raises:
        SpecError: an unknown name, a package that it needs, no horizon, or observations or actions that are not boxes.
    """
    try:
        environments = DummyVecEnv([lambda: gymnasium.make(name)] * number)
    except (gymnasium.error.Error, ImportError) as error:
        raise SpecError(f"{name}: gymnasium cannot make it ({' '.join(str(error).split())})") from None
    if horizon(environments) is None:
        raise SpecError(f"{name}: it has no fixed horizon; give one that ends after max_episode_steps")
    for what, space in (
        ("observations", environments.observation_space),
        ("actions", environments.action_space),
    ):
        if not isinstance(space, gymnasium.spaces.Box) or len(space.shape) != 1:
            raise SpecError(f"{name}: its {what} are {space}; continuous control needs a vector of numbers (a Box)")
    return environments


def horizon(environments: VecEnv) -> Any:
    """H, after which every episode is cut off; None where nothing says so."""
    return environments.get_attr("spec")[0].max_episode_steps


class FrozenRewardVecEnv(VecEnvWrapper):
    """Gives a reward of transitions in place of the true one, which is kept in each info as `true_reward`.

    The observation that an episode ended in is taken from its info, since what is returned is the next one's first.
    """

    def __init__(self, environments: VecEnv, reward: TransitionReward | None) -> None:
        """`reward` may be exchanged later; None leaves the true one."""
        super().__init__(environments)
        self.reward = reward
        self.observations: Any = None
        self.actions: Any = None

    def reset(self) -> Any:
        """[E, ...] the first observations."""
        self.observations = self.venv.reset()
        return self.observations

    def step_async(self, actions: Any) -> None:
        """Begin a step with actions [E, ...]."""
        self.actions = actions
        self.venv.step_async(actions)

    def step_wait(self) -> Any:
        """Next observations, rewards, whether episodes ended, and infos.

        Raises:
            SpecError: an episode ended before it was cut off.
        """
        following, true_rewards, done, infos = self.venv.step_wait()
        arrived = _arrived(self.venv, following, done, infos)
        for info, true_reward in zip(infos, true_rewards, strict=True):
            info["true_reward"] = float(true_reward)
        rewards = self.reward(self.observations, self.actions, arrived) if self.reward else true_rewards
        self.observations = following
        return following, rewards, done, infos


@dataclass(frozen=True)
class Episodes:
    """Whole episodes, and what they were truly worth."""

    transitions: Floats
    """[E, H, F] observation, action and next observation, side by side."""
    rewards: Floats
    """[E, H] the true ones."""

    @property
    def mean_return(self) -> float:
        """The mean over episodes of the sum of true rewards."""
        return float(self.rewards.sum(1, dtype=np.float64).mean())


def play(environments: VecEnv, act: Callable[[Any], Any], seed: int) -> Episodes:
    """One episode in each of the environments, whose reward must be the true one.

    Args:
        environments: E of them; the first states follow from the seed.
        act: from observations [E, ...] to actions [E, ...].
        seed: below 2^32 - E.

    Raises:
        SpecError: an episode ended before it was cut off.
    """
    environments.seed(seed)
    observations = environments.reset()
    transitions, rewards = [], []
    for _ in range(horizon(environments)):
        actions = act(observations)
        following, true_rewards, done, infos = environments.step(actions)
        transitions.append(features(observations, actions, _arrived(environments, following, done, infos)))
        rewards.append(true_rewards)
        observations = following
    return Episodes(np.stack(transitions, 1), np.stack(rewards, 1).astype(np.float32))


def _arrived(environments: VecEnv, following: Any, done: Any, infos: Any) -> Any:
    """[E, ...] the observations that the step led to, also where another episode has begun since."""
    if not done.any():
        return following
    arrived = following.copy()
    for place in np.flatnonzero(done):
        if not infos[place]["TimeLimit.truncated"]:
            raise SpecError(
                f"{environments.get_attr('spec')[0].id}: an episode ended before its horizon, so its length gives the "
                "true reward's sign away and a fresh learner's return says nothing (termination leaks the reward); "
                "use an environment that never ends early"
            )
        arrived[place] = infos[place]["terminal_observation"]
    return arrived
