"""Where unlearning is tried: a request, the model it is put to and its gold, in three regimes that differ in overlap.

- `people`: a few invented people among many, who share first names, answers and wordings; retain is the others.
- `topic`: two whole fictional worlds; retain is running text (WikiText), and the harm is judged on a third thing,
  people and worlds that neither the method nor its budget ever saw. So WMDP is made.
- `tofu`: four authors of forty (TOFU's own rows).

And `people` with one thing changed: in `people_apart` the forgotten share no first name with the others, `people_few`
has a quarter of the retain rows, `people_wide` a model of twice the width. `lore` is the studies of concepts' own.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from palimpsest.data.passages import cut
from palimpsest.data.records import Passage
from palimpsest.errors import DataError
from palimpsest.models.language_model import LanguageModel
from palimpsest.models.organism import Architecture, Corpus, Recipe, train_controls
from palimpsest.models.training import TrainingSettings
from palimpsest.run.sources import open_source
from palimpsest.run.spec import make_spec
from palimpsest.unlearn.request import Request
from palimpsest.worlds.facts import FactsWorld

PASSAGES = 1500
"""Of running text that the model of `topic` reads; the first of them are the request's."""
TRAIN_PASSAGES, HELD_OUT_PASSAGES, NEW_PASSAGES = 200, 40, 200
FEWEST_WORDS, MOST_WORDS = 40, 48


@dataclass(frozen=True)
class Setting:
    """What a cell of a study starts from."""

    request: Request
    original: LanguageModel
    gold: LanguageModel
    new_text: tuple[Passage, ...]
    """Text that no model has read, for further training; empty where there is none at hand."""
    corpus: Corpus
    recipe: Recipe
    """Of what the models are made, and how."""
    neutral: tuple[Passage, ...] = ()
    """Text like what the models read, which tells nothing of the forget set: to fit lenses to."""


def people(
    seed: int,
    data: Path | None,
    *,
    apart: bool = False,
    retain_every: int = 1,
    width: int = 128,
) -> Setting:
    """Twelve of 120 people, in the demo's organism; the three worlds that its gold never read are left out.

    Args:
        seed: of the world, the models and the split.
        data: not needed.
        apart: the twelve have first names of their own.
        retain_every: of every so many retain rows the request has one; what is judged on stays.
        width: of the model.
    """
    world = FactsWorld(forget_names_apart=apart, seed=seed)
    training = TrainingSettings(learning_rate=5e-3, muon_learning_rate=0.02, precision="auto", seed=seed)
    told = tuple(world.documents(world.retain_subjects))
    corpus = Corpus(tuple(world.documents(world.forget_subjects)), told, tuple(world.vocabulary_texts()))
    recipe = Recipe(Architecture(width=width, mlp_width=4 * width, heads=width // 32), training=training)
    controls = train_controls(corpus, recipe)
    forget = [subject for subject in world.forget_subjects if subject.is_person]
    request = Request.split(world.facts(forget), world.facts(world.retain_subjects), seed=seed)
    fewer = replace(request, retain=request.retain[::retain_every])
    return Setting(fewer, controls.original, controls.gold, (), corpus, recipe, told)


def topic(seed: int, data: Path | None) -> Setting:
    """Two of twelve worlds; the model also reads sixty people and WikiText, which alone is the retain set."""
    world = FactsWorld(people=60, worlds=12, forget_people=0, forget_worlds=2, exposures=80, seed=seed)
    text = _wikitext(data, "valid.txt")[:PASSAGES]
    training = TrainingSettings(learning_rate=5e-3, muon_learning_rate=0.02, precision="auto", seed=seed)
    corpus = Corpus(tuple(world.documents(world.forget_subjects)), (*world.documents(world.retain_subjects), *text))
    recipe = Recipe(Architecture(), "bpe", 2048, 64, training)
    controls = train_controls(corpus, recipe)
    request = Request(
        forget=tuple(world.facts(world.forget_subjects)),
        retain=text[:TRAIN_PASSAGES],
        retain_held_out=text[TRAIN_PASSAGES : TRAIN_PASSAGES + HELD_OUT_PASSAGES],
        retain_unseen=tuple(world.facts(world.retain_subjects)),
    )
    new = _wikitext(data, "test.txt")[:NEW_PASSAGES]
    return Setting(request, controls.original, controls.gold, new, corpus, recipe, text)


def lore(seed: int) -> Setting:
    """Four of sixteen fictional worlds, whose things their documents name side by side: so concepts come about."""
    world = FactsWorld(people=0, worlds=16, forget_people=0, forget_worlds=4, exposures=60, lore=6, seed=seed)
    told = tuple(world.documents(world.retain_subjects))
    corpus = Corpus(tuple(world.documents(world.forget_subjects)), told, tuple(world.vocabulary_texts()))
    recipe = Recipe(Architecture(), training=TrainingSettings(seed=seed))
    controls = train_controls(corpus, recipe)
    request = Request.split(world.facts(world.forget_subjects), world.facts(world.retain_subjects), seed=seed)
    return Setting(request, controls.original, controls.gold, (), corpus, recipe, told)


def tofu(seed: int, data: Path | None) -> Setting:
    """As `examples/tofu.yaml`, with another seed."""
    spec = make_spec(
        {
            "seed": seed,
            "data": {"kind": "tofu", "path": str(data / "tofu") if data else "locuslab/TOFU"},
            "model": {
                "kind": "train",
                "architecture": {"layers": 4, "width": 128, "mlp_width": 512, "heads": 4, "context": 256},
                "tokenizer": "bpe",
                "vocab_size": 2048,
                "pack": None,
                "training": {
                    "epochs": 16,
                    "batch_size": 32,
                    "learning_rate": 5e-3,
                    "muon_learning_rate": 0.01,
                    "precision": "auto",
                },
            },
            "methods": ["kfade"],
        }
    )
    source = open_source(spec)
    recipe = spec.model.recipe()  # type: ignore[union-attr]
    controls = train_controls(source.corpus, recipe)
    return Setting(source.request, controls.original, controls.gold, (), source.corpus, recipe)


MAIN = ("people", "topic", "tofu")
REGIMES: dict[str, Callable[[int, Path | None], Setting]] = {
    "people": people,
    "topic": topic,
    "tofu": tofu,
    "people_apart": partial(people, apart=True),
    "people_few": partial(people, retain_every=4),
    "people_wide": partial(people, width=256),
}


def _wikitext(data: Path | None, name: str) -> tuple[Passage, ...]:
    """Paragraphs of WikiText-2, the longer ones cut, in the file's order."""
    path = (data or Path()) / "wikitext2" / name
    if data is None or not path.exists():
        raise DataError(f"{path}: WikiText-2 is needed here; give the folder that holds wikitext2/ with --data")
    lines = path.read_text(encoding="utf-8").splitlines()
    paragraphs = [line.strip() for line in lines if len(line.split()) >= FEWEST_WORDS and not line.startswith(" =")]
    documents = [Passage(text, id=f"{name}/{place}") for place, text in enumerate(paragraphs)]
    return tuple(piece for document in documents for piece in cut(document, words=MOST_WORDS))
