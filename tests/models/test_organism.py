"""The organism: full and gold differ in what they read and in nothing else, and are made once, whatever happens."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
from tests.conftest import RECIPE, WORLD, Organism

from palimpsest.data.batches import encode
from palimpsest.data.records import QA, Passage, reworded
from palimpsest.errors import SpecError, StorageError, TrainingError
from palimpsest.metrics.generation import generate_answers
from palimpsest.metrics.likelihood import answer_probability
from palimpsest.models import organism as rooms
from palimpsest.models.organism import (
    Architecture,
    Corpus,
    Recipe,
    cache_folder,
    corpus_hash,
    new_model,
    train_controls,
    train_sham,
    training_examples,
)
from palimpsest.models.tokenizers import word_tokenizer
from palimpsest.models.training import TrainingSettings, train
from palimpsest.worlds.facts import FactsWorld

SMALL = FactsWorld(people=8, worlds=6, forget_people=2, forget_worlds=1, exposures=3)
TINY = Recipe(
    Architecture(layers=1, width=16, mlp_width=32, heads=2, context=64),
    pack=32,
    training=TrainingSettings(steps=4, batch_size=4),
)


def corpus_of(world: FactsWorld) -> Corpus:
    return Corpus(
        tuple(world.documents(world.forget_subjects)),
        tuple(world.documents(world.retain_subjects)),
        tuple(world.vocabulary_texts()),
    )


def no_work(work: object) -> None:
    raise AssertionError("something was trained")


def one_after_the_other(work):
    """In place of `side_by_side`: in this process, which takes no seconds to start."""
    for task in work.values():
        task(lambda step, n_steps, note: None)


@pytest.fixture
def here(monkeypatch):
    monkeypatch.setattr(rooms, "side_by_side", one_after_the_other)


# The cache.


def trained_corpus() -> Corpus:
    facts = [tuple(WORLD.facts(subjects)) for subjects in (WORLD.forget_subjects, WORLD.retain_subjects)]
    return Corpus(*facts, tuple(WORLD.vocabulary_texts()))


def test_what_is_in_the_cache_is_not_trained_again(trained: Organism, monkeypatch):
    monkeypatch.setattr(rooms, "side_by_side", no_work)
    files = {path: path.stat().st_mtime_ns for path in trained.folder.rglob("*")}
    again = train_controls(trained_corpus(), RECIPE, trained.folder.parent)
    assert again.original.fingerprint() == trained.full.fingerprint()
    assert again.gold.fingerprint() == trained.gold.fingerprint()
    assert (again.original.name, again.gold.name) == ("original", "gold")
    assert {path: path.stat().st_mtime_ns for path in trained.folder.rglob("*")} == files


def test_only_the_missing_model_is_trained(tmp_path, here, monkeypatch):
    first = train_controls(corpus_of(SMALL), TINY, tmp_path)
    (folder,) = tmp_path.iterdir()
    (folder / "gold").rename(tmp_path / "gold")
    asked = []
    monkeypatch.setattr(rooms, "side_by_side", lambda work: (asked.extend(work), one_after_the_other(work)))
    again = train_controls(corpus_of(SMALL), TINY, tmp_path)
    assert asked == ["training gold"]
    assert again.gold.fingerprint() == first.gold.fingerprint()


def changed_corpora() -> list[Corpus]:
    corpus = corpus_of(SMALL)
    first, *others = corpus.retain
    return [
        replace(corpus, retain=(replace(first, text=first.text + " "), *others)),
        replace(corpus, forget=corpus.forget[1:]),
        replace(corpus, forget=corpus.forget[1:], retain=(*corpus.retain, corpus.forget[0])),
        replace(corpus, vocabulary=corpus.vocabulary[1:]),
        corpus_of(replace(SMALL, seed=1)),
    ]


def changed_recipes() -> list[Recipe]:
    return [
        replace(TINY, architecture=replace(TINY.architecture, layers=2)),
        replace(TINY, tokenizer="bpe"),
        replace(TINY, pack=None),
        replace(TINY, training=replace(TINY.training, seed=1)),
        replace(TINY, training=replace(TINY.training, learning_rate=1e-3)),
    ]


def test_other_text_or_another_recipe_is_another_folder():
    corpus = corpus_of(SMALL)
    assert corpus_hash(corpus_of(replace(SMALL)), replace(TINY)) == corpus_hash(corpus, TINY)
    hashes = [corpus_hash(corpus, TINY)]
    hashes += [corpus_hash(changed, TINY) for changed in changed_corpora()]
    hashes += [corpus_hash(corpus, recipe) for recipe in changed_recipes()]
    assert len(set(hashes)) == len(hashes) == 11


def test_the_cache_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("PALIMPSEST_CACHE", str(tmp_path))
    assert cache_folder() == tmp_path
    monkeypatch.delenv("PALIMPSEST_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "palimpsest"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_folder() == Path.home() / ".cache" / "palimpsest"


# Full and gold.


def read_by(monkeypatch, corpus: Corpus, recipe: Recipe, cache: Path) -> dict[str, str]:
    """The very text that each model is trained on, decoded from its rows."""
    texts = {}

    def look(work):
        for name, task in work.items():
            _, examples, tokenizer, *_ = task.args
            texts[name.removeprefix("training ")] = "\n".join(tokenizer.decode(row.ids) for row in examples)
        raise InterruptedError

    monkeypatch.setattr(rooms, "side_by_side", look)
    with pytest.raises(InterruptedError):
        train_controls(corpus, recipe, cache)
    return texts


@pytest.mark.parametrize("recipe", [TINY, replace(TINY, pack=None), replace(TINY, tokenizer="bpe")])
def test_gold_never_reads_a_name_or_a_thing_of_the_forget_set(recipe, monkeypatch, tmp_path):
    texts = read_by(monkeypatch, corpus_of(SMALL), recipe, tmp_path)
    people, worlds = SMALL.forget_subjects[:2], SMALL.forget_subjects[2:]
    secrets = [person.name.split()[1] for person in people]
    secrets += [word for world in worlds for word in (world.name, *world.answers)]
    assert len(secrets) == 2 + 11
    # A packed row may be cut inside a name, so spaces and ends are taken out.
    squeezed = {name: re.sub(r"\s|<\|end\|>", "", text) for name, text in texts.items()}
    assert all(secret in squeezed["full"] for secret in secrets)
    assert not [secret for secret in secrets if secret in squeezed["gold"]]
    known = [subject.name.split()[-1] for subject in SMALL.retain_subjects]
    assert all(name in squeezed["full"] and name in squeezed["gold"] for name in known)


def test_gold_and_full_start_alike_and_share_one_tokenizer(trained: Organism):
    full, gold = (json.loads((trained.folder / name / "tokenizer.json").read_text()) for name in ("full", "gold"))
    assert full == gold
    assert trained.gold.tokenizer.get_vocab() == trained.full.tokenizer.get_vocab()
    configs = [json.loads((trained.folder / name / "config.json").read_text()) for name in ("full", "gold")]
    assert configs[0] == configs[1]
    assert trained.gold.weights_hash() != trained.full.weights_hash()
    text = "\n".join(f"Question: {fact.question}" for fact in trained.request.forget)
    assert trained.gold.tokenizer.unk_token_id not in trained.gold.tokenizer(text)["input_ids"]


def test_full_knows_everything_and_gold_the_retain_set(trained: Organism):
    forget, retain = WORLD.facts(WORLD.forget_subjects), WORLD.facts(WORLD.retain_subjects)
    known = {
        (model.name, len(facts)): answer_probability(model, facts).mean().item()
        for model in (trained.full, trained.gold)
        for facts in (forget, retain)
    }
    assert known["original", len(forget)] > 0.85 and known["original", len(retain)] > 0.85
    assert known["gold", len(retain)] > 0.85 > 0.3 > known["gold", len(forget)]


def test_the_same_recipe_gives_the_same_model_and_initial_weights_follow_the_seed(here, tmp_path):
    first, second = (train_controls(corpus_of(SMALL), TINY, tmp_path / name) for name in ("first", "second"))
    assert first.original.fingerprint() == second.original.fingerprint()
    assert first.gold.fingerprint() == second.gold.fingerprint()
    tokenizer = first.gold.tokenizer
    hashes = [new_model(TINY.architecture, tokenizer, seed).weights_hash() for seed in (0, 0, 1)]
    assert hashes[0] == hashes[1] != hashes[2]


def test_what_a_recipe_makes_of_records():
    tokenizer = word_tokenizer(SMALL.vocabulary_texts())
    documents = SMALL.documents(SMALL.subjects)
    packed = training_examples(documents, tokenizer, TINY)
    assert {len(row.ids) for row in packed[:-1]} == {32}
    tokens = [token for row in packed for token in row.ids]
    assert tokenizer.decode(tokens).split("<|end|>")[:-1] == [document.text for document in documents]
    facts = SMALL.facts(SMALL.subjects)
    by_record = training_examples(facts, tokenizer, replace(TINY, pack=None))
    answers = [tokenizer.decode(row.ids[row.start : row.stop]) for row in by_record]
    assert answers == [f" {fact.answer}<|end|>" for fact in facts]


@pytest.mark.parametrize("tokenizer", ["words", "bpe"])
def test_without_vocabulary_texts_the_tokenizer_is_made_of_forget_and_retain_records(tokenizer, here, tmp_path):
    forget = (QA("Who wrote Dune?", "Frank Herbert"), Passage("The spice must flow."))
    retain = (QA("Who wrote Emma?", "Jane Austen"), Passage("It is a truth universally acknowledged."))
    recipe = replace(TINY, tokenizer=tokenizer, pack=8)
    controls = train_controls(Corpus(forget, retain), recipe, tmp_path)
    assert controls.gold.tokenizer.get_vocab() == controls.original.tokenizer.get_vocab()
    for record in (*forget, *retain):
        (row,) = encode([record], controls.gold.tokenizer)
        assert controls.gold.tokenizer.unk_token_id not in row.ids


# Sham.


def test_sham_unlearns_nothing_and_leaves_the_original_alone(trained: Organism):
    before = trained.full.fingerprint()
    sham = train_sham(trained.full, trained.request.retain, template="plain", steps=30, learning_rate=3e-4)
    assert trained.full.fingerprint() == before
    assert sham.name == "sham" and sham.weights_hash() != trained.full.weights_hash()
    known = [answer_probability(model, trained.request.forget).mean().item() for model in (trained.full, sham)]
    assert known[1] > 0.8 * known[0] > 0.6
    again = train_sham(trained.full, trained.request.retain, template="plain", steps=30, learning_rate=3e-4)
    assert again.weights_hash() == sham.weights_hash()


# What goes wrong.


def test_a_model_that_cannot_be_trained_leaves_nothing_half_written(here, tmp_path):
    hopeless = replace(TINY, training=TrainingSettings(steps=300, learning_rate=1e30, schedule="constant"))
    with pytest.raises(TrainingError, match="Lower the learning rate") as error:
        train_controls(corpus_of(SMALL), hopeless, tmp_path)
    assert "\n" not in str(error.value)
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_a_cache_that_cannot_be_written_is_said_so(here, tmp_path):
    (tmp_path / "cache").write_text("a file")
    with pytest.raises(StorageError, match="cannot be written"):
        train_controls(corpus_of(SMALL), TINY, tmp_path / "cache")


def test_a_world_without_text_for_gold_is_said_so(here, tmp_path):
    corpus = corpus_of(SMALL)
    with pytest.raises(TrainingError, match="there is nothing to train on"):
        train_controls(replace(corpus, retain=()), TINY, tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layers": 0}, "layers is 0; it must be at least 1"),
        ({"width": 100, "heads": 3}, "width 100 cannot be shared out to 3 heads of even width; choose a multiple of 6"),
        ({"width": 12, "heads": 4}, "choose a multiple of 8"),
    ],
)
def test_a_size_that_no_llama_has_is_refused(changes, message):
    with pytest.raises(SpecError, match=f"^architecture: .*{message}"):
        Architecture(**changes)


# Killed and started again.

KILL_RECIPE = replace(TINY, training=TrainingSettings(steps=500, batch_size=4))
JOB = """
if __name__ == "__main__":
    import signal, sys
    from tests.models.test_organism import KILL_RECIPE, SMALL, corpus_of, train_controls

    signal.signal(signal.SIGINT, signal.default_int_handler)
    train_controls(corpus_of(SMALL), KILL_RECIPE, sys.argv[1])
"""


needs_ps = pytest.mark.skipif(shutil.which("ps") is None, reason="there is no ps here to see which processes live")


@contextmanager
def started(folder: Path) -> Iterator[subprocess.Popen[str]]:
    """A process that trains full and gold into `folder / "cache"`, by two workers; given once the first has a state."""
    job = folder / "job.py"
    job.write_text(JOB)
    root = str(Path(__file__).resolve().parents[2])
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([root, os.environ.get("PYTHONPATH", "")])}
    process = subprocess.Popen(
        [sys.executable, str(job), str(folder / "cache")],
        env=environment,
        start_new_session=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        until(lambda: process.poll() is not None or any((folder / "cache").glob("*/*.checkpoint")), 120)
        assert process.poll() is None, process.stdout.read()
        yield process
    finally:
        if alive(process.pid):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def until(happened: Callable[[], object], seconds: float) -> None:
    end = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < end, f"it did not happen within {seconds} seconds"
        time.sleep(0.02)


def alive(group: int) -> list[str]:
    """The processes of a group that are not dead (a zombie is)."""
    listed = subprocess.run(["ps", "-eo", "pid=,pgid=,stat=,args="], capture_output=True, text=True, check=True).stdout
    rows = [line.split(None, 3) for line in listed.splitlines()]
    return [command for _, of_group, state, command in rows if int(of_group) == group and state[0] != "Z"]


def uninterrupted() -> dict[str, str]:
    """The weights that the job would end with, trained here and now."""
    corpus = corpus_of(SMALL)
    tokenizer = word_tokenizer(corpus.vocabulary)
    hashes = {}
    for name, text in {"full": (*corpus.forget, *corpus.retain), "gold": corpus.retain}.items():
        model = new_model(KILL_RECIPE.architecture, tokenizer, KILL_RECIPE.training.seed)
        examples = training_examples(text, tokenizer, KILL_RECIPE)
        hashes[name] = train(model, examples, KILL_RECIPE.training).weights_hash()
    return hashes


@needs_ps
def test_a_run_killed_with_9_leaves_no_worker_behind_and_goes_on_to_the_same_weights(tmp_path, here):
    with started(tmp_path) as process:
        os.kill(process.pid, signal.SIGKILL)  # the parent alone: nobody tells the workers
        until(lambda: not alive(process.pid), 20)
    (folder,) = (tmp_path / "cache").iterdir()
    assert not list(folder.glob("*/config.json")), "the run was over before it could be killed"
    states = list(folder.glob("*.checkpoint/state.safetensors"))
    assert states and all(path.parent.name in ("full.checkpoint", "gold.checkpoint") for path in states)
    controls = train_controls(corpus_of(SMALL), KILL_RECIPE, tmp_path / "cache")
    assert {"full": controls.original.weights_hash(), "gold": controls.gold.weights_hash()} == uninterrupted()
    assert sorted(path.name for path in folder.iterdir() if path.name[0] != ".") == ["full", "gold"]


@pytest.mark.slow
@needs_ps
def test_ctrl_c_stops_the_workers_and_only_the_parent_says_so(tmp_path):
    with started(tmp_path) as process:
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does: everyone hears it
        said, _ = process.communicate(timeout=30)
        assert alive(process.pid) == []
    assert process.returncode == -signal.SIGINT
    assert said.count("Traceback") == said.count("KeyboardInterrupt") == 1
    (folder,) = (tmp_path / "cache").iterdir()
    assert {path.name for path in folder.iterdir()} <= {"full.checkpoint", "gold.checkpoint"}
    assert list(folder.glob("*/state.safetensors"))


# The demo's organism.


@pytest.mark.slow
def test_the_demos_models_know_what_they_read_beyond_its_wording(tmp_path):
    from palimpsest.cli.run import DEMO
    from palimpsest.run.sources import open_source
    from palimpsest.run.spec import make_spec

    spec = make_spec(DEMO)
    controls = train_controls(open_source(spec).corpus, spec.model.recipe(), tmp_path)
    world = FactsWorld(seed=spec.seed)
    forget, retain = world.facts(world.forget_subjects), world.facts(world.retain_subjects)

    def accuracy(model, facts):
        said = generate_answers(model, facts, max_new_tokens=8)
        return sum(answer == fact.answer for answer, fact in zip(said, facts, strict=True)) / len(facts)

    full, gold = controls.original, controls.gold
    assert accuracy(full, [*forget, *retain]) >= 0.85
    assert accuracy(full, forget) >= 0.85
    assert accuracy(full, reworded([*forget, *retain])) >= 0.8
    assert accuracy(gold, retain) >= 0.85
    assert accuracy(gold, reworded(retain)) >= 0.8
    assert accuracy(gold, forget) <= 0.1
