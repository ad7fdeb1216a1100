from collections.abc import Callable

import pytest
import torch
from transformers import AutoModelForCausalLM, BloomConfig, Gemma2Config, GPT2Config, OPTConfig, PreTrainedTokenizerFast

from palimpsest.data.records import QA
from palimpsest.metrics.generation import generate_answers
from palimpsest.models.anatomy import Anatomy
from palimpsest.models.language_model import LanguageModel

Build = Callable[..., LanguageModel]


def naive_answer(model: LanguageModel, record: QA, max_new_tokens: int) -> str:
    """One row, no padding, no cache, every token from a full forward pass."""
    ids = model.tokenizer(f"Question: {record.question}\nAnswer:")["input_ids"]
    said: list[int] = []
    while len(said) < max_new_tokens:
        with torch.no_grad():
            token = int(model.network(torch.tensor([ids + said])).logits[0, -1].argmax())
        if token == model.tokenizer.eos_token_id:
            break
        said.append(token)
    return str(model.tokenizer.decode(said, skip_special_tokens=True)).strip()


@pytest.mark.parametrize("batch_size", [1, 3, 11])
def test_answers_are_those_of_naive_decoding_at_every_batch_size(
    model: LanguageModel, records: list[QA], batch_size: int
) -> None:
    expected = [naive_answer(model, record, 7) for record in records]
    assert len(set(expected)) > 5, "a constant model would test nothing"
    assert generate_answers(model, records, max_new_tokens=7, batch_size=batch_size) == expected


@pytest.mark.parametrize(
    "config",
    [
        GPT2Config(n_embd=32, n_layer=2, n_head=4, n_positions=64),
        OPTConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, ffn_dim=48, word_embed_proj_dim=32),
        BloomConfig(hidden_size=32, n_layer=2, n_head=4),
        Gemma2Config(
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=8,
            intermediate_size=48,
            sliding_window=4,
            tie_word_embeddings=False,
        ),
    ],
    ids=lambda config: config.model_type,
)
def test_other_families_positions_and_windows_survive_padding_and_cache(
    config: GPT2Config, records: list[QA], model: LanguageModel
) -> None:
    config.vocab_size, config.initializer_range, config.init_std = len(model.tokenizer), 0.3, 0.3
    config.pad_token_id = config.bos_token_id = config.eos_token_id = 0
    torch.manual_seed(2)
    network = AutoModelForCausalLM.from_config(config).eval()
    other = LanguageModel(network, model.tokenizer, Anatomy.of(network))
    expected = [naive_answer(other, record, 7) for record in records]
    assert len(set(expected)) > 4
    assert generate_answers(other, records, max_new_tokens=7, batch_size=4) == expected


def test_the_models_generation_configuration_does_not_leak_in(build: Build, records: list[QA]) -> None:
    model = build(0)
    before = generate_answers(model, records, max_new_tokens=6)
    config = model.network.generation_config
    config.do_sample, config.temperature, config.repetition_penalty = True, 5.0, 9.0
    config.forced_eos_token_id, config.max_length, config.min_new_tokens = 7, 3, 6
    config.suppress_tokens = list(range(10, 50))
    torch.manual_seed(0)
    assert generate_answers(model, records, max_new_tokens=6) == before


def test_an_answer_is_cut_before_its_end_of_text(
    build: Build, tokenizer_ending_with: Callable[[str], PreTrainedTokenizerFast], records: list[QA]
) -> None:
    free = generate_answers(build(0), records, max_new_tokens=8)
    # Let a word that the model says later in an answer be the end of text.
    end = next(word for answer in free for word in answer.split()[2:] if word.startswith("w"))
    ending = build(0, tokenizer_ending_with(f" {end}"))
    cut = generate_answers(ending, records, max_new_tokens=8, batch_size=4)
    assert cut == [naive_answer(ending, record, 8) for record in records]
    assert not any(end in answer.split() for answer in cut)
    assert any(answer and whole.startswith(f"{answer} {end}") for answer, whole in zip(cut, free, strict=True))


def test_a_model_that_ends_at_once_says_nothing(build: Build, records: list[QA]) -> None:
    model = build(0)
    with torch.no_grad():
        model.network.lm_head.weight.zero_()  # all logits equal: the first token, the end of text, wins
    assert generate_answers(model, records) == [""] * len(records)


def test_generation_stops_where_the_positions_end(model: LanguageModel, records: list[QA], build: Build) -> None:
    short = build(0, max_position_embeddings=20)
    free = generate_answers(model, records, max_new_tokens=30)
    held = generate_answers(short, records, max_new_tokens=30, batch_size=3)
    # A token for each of: Question : q... newline Answer : and then the answer; the 20th position gives a 21st token.
    for record, whole, cut in zip(records, free, held, strict=True):
        room = 21 - (5 + len(record.question.split()))
        assert cut.split() == whole.split()[: len(cut.split())]
        assert len(cut.split()) <= room
    assert held != free


def test_the_networks_training_mode_is_put_back(build: Build, records: list[QA]) -> None:
    model = build(0)
    model.network.train()
    generate_answers(model, records[:2], max_new_tokens=2)
    assert model.network.training


def test_the_true_answer_is_never_read(model: LanguageModel, records: list[QA]) -> None:
    other = [QA(record.question, "w3 w3 w3") for record in records]
    assert generate_answers(model, other, max_new_tokens=5) == generate_answers(model, records, max_new_tokens=5)
    assert generate_answers(model, []) == []
