"""A model of a few thousand random weights and a request in its words, for tests of this room that need no training."""

import random

import numpy as np
import torch

from palimpsest.data.batches import Batch, collate
from palimpsest.data.records import QA
from palimpsest.models.language_model import LanguageModel
from palimpsest.models.organism import Architecture, new_model
from palimpsest.models.tokenizers import word_tokenizer
from palimpsest.unlearn.request import Request
from palimpsest.unlearn.update import Update

WORDS = [f"w{number}" for number in range(40)]


def toy_model(seed: int = 0) -> LanguageModel:
    """Large random weights, so that its predictions are far from uniform."""
    tokenizer = word_tokenizer(["Question: " + " ".join(WORDS) + "\nAnswer: w0"])
    model = new_model(Architecture(layers=2, width=16, mlp_width=24, heads=2, context=256), tokenizer, seed)
    draw_weights(model, seed)
    model.network.eval()
    return model


def draw_weights(model: LanguageModel, seed: int, size: float = 0.3) -> None:
    """Add noise to every matrix."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.network.parameters():
            if parameter.ndim > 1:
                parameter.add_(size * torch.randn(parameter.shape, generator=generator))


def toy_records(n: int, kind: str, *, wrong: int = 0) -> list[QA]:
    """Questions of one to eight words with answers of one to five, two rows a subject."""
    draw = random.Random(kind)

    def sentence(most: int) -> str:
        return " ".join(draw.choices(WORDS, k=draw.randint(1, most)))

    return [
        QA(
            sentence(8),
            sentence(5),
            subject=f"{kind} {number // 2}",
            wrong=tuple(sentence(5) for _ in range(wrong)),
            id=f"{kind}-{number}",
        )
        for number in range(n)
    ]


def toy_request(n: int = 7, *, wrong: int = 0) -> Request:
    """`n` rows to forget and `n` to keep, so that a batch of `n` holds all of both."""
    return Request(
        tuple(toy_records(n, "forget", wrong=wrong)),
        tuple(toy_records(n, "retain", wrong=wrong)),
        tuple(toy_records(4, "held out")),
        tuple(toy_records(4, "unseen")),
    )


def answer_logits(model: LanguageModel, record: QA) -> tuple[np.ndarray, np.ndarray]:
    """[tokens, V] logits at the answer's tokens, and the tokens: one unpadded row through the plain forward pass, as
    float64 numpy. Nothing here is the library's."""
    prompt = model.tokenizer(f"Question: {record.question}\nAnswer:")["input_ids"]
    ids = model.tokenizer(f"Question: {record.question}\nAnswer: {record.answer}")["input_ids"]
    assert ids[: len(prompt)] == prompt and len(ids) > len(prompt)
    with torch.no_grad():
        logits = model.network(torch.tensor([ids])).logits[0].numpy().astype(np.float64)
    return logits[len(prompt) - 1 : -1], np.array(ids[len(prompt) :])


def answer_logprobs(model: LanguageModel, record: QA) -> tuple[np.ndarray, np.ndarray]:
    """[tokens, V] log-probabilities there, and the tokens, float64."""
    logits, targets = answer_logits(model, record)
    logits = logits - logits.max(-1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True)), targets


def true_logprobs(model: LanguageModel, record: QA) -> np.ndarray:
    """[tokens] log-probability of each token of the true answer, float64."""
    logprobs, targets = answer_logprobs(model, record)
    return logprobs[range(len(targets)), targets]


def loss_between(method, start: LanguageModel, now: LanguageModel, request: Request, step: int = 0) -> torch.Tensor:
    """A method's loss at the weights of `now`, in a run that started from `start`."""
    model = start.copy()
    objective = method.objective(model, request)
    model.network.load_state_dict(now.network.state_dict())
    return objective(step)


def padded(rows, places, **_) -> Batch:
    """As `collate`, with another padding token, on the left, and five columns too many."""
    batch = collate(rows, places, pad_id=9, side="left")
    columns = batch.ids.new_full((len(places), 5), 9)
    none = torch.zeros_like(columns, dtype=torch.bool)
    return Batch(
        torch.cat([columns, batch.ids], 1),
        torch.cat([none, batch.attention], 1),
        torch.cat([none, batch.targets], 1),
        batch.rows,
    )


def weights_of(model: LanguageModel) -> dict[str, torch.Tensor]:
    """A copy of every parameter."""
    return {name: parameter.detach().clone() for name, parameter in model.network.named_parameters()}


def same_weights(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    """Bit for bit."""
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def toy_update(model: LanguageModel, seed: int = 1, *, size: float = 0.1, only: str = "") -> Update:
    """A random change of the matrices whose name contains `only`, made for the model's present weights."""
    generator = torch.Generator().manual_seed(seed)
    before = weights_of(model)
    after = {
        name: value + size * torch.randn(value.shape, generator=generator) if only in name and value.ndim > 1 else value
        for name, value in before.items()
    }
    return Update.between(before, after, {"method": {"name": f"toy {seed}"}, "base_weights": model.weights_hash()})


class Recording:
    """A tokenizer that keeps what it was asked to encode."""

    def __init__(self, tokenizer):
        self.tokenizer, self.texts = tokenizer, []

    def __call__(self, texts, **settings):
        self.texts.extend(texts)
        return self.tokenizer(texts, **settings)

    def __getattr__(self, name):
        return getattr(self.tokenizer, name)
