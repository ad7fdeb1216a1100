"""Inputs unlike normal ones, by what every layer believes of them: instructions that somebody injected, say.

The trajectory's detectors are those of Belrose et al. 2023 (arXiv 2303.08112): what each layer gives every candidate
answer, to an isolation forest or the local outlier factor. In those called `_ranked` a row's candidates stand in the
order in which the model believes them in the end, so that a feature is what a layer makes of the answer that wins, of
the next and so on, wherever in the row these were. Beside them stand what they have to beat, Mahalanobis distances of
the hidden states and the cost of the prompt, and the prompt's length, which explains away what it tells as well as
they. Nothing is fitted to suspects, and nobody need know which candidate is right.

Shapes: n rows, k candidates each, L layers and then the model itself, d its width, f features.
"""

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from sklearn.covariance import ledoit_wolf_shrinkage
from sklearn.ensemble import IsolationForest
from sklearn.neighbors import LocalOutlierFactor
from threadpoolctl import threadpool_limits
from torch import Tensor

from palimpsest.data.batches import Encoded, encode
from palimpsest.data.prompts import Template
from palimpsest.data.records import QA, Choice, Passage, Record, subject_of
from palimpsest.errors import DataError, ModelError
from palimpsest.lens.hidden import Hidden, read_layers
from palimpsest.lens.lens import Lens
from palimpsest.lens.readout import Readout
from palimpsest.lens.trajectory import DIVERGENCES, beliefs, divergences
from palimpsest.metrics.auc import Auc, auc
from palimpsest.metrics.cloze import encode_choices
from palimpsest.metrics.statistics import Floats
from palimpsest.models.language_model import LanguageModel

FEWEST = 10
"""Normal rows that a detector is fitted to, at least."""
NEIGHBOURS = 20
"""Of the local outlier factor, where there are so many rows."""
CONSTANT = 1e-5
"""A feature that varies by less than this share of its largest value does so by rounding alone."""
ALIKE = "all normal rows that are fitted to are alike to every layer; give different rows"
LEAST_SHRINKAGE = 1e-6
"""Of a covariance, so that directions in which normal rows do not vary cost much and not infinitely much."""


@dataclass(frozen=True, eq=False)
class Signs:
    """What detectors are given of n rows; fp32."""

    believed: Tensor
    """[n, f]. Of rows with candidates log p(candidate | prompt) in nats, layer by layer, the model last, f = (L + 1) k;
    in a multiple choice's own order, else in that of their texts, so that no place means the right one. Of other rows
    what is believed at the prompt's last token, of the token that follows: each layer's entropy, KL, JS and total
    variation (see `Trajectory.statistics`), and the model's entropy, f = 4 L + 1."""
    states: Tensor
    """[n, L + 1, d] the residual stream, averaged over the tokens of all candidates, or at the prompt's last token."""
    cost: Tensor
    """[n] mean NLL of the prompt's tokens under the model, nats/token: log perplexity."""
    length: Tensor
    """[n] the prompt's tokens."""
    candidates: int
    """k, 0 for rows without."""

    def take(self, places: Sequence[int]) -> "Signs":
        """Those of some of the rows, in the order given."""
        chosen = list(places)
        return Signs(
            self.believed[chosen], self.states[chosen], self.cost[chosen], self.length[chosen], self.candidates
        )

    def ranked(self) -> "Signs":
        """The same with each row's candidates in the order of what the model gives them at last, the likeliest first.

        Those without candidates as they are.
        """
        if not self.candidates:
            return self
        believed = self.believed.unflatten(1, (-1, self.candidates))
        order = believed[:, -1:].argsort(dim=2, descending=True, stable=True)
        return replace(self, believed=believed.gather(2, order.expand_as(believed)).flatten(1))


@dataclass(frozen=True, eq=False)
class Detected:
    """One detector's anomaly scores, higher for what is less normal, and how well they tell."""

    held_out: Floats
    """[n] of normal rows that it was not fitted to."""
    suspects: Floats
    """[n]"""
    auc: Auc
    """P(a held-out normal row scores lower than a suspect); suspects about a fitted subject are left out."""


def detect(
    lens: Lens,
    model: LanguageModel,
    normal: Sequence[Record],
    held_out: Sequence[Record],
    suspects: Sequence[Record],
    *,
    template: Template = "plain",
    seed: int = 0,
    batch_size: int = 16,
) -> dict[str, Detected]:
    """Every detector of `DETECTORS`, by name; those that are `_ranked` only of rows with candidates.

    Intervals are clustered by subject. A suspect about a subject that was fitted to is scored, but not compared: what
    the detector knows of its subject would make it look normal.

    Args:
        lens: for this model's readout.
        model: whose layers are read.
        normal: what detectors are fitted to.
        held_out: normal rows about other subjects; `split` parts the two.
        suspects: rows that may be anomalous, all of the normal rows' kind.
        template: how questions are put; a multiple choice stands as it is.
        seed: of the isolation forest.
        batch_size: rows at a time; it changes nothing.

    Raises:
        DataError: too few rows, a subject on both sides, no suspect left to compare, rows with and without candidates
            or with more and fewer, or normal rows that are all alike.
        ModelError: the lens was made for another readout, or the model gives what is not finite.
    """
    fitted = {subject_of(record) for record in normal}
    others = [subject_of(record) for record in held_out]
    if len(normal) < FEWEST or not held_out:
        raise DataError(
            f"{len(normal)} normal rows to fit detectors to and {len(held_out)} held out are too few; give at least "
            f"{FEWEST} and 1"
        )
    if shared := [subject for subject in others if subject in fitted]:
        raise DataError(f"subject {shared[0]!r} is fitted to and held out; part normal rows by subject (`split`)")
    if not suspects:
        raise DataError("there is no suspect; give one at least")
    compared = [place for place, record in enumerate(suspects) if subject_of(record) not in fitted]
    if not compared:
        raise DataError(f"all {len(suspects)} suspects are about subjects that are fitted to; give others, or more")
    rows = [*normal, *held_out, *suspects]
    signs = read_signs(lens, model, rows, template=template, batch_size=batch_size)
    known, new = signs.take(range(len(normal))), signs.take(range(len(normal), len(rows)))
    found = {}
    with threadpool_limits(1):  # the matrices are small: more threads would only wait for each other
        for name, detector in DETECTORS.items():
            if name.endswith(RANKED) and not signs.candidates:
                continue
            usual, suspicious = np.split(detector(known, new, seed), [len(held_out)])
            about = [subject_of(suspects[place]) for place in compared]
            found[name] = Detected(usual, suspicious, auc(usual, suspicious[compared], others, about))
    return found


def split(records: Sequence[Record], *, seed: int) -> tuple[list[Record], list[Record]]:
    """Rows to fit to and rows to hold out: half of the subjects each, drawn by the seed.

    Raises:
        DataError: there are fewer than two subjects.
    """
    subjects = sorted({subject_of(record) for record in records})
    if len(subjects) < 2:
        raise DataError(f"{len(subjects)} subject cannot be parted in two; give normal rows of more subjects")
    fitted = set(random.Random(f"detection/{seed}").sample(subjects, len(subjects) // 2))
    return (
        [record for record in records if subject_of(record) in fitted],
        [record for record in records if subject_of(record) not in fitted],
    )


def read_signs(
    lens: Lens,
    model: LanguageModel,
    records: Sequence[Record],
    *,
    template: Template = "plain",
    batch_size: int = 16,
) -> Signs:
    """What detectors are given of every row, in the rows' order.

    A question's wrong answers are its candidates beside the right one (in its `paraphrased_answer`, if it has one, as
    the wrong ones are in those words). The answer of a row without candidates is not read.

    Args:
        lens: for this model's readout.
        model: whose layers are read.
        records: n rows of one kind.
        template: how questions are put; a multiple choice stands as it is.
        batch_size: rows at a time; it changes nothing.

    Raises:
        DataError: rows with and without candidates or with more and fewer, or a prompt of one token.
        ModelError: the lens was made for another readout, or the model gives what is not finite.
    """
    each = _candidates(records[0])
    for record in records:
        if (here := _candidates(record)) != each:
            raise DataError(
                f"record {record.id!r} has {here} candidate answers, but {records[0].id!r} has {each}; give rows that "
                "all have as many, or none"
            )
    texts = _Texts.of([_asked(record, model, template) for record in records], bool(each))
    if short := [record.id for record, tokens in zip(records, texts.lengths, strict=True) if tokens < 2]:
        raise DataError(f"record {short[0]!r}: of a prompt of one token nothing can be told; give longer rows")
    signs = _read(texts, lens.to(model.device), lens.readout(model), model, batch_size)
    finite = signs.believed.isfinite().all(1) & signs.states.isfinite().flatten(1).all(1) & signs.cost.isfinite()
    for place in (~finite).nonzero()[:1, 0].tolist():
        raise ModelError(
            f"{model.name}: what it makes of record {records[place].id!r} is not finite; the model is damaged"
        )
    return signs


def isolation_forest(normal: Signs, rows: Signs, seed: int) -> Floats:
    """How few random cuts set a row's beliefs apart (Liu et al. 2008)."""
    known, new = _beliefs(normal, rows)
    scores: Floats = -IsolationForest(random_state=seed).fit(known).score_samples(new)
    return scores


def local_outlier_factor(normal: Signs, rows: Signs, seed: int) -> Floats:
    """How much thinner normal rows lie around a row's beliefs than around its neighbours' (Breunig et al. 2000)."""
    known, new = _beliefs(normal, rows)
    factor = LocalOutlierFactor(n_neighbors=min(NEIGHBOURS, len(known) - 1), novelty=True)
    scores: Floats = -factor.fit(known).score_samples(new)
    return scores


def isolation_forest_ranked(normal: Signs, rows: Signs, seed: int) -> Floats:
    """`isolation_forest` of ranked candidates."""
    return isolation_forest(normal.ranked(), rows.ranked(), seed)


def local_outlier_factor_ranked(normal: Signs, rows: Signs, seed: int) -> Floats:
    """`local_outlier_factor` of ranked candidates."""
    return local_outlier_factor(normal.ranked(), rows.ranked(), seed)


def mahalanobis(normal: Signs, rows: Signs, seed: int) -> Floats:
    """Squared Mahalanobis distances of the states from normal ones, summed over the layers (see `_distances`)."""
    return np.sum([whole for whole, _ in _by_layer(normal, rows)], axis=0)


def simplified_relative_mahalanobis(normal: Signs, rows: Signs, seed: int) -> Floats:
    """The same less the distances by the covariance's diagonal alone (SRM, Bai et al. 2022, arXiv 2204.05862)."""
    return np.sum([whole - diagonal for whole, diagonal in _by_layer(normal, rows)], axis=0)


def perplexity(normal: Signs, rows: Signs, seed: int) -> Floats:
    """What the prompt costs the model, nats/token."""
    return rows.cost.double().numpy()


def length(normal: Signs, rows: Signs, seed: int) -> Floats:
    """The prompt's tokens: no detector, but what the others must do better than."""
    return rows.length.double().numpy()


RANKED = "_ranked"
"""Ends the name of a detector that differs from the one without it for rows with candidates alone."""
DETECTORS: dict[str, Callable[[Signs, Signs, int], Floats]] = {
    "isolation_forest": isolation_forest,
    "lof": local_outlier_factor,
    "isolation_forest_ranked": isolation_forest_ranked,
    "lof_ranked": local_outlier_factor_ranked,
    "mahalanobis": mahalanobis,
    "srm": simplified_relative_mahalanobis,
    "perplexity": perplexity,
    "length": length,
}
"""From signs of normal rows, signs of any rows and a seed to one anomaly score a row, higher for what is less normal.

The first four read beliefs, the next two hidden states."""


@dataclass(frozen=True, eq=False)
class _Texts:
    """The rows that the model reads, `each` for a record: its prompt with every candidate, or its prompt alone."""

    rows: list[Encoded]
    """A row's targets are what is pooled: the candidate, or the prompt's last token, with which the row then ends."""
    each: int
    with_candidates: bool
    starts: Tensor
    stops: Tensor
    lengths: Tensor
    """[n] the prompts' tokens."""

    @staticmethod
    def of(asked: Sequence[Sequence[Encoded]], with_candidates: bool) -> "_Texts":
        rows, each = [row for some in asked for row in some], len(asked[0])
        starts, stops = torch.tensor([(row.start, row.stop) for row in rows]).unbind(1)
        lengths = (starts if with_candidates else stops)[::each]
        return _Texts(rows, each, with_candidates, starts, stops, lengths)

    def following(self, hidden: Hidden) -> Tensor:
        """[N] the token that follows each; -1 where nothing does."""
        places = zip(hidden.row.tolist(), hidden.position.tolist(), strict=True)
        return torch.tensor([[*self.rows[row].ids, -1][place + 1] for row, place in places])


def _candidates(record: Record) -> int:
    """How many candidate answers a row has."""
    match record:
        case Choice():
            return len(record.choices)
        case QA() if record.wrong:
            return 1 + len(record.wrong)
    return 0


def _asked(record: Record, model: LanguageModel, template: Template) -> list[Encoded]:
    """What is read of one row."""
    match record:
        case Choice() if record.choices:
            return encode_choices([record], model.tokenizer)
        case QA() if record.wrong:
            answers = sorted((record.paraphrased_answer or record.answer, *record.wrong))
            asked = [QA(record.question, answer, id=record.id) for answer in answers]
            return encode(asked, model.tokenizer, template=template)
    (row,) = encode([record], model.tokenizer, template=template)
    ids = row.ids if isinstance(record, Passage) else row.prompt_ids
    return [Encoded(ids, len(ids) - 1, len(ids))]


def _read(texts: _Texts, lens: Lens, readout: Readout, model: LanguageModel, batch_size: int) -> Signs:
    """All signs, in one pass over the rows."""
    n, n_layers = len(texts.lengths), lens.n_layers + 1
    believed = torch.zeros(n_layers, len(texts.rows), 1 if texts.with_candidates else len(DIVERGENCES))
    states, cost = torch.zeros(n, n_layers, model.anatomy.d_model), torch.zeros(n)
    for hidden in read_layers(model, texts.rows, batch_size=batch_size):
        row, place, following = hidden.row, hidden.position, texts.following(hidden)
        record, start, stop = row // texts.each, texts.starts[row], texts.stops[row]
        pooled = (place >= start) & (place < stop)
        states.index_add_(0, record[pooled], hidden.layers[:, pooled].transpose(0, 1).float().cpu())
        asking = (row % texts.each == 0) & (place < texts.lengths[record] - 1)
        for some, (own,) in _beliefs_at(asking, hidden.layers[-1:], lens, readout):
            cost.index_add_(0, record[some], -_logprobs(own, following[some]).float().cpu())
        told = (place >= start - 1) & (place < stop - 1) if texts.with_candidates else pooled
        for some, layers in _beliefs_at(told, hidden.layers, lens, readout):
            if texts.with_candidates:
                values = [_logprobs(log_q, following[some])[:, None] for log_q in layers]
            else:
                values = [torch.stack(divergences(log_q, layers[-1]), 1) for log_q in layers]
            believed.index_add_(1, row[some], torch.stack(values).float().cpu())
    tokens = (texts.stops - texts.starts).view(n, -1).sum(1)
    features = believed.view(n_layers, n, -1).transpose(0, 1).flatten(1)
    if not texts.with_candidates:
        features = features[:, : 1 - len(DIVERGENCES)]  # the model's own divergences from itself
    candidates = texts.each if texts.with_candidates else 0
    return Signs(
        features, states / tokens[:, None, None], cost / (texts.lengths - 1), texts.lengths.float(), candidates
    )


def _beliefs_at(chosen: Tensor, layers: Tensor, lens: Lens, readout: Readout) -> Iterator[tuple[Tensor, list[Tensor]]]:
    """Places of a few of the chosen tokens [N] at a time, and what is believed there, as `beliefs` gives it."""
    places = chosen.nonzero()[:, 0]
    for some, believed in beliefs(lens, readout, readout, layers[:, chosen]):
        yield places[some.cpu()], believed


def _logprobs(belief: Tensor, tokens: Tensor) -> Tensor:
    """[n] of tokens [n] in beliefs [n, V]."""
    return belief.gather(1, tokens[:, None].to(belief.device))[:, 0]


def _standardised(known: Tensor, new: Tensor) -> tuple[Floats, Floats]:
    """Both by mean and deviation of the known rows [n, f], without the features that are constant in them."""
    ours, theirs = known.double().numpy(), new.double().numpy()
    mean, deviation = ours.mean(0), ours.std(0)
    varies = deviation > CONSTANT * np.abs(ours).max(0)
    mean, deviation = mean[varies], deviation[varies]
    return (ours[:, varies] - mean) / deviation, (theirs[:, varies] - mean) / deviation


def _beliefs(normal: Signs, rows: Signs) -> tuple[Floats, Floats]:
    """Standardised.

    Raises:
        DataError: they are the same in all normal rows.
    """
    known, new = _standardised(normal.believed, rows.believed)
    if not known.shape[1]:
        raise DataError(ALIKE)
    return known, new


def _by_layer(normal: Signs, rows: Signs) -> list[tuple[Floats, Floats]]:
    """Squared distances of the rows' states from the normal ones at every layer, whole and by the diagonal alone.

    Raises:
        DataError: they are the same in all normal rows.
    """
    layers = [_standardised(*states) for states in zip(normal.states.unbind(1), rows.states.unbind(1), strict=True)]
    found = [_distances(known, new) for known, new in layers if known.shape[1]]
    if not found:
        raise DataError(ALIKE)
    return found


def _distances(known: Floats, new: Floats) -> tuple[Floats, Floats]:
    """Squared Mahalanobis distances [m] of standardised features [m, f], and those by the covariance's diagonal alone.

    The covariance of the known rows [n, f], whose diagonal is 1, is shrunk towards that diagonal as far as Ledoit &
    Wolf (2004) find best. It is never formed: where the known rows do not reach, shrinkage alone is left.
    """
    shrinkage = max(ledoit_wolf_shrinkage(known, assume_centered=True), LEAST_SHRINKAGE)
    _, singular, axes = np.linalg.svd(known, full_matrices=False)
    along = np.square(new @ axes.T)
    diagonal = np.square(new).sum(1)
    reached = (along / ((1 - shrinkage) * singular**2 / len(known) + shrinkage)).sum(1)
    return reached + np.maximum(diagonal - along.sum(1), 0) / shrinkage, diagonal
