"""What an unlearned model still has of a concept's vectors: ConceptVectors' intrinsic test (arXiv 2406.11614, §4).

The paper's scores say little alone. Any small step of the weights leaves a cosine near 1, as much after training on
something else as after unlearning, so each change is also given in deviations from those of the same layer's other
vectors; and a model that has lost the tracked vectors may know everything by others. Read them beside a sham, and
beside what the model says. Tokens' own rows are traced too, because knowledge also sits in embeddings (EMBER, arXiv
2606.03695).

Shapes: d the model's width, V the vocabulary, n vectors.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from palimpsest.errors import DataError, ModelError
from palimpsest.internals.value_vectors import ValueVector, VocabularyProjection, refuse_missing
from palimpsest.models.language_model import LanguageModel, refuse_other_tokenizer

TOP = (10, 50, 200)
"""Top tokens that are compared; 200 is ConceptVectors'."""
ROWS_AT_ONCE = 4096


@dataclass(frozen=True, slots=True)
class Change:
    """From one vector to another."""

    cosine: float
    """1 the same direction; 0 where one of them is 0."""
    relative_l2: float
    """Length of the difference over that of the original."""
    z: float | None
    """How many standard deviations that is above the mean of the vectors that are not traced; None where all of those
    changed alike, not at all for instance."""


@dataclass(frozen=True, slots=True)
class VectorTrace:
    """What became of one value vector."""

    vector: ValueVector
    change: Change
    """Its z is against the other columns of its layer."""
    jaccard_frozen: dict[int, float]
    """For each k, the tokens that both vectors have in their top k over those that either has, both read with the
    original's norm and unembedding: the vector's own change alone."""
    jaccard_own: dict[int, float]
    """Each read with its own model's: ConceptVectors' score, into which a changed unembedding enters."""


@dataclass(frozen=True, slots=True)
class TokenTrace:
    """What became of one token's rows; where the two matrices are one, both say the same."""

    token: int
    embedding: Change
    unembedding: Change
    """Their z are against all rows of other tokens."""


def vector_traces(
    original: LanguageModel, unlearned: LanguageModel, vectors: Sequence[ValueVector], *, top: Sequence[int] = TOP
) -> list[VectorTrace]:
    """Trace value vectors from one model to another.

    Args:
        original: where they were found.
        unlearned: what was made of it.
        vectors: n of them; the sign says which end of the projection is compared.
        top: how many top tokens to compare; no more than the vocabulary has.

    Raises:
        DataError: a vector that the model does not have.
        ModelError: the models are not of one shape and vocabulary, or have no value vectors.
    """
    refuse_other_shape(original, unlearned)
    refuse_missing(original, vectors)
    before, after = VocabularyProjection.of(original), VocabularyProjection.of(unlearned)
    top = [k for k in top if k <= len(before.unembedding)]
    traces: dict[ValueVector, VectorTrace] = {}
    for layer in sorted({vector.layer for vector in vectors}):
        own = [vector for vector in vectors if vector.layer == layer]
        old, new = before.vectors(layer), after.vectors(layer)
        columns = [vector.column for vector in own]
        signs = torch.tensor([[vector.sign] for vector in own], device=old.device)
        said = signs * before.logits(old[columns], layer)
        frozen = signs * before.logits(new[columns].to(old.device), layer)
        said_now = signs * after.logits(new[columns], layer).to(old.device)
        changes = changed_rows(old, new, columns)
        for place, vector in enumerate(own):
            traces[vector] = VectorTrace(
                vector,
                changes[place],
                {k: _jaccard(said[place], frozen[place], k) for k in top},
                {k: _jaccard(said[place], said_now[place], k) for k in top},
            )
    return [traces[vector] for vector in vectors]


def token_traces(original: LanguageModel, unlearned: LanguageModel, tokens: Sequence[int]) -> list[TokenTrace]:
    """Trace the embedding and unembedding rows of tokens from one model to another.

    Raises:
        DataError: a token that the model does not have.
        ModelError: the models are not of one shape and vocabulary.
    """
    refuse_other_shape(original, unlearned)
    n_tokens = len(_rows(original.anatomy.unembedding))
    for token in tokens:
        if not 0 <= token < n_tokens:
            raise DataError(f"token {token} is none of 0 to {n_tokens - 1}; give tokens of {original.name}")
    embedding, unembedding = (
        changed_rows(_rows(one), _rows(other), tokens)
        for one, other in (
            (original.anatomy.embedding, unlearned.anatomy.embedding),
            (original.anatomy.unembedding, unlearned.anatomy.unembedding),
        )
    )
    return [TokenTrace(*each) for each in zip(tokens, embedding, unembedding, strict=True)]


def changed_rows(before: Tensor, after: Tensor, places: Sequence[int]) -> list[Change]:
    """How the rows at some places changed from one matrix [n, d] to another, each beside the rows at no such place."""
    cosines, relative = [], []
    for one, other in zip(before.split(ROWS_AT_ONCE), after.split(ROWS_AT_ONCE), strict=True):
        one, other = one.double(), other.to(one.device).double()
        cosines.append(torch.cosine_similarity(one, other, dim=1, eps=1e-30))
        relative.append((other - one).norm(dim=1) / one.norm(dim=1).clamp(min=1e-30))
    cosine, length = torch.cat(cosines).cpu(), torch.cat(relative).cpu()
    untraced = torch.ones(len(length), dtype=torch.bool)
    untraced[list(places)] = False
    mean, deviation = length[untraced].mean().item(), length[untraced].std().item()
    z = [(length[place].item() - mean) / deviation if deviation > 1e-9 * mean else None for place in places]
    return [Change(cosine[place].item(), length[place].item(), of) for place, of in zip(places, z, strict=True)]


def refuse_other_shape(original: LanguageModel, unlearned: LanguageModel) -> None:
    """Refuse to compare two models' weights row by row where one was not made from the other.

    Raises:
        ModelError: their tokenizers, layers or widths differ.
    """
    refuse_other_tokenizer(original, unlearned)
    shapes = [
        {name: tuple(weight.shape) for name, weight in model.network.named_parameters()}
        for model in (original, unlearned)
    ]
    if shapes[0] != shapes[1]:
        name = min(name for name, _ in shapes[0].items() ^ shapes[1].items())
        seen = f"{shapes[0].get(name, 'missing')} in {original.name} and {shapes[1].get(name, 'missing')} in the other"
        raise ModelError(f"{unlearned.name}: {name} is {seen}; compare a model with what was made of it")


def _rows(embedding: nn.Module) -> Tensor:
    return embedding.get_parameter("weight").detach()


def _jaccard(one: Tensor, other: Tensor, k: int) -> float:
    """Of the top k tokens of two rows of logits [V]."""
    common = torch.isin(one.topk(k).indices, other.topk(k).indices).sum().item()
    return common / (2 * k - common)
