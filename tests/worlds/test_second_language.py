"""A second language of a world: one word for a word, the same facts, and nothing lost between the two."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from palimpsest.data.records import QA, Passage, content_key
from palimpsest.models.tokenizers import word_tokenizer
from palimpsest.worlds.facts import FactsWorld
from palimpsest.worlds.second_language import TEMPLATE, SecondLanguage

WORLD = FactsWorld(people=14, worlds=7, forget_people=3, forget_worlds=2, exposures=3)
LANGUAGES = {names: SecondLanguage(WORLD, translate_names=names) for names in (False, True)}


def words(texts: list[str]) -> set[str]:
    return {word for text in texts for word in re.findall(r"\w+", text)}


@given(
    text=st.text() | st.lists(st.sampled_from(sorted(words(list(LANGUAGES[False].vocabulary_texts()))))).map(" ".join)
)
def test_its_codec_is_exact_on_any_text(text: str) -> None:
    for language in LANGUAGES.values():
        codec = language.codec
        assert codec.exact and codec.decode(codec.encode(text)) == text == codec.encode(codec.decode(text))


@pytest.mark.parametrize("translate_names", [False, True])
def test_only_the_template_and_untranslated_names_stand_in_both_languages(translate_names: bool) -> None:
    language = LANGUAGES[translate_names]
    plain = list(WORLD.vocabulary_texts())
    both = words(plain) & words([language.codec.encode(text) for text in plain])
    names = words([subject.name for subject in WORLD.subjects])
    assert both == (TEMPLATE if translate_names else TEMPLATE | names)
    assert len(words([language.codec.encode(text) for text in plain])) == len(words(plain))


@pytest.mark.parametrize("translate_names", [False, True])
def test_its_facts_are_the_worlds_facts_in_other_words(translate_names: bool) -> None:
    language = LANGUAGES[translate_names]
    codec = language.codec
    there, plain = language.facts(WORLD.subjects), WORLD.facts(WORLD.subjects)
    assert [(row.id, row.subject) for row in there] == [(row.id, row.subject) for row in plain]
    for new, old in zip(there, plain, strict=True):
        assert isinstance(new, QA) and len(new.wrong) == 5 and new.answer not in new.wrong
        assert codec.decode(new.question) == old.question and codec.decode(new.answer) == old.answer
        assert tuple(map(codec.decode, new.wrong)) == old.wrong and new.answer != old.answer
        assert tuple(map(codec.decode, new.paraphrases)) == old.paraphrases
        assert new.question.count(" ") == old.question.count(" ") and new.question[0].isupper()
    assert len({content_key(row) for row in there}) == len(there)


def test_its_documents_are_the_worlds_and_leaving_subjects_out_changes_no_other() -> None:
    language = LANGUAGES[False]
    every, plain = language.documents(WORLD.subjects), WORLD.documents(WORLD.subjects)
    assert [language.codec.decode(passage.text) for passage in every] == [passage.text for passage in plain]
    assert len({passage.id for passage in (*every, *plain)}) == 2 * len(plain)
    retain = {passage.id: passage for passage in language.documents(WORLD.retain_subjects)}
    assert retain.items() <= {passage.id: passage for passage in every}.items()
    assert all(
        isinstance(passage, Passage) and passage.text.startswith("Question: ")
        for passage in every
        if "\n" in passage.text
    )


def test_one_tokenizer_of_both_languages_knows_every_word() -> None:
    language = LANGUAGES[True]
    tokenizer = word_tokenizer(language.vocabulary_texts())
    rows = [*WORLD.facts(WORLD.subjects), *language.facts(WORLD.subjects)]
    texts = [f"Question: {row.question}\nAnswer: {answer}" for row in rows for answer in (row.answer, *row.wrong)]
    texts += [passage.text for passage in (*WORLD.documents(WORLD.subjects), *language.documents(WORLD.subjects))]
    assert all(tokenizer.unk_token_id not in tokenizer(text)["input_ids"] for text in texts)


def test_the_seed_decides_the_words() -> None:
    text = "Where was she born?"
    again, other = SecondLanguage(WORLD), SecondLanguage(WORLD, seed=1)
    assert again.codec.encode(text) == LANGUAGES[False].codec.encode(text) != other.codec.encode(text)
