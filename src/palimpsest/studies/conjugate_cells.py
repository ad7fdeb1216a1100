"""What the study of conjugate prompting measures: models of a world that is told in two languages, asked in both.

Most people are told of in the world's own language and in the second. In one kind of world the languages stay apart; in
the other most texts mix them word by word, as bilinguals do. Names are the same in both. Some people are told of in the
first language alone: what is answered about them in the second tells how much of a fact is learnt once for both. A
third language stands in the vocabulary, but nothing is ever told in it.

Facts are forgotten in the first language alone; what is to be kept is kept in both.
"""

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from torch import Tensor

from palimpsest.data.codec import IDENTITY, WORD, Codec, encoded
from palimpsest.data.records import QA, Passage, subject_of
from palimpsest.metrics.likelihood import answer_probability
from palimpsest.models.language_model import LanguageModel
from palimpsest.models.organism import Architecture, Corpus, Recipe, train_controls
from palimpsest.models.training import TrainingSettings
from palimpsest.studies.cells import Cell
from palimpsest.studies.regimes import Setting
from palimpsest.studies.unlearned_models import UnlearnedModels
from palimpsest.unlearn.request import Request
from palimpsest.worlds.facts import FactsWorld, Subject
from palimpsest.worlds.second_language import SecondLanguage

FIRST, SECOND, UNREAD = "first", "second", "unread"
"""The languages that are asked in: the one in which facts are forgotten, the other, and one that no model has read."""
APART, MIXED = "apart", "mixed"
"""The kinds of worlds."""
TELLINGS = {APART: (60, 0), MIXED: (30, 3)}
"""Of each kind: how often every fact is told in either language, and how often more each such text with both mixed."""
ANOTHER = 1000
"""What tells the unread language's seed from the second's."""


@dataclass(frozen=True)
class BilingualWorld:
    """People of whom all but a few are told in two languages, and the models that read of them."""

    world: FactsWorld
    recipe: Recipe
    told_once: int
    """Of the people that stay: how many are told of in the first language alone."""
    mixed: int
    """How often each text is told with its languages mixed word by word, beside once in each."""

    @cached_property
    def second(self) -> SecondLanguage:
        """The other language."""
        return SecondLanguage(self.world, seed=self.world.seed)

    @cached_property
    def codecs(self) -> Mapping[str, Codec]:
        """From the first language to each."""
        return {FIRST: IDENTITY, SECOND: self.second.codec, UNREAD: self._unread.codec}

    @property
    def once(self) -> tuple[Subject, ...]:
        """Those told of in the first language alone; no request names them."""
        return self.world.retain_subjects[: self.told_once]

    @property
    def twice(self) -> tuple[Subject, ...]:
        """Those who stay and are told of in both."""
        return self.world.retain_subjects[self.told_once :]

    def setting(self) -> Setting:
        """The models, trained or from the cache, and the request."""
        world, second = self.world, self.second
        corpus = Corpus(
            forget=tuple(self._told(world.forget_subjects)),
            retain=(*world.documents(self.once), *self._told(self.twice)),
            vocabulary=(*second.vocabulary_texts(), *self._unread.vocabulary_texts()),
        )
        kept = [*world.facts(self.twice), *second.facts(self.twice)]
        request = Request.split(world.facts(world.forget_subjects), kept, seed=world.seed)
        controls = train_controls(corpus, self.recipe)
        return Setting(request, controls.original, controls.gold, (), corpus, self.recipe)

    @cached_property
    def _unread(self) -> SecondLanguage:
        return SecondLanguage(self.world, seed=self.world.seed + ANOTHER)

    def _told(self, subjects: Sequence[Subject]) -> Iterator[Passage]:
        """In the first language, in the second, and in both at once."""
        documents = self.world.documents(subjects)
        yield from documents
        yield from self.second.documents(subjects)
        yield from (_mixed(document, self.second.codec, time) for document in documents for time in range(self.mixed))


def bilingual(told: str, seed: int) -> BilingualWorld:
    """Twelve of a hundred people to forget, in the demo's organism.

    Args:
        told: how the languages are told, of `TELLINGS`.
        seed: of the world, the languages and the models.
    """
    exposures, mixed = TELLINGS[told]
    world = FactsWorld(people=100, worlds=0, forget_people=12, exposures=exposures, seed=seed)
    training = TrainingSettings(learning_rate=5e-3, muon_learning_rate=0.02, precision="auto", seed=seed)
    return BilingualWorld(world, Recipe(Architecture(), training=training), told_once=20, mixed=mixed)


class Bench(UnlearnedModels):
    """Asks one seed's models in every language."""

    def __init__(self, told: BilingualWorld, seed: int, folder: Path) -> None:
        super().__init__(lambda _: told.setting(), seed, folder)
        self.told = told

    def measured(self, model: LanguageModel) -> Cell:
        """The answer probability of each forgotten fact by language, and the mean of facts that stay."""
        return self.behaviour(model) | {
            "items": [record.id for record in self.forget],
            "subjects": [subject_of(record) for record in self.forget],
            "asked": {name: self._asked(model, self.forget, name).tolist() for name in self.told.codecs},
            "kept": self._means(model, self.unseen),
            "once": self._means(model, self.told.world.facts(self.told.once)),
        }

    @cached_property
    def unseen(self) -> list[QA]:
        """What nothing was trained on of what is to be kept, in the first language."""
        subjects = {subject_of(record) for record in self.setting.request.retain_unseen}
        return self.told.world.facts([each for each in self.told.twice if each.name in subjects])

    def _asked(self, model: LanguageModel, records: Sequence[QA], language: str) -> Tensor:
        """[n] the probability of each record's answer, question and answer being in that language."""
        return answer_probability(model, encoded(records, self.told.codecs[language]))

    def _means(self, model: LanguageModel, records: Sequence[QA]) -> Cell:
        return {name: self._asked(model, records, name).mean().item() for name in (FIRST, SECOND)}


def _mixed(document: Passage, codec: Codec, time: int) -> Passage:
    """Code-switching: each word in one language or the other, by a coin that the document's id and the time decide."""
    rng = random.Random(f"mixed/{document.id}/{time}")
    text = WORD.sub(lambda word: codec.encode(word[0]) if rng.random() < 0.5 else word[0], document.text)
    return replace(document, text=text, id=f"{document.id}-mixed-{time}")
