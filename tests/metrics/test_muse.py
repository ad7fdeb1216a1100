"""MUSE's three scores: its prompts and cuts, decoding a token at a time, and its privacy leakage over all pairs."""

import re
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from palimpsest.data.batches import Encoded, encode
from palimpsest.data.records import QA, Passage
from palimpsest.errors import DataError
from palimpsest.metrics import muse
from palimpsest.metrics.muse import RETRAIN_AUC, knowmem, privleak, privleak_auc, verbmem
from palimpsest.models.language_model import LanguageModel

Reference = Callable[[LanguageModel, Encoded], np.ndarray]


def naive(model: LanguageModel, prompt: str, tokens: int) -> str:
    """One row, no padding, no cache, every token from a full forward pass."""
    ids = list(model.tokenizer(prompt)["input_ids"])
    start = len(ids)
    while len(ids) < start + tokens:
        with torch.no_grad():
            ids.append(int(model.network(torch.tensor([ids])).logits[0, -1].argmax()))
        if ids[-1] == model.tokenizer.eos_token_id:
            break
    return str(model.tokenizer.decode(ids[start:], skip_special_tokens=True))


def f1(said: str, truth: str) -> float:
    """ROUGE-L F1 of words without endings: the longest common subsequence over both lengths."""
    one, other = (re.findall("[a-z0-9]+", text.lower()) for text in (said, truth))
    longest = np.zeros((len(one) + 1, len(other) + 1))
    for i, word in enumerate(one):
        for j, true in enumerate(other):
            longest[i + 1, j + 1] = longest[i, j] + 1 if word == true else max(longest[i, j + 1], longest[i + 1, j])
    return float(2 * longest[-1, -1] / (len(one) + len(other)))


KINDS = ("muse", "open_unlearning")


def words_alone(text: str) -> str:
    return " ".join(word for word in text.split() if word.startswith("w"))


@pytest.mark.parametrize("batch_size", [1, 4, 32])
def test_verbmem_is_the_f1_of_naive_decoding_with_the_beginning_of_the_truth(
    model: LanguageModel, records: list[QA], batch_size: int
) -> None:
    long = [  # with a space before each word, which the tokenizer asks for
        replace(record, answer=f" {words_alone(naive(model, record.question, 3))} w1 w2 w3 w4") for record in records
    ]
    found = {name: verbmem(model, long, definition=name, max_new_tokens=4, batch_size=batch_size) for name in KINDS}  # type: ignore[arg-type]
    for place, record in enumerate(long):
        said = naive(model, record.question, 4)
        assert found["muse"][place].item() == pytest.approx(f1(said, " ".join(record.answer.split()[:4])))
        assert found["open_unlearning"][place].item() == pytest.approx(f1(said, record.answer))
    assert found["muse"].mean() > found["open_unlearning"].mean() > 0.2


def test_the_stemmer_tells_the_two_verbmems_apart(
    model: LanguageModel, records: list[QA], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(muse, "continuations", lambda *_, **__: ["walked home"])
    record = [QA("w1", "walking home")]
    monkeypatch.setattr(type(model.tokenizer), "decode", lambda *_, **__: "walking home")
    assert verbmem(model, record, definition="muse").item() == pytest.approx(0.5)
    assert verbmem(model, record, definition="open_unlearning").item() == 1
    assert [muse.verbmem_definition(name) for name in KINDS] == ["verbmem@muse", "verbmem@open_unlearning"]  # type: ignore[arg-type]


def test_knowmems_prompt_is_muses_letter_for_letter_and_its_answer_is_cut(
    model: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []

    def answer(model: LanguageModel, prompts: list[list[int]], **given: int) -> list[str]:
        asked.extend(map(str, prompts))
        assert given["max_new_tokens"] == 32
        return ["In Rome\n\nQuestion: Why?", "In Rome\nQuestion: Why?", "In RomeQuestion: Why?", "\n\nIn Rome", "Rome"]

    monkeypatch.setattr(muse, "continuations", answer)
    monkeypatch.setattr(type(model.tokenizer), "__call__", lambda _, text: {"input_ids": text})
    examples = [QA("Who?", "Ann"), QA("When?", "Now")]
    found = knowmem(model, [QA("Where?", "In Rome")] * 5, examples=examples)
    expected = "Question: Who?\nAnswer: Ann\n\nQuestion: When?\nAnswer: Now\n\nQuestion: Where?\nAnswer: "
    assert asked == [expected] * 5
    assert found.tolist() == pytest.approx([1, 1, 1, 0, 2 / 3])


def test_knowmem_is_the_f1_of_naive_decoding(model: LanguageModel, records: list[QA]) -> None:
    found = knowmem(model, records, examples=records[:2], max_new_tokens=5, batch_size=3)
    shown = "".join(f"Question: {record.question}\nAnswer: {record.answer}\n\n" for record in records[:2])
    for place, record in enumerate(records):
        said = naive(model, f"{shown}Question: {record.question}\nAnswer: ", 5).split("Question:")[0]
        assert found[place].item() == pytest.approx(f1(said.split("\n\n")[0], record.answer))


def test_privleaks_auc_is_the_share_of_pairs_in_which_the_held_out_text_costs_less(
    model: LanguageModel, records: list[QA], reference: Reference
) -> None:
    texts = [Passage(f"{record.question} {record.answer} {record.question}", id=record.id) for record in records]
    forget, holdout = texts[:5], texts[5:]
    costs = []
    for row in encode(texts, model.tokenizer):
        chosen = np.sort(reference(model, row)[np.arange(len(row.ids) - 1), row.ids[1:]])
        costs.append(-chosen[: max(1, int(len(chosen) * 0.4))].mean())
    won = np.mean([[held < forgotten for held in costs[5:]] for forgotten in costs[:5]])
    found = privleak_auc(model, forget, holdout, batch_size=2)
    assert found.value == pytest.approx(won) and found.low < won < found.high
    assert (found.members, found.nonmembers) == (6, 5)


@given(st.floats(0, 1), st.floats(0.05, 1))
def test_privleak_is_muses_formula(unlearned: float, retrained: float) -> None:
    found = privleak(unlearned, retrained)
    assert found == pytest.approx(100 * (unlearned / retrained - 1), abs=1e-9)
    assert (found > 0) == (unlearned > retrained) or abs(found) < 1e-9
    # OpenUnlearning starts from one minus its AUC and adds 1e-10 below.
    theirs = ((1 - (1 - unlearned)) - (1 - (1 - retrained))) / ((1 - (1 - retrained)) + 1e-10) * 100
    assert found == pytest.approx(theirs, rel=1e-6, abs=1e-6)


def test_published_privleak_of_muse_news() -> None:
    """A model that knows the forget set by heart (AUC near 0) is at about -100, as the target models are."""
    assert privleak(0.001, RETRAIN_AUC["news"]) == pytest.approx(-99.79, abs=0.01)
    assert privleak(RETRAIN_AUC["books"], RETRAIN_AUC["books"]) == 0


def test_without_a_retrained_models_auc_there_is_no_number() -> None:
    with pytest.raises(
        DataError, match=r"^privleak: the AUC of a model retrained without the forget set is missing; mea"
    ):
        privleak(0.3, None)
    with pytest.raises(DataError, match=r"^privleak: the retrained model's AUC is 0, so nothing can be divided by it"):
        privleak(0.3, 0.0)
