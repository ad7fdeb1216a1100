"""Concept vectors: the value vectors whose projection to the vocabulary is one concept's tokens (Hong et al. 2024).

ConceptVectors (arXiv 2406.11614, §3) finds them with a judge of their top tokens. Without one, a concept's own tokens
are the measure: how many of T tokens are among the T that a vector says most, and how far above its other tokens they
stand. Whoever searches all vectors for the best finds a good one for any T tokens, so the same search is made for
random sets of tokens, and a vector counts where it beats the best of all of those.

Shapes: V the vocabulary, n vectors, S token sets, T tokens of each.
"""

import random
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from palimpsest.data.batches import encode
from palimpsest.data.prompts import Template
from palimpsest.data.records import Record
from palimpsest.errors import DataError
from palimpsest.internals.value_vectors import TopTokens, ValueVector, VocabularyProjection
from palimpsest.models.language_model import LanguageModel

Judge = Callable[[Sequence[str]], float]
"""How clearly tokens, most said first, belong to one concept: from 0 to 1."""
Kind = tuple[bool, str]
"""What a token looks like: whether it begins a word, and what it is made of."""

JUDGED_TOKENS = 200
CLEAR = 0.85
LEFT_OUT = 0.3
"""ConceptVectors' numbers: the tokens a judge sees, the score that passes, the share of each layer it never sees."""


@dataclass(frozen=True, slots=True)
class ConceptVector:
    """How much one end of a value vector's projection is the concept."""

    vector: ValueVector
    precision: float
    """Share of the concept's T tokens among the T that the vector says most."""
    z: float
    """Mean over the concept's tokens of their logits, in standard deviations from the mean over the vocabulary."""


@dataclass(frozen=True, slots=True)
class Discovery:
    """What a search through all value vectors found, and what it would have found for any tokens."""

    found: tuple[ConceptVector, ...]
    """Those above the best of the null in precision or in z; the most precise first. Of S random sets a concept that
    is nowhere in the model is above with a probability of at most 2 / (S + 1)."""
    best: ConceptVector
    """The most precise of all (of equals, that of the highest z), whether or not it is above the null."""
    null_precision: float
    null_z: float
    """The best precision, and the best z, of any vector for any of the random sets."""


def word_tokens(tokenizer: PreTrainedTokenizerBase, words: Sequence[str]) -> dict[int, str]:
    """The tokens that are one of the words, with or without a space before it, and which; one of several has none.

    Raises:
        DataError: none of the words is one token.
    """
    found = {}
    for word in words:
        for text in (word, f" {word}"):
            ids = tokenizer.encode(text, add_special_tokens=False)
            if len(ids) == 1 and ids[0] not in tokenizer.all_special_ids:
                found[ids[0]] = word
    if not found:
        raise DataError(
            f"none of {', '.join(map(repr, words))} is one token of this vocabulary; "
            "give words that are, or rows with the concept's answers"
        )
    return dict(sorted(found.items()))


def answer_tokens(
    tokenizer: PreTrainedTokenizerBase, records: Sequence[Record], *, template: Template = "plain"
) -> tuple[int, ...]:
    """The tokens of the records' answers that have a letter or a digit, each once.

    Raises:
        DataError: there are none.
    """
    ids = {
        token for row in encode(records, tokenizer, template=template) for token in row.ids[row.start : row.stop]
    } - set(tokenizer.all_special_ids)
    found = tuple(token for token in sorted(ids) if any(map(str.isalnum, tokenizer.decode([token]))))
    if not found:
        raise DataError("the rows' answers have no token of letters or digits, so there is no concept to look for")
    return found


def random_sets(
    tokenizer: PreTrainedTokenizerBase,
    tokens: Sequence[int],
    n_sets: int,
    *,
    seed: int,
    pool: Sequence[int] | None = None,
) -> list[tuple[int, ...]]:
    """Sets of as many other tokens, to search for as one searches for the concept's.

    Without a pool, as many begin a word or go on with one, are capitalised, in small letters, a number or none of these
    as of the concept's tokens.

    Args:
        tokenizer: of the model.
        tokens: the concept's.
        n_sets: how many sets.
        seed: of the draws.
        pool: tokens of the same kind, the answers about other subjects say. The best null where there is one: tokens
            that were learnt together lie together.

    Raises:
        DataError: fewer other tokens than the concept has.
    """
    concept, special = set(tokens), set(tokenizer.all_special_ids)
    written = {token: text for text, token in tokenizer.get_vocab().items()}
    candidates = sorted(set(written if pool is None else pool) - concept - special)
    if len(candidates) < len(tokens):
        raise DataError(
            f"{len(candidates)} other tokens are too few for random sets of {len(tokens)}; give more rows to draw from"
        )
    alike: dict[Kind, list[int]] = {}
    for token in candidates if pool is None else ():
        alike.setdefault(_kind(written[token]), []).append(token)
    kinds, rng = [_kind(written.get(token, "")) for token in tokens], random.Random(seed)
    return [_drawn(kinds, candidates, alike, rng) for _ in range(n_sets)]


def discover(model: LanguageModel, tokens: Sequence[int], null: Sequence[Sequence[int]]) -> Discovery:
    """Search both ends of every value vector of every layer for a concept's tokens, and for every set of the null.

    Args:
        model: the model to search.
        tokens: the concept's T tokens.
        null: S sets of T tokens each, as `random_sets` gives them.

    Raises:
        DataError: no tokens, as many as there are, or no null or one of another size.
        ModelError: a mixture of fused experts has no value vectors.
    """
    if not null:
        raise DataError("no random sets are given, so nothing can be said to be above chance; give at least one")
    projection = VocabularyProjection.of(model)
    member = _membership([tokens, *null], len(projection.unembedding), model.device)
    scores = [torch.cat(parts) for parts in zip(*_searched(projection, member, len(tokens)), strict=True)]
    precision, z = (score[:, 0] for score in scores)
    null_precision, null_z = (score[:, 1:].max().item() for score in scores)
    d_ff = model.anatomy.d_ff

    def scored(place: int) -> ConceptVector:
        layer, end = divmod(place, 2 * d_ff)
        vector = ValueVector(layer, end % d_ff, 1 if end < d_ff else -1)
        return ConceptVector(vector, precision[place].item(), z[place].item())

    above = (precision > null_precision) | (z > null_z)
    found = sorted(
        map(scored, above.nonzero()[:, 0].tolist()), key=lambda each: (-each.precision, -each.z, each.vector)
    )
    best = z.where(precision == precision.max(), -torch.inf).argmax()
    return Discovery(tuple(found), scored(int(best)), null_precision, null_z)


def judged(
    model: LanguageModel,
    judge: Judge,
    *,
    k: int = JUDGED_TOKENS,
    threshold: float = CLEAR,
    left_out: float = LEFT_OUT,
) -> Iterator[tuple[TopTokens, float]]:
    """The vectors whose top tokens a judge finds to be one concept, with its score: ConceptVectors' own search.

    Both ends of every vector are candidates. In each layer those with the lowest mean logit of their top k tokens are
    left out unseen, `left_out` of them.

    Args:
        model: the model to search.
        judge: what scores the k top tokens, as they are written, most said first.
        k: how many it sees.
        threshold: what its score must be above.
        left_out: share of a layer that it never sees.

    Raises:
        ModelError: a mixture of fused experts has no value vectors.
    """
    projection = VocabularyProjection.of(model)
    k = min(k, len(projection.unembedding))
    for layer in range(model.anatomy.n_layers):
        for top in _strongest(projection, layer, k, left_out):
            score = judge([str(model.tokenizer.decode([token])) for token in top.ids])
            if score > threshold:
                yield top, score


def _searched(projection: VocabularyProjection, member: Tensor, size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Precision and z [n, S] of every layer's vectors: their tops first, then their bottoms."""
    of_sets = member.T.float() / size
    for layer in range(projection.model.anatomy.n_layers):
        ends: dict[int, list[tuple[Tensor, Tensor]]] = {1: [], -1: []}
        for _, logits in projection.by_columns(layer):
            above = logits @ of_sets - logits.mean(1, keepdim=True)
            mean_z = above / logits.std(1, keepdim=True).clamp(min=1e-12)
            for sign in (1, -1):
                top = (sign * logits).topk(size).indices
                shares = torch.stack([row[top].double().mean(1) for row in member], 1)
                ends[sign].append((shares.cpu(), sign * mean_z.cpu()))
        for sign in (1, -1):
            yield torch.cat([shares for shares, _ in ends[sign]]), torch.cat([mean for _, mean in ends[sign]])


def _membership(sets: Sequence[Sequence[int]], n_tokens: int, device: torch.device) -> Tensor:
    """[S, V] bool, which tokens each set has."""
    size = len(set(sets[0]))
    if not 0 < size < n_tokens:
        raise DataError(f"the concept has {size} tokens of a vocabulary of {n_tokens}; give at least one, and not all")
    member = torch.zeros(len(sets), n_tokens, dtype=torch.bool, device=device)
    for row, tokens in zip(member, sets, strict=True):
        if len(set(tokens)) != size or len(tokens) != size:
            raise DataError(f"a set has {len(tokens)} tokens where the concept has {size}; give sets of one size")
        if not 0 <= min(tokens) <= max(tokens) < n_tokens:
            raise DataError(f"a token is none of 0 to {n_tokens - 1}; give tokens of this model")
        row[list(tokens)] = True
    return member


def _strongest(projection: VocabularyProjection, layer: int, k: int, left_out: float) -> Iterator[TopTokens]:
    """Both ends of a layer's vectors, but for a share, that with the lowest mean logit of the top k."""
    pieces = [(sign * logits).topk(k) for sign in (1, -1) for _, logits in projection.by_columns(layer)]
    logits, ids = (torch.cat([piece[part].cpu() for piece in pieces]) for part in (0, 1))
    for place in logits.mean(1).argsort(stable=True)[int(left_out * len(logits)) :].sort().values.tolist():
        negative, column = divmod(place, len(logits) // 2)
        vector = ValueVector(layer, column, -1 if negative else 1)
        yield TopTokens(vector, tuple(ids[place].tolist()), tuple(logits[place].tolist()))


def _kind(written: str) -> Kind:
    begins, word = written[:1] in ("Ġ", "▁", " "), written.lstrip("Ġ▁ ")
    if word.isdecimal():
        return begins, "number"
    if word.isalpha():
        return begins, "capitalised" if word[0].isupper() else "small letters"
    return begins, "other"


def _drawn(
    kinds: Sequence[Kind], candidates: Sequence[int], alike: dict[Kind, list[int]], rng: random.Random
) -> tuple[int, ...]:
    """One set: of every kind as many as there are in `kinds`, or any others where there are no more of a kind."""
    drawn = [
        token
        for kind, wanted in Counter(kinds).items()
        for token in rng.sample(alike.get(kind, []), min(wanted, len(alike.get(kind, []))))
    ]
    # As many as the set takes, so that enough are left without those that are in it already.
    others = [token for token in rng.sample(candidates, len(kinds)) if token not in drawn]
    return (*drawn, *others[: len(kinds) - len(drawn)])
