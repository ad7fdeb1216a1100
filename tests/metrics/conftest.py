import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from palimpsest.data.batches import Encoded
from palimpsest.data.records import QA
from palimpsest.models.anatomy import Anatomy
from palimpsest.models.language_model import LanguageModel

SHARED_DATA = Path(__file__).resolve().parents[2].parent / "shared" / "data"
WORDS = [f"w{number}" for number in range(40)]


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tofu_logs() -> Path:
    folder = SHARED_DATA / "tofu_eval_logs"
    if not folder.is_dir():
        pytest.skip("the TOFU authors' logs (shared/data/tofu_eval_logs) are not beside the project")
    return folder


def make_tokenizer(end: str = "<end>") -> PreTrainedTokenizerFast:
    """One token a word, with the space before it; `end` is both end of text and padding."""
    pieces = ["<end>", "<unk>", "Question", ":", "\n", "Answer", *(f" {word}" for word in WORDS)]
    tokenizer = Tokenizer(models.WordLevel({piece: place for place, piece in enumerate(pieces)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r" ?\w+|[^\w\s]|\s"), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=end, pad_token=end, unk_token="<unk>")


def make_model(seed: int, tokenizer: PreTrainedTokenizerFast | None = None, **config: int) -> LanguageModel:
    """A random Llama whose predictions are far from uniform."""
    tokenizer = tokenizer or make_tokenizer()
    torch.manual_seed(seed)
    sizes = {"vocab_size": len(tokenizer), "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    settings = LlamaConfig(num_attention_heads=4, num_key_value_heads=2, initializer_range=0.3, **(sizes | config))
    network = LlamaForCausalLM(settings).eval()
    return LanguageModel(network, tokenizer, Anatomy.of(network), f"tiny{seed}")


@pytest.fixture(scope="session")
def model() -> LanguageModel:
    return make_model(0)


@pytest.fixture(scope="session")
def other_model() -> LanguageModel:
    return make_model(1)


@pytest.fixture(scope="session")
def records() -> list[QA]:
    """Eleven questions of unlike lengths with answers of one to six words."""
    draw = random.Random(0)

    def sentence(most: int) -> str:
        return " ".join(draw.choices(WORDS, k=draw.randint(1, most)))

    return [
        QA(
            sentence(12),
            sentence(6),
            subject=f"s{number // 3}",
            paraphrased_answer=sentence(6),
            wrong=tuple(sentence(6) for _ in range(2 + number % 3)),
            id=str(number),
        )
        for number in range(11)
    ]


def log_softmax64(logits: torch.Tensor) -> np.ndarray:
    values = logits.detach().numpy().astype(np.float64)
    values = values - values.max(-1, keepdims=True)
    return values - np.log(np.exp(values).sum(-1, keepdims=True))


def full_logprobs(model: LanguageModel, row: Encoded) -> np.ndarray:
    """[targets, V] from the full logits of one unpadded row, in float64: nothing here is the library's."""
    with torch.no_grad():
        logits = model.network(torch.tensor([row.ids])).logits[0]
    return log_softmax64(logits)[row.start - 1 : row.stop - 1]


@pytest.fixture(scope="session")
def reference() -> Callable[[LanguageModel, Encoded], np.ndarray]:
    return full_logprobs


@pytest.fixture(scope="session")
def build() -> Callable[..., LanguageModel]:
    return make_model


@pytest.fixture(scope="session")
def tokenizer_ending_with() -> Callable[[str], PreTrainedTokenizerFast]:
    return make_tokenizer
