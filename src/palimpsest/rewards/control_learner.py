"""A policy that stable-baselines3's PPO learns from one reward: the sampler of a preference loop, or a fresh learner.

Proximal policy optimisation is Schulman et al. 2017 (arXiv 1707.06347); what is used of it is stable-baselines3's.
"""

from dataclasses import dataclass

from palimpsest.errors import SpecError
from palimpsest.rewards.control_environments import Episodes, FrozenRewardVecEnv, make_environments, play
from palimpsest.rewards.control_rewards import TransitionReward
from palimpsest.rewards.randomness import drawing_from, stream_seed

try:
    from stable_baselines3 import PPO  # type: ignore[import-not-found,import-untyped]
    from stable_baselines3.common.logger import Logger  # type: ignore[import-not-found,import-untyped]
except ImportError as error:
    raise SpecError(f"continuous control needs {error.name}; pip install 'palimpsest[rl]'") from None

METRIC, PROXY = "return", "proxy"
"""What is probed: the mean true return of an episode, and its mean return by the reward that was learned from."""
_EVALUATED, _COMPARED = 1, 2  # purposes of seeds


@dataclass(frozen=True, kw_only=True)
class PPOSettings:
    """What decides how a policy is learned; the rest is stable-baselines3's default."""

    environments: int = 16
    """Side by side."""
    rollout: int = 64
    """Steps in each of them before an update."""
    batch_size: int = 128
    epochs: int = 10
    """Over a rollout."""
    learning_rate: float = 1e-3
    discount: float = 0.9
    gae: float = 0.9
    """The weight of longer advantages (Schulman et al. 2016, arXiv 1506.02438)."""
    log_deviation: float = -1.0
    """Of the actions at first, as a logarithm."""
    evaluated: int = 32
    """Episodes of a probe."""

    @property
    def steps(self) -> int:
        """Of the environments, between two updates: what every budget is a multiple of."""
        return self.environments * self.rollout


class PolicyLearner:
    """A learner: PPO from random weights; its budget is in steps of the environments."""

    def __init__(self, environment: str, settings: PPOSettings, reward: TransitionReward | None, seed: int) -> None:
        """`reward` None is the true one; learners of one seed differ in their reward and in nothing else."""
        self.settings, self.seed = settings, seed
        self.learned_in = FrozenRewardVecEnv(make_environments(environment, settings.environments), reward)
        self.played_in = make_environments(environment, settings.evaluated)
        with drawing_from(stream_seed(seed)):
            self.algorithm = PPO(
                "MlpPolicy",
                self.learned_in,
                n_steps=settings.rollout,
                batch_size=settings.batch_size,
                n_epochs=settings.epochs,
                learning_rate=settings.learning_rate,
                gamma=settings.discount,
                gae_lambda=settings.gae,
                policy_kwargs={"log_std_init": settings.log_deviation},
                seed=stream_seed(seed),
                device="cpu",
            )
        self.algorithm.set_logger(Logger(folder=None, output_formats=[]))  # the default leaves a folder behind

    @property
    def steps(self) -> int:
        """How many were used."""
        return int(self.algorithm.num_timesteps)

    @property
    def reward(self) -> TransitionReward | None:
        """What it learns from, which a preference loop exchanges."""
        return self.learned_in.reward

    @reward.setter
    def reward(self, reward: TransitionReward) -> None:
        self.learned_in.reward = reward

    def fit_to(self, budget: int) -> None:
        """Go on until `budget` steps are used in all; every update's draws follow from the seed and the step.

        Raises:
            SpecError: a budget that is no multiple of what a rollout takes, or an episode that ended early.
        """
        if budget % self.settings.steps:
            raise SpecError(f"budget: {budget} steps are no multiple of the {self.settings.steps} of a rollout")
        while self.steps < budget:
            with drawing_from(stream_seed(self.seed, self.steps)):
                self.algorithm.learn(self.settings.steps, reset_num_timesteps=False)

    def probe(self) -> dict[str, float]:
        """The policy without its noise, in episodes that are the same for every learner of a seed."""
        episodes = self._play(deterministic=True, seed=stream_seed(self.seed, _EVALUATED))
        return {METRIC: episodes.mean_return, PROXY: self._proxy(episodes)}

    def compared(self, draw: int) -> Episodes:
        """Episodes with the policy's noise, to be compared; each draw gives others."""
        seed = stream_seed(self.seed, _COMPARED, draw)
        with drawing_from(seed):
            return self._play(deterministic=False, seed=seed)

    def _play(self, *, deterministic: bool, seed: int) -> Episodes:
        def act(observations: object) -> object:
            return self.algorithm.predict(observations, deterministic=deterministic)[0]

        return play(self.played_in, act, seed)

    def _proxy(self, episodes: Episodes) -> float:
        if self.reward is None:
            return episodes.mean_return
        n = self.played_in.observation_space.shape[0]
        flat = episodes.transitions.reshape(-1, episodes.transitions.shape[-1])
        rewards = self.reward(flat[:, :n], flat[:, n:-n], flat[:, -n:])
        return float(rewards.sum(dtype="float64")) / len(episodes.rewards)
