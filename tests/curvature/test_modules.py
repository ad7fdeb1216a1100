"""Which matrices have curvature, how they look as [out, in], and which of them read the same inputs."""

import numpy as np
import pytest
import torch
from tests.curvature.dense_fisher import fit_factors, relative, small_model, small_rows
from tests.models.tiny_families import EXPERT, FAMILIES, tiny_model
from torch import nn
from transformers.pytorch_utils import Conv1D

from palimpsest.curvature.modules import Matrix, matrices, shared_inputs
from palimpsest.errors import ModelError

LLAMA_READS = [
    {"self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"},
    {"self_attn.o_proj"},
    {"mlp.gate_proj", "mlp.up_proj"},
    {"mlp.down_proj"},
]


@pytest.mark.parametrize("kind", ["linear", "conv1d"])
@pytest.mark.parametrize("bias", [True, False])
def test_a_matrix_maps_inputs_with_a_last_one_to_outputs(kind: str, bias: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    module = nn.Linear(3, 5, bias) if kind == "linear" else Conv1D(5, 3)
    if not bias:
        module.bias = None
    for parameter in module.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator)
    matrix = Matrix("part", module)
    tensors = {f"part.{name}": parameter.detach() for name, parameter in module.named_parameters()}
    inputs = torch.randn(4, 3, generator=generator)
    if kind == "linear" or bias:  # transformers' Conv1D cannot do without a bias
        weight = matrix.gather(tensors)
        assert weight.shape == matrix.shape == (5, 3 + bias)
        read = np.concatenate([inputs.numpy(), np.ones((4, 1))], 1) if bias else inputs.numpy()
        np.testing.assert_allclose(read @ weight.numpy().T, module(inputs).detach(), rtol=1e-5, atol=1e-6)
    assert matrix.parameter_names == tuple(tensors)
    back = matrix.scatter(matrix.gather(tensors))
    assert back.keys() == tensors.keys()
    assert all(torch.equal(back[name], tensors[name]) for name in tensors)


def test_all_linear_maps_of_the_blocks_and_no_other_are_taken() -> None:
    llama, gpt2 = matrices(small_model("llama")), matrices(small_model("gpt2"))
    parts = set().union(*LLAMA_READS)
    assert {matrix.name for matrix in llama} == {f"model.layers.{layer}.{part}" for layer in range(2) for part in parts}
    assert [matrix.name for matrix in gpt2] == [
        f"transformer.h.{layer}.{part}"
        for layer in range(2)
        for part in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    ]
    assert [matrix.shape for matrix in gpt2[:4]] == [(24, 9), (8, 9), (12, 9), (8, 13)]


def test_patterns_choose_in_the_networks_order_and_each_must_match() -> None:
    model = small_model("llama")
    chosen = [matrix.name for matrix in matrices(model, ["*.down_proj", "model.layers.0.mlp.*", "*.down_proj"])]
    layer = "model.layers.{}.mlp.{}_proj"
    assert chosen == [layer.format(0, "gate"), layer.format(0, "up"), layer.format(0, "down"), layer.format(1, "down")]
    for pattern in ("*.c_fc", "lm_head", "model.embed_tokens", "*.DOWN_PROJ"):
        with pytest.raises(ModelError, match=r"matches none of its 14 linear maps \(e.g. model.layers.0") as error:
            matrices(model, ["*", pattern])
        assert repr(pattern) in str(error.value) and "\n" not in str(error.value)


def test_shared_weights_are_refused_by_name_but_a_tied_unembedding_is_no_matter() -> None:
    tied = small_model("gpt2")
    assert tied.anatomy.tied and len(matrices(tied)) == 8

    weight_only = small_model("llama")
    first, second = (block.mlp.up_proj for block in weight_only.anatomy.blocks)
    second.weight = first.weight
    whole_module = small_model("llama")
    whole_module.anatomy.blocks[1].mlp.up_proj = whole_module.anatomy.blocks[0].mlp.up_proj
    for model in (weight_only, whole_module):
        with pytest.raises(ModelError, match=r"layers.0.mlp.up_proj.weight and model.layers.1.mlp.up_proj.weight are"):
            matrices(model)
        assert len(matrices(model, ["*.self_attn.*"])) == 8


def test_query_key_and_value_read_one_tensor_and_so_do_gate_and_up() -> None:
    model = small_model("llama")
    owners = shared_inputs(model, matrices(model))
    for layer in range(2):
        prefix = f"model.layers.{layer}."
        readers: dict[str, set[str]] = {}
        for name, owner in owners.items():
            if name.startswith(prefix):
                readers.setdefault(owner, set()).add(name.removeprefix(prefix))
        assert sorted(readers.values(), key=sorted) == sorted(LLAMA_READS, key=sorted)
        assert all(owner.removeprefix(prefix) in group for owner, group in readers.items())
    assert len(owners) == 14 and len(set(owners.values())) == 8


def test_an_input_with_a_constant_is_not_shared_with_one_without() -> None:
    model = small_model("llama")
    with torch.no_grad():
        for block in model.anatomy.blocks:
            block.self_attn.k_proj.bias = nn.Parameter(torch.randn(block.self_attn.k_proj.out_features).double())
    _, owners, factors = fit_factors(model, small_rows())
    name = "model.layers.0.self_attn.{}_proj"
    assert owners[name.format("v")] == name.format("q") and owners[name.format("k")] == name.format("k")
    with_constant, without = factors.inputs[name.format("k")], factors.inputs[name.format("q")]
    assert torch.equal(with_constant[:-1, :-1], without) and with_constant[-1, -1] == 1


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_shared_is_what_each_would_have_measured_alone(family: str) -> None:
    """Also where a family defines its matrices in one order and calls them in another, as OPT, GPT-J and GPT-Neo do."""
    model, rows = tiny_model(family), small_rows()
    if family not in EXPERT:  # grouped products have no float64
        model.network.double()
    chosen, owners, together = fit_factors(model, rows)
    places = {matrix.name: place for place, matrix in enumerate(chosen)}
    assert all(places[owner] <= places[name] and owners[owner] == owner for name, owner in owners.items())
    assert together.inputs.keys() == set(owners.values())
    for matrix in chosen[: len(chosen) // model.anatomy.n_layers]:
        _, _, alone = fit_factors(model, rows, [matrix.name])
        assert relative(together.inputs[owners[matrix.name]], alone.inputs[matrix.name]) < 1e-12
