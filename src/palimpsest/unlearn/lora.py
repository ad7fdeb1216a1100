"""Low-rank factors beside the linear maps: a run may train them in place of the weights."""

import math
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from palimpsest.errors import SpecError
from palimpsest.models.language_model import LanguageModel
from palimpsest.unlearn.weights import only_these_change

A, B, OFF = "lora_A", "lora_B", "lora_off"
"""A module's factors, and the mark that it does without them for now."""


@contextmanager
def low_rank(
    model: LanguageModel, names: Collection[str], rank: int, seed: int, *, method: str
) -> Iterator[dict[str, Tensor]]:
    """The only trainable parameters of the model, meanwhile: A [rank, in] and B [out, rank] beside each linear map.

    A map gives W x + B A x (LoRA, Hu et al. 2022, arXiv 2106.09685, section 4.1, its alpha equal to the rank). A is
    drawn as a linear map's weight is, from the seed; B is 0, so the model begins as it was. The weights themselves
    never change. The unembedding has no factors.

    Args:
        model: the model.
        names: of the parameters that may change; those that are no linear map's weight stay as they are.
        rank: of each product, at most.
        seed: of the draw.
        method: whose run this is, for people.

    Raises:
        SpecError: none of the parameters is a linear map's weight.
    """
    maps = _linear_maps(model, names)
    if not maps:
        raise SpecError(f"{method}: nothing that it may change is a linear map, so it has no use for a rank")
    generator = torch.Generator().manual_seed(seed)
    with only_these_change(model, ()), ExitStack() as attached:
        for module in maps.values():
            weight: Tensor = module.get_parameter("weight")
            n_in, n_out = weight.shape if isinstance(module, Conv1D) else reversed(weight.shape)
            bound = 1 / math.sqrt(n_in)
            a = torch.empty(rank, n_in).uniform_(-bound, bound, generator=generator)
            module.register_parameter(A, nn.Parameter(a.to(weight)))
            module.register_parameter(B, nn.Parameter(weight.new_zeros(n_out, rank)))
            attached.callback(_detach, module, module.register_forward_hook(_add_product))
        live = dict(model.network.named_parameters())
        yield {f"{name}.{factor}": live[f"{name}.{factor}"] for name in maps for factor in (A, B)}


def merged(model: LanguageModel, factors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What the factors add to each weight, as it is stored; those that add nothing are left out."""
    changes: dict[str, Tensor] = {}
    for name in (name.removesuffix(f".{B}") for name in factors if name.endswith(f".{B}")):
        product = (factors[f"{name}.{B}"].detach().float() @ factors[f"{name}.{A}"].detach().float()).cpu()
        transposed = isinstance(model.network.get_submodule(name), Conv1D)  # [in, out], where a Linear has [out, in]
        if product.any():
            changes[f"{name}.weight"] = product.T.contiguous() if transposed else product
    return changes


def frozen_start(model: LanguageModel) -> Callable[[], AbstractContextManager[LanguageModel]]:
    """Opens the model as it is before the first step, without gradients or dropout, whatever has become of it since.

    Where it has factors it is the model itself without them, else a copy.
    """
    if any(A in module._parameters for module in model.network.modules()):
        return lambda: _without_factors(model)
    start = model.copy()
    start.network.requires_grad_(False)

    @contextmanager
    def opened() -> Iterator[LanguageModel]:
        with torch.no_grad():
            yield start

    return opened


@contextmanager
def _without_factors(model: LanguageModel) -> Iterator[LanguageModel]:
    modules = [module for module in model.network.modules() if A in module._parameters]
    was_training = model.network.training
    model.network.eval()
    for module in modules:
        setattr(module, OFF, True)
    try:
        with torch.no_grad():
            yield model
    finally:
        for module in modules:
            delattr(module, OFF)
        model.network.train(was_training)


def _linear_maps(model: LanguageModel, names: Collection[str]) -> dict[str, nn.Module]:
    owners = (name.removesuffix(".weight") for name in names if name.endswith(".weight"))
    modules = {name: model.network.get_submodule(name) for name in owners}
    return {
        name: module
        for name, module in modules.items()
        if isinstance(module, nn.Linear | Conv1D) and module is not model.anatomy.unembedding
    }


# A function, not a closure over the factors: it finds those of the module that it is called for, in a copy the copy's.
def _add_product(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
    if hasattr(module, OFF):
        return output
    return output + inputs[0] @ module.get_parameter(A).T @ module.get_parameter(B).T


def _detach(module: nn.Module, handle: torch.utils.hooks.RemovableHandle) -> None:
    handle.remove()
    delattr(module, A)
    delattr(module, B)
