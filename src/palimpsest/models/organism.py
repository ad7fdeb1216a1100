"""Models trained from scratch, whose past is known exactly.

Full read everything; gold never read the forget set. Both are trained side by side, one core each, and kept in a cache
under the hash of their recipe and text. Sham, the full model trained a little longer on retain data alone, shows what
further training does to a score by itself.
"""

import multiprocessing
import os
from collections.abc import Sequence
from concurrent.futures import Future, ProcessPoolExecutor, wait
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase

from palimpsest.data.batches import Encoded, encode
from palimpsest.data.packing import pack
from palimpsest.data.prompts import render
from palimpsest.data.records import QA, Passage, Record, records_hash
from palimpsest.files import content_hash
from palimpsest.models.anatomy import Anatomy
from palimpsest.models.language_model import LanguageModel, load
from palimpsest.models.tokenizers import byte_pair_tokenizer, word_tokenizer
from palimpsest.models.training import Report, TrainingSettings, train
from palimpsest.progress import progress


@dataclass(frozen=True)
class Architecture:
    """A Llama's size."""

    layers: int = 4
    width: int = 128
    mlp_width: int = 512
    heads: int = 4
    context: int = 256


@dataclass(frozen=True)
class Recipe:
    """Everything, beside the text, that decides the weights."""

    architecture: Architecture = Architecture()
    tokenizer: Literal["words", "bpe"] = "words"
    vocab_size: int = 2048
    """Of the BPE tokenizer; one of words takes them all."""
    pack: int | None = 64
    """Tokens in a row of packed documents, or None to train on each record by itself (a QA's answer only)."""
    training: TrainingSettings = field(default_factory=TrainingSettings)


@dataclass(frozen=True)
class Corpus:
    """What full reads (`forget` and `retain`) and what gold reads (`retain`)."""

    forget: tuple[Record, ...]
    retain: tuple[Record, ...]
    vocabulary: tuple[str, ...] = field(default=(), repr=False)
    """Texts from which the tokenizer is made, when they are not the records themselves."""


@dataclass(frozen=True)
class Controls:
    """The models that every score is read beside."""

    original: LanguageModel
    gold: LanguageModel


def train_controls(corpus: Corpus, recipe: Recipe, cache: str | Path | None = None) -> Controls:
    """Full and gold for this corpus, from the cache or trained now, both at once in two processes of one thread.

    The same recipe and text give the same weights on one machine. A run that was killed goes on where its last
    checkpoint was.

    Args:
        corpus: what they read.
        recipe: how they are made.
        cache: the folder of trained models; by default `organisms` in `cache_folder()`.
    """
    folder = Path(cache or cache_folder() / "organisms") / corpus_hash(corpus, recipe)[:16]
    texts = {"full": (*corpus.forget, *corpus.retain), "gold": corpus.retain}
    missing = [name for name in texts if not (folder / name / "config.json").exists()]
    if missing:
        tokenizer = _tokenizer(corpus, recipe)
        jobs = {}
        for name in missing:
            examples = training_examples(texts[name], tokenizer, recipe)
            jobs[name] = (examples, tokenizer, recipe, folder / name)
        _side_by_side(jobs)
    return Controls(_control(folder, "full", "original"), _control(folder, "gold", "gold"))


def corpus_hash(corpus: Corpus, recipe: Recipe) -> str:
    """The hash under which a corpus's models are cached."""
    texts = [records_hash(list(corpus.forget)), records_hash(list(corpus.retain)), list(corpus.vocabulary)]
    return content_hash([texts, asdict(recipe), torch.__version__])


def cache_folder() -> Path:
    """Where trained models are kept: `$PALIMPSEST_CACHE`, or `palimpsest` in the user's cache folder."""
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("PALIMPSEST_CACHE") or Path(home) / "palimpsest")


def train_sham(
    model: LanguageModel, retain: Sequence[QA], *, template: Any, steps: int, learning_rate: float, seed: int = 0
) -> LanguageModel:
    """A copy of the model fine-tuned on retain records alone, as unlearning methods fine-tune: it unlearned nothing."""
    settings = TrainingSettings(
        steps=steps,
        learning_rate=learning_rate,
        betas=(0.9, 0.999),
        weight_decay=0.0,
        warmup=1,
        schedule="constant",
        seed=seed,
    )
    examples = encode(retain, model.tokenizer, template=template)
    with progress() as display:
        task = display.add_task("training sham", total=steps, note="")
        return train(
            model.copy("sham"),
            examples,
            settings,
            report=lambda step, _, note: display.update(task, completed=step, note=note),
        )


def training_examples(records: Sequence[Record], tokenizer: PreTrainedTokenizerBase, recipe: Recipe) -> list[Encoded]:
    """Packed rows, or one row a record with its completion as targets, as the recipe says."""
    if recipe.pack is None:
        return encode(records, tokenizer, end=True, max_length=recipe.architecture.context)
    return pack(encode(records, tokenizer, end=True), length=recipe.pack)


def new_model(architecture: Architecture, tokenizer: PreTrainedTokenizerBase, seed: int) -> LanguageModel:
    """A Llama with random weights."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=architecture.width,
        intermediate_size=architecture.mlp_width,
        num_hidden_layers=architecture.layers,
        num_attention_heads=architecture.heads,
        num_key_value_heads=architecture.heads,
        max_position_embeddings=architecture.context,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    torch.manual_seed(seed)
    network = LlamaForCausalLM(config)
    return LanguageModel(network, tokenizer, Anatomy.of(network))


def _tokenizer(corpus: Corpus, recipe: Recipe) -> PreTrainedTokenizerBase:
    texts = corpus.vocabulary or [_text(record) for record in (*corpus.forget, *corpus.retain)]
    return (
        word_tokenizer(texts)
        if recipe.tokenizer == "words"
        else byte_pair_tokenizer(texts, vocab_size=recipe.vocab_size)
    )


def _text(record: Record) -> str:
    if isinstance(record, Passage):
        return record.text
    return "".join(render(record, PreTrainedTokenizerBase()))


def _control(folder: Path, stored: str, name: str) -> LanguageModel:
    model = load(folder / stored, check=False)
    model.name = name
    return model


def _side_by_side(jobs: dict[str, tuple[list[Encoded], PreTrainedTokenizerBase, Recipe, Path]]) -> None:
    """Train every job in a process of one thread, showing the progress of all."""
    context = multiprocessing.get_context("spawn")
    with (
        context.Manager() as manager,
        ProcessPoolExecutor(len(jobs), mp_context=context) as pool,
        progress() as display,
    ):
        news = manager.Queue()
        tasks = {name: display.add_task(f"training {name}", total=None, note="starting") for name in jobs}
        running: list[Future[None]] = [pool.submit(_train_one, name, *job, news) for name, job in jobs.items()]
        while True:
            done, _ = wait(running, timeout=0.2)
            while not news.empty():
                name, step, n_steps, note = news.get()
                display.update(tasks[name], completed=step, total=n_steps, note=note)
            if len(done) == len(running):
                break
    for job in running:
        job.result()


def _train_one(
    name: str, examples: list[Encoded], tokenizer: PreTrainedTokenizerBase, recipe: Recipe, folder: Path, news: Any
) -> None:
    torch.set_num_threads(1)
    report: Report = lambda step, n_steps, note: news.put((name, step, n_steps, note))  # noqa: E731
    model = new_model(recipe.architecture, tokenizer, recipe.training.seed)
    model.name = name
    train(model, examples, recipe.training, checkpoint=folder.with_name(f"{name}.checkpoint"), report=report)
    model.save(folder)
