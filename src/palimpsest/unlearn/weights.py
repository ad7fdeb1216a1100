"""A network's weights by name: which may change, a copy of them, and putting values back."""

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor

from palimpsest.models.language_model import LanguageModel


def trainable(model: LanguageModel) -> dict[str, Tensor]:
    """The parameters that may change: the live ones, not copies."""
    return {name: value for name, value in model.network.named_parameters() if value.requires_grad}


def copied(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Detached copies."""
    return {name: value.detach().clone() for name, value in tensors.items()}


def put(parameters: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> None:
    """Write values into live parameters."""
    with torch.no_grad():
        for name, value in values.items():
            parameters[name].copy_(value)


@contextmanager
def only_these_change(model: LanguageModel, names: Collection[str]) -> Iterator[None]:
    """Every other parameter is frozen meanwhile, so that no gradient is computed for it."""
    was = {name: parameter.requires_grad for name, parameter in model.network.named_parameters()}
    for name, parameter in model.network.named_parameters():
        parameter.requires_grad_(name in names)
    try:
        yield
    finally:
        for name, parameter in model.network.named_parameters():
            parameter.requires_grad_(was[name])
