"""AltPO's alternates: drawn from the model's own distribution, never the true answer, the same for the same seed."""

from collections import Counter

import numpy as np
import pytest
import torch
from toy_request import toy_model, toy_request

from palimpsest.data.records import QA
from palimpsest.errors import SpecError
from palimpsest.metrics.generation import generate_answers
from palimpsest.models.language_model import LanguageModel
from palimpsest.unlearn import altpo
from palimpsest.unlearn.altpo import AltPO, sampling

REQUEST = toy_request()
FORGET = REQUEST.forget


def alternates(**settings) -> list[list[str]]:
    found = AltPO(**{"max_new_tokens": 4} | settings).preferred(toy_model(), REQUEST)
    assert [[option.question for option in row] for row in found] == [
        [record.question] * len(row) for record, row in zip(FORGET, found, strict=True)
    ]
    return [[option.answer for option in row] for row in found]


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_sampling_draws_from_the_softmax(temperature):
    model, n = toy_model(), 4000
    prompt = QA("w3 w7", "w1")
    ids = model.tokenizer(f"Question: {prompt.question}\nAnswer:")["input_ids"]
    with torch.no_grad():
        logits = model.network(torch.tensor([ids])).logits[0, -1].double().numpy() / temperature
    exact: Counter[str] = Counter()
    for token, p in enumerate(np.exp(logits - logits.max()) / np.exp(logits - logits.max()).sum()):
        exact[model.tokenizer.decode([token], skip_special_tokens=True).strip()] += p
    with sampling(model, temperature, seed=3):
        said = Counter(generate_answers(model, [prompt] * n, max_new_tokens=1, batch_size=500))
    distance = sum(abs(said[word] / n - p) for word, p in exact.items()) / 2
    assert distance < 0.05, "farther than 4000 draws from some 45 words can be by chance"
    assert max(exact.values()) < 0.9, "the test would pass for greedy decoding"


def test_sampling_leaves_nothing_behind():
    model = toy_model()
    before = generate_answers(model, FORGET, max_new_tokens=4)
    with pytest.raises(KeyboardInterrupt), sampling(model, 1.0, seed=0):
        raise KeyboardInterrupt
    assert not model.network._forward_hooks
    assert generate_answers(model, FORGET, max_new_tokens=4) == before


def test_every_row_has_its_number_of_alternates_and_none_is_the_true_answer():
    found = alternates(alternates=5)
    assert [len(row) for row in found] == [5] * len(FORGET)
    assert all(answer and answer != record.answer for record, row in zip(FORGET, found, strict=True) for answer in row)
    assert all(len(set(row)) > 1 for row in found)


def test_alternates_follow_from_the_seed():
    torch.manual_seed(0)
    first = alternates(seed=1)
    torch.rand(3)
    assert alternates(seed=1) == first != alternates(seed=2)


def test_the_model_is_shown_the_answer_and_asked_for_another(monkeypatch):
    asked = []

    def spy(model: LanguageModel, records, **settings):
        asked.extend(records)
        assert settings["max_new_tokens"] == 4 and settings["template"] == REQUEST.template
        return ["w0 w0 w0 w0 w0 w0"] * len(records)

    monkeypatch.setattr(altpo, "generate_answers", spy)
    alternates(alternates=1, instruction="Say something else.")
    assert [record.question for record in asked] == [
        f"{record.question}\nAnswer: {record.answer}\nSay something else." for record in FORGET
    ]


def test_true_answers_and_silence_are_asked_for_again(monkeypatch):
    rounds = []

    def stubborn(model, records, **_):
        rounds.append(len(records))
        match len(rounds):
            case 1:
                return [record.question.split("\nAnswer: ")[1].split("\n")[0] for record in records]
            case 2:
                return [""] * len(records)
        return ["w9 w9"] * len(records)

    monkeypatch.setattr(altpo, "generate_answers", stubborn)
    assert alternates(alternates=2) == [["w9 w9"] * 2] * len(FORGET)
    assert rounds == [len(FORGET)] * 4


def test_a_row_that_never_gives_an_alternate_is_named(monkeypatch):
    monkeypatch.setattr(altpo, "generate_answers", lambda model, records, **_: [""] * len(records))
    with pytest.raises(SpecError, match=r"^altpo: the model gave no alternate to forget row 'forget-0' in 100 tries"):
        alternates()


def test_rows_with_fewer_alternates_than_asked_for_do_with_those(monkeypatch):
    once = iter([["w9 w9"] * len(FORGET)])
    monkeypatch.setattr(altpo, "generate_answers", lambda model, records, **_: next(once, [""] * len(records)))
    assert alternates() == [["w9 w9"]] * len(FORGET)
