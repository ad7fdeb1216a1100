"""Training: the loss, the optimisers' steps, the schedule, and one outcome however often it is interrupted."""

import math
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tiny_families import tiny_model, tiny_rows
from torch import nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

from palimpsest.data.batches import Encoded, batch_at
from palimpsest.errors import SpecError, TrainingError
from palimpsest.models.language_model import LanguageModel
from palimpsest.models.training import TrainingSettings, build_optimizers, train

ROWS = tiny_rows(9, 4, 12, 7, 5, 10, 3, 8, 11, 6)
SHORT = TrainingSettings(steps=6, batch_size=4, learning_rate=1e-2, warmup=2)


@contextmanager
def before_each_step(look: Callable[[torch.optim.Optimizer], None]) -> Iterator[None]:
    """Call `look` with every optimiser that is about to step."""
    handle = register_optimizer_step_pre_hook(lambda optimizer, _args, _kwargs: look(optimizer))
    try:
        yield
    finally:
        handle.remove()


def hash_after(settings: TrainingSettings, family: str = "llama", **arguments: object) -> str:
    return train(tiny_model(family), ROWS, settings, **arguments).weights_hash()


# One seed, one outcome.


@pytest.mark.parametrize("family", ["llama", "gpt2"])  # GPT-2 has dropout
def test_the_same_seed_gives_the_same_bytes_and_another_seed_others(family):
    first = hash_after(SHORT, family)
    torch.manual_seed(12345)  # what the caller does with random numbers has no say
    assert hash_after(SHORT, family) == first
    assert hash_after(replace(SHORT, seed=1), family) != first
    assert first != tiny_model(family).weights_hash()


def test_the_model_is_trained_in_place_and_handed_back_for_use():
    model = tiny_model("gpt2")
    assert train(model, ROWS, SHORT) is model
    assert not model.network.training
    assert all(parameter.grad is None for parameter in model.network.parameters())


# The loss.


def nll_of_targets(model: LanguageModel, rows: list[Encoded]) -> list[float]:
    """The negative log-likelihood of each target token, one row at a time, without padding, in float64."""
    losses = []
    for row in rows:
        with torch.no_grad():
            logits = model.network(torch.tensor([row.ids])).logits[0].double().numpy()
        logprobs = logits - np.logaddexp.reduce(logits, axis=1, keepdims=True)
        losses += [-logprobs[place - 1, row.ids[place]] for place in range(row.start, row.stop)]
    return losses


def reported_loss(note: str) -> float:
    return float(re.match(r"loss (\S+)  [\d,]+ tokens/s$", note).group(1))


def test_the_loss_of_the_first_step_is_the_mean_over_the_batchs_target_tokens():
    model, notes = tiny_model("llama"), []
    settings = replace(SHORT, steps=1)
    rows = [ROWS[place] for place in batch_at(ROWS, 0, batch_size=4, seed=0).rows]
    expected = np.mean(nll_of_targets(model, rows))
    by_row = np.mean([np.mean(nll_of_targets(model, [row])) for row in rows])
    assert abs(expected - by_row) > 0.002  # so the next line can tell a mean over tokens from one over rows
    train(model, ROWS, settings, report=lambda *news: notes.append(news))
    assert [news[:2] for news in notes] == [(1, 1)]
    assert reported_loss(notes[0][2]) == pytest.approx(expected, abs=0.0006)


def test_a_handful_of_rows_is_learnt_by_heart():
    model = tiny_model("llama")
    assert np.mean(nll_of_targets(model, ROWS)) > 3
    train(model, ROWS, TrainingSettings(epochs=100, batch_size=10, learning_rate=1e-2, warmup=5))
    assert np.mean(nll_of_targets(model, ROWS)) < 0.1


# The steps.


def torchs_own(model: LanguageModel, settings: TrainingSettings) -> nn.Module:
    """The same training written with torch alone: rows one by one, torch's AdamW, its clipping and its scheduler."""
    network = deepcopy(model.network).train()
    matrices = [value for value in network.parameters() if value.ndim > 1]
    vectors = [value for value in network.parameters() if value.ndim == 1]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": settings.weight_decay}, {"params": vectors, "weight_decay": 0.0}],
        lr=settings.learning_rate,
        betas=settings.betas,
    )
    shares = [settings.rate(step, settings.steps) for step in range(settings.steps)]
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: shares[min(step, settings.steps - 1)])
    for step in range(settings.steps):
        rows = [ROWS[place] for place in batch_at(ROWS, step, batch_size=settings.batch_size, seed=settings.seed).rows]
        total = sum(row.n_targets for row in rows)
        for row in rows:
            labels = torch.tensor([row.ids])
            labels[0, : row.start] = labels[0, row.stop :] = -100
            loss = network(torch.tensor([row.ids]), labels=labels).loss  # the mean over this row's targets
            (loss * row.n_targets / total).backward()
        nn.utils.clip_grad_norm_(network.parameters(), settings.clip)
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
    return network


@pytest.mark.parametrize("changes", [{}, {"clip": 0.05}, {"schedule": "cosine", "weight_decay": 0.5}])
def test_the_steps_are_those_of_torchs_adamw(changes):
    model = tiny_model("llama")
    settings = replace(SHORT, steps=3, learning_rate=1e-3, warmup=2, **changes)
    expected = dict(torchs_own(model, settings).named_parameters())
    before = {name: value.detach().clone() for name, value in model.network.named_parameters()}
    train(model, ROWS, settings)
    for name, value in model.network.named_parameters():
        assert torch.allclose(value, expected[name], rtol=0, atol=2e-6), name
        assert (value - before[name]).abs().max() > 1e-4, name


def test_adamws_first_step_by_hand():
    """Both moments are unbiased at step 1, so the update is g / (|g| + eps), after decoupled decay (AdamW, Alg. 2)."""
    model, seen = tiny_model("llama"), {}
    settings = replace(SHORT, steps=1, learning_rate=1e-2, warmup=4, weight_decay=0.3)
    before = {name: value.detach().double() for name, value in model.network.named_parameters()}
    names = {value: name for name, value in model.network.named_parameters()}

    def keep_gradients(optimizer):
        seen.update(
            (names[value], value.grad.double()) for group in optimizer.param_groups for value in group["params"]
        )

    with before_each_step(keep_gradients):
        train(model, ROWS, settings)
    rate = 1e-2 / 4
    for name, value in model.network.named_parameters():
        decay = 0.3 if value.ndim > 1 else 0.0
        step = seen[name] / (seen[name].abs() + 1e-8)
        assert torch.allclose(value.double(), before[name] * (1 - rate * decay) - rate * step, rtol=0, atol=1e-6), name


@pytest.mark.parametrize("clip", [1e-3, 0.5, 1e6])
def test_no_gradient_is_longer_than_allowed(clip):
    norms = []

    def measure(optimizer):
        gradients = [value.grad for group in optimizer.param_groups for value in group["params"]]
        norms.append(math.sqrt(sum(gradient.double().square().sum().item() for gradient in gradients)))

    with before_each_step(measure):
        train(tiny_model("llama"), ROWS, replace(SHORT, clip=clip))
    assert len(norms) == 6
    if clip == 1e6:
        assert min(norms) > 0.5  # so the other two had something to clip
    else:
        assert norms == pytest.approx([clip] * 6, rel=1e-3)


# The schedule.


@pytest.mark.parametrize(
    ("settings", "step", "share"),
    [
        ({}, 0, 1 / 4),
        ({}, 3, 1.0),
        ({}, 4, 1.0),
        ({}, 7, 0.1 + 0.9 * 0.5),
        ({}, 9, 0.1 + 0.9 / 6),
        ({}, 10, 0.1),
        ({"schedule": "cosine"}, 1, 2 / 4),
        ({"schedule": "cosine"}, 6, 0.1 + 0.9 * 0.75),  # (1 + cos 60°) / 2
        ({"schedule": "cosine"}, 7, 0.1 + 0.9 * 0.5),
        ({"schedule": "cosine"}, 8, 0.1 + 0.9 * 0.25),
        ({"schedule": "constant"}, 0, 1 / 4),
        ({"schedule": "constant"}, 9, 1.0),
        ({"warmup": 0}, 0, 1.0),
        ({"warmup": 0}, 5, 0.1 + 0.9 * 0.5),
        ({"warmup": 20}, 9, 10 / 20),
    ],
)
def test_the_share_of_the_peak_rate(settings, step, share):
    chosen = TrainingSettings(**{"warmup": 4, "final": 0.1, "schedule": "linear"} | settings)
    assert chosen.rate(step, 10) == pytest.approx(share, abs=1e-12)


def kind_of(optimizer):
    """Muon by its own name, whether it orthogonalises in bf16 or in fp32."""
    return "Muon" if isinstance(optimizer, torch.optim.Muon) else type(optimizer).__name__


def test_both_optimisers_follow_the_schedule():
    seen = []
    settings = replace(SHORT, muon_learning_rate=0.04, final=0.5)
    with before_each_step(lambda optimizer: seen.append((kind_of(optimizer), optimizer.param_groups[0]["lr"]))):
        train(tiny_model("llama"), ROWS, settings)
    shares = [settings.rate(step, 6) for step in range(6)]
    assert [rate for name, rate in seen if name == "AdamW"] == pytest.approx([1e-2 * share for share in shares])
    assert [rate for name, rate in seen if name == "Muon"] == pytest.approx([0.04 * share for share in shares])


def test_the_number_of_steps():
    assert TrainingSettings(epochs=1.5, batch_size=4).n_steps(10) == 4  # 15 rows
    assert TrainingSettings(epochs=1, batch_size=8).n_steps(3) == 1
    assert TrainingSettings(epochs=9, steps=7).n_steps(10) == 7


# Precision.


def test_bf16_computes_in_bf16_and_keeps_weights_and_moments_in_fp32():
    exact = train(tiny_model("llama"), ROWS, SHORT)
    model, types = tiny_model("llama"), set()
    model.anatomy.value_matrices[0].register_forward_hook(lambda _module, _inputs, output: types.add(output.dtype))
    with before_each_step(
        lambda optimizer: types.update(
            value.dtype for moments in optimizer.state.values() for key, value in moments.items() if key != "step"
        )
    ):
        train(model, ROWS, replace(SHORT, precision="bf16"))  # and after a training in fp32 in the same process
    assert types == {torch.bfloat16, torch.float32}
    assert {value.dtype for value in model.network.parameters()} == {torch.float32}
    far = max(
        (a - b).abs().max().item() for a, b in zip(exact.network.parameters(), model.network.parameters(), strict=True)
    )
    assert 0 < far < 0.1


# Who trains what.


def shared_out(model: LanguageModel, settings: TrainingSettings) -> dict[str, list[str]]:
    """The parameters' names by the optimiser (and decay) that has them."""
    names = {id(value): name for name, value in model.network.named_parameters()}
    found = {}
    for optimizer in build_optimizers(model, settings):
        for group in optimizer.param_groups:
            owner = f"{kind_of(optimizer)} {group['weight_decay']:g}"
            found.setdefault(owner, []).extend(names[id(value)] for value in group["params"])
    everything = [name for owned in found.values() for name in owned]
    assert sorted(everything) == sorted(names.values())  # each once, a tied matrix too
    return found


MUON = replace(SHORT, muon_learning_rate=0.02, weight_decay=0.1)


@pytest.mark.parametrize(
    ("family", "changes", "matrices"),
    [
        ("llama", {}, "self_attn.[qkvo]_proj.weight mlp.gate_proj.weight mlp.up_proj.weight mlp.down_proj.weight"),
        ("llama", {"tie_word_embeddings": True}, "self_attn.[qkvo]_proj.weight mlp.(gate|up|down)_proj.weight"),
        ("gpt2", {}, "attn.c_attn.weight attn.c_proj.weight mlp.c_fc.weight mlp.c_proj.weight"),
        ("gpt_neox", {}, "attention.(query_key_value|dense).weight mlp.dense_(h_to_4h|4h_to_h).weight"),
        ("olmoe", {}, "self_attn.[qkvo]_proj.weight"),
    ],
)
def test_muon_takes_the_blocks_linear_layers_and_nothing_else(family, changes, matrices):
    found = shared_out(tiny_model(family, **changes), MUON)
    pattern = r"\S+\.\d\.(" + "|".join(matrices.replace(".", r"\.").split()) + ")"
    every = [name for owned in found.values() for name in owned]
    assert sorted(found["Muon 0.1"]) == sorted(name for name in every if re.fullmatch(pattern, name))
    assert not [name for name in found["Muon 0.1"] if re.search("embed|wte|wpe|head|norm|ln_|bias|router", name)]
    assert all(re.search("norm|ln_|bias", name) for name in found["AdamW 0"])
    assert not [name for name in found["AdamW 0.1"] if re.search("norm|ln_|bias", name)]


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_without_muon_adamw_takes_everything_and_decays_only_matrices(family):
    model = tiny_model(family)
    shapes = {name: value.ndim for name, value in model.network.named_parameters()}
    found = shared_out(model, SHORT)
    assert set(found) == {"AdamW 0.1", "AdamW 0"}
    assert {shapes[name] for name in found["AdamW 0.1"]} == {2}
    assert {shapes[name] for name in found["AdamW 0"]} == {1}


# What cannot go on.


def test_a_loss_that_is_not_finite_stops_in_one_line_and_leaves_nothing(tmp_path):
    settings = replace(SHORT, steps=50, learning_rate=1e30, schedule="constant")
    with pytest.raises(TrainingError) as error:
        train(tiny_model("llama"), ROWS, settings, checkpoint=tmp_path / "state", checkpoint_every=1)
    message = str(error.value)
    assert re.match(r"step \d+ of 50: the loss is \S+, its gradient's norm nan;", message) and "\n" not in message
    assert message.endswith("Lower the learning rate (its peak is 1e+30)")
    assert list(tmp_path.iterdir()) == []


def test_a_gradient_that_is_not_finite_never_reaches_the_weights():
    model = tiny_model("llama")
    before = model.weights_hash()
    weight = model.anatomy.value_matrices[1].weight
    handle = weight.register_hook(lambda gradient: gradient * torch.inf)
    with pytest.raises(TrainingError, match=r"step 1 of 1: the loss is 4\.\d+, its gradient's norm (nan|inf)"):
        train(model, ROWS, replace(MUON, steps=1))
    handle.remove()
    assert model.weights_hash() == before


def test_nothing_to_train_on_is_said_so():
    with pytest.raises(TrainingError, match="there is nothing to train on"):
        train(tiny_model("llama"), [], SHORT)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("batch_size", 0),
        ("epochs", -1.0),
        ("steps", 0),
        ("learning_rate", 0.0),
        ("learning_rate", math.nan),
        ("muon_learning_rate", -1.0),
        ("clip", -0.5),
    ],
)
def test_a_setting_that_makes_no_sense_is_named(name, value):
    with pytest.raises(SpecError, match=f"^training: {name} is {value}; it must be above 0$"):
        TrainingSettings(**{name: value})


# Interrupted and started again.


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("llama", {}),
        ("gpt2", {}),  # with dropout
        ("llama", {"muon_learning_rate": 0.02}),
        ("gpt2", {"muon_learning_rate": 0.02, "precision": "bf16", "schedule": "cosine"}),
        ("llama", {"tie_word_embeddings": True}),
    ],
)
def test_an_interrupted_run_ends_with_the_same_bytes(family, changes, tmp_path):
    model_changes = {key: changes.pop(key) for key in list(changes) if key == "tie_word_embeddings"}
    settings, folder = replace(SHORT, steps=11, **changes), tmp_path / "state"
    whole = train(tiny_model(family, **model_changes), ROWS, settings).weights_hash()
    done = []

    def interrupt(optimizer):
        if isinstance(optimizer, torch.optim.AdamW):
            done.append(optimizer)
        if len(done) == 9:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), before_each_step(interrupt):
        train(tiny_model(family, **model_changes), ROWS, settings, checkpoint=folder, checkpoint_every=3)
    assert [path.name for path in tmp_path.iterdir()] == ["state"]
    done.clear()
    with before_each_step(lambda optimizer: done.append(type(optimizer).__name__)):
        again = train(tiny_model(family, **model_changes), ROWS, settings, checkpoint=folder, checkpoint_every=3)
    assert done.count("AdamW") == 11 - 6  # on from the checkpoint of step 6
    assert again.weights_hash() == whole
    assert list(tmp_path.iterdir()) == []


def test_a_run_that_is_interrupted_by_its_report_goes_on_too(tmp_path):
    settings = replace(SHORT, steps=4000)

    def interrupt(step, n_steps, note):
        assert 0 < step < n_steps == 4000 and reported_loss(note) > 0
        raise RuntimeError("enough")

    with pytest.raises(RuntimeError, match="enough"):
        train(tiny_model("llama"), ROWS, settings, checkpoint=tmp_path / "state", checkpoint_every=1, report=interrupt)
    assert (tmp_path / "state").exists()


@pytest.mark.parametrize("other", [{"seed": 1}, {"learning_rate": 2e-2}, {"steps": 12}])
def test_another_runs_checkpoint_is_not_taken_up(other, tmp_path):
    settings, folder = replace(SHORT, steps=11), tmp_path / "state"
    done = []

    def interrupt(optimizer):
        done.append(optimizer)
        if len(done) == 6:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), before_each_step(interrupt):
        train(tiny_model("llama"), ROWS, settings, checkpoint=folder, checkpoint_every=2)
    changed = replace(settings, **other)
    assert hash_after(changed, checkpoint=folder) == hash_after(changed)


# Several processes.

SCRIPT = """
import sys, torch
from safetensors.torch import save_file
from tiny_families import tiny_model, tiny_rows
from palimpsest.errors import TrainingError
from palimpsest.models.training import TrainingSettings, train

torch.set_num_threads(1)
rows = tiny_rows(9, 4, 12, 7, 5, 10, 3, 8, 11, 6)
settings = TrainingSettings(steps=6, batch_size=5, learning_rate=1e-2, warmup=2)
model = train(tiny_model("llama"), rows, settings)
if torch.distributed.get_rank() == 0:
    save_file(dict(model.network.named_parameters()), sys.argv[1])
try:
    train(tiny_model("llama"), rows, TrainingSettings(batch_size=1))
except TrainingError as error:
    assert str(error).startswith("a batch of 1 rows cannot be shared out to 2 processes"), error
else:
    raise AssertionError("a batch of one row was shared out")
torch.distributed.destroy_process_group()
"""


@pytest.mark.slow
def test_two_processes_end_with_the_weights_of_one(tmp_path):
    script, weights = tmp_path / "script.py", tmp_path / "weights.safetensors"
    script.write_text(SCRIPT)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    path = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    # No accelerator for the children, so that they meet through gloo.
    environment = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    subprocess.run([*launch, str(script), str(weights)], env=environment, check=True, timeout=300)
    one = train(tiny_model("llama"), ROWS, replace(SHORT, batch_size=5))
    two = load_file(weights)
    far = {name: (value - two[name]).abs().max().item() for name, value in one.network.named_parameters()}
    assert max(far.values()) < 1e-5, far
