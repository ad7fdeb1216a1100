"""The resumable state: what is saved is what comes back, or a line that says why not."""

import json
from copy import deepcopy

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from palimpsest.errors import StorageError, TrainingError
from palimpsest.models.checkpoint import Checkpoints

OPTIMIZERS = {
    "AdamW": lambda values: [torch.optim.AdamW(values, lr=0.01)],
    "AdamW with two groups": lambda values: [
        torch.optim.AdamW([{"params": values[:1], "weight_decay": 0.5}, {"params": values[1:]}], lr=0.01)
    ],
    "AdamW and Muon": lambda values: [torch.optim.AdamW(values[1:], lr=0.01), torch.optim.Muon(values[:1], lr=0.02)],
    "SGD without state": lambda values: [torch.optim.SGD(values, lr=0.01)],
    "SGD with momentum": lambda values: [torch.optim.SGD(values, lr=0.01, momentum=0.9)],
    "ASGD": lambda values: [torch.optim.ASGD(values, lr=0.01)],
}


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Linear(3, 4)


def steps(module, optimizers, first, last):
    for step in range(first, last):
        torch.manual_seed(step)
        module(torch.randn(5, 3)).square().sum().backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_restored_run_goes_on_bit_for_bit(name, tmp_path):
    module = network()
    optimizers = OPTIMIZERS[name](list(module.parameters()))
    steps(module, optimizers, 0, 3)
    checkpoints = Checkpoints(tmp_path / "state", "run")
    checkpoints.save(3, dict(module.named_parameters()), optimizers, {"trace": [{"loss": 0.1}], "text": "ü"})
    stored = deepcopy(module.state_dict())
    steps(module, optimizers, 3, 6)

    fresh = network()
    again = OPTIMIZERS[name](list(fresh.parameters()))
    found = Checkpoints(tmp_path / "state", "run").load(again)
    assert (found.step, found.notes) == (3, {"trace": [{"loss": 0.1}], "text": "ü"})
    assert found.tensors.keys() == stored.keys()
    assert all(torch.equal(found.tensors[key], stored[key]) for key in stored)
    fresh.load_state_dict(found.tensors)
    steps(fresh, again, 3, 6)
    assert all(torch.equal(value, module.state_dict()[key]) for key, value in fresh.state_dict().items())


@pytest.fixture
def saved(tmp_path):
    module = network()
    optimizers = OPTIMIZERS["AdamW"](list(module.parameters()))
    steps(module, optimizers, 0, 1)
    checkpoints = Checkpoints(tmp_path / "state", "run")
    checkpoints.save(1, dict(module.named_parameters()), optimizers)
    return checkpoints, module, optimizers


def test_the_newest_checkpoint_takes_the_place_of_the_one_before(saved, tmp_path):
    checkpoints, module, optimizers = saved
    steps(module, optimizers, 1, 2)
    checkpoints.save(2, dict(module.named_parameters()), optimizers)
    assert checkpoints.load(optimizers).step == 2
    assert [path.name for path in tmp_path.iterdir()] == ["state"]
    checkpoints.remove()
    assert list(tmp_path.iterdir()) == []
    assert checkpoints.load(optimizers) is None
    checkpoints.remove()  # twice is once


def test_tensors_of_any_type_and_layout_come_back(tmp_path):
    tensors = {
        "bf16": torch.randn(3, 4).bfloat16(),
        "transposed": torch.randn(3, 4).T,
        "a view": torch.arange(12)[3:9],
        "scalar": torch.tensor(2.5),
        "moments/0/0/step": torch.ones(1),  # a name like one of the optimiser's
    }
    checkpoints = Checkpoints(tmp_path / "state", "run")
    checkpoints.save(0, tensors, [])
    found = checkpoints.load([]).tensors
    assert found.keys() == tensors.keys()
    assert all(found[key].dtype == value.dtype and torch.equal(found[key], value) for key, value in tensors.items())


def test_another_runs_state_is_left_alone(saved):
    checkpoints, module, _ = saved
    optimizers = OPTIMIZERS["AdamW"](list(module.parameters()))
    assert Checkpoints(checkpoints.folder, "another run").load(optimizers) is None
    assert optimizers[0].state_dict()["state"] == {}
    assert checkpoints.load(optimizers).step == 1


def rewrite(path, **metadata):
    save_file(load_file(path), path, metadata or None)


DAMAGE = {
    "cut short": lambda path: path.write_bytes(path.read_bytes()[:-7]),
    "empty, as a power failure leaves it": lambda path: path.write_bytes(b""),
    "not safetensors": lambda path: path.write_text("text" * 100),
    "no state": lambda path: rewrite(path, other="1"),
    "no metadata": rewrite,
    "state that is not JSON": lambda path: rewrite(path, state="{"),
    "state that is no object": lambda path: rewrite(path, state="[1]"),
    "a folder": lambda path: (path.unlink(), path.mkdir()),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_checkpoint_is_said_so_in_one_line(damage, saved):
    checkpoints, _, optimizers = saved
    DAMAGE[damage](checkpoints.folder / "state.safetensors")
    with pytest.raises(TrainingError) as error:
        checkpoints.load(optimizers)
    message = str(error.value)
    assert message.startswith(f"{checkpoints.folder / 'state.safetensors'}: this checkpoint cannot be read (")
    assert message.endswith("; remove state to start from step 0") and "\n" not in message


def test_a_folder_of_other_files_is_never_taken_for_a_checkpoint(tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(StorageError, match="holds other files"):
        Checkpoints(tmp_path, "run")
    assert (tmp_path / "thesis.tex").read_text() == "years of work"


def test_no_pickle_is_written(saved):
    checkpoints, _, _ = saved
    (path,) = checkpoints.folder.iterdir()
    header_bytes = int.from_bytes(path.read_bytes()[:8], "little")
    header = json.loads(path.read_bytes()[8 : 8 + header_bytes])
    assert json.loads(header["__metadata__"]["state"])["identity"] == "run"
    assert sum(1 for name in header if name.startswith("moments/")) == 6  # two moments and a step, of two parameters
