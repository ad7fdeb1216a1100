"""A learned reward in a folder: what was learned and compared as safetensors, how as JSON, with a fingerprint."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from palimpsest.errors import DataError, EvidenceError, SpecError
from palimpsest.files import atomic_path, refuse_foreign_folder, write_json
from palimpsest.rewards.comparisons import Comparisons
from palimpsest.rewards.gridworlds import WORLDS
from palimpsest.rewards.preference_loop import LearnedReward, PreferenceSettings
from palimpsest.rewards.reward_models import FrozenReward, RewardSettings

DESCRIPTION, ARRAYS = "reward.json", "reward.safetensors"


def write_reward(learned: LearnedReward, folder: str | Path) -> None:
    """Write a reward, its comparisons and the sampler's policy, whole or not at all.

    Raises:
        StorageError: the folder holds other files, or cannot be written.
    """
    refuse_foreign_folder(folder, DESCRIPTION)
    arrays = {
        "values": learned.reward.values,
        "spread": learned.reward.spread,
        "counts": learned.comparisons.counts,
        "first": learned.comparisons.first,
        "weights": learned.comparisons.weights,
    } | ({} if learned.policy is None else {"policy": np.ascontiguousarray(learned.policy)})
    description = {
        "world": learned.world.name,
        "horizon": learned.world.horizon,
        "seeds": list(learned.seeds),
        "settings": asdict(learned.settings),
        "fingerprint": learned.reward.fingerprint(),
    }
    with atomic_path(folder) as temporary:
        temporary.mkdir()
        save_file(arrays, temporary / ARRAYS)
        write_json(temporary / DESCRIPTION, description)


def read_reward(folder: str | Path) -> LearnedReward:
    """A reward as it was frozen; it can be learned from, and not be fitted further.

    Raises:
        DataError: there is no reward in the folder, or it cannot be read.
        EvidenceError: it is not the one that was written.
    """
    path = Path(folder) / DESCRIPTION
    if not path.exists():
        raise DataError(f"{folder}: there is no {DESCRIPTION}; give a folder that `palimpsest rewards run` wrote")
    try:
        described: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        arrays = load_file(path.with_name(ARRAYS))
        settings = dict(described["settings"])
        reward = FrozenReward(arrays["values"], arrays["spread"])
        learned = LearnedReward(
            world=WORLDS[described["world"]](described["horizon"]),
            settings=PreferenceSettings(**(settings | {"reward": RewardSettings(**settings["reward"])})),
            seeds=tuple(described["seeds"]),
            reward=reward,
            comparisons=Comparisons(arrays["counts"], arrays["first"], arrays["weights"]),
            model=None,
            policy=arrays.get("policy"),
        )
    except (SafetensorError, OSError, ValueError, KeyError, TypeError, SpecError) as error:
        raise DataError(f"{folder}: this reward cannot be read ({error}); learn it again") from error
    if reward.fingerprint() != described["fingerprint"]:
        raise EvidenceError(
            f"{folder}: the reward is not the one that was frozen; its fingerprint differs. Learn it again"
        )
    return learned
