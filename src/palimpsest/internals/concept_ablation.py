"""Ablating value vectors: does a set of neurons that seems to hold a concept hold it, for the model?

What a vector says is no proof that the model uses it. So the set is taken out, and what that costs the concept's own
answers is held against what it costs unrelated ones, and against two controls of as many neurons in the same layers:
random ones, and those that write more on the concept's questions than on others, whatever they write. Noise, the
benchmark's own test (Hong et al. 2024, arXiv 2406.11614, §3.3), measures how hard a neuron fires as much as what its
vector says; the second control shows it. Zero and mean ablation come first.
"""

import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Literal, cast, get_args

import torch
from torch import Tensor, nn

from palimpsest.data.batches import encode
from palimpsest.data.prompts import Template
from palimpsest.data.records import Text, subject_of
from palimpsest.errors import SpecError
from palimpsest.internals.attribution import mean_coefficient, selectivity
from palimpsest.internals.value_vectors import ValueVector, refuse_missing
from palimpsest.metrics.likelihood import AnswerScores, target_scores
from palimpsest.metrics.scores import Score
from palimpsest.metrics.statistics import clustered_mean
from palimpsest.models.language_model import LanguageModel

Ablation = Literal["zero", "mean", "noise"]
"""`zero`: the vectors are 0. `mean`: their coefficients are what they are on average on unrelated rows. `noise`: a
Gaussian is added to each."""

NOISE = 5.0
"""Deviations of a layer's value matrix. ConceptVectors' noise, 0.1, is about as much in Llama 2 7B."""


@dataclass(frozen=True, slots=True)
class Effect:
    """What an ablation does to the answers of some rows."""

    change: Score
    """In the log-probability of the true answer, nats/token; below 0 the answer became less likely."""
    said_before: float
    """Share of rows whose every token is the most likely one, before."""
    said: float
    """The same under the ablation."""


@dataclass(frozen=True, slots=True)
class Ablated:
    """One set of neurons, and what became of the answers without it."""

    vectors: tuple[ValueVector, ...]
    own: Effect
    """On the concept's rows."""
    unrelated: Effect


@dataclass(frozen=True, slots=True)
class AblationResult:
    """The set beside its controls."""

    concept: Ablated
    random: Ablated
    """Random neurons, as many in each layer."""
    selective: Ablated
    """Those whose writing grows most on the concept's rows, whatever they write; as many in each layer."""


def ablate_concept(
    model: LanguageModel,
    vectors: Sequence[ValueVector],
    own: Sequence[Text],
    unrelated: Sequence[Text],
    *,
    how: Ablation = "zero",
    noise: float = NOISE,
    template: Template = "plain",
    seed: int = 0,
    batch_size: int = 64,
) -> AblationResult:
    """Ablate a set of value vectors, and each control; the model is left as it was, bit for bit.

    Args:
        model: the model.
        vectors: the set.
        own: rows about the concept.
        unrelated: rows about anything else.
        how: the ablation.
        noise: for `noise`, the deviation in those of the layer's value matrix.
        template: how question and answer are joined.
        seed: of the random neurons, of the noise and of the intervals.
        batch_size: rows at a time; it never changes a score.

    Raises:
        DataError: a vector that the model does not have, or no rows.
        ModelError: a mixture of fused experts has no value vectors.
        SpecError: an ablation that there is none of, or no noise where it is asked for.
    """
    refuse_missing(model, vectors)
    check_ablation(how)
    if how == "noise" and not noise > 0:
        raise SpecError(f"noise is {noise}; it must be above 0")
    rows = {
        "own": encode(own, model.tokenizer, template=template),
        "unrelated": encode(unrelated, model.tokenizer, template=template),
    }
    clusters = {"own": list(map(subject_of, own)), "unrelated": list(map(subject_of, unrelated))}
    means = mean_coefficient(model, rows["unrelated"])
    writes_more = selectivity(model, rows["own"], rows["unrelated"])

    def scores() -> dict[str, AnswerScores]:
        return {which: target_scores(model, encoded, batch_size=batch_size) for which, encoded in rows.items()}

    before = scores()

    def without(some: Sequence[ValueVector]) -> Ablated:
        with ablated(model, some, how, means=means, noise=noise, seed=seed):
            after = scores()
        return Ablated(
            tuple(some), **{which: _effect(before[which], after[which], clusters[which], seed) for which in rows}
        )

    return AblationResult(
        without(sorted(set(vectors))),
        without(random_neurons(model, vectors, seed=seed)),
        without(selective_neurons(writes_more, vectors)),
    )


def check_ablation(how: str) -> Ablation:
    """The ablation of that name.

    Raises:
        SpecError: there is none.
    """
    if how not in get_args(Ablation):
        raise SpecError(f"ablation {how!r} is unknown; choose zero, mean or noise")
    return cast(Ablation, how)


@contextmanager
def ablated(
    model: LanguageModel, vectors: Sequence[ValueVector], how: Ablation, *, means: Tensor, noise: float, seed: int
) -> Iterator[None]:
    """The model with these vectors ablated; see `zeroed`, `mean_ablated` and `noised`."""
    match how:
        case "zero":
            context = zeroed(model, vectors)
        case "mean":
            context = mean_ablated(model, vectors, means)
        case "noise":
            context = noised(model, vectors, noise, seed=seed)
    with context:
        yield


@contextmanager
def zeroed(model: LanguageModel, vectors: Sequence[ValueVector]) -> Iterator[None]:
    """The model with these value vectors at 0: their neurons write nothing. Every bit is put back on leaving."""
    width = model.anatomy.d_model
    with replaced(model, {(vector.layer, vector.column): torch.zeros(width) for vector in vectors}):
        yield


@contextmanager
def noised(model: LanguageModel, vectors: Sequence[ValueVector], noise: float, *, seed: int) -> Iterator[None]:
    """The model with a Gaussian added to these value vectors, of `noise` deviations of the layer's value matrix.

    Every bit is put back on leaving, so noise never adds up.
    """
    generator, values = torch.Generator().manual_seed(seed), {}
    for place in sorted({(vector.layer, vector.column) for vector in vectors}):
        matrix = model.anatomy.value_vectors(place[0]).detach().float().cpu()
        drawn = torch.randn(model.anatomy.d_model, generator=generator)
        values[place] = matrix[place[1]] + noise * matrix.std() * drawn
    with replaced(model, values):
        yield


@contextmanager
def replaced(model: LanguageModel, values: Mapping[tuple[int, int], Tensor]) -> Iterator[None]:
    """The model with other value vectors [d] at (layer, column). Every bit is put back on leaving, whatever happened.

    Raises:
        ModelError: a mixture of fused experts has no value vectors.
    """
    live = {place: model.anatomy.value_vectors(place[0])[place[1]] for place in values}
    kept = {place: vector.detach().clone() for place, vector in live.items()}
    try:
        with torch.no_grad():
            for place, value in values.items():
                live[place].copy_(value)
        yield
    finally:
        with torch.no_grad():
            for place, value in kept.items():
                live[place].copy_(value)


@contextmanager
def mean_ablated(model: LanguageModel, vectors: Sequence[ValueVector], means: Tensor) -> Iterator[None]:
    """The model whose coefficients of these vectors are always their means [L, d_ff]; no weight changes."""
    columns: dict[int, list[int]] = {}
    for vector in vectors:
        columns.setdefault(vector.layer, []).append(vector.column)
    with ExitStack() as hooks:
        for layer, some in columns.items():
            value = means[layer, some]
            matrix = model.anatomy.value_matrices[layer]
            hooks.enter_context(matrix.register_forward_pre_hook(_always(some, value)))
        yield


def random_neurons(model: LanguageModel, vectors: Sequence[ValueVector], *, seed: int) -> list[ValueVector]:
    """As many neurons in each layer as the set has there, none of them of the set; fewer where no more are left."""
    rng, drawn = random.Random(seed), []
    for layer, columns in _by_layer(vectors).items():
        others = [column for column in range(model.anatomy.d_ff) if column not in columns]
        chosen = rng.sample(others, min(len(columns), len(others)))
        drawn += [ValueVector(layer, column) for column in sorted(chosen)]
    return drawn


def selective_neurons(selectivity: Tensor, vectors: Sequence[ValueVector]) -> list[ValueVector]:
    """The most selective [L, d_ff] neurons in each layer, as many as the set has there, none of them of the set."""
    chosen = []
    for layer, columns in _by_layer(vectors).items():
        order = selectivity[layer].argsort(descending=True, stable=True).tolist()
        others = [column for column in order if column not in columns]
        chosen += [ValueVector(layer, column) for column in sorted(others[: len(columns)])]
    return chosen


def _by_layer(vectors: Sequence[ValueVector]) -> dict[int, set[int]]:
    layers: dict[int, set[int]] = {}
    for vector in sorted(vectors):
        layers.setdefault(vector.layer, set()).add(vector.column)
    return layers


def _always(columns: Sequence[int], values: Tensor) -> Any:
    """A hook that gives a value matrix the same coefficients in these columns whatever comes."""

    def hook(module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        changed = inputs[0].clone()
        changed[..., list(columns)] = values.to(changed)
        return changed, *inputs[1:]

    return hook


def _effect(before: AnswerScores, after: AnswerScores, clusters: Sequence[str], seed: int) -> Effect:
    change = (before.nll - after.nll).double().numpy()
    return Effect(
        clustered_mean(change, clusters, seed=seed),
        before.teacher_forced_exact_match.mean().item(),
        after.teacher_forced_exact_match.mean().item(),
    )
