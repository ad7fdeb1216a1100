"""A small organism for the whole suite: full, gold and a request on invented people, trained once in seconds."""

import os
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from filelock import FileLock
from hypothesis import settings

from palimpsest.attacks.relearn import FineTuning, Relearning
from palimpsest.data.batches import encode
from palimpsest.metrics.likelihood import answer_probability
from palimpsest.models.language_model import LanguageModel
from palimpsest.models.organism import Architecture, Corpus, Recipe, train_controls
from palimpsest.models.training import TrainingSettings
from palimpsest.unlearn.request import Request
from palimpsest.worlds.facts import FactsWorld

# A clock says how busy the machine is, not whether a property holds.
settings.register_profile("suite", deadline=None)
settings.load_profile("suite")

WORLD = FactsWorld(people=18, worlds=0, forget_people=5, exposures=1)
RECIPE = Recipe(
    Architecture(layers=2, width=64, mlp_width=256, heads=4, context=64),
    pack=None,
    training=TrainingSettings(epochs=40, batch_size=16, learning_rate=5e-3, muon_learning_rate=0.02, warmup=10),
)


@dataclass(frozen=True)
class Organism:
    """Full knows every fact, gold only the retain set's."""

    request: Request
    full: LanguageModel
    gold: LanguageModel
    folder: Path
    """Where `full` and `gold` stand as model folders."""


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Organism:
    """The organism as it was trained: never change its weights."""
    forget, retain = WORLD.facts(WORLD.forget_subjects), WORLD.facts(WORLD.retain_subjects)
    corpus = Corpus(tuple(forget), tuple(retain), tuple(WORLD.vocabulary_texts()))
    base = tmp_path_factory.getbasetemp()
    cache = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "organisms"
    with FileLock(f"{cache}.lock"):  # pytest's workers have one organism between them
        controls = train_controls(corpus, RECIPE, cache)
    return Organism(Request.split(forget, retain), controls.original, controls.gold, next(cache.iterdir()))


@pytest.fixture
def organism(trained: Organism) -> Organism:
    """The organism with copies of its models, to be changed at will."""
    return Organism(trained.request, trained.full.copy("full"), trained.gold.copy("gold"), trained.folder)


@pytest.fixture(scope="session")
def suppressed(trained: Organism) -> LanguageModel:
    """The original taught wrong answers until it says the right ones hardly more than gold: it knows them still."""
    forget = trained.request.forget
    wrong = [replace(row, answer=row.wrong[place]) for place in (0, 1) for row in forget]  # type: ignore[union-attr]
    settings = replace(Relearning().training(5e-4, 0), batch_size=16)
    learner = FineTuning(trained.full, encode(wrong, trained.full.tokenizer), {}, settings)
    level = answer_probability(trained.gold, forget).mean() + 0.04
    for steps in range(2, 80, 2):
        learner.fit_to(steps)
        if answer_probability(learner.model, forget).mean() <= level:
            break
    return learner.model
