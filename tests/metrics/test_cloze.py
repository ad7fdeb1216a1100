"""Which of the choices' texts is likeliest: every log-likelihood against a plain forward pass in float64."""

import numpy as np
import pytest
import torch

from palimpsest.data.records import Choice
from palimpsest.metrics.cloze import cloze
from palimpsest.models.language_model import LanguageModel
from palimpsest.models.organism import Architecture, new_model
from palimpsest.models.tokenizers import byte_pair_tokenizer

CHOICES = [
    Choice("What is it?", ("a bird", "ox"), 0),
    Choice("And this, which stands over there,", ("is nothing at all", "a", "one more"), 2),
    Choice("Who?", ("me", "you"), 1),
]


@pytest.fixture(scope="module")
def model() -> LanguageModel:
    tokenizer = byte_pair_tokenizer([" a bird is it and what stands there"] * 3, vocab_size=280)
    model = new_model(Architecture(layers=2, width=16, mlp_width=24, heads=2, context=128), tokenizer, 0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.network.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model


def logprob(model: LanguageModel, question: str, answer: str) -> float:
    prompt, whole = model.tokenizer(question)["input_ids"], model.tokenizer(f"{question} {answer}")["input_ids"]
    assert whole[: len(prompt)] == prompt
    with torch.no_grad():
        logits = model.network(torch.tensor([whole])).logits[0].double().numpy()
    logits -= np.log(np.exp(logits - logits.max(1, keepdims=True)).sum(1, keepdims=True)) + logits.max(1, keepdims=True)
    return float(sum(logits[place - 1, whole[place]] for place in range(len(prompt), len(whole))))


@pytest.mark.parametrize("batch_size", [1, 2, 64])
def test_it_is_the_likelihood_of_the_whole_text_after_the_question(model: LanguageModel, batch_size: int) -> None:
    scores = cloze(model, CHOICES, batch_size=batch_size)
    for place, choice in enumerate(CHOICES):
        logprobs = np.array([logprob(model, choice.question, text) for text in choice.choices])
        shares = np.exp(logprobs) / np.exp(logprobs).sum()
        assert scores.chosen[place] == logprobs.argmax()
        assert scores.correct[place] == float(logprobs.argmax() == choice.answer)
        assert scores.probability[place].item() == pytest.approx(shares[choice.answer], rel=1e-4)
