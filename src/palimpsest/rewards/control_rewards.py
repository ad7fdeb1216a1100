"""Rewards of transitions that are learned from compared fragments of episodes: a small network, alone or an ensemble.

A judge prefers the first of two fragments with probability sigmoid((R1 - R2) / temperature), R being the sum of true
rewards (Bradley & Terry 1952; Christiano et al. 2017, arXiv 1706.03741, §2.2.3). That tells neither a reward's shift
nor its scale, so each member is standardised on the transitions that were compared, never on those that a learner
visits later; then the members are reduced to their mean less `pessimism` standard deviations, and that is standardised
in the same way.

Shapes: E episodes, H steps, N comparisons, L steps of a fragment, K members, F features of a transition: observation,
action and next observation, side by side.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Protocol, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file
from torch import Tensor

from palimpsest.errors import DataError, SpecError
from palimpsest.files import atomic_path

Floats: TypeAlias = NDArray[np.float32]


class TransitionReward(Protocol):
    """What a learner learns from: it gives rewards of transitions, and should not change by being asked."""

    def __call__(self, observations: Floats, actions: Floats, next_observations: Floats) -> Floats:
        """[n] the rewards of n transitions."""
        ...

    def fingerprint(self) -> str:
        """Equal for equal content."""
        ...


class ConstantReward:
    """0 for every transition: what the floor learns from."""

    def __call__(self, observations: Floats, actions: Floats, next_observations: Floats) -> Floats:
        """[n] zeros."""
        return np.zeros(len(observations), np.float32)

    def fingerprint(self) -> str:
        """It has no content."""
        return "constant"


def features(observations: Floats, actions: Floats, next_observations: Floats) -> Floats:
    """[..., F] transitions as a network sees them."""
    return np.concatenate([observations, actions, next_observations], axis=-1, dtype=np.float32)


@dataclass(frozen=True, eq=False)
class FragmentComparisons:
    """What was compared, and which was preferred."""

    transitions: Tensor
    """[N, 2, L, F]"""
    first: Tensor
    """[N] 1 where the first was preferred, 0 where the second was."""

    def __len__(self) -> int:
        """N."""
        return len(self.first)

    @staticmethod
    def joined(parts: Sequence["FragmentComparisons"]) -> "FragmentComparisons":
        """All of them, in order."""
        return FragmentComparisons(
            torch.cat([part.transitions for part in parts]), torch.cat([part.first for part in parts])
        )

    def accuracy(self, rewards: Floats) -> float:
        """The share that rewards [N, 2, L] call as the judge did."""
        gains = rewards.sum(-1)
        return float(((gains[:, 0] > gains[:, 1]) == (self.first.numpy() > 0.5)).mean())


def compare_fragments(
    transitions: Floats,
    rewards: Floats,
    number: int,
    rng: np.random.Generator,
    *,
    length: int,
    temperature: float = 1.0,
) -> FragmentComparisons:
    """Draw pairs of fragments and ask which is better.

    Args:
        transitions: [E, H, F] of whole episodes.
        rewards: [E, H] the true ones.
        number: of pairs.
        rng: what is drawn from.
        length: of a fragment, in steps.
        temperature: of the judge, in units of reward; the higher, the more labels are wrong.

    Raises:
        SpecError: fragments longer than episodes.
    """
    episodes, horizon = rewards.shape
    if not 1 <= length <= horizon:
        raise SpecError(
            f"comparisons: fragments of {length} steps out of episodes of {horizon}; give at most {horizon}"
        )
    which = rng.integers(episodes, size=(number, 2, 1))
    steps = rng.integers(horizon - length + 1, size=(number, 2, 1)) + np.arange(length)
    gains = rewards[which, steps].sum(-1, dtype=np.float64)
    preferred = np.exp(-np.logaddexp(0, (gains[:, 1] - gains[:, 0]) / temperature))
    first = rng.random(number) < preferred
    return FragmentComparisons(torch.from_numpy(transitions[which, steps]), torch.from_numpy(first).float())


@dataclass(frozen=True, kw_only=True)
class NetworkSettings:
    """The reward network and how it is fitted.

    Raises:
        SpecError: a number out of range.
    """

    members: int = 1
    """Of the ensemble; they differ in how they begin (Lakshminarayanan et al. 2017, arXiv 1612.01474)."""
    pessimism: float = 0.0
    """Standard deviations among members that are taken off their mean."""
    l2: float = 0.0
    """Weight of the sum of squared parameters beside the mean loss a comparison."""
    width: int = 64
    """Of the two tanh layers."""
    learning_rate: float = 1e-3
    """Adam's."""
    batch_size: int = 64
    """Comparisons a step."""

    def __post_init__(self) -> None:
        if min(self.members, self.width, self.batch_size) < 1:
            raise SpecError("reward: members, width and batch_size must be at least 1")
        if not (self.pessimism >= 0 and self.l2 >= 0 and self.learning_rate > 0):
            raise SpecError("reward: pessimism and l2 must be 0 or more, and learning_rate above 0")
        if self.pessimism and self.members < 2:
            raise SpecError("reward: pessimism needs an ensemble to disagree; give members of 2 or more")


class RewardNetwork:
    """An ensemble while it is fitted: weights [K, in, out] and biases [K, 1, out], side by side."""

    def __init__(self, settings: NetworkSettings, n_features: int, seed: int) -> None:
        """`seed` is of the first weights, and of which comparisons each step sees."""
        self.settings, self.generator = settings, torch.Generator().manual_seed(seed)
        sizes = (n_features, settings.width, settings.width, 1)
        self.weights = [self._normal(*size) for size in pairwise(sizes)]
        self.biases = [torch.zeros(settings.members, 1, size, requires_grad=True) for size in sizes[1:]]
        self.optimizer = torch.optim.Adam([*self.weights, *self.biases], lr=settings.learning_rate)
        self.centre, self.scale = torch.zeros(n_features), torch.ones(n_features)

    def rewards(self, transitions: Tensor) -> Tensor:
        """[K, ...] every member's reward of transitions [..., F], not standardised."""
        hidden = ((transitions.flatten(0, -2) - self.centre) / self.scale).expand(self.settings.members, -1, -1)
        for weight, bias in zip(self.weights[:-1], self.biases[:-1], strict=True):
            hidden = torch.tanh(torch.baddbmm(bias, hidden, weight))
        out = torch.baddbmm(self.biases[-1], hidden, self.weights[-1])
        return out.view(self.settings.members, *transitions.shape[:-1])

    def loss(self, comparisons: FragmentComparisons) -> Tensor:
        """[K] each member's mean negative log-likelihood, in nats a comparison."""
        gains = self.rewards(comparisons.transitions).sum(-1)
        logits = gains[..., 0] - gains[..., 1]
        return torch.nn.functional.binary_cross_entropy_with_logits(
            logits, comparisons.first.expand_as(logits), reduction="none"
        ).mean(-1)

    def fit(self, comparisons: FragmentComparisons, steps: int) -> None:
        """Go down the members' loss, a few comparisons at a time; inputs are standardised on all of them."""
        flat = comparisons.transitions.flatten(0, 2)
        self.centre, self.scale = flat.mean(0), flat.std(0, correction=0).clamp_min(1e-6)
        for _ in range(steps):
            drawn = torch.randint(len(comparisons), (self.settings.batch_size,), generator=self.generator)
            batch = FragmentComparisons(comparisons.transitions[drawn], comparisons.first[drawn])
            squares = sum(parameter.square().sum() for parameter in (*self.weights, *self.biases))
            self.optimizer.zero_grad()
            (self.loss(batch).sum() + self.settings.l2 * squares).backward()
            self.optimizer.step()

    @torch.no_grad()
    def frozen(self, comparisons: FragmentComparisons) -> "FrozenNetworkReward":
        """The reward as it is now, standardised on what was compared."""
        members = self.rewards(comparisons.transitions).flatten(1)
        centres, scales = members.mean(1), members.std(1, correction=0).clamp_min(1e-6)
        members = (members - centres[:, None]) / scales[:, None]
        reduced = members.mean(0) - self.settings.pessimism * members.std(0, correction=0)
        arrays = {
            "input.centre": self.centre,
            "input.scale": self.scale,
            "members.centre": centres,
            "members.scale": scales,
            "pessimism": torch.tensor(self.settings.pessimism),
            "centre": reduced.mean(),
            "scale": reduced.std(correction=0).clamp_min(1e-6),
        }
        for place, (weight, bias) in enumerate(zip(self.weights, self.biases, strict=True)):
            arrays |= {f"layers.{place}.weight": weight, f"layers.{place}.bias": bias}
        return FrozenNetworkReward({name: array.numpy() for name, array in arrays.items()})

    def _normal(self, fan_in: int, fan_out: int) -> Tensor:
        weight = torch.randn(self.settings.members, fan_in, fan_out, generator=self.generator) / fan_in**0.5
        return weight.requires_grad_()


class FrozenNetworkReward:
    """A fitted network as numbers that nothing changes any more, asked without torch: a few microseconds a step."""

    def __init__(self, arrays: dict[str, Floats]) -> None:
        """`arrays` are what `RewardNetwork.frozen` gives, by name; they are copied."""
        self._arrays = {name: np.array(array, np.float32) for name, array in sorted(arrays.items())}
        for array in self._arrays.values():
            array.flags.writeable = False
        n_layers = sum(name.endswith(".weight") for name in self._arrays)
        self._layers = [
            (self._arrays[f"layers.{place}.weight"], self._arrays[f"layers.{place}.bias"]) for place in range(n_layers)
        ]

    def __call__(self, observations: Floats, actions: Floats, next_observations: Floats) -> Floats:
        """[n] the rewards of n transitions."""
        return self.of(features(observations, actions, next_observations))

    def of(self, transitions: Floats) -> Floats:
        """[...] the rewards of transitions [..., F]."""
        members = self.members(transitions)
        reduced = members.mean(0) - self._arrays["pessimism"] * members.std(0)
        return np.asarray((reduced - self._arrays["centre"]) / self._arrays["scale"], np.float32)

    def members(self, transitions: Floats) -> Floats:
        """[K, ...] each member's, standardised."""
        flat = transitions.reshape(-1, transitions.shape[-1])
        hidden = (flat - self._arrays["input.centre"]) / self._arrays["input.scale"]
        for weight, bias in self._layers[:-1]:
            hidden = np.tanh(hidden @ weight + bias)
        weight, bias = self._layers[-1]
        rewards = (hidden @ weight + bias)[..., 0]
        rewards = (rewards - self._arrays["members.centre"][:, None]) / self._arrays["members.scale"][:, None]
        return np.asarray(rewards, np.float32).reshape(-1, *transitions.shape[:-1])

    def fingerprint(self) -> str:
        """SHA-256 (hex) over names, shapes and numbers."""
        digest = hashlib.sha256()
        for name, array in self._arrays.items():
            digest.update(f"{name} {array.shape}\n".encode())
            digest.update(array.tobytes())
        return digest.hexdigest()

    def save(self, path: str | Path) -> None:
        """Write the numbers as safetensors, whole or not at all."""
        with atomic_path(path) as temporary:
            save_file(self._arrays, temporary)

    @staticmethod
    def load(path: str | Path) -> "FrozenNetworkReward":
        """Read what `save` wrote.

        Raises:
            DataError: the file cannot be read, or holds something else.
        """
        try:
            arrays = load_file(path)
            return FrozenNetworkReward(arrays)
        except (OSError, SafetensorError, KeyError) as error:
            raise DataError(f"{path}: holds no reward that was frozen here ({error})") from None
