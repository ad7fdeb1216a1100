"""What every layer of a model still gives away of the forgotten answers, read through lenses.

The original's lens reads every model that was made from it, whatever became of its own readout. Gold's layers speak
another language, so gold is read with a lens of its own. Both are fitted on retain rows: a lens fitted on the forget
set would store it.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

from palimpsest.data.batches import Encoded, encode
from palimpsest.data.records import subject_of
from palimpsest.lens.erasure import AnswerReading, erasure_ratio, found_by_candidates, read_answers
from palimpsest.lens.lens import Lens
from palimpsest.lens.trajectory import first_of_last_run
from palimpsest.metrics.scores import Measure, Row
from palimpsest.models.language_model import LanguageModel
from palimpsest.unlearn.request import Request

CANDIDATES = 4
"""Tokens that the attacker tries from each layer."""
BY_LAYER = "forget_layers"
"""The set under which the layers stand one by one; its rows are the forget set's."""


@dataclass(frozen=True)
class Lenses:
    """With what the models are read."""

    original: Lens
    gold: Lens | None = None


@dataclass(frozen=True)
class Layers:
    """The forgotten answers, and how they are read at every layer."""

    lenses: Lenses
    request: Request
    original: LanguageModel
    gold: LanguageModel | None

    @property
    def measures(self) -> tuple[Measure, ...]:
        """Of the answer as a whole, then of each layer, the model itself last."""
        lens, n_layers = self.lenses.original.kind, self.original.anatomy.n_layers
        names = [*(f"layer {layer}" for layer in range(n_layers)), "the model itself"]
        by_layer = [
            Measure(
                _key(layer),
                BY_LAYER,
                f"lens@{lens}: exp(-mean NLL of the answer's tokens), read at {name}",
                "probability",
                f"Answer probability, {name}",
                f"How likely the true answer is to whoever reads {name} (layer l is what block l reads).",
                "toward gold",
            )
            for layer, name in enumerate(names)
        ]
        legible = Measure(
            "legible_probability",
            "forget",
            f"lens@{lens}: the largest over the layers and the model of exp(-mean NLL of the answer's tokens)",
            "probability",
            "Answer probability, most telling layer",
            "How likely the true answer is to whoever reads the layer that tells most.",
            "toward gold",
        )
        reach = Measure(
            "within_reach",
            "forget",
            f"candidates@{lens}: every answer token is among the {CANDIDATES} likeliest of some layer",
            "share",
            "Answer within an attacker's reach",
            f"The share of answers that an attacker finds who tries {CANDIDATES} tokens from every layer.",
            "toward gold",
        )
        erased = Measure(
            "erased_from_layers",
            "forget",
            f"erasure@{lens}: share of the layers' log-probability beyond gold's that is lost",
            "share",
            "Erased from the layers",
            "0 where every layer tells as much as the original's, 1 where none tells more than gold's; of the answers "
            "that some layer of the original knows better than gold.",
            "toward gold",
        )
        said = Measure(
            "said_by_some_layer",
            "forget",
            f"depth@{lens}: some layer's, or the model's, likeliest tokens are the answer",
            "share",
            "Answer said by some layer",
            "The share of answers that some layer would give if it were the last.",
            "toward gold",
        )
        taken_back = Measure(
            "taken_back",
            "forget",
            f"depth@{lens}: some layer's likeliest tokens are the answer, the model's are not",
            "share",
            "Answer said and taken back",
            "The share of answers that some layer gives and a later one takes back.",
            "toward gold",
        )
        decided = Measure(
            "decided_at",
            "forget",
            f"depth@{lens}: the first layer from which on the likeliest tokens are the answer, to the end; "
            f"{n_layers + 1} where the model is wrong",
            "layer",
            "Layer at which the answer is decided",
            f"How deep the answer lies, over all answers, those that are no longer said counting as {n_layers + 1}, "
            "so that it is no mean over survivors.",
            "toward gold",
        )
        return (legible, reach, said, taken_back, decided, *([erased] if any(self._anchored) else []), *by_layer)

    def rows(self, name: str, model: LanguageModel) -> Iterator[Row]:
        """What was measured of one model, item by item."""
        read = self._read(model)
        values = {"forget/legible_probability": [reading.probability.max().item() for reading in read]}
        values["forget/within_reach"] = found_by_candidates(read, CANDIDATES).double().tolist()
        right = [reading.right for reading in read]
        values["forget/said_by_some_layer"] = [float(by_layer.any()) for by_layer in right]
        values["forget/taken_back"] = [float(by_layer.any() and not by_layer[-1]) for by_layer in right]
        values["forget/decided_at"] = [float(first_of_last_run(by_layer)) for by_layer in right]
        for layer in range(self.original.anatomy.n_layers + 1):
            values[f"{BY_LAYER}/{_key(layer)}"] = [reading.probability[layer].item() for reading in read]
        for measure, of_items in values.items():
            for record, value in zip(self.request.forget, of_items, strict=True):
                yield Row(name, measure, record.id, subject_of(record), value)
        for record, reading, anchors in zip(self.request.forget, read, self._anchored, strict=True):
            if anchors and (ratio := erasure_ratio(*anchors, reading)) is not None:
                yield Row(name, "forget/erased_from_layers", record.id, subject_of(record), ratio)

    def _read(self, model: LanguageModel) -> Sequence[AnswerReading]:
        if model is self.original:
            return self._original
        if model is self.gold and self._gold is not None:
            return self._gold
        return read_answers(self.lenses.original, model, self._encoded, fitted_to=self.original)

    @cached_property
    def _encoded(self) -> list[Encoded]:
        return encode(self.request.forget, self.original.tokenizer, template=self.request.template)

    @cached_property
    def _original(self) -> list[AnswerReading]:
        return read_answers(self.lenses.original, self.original, self._encoded)

    @cached_property
    def _gold(self) -> list[AnswerReading] | None:
        if self.gold is None or self.lenses.gold is None:
            return None
        return read_answers(self.lenses.gold, self.gold, self._encoded)

    @cached_property
    def _anchored(self) -> list[tuple[AnswerReading, AnswerReading] | None]:
        """The original's and gold's reading of each answer that a layer of the original knows better than gold."""
        if self._gold is None:
            return [None] * len(self._original)
        pairs = zip(self._original, self._gold, strict=True)
        return [pair if erasure_ratio(*pair, pair[0]) is not None else None for pair in pairs]


def _key(layer: int) -> str:
    return f"layer_{layer}"
