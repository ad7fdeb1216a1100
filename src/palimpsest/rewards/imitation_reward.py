"""Rewards that the library imitation learned, frozen: perceptrons, their normalisation and their ensembles.

Imitation saves a reward by `torch.save` of the whole module, `reward_net.pt`: a pickle, which can run anything when it
is read, and is refused here. Whoever trusts it exports its numbers with imitation installed:

    net = torch.load("reward_net.pt", weights_only=False)
    torch.save(net.state_dict(), "reward_state.pt")

The numbers tell nearly everything, since their names do: `mlp.dense0.weight` of a `BasicRewardNet`, under `_base.` in
a wrapper and under `members.0.` in an ensemble, `normalize_output_layer` of a `NormalizedRewardNet`. What they do not
tell is an `ImitationForm`. In imitation itself a loaded ensemble under `AddSTDRewardWrapper` goes on updating its
running statistics whenever it is asked, and is another reward after a while; here nothing is updated.

Shapes: n transitions, K members.
"""

import hashlib
import pickle
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from palimpsest.errors import DataError, SpecError
from palimpsest.rewards.control_rewards import Floats

Input = Literal["state", "action", "next_state", "done"]
Activation = Literal["relu", "tanh"]
_EPSILON = 1e-5  # that imitation's norms add to a variance
_EXPORT = "torch.save(torch.load(path, weights_only=False).state_dict(), new_path) where imitation is installed"
_ACTIVATIONS = {"relu": lambda x: np.maximum(x, 0), "tanh": np.tanh}


@dataclass(frozen=True, kw_only=True)
class ImitationForm:
    """What a reward's numbers do not tell; by default what imitation's defaults are.

    Raises:
        SpecError: an unknown input or activation, or no input.
    """

    inputs: tuple[Input, ...] = ("state", "action")
    """What the network sees, in imitation's order. `done` is always 0 here: horizons are fixed."""
    activation: Activation = "relu"
    alpha: float = 0.0
    """Standard deviations among members that are added to their mean: the `default_alpha` of `AddSTDRewardWrapper`."""

    def __post_init__(self) -> None:
        in_order = tuple(each for each in get_args(Input) if each in self.inputs)
        if not self.inputs or self.inputs != in_order:
            raise SpecError(
                f"imitation reward: inputs are {list(self.inputs)}; give some of {', '.join(get_args(Input))} in order"
            )
        if self.activation not in get_args(Activation):
            raise SpecError(f"imitation reward: activation is {self.activation!r}; choose relu or tanh")


class ImitationReward:
    """A frozen reward of transitions, with the numbers that imitation's `predict_processed` would give at first."""

    def __init__(self, numbers: Mapping[str, Tensor], form: ImitationForm) -> None:
        """`numbers` are a state_dict's, by name; they are copied.

        Raises:
            DataError: numbers that no perceptron of imitation has.
        """
        self.form = form
        self._numbers = {name: tensor.detach().cpu().double().numpy().copy() for name, tensor in numbers.items()}
        for array in self._numbers.values():
            array.flags.writeable = False
        heads = [
            name.removesuffix("mlp.dense_final.weight")
            for name in self._numbers
            if name.endswith("mlp.dense_final.weight")
        ]
        if not heads:
            raise DataError(f"imitation reward: no mlp.dense_final.weight among {sorted(self._numbers)[:3]}")
        self._members = [_Member(self._numbers, head) for head in sorted(heads)]
        known = {name for member in self._members for name in member.names}
        unknown = sorted(name for name in self._numbers if name not in known and not name.endswith(_COUNTERS))
        if unknown:
            raise DataError(
                f"imitation reward: {unknown[0]} is of no perceptron, norm or ensemble; shaped and convolutional "
                "rewards are not read"
            )
        if form.alpha and len(self._members) < 2:
            raise DataError("imitation reward: alpha is of an ensemble, and this is one network; leave it out")

    def __call__(self, observations: Floats, actions: Floats, next_observations: Floats) -> Floats:
        """[n] the rewards of n transitions.

        Raises:
            DataError: transitions of another size than the network sees.
        """
        parts: dict[Input, NDArray[Any]] = {
            "state": observations,
            "action": actions,
            "next_state": next_observations,
            "done": np.zeros((len(observations), 1)),
        }
        seen = np.concatenate([parts[each].reshape(len(observations), -1) for each in self.form.inputs], axis=1)
        if seen.shape[1] != self._members[0].n_inputs:
            raise DataError(
                f"imitation reward: the network sees {self._members[0].n_inputs} numbers, but "
                f"{' and '.join(self.form.inputs)} are {seen.shape[1]}; give the inputs that it was made with"
            )
        activation = _ACTIVATIONS[self.form.activation]
        members = np.stack([member(seen, activation) for member in self._members])
        rewards = members.mean(0)
        if self.form.alpha:
            rewards = rewards + self.form.alpha * members.std(0, ddof=1)
        return rewards.astype(np.float32)

    def fingerprint(self) -> str:
        """SHA-256 (hex) over the form and the numbers by name."""
        digest = hashlib.sha256(str(self.form).encode())
        for name, array in sorted(self._numbers.items()):
            digest.update(f"{name} {array.shape}\n".encode())
            digest.update(array.tobytes())
        return digest.hexdigest()


def load_imitation_reward(path: str | Path, form: ImitationForm | None = None) -> ImitationReward:
    """Read a reward's state_dict, `.pt` or `.safetensors`, without running anything that is in it.

    Args:
        path: of the exported numbers.
        form: what they do not tell; imitation's defaults when None.

    Raises:
        DataError: a file that cannot be read, a pickled module, or numbers of another kind of network.
    """
    try:
        numbers = load_file(path) if Path(path).suffix == ".safetensors" else torch.load(path, "cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise DataError(
            f"{path}: a pickled module, which could run anything when read; export its numbers with {_EXPORT}"
        ) from None
    except (OSError, SafetensorError, RuntimeError, EOFError) as error:
        raise DataError(f"{path}: cannot be read ({' '.join(str(error).split())[:100]})") from None
    if not isinstance(numbers, Mapping) or not all(isinstance(each, Tensor) for each in numbers.values()):
        raise DataError(f"{path}: holds no state_dict; export one with {_EXPORT}")
    return ImitationReward(numbers, form or ImitationForm())


class _Member:
    """One perceptron, with its norms of input and output."""

    def __init__(self, numbers: Mapping[str, NDArray[np.float64]], head: str) -> None:
        names = [f"{head}mlp.dense{place}" for place in range(_hidden(numbers, head))] + [f"{head}mlp.dense_final"]
        self.layers = [(numbers[f"{name}.weight"], numbers[f"{name}.bias"]) for name in names]
        # The norm of the output belongs to the wrapper, one `_base.` above the perceptron.
        norms = {
            "input": f"{head}mlp.normalize_input",
            "output": f"{head.removesuffix('_base.')}normalize_output_layer",
        }
        self.norms = {
            what: (numbers[f"{name}.running_mean"], np.sqrt(numbers[f"{name}.running_var"] + _EPSILON))
            for what, name in norms.items()
            if f"{name}.running_mean" in numbers
        }
        self.names = {f"{name}.{part}" for name in names for part in ("weight", "bias")}
        self.names |= {f"{name}.{part}" for name in norms.values() for part in ("running_mean", "running_var")}
        self.n_inputs = self.layers[0][0].shape[1]

    def __call__(self, seen: NDArray[np.float64], activation: object) -> NDArray[np.float64]:
        hidden = self._normalised("input", seen)
        for place, (weight, bias) in enumerate(self.layers):
            hidden = hidden @ weight.T + bias
            if place + 1 < len(self.layers):
                hidden = activation(hidden)  # type: ignore[operator]
        return self._normalised("output", hidden[:, 0])

    def _normalised(self, what: str, values: NDArray[np.float64]) -> NDArray[np.float64]:
        if what not in self.norms:
            return values
        mean, deviation = self.norms[what]
        return (values - mean) / deviation


_COUNTERS = (".count", ".inv_learning_rate", ".num_batches")  # of norms, which only updating needs


def _hidden(numbers: Mapping[str, NDArray[np.float64]], head: str) -> int:
    place = 0
    while f"{head}mlp.dense{place}.weight" in numbers:
        place += 1
    return place
