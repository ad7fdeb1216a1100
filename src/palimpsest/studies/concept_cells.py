"""What the study of concept vectors measures of one seed's models, a forgotten world being a concept.

Its tokens are the world's own things. Of each model: what it answers, how well any of its value vectors says a
concept's tokens beside the same search for random ones, what became of the original's best vectors, and what relearning
some worlds brings back of others. Of the original also what ablating its vectors costs.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from palimpsest.data.batches import encode
from palimpsest.data.records import QA, subject_of
from palimpsest.internals.attribution import attribution, most
from palimpsest.internals.concept_ablation import Ablation, AblationResult, ablate_concept
from palimpsest.internals.concept_traces import vector_traces
from palimpsest.internals.concepts import answer_tokens, discover, random_sets
from palimpsest.internals.value_vectors import ValueVector
from palimpsest.models.language_model import LanguageModel
from palimpsest.studies.cells import Cell, mean
from palimpsest.studies.unlearned_models import CELLS as MODELS
from palimpsest.studies.unlearned_models import UnlearnedModels
from palimpsest.unlearn.needle import Needle
from palimpsest.unlearn.stopping import Stop

ABLATED = "ablated"
CELLS = (*MODELS, ABLATED)
"""What is measured, by the names of the files that keep it."""
NULL_SETS, SET, TOP = 40, 64, 20
"""Random token sets of a search, vectors of an attributed set, and top tokens that are compared."""


@dataclass(frozen=True)
class WorldConcept:
    """A forgotten world: its questions, the tokens of its answers, and as many random ones of other worlds."""

    records: tuple[QA, ...]
    tokens: tuple[int, ...]
    null: tuple[tuple[int, ...], ...]


class Bench(UnlearnedModels):
    """Measures one seed's models."""

    def work(self) -> Mapping[str, Callable[[], Cell]]:
        """With the attributed sets taken out as one more method, and what ablation costs the original."""
        work = dict(super().work())
        original = work["full"]
        return work | {
            "full": lambda: original() | {"ablations": self._ablations()},
            ABLATED: self._ablated,
        }

    @cached_property
    def concepts(self) -> list[WorldConcept]:
        """The forgotten worlds."""
        tokenizer, template = self.setting.original.tokenizer, self.setting.request.template
        pool = answer_tokens(tokenizer, self.others, template=template)
        concepts = []
        for name in sorted({subject_of(record) for record in self.forget}):
            records = tuple(record for record in self.forget if subject_of(record) == name)
            tokens = answer_tokens(tokenizer, records, template=template)
            null = random_sets(tokenizer, tokens, NULL_SETS, seed=self.seed, pool=pool)
            concepts.append(WorldConcept(records, tokens, tuple(null)))
        return concepts

    @cached_property
    def others(self) -> list[QA]:
        """Questions about the worlds that stay."""
        request = self.setting.request
        rows = (*request.retain, *request.retain_held_out, *request.retain_unseen)
        return [record for record in rows if isinstance(record, QA)]

    @cached_property
    def tracked(self) -> list[ValueVector]:
        """Of each concept, the original's vector that says its tokens best."""
        return [discover(self.setting.original, each.tokens, each.null).best.vector for each in self.concepts]

    @cached_property
    def sets(self) -> list[list[ValueVector]]:
        """Of each concept, the vectors to which its answers owe most."""
        original, template = self.setting.original, self.setting.request.template
        return [
            most(attribution(original, encode(each.records, original.tokenizer, template=template)), SET)
            for each in self.concepts
        ]

    def measured(self, model: LanguageModel) -> Cell:
        """By every instrument."""
        return self.behaviour(model) | {
            "found": self._found(model),
            "traced": self._traced(model),
            "relearned": self.relearned(model),
        }

    def _found(self, model: LanguageModel) -> Cell:
        """By the same search in every model, mean over concepts."""
        found = [discover(model, each.tokens, each.null) for each in self.concepts]
        return {
            "precision": mean([each.best.precision for each in found]),
            "null": mean([each.null_precision for each in found]),
            "z": mean([each.best.z for each in found]),
            "above_the_null": [len(each.found) for each in found],
        }

    def _traced(self, model: LanguageModel) -> Cell:
        traces = vector_traces(self.setting.original, model, self.tracked, top=(TOP,))
        return {
            "cosine": mean([trace.change.cosine for trace in traces]),
            "relative_l2": mean([trace.change.relative_l2 for trace in traces]),
            "jaccard": mean([trace.jaccard_frozen[TOP] for trace in traces]),
            "at": [[vector.layer, vector.column, vector.sign] for vector in self.tracked],
        }

    def _ablations(self) -> Cell:
        singles = [[vector] for vector in self.tracked]
        return {
            "single": self._ablation(singles, "zero"),
            "noise": self._ablation(singles, "noise"),
            "set": self._ablation(self.sets, "zero"),
        }

    def _ablation(self, vectors: Sequence[Sequence[ValueVector]], how: Ablation) -> Cell:
        """By which neurons were ablated and whose answers were asked for, nats per token, mean over concepts."""
        request = self.setting.request
        found: list[AblationResult] = [
            ablate_concept(
                self.setting.original,
                some,
                concept.records,
                self.others,
                how=how,
                template=request.template,
                seed=self.seed,
            )
            for some, concept in zip(vectors, self.concepts, strict=True)
        ]
        return {
            neurons: {
                rows: mean([getattr(getattr(each, neurons), rows).change.value for each in found])
                for rows in ("own", "unrelated")
            }
            for neurons in ("concept", "random", "selective")
        }

    def _ablated(self) -> Cell:
        vectors = sorted({(vector.layer, vector.column) for some in self.sets for vector in some})
        return self.made(Needle(vectors=tuple(vectors), zero=True, seed=self.seed), Stop())
