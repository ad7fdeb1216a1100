"""Concept vectors: one that was planted is found, what is not there is not, and every score by hand."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.conftest import Organism
from tests.models.tiny_families import EXPERT, VOCABULARY, tiny_model, tiny_tokenizer

from palimpsest.data.records import QA
from palimpsest.errors import DataError, ModelError
from palimpsest.internals import value_vectors
from palimpsest.internals.concepts import answer_tokens, discover, judged, random_sets, word_tokens
from palimpsest.internals.value_vectors import ValueVector, VocabularyProjection
from palimpsest.models.language_model import LanguageModel

CONCEPT = (9, 17, 23, 31, 40)
NULL = 99


def planted(family: str, sign: int = 1) -> LanguageModel:
    """A model one of whose vectors points at the concept's unembedding rows, and away from all others."""
    wide = {"hidden_size": 64} | ({"word_embed_proj_dim": 64} if family == "opt" else {})
    model = tiny_model(family, **wide)
    projection = VocabularyProjection.of(model)
    to_logits = projection.logits(torch.eye(64), 1).T
    wanted = torch.isin(torch.arange(VOCABULARY), torch.tensor(CONCEPT)).float()
    with torch.no_grad():
        model.anatomy.value_vectors(1)[7] = sign * torch.linalg.pinv(to_logits) @ wanted
    return model


def projections(model: LanguageModel) -> np.ndarray:
    """[layers, columns, V] float64."""
    projection = VocabularyProjection.of(model)
    layers = range(model.anatomy.n_layers)
    return np.stack([projection.logits(projection.vectors(layer), layer).double().numpy() for layer in layers])


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "opt"])
@pytest.mark.parametrize("sign", [1, -1])
def test_a_planted_concept_is_found_where_it_was_planted_and_alone(family, sign):
    model = planted(family, sign)
    found = discover(model, CONCEPT, random_sets(model.tokenizer, CONCEPT, NULL, seed=0))
    assert found.best.vector == ValueVector(1, 7, sign) == found.found[0].vector
    assert found.best.precision == 1.0 >= found.null_precision and found.best.z > found.null_z
    assert [concept.vector for concept in found.found] == [ValueVector(1, 7, sign)]


def test_what_is_not_there_is_not_found():
    """Random sets are as good as each other: a concept is above S of them in one of two scores at most 2 / (S + 1)."""
    model, above = tiny_model("llama"), 0
    sets = random_sets(model.tokenizer, CONCEPT, 160, seed=3)
    for first in range(0, 160, 20):
        concept, *null = sets[first : first + 20]
        above += bool(discover(model, concept, null).found)
    assert above <= 3  # 0.8 expected at most


def test_precision_and_z_are_their_definitions(monkeypatch):
    monkeypatch.setattr(value_vectors, "LOGITS_AT_ONCE", 7 * VOCABULARY)
    model = planted("llama")
    null = random_sets(model.tokenizer, CONCEPT, 4, seed=1)
    found = discover(model, CONCEPT, null)
    logits = projections(model)

    def scores(tokens) -> tuple[np.ndarray, np.ndarray]:
        """[2, layers, columns] of both ends."""
        z = (logits - logits.mean(-1, keepdims=True)) / logits.std(-1, ddof=1, keepdims=True)
        mean_z = z[..., list(tokens)].mean(-1)
        tops = [np.argsort(-sign * logits, -1)[..., : len(tokens)] for sign in (1, -1)]
        return np.stack([np.isin(top, tokens).mean(-1) for top in tops]), np.stack([mean_z, -mean_z])

    precision, z = scores(CONCEPT)
    assert found.best.precision == precision.max()
    assert found.best.z == pytest.approx(z[0, 1, 7], rel=1e-4)
    best = [scores(tokens) for tokens in null]
    assert found.null_precision == pytest.approx(max(each.max() for each, _ in best))
    assert found.null_z == pytest.approx(max(each.max() for _, each in best), rel=1e-4)
    above = (precision > found.null_precision + 1e-6) | (z > found.null_z + 1e-6)
    wanted = {(layer, column, (1, -1)[end]) for end, layer, column in zip(*above.nonzero(), strict=True)}
    assert {(each.vector.layer, each.vector.column, each.vector.sign) for each in found.found} == wanted


def test_a_null_of_answers_is_harder_than_one_of_words_that_look_alike(trained: Organism):
    """Answers lie together whatever they answer, so any of them beat words that nobody was asked for."""
    model, request = trained.full, trained.request
    rows = [*request.forget, *request.retain, *request.retain_held_out, *request.retain_unseen]
    tokens = answer_tokens(model.tokenizer, [row for row in rows if row.id.endswith("pet")])
    answers = answer_tokens(model.tokenizer, rows)
    alike, of_answers = (
        discover(model, tokens, random_sets(model.tokenizer, tokens, 40, seed=0, pool=pool)) for pool in (None, answers)
    )
    assert of_answers.best == alike.best
    assert alike.null_precision < of_answers.null_precision <= of_answers.best.precision
    assert len(of_answers.found) < len(alike.found) / 10


# The null


@settings(deadline=None, max_examples=60)
@given(
    st.sets(st.integers(4, VOCABULARY - 1), min_size=1, max_size=20),
    st.integers(0, 5),
    st.one_of(st.none(), st.sets(st.integers(4, VOCABULARY - 1), min_size=41, max_size=44)),
)
def test_random_sets_are_as_large_as_the_concept_and_have_nothing_of_it(tokens, seed, pool):
    concept = sorted(tokens)
    sets = random_sets(TOKENIZER, concept, 3, seed=seed, pool=pool and sorted(pool))
    assert sets == random_sets(TOKENIZER, concept, 3, seed=seed, pool=pool and sorted(pool))
    for drawn in sets:
        assert len(set(drawn)) == len(drawn) == len(concept) and not tokens & set(drawn)
        assert set(drawn) <= (pool or set(range(4, VOCABULARY)))


TOKENIZER = tiny_tokenizer()


def test_random_tokens_look_like_the_concepts(trained: Organism):
    tokenizer = trained.full.tokenizer
    written = {token: text for text, token in tokenizer.get_vocab().items()}
    concept = list(word_tokens(tokenizer, ["Oslo", "plays", "violin"]))

    def looks(tokens) -> list[tuple[bool, bool, bool]]:
        texts = [written[token] for token in tokens]
        bare = [text.strip("Ġ▁ ") for text in texts]
        return sorted(
            (text[0].isalpha(), one[0].isupper(), one.isalpha()) for text, one in zip(texts, bare, strict=True)
        )

    for drawn in random_sets(tokenizer, concept, 10, seed=2):
        assert looks(drawn) == looks(concept)


def test_where_no_more_tokens_look_alike():
    """`!` is the only mark, so another token stands for it."""
    marks = tiny_tokenizer(first_word="!")
    assert all(len(set(drawn)) == 2 and 4 not in drawn for drawn in random_sets(marks, [4, 9], 20, seed=0))


def test_too_few_other_tokens():
    with pytest.raises(DataError, match="2 other tokens are too few for random sets of 3; give more rows"):
        random_sets(TOKENIZER, [4, 5, 6], 1, seed=0, pool=[4, 5, 7, 8])


# The concept's tokens


def test_words_that_are_tokens():
    assert word_tokens(TOKENIZER, ["w9", "w31 w32", "unknown"]) == {9: "w9"}
    with pytest.raises(DataError, match=r"^none of 'dragon', 'w4 w5' is one token of this vocabulary; give words that"):
        word_tokens(TOKENIZER, ["dragon", "w4 w5"])


def test_a_words_token_with_a_space_before_it_is_another(trained: Organism):
    tokenizer = trained.full.tokenizer
    found = {str(tokenizer.decode([token])) for token in word_tokens(tokenizer, ["Oslo"])}
    assert found <= {"Oslo", " Oslo"} and found


def test_answers_tokens_are_those_of_letters():
    rows = [QA("w4", "w9 w10"), QA("w5", "w10 w11")]
    assert answer_tokens(TOKENIZER, rows) == (9, 10, 11)
    marks = tiny_tokenizer(first_word="!")
    assert answer_tokens(marks, [QA("w5", "w9 !")]) == (9,)
    with pytest.raises(DataError, match="no token of letters or digits"):
        answer_tokens(marks, [QA("w5", "! !")])


@pytest.mark.parametrize(
    ("tokens", "null", "says"),
    [
        ((4,), [], "no random sets are given"),
        ((), [()], "the concept has 0 tokens of a vocabulary of 48"),
        (tuple(range(48)), [(4,)], "the concept has 48 tokens of a vocabulary of 48"),
        ((4, 5), [(6,)], "a set has 1 tokens where the concept has 2"),
        ((4, 4), [(6, 7)], "a set has 2 tokens where the concept has 1"),
        ((4, 48), [(6, 7)], "a token is none of 0 to 47"),
    ],
)
def test_sets_that_cannot_be_searched_for(tokens, null, says):
    with pytest.raises(DataError, match=f"^{says}"):
        discover(tiny_model("llama"), tokens, null)


@pytest.mark.parametrize("family", EXPERT)
def test_fused_experts(family):
    with pytest.raises(ModelError, match="are fused and have no value matrix"):
        discover(tiny_model(family), CONCEPT, [(4, 5, 6, 7, 8)])


# A judge


def test_a_judge_finds_the_planted_concept():
    model = planted("llama", -1)
    words = {str(model.tokenizer.decode([token])) for token in CONCEPT}

    def judge(tokens) -> float:
        assert len(tokens) == len(CONCEPT)
        return len(words & set(tokens)) / len(words)

    (found,) = judged(model, judge, k=len(CONCEPT))
    assert found[0].vector == ValueVector(1, 7, -1) and found[1] == 1.0
    assert set(found[0].ids) == set(CONCEPT)
    assert list(judged(model, lambda tokens: 0.85, k=5)) == []  # above, not at, the threshold


def test_a_judge_never_sees_the_weakest_of_each_layer():
    model = tiny_model("llama")
    seen = [top for top, _ in judged(model, lambda tokens: 1.0, k=6, left_out=0.3)]
    logits = projections(model)
    for layer, of_layer in enumerate(logits):
        both = np.concatenate([np.sort(sign * of_layer, -1)[:, -6:].mean(-1) for sign in (1, -1)])
        kept = sorted(np.argsort(both)[int(0.3 * len(both)) :])
        wanted = [(place % len(of_layer), 1 if place < len(of_layer) else -1) for place in kept]
        mine = [top for top in seen if top.vector.layer == layer]
        assert [(top.vector.column, top.vector.sign) for top in mine] == wanted
        assert [np.mean(top.logits) for top in mine] == pytest.approx([both[place] for place in kept], rel=1e-4)
