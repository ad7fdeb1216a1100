"""Linear probes: which of two answers a layer points to before the model answers, beside what a probe finds anyway.

A probe of one layer scores an answer by sum_i w_i h_i e_i, h being the hidden state from which the answer is predicted
and e the answer's row of the unembedding: linear in the state, and in the last layer the model's own logit for one
choice of w. It learns w on questions about some subjects and is asked about others, so it cannot have been taught the
facts that it reads (Alain & Bengio 2016, arXiv 1610.01644).

Three controls tell what it would find anyway. The control task (Hewitt & Liang 2019, arXiv 1909.03368) puts one random
but fixed order of all answers in place of the truth; it is by answer and not by subject, because nothing that is random
for each subject could be carried over to others. Of shuffled labels half are wrong, those that it is asked as well: a
probe that found the truth all the same, or its opposite, is at chance. And an untrained model's states hold the words
alone.

Shapes: L layers, n records, p pairs of candidates, d the model's width.
"""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from palimpsest.data.batches import Encoded, batches, encode
from palimpsest.data.prompts import Template
from palimpsest.data.records import QA, subject_of
from palimpsest.errors import DataError
from palimpsest.metrics.probe import Features, probe_accuracy
from palimpsest.models.hooks import capture
from palimpsest.models.language_model import LanguageModel
from palimpsest.progress import Report

Labels = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class LayerProbe:
    """Shares of pairs, of subjects that the probe was not fitted to, in which it finds the right answer likelier."""

    layer: int
    """Whose output is read."""
    accuracy: float
    control_task: float
    """Fitted to the random order of answers, and asked for it."""
    shuffled: float
    """Fitted to labels of which half are wrong, and asked for others of which half are: above 0.5, something leaks."""
    untrained: float
    """On the states of a model that has learned nothing."""

    @property
    def selectivity(self) -> float:
        """How much better it does than at the control task; a probe that can learn anything has none."""
        return self.accuracy - self.control_task

    @property
    def lead(self) -> float:
        """How much better it does than the best of the controls."""
        return self.accuracy - max(self.control_task, self.shuffled, self.untrained)


@dataclass(frozen=True, slots=True)
class _Pair:
    """A record's answer and one of its wrong ones, in random order."""

    record: int
    candidates: tuple[str, str]
    right: int


def probe_layers(
    model: LanguageModel,
    untrained: LanguageModel,
    train: Sequence[QA],
    test: Sequence[QA],
    *,
    template: Template = "plain",
    seed: int = 0,
    report: Report | None = None,
) -> list[LayerProbe]:
    """Read every layer by a probe of its own.

    Args:
        model: whose layers are read.
        untrained: of the same architecture and tokenizer, see `models.organism.untrained_like`.
        train: what the probes are fitted to: retain questions, say.
        test: what they are asked: the forgotten questions, say.
        template: how they are asked.
        seed: of the pairs' order, the control task and the shuffled labels.
        report: called with (layers done, of how many, a note).

    Raises:
        DataError: a subject stands on both sides, a question has no wrong answer, or there are too few of them.
    """
    if shared := sorted({subject_of(record) for record in train} & {subject_of(record) for record in test}):
        raise DataError(f"{shared[0]} is in both the probe's training and test questions; split them by subject")
    pairs, asked = _pairs(train, seed), _pairs(test, seed)
    right, truth = _right(pairs), _right(asked)
    order, order_asked = _preferred(pairs, seed), _preferred(asked, seed)
    wrong, wrong_asked = half_flipped(right, seed), half_flipped(truth, seed)
    layers = zip(
        *(
            _features(read, records, of, template)
            for read in (model, untrained)
            for records, of in ((train, pairs), (test, asked))
        ),
        strict=True,
    )
    found = []
    for layer, (states, states_asked, raw, raw_asked) in enumerate(layers):
        found.append(
            LayerProbe(
                layer,
                accuracy=probe_accuracy(states, right, states_asked, truth),
                control_task=probe_accuracy(states, order, states_asked, order_asked),
                shuffled=probe_accuracy(states, wrong, states_asked, wrong_asked),
                untrained=probe_accuracy(raw, right, raw_asked, truth),
            )
        )
        if report:
            report(len(found), model.anatomy.n_layers, f"layer {layer}")
    return found


def half_flipped(labels: Labels, seed: int) -> Labels:
    """[p] the labels, 0 or 1, with a random half of them turned around."""
    flipped = np.random.default_rng(seed).permutation(len(labels)) < len(labels) // 2
    return np.where(flipped, 1 - labels, labels)


def _pairs(records: Sequence[QA], seed: int) -> list[_Pair]:
    pairs = []
    for place, record in enumerate(records):
        if not record.wrong:
            raise DataError(f"record {record.id!r} has no wrong answer to tell the right one from; give its `wrong`")
        for wrong in record.wrong:
            right = random.Random(f"pair/{seed}/{record.id}/{wrong}").randrange(2)
            pairs.append(_Pair(place, (wrong, record.answer) if right else (record.answer, wrong), right))
    return pairs


def _right(pairs: Sequence[_Pair]) -> Labels:
    """[p] which candidate is true."""
    return np.array([pair.right for pair in pairs])


def _preferred(pairs: Sequence[_Pair], seed: int) -> Labels:
    """[p] which candidate comes later in an order of all answers that follows from the seed and means nothing."""
    ranks = [[random.Random(f"control task/{seed}/{text}").random() for text in pair.candidates] for pair in pairs]
    return np.array(ranks).argmax(1)


def _features(
    model: LanguageModel, records: Sequence[QA], pairs: Sequence[_Pair], template: Template
) -> Iterator[Features]:
    """Layer by layer [p, 2, d], the state before the answer times each candidate's mean row of the unembedding."""
    candidates = [replace(records[pair.record], answer=text) for pair in pairs for text in pair.candidates]
    unembedding = model.anatomy.unembedding.get_parameter("weight").detach().float().cpu()
    rows = encode(candidates, model.tokenizer, template=template)
    answers = torch.stack([unembedding[list(row.ids[row.start : row.stop])].mean(0) for row in rows])
    answers = answers.reshape(len(pairs), 2, -1)
    places = [pair.record for pair in pairs]
    for states in _states(model, encode(records, model.tokenizer, template=template)):
        yield (states[places][:, None] * answers).numpy()


def _states(model: LanguageModel, encoded: Sequence[Encoded]) -> Tensor:
    """[L, n, d] what each block gives at the token from which a row's first target is predicted, fp32 on the CPU."""
    sites = model.anatomy.sites("resid")
    states = torch.empty(len(sites), len(encoded), model.anatomy.d_model)
    for batch in batches(encoded):
        rows = list(batch.rows)
        before = torch.tensor([encoded[row].start - 1 for row in rows])
        store = capture(model, batch.to(model.device), sites)
        for layer, site in enumerate(sites):
            states[layer, rows] = store[site].float().cpu()[torch.arange(len(rows)), before]
    return states
