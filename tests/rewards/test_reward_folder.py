"""A reward in a folder: read as it was written, and refused where it is not."""

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from palimpsest.errors import DataError, EvidenceError, SpecError, StorageError
from palimpsest.rewards.gridworlds import stay
from palimpsest.rewards.preference_loop import LearnedReward, PreferenceSettings, learn_reward, refitted
from palimpsest.rewards.reward_folder import ARRAYS, DESCRIPTION, read_reward, write_reward
from palimpsest.rewards.reward_models import RewardSettings
from palimpsest.rewards.signals import signals


@pytest.fixture(scope="module")
def learned() -> LearnedReward:
    reward = RewardSettings(members=2, pessimism=0.5, steps=2, first_steps=2)
    return learn_reward(stay(12), PreferenceSettings(rounds=2, comparisons=20, reward=reward), (4, 2))


@pytest.fixture
def folder(learned: LearnedReward, tmp_path: Path) -> Path:
    write_reward(learned, tmp_path / "reward")
    return tmp_path / "reward"


def test_what_is_read_is_what_was_written(learned: LearnedReward, folder: Path) -> None:
    read = read_reward(folder)
    assert read.reward.fingerprint() == learned.reward.fingerprint()
    assert (read.world.name, read.world.horizon, read.seeds) == (
        "stay",
        12,
        (4, 2),
    ) and read.settings == learned.settings
    for name, values in signals(learned).items():
        np.testing.assert_array_equal(signals(read)[name], values)
    with pytest.raises(SpecError, match="frozen for good"):
        refitted(read, read.comparisons, 1)


def test_the_same_seed_writes_the_same_bytes(folder: Path, learned: LearnedReward, tmp_path: Path) -> None:
    again = learn_reward(learned.world, learned.settings, learned.seeds)
    write_reward(again, tmp_path / "again")
    for name in (ARRAYS, DESCRIPTION):
        assert (folder / name).read_bytes() == (tmp_path / "again" / name).read_bytes()


def test_a_reward_that_was_touched_is_refused(folder: Path) -> None:
    arrays = load_file(folder / ARRAYS)
    arrays["values"][1, 5] += 1e-9
    save_file(arrays, folder / ARRAYS)
    with pytest.raises(EvidenceError, match="its fingerprint differs"):
        read_reward(folder)


def test_what_is_no_reward_is_refused(folder: Path, tmp_path: Path, learned: LearnedReward) -> None:
    with pytest.raises(DataError, match=r"there is no reward.json; give a folder that `palimpsest rewards run` wrote"):
        read_reward(tmp_path)
    described = json.loads((folder / DESCRIPTION).read_text())
    (folder / DESCRIPTION).write_text(json.dumps(described | {"world": "far"}))
    with pytest.raises(DataError, match=r"cannot be read \('far'\); learn it again"):
        read_reward(folder)
    (folder / ARRAYS).write_bytes(b"no tensors")
    with pytest.raises(DataError, match="cannot be read"):
        read_reward(folder)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "diary.txt").write_text("dear")
    with pytest.raises(StorageError, match="holds other files"):
        write_reward(learned, tmp_path / "other")
