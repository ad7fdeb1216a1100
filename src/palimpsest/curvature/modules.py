"""Which weight matrices have curvature, and how their parameters look as one matrix [out, in].

A matrix is one `Linear` or GPT-2 `Conv1D`; a bias is a last column, read by a constant 1 after the inputs. Embeddings,
norms and the unembedding are left alone (they are shared with other uses, or have no such structure).
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from palimpsest.data.batches import Batch
from palimpsest.errors import ModelError
from palimpsest.models.inputs import forward_inputs
from palimpsest.models.language_model import LanguageModel, evaluating


@dataclass(frozen=True, eq=False)
class Matrix:
    """One linear map of the network: y = W [x, 1]."""

    name: str
    """The module's name; its parameters are `name.weight` and, where there is one, `name.bias`."""
    module: nn.Module

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in), the bias's column counted."""
        rows, columns = self._weight.shape
        if isinstance(self.module, Conv1D):
            rows, columns = columns, rows
        return rows, columns + self.has_bias

    @property
    def has_bias(self) -> bool:
        """Whether the last column is a bias."""
        return getattr(self.module, "bias", None) is not None

    @property
    def parameter_names(self) -> tuple[str, ...]:
        """As `named_parameters` of the network has them."""
        return (f"{self.name}.weight", f"{self.name}.bias") if self.has_bias else (f"{self.name}.weight",)

    def gather(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """[out, in] from tensors that are named and shaped like parameters."""
        weight = tensors[f"{self.name}.weight"]
        matrix = weight.T if isinstance(self.module, Conv1D) else weight
        return torch.cat([matrix, tensors[f"{self.name}.bias"][:, None]], 1) if self.has_bias else matrix

    def scatter(self, matrix: Tensor) -> dict[str, Tensor]:
        """A matrix [out, in] as tensors that are named and shaped like parameters: what `gather` undoes."""
        weight = matrix[:, :-1] if self.has_bias else matrix
        tensors = {f"{self.name}.weight": weight.T if isinstance(self.module, Conv1D) else weight}
        return tensors | ({f"{self.name}.bias": matrix[:, -1]} if self.has_bias else {})

    @property
    def _weight(self) -> Tensor:
        weight: Any = self.module.weight
        return weight


def matrices(model: LanguageModel, patterns: Sequence[str] = ("*",)) -> tuple[Matrix, ...]:
    """The linear maps inside the model's blocks whose names match one of the patterns (`*.mlp.*`, say), in order.

    Raises:
        ModelError: a pattern that matches nothing, or a matrix that shares its weights with another module.
    """
    inside = {id(module) for block in model.anatomy.blocks for module in block.modules()}
    candidates = [
        Matrix(name, module)
        for name, module in model.network.named_modules()
        if id(module) in inside and isinstance(module, nn.Linear | Conv1D)
    ]
    for pattern in patterns:
        if not any(fnmatchcase(candidate.name, pattern) for candidate in candidates):
            example = candidates[0].name if candidates else "none: its linear maps are fused"
            raise ModelError(
                f"{model.name}: the module pattern {pattern!r} matches none of its {len(candidates)} linear maps "
                f"(e.g. {example})"
            )
    chosen = [matrix for matrix in candidates if any(fnmatchcase(matrix.name, pattern) for pattern in patterns)]
    _refuse_shared_weights(model, chosen)
    return tuple(chosen)


def shared_inputs(model: LanguageModel, chosen: Iterable[Matrix]) -> dict[str, str]:
    """For each matrix, the first one that reads the very same tensor: query, key and value do, gate and up do.

    Found by running two tokens through the network.
    """
    chosen = list(chosen)
    ids = torch.zeros(1, 2, dtype=torch.long, device=model.device)
    everywhere = torch.ones_like(ids, dtype=torch.bool)
    read: dict[str, Tensor] = {}
    handles = [
        matrix.module.register_forward_pre_hook(lambda _, inputs, matrix=matrix: read.update({matrix.name: inputs[0]}))
        for matrix in chosen
    ]
    try:
        with evaluating(model) as network:
            network(**forward_inputs(network, Batch(ids, everywhere, everywhere, (0,))))
    finally:
        for handle in handles:
            handle.remove()
    # The tensors are all alive here, so that one address is one tensor. First is as `chosen` has it, not as the network
    # calls it: GPT-J, GPT-Neo and OPT define key before query but call query first.
    first: dict[tuple[int, tuple[int, ...], bool], str] = {}
    owner = {}
    for matrix in chosen:
        tensor = read[matrix.name]
        owner[matrix.name] = first.setdefault((tensor.data_ptr(), tuple(tensor.shape), matrix.has_bias), matrix.name)
    return owner


def _refuse_shared_weights(model: LanguageModel, chosen: Sequence[Matrix]) -> None:
    uses: dict[int, list[str]] = {}
    for name, parameter in model.network.named_parameters(remove_duplicate=False):
        uses.setdefault(id(parameter), []).append(name)
    for matrix in chosen:
        names = uses[id(matrix.module.weight)]
        if len(names) > 1:
            raise ModelError(
                f"{model.name}: {' and '.join(names)} are one weight, whose curvature is not a sum of K-FAC's blocks; "
                "choose modules without it"
            )
