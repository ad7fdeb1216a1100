"""Imitation's numbers without its pickle: against torch modules of the same names, and files that must be refused."""

import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from palimpsest.errors import DataError, SpecError
from palimpsest.rewards.imitation_reward import ImitationForm, ImitationReward, load_imitation_reward

OBSERVATIONS, ACTIONS = 3, 2


class Norm(nn.Module):
    """Named as imitation's running norm."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.register_buffer("running_mean", torch.randn(size))
        self.register_buffer("running_var", torch.rand(size) + 0.1)
        self.register_buffer("count", torch.tensor(9))

    def forward(self, x: Tensor) -> Tensor:
        return (x - self.running_mean) / (self.running_var + 1e-5).sqrt()


class Basic(nn.Module):
    """Named as a `BasicRewardNet`; `normalized` as one in a `NormalizedRewardNet`."""

    def __init__(self, *, size: int = OBSERVATIONS + ACTIONS, norm: bool = False) -> None:
        super().__init__()
        self.mlp = nn.Sequential()
        if norm:
            self.mlp.add_module("normalize_input", Norm(size))
        self.mlp.add_module("dense0", nn.Linear(size, 8))
        self.mlp.add_module("act0", nn.ReLU())
        self.mlp.add_module("dense1", nn.Linear(8, 4))
        self.mlp.add_module("act1", nn.ReLU())
        self.mlp.add_module("dense_final", nn.Linear(4, 1))

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.mlp(x)[:, 0]
        return found


class Normalized(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self._base = Basic(norm=True)
        self.normalize_output_layer = Norm(1)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.normalize_output_layer(self._base(x))
        return found


class Ensemble(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.members = nn.ModuleList(Normalized() for _ in range(3))


class WithDeviation(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self._base = Ensemble()


def transitions(n: int = 20) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    return (
        rng.normal(size=(n, OBSERVATIONS)).astype(np.float32),
        rng.normal(size=(n, ACTIONS)).astype(np.float32),
        rng.normal(size=(n, OBSERVATIONS)).astype(np.float32),
    )


def seen(*parts: np.ndarray) -> Tensor:
    return torch.from_numpy(np.concatenate(parts, 1)).double()


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_a_networks_numbers_give_its_rewards(tmp_path: Path, suffix: str) -> None:
    for network in (Basic(), Basic(norm=True), Normalized()):
        path = tmp_path / f"reward{suffix}"
        save_file(network.state_dict(), path) if suffix == ".safetensors" else torch.save(network.state_dict(), path)
        observations, actions, following = transitions()
        expected = network.double()(seen(observations, actions)).detach().numpy()
        np.testing.assert_allclose(load_imitation_reward(path)(observations, actions, following), expected, atol=1e-5)


def test_the_form_says_which_inputs_are_seen_and_which_activation(tmp_path: Path) -> None:
    network, (observations, actions, following) = Basic(size=2 * OBSERVATIONS + ACTIONS + 1), transitions()
    form = ImitationForm(inputs=("state", "action", "next_state", "done"))
    rows = seen(observations, actions, following, np.zeros((20, 1), np.float32))
    reward = ImitationReward(network.state_dict(), form)
    relu = network.double()(rows).detach().numpy()
    np.testing.assert_allclose(reward(observations, actions, following), relu, atol=1e-5)
    network.mlp.act0 = network.mlp.act1 = nn.Tanh()
    tanh = ImitationReward(network.state_dict(), ImitationForm(inputs=form.inputs, activation="tanh"))
    expected = network(rows).detach().numpy()
    np.testing.assert_allclose(tanh(observations, actions, following), expected, atol=1e-5)
    assert tanh.fingerprint() != reward.fingerprint()
    with pytest.raises(DataError, match=r"sees 9 numbers, but state and action are 5"):
        ImitationReward(network.state_dict(), ImitationForm())(observations, actions, following)


def test_an_ensemble_is_the_mean_and_alpha_sample_deviations() -> None:
    network, (observations, actions, following) = WithDeviation(), transitions()
    rows = seen(observations, actions)
    members = np.stack([member.double()(rows).detach().numpy() for member in network._base.members])
    for alpha in (0.0, -1.5):
        reward = ImitationReward(network.state_dict(), ImitationForm(alpha=alpha))
        expected = members.mean(0) + alpha * members.std(0, ddof=1)
        np.testing.assert_allclose(reward(observations, actions, following), expected, atol=1e-4)


def test_asking_elsewhere_changes_nothing() -> None:
    """Where imitation's own ensemble would go on updating its statistics."""
    reward, (observations, actions, following) = (
        ImitationReward(Normalized().state_dict(), ImitationForm()),
        transitions(),
    )
    before, values = reward.fingerprint(), reward(observations, actions, following)
    for _ in range(3):
        reward(observations + 100, actions, following)
    assert reward.fingerprint() == before
    assert np.array_equal(reward(observations, actions, following), values)


def test_numbers_are_copied() -> None:
    network, (observations, actions, following) = Basic(), transitions()
    reward = ImitationReward(network.state_dict(), ImitationForm())
    values = reward(observations, actions, following)
    nn.init.zeros_(network.mlp.dense0.weight)
    assert np.array_equal(reward(observations, actions, following), values)


def test_a_pickled_module_is_refused_unread_with_the_way_to_export_it(tmp_path: Path) -> None:
    path = tmp_path / "reward_net.pt"
    torch.save(Basic(), path)
    with pytest.raises(DataError, match=r"reward_net.pt: a pickled module.*state_dict\(\)"):
        load_imitation_reward(path)

    class Trap:
        def __reduce__(self) -> object:
            return (Path.touch, (tmp_path / "sprung",))

    path.write_bytes(pickle.dumps(Trap(), protocol=2))
    with pytest.raises(DataError):
        load_imitation_reward(path)
    torch.save({"mlp.dense_final.weight": Trap()}, path)
    with pytest.raises(DataError):
        load_imitation_reward(path)
    assert not (tmp_path / "sprung").exists()


def test_other_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "numbers.pt"
    with pytest.raises(DataError, match="cannot be read"):
        load_imitation_reward(path)
    torch.save([1, 2], path)
    with pytest.raises(DataError, match="holds no state_dict"):
        load_imitation_reward(path)
    torch.save({"cnn.conv0.weight": torch.zeros(2)}, path)
    with pytest.raises(DataError, match=r"no mlp.dense_final.weight"):
        load_imitation_reward(path)
    torch.save(Basic().state_dict() | {"potential.0.weight": torch.zeros(2)}, path)
    with pytest.raises(DataError, match=r"potential.0.weight is of no perceptron"):
        load_imitation_reward(path)
    torch.save(Basic().state_dict(), path)
    with pytest.raises(DataError, match="alpha is of an ensemble"):
        load_imitation_reward(path, ImitationForm(alpha=1.0))


def test_forms_that_imitation_has_not_are_refused() -> None:
    with pytest.raises(SpecError, match="in order"):
        ImitationForm(inputs=("action", "state"))
    with pytest.raises(SpecError, match="choose relu or tanh"):
        ImitationForm(activation="gelu")  # type: ignore[arg-type]
