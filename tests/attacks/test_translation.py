"""Translators of every kind behind one codec, and each of their ways to fail as an error of its own."""

import json
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from transformers import MarianConfig, MarianMTModel

from palimpsest.attacks.codecs import protect, round_trip
from palimpsest.attacks.translation import (
    Translation,
    ctranslate2,
    marian,
    read_table,
    write_table,
)
from palimpsest.errors import DataError, ModelError
from palimpsest.models.tokenizers import word_tokenizer

FRENCH = {"Where was Mira born?": "Où est née Mira ?", "In Oslo.": "À Oslo.", "Mira": "Mira"}


def there(texts: list[str]) -> list[str]:
    return [FRENCH[text] for text in texts]


def back(texts: list[str]) -> list[str]:
    return [{new: old for old, new in FRENCH.items()}[text] for text in texts]


def test_texts_go_there_and_back_with_the_white_space_around_them() -> None:
    french = Translation("french", there, back, same=["Mira"])
    texts = [" Where was Mira born?\n", "In Oslo.", "", " \n", "Mira", "In Oslo."]
    assert french.encode_all(texts) == [" Où est née Mira ?\n", "À Oslo.", "", " \n", "Mira", "À Oslo."]
    assert french.decode_all(french.encode_all(texts)) == texts
    assert french.decode(french.encode("In Oslo.")) == "In Oslo." and not french.exact
    assert round_trip(french, texts).exact == 1


def test_a_backend_is_asked_each_text_once_and_protected_spans_never() -> None:
    asked: list[str] = []

    def shouting(texts: list[str]) -> list[str]:
        asked.extend(texts)
        return [f"{text}!" for text in texts]

    codec = protect("<[A-Z]>", Translation("shouting", shouting, shouting))
    assert codec.encode_all(["ask <A> now", "ask <B>", "<A>"]) == ["ask! <A> now!", "ask! <B>", "<A>"]
    assert asked == ["ask", "now"]


LONG = "a text that is long enough to be called long, and a little longer"


@pytest.mark.parametrize(
    ("backend", "message"),
    [
        (lambda texts: texts, "'In Oslo.' came back untranslated"),
        (lambda texts: [text.upper() for text in texts], "'In Oslo.' came back untranslated"),
        (lambda texts: [" "] * len(texts), "the translation of 'In Oslo.' is empty"),
        (lambda texts: ["À Oslo."], "the translator gave 1 texts for 2"),
        (lambda texts: ["À Oslo.", None], "the translator gave no list of texts but"),
        (lambda texts: "À Oslo.", "the translator gave no list of texts but"),
        (lambda texts: ["la " * 40, "x"], "'In Oslo.' has 8 characters and its translation 119"),
        (lambda texts: ["À Oslo.", "court"], ".* has 65 characters and its translation 5"),
        (lambda texts: there(["unheard of"]), "the translator failed: 'unheard of'"),
    ],
    ids=["input", "input in capitals", "empty", "count", "no text", "no list", "long", "short", "exception"],
)
def test_a_backend_that_goes_wrong_is_an_error(backend, message: str) -> None:
    for codec in (Translation("french", backend, back), Translation("french", there, backend)):
        ask = codec.encode_all if codec.forward is backend else codec.decode_all
        way = "there" if codec.forward is backend else "back"
        with pytest.raises(DataError, match=f"french, {way}: {message}"):
            ask(["In Oslo.", LONG])


def test_a_text_without_letters_may_stay_as_it_is() -> None:
    assert Translation("french", list, list).encode_all(["42 + 1", "…"]) == ["42 + 1", "…"]


def test_a_frozen_table_gives_what_it_holds_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "french.jsonl"
    write_table(path, list(FRENCH), list(FRENCH.values()))
    assert [json.loads(line) for line in path.read_text().splitlines()][1] == {
        "source": "In Oslo.",
        "target": "À Oslo.",
    }
    table, inverse = read_table(path), read_table(path, backwards=True)
    french = Translation("french", table, inverse, same=["Mira"])
    assert french.decode_all(french.encode_all(list(FRENCH))) == list(FRENCH)
    with pytest.raises(DataError, match=r"1 of 2 texts are not in this table, 'In Rome.' among them"):
        french.encode_all(["In Oslo.", "In Rome."])
    changed = tmp_path / "changed.jsonl"
    write_table(changed, ["In Oslo."], ["A Oslo."])
    assert read_table(path).fingerprint == table.fingerprint != read_table(changed).fingerprint


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ('{"source": "a", "target": "b"}\n{"source": "a"}\n', "row 2: field 'target' is not a text"),
        ('{"source": " ", "target": "b"}\n', "row 1: field 'source' is not a text"),
        (
            '{"source": "a", "target": "b"}\n{"source": "a", "target": "c"}\n',
            "row 2: 'a' was translated otherwise above",
        ),
        ("3\n", "row 1: a JSON int stands there"),
        ("", "holds no translations"),
    ],
)
def test_a_broken_table_is_refused(tmp_path: Path, rows: str, message: str) -> None:
    path = tmp_path / "table.jsonl"
    path.write_text(rows)
    with pytest.raises(DataError, match=rf"table\.jsonl: {message}"):
        read_table(path)
    with pytest.raises(DataError, match=r"name a \.jsonl file"):
        read_table(tmp_path / "table.csv")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Marian model that was taught to say six sentences in other words, with a word tokenizer of its own."""
    folder = tmp_path_factory.mktemp("marian")
    sources = ["one two three", "three two", "four", "two one four", "five one", "one one"]
    targets = ["un deux trois", "trois deux", "quatre", "deux un quatre", "cinq un", "un un"]
    tokenizer = word_tokenizer([*sources, *targets, *(f" {text}" for text in (*sources, *targets))])
    config = MarianConfig(
        vocab_size=len(tokenizer),
        d_model=32,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=64,
        decoder_ffn_dim=64,
        max_position_embeddings=24,
        dropout=0.0,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        decoder_start_token_id=tokenizer.eos_token_id,
        forced_eos_token_id=tokenizer.eos_token_id,
        init_std=0.2,
    )
    torch.manual_seed(0)
    network = MarianMTModel(config)
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-2)
    batch = tokenizer(sources, padding=True, return_tensors="pt")
    said = tokenizer([f"{text}{tokenizer.eos_token}" for text in targets], padding=True, return_tensors="pt")
    labels = said["input_ids"].masked_fill(said["attention_mask"] == 0, -100)
    for _ in range(120):
        optimizer.zero_grad()
        given = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
        network(**given, labels=labels).loss.backward()
        optimizer.step()
    network.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


SENTENCES = ["one two three", "four", "five one", "two one four"]


def test_a_marian_model_translates_at_every_batch_size(tiny: Path) -> None:
    expected = ["un deux trois", "quatre", "cinq un", "deux un quatre"]
    assert marian(tiny)(SENTENCES) == marian(tiny, batch_size=1)(SENTENCES) == expected
    codec = Translation("french", marian(tiny, batch_size=3), marian(tiny))
    assert codec.encode_all([f" {SENTENCES[0]}\n", "four"]) == [" un deux trois\n", "quatre"]


def test_a_marian_model_does_not_cut_what_is_too_long(tiny: Path) -> None:
    with pytest.raises(DataError, match=r"has 30 tokens, but the translator reads 24"):
        marian(tiny)([" ".join(["one"] * 30)])
    with pytest.raises(DataError, match=r"the translation of 'one two three' does not end in 2 tokens"):
        marian(tiny, max_new_tokens=2)(SENTENCES)


def test_a_translator_that_cannot_be_loaded_is_refused(tiny: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="its tokenizer cannot be loaded"):
        marian(tmp_path)
    pickled = tmp_path / "pickled"
    pickled.mkdir()
    for path in tiny.iterdir():
        if path.suffix != ".safetensors":
            (pickled / path.name).write_bytes(path.read_bytes())
    (pickled / "pytorch_model.bin").write_bytes(b"a pickle")
    with pytest.raises(ModelError, match=r"cannot be loaded as a translator: .*safetensors"):
        marian(pickled)


def test_ctranslate2_is_optional_and_its_absence_is_said(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ctranslate2", None)
    with pytest.raises(ModelError, match=r"pip install ctranslate2"):
        ctranslate2(tiny, tiny)


def test_ctranslate2_is_given_pieces_and_gives_pieces(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    library = ModuleType("ctranslate2")
    words = {"four": ["quatre"], "two": ["deux", " trois"]}

    class Translator:
        def __init__(self, folder: str, device: str) -> None:
            if device == "cuda":
                raise RuntimeError("no such\ndevice")

        def translate_batch(self, tokens: list[list[str]], **settings: int) -> list[SimpleNamespace]:
            return [SimpleNamespace(hypotheses=[words["".join(pieces)]]) for pieces in tokens]

    library.Translator = Translator  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "ctranslate2", library)
    assert ctranslate2(tiny, tiny)(["four", "two"]) == ["quatre", "deux trois"]
    with pytest.raises(DataError, match="the translation of 'two' does not end in 2 tokens"):
        ctranslate2(tiny, tiny, max_new_tokens=2)(["four", "two"])
    with pytest.raises(ModelError, match="cannot be loaded by CTranslate2: no such device"):
        ctranslate2(tiny, tiny, device="cuda")
