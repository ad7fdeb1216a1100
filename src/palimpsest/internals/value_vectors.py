"""Value vectors, the columns of an MLP's value matrix, read as tokens (Geva et al. 2021, 2022; arXiv 2203.14680).

An MLP adds a sum of value vectors to the residual stream, each times its coefficient. What a vector says is what the
final norm and the unembedding would make of it alone. The norm's division by the stream's length is left out: it is one
number for all of them. What it multiplies by (and Gemma's 1 + weight, and the norm that OLMo 2 and Gemma 2 put after
the MLP) is not.

Shapes: d the model's width, V the vocabulary, n vectors.
"""

from collections.abc import Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from palimpsest.errors import DataError
from palimpsest.models.language_model import LanguageModel

LOGITS_AT_ONCE = 16_000_000
"""Of a layer's projections; those of a whole layer, [d_ff, V], would be gigabytes."""


@dataclass(frozen=True, slots=True, order=True)
class ValueVector:
    """Which value vector, and which end of its projection is meant."""

    layer: int
    column: int
    """Of the value matrix as [d, d_ff]: the neuron whose activation is its coefficient."""
    sign: int = 1
    """1 the top of its projection, -1 the bottom: coefficients of gated MLPs take both signs."""


@dataclass(frozen=True, slots=True)
class TopTokens:
    """What a value vector says most at one end of its projection."""

    vector: ValueVector
    ids: tuple[int, ...]
    """The k tokens, most first."""
    logits: tuple[float, ...]
    """What it adds to each, times its sign."""


@dataclass(frozen=True, eq=False)
class NormGain:
    """The linear part of a norm: what is left of it without the division by the vector's length."""

    gain: Tensor
    """[d] fp32."""
    centred: bool
    """Whether the vector's mean is taken off first (LayerNorm)."""

    @staticmethod
    def of(norm: nn.Module, d_model: int, device: torch.device) -> "NormGain":
        """Asked of the norm itself, so that no family's convention has to be known."""
        norm = deepcopy(norm).float()
        probe = torch.linspace(-1, 1, d_model, device=device).sign() * 1e3  # large beside the norm's epsilon
        probe = torch.where(probe == 0, 1e3, probe)
        probe = probe - probe.mean()
        with torch.no_grad():
            normed = (norm(probe[None]) - norm(-probe[None]))[0] / 2  # a bias cancels
            of_a_constant = norm(torch.full_like(probe, 1e3)[None]) - norm(torch.full_like(probe, -1e3)[None])
        gain = normed * probe.square().mean().sqrt() / probe
        return NormGain(gain, bool(of_a_constant.abs().max() < 1e-3 * gain.abs().max()))

    def apply(self, vectors: Tensor) -> Tensor:
        """[n, d] the vectors as the norm would turn and stretch them."""
        return (vectors - vectors.mean(-1, keepdim=True) if self.centred else vectors) * self.gain

    def transposed(self, vectors: Tensor) -> Tensor:
        """[n, d] what vectors are multiplied by in place of multiplying them by these after `apply`."""
        stretched = vectors * self.gain
        return stretched - stretched.mean(-1, keepdim=True) if self.centred else stretched


@dataclass(frozen=True, eq=False)
class VocabularyProjection:
    """From the value vectors of a model to logits, in fp32."""

    model: LanguageModel
    norms: tuple[tuple[NormGain, ...], ...]
    """For each layer, what its vectors pass on their way to the unembedding."""
    unembedding: Tensor
    """[V, d] fp32: the model's own tensor, or a copy where its type is another."""

    @staticmethod
    def of(model: LanguageModel) -> "VocabularyProjection":
        """A model's own projection.

        Raises:
            ModelError: a mixture of fused experts has no value vectors.
        """
        anatomy = model.anatomy
        anatomy.value_vectors(0)
        last = NormGain.of(anatomy.final_norm, anatomy.d_model, model.device)
        norms = []
        for block in anatomy.blocks:
            # OLMo 2, OLMo 3, Gemma 2 and Gemma 3 call it so; in the others nothing stands behind the MLP.
            after = getattr(block, "post_feedforward_layernorm", None)
            own = () if after is None else (NormGain.of(after, anatomy.d_model, model.device),)
            norms.append((*own, last))
        return VocabularyProjection(model, tuple(norms), anatomy.unembedding.get_parameter("weight").detach().float())

    def vectors(self, layer: int) -> Tensor:
        """[d_ff, d] the value vectors of a layer, fp32."""
        return self.model.anatomy.value_vectors(layer).detach().float()

    def logits(self, vectors: Tensor, layer: int) -> Tensor:
        """[n, V] what vectors [n, d] that stand in a layer's value matrix add to the logits."""
        for norm in self.norms[layer]:
            vectors = norm.apply(vectors)
        return vectors @ self.unembedding.T

    def towards(self, directions: Tensor, layer: int) -> Tensor:
        """[n, d] by which a layer's vector is multiplied to tell how far it moves logits along directions [n, d].

        `vector @ towards(E[t], layer)` is the vector's logit of token t.
        """
        for norm in reversed(self.norms[layer]):
            directions = norm.transposed(directions)
        return directions

    def by_columns(self, layer: int) -> Iterator[tuple[int, Tensor]]:
        """The first column and the logits [n, V] of it and those after it, until all columns had their turn."""
        vectors = self.vectors(layer)
        at_once = max(1, LOGITS_AT_ONCE // len(self.unembedding))
        for first in range(0, len(vectors), at_once):
            yield first, self.logits(vectors[first : first + at_once], layer)


def top_tokens(model: LanguageModel, vectors: Sequence[ValueVector], k: int = 20) -> list[TopTokens]:
    """The k tokens that each vector says most, at the end that its sign names.

    Raises:
        DataError: a vector that the model does not have.
        ModelError: a mixture of fused experts has no value vectors.
    """
    refuse_missing(model, vectors)
    projection, found = VocabularyProjection.of(model), []
    for vector in vectors:
        row = projection.model.anatomy.value_vectors(vector.layer)[vector.column].detach().float()
        logits = vector.sign * projection.logits(row[None], vector.layer)[0]
        top = logits.topk(min(k, len(logits)))
        found.append(TopTokens(vector, tuple(top.indices.tolist()), tuple(top.values.tolist())))
    return found


def refuse_missing(model: LanguageModel, vectors: Sequence[ValueVector], where: Sequence[str] = ()) -> None:
    """Refuse vectors that a model does not have.

    Args:
        model: the model.
        vectors: n of them.
        where: what the message calls each; its place in the list by default.

    Raises:
        DataError: a layer, column or sign out of range, or no vectors at all.
        ModelError: a mixture of fused experts has no value vectors.
    """
    anatomy = model.anatomy
    n_columns = anatomy.d_ff
    if not vectors:
        raise DataError("no value vectors are given; give at least one, layer and column")
    for place, vector in enumerate(vectors):
        name = where[place] if where else f"value vector {place + 1}"
        if not 0 <= vector.layer < anatomy.n_layers:
            raise DataError(
                f"{name}: layer is {vector.layer}; this {anatomy.family} has layers 0 to {anatomy.n_layers - 1}"
            )
        if not 0 <= vector.column < n_columns:
            raise DataError(
                f"{name}: column is {vector.column}; this {anatomy.family} has columns 0 to {n_columns - 1}"
            )
        if vector.sign not in (1, -1):
            raise DataError(f"{name}: sign is {vector.sign}; it is 1 for the top of the projection, -1 for the bottom")
