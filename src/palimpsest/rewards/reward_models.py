"""Rewards that are fitted to comparisons, tables or small networks, alone or as an ensemble; and frozen rewards.

Comparisons of fragments of equal length tell neither a reward's shift nor its scale, so every member is standardised on
the cells that were compared (never on those that a learner visits later), then the members are reduced to mean minus
`pessimism` standard deviations, and that is standardised in the same way.

Shapes: S seeds, K members, n cells.
"""

import copy
import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal, Protocol, get_args

import numpy as np

from palimpsest.errors import SpecError
from palimpsest.rewards.comparisons import Comparisons, bradley_terry
from palimpsest.rewards.gridworlds import Floats, GridWorld, Ints

Kind = Literal["table", "mlp"]
Backward = Callable[[Floats], list[Floats]]
"""From the gradient in the rewards [S, K, n] to those in the parameters."""


@dataclass(frozen=True, kw_only=True)
class RewardSettings:
    """What is fitted and how. By default, a table without any regularisation.

    Raises:
        SpecError: an unknown kind, or a number out of range.
    """

    kind: Kind = "table"
    """One free number a cell, or a network of two tanh layers that sees a cell's row and column."""
    members: int = 1
    """Of the ensemble; they differ in how they begin and in a bootstrap of the comparisons (Christiano et al. 2017,
    §2.2.3)."""
    pessimism: float = 0.0
    """Standard deviations among members that are taken off their mean."""
    l2: float = 0.0
    """Weight of the sum of squared parameters beside the mean loss a comparison."""
    deviation: float = 1.0
    """Of the numbers with which a table begins."""
    width: int = 32
    """Of the network's layers."""
    learning_rate: float | None = None
    """Adam's; 0.05 for a table and 0.005 for a network when None."""
    steps: int = 40
    """Steps down the loss of all comparisons, after each round."""
    first_steps: int = 200
    """The same after the first round."""

    def __post_init__(self) -> None:
        if self.kind not in get_args(Kind):
            raise SpecError(f"reward: kind is {self.kind!r}; choose table or mlp")
        if self.members < 1 or self.width < 1 or self.steps < 1 or self.first_steps < 1:
            raise SpecError("reward: members, width, steps and first_steps must be at least 1")
        for name in ("pessimism", "l2", "deviation"):
            if not 0 <= getattr(self, name) < np.inf:
                raise SpecError(f"reward: {name} is {getattr(self, name)}; it must be 0 or more")
        if self.pessimism and self.members < 2:
            raise SpecError("reward: pessimism needs an ensemble to disagree; give members of 2 or more")

    @property
    def rate(self) -> float:
        """The learning rate that is used."""
        return self.learning_rate or (0.05 if self.kind == "table" else 0.005)


class RewardModel:
    """Parameters of every seed's members, side by side, with Adam's moments (Kingma & Ba 2015, arXiv 1412.6980)."""

    def __init__(self, settings: RewardSettings, world: GridWorld, rngs: Sequence[np.random.Generator]) -> None:
        """`rngs` are what each seed's members begin from."""
        self.settings, self.world, self.steps = settings, world, 0
        begin = _table if settings.kind == "table" else _network
        by_seed = [[begin(settings, world, rng) for _ in range(settings.members)] for rng in rngs]
        self.parameters = [
            np.array([[member[place] for member in seed] for seed in by_seed]) for place in range(len(by_seed[0][0]))
        ]
        self.moments = [(np.zeros_like(each), np.zeros_like(each)) for each in self.parameters]

    def rewards(self) -> tuple[Floats, Backward]:
        """[S, K, n] every member's reward of arriving in each cell, and the way back to the parameters."""
        if self.settings.kind == "table":
            return self.parameters[0], lambda gradient: [gradient]
        return _forward(self.parameters, self.world.places)

    def fit(self, comparisons: Comparisons, steps: int) -> None:
        """Go down the loss of all comparisons, each member for itself."""
        for _ in range(steps):
            rewards, backward = self.rewards()
            self._step(backward(bradley_terry(comparisons, rewards)[1]))

    def copy(self) -> "RewardModel":
        """One that goes on by itself."""
        return copy.deepcopy(self)

    def frozen(self, comparisons: Comparisons) -> "FrozenReward":
        """The members' reward as it is now, standardised on what was compared."""
        members = standardised(self.rewards()[0], comparisons.visits)
        spread = members.std(1)
        values = members.mean(1) - self.settings.pessimism * spread
        return FrozenReward(standardised(values[:, None], comparisons.visits)[:, 0], spread)

    def _step(self, gradients: list[Floats]) -> None:
        self.steps += 1
        first, second = 1 - 0.9**self.steps, 1 - 0.999**self.steps
        for parameter, gradient, (mean, square) in zip(self.parameters, gradients, self.moments, strict=True):
            gradient = gradient + 2 * self.settings.l2 * parameter
            mean += 0.1 * (gradient - mean)
            square += 0.001 * (gradient**2 - square)
            parameter -= self.settings.rate * (mean / first) / (np.sqrt(square / second) + 1e-8)


class Reward(Protocol):
    """What a learner learns from: it gives rewards of arriving, and should not change by being asked."""

    def __call__(self, cells: Ints) -> Floats:
        """[S, ...] the reward of arriving in [S, ...] cells."""
        ...

    def fingerprint(self) -> str:
        """Equal for equal content."""
        ...


class FrozenReward:
    """A number a cell, for every seed, which nothing changes any more."""

    def __init__(self, values: Floats, spread: Floats | None = None) -> None:
        """`values` and `spread`, the deviation among an ensemble's members, are [S, n]; both are copied."""
        self.values = np.array(values, np.float64)
        self.spread = np.zeros_like(self.values) if spread is None else np.array(spread, np.float64)
        for array in (self.values, self.spread):
            array.flags.writeable = False

    def __call__(self, cells: Ints) -> Floats:
        """[S, ...] the reward of arriving in [S, ...] cells."""
        flat = np.take_along_axis(self.values, cells.reshape(len(cells), -1), axis=1)
        return flat.reshape(cells.shape)

    def fingerprint(self) -> str:
        """SHA-256 of the numbers."""
        digest = hashlib.sha256(str(self.values.shape).encode())
        for array in (self.values, self.spread):
            digest.update(array.tobytes())
        return digest.hexdigest()


def true_reward(world: GridWorld, seeds: int) -> FrozenReward:
    """The world's own: what the ceiling learns from."""
    return FrozenReward(np.tile(world.reward, (seeds, 1)))


def constant_reward(world: GridWorld, seeds: int) -> FrozenReward:
    """0 everywhere: what the floor learns from."""
    return FrozenReward(np.zeros((seeds, len(world.reward))))


def standardised(rewards: Floats, weights: Floats) -> Floats:
    """Rewards [S, K, n] with mean 0 and deviation 1 under weights [S, n]; all 0 where they are constant there."""
    share = (weights / weights.sum(-1, keepdims=True))[:, None]
    centred = rewards - (rewards * share).sum(-1, keepdims=True)
    deviation = np.sqrt((centred**2 * share).sum(-1, keepdims=True))
    constant = deviation <= 1e-12
    return np.where(constant, 0.0, centred / np.where(constant, 1.0, deviation))


def _table(settings: RewardSettings, world: GridWorld, rng: np.random.Generator) -> list[Floats]:
    return [settings.deviation * rng.standard_normal(len(world.moves))]


def _network(settings: RewardSettings, world: GridWorld, rng: np.random.Generator) -> list[Floats]:
    """Weights and biases of three maps; weights are normal with variance 1 over the number of inputs."""
    sizes = (world.places.shape[1], settings.width, settings.width, 1)
    parameters = []
    for fan_in, fan_out in pairwise(sizes):
        parameters += [rng.standard_normal((fan_in, fan_out)) / np.sqrt(fan_in), np.zeros((1, fan_out))]
    return parameters


def _forward(parameters: list[Floats], places: Floats) -> tuple[Floats, Backward]:
    """[S, K, n] and the chain rule back to weights [S, K, in, out] and biases [S, K, 1, out]."""
    weights, biases = parameters[0::2], parameters[1::2]
    layers = [np.broadcast_to(places, (*weights[0].shape[:2], *places.shape))]
    for weight, bias in zip(weights[:-1], biases[:-1], strict=True):
        layers.append(np.tanh(layers[-1] @ weight + bias))
    rewards = (layers[-1] @ weights[-1] + biases[-1])[..., 0]

    def backward(gradient: Floats) -> list[Floats]:
        found: list[Floats] = []
        flow = gradient[..., None]
        for place in reversed(range(len(weights))):
            found = [layers[place].swapaxes(-1, -2) @ flow, flow.sum(-2, keepdims=True), *found]
            if place:
                flow = flow @ weights[place].swapaxes(-1, -2) * (1 - layers[place] ** 2)
        return found

    return rewards, backward
