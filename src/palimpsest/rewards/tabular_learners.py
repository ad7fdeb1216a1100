"""Learners that begin afresh in a grid world: a Q-learner as strong as the sampler was, a stronger one, and a planner.

A weak learner is a weak audit: what is wrong with a reward shows where nothing visits unless something looks there, so
the planner finds most and the sampler's own kind least. Seeds learn side by side (Shapes: S seeds, n cells, A moves, E
episodes, H steps).
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np

from palimpsest.errors import SpecError
from palimpsest.rewards.gridworlds import Floats, GridWorld, Ints, greedy, plan, roll_out, uniform
from palimpsest.rewards.reward_models import Reward


@dataclass(frozen=True, kw_only=True)
class QLearning:
    """Watkins & Dayan 1992, with epsilon-greedy episodes that are learned from backwards, batch by batch.

    Raises:
        SpecError: a number out of range.
    """

    learning_rate: float = 0.5
    discount: float = 0.97
    first_epsilon: float = 0.3
    last_epsilon: float = 0.05
    optimism: float = 0.0
    """The value of every move before any learning."""
    decay: int = 1920
    """Episodes in which epsilon falls from first to last, after which it stays."""
    batch: int = 32
    """Episodes that are rolled out before they are learned from."""

    def __post_init__(self) -> None:
        for name in ("learning_rate", "discount", "first_epsilon", "last_epsilon"):
            if not 0 <= getattr(self, name) <= 1:
                raise SpecError(f"Q-learning: {name} is {getattr(self, name)}; it lies between 0 and 1")
        if self.batch < 1 or self.decay < 1:
            raise SpecError("Q-learning: batch and decay must be at least 1")

    def stronger(self) -> "QLearning":
        """The same, which begins with all moves at random and believes that what it does not know is good."""
        return replace(self, first_epsilon=1.0, decay=2 * self.decay, optimism=5.0)


class TabularLearner(Protocol):
    """Something that learns a policy from a reward, for every seed at once."""

    def train(self, reward: Reward, units: int) -> object:
        """Go on for so many units of its budget."""
        ...

    def policy(self) -> Floats:
        """[S, 1 or H, n, A] what it would do now, without exploring."""
        ...


class QLearner:
    """Q-values of every seed; each seed draws from its own generator."""

    def __init__(self, world: GridWorld, settings: QLearning, rngs: Sequence[np.random.Generator]) -> None:
        self.world, self.settings, self.rngs, self.episodes = world, settings, rngs, 0
        n, moves = world.moves.shape
        self._values = np.full((moves, len(rngs), n), settings.optimism)  # [A, S, n], so that maxima go over rows
        self._rates = 1 - (1 - settings.learning_rate) ** np.arange(settings.batch + 1)

    def train(self, reward: Reward, units: int) -> Ints:
        """Learn from so many more episodes; returns the cells they arrived in, [S, E, H].

        Raises:
            SpecError: a number of episodes that is no multiple of the batch.
        """
        if units % self.settings.batch:
            raise SpecError(
                f"Q-learning: {units} episodes in batches of {self.settings.batch}; give a multiple, so that "
                "what is learned does not depend on where it was looked at"
            )
        arrived = []
        for _ in range(units // self.settings.batch):
            draws = np.stack([rng.random((2, self.world.horizon + 1, self.settings.batch)) for rng in self.rngs])
            cells, moves = roll_out(self.world, self.exploring()[:, None], draws)
            self._learn(reward, cells, moves)
            self.episodes += self.settings.batch
            arrived.append(cells[..., 1:])
        return np.concatenate(arrived, 1) if arrived else np.empty((len(self.rngs), 0, self.world.horizon), np.int64)

    @property
    def values(self) -> Floats:
        """[S, n, A] of every move in every cell."""
        return np.ascontiguousarray(np.moveaxis(self._values, 0, -1))

    def policy(self) -> Floats:
        """[S, 1, n, A] evenly over the best moves."""
        return greedy(self.values)[:, None]

    def exploring(self) -> Floats:
        """[S, n, A] the same, with any move at all with probability epsilon."""
        settings = self.settings
        done = min(self.episodes / settings.decay, 1.0)
        epsilon = settings.first_epsilon + done * (settings.last_epsilon - settings.first_epsilon)
        return (1 - epsilon) * greedy(self.values) + epsilon / len(self._values)

    def _learn(self, reward: Reward, cells: Ints, moves: Ints) -> None:
        """From the last step to the first.

        Those episodes of a batch that chose the same move in the same cell at the same step count together: the mean of
        their targets, at the rate that so many updates one after another would have had. An episode is cut off at the
        horizon and does not end there, so its last step has a successor like any other.
        """
        gained = reward(cells[..., 1:])
        _, seeds, n = self._values.shape
        here = np.arange(seeds)[:, None]
        flat = (moves * seeds + here[..., None]) * n + cells[..., :-1]
        values = self._values.reshape(-1)
        for step in reversed(range(moves.shape[-1])):
            ahead = self._values.max(0)[here, cells[..., step + 1]]
            targets = gained[..., step] + self.settings.discount * ahead
            pairs = flat[..., step].ravel()
            times = np.bincount(pairs, minlength=len(values))
            seen = np.flatnonzero(times)
            means = np.bincount(pairs, targets.ravel(), len(values))[seen] / times[seen]
            values[seen] += self._rates[times[seen]] * (means - values[seen])


class Planner:
    """The exact optimum of a reward: the strongest learner there is. One unit of its budget is one plan."""

    def __init__(self, world: GridWorld, seeds: int) -> None:
        self.world, self._policy = world, uniform(world, seeds)

    def train(self, reward: Reward, units: int) -> None:
        """Plan anew for the reward as it is."""
        if units:
            cells = np.arange(len(self.world.moves))
            self._policy = plan(self.world, reward(np.tile(cells, (len(self._policy), 1))))

    def policy(self) -> Floats:
        """[S, H, n, A]; before any plan the uniform one, [S, 1, n, A]."""
        return self._policy
