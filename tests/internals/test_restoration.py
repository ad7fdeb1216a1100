"""Restored matrices: which they are, that every bit is put back, and what restoring them recovers."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from tests.internals.pairs import SOME, hooks_and_forwards, pair
from tests.models.tiny_families import DENSE, EXPERT, LAYERS, tiny_batch, tiny_model, tiny_rows
from torch import Tensor

from palimpsest.errors import ModelError
from palimpsest.internals.restoration import (
    IN_BLOCKS,
    Group,
    Restoration,
    matrices_of,
    restoration_recovery,
    restoration_windows,
    restored,
)
from palimpsest.models.inputs import forward_inputs
from palimpsest.models.language_model import LanguageModel

GROUPS: tuple[Group, ...] = (*IN_BLOCKS, "embedding", "unembedding")
EVERYTHING = Restoration(frozenset(GROUPS), tuple(range(LAYERS)))


def state(model: LanguageModel) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.network.state_dict().items()}


@contextmanager
def left_as_it_was(model: LanguageModel) -> Iterator[None]:
    """Weights to the last bit, the storages they lie in, ties, and hooks."""
    before, where = state(model), {name: value.data_ptr() for name, value in model.network.named_parameters()}
    fingerprint, left = model.fingerprint(), hooks_and_forwards(model)
    yield
    for name, value in model.network.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert {name: value.data_ptr() for name, value in model.network.named_parameters()} == where
    assert model.fingerprint() == fingerprint and hooks_and_forwards(model) == left


def changed(model: LanguageModel, before: dict[str, Tensor]) -> set[str]:
    """The names, from the block or the network on, of weights that are not as they were."""
    names = {name for name, value in model.network.state_dict().items() if not torch.equal(value, before[name])}
    return {name.split(".1.", 1)[-1].removesuffix(".weight").removesuffix(".bias") for name in names}


# Which matrices.


@pytest.mark.parametrize(
    ("family", "expected"),
    [
        ("llama", ({"mlp.down_proj"}, {"mlp.gate_proj", "mlp.up_proj"}, {f"self_attn.{w}_proj" for w in "qkvo"})),
        ("phi3", ({"mlp.down_proj"}, {"mlp.gate_up_proj"}, {"self_attn.qkv_proj", "self_attn.o_proj"})),
        ("gpt2", ({"mlp.c_proj"}, {"mlp.c_fc"}, {"attn.c_attn", "attn.c_proj"})),
        ("opt", ({"fc2"}, {"fc1"}, {f"self_attn.{w}_proj" for w in ("q", "k", "v", "out")})),
        ("gpt_neo", ({"mlp.c_proj"}, {"mlp.c_fc"}, {f"attn.attention.{w}_proj" for w in ("q", "k", "v", "out")})),
        (
            "gpt_neox",
            ({"mlp.dense_4h_to_h"}, {"mlp.dense_h_to_4h"}, {"attention.query_key_value", "attention.dense"}),
        ),
        # The norms of queries and keys are no matrices.
        ("qwen3", ({"mlp.down_proj"}, {"mlp.gate_proj", "mlp.up_proj"}, {f"self_attn.{w}_proj" for w in "qkvo"})),
    ],
)
def test_a_group_is_what_its_name_says(family: str, expected: tuple[set[str], ...]) -> None:
    original, unlearned = pair(family)
    before = state(unlearned)
    for group, names in zip(IN_BLOCKS, expected, strict=True):
        with restored(original, unlearned, Restoration(frozenset([group]), (1,))):
            assert changed(unlearned, before) == names


@pytest.mark.parametrize("family", DENSE)
def test_the_groups_of_a_block_are_all_its_matrices_once(family: str) -> None:
    anatomy = tiny_model(family).anatomy
    found = [module for group in IN_BLOCKS for module in matrices_of(anatomy, group, 1)]
    assert len(set(found)) == len(found)
    owned = {id(parameter) for module in found for parameter in module.parameters()}
    left = [(n, p) for n, p in anatomy.blocks[1].named_parameters() if id(p) not in owned]
    assert all("norm" in name or "ln_" in name or "layernorm" in name for name, _ in left)


@pytest.mark.parametrize("family", ["gpt2", "gemma2", "llama"])
def test_tied_embeddings_are_restored_as_one(family: str) -> None:
    original, unlearned = pair(family)
    tied = family != "llama"
    assert unlearned.anatomy.tied == tied
    before = state(unlearned)
    for group in ("embedding", "unembedding"):
        with restored(original, unlearned, Restoration(frozenset([group]))):
            assert unlearned.anatomy.tied == tied
            assert len(changed(unlearned, before)) == (2 if tied else 1)


# Everything is put back.


@pytest.mark.parametrize("family", SOME)
def test_inside_the_weights_are_the_originals_and_after_every_bit_is_as_before(family: str) -> None:
    original, unlearned = pair(family)
    with left_as_it_was(original), left_as_it_was(unlearned):
        with restored(original, unlearned, EVERYTHING):
            for group in GROUPS:
                for theirs, own in zip(
                    matrices_of(original.anatomy, group, 0), matrices_of(unlearned.anatomy, group, 0), strict=True
                ):
                    assert torch.equal(theirs.weight, own.weight)
                    assert theirs.weight.data_ptr() != own.weight.data_ptr()


@pytest.mark.parametrize("family", SOME)
def test_every_bit_is_put_back_when_something_fails_or_writes_inside(family: str) -> None:
    original, unlearned = pair(family)
    with left_as_it_was(original), left_as_it_was(unlearned):
        with pytest.raises(ZeroDivisionError), restored(original, unlearned, EVERYTHING):
            with torch.no_grad():
                for group in GROUPS:
                    for module in matrices_of(unlearned.anatomy, group, 0):
                        module.weight.zero_()
            _ = 1 / 0


@pytest.mark.parametrize("family", SOME)
def test_a_sweep_leaves_both_models_as_they_were(family: str) -> None:
    original, unlearned = pair(family)
    sweep = [one for group in IN_BLOCKS for one in restoration_windows(unlearned.anatomy, group, 1)]
    with left_as_it_was(original), left_as_it_was(unlearned):
        restoration_recovery(original, unlearned, tiny_rows(6, 5), sweep)
        broken = unlearned.anatomy.unembedding.register_forward_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            restoration_recovery(original, unlearned, tiny_rows(6, 5), sweep)
        broken.remove()


# What it recovers.


@pytest.mark.parametrize("family", SOME)
def test_scores_are_those_of_a_model_with_the_weights_copied_in(family: str) -> None:
    original, unlearned = pair(family)
    rows = tiny_rows(6, 5, 7, 4)
    sweep = [one for group in IN_BLOCKS for one in restoration_windows(unlearned.anatomy, group, 2)]
    sweep += [Restoration(frozenset([group])) for group in ("embedding", "unembedding")]
    sweep.append(Restoration(frozenset(["value", "attention"]), (1, 2)))
    batch = tiny_batch(6, 5, 7, 4)
    with torch.no_grad():
        goal = original.network(**forward_inputs(original.network, batch)).logits
    for restoration, recovery in zip(sweep, restoration_recovery(original, unlearned, rows, sweep), strict=True):
        twin = unlearned.copy()
        with torch.no_grad():
            for group in restoration.groups:
                for layer in restoration.layers or (0,):
                    for theirs, own in zip(
                        matrices_of(original.anatomy, group, layer),
                        matrices_of(twin.anatomy, group, layer),
                        strict=True,
                    ):
                        own.load_state_dict(theirs.state_dict())
            logits = twin.network(**forward_inputs(twin.network, batch)).logits
        for line, row in enumerate(rows):
            at = slice(row.start - 1, row.stop - 1)
            expected = (logits[line, at] - goal[line, at]).square().mean()
            torch.testing.assert_close(recovery.mse.after[line], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("group", IN_BLOCKS)
def test_restoring_what_unlearning_changed_recovers_everything_and_the_rest_nothing(group: Group) -> None:
    original, _ = pair("llama")
    unlearned = original.copy("unlearned")
    with torch.no_grad():
        for module in matrices_of(unlearned.anatomy, group, 1):
            module.weight.mul_(-0.5)
    sweep = [Restoration(frozenset([one]), (layer,)) for one in IN_BLOCKS for layer in range(LAYERS)]
    for restoration, recovery in zip(
        sweep, restoration_recovery(original, unlearned, tiny_rows(6, 5), sweep), strict=True
    ):
        expected = 1.0 if restoration == Restoration(frozenset([group]), (1,)) else 0.0
        assert recovery.krs == pytest.approx(expected, abs=1e-5)
        assert recovery.krs_kl == pytest.approx(expected, abs=1e-5)


def test_blocks_below_a_restoration_are_not_computed() -> None:
    anatomy = tiny_model("llama").anatomy
    assert [one.first_block(anatomy) for one in restoration_windows(anatomy, "value", 2)] == [0, 0, 1]
    assert Restoration(frozenset(["unembedding"])).first_block(anatomy) == LAYERS
    assert Restoration(frozenset(["unembedding"])).first_block(tiny_model("gpt2").anatomy) == 0
    assert Restoration(frozenset(["embedding", "value"]), (2,)).first_block(anatomy) == 0


# What is refused.


@pytest.mark.parametrize("family", EXPERT)
def test_the_mlps_of_a_mixture_are_refused_and_its_attention_is_not(family: str) -> None:
    original, unlearned = pair(family)
    for group in ("value", "mlp_in"):
        with (
            pytest.raises(ModelError, match=r"the experts of a \w+ are fused"),
            restored(original, unlearned, Restoration(frozenset([group]), (0,))),
        ):
            pytest.fail("the context was entered")
    before = state(unlearned)
    with restored(original, unlearned, Restoration(frozenset(["attention"]), (1,))):
        assert changed(unlearned, before) == {f"self_attn.{which}_proj" for which in "qkvo"}


def test_a_group_without_layers_and_models_not_built_alike_are_refused() -> None:
    _, unlearned = pair("llama")
    with pytest.raises(ModelError, match="a restoration of value in no layer"):
        Restoration(frozenset(["value", "embedding"]))
    with pytest.raises(ModelError, match="a restoration of nothing"):
        Restoration(frozenset(), (1,))
    with (
        pytest.raises(ModelError, match="give models of one architecture"),
        restored(tiny_model("gpt2"), unlearned, EVERYTHING),
    ):
        pytest.fail("the context was entered")
