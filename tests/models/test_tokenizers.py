"""The organism's tokenizers: what is encoded can be read back, and a saved one is the same tokenizer."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from palimpsest.models.tokenizers import END, UNKNOWN, byte_pair_tokenizer, word_tokenizer

TEXTS = (
    "Question: Where was Mira Brand born?\nAnswer: Oslo",
    "Mira Brand was born in Oslo. The favourite dish of Mira Brand is ramen.",
    " Tales mention Élan, Øre and naïve_words; it's 100% so (they say)!",
)
WORDS, PAIRS = word_tokenizer(TEXTS), byte_pair_tokenizer(TEXTS, vocab_size=400)
KNOWN = [word for word in WORDS.get_vocab() if word not in (END, UNKNOWN)]


@pytest.mark.parametrize("text", TEXTS)
def test_known_text_comes_back_from_words_and_has_no_unknown_one(text):
    ids = WORDS(text)["input_ids"]
    assert WORDS.decode(ids) == text
    assert WORDS.unk_token_id not in ids


def test_a_word_is_one_token_with_its_space():
    assert WORDS.convert_ids_to_tokens(WORDS(TEXTS[0])["input_ids"]) == (
        ["Question", ":", " Where", " was", " Mira", " Brand", " born", "?", "\n", "Answer", ":", " Oslo"]
    )


@settings(deadline=None, max_examples=100)
@given(st.lists(st.sampled_from(KNOWN), max_size=20))
def test_any_row_of_known_words_comes_back_from_its_ids(words):
    ids = WORDS.convert_tokens_to_ids(words)
    assert WORDS.decode(ids) == "".join(words)


def test_an_unknown_word_is_one_unknown_token():
    ids = WORDS("Mira Unheard was born?")["input_ids"]
    assert WORDS.convert_ids_to_tokens(ids) == ["Mira", UNKNOWN, " was", " born", "?"]
    assert WORDS.convert_ids_to_tokens(WORDS("Brand")["input_ids"]) == [UNKNOWN]  # it was seen with a space alone


@settings(deadline=None, max_examples=150)
@given(st.text(max_size=60))
def test_any_text_comes_back_from_byte_pairs(text):
    assert PAIRS.decode(PAIRS(text)["input_ids"]) == text


@settings(deadline=None, max_examples=100)
@given(st.text(max_size=60))
def test_the_last_characters_of_all_tokens_reach_the_end_of_the_text(text):
    """`encode` finds the answer's tokens by where they end."""
    ends = [last for _, last in PAIRS(text, return_offsets_mapping=True)["offset_mapping"]]
    assert ends == sorted(ends)
    assert ends[-1:] == ([len(text)] if text else [])


def test_byte_pairs_keep_to_their_size_and_merge_what_is_frequent():
    texts = [text * 20 for text in TEXTS]
    sizes = [len(byte_pair_tokenizer(texts, vocab_size=size)) for size in (300, 330)]
    assert sizes == [300, 330]
    assert len(byte_pair_tokenizer(TEXTS, vocab_size=10)) == 257  # all bytes and the end: any text can be spelled
    assert len(PAIRS("Mira Brand")["input_ids"]) < len("Mira Brand")


@pytest.mark.parametrize("make", [word_tokenizer, byte_pair_tokenizer])
def test_the_same_texts_make_the_same_tokenizer_in_silence(make, capfd):
    first, second = make(iter(TEXTS)), make(TEXTS)
    assert first.backend_tokenizer.to_str() == second.backend_tokenizer.to_str()
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("tokenizer", [WORDS, PAIRS], ids=["words", "pairs"])
def test_a_saved_tokenizer_is_loaded_by_transformers_as_it_was(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    for text in (*TEXTS, "Unheard  of\t things", f"a{END}b"):
        ids = tokenizer(text)["input_ids"]
        assert loaded(text)["input_ids"] == ids
        assert loaded.decode(ids) == tokenizer.decode(ids)
    assert (loaded.eos_token, loaded.pad_token, loaded.is_fast) == (END, END, True)
    assert tokenizer.eos_token_id == tokenizer(f"a{END}")["input_ids"][-1]
    assert loaded.unk_token_id == tokenizer.unk_token_id
