"""A small GPT-2 that is trained on one half of WikiText-2 and kept in the cache; transformers 4 and 5 both read it."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from palimpsest.data.batches import encode
from palimpsest.data.packing import pack
from palimpsest.data.readers import read_records
from palimpsest.data.records import Passage, records_hash
from palimpsest.files import atomic_path, content_hash
from palimpsest.models.anatomy import Anatomy
from palimpsest.models.language_model import LanguageModel
from palimpsest.models.organism import cache_folder
from palimpsest.models.tokenizers import byte_pair_tokenizer
from palimpsest.models.training import TrainingSettings, train
from palimpsest.progress import console

GPT2_VOCABULARY, GPT2_END = 50257, "<|endoftext|>"
HELD_OUT = 0.1
"""Share of the half that the model does not read, to judge on."""


@dataclass(frozen=True)
class Size:
    """A GPT-2, and how it is trained."""

    layers: int
    width: int
    heads: int
    context: int
    vocabularies: tuple[int, ...]
    training: TrainingSettings


SIZES = {
    "tiny": Size(2, 32, 2, 32, (400,), TrainingSettings(steps=30, batch_size=8, muon_learning_rate=0.02, warmup=5)),
    "small": Size(
        layers=4,
        width=256,
        heads=4,
        context=512,
        vocabularies=(GPT2_VOCABULARY, 4096),
        training=TrainingSettings(
            steps=160, batch_size=2, learning_rate=3e-3, muon_learning_rate=0.01, warmup=10, precision="auto"
        ),
    ),
}


def halves(data: Path) -> tuple[list[Passage], tuple[list[Passage], list[Passage]]]:
    """What the model reads; and what lenses are fitted to and judged on, which it does not read."""
    first, second = (
        [Passage(row.text) for row in read_records(data / "wikitext2" / f"{name}.txt") if isinstance(row, Passage)]
        for name in ("test", "valid")
    )
    n = round((1 - HELD_OUT) * len(second))
    return first, (second[:n], second[n:])


def trained_model(data: Path, size: Size, vocabulary: int) -> Path:
    """Its folder; it is trained if it is not there."""
    texts, _ = halves(data)
    about = [asdict(size), vocabulary, records_hash(texts), torch.__version__]
    folder = cache_folder() / "benchmarks" / f"tuned-lens-{vocabulary}-{content_hash(about)[:12]}"
    if folder.exists():
        return folder
    tokenizer = _tokenizer(data, texts, size, vocabulary)
    config = GPT2Config(
        vocab_size=vocabulary,
        n_layer=size.layers,
        n_embd=size.width,
        n_head=size.heads,
        n_positions=size.context,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=tokenizer.eos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    torch.manual_seed(size.training.seed)
    network = GPT2LMHeadModel(config)
    model = LanguageModel(network, tokenizer, Anatomy.of(network), folder.name)
    rows = pack(encode(texts, tokenizer, end=True), length=size.context)

    def told(step: int, of: int, note: str) -> None:
        if step % 20 == 0:
            console.print(f"training a model with {vocabulary} entries: step {step} of {of}, {note}", highlight=False)

    train(model, rows, size.training, checkpoint=folder.with_suffix(".checkpoint"), report=told)
    with atomic_path(folder) as temporary:
        model.save(temporary)
        # Transformers 5 names a class of tokenizers of its own, which 4 does not know.
        path = temporary / "tokenizer_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"tokenizer_class": "PreTrainedTokenizerFast"}))
    return folder


def _tokenizer(data: Path, texts: Sequence[Passage], size: Size, vocabulary: int) -> PreTrainedTokenizerFast:
    if vocabulary == GPT2_VOCABULARY:
        found = data / "gpt2_bpe_and_tinystories_sample"
        pieces = Tokenizer(models.BPE.from_file(str(found / "gpt2_vocab.json"), str(found / "gpt2_merges.txt")))
        pieces.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        pieces.decoder = decoders.ByteLevel()
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=pieces, eos_token=GPT2_END, pad_token=GPT2_END, clean_up_tokenization_spaces=False
        )
    else:
        tokenizer = byte_pair_tokenizer([text.text for text in texts], vocab_size=vocabulary)
    tokenizer.model_max_length = size.context
    return tokenizer
