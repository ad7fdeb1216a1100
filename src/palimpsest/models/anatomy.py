"""Where a causal language model's parts are: blocks, MLP values, attention outputs, final norm, (un)embedding."""

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from palimpsest.errors import ModelError
from palimpsest.models.families import FAMILIES

Kind = Literal["resid", "attn", "mlp", "coef"]


@dataclass(frozen=True, slots=True)
class Site:
    """A place in the network where activations are read or patched.

    - `resid`: the block's output, [B, T, d_model].
    - `attn`: what attention's output projection gives, its bias included, before any dropout, post-norm (OLMo 2/3,
      Gemma 2/3) or residual scale (Granite) on the way to the residual stream, [B, T, d_model].
    - `mlp`: what the MLP's value matrix gives, its bias included, likewise before anything that follows it,
      [B, T, d_model].
    - `coef`: what the value matrix reads, the coefficient of each of its value vectors (Geva et al. 2021,
      arXiv 2012.14913); in a gated MLP that is act(gate) * up, [B, T, d_ff].
    """

    kind: Kind
    layer: int
    """Counted from 0; `resid` of layer -1 is what the first block reads."""

    @property
    def is_input(self) -> bool:
        """Whether its module reads it; else the module gives it."""
        return self.kind == "coef" or self.layer == -1


@dataclass(frozen=True, eq=False)
class Anatomy:
    """The modules of one network, by what they do."""

    family: str
    """The configuration's `model_type`."""
    blocks: tuple[nn.Module, ...]
    value_matrices: tuple[nn.Module, ...]
    """The last linear map of each block's MLP; empty where the experts of a mixture are fused."""
    attention_outputs: tuple[nn.Module, ...]
    """Each block's output projection of attention."""
    final_norm: nn.Module
    embedding: nn.Module
    unembedding: nn.Module
    logit_scale: float
    """Logits are cap(logit_scale * unembedding(final_norm(residual)))."""
    logit_cap: float | None
    """cap(x) is logit_cap * tanh(x / logit_cap), or x when None (Gemma 2)."""

    @staticmethod
    def of(network: PreTrainedModel) -> "Anatomy":
        """Find the parts of a network by its family's row in `families.py`.

        Raises:
            ModelError: an unknown architecture, or a network that does not have its family's parts.
        """
        config = network.config
        family = FAMILIES.get(config.model_type)
        if family is None:
            raise ModelError(
                f"architecture {config.model_type!r} ({type(network).__name__}) is not known; "
                f"known are {', '.join(sorted(FAMILIES))}"
            )
        blocks = tuple(_part(network, family.blocks, config.model_type).children())
        return Anatomy(
            family=config.model_type,
            blocks=blocks,
            value_matrices=tuple(_part(block, family.value_matrix, config.model_type) for block in blocks)
            if family.value_matrix
            else (),
            attention_outputs=tuple(_part(block, family.attention_output, config.model_type) for block in blocks),
            final_norm=_part(network, family.final_norm, config.model_type),
            embedding=_embedding(network.get_input_embeddings(), "input", network),
            unembedding=_embedding(network.get_output_embeddings(), "output", network),
            logit_scale=getattr(config, "logit_scale", 1.0) / getattr(config, "logits_scaling", 1.0),
            logit_cap=getattr(config, "final_logit_softcapping", None),
        )

    def check(self, network: PreTrainedModel) -> None:
        """Try the anatomy on a tiny input: do reading, patching and the path to the logits do what they claim?

        Four forward passes over a few tokens; see `checks.py`.

        Raises:
            ModelError: names the first check that failed, and by how much.
        """
        from palimpsest.models.checks import check  # it needs the hooks, which need this module

        check(self, network)

    @property
    def n_layers(self) -> int:
        """How many blocks there are."""
        return len(self.blocks)

    @property
    def d_model(self) -> int:
        """Width of the residual stream."""
        weight: Any = self.unembedding.weight
        return int(weight.shape[1])

    @property
    def d_ff(self) -> int:
        """Width of the MLP's hidden layer: how many value vectors a block has.

        Raises:
            ModelError: fused experts have no value matrix.
        """
        return int(self.value_vectors(0).shape[0])

    @property
    def tied(self) -> bool:
        """Whether embedding and unembedding are one matrix."""
        return self.unembedding.weight is self.embedding.weight

    @property
    def kinds(self) -> tuple[Kind, ...]:
        """The kinds of site that this network has."""
        return ("resid", "attn", "mlp", "coef") if self.value_matrices else ("resid", "attn")

    def sites(self, *kinds: Kind) -> list[Site]:
        """Every site of these kinds (of all that there are, when none is named), layer by layer."""
        return [Site(kind, layer) for layer in range(self.n_layers) for kind in kinds or self.kinds]

    def module(self, site: Site) -> nn.Module:
        """The module whose output is the site, or whose input, where `site.is_input`.

        Raises:
            ModelError: no such layer, or `mlp`/`coef` in a mixture of fused experts.
        """
        if site == Site("resid", -1):
            return self.blocks[0]
        if not 0 <= site.layer < self.n_layers:
            raise ModelError(f"{site}: this {self.family} has layers 0 to {self.n_layers - 1}")
        if site.kind not in self.kinds:
            raise ModelError(
                f"{site}: the experts of a {self.family} are fused and have no value matrix; "
                "use the kinds resid and attn"
            )
        parts = {"resid": self.blocks, "attn": self.attention_outputs}.get(site.kind, self.value_matrices)
        return parts[site.layer]

    def value_vectors(self, layer: int) -> Tensor:
        """[d_ff, d_model] the value matrix of a layer with one value vector a row (a view of the weight).

        Raises:
            ModelError: no such layer, or fused experts.
        """
        matrix = self.module(Site("mlp", layer))
        weight: Any = matrix.weight
        # GPT-2's Conv1D stores [in, out], a Linear [out, in].
        return weight if isinstance(matrix, Conv1D) else weight.T

    def logits(self, residual: Tensor) -> Tensor:
        """[..., vocabulary] what the final norm and the unembedding make of a residual stream, [..., d_model]."""
        logits: Tensor = self.unembedding(self.final_norm(residual)) * self.logit_scale
        return logits if self.logit_cap is None else self.logit_cap * torch.tanh(logits / self.logit_cap)


def _part(module: nn.Module, path: str, family: str) -> nn.Module:
    for name in path.split("."):
        found = getattr(module, name, None)
        if not isinstance(found, nn.Module):
            raise ModelError(f"this {family} has no {path} (no {name!r} in {type(module).__name__}), so it is refused")
        module = found
    return module


def _embedding(module: nn.Module | None, which: str, network: PreTrainedModel) -> nn.Module:
    if module is None:
        raise ModelError(f"{type(network).__name__} has no {which} embedding; load it as a causal language model")
    return module
