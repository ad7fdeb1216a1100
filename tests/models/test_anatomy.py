import copy
import dataclasses
from contextlib import contextmanager

import pytest
import torch
from tiny_families import DENSE, EXPERT, FAMILIES, INNER, LAYERS, VOCABULARY, WIDTH, n_hooks, tiny
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from palimpsest.errors import ModelError
from palimpsest.models import checks, families
from palimpsest.models.anatomy import Anatomy, Site
from palimpsest.models.hooks import Patch

VARIANTS = [
    ("llama", {"tie_word_embeddings": True}),
    ("llama", {"num_hidden_layers": 1}),
    ("llama", {"mlp_bias": True, "attention_bias": True}),
    ("gpt2", {"tie_word_embeddings": False}),
    ("stablelm", {"use_parallel_residual": True}),
    ("gpt_neox", {"use_parallel_residual": False}),
    ("gpt_neox", {"tie_word_embeddings": True}),
    ("falcon", {"new_decoder_architecture": True, "num_kv_heads": 1}),
    ("falcon", {"parallel_attn": False, "alibi": True, "bias": True}),
    ("gemma2", {"final_logit_softcapping": None}),
]


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_passes_its_self_checks(family):
    network = tiny(family)
    Anatomy.of(network).check(network)


@pytest.mark.parametrize(("family", "changes"), VARIANTS)
def test_variants_of_a_family_pass_too(family, changes):
    network = tiny(family, **changes)
    Anatomy.of(network).check(network)


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2", "opt", "olmoe"])
def test_bf16_passes_too(family):
    network = tiny(family).to(torch.bfloat16)
    Anatomy.of(network).check(network)


def test_the_table_and_the_tests_name_the_same_families():
    assert sorted(families.FAMILIES) == sorted(FAMILIES)
    assert len(DENSE) == 23 and len(EXPERT) == 3


@pytest.mark.parametrize("family", FAMILIES)
def test_sizes_and_modules(family):
    network = tiny(family)
    anatomy = Anatomy.of(network)
    assert (anatomy.n_layers, anatomy.d_model) == (LAYERS, WIDTH)
    assert anatomy.embedding is network.get_input_embeddings()
    assert anatomy.unembedding is network.get_output_embeddings()
    assert tuple(anatomy.unembedding.weight.shape) == (VOCABULARY, WIDTH)
    parameters = {id(parameter) for parameter in network.parameters()}
    assert len(set(anatomy.attention_outputs)) == len(set(anatomy.blocks)) == LAYERS
    assert all(id(module.weight) in parameters for module in anatomy.attention_outputs)
    if family in DENSE:
        assert len(set(anatomy.value_matrices)) == LAYERS
        assert anatomy.d_ff == (4 * WIDTH if family == "bloom" else INNER)
        assert anatomy.value_vectors(1).shape == (anatomy.d_ff, WIDTH)


@pytest.mark.parametrize("family", FAMILIES)
def test_tied_means_that_changing_the_embedding_changes_the_unembedding(family):
    network = tiny(family)
    anatomy = Anatomy.of(network)
    before = anatomy.unembedding.weight.detach().clone()
    with torch.no_grad():
        anatomy.embedding.weight.add_(1.0)
    assert anatomy.tied == (not torch.equal(anatomy.unembedding.weight, before))
    assert anatomy.tied == bool(network.config.tie_word_embeddings)


def test_gpt2_value_vectors_are_the_rows_of_its_conv1d():
    anatomy = Anatomy.of(tiny("gpt2"))
    assert isinstance(anatomy.value_matrices[0], Conv1D)
    assert anatomy.value_vectors(0).data_ptr() == anatomy.value_matrices[0].weight.data_ptr()
    assert torch.equal(anatomy.value_vectors(0)[3], anatomy.value_matrices[0].weight[3])
    llama = Anatomy.of(tiny("llama"))
    assert torch.equal(llama.value_vectors(0)[3], llama.value_matrices[0].weight[:, 3])


def test_known_scales_and_caps_of_the_logits():
    assert Anatomy.of(tiny("granite")).logit_scale == pytest.approx(1 / 3)
    assert Anatomy.of(tiny("cohere")).logit_scale == 0.25
    assert Anatomy.of(tiny("gemma2")).logit_cap == 2.0
    assert Anatomy.of(tiny("llama")).logit_scale == 1.0
    assert Anatomy.of(tiny("llama")).logit_cap is None


# What is refused.


@pytest.mark.parametrize("family", EXPERT)
@pytest.mark.parametrize("kind", ["mlp", "coef"])
def test_fused_experts_have_no_value_matrix(family, kind):
    anatomy = Anatomy.of(tiny(family))
    assert anatomy.kinds == ("resid", "attn")
    assert {site.kind for site in anatomy.sites()} == {"resid", "attn"}
    for ask in (lambda: anatomy.module(Site(kind, 1)), lambda: anatomy.value_vectors(1)):
        with pytest.raises(ModelError, match=f"experts of a {family} are fused"):
            ask()
    with pytest.raises(ModelError, match="fused"):
        _ = anatomy.d_ff


@pytest.mark.parametrize("layer", [-2, LAYERS])
def test_a_layer_that_is_not_there_is_refused(layer):
    with pytest.raises(ModelError, match="has layers 0 to 2"):
        Anatomy.of(tiny("llama")).module(Site("resid", layer))


def test_an_unknown_architecture_is_refused_by_name():
    config = AutoConfig.for_model("mamba", vocab_size=16, hidden_size=8, num_hidden_layers=1, state_size=4)
    network = AutoModelForCausalLM.from_config(config)
    with pytest.raises(ModelError, match=r"'mamba' \(MambaForCausalLM\) is not known; known are bloom, ") as error:
        Anatomy.of(network)
    assert "\n" not in str(error.value)


def test_a_network_without_a_head_is_refused():
    body = AutoModel.from_config(tiny("llama").config)
    with pytest.raises(ModelError, match="LlamaModel"):
        Anatomy.of(body)


def test_an_opt_without_final_norm_is_refused():
    with pytest.raises(ModelError, match=r"no model\.decoder\.final_layer_norm"):
        Anatomy.of(tiny("opt", do_layer_norm_before=False))


# The checks can fail: each is shown a network, an anatomy or a tool that is wrong in its own way.


def swapped(modules):
    return (modules[1], modules[0], *modules[2:])


def assert_fails(anatomy, network, reason):
    with pytest.raises(ModelError, match=reason) as error:
        anatomy.check(network)
    assert "\n" not in str(error.value)
    assert n_hooks(network) == 0


@pytest.mark.parametrize("family", FAMILIES)
def test_a_wrong_place_is_found_in_every_family(family):
    network = tiny(family)
    anatomy = Anatomy.of(network)
    wrong = [
        {"attention_outputs": swapped(anatomy.attention_outputs)},
        {"blocks": swapped(anatomy.blocks)},
        {"blocks": anatomy.blocks[:-1]},
        {"final_norm": copy.deepcopy(anatomy.final_norm)},
        {
            "final_norm": next(
                module for name, module in anatomy.blocks[0].named_modules() if "norm" in name or "ln" in name
            )
        },
    ]
    if anatomy.value_matrices:
        wrong += [
            {"value_matrices": swapped(anatomy.value_matrices)},
            {"value_matrices": anatomy.attention_outputs, "attention_outputs": anatomy.value_matrices},
        ]
    for parts in wrong:
        assert_fails(dataclasses.replace(anatomy, **parts), network, "self-check 0, the place of each part")


@pytest.mark.parametrize("family", FAMILIES)
def test_a_wrong_scale_of_the_logits_is_found_in_every_family(family):
    network = tiny(family)
    anatomy = Anatomy.of(network)
    wrong = dataclasses.replace(anatomy, logit_scale=anatomy.logit_scale * 1.01)
    assert_fails(wrong, network, "self-check 4, unembedding the last block: relative difference 0.0")


def test_a_forgotten_cap_is_found():
    network = tiny("gemma2")
    assert_fails(dataclasses.replace(Anatomy.of(network), logit_cap=None), network, "self-check 4")


def test_a_wrong_unembedding_is_found():
    network = tiny("llama")
    anatomy = Anatomy.of(network)
    other = copy.deepcopy(anatomy.unembedding)
    other.weight.data[0] += 0.01
    real = anatomy.unembedding
    # It says it is used (it is called beside the real one) and still does not make the logits.
    handle = real.register_forward_hook(lambda _, inputs, output: (other(inputs[0]), output)[1])
    with pytest.raises(ModelError, match="self-check 4"):
        dataclasses.replace(anatomy, unembedding=other).check(network)
    handle.remove()


def test_a_value_matrix_read_the_wrong_way_round_is_found(monkeypatch):
    network = tiny("llama", intermediate_size=WIDTH)
    anatomy = Anatomy.of(network)
    anatomy.check(network)
    monkeypatch.setattr(Anatomy, "value_vectors", lambda self, layer: self.value_matrices[layer].weight)
    assert_fails(anatomy, network, "self-check 3, value matrix of layer 0")


def test_activations_put_in_the_wrong_place_are_found(monkeypatch):
    network = tiny("llama")
    monkeypatch.setattr(
        Patch, "of", staticmethod(lambda values, positions: Patch(positions, values[positions].flip(0)))
    )
    assert_fails(Anatomy.of(network), network, "self-check 1, patching resid with itself")


def test_plans_stacked_in_the_wrong_order_are_found(monkeypatch):
    network = tiny("llama")
    real = checks.stacked
    monkeypatch.setattr(checks, "stacked", lambda plans: real([*plans[:-2], plans[-1], plans[-2]]))
    assert_fails(Anatomy.of(network), network, "self-check 2, patching attn of layer 0 and coef of layer 2 in a stack")


def test_a_patch_that_does_nothing_is_found(monkeypatch):
    @contextmanager
    def idle(anatomy, patches):
        yield

    network = tiny("llama")
    monkeypatch.setattr(checks, "patched", idle)
    assert_fails(Anatomy.of(network), network, "the logits did not change at all")


def test_a_patch_that_writes_into_a_weight_is_found(monkeypatch):
    network = tiny("llama")
    real = checks.patched

    @contextmanager
    def careless(anatomy, patches):
        with real(anatomy, patches):
            yield
        anatomy.final_norm.weight.mul_(1.0)  # the same numbers, written again

    monkeypatch.setattr(checks, "patched", careless)
    assert_fails(Anatomy.of(network), network, "self-check 5")


def test_a_hook_left_behind_is_found(monkeypatch):
    network = tiny("llama")
    real = checks.patched

    @contextmanager
    def careless(anatomy, patches):
        anatomy.final_norm.register_forward_hook(lambda *_: None)
        with real(anatomy, patches):
            yield

    monkeypatch.setattr(checks, "patched", careless)
    with pytest.raises(ModelError, match="self-check 5"):
        Anatomy.of(network).check(network)


def test_reading_hidden_states_after_the_final_norm_is_found(monkeypatch):
    network = tiny("llama")
    real = checks.capturing

    @contextmanager
    def output_hidden_states(anatomy, sites, shape):
        with real(anatomy, sites, shape) as store:
            yield store
        last = Site("resid", anatomy.n_layers - 1)
        store[last] = torch.nn.functional.rms_norm(store[last], (WIDTH,), anatomy.final_norm.weight, 1e-6)

    monkeypatch.setattr(checks, "capturing", output_hidden_states)
    assert_fails(Anatomy.of(network), network, "self-check 6, reading before the final norm")


def test_a_weight_that_is_not_a_number_is_found():
    network = tiny("llama")
    network.model.layers[1].mlp.down_proj.weight.data[0, 0] = float("nan")
    assert_fails(Anatomy.of(network), network, "relative difference nan")


# The checks themselves leave no trace and cost four passes.


@pytest.mark.parametrize("family", FAMILIES)
def test_checking_changes_nothing(family):
    network = tiny(family).train()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    random_state = torch.get_rng_state()
    passes = []
    counter = network.register_forward_pre_hook(lambda *_: passes.append(1))
    Anatomy.of(network).check(network)
    counter.remove()
    assert network.training and all(module.training for module in network.modules())
    assert n_hooks(network) == 0
    assert torch.equal(torch.get_rng_state(), random_state)
    after = network.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    assert len(passes) == 4
