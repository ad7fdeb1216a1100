"""Models trained from scratch, whose past is known exactly.

Full read everything; gold never read the forget set. Both are trained side by side, one core each, and kept in a cache
under the hash of their recipe and text. Sham, the full model trained a little longer on retain data alone, shows what
further training does to a score by itself.
"""

import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase

from palimpsest.data.batches import Encoded, encode
from palimpsest.data.packing import pack
from palimpsest.data.prompts import Template, render
from palimpsest.data.records import Record, records_hash
from palimpsest.errors import SpecError
from palimpsest.files import content_hash
from palimpsest.models.anatomy import Anatomy
from palimpsest.models.language_model import LanguageModel, load
from palimpsest.models.processes import side_by_side
from palimpsest.models.tokenizers import byte_pair_tokenizer, word_tokenizer
from palimpsest.models.training import TrainingSettings, train
from palimpsest.progress import Report, progress


@dataclass(frozen=True)
class Architecture:
    """A Llama's size."""

    layers: int = 4
    width: int = 128
    mlp_width: int = 512
    heads: int = 4
    context: int = 256

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if value < 1:
                raise SpecError(f"architecture: {name} is {value}; it must be at least 1")
        if self.width % (2 * self.heads):
            raise SpecError(
                f"architecture: width {self.width} cannot be shared out to {self.heads} heads of even width; "
                f"choose a multiple of {2 * self.heads}"
            )


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
    checkpoint was. A script calls this under `if __name__ == "__main__":`, since the processes import it.

    Args:
        corpus: what they read.
        recipe: how they are made.
        cache: the folder of trained models; by default `organisms` in `cache_folder()`.

    Raises:
        TrainingError: a loss is not finite, there is nothing to read, or a process died.
        StorageError: the cache cannot be written.
    """
    folder = Path(cache or cache_folder() / "organisms") / corpus_hash(corpus, recipe)[:16]
    texts = {"full": (*corpus.forget, *corpus.retain), "gold": corpus.retain}
    missing = [name for name in texts if not (folder / name / "config.json").exists()]
    if missing:
        tokenizer = _tokenizer(corpus, recipe)
        work = {}
        for name in missing:
            examples = training_examples(texts[name], tokenizer, recipe)
            work[f"training {name}"] = partial(_train_one, name, examples, tokenizer, recipe, folder / name)
        side_by_side(work)
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
    model: LanguageModel,
    retain: Sequence[Record],
    *,
    template: Template,
    steps: int,
    learning_rate: float,
    seed: int = 0,
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


def untrained_like(model: LanguageModel, seed: int) -> LanguageModel:
    """The same architecture with random weights, of the same type and on the same device."""
    torch.manual_seed(seed)
    network: Any = type(model.network)(model.network.config)
    network.to(model.device, model.network.dtype).eval()
    return LanguageModel(network, model.tokenizer, Anatomy.of(network), "untrained")


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
    return "".join(render(record, PreTrainedTokenizerBase()))  # any tokenizer does: the plain template asks it nothing


def _control(folder: Path, stored: str, name: str) -> LanguageModel:
    model = load(folder / stored, check=False)
    model.name = name
    return model


def _train_one(
    name: str,
    examples: list[Encoded],
    tokenizer: PreTrainedTokenizerBase,
    recipe: Recipe,
    folder: Path,
    report: Report,
) -> None:
    model = new_model(recipe.architecture, tokenizer, recipe.training.seed)
    model.name = name
    train(model, examples, recipe.training, checkpoint=folder.with_name(f"{name}.checkpoint"), report=report)
    model.save(folder)
