"""Translation as a codec, over any translator; whatever goes wrong is an error and never the text as it was.

A translation that quietly hands back its input would make an attack look like a plain question, so every answer of a
translator is checked. Translation loses wording, so it is never exact: score what a model says in the other language by
the encoded truth and not by translating it back.
"""

import importlib
import json
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer, PreTrainedTokenizerBase

from palimpsest.data.codec import Codec
from palimpsest.data.readers import CONTAINERS
from palimpsest.errors import DataError, ModelError
from palimpsest.files import content_hash, write_text

Backend = Callable[[list[str]], list[str]]
"""A translator in one direction: as many texts as it is given, in order."""

WILD = 4
"""A translation may have so many times its text's characters, or its text so many times its, ..."""
SLACK = 20
"""... and this many more, since short texts vary widely."""


@dataclass(frozen=True)
class Translation(Codec):
    """A codec that translates there with one backend and back with another.

    White space around a text is kept from the backends, and so are texts of white space alone. A text without a letter
    may come back as it was.
    """

    name: str
    forward: Backend = field(repr=False)
    backward: Backend = field(repr=False)
    same: Collection[str] = ()
    """Texts that are the same in both languages, such as names; others may not come back as they were."""
    exact = False

    def encode(self, text: str) -> str:
        """One text there; as `encode_all`."""
        return self.encode_all([text])[0]

    def decode(self, text: str) -> str:
        """One text back; as `encode_all`."""
        return self.decode_all([text])[0]

    def encode_all(self, texts: Sequence[str]) -> list[str]:
        """Every text there, in order.

        Raises:
            DataError: the backend failed, or gave another number of texts, something empty, its input, or a text of a
                wildly different length.
        """
        return self._translated(texts, self.forward, "there")

    def decode_all(self, texts: Sequence[str]) -> list[str]:
        """Every text back, in order; fails as `encode_all` does."""
        return self._translated(texts, self.backward, "back")

    def _translated(self, texts: Sequence[str], backend: Backend, way: str) -> list[str]:
        asked = list(dict.fromkeys(text.strip() for text in texts if text.strip()))
        given = _answers(f"{self.name}, {way}", backend, asked) if asked else []
        found = dict(zip(asked, map(str.strip, given), strict=True))
        for text, translation in found.items():
            _check(f"{self.name}, {way}", text, translation, self.same)
        return [_around(text, found) for text in texts]


def marian(
    path_or_id: str | Path, *, batch_size: int = 16, max_new_tokens: int = 256, device: str | None = None
) -> Backend:
    """A translator of the sequence-to-sequence kind (Marian's OPUS-MT and its like) from a folder or the hub.

    It decodes by the beam search that its generation configuration asks for, without sampling.

    Args:
        path_or_id: a model folder with safetensors weights, or a hub id.
        batch_size: texts at a time.
        max_new_tokens: the longest translation, in tokens; one that does not end before is an error.
        device: where to put it; the GPU when there is one.

    Raises:
        ModelError: no such model, no safetensors, weights missing, or a tokenizer that cannot be loaded.
    """
    tokenizer = _tokenizer(path_or_id)
    try:
        network, loading = AutoModelForSeq2SeqLM.from_pretrained(
            path_or_id, use_safetensors=True, trust_remote_code=False, output_loading_info=True
        )
    except Exception as error:  # transformers and safetensors raise exceptions of a dozen kinds
        raise ModelError(
            f"{path_or_id}: cannot be loaded as a translator: {_one_line(error)}; give a sequence-to-sequence model "
            "whose weights are safetensors"
        ) from error
    if loading["missing_keys"]:
        raise ModelError(
            f"{path_or_id}: {len(loading['missing_keys'])} weights are missing, {min(loading['missing_keys'])} among "
            "them; restore the files"
        )
    network.to(device or ("cuda" if torch.cuda.is_available() else "cpu")).eval()
    limit = getattr(network.config, "max_position_embeddings", None)

    def translate(texts: list[str]) -> list[str]:
        said = []
        for first in range(0, len(texts), batch_size):
            batch = tokenizer(texts[first : first + batch_size], padding=True, return_tensors="pt").to(network.device)
            _refuse_too_long(texts[first : first + batch_size], batch["attention_mask"].sum(1).tolist(), limit)
            with torch.inference_mode():
                ids = network.generate(
                    input_ids=batch["input_ids"],
                    attention_mask=batch["attention_mask"],
                    do_sample=False,
                    max_new_tokens=max_new_tokens,
                )
            # Marian's configurations force an end upon the last token.
            ends = (ids[:, 1:max_new_tokens] == tokenizer.eos_token_id).any(1).tolist()
            for text, ended in zip(texts[first:], ends, strict=False):
                if not ended:
                    raise DataError(f"the translation of {_shown(text)} does not end in {max_new_tokens} tokens")
            said += tokenizer.batch_decode(ids, skip_special_tokens=True)
        return said

    return translate


def ctranslate2(
    folder: str | Path, tokenizer: str | Path, *, batch_size: int = 16, max_new_tokens: int = 256, device: str = "cpu"
) -> Backend:
    """A translator that CTranslate2 runs: several times as fast on a CPU as the same Marian model.

    Args:
        folder: the converted model (`ct2-transformers-converter`).
        tokenizer: the model folder or hub id that it was converted from.
        batch_size: texts at a time.
        max_new_tokens: the longest translation, in tokens; one that does not end before is an error.
        device: `cpu` or `cuda`.

    Raises:
        ModelError: CTranslate2 is not installed, or model or tokenizer cannot be loaded.
    """
    try:
        library: Any = importlib.import_module("ctranslate2")
    except ImportError:
        raise ModelError(
            "CTranslate2 is not installed; `pip install ctranslate2`, or use a Marian model instead"
        ) from None
    pieces = _tokenizer(tokenizer)
    try:
        translator = library.Translator(str(folder), device=device)
    except Exception as error:
        raise ModelError(f"{folder}: cannot be loaded by CTranslate2: {_one_line(error)}") from error

    def translate(texts: list[str]) -> list[str]:
        tokens = [pieces.convert_ids_to_tokens(ids) for ids in pieces(texts)["input_ids"]]
        results = translator.translate_batch(
            tokens, max_batch_size=batch_size, max_decoding_length=max_new_tokens, max_input_length=0
        )
        said = [result.hypotheses[0] for result in results]
        for text, those in zip(texts, said, strict=True):
            if len(those) >= max_new_tokens:
                raise DataError(f"the translation of {_shown(text)} does not end in {max_new_tokens} tokens")
        return [str(pieces.decode(pieces.convert_tokens_to_ids(those), skip_special_tokens=True)) for those in said]

    return translate


@dataclass(frozen=True)
class FrozenTable:
    """Translations that were made once: the only backend that gives the same on every machine, for ever."""

    origin: str
    """Where the table comes from, for messages."""
    targets: Mapping[str, str] = field(repr=False)
    """Each text's `content_hash`, and its translation."""

    def __call__(self, texts: list[str]) -> list[str]:
        """Look every text up.

        Raises:
            DataError: a text is not in the table.
        """
        keys = [content_hash(text) for text in texts]
        missing = [text for text, key in zip(texts, keys, strict=True) if key not in self.targets]
        if missing:
            raise DataError(
                f"{self.origin}: {len(missing)} of {len(texts)} texts are not in this table, {_shown(missing[0])} "
                "among them; add a row of source and target for each"
            )
        return [self.targets[key] for key in keys]

    @property
    def fingerprint(self) -> str:
        """SHA-256 (hex) of the whole table, to be kept beside what was measured with it."""
        return content_hash(dict(self.targets))


def read_table(path: str | Path, *, backwards: bool = False) -> FrozenTable:
    """Read a table of translations: JSON lines of `source` and `target`, without white space around them.

    Args:
        path: the file.
        backwards: from target to source.

    Raises:
        DataError: no such file, a row that is none, or two rows that translate one text differently; the message names
            file and row.
    """
    path = Path(path)
    if path.suffix != ".jsonl":
        raise DataError(f"{path}: a table of translations is JSON lines of source and target; name a .jsonl file")
    targets: dict[str, str] = {}
    for row, fields in CONTAINERS[".jsonl"](path, None):
        for name in ("source", "target"):
            if not isinstance(fields.get(name), str) or not fields[name].strip():
                raise DataError(f"{path}: row {row}: field {name!r} is not a text; a row has source and target")
        pair = [fields["source"].strip(), fields["target"].strip()]
        source, target = reversed(pair) if backwards else pair
        if targets.setdefault(content_hash(source), target) != target:
            raise DataError(f"{path}: row {row}: {_shown(source)} was translated otherwise above; keep one of the rows")
    if not targets:
        raise DataError(f"{path}: holds no translations")
    return FrozenTable(str(path), targets)


def write_table(path: str | Path, texts: Sequence[str], translations: Sequence[str]) -> None:
    """Write translations as the table that `read_table` reads, so that they need not be made again.

    Raises:
        StorageError: the file cannot be written; what stood there is untouched.
    """
    pairs = zip(texts, translations, strict=True)
    rows = ({"source": text, "target": translation} for text, translation in pairs)
    write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def _answers(name: str, backend: Backend, texts: list[str]) -> list[str]:
    try:
        given = backend(list(texts))
    except Exception as error:  # whatever a translator of anybody's raises
        raise DataError(f"{name}: the translator failed: {_one_line(error)}") from error
    if not isinstance(given, list) or not all(isinstance(text, str) for text in given):
        raise DataError(f"{name}: the translator gave no list of texts but {_shown(repr(given))}")
    if len(given) != len(texts):
        raise DataError(f"{name}: the translator gave {len(given)} texts for {len(texts)}")
    return given


def _check(name: str, text: str, translation: str, same: Collection[str]) -> None:
    longest, shortest = max(len(text), len(translation)), min(len(text), len(translation))
    if not translation:
        raise DataError(f"{name}: the translation of {_shown(text)} is empty")
    if longest > WILD * shortest + SLACK:
        raise DataError(
            f"{name}: {_shown(text)} has {len(text)} characters and its translation {len(translation)}; "
            "the translator is not made for such texts"
        )
    if translation.casefold() == text.casefold() and text not in same and any(map(str.isalpha, text)):
        raise DataError(
            f"{name}: {_shown(text)} came back untranslated; if it is the same in both languages, name it in `same`"
        )


def _around(text: str, found: Mapping[str, str]) -> str:
    """The translation with the white space that stood around the text."""
    inside = text.strip()
    if not inside:
        return text
    before = text[: len(text) - len(text.lstrip())]
    return before + found[inside] + text[len(text.rstrip()) :]


def _tokenizer(path_or_id: str | Path) -> PreTrainedTokenizerBase:
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(path_or_id, trust_remote_code=False)
    except Exception as error:
        raise ModelError(
            f"{path_or_id}: its tokenizer cannot be loaded: {_one_line(error)}; Marian's own needs "
            "`pip install sentencepiece`"
        ) from error
    return tokenizer


def _refuse_too_long(texts: Sequence[str], lengths: Sequence[int], limit: int | None) -> None:
    for text, length in zip(texts, lengths, strict=True):
        if limit is not None and length > limit:
            raise DataError(
                f"{_shown(text)} has {length} tokens, but the translator reads {limit}; translate it in parts"
            )


def _shown(text: str) -> str:
    return repr(text if len(text) <= 60 else text[:57] + "...")


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
