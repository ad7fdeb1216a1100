"""Tokens, targets and padding: a row's score depends on the row alone."""

import random
from functools import cache

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from palimpsest.data.batches import Batch, Encoded, batch_at, batches, collate, encode, epoch_order
from palimpsest.data.prompts import Template, render
from palimpsest.data.records import QA, Passage, Record
from palimpsest.errors import DataError
from palimpsest.models.scoring import predict

torch.set_num_threads(1)

CORPUS = [
    "Question: Where does Ann Vale live?\nAnswer: Ann Vale lives in Oslo, by the sea.",
    "Question: What did Bo Lund write?\nAnswer: Bo Lund wrote three novels and 12 plays.",
    "Once upon a time a small fox met a big bear in the wood.",
]
CHAT = "{{ bos_token }}{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}<assistant>"


@cache
def make_tokenizer(kind: str) -> PreTrainedTokenizerFast:
    """A small tokenizer as the families have them: GPT-2's, Llama 3's (BOS, trimmed offsets), Llama 2's (metaspace)."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=kind == "llama2", unk_token="<unk>" if kind == "llama2" else None))
    special = ["<s>", "</s>", "<unk>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    if kind == "llama2":
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
        tokenizer.decoder = decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        )
        special += [f"<0x{byte:02X}>" for byte in range(256)]
        alphabet = []
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=len(special) + 400, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    begin = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))])
    if kind == "gpt2":
        tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    elif kind == "llama3":
        tokenizer.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=True), begin])
    else:
        tokenizer.post_processor = begin
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")
    fast.chat_template = CHAT
    return fast


@cache
def tiny_llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(make_tokenizer("gpt2")),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        initializer_range=0.3,  # far from uniform predictions, so that a wrong position or mask shows
        tie_word_embeddings=False,
        pad_token_id=None,
        bos_token_id=0,
        eos_token_id=1,
    )
    return LlamaForCausalLM(config).eval()


def row_logprobs(batch: Batch) -> dict[int, float]:
    """Each row's summed log-probability, by the row's place in what was batched."""
    with torch.inference_mode():
        predictions = predict(tiny_llama(), batch)
    sums = predictions.sum_by_row(predictions.logprobs(), len(batch.rows))
    return dict(zip(batch.rows, sums.tolist(), strict=True))


def alone(row: Encoded) -> float:
    """The same number without batch, padding or mask, in float64."""
    network = tiny_llama()
    with torch.inference_mode():
        logits: Tensor = network(torch.tensor([row.ids])).logits[0].double()
    logprobs = logits.log_softmax(-1).numpy()
    return float(np.sum([logprobs[place - 1, row.ids[place]] for place in range(row.start, row.stop)]))


def widened(batch: Batch, more: int, side: str, pad_id: int) -> Batch:
    """The batch with `more` columns of padding."""

    def with_columns(tensor: Tensor, value: int | bool) -> Tensor:
        columns = tensor.new_full((len(tensor), more), value)
        return torch.cat([tensor, columns] if side == "right" else [columns, tensor], dim=1)

    return Batch(
        with_columns(batch.ids, pad_id),
        with_columns(batch.attention, False),
        with_columns(batch.targets, False),
        batch.rows,
    )


words = st.sampled_from("Ann Vale Bo Lund lives wrote Oslo sea novels 12 fox bear é 😀 a".split())
sentences = st.lists(words, min_size=1, max_size=8).map(" ".join)
records: st.SearchStrategy[Record] = st.builds(QA, sentences, sentences) | st.builds(
    Passage, sentences.map("It: {}".format)
)
record_lists = st.lists(records, min_size=1, max_size=7)


@settings(deadline=None, max_examples=60)
@given(
    records=record_lists,
    side=st.sampled_from(["left", "right"]),
    more=st.integers(0, 9),
    pad_with=st.sampled_from(["begin", "end", "a token of the rows"]),
    batch_size=st.integers(1, 8),
    end=st.booleans(),
    shuffle=st.randoms(use_true_random=False),
)
def test_a_rows_score_depends_on_the_row_alone(
    records: list[Record], side: str, more: int, pad_with: str, batch_size: int, end: bool, shuffle: random.Random
) -> None:
    encoded = encode(records, make_tokenizer("gpt2"), end=end)
    pad_id = {"begin": 0, "end": 1, "a token of the rows": encoded[0].ids[1]}[pad_with]
    expected = {place: alone(row) for place, row in enumerate(encoded)}
    order = list(range(len(encoded)))
    shuffle.shuffle(order)
    scored: dict[int, float] = {}
    for first in range(0, len(order), batch_size):
        rows = order[first : first + batch_size]
        batch = collate([encoded[row] for row in rows], rows, pad_id=pad_id, side=side)  # type: ignore[arg-type]
        scored |= row_logprobs(widened(batch, more, side, pad_id))
    assert scored.keys() == expected.keys()
    for place, value in expected.items():
        assert scored[place] == pytest.approx(value, abs=1e-5 * encoded[place].n_targets, rel=1e-6)


@settings(deadline=None, max_examples=30)
@given(records=record_lists, batch_size=st.integers(1, 8), side=st.sampled_from(["left", "right"]))
def test_batches_hold_every_row_once_with_like_lengths_together(
    records: list[Record], batch_size: int, side: str
) -> None:
    encoded = encode(records, make_tokenizer("gpt2"))
    made = list(batches(encoded, batch_size=batch_size, side=side))  # type: ignore[arg-type]
    assert sorted(row for batch in made for row in batch.rows) == list(range(len(records)))
    assert all(len(batch.rows) == batch_size for batch in made[:-1])
    lengths = [len(encoded[row].ids) for batch in made for row in batch.rows]
    assert lengths == sorted(lengths)
    for batch in made:
        assert batch.ids.shape == batch.attention.shape == batch.targets.shape
        assert not (batch.targets & ~batch.attention).any()
        for line, row in enumerate(batch.rows):
            assert tuple(batch.ids[line][batch.attention[line]].tolist()) == encoded[row].ids
            assert (
                tuple(batch.ids[line][batch.targets[line]].tolist())
                == encoded[row].ids[encoded[row].start : encoded[row].stop]
            )


def test_predictions_know_their_row() -> None:
    encoded = encode([QA("Ann", "Oslo"), Passage(CORPUS[2]), QA("Bo", "12 plays")], make_tokenizer("gpt2"))
    batch = collate(encoded, [5, 3, 9], side="left")
    with torch.inference_mode():
        predictions = predict(tiny_llama(), batch)
    counts = [row.n_targets for row in encoded]
    assert predictions.row.tolist() == [line for line, n in enumerate(counts) for _ in range(n)]
    assert predictions.targets.tolist() == [token for row in encoded for token in row.ids[row.start : row.stop]]
    assert predictions.logits.shape == (sum(counts), tiny_llama().config.vocab_size)
    means = predictions.mean_by_row(predictions.logprobs(), 3)
    assert means.tolist() == pytest.approx([alone(row) / row.n_targets for row in encoded], abs=1e-5)


# --- targets ----------------------------------------------------------------------------------------------------

spaces = st.sampled_from(["", " ", "\n", " \n", "  "])
answers = st.builds("{}{}{}".format, spaces, sentences, spaces)


@settings(deadline=None, max_examples=80)
@given(asked=sentences, answer=answers, kind=st.sampled_from(["gpt2", "llama3"]))
def test_targets_are_exactly_the_completion(asked: str, answer: str, kind: str) -> None:
    tokenizer = make_tokenizer(kind)
    record = QA(asked, answer)
    for template in ("plain", "raw", "chat"):
        (row,) = encode([record], tokenizer, template=template)
        prompt, completion = render(record, tokenizer, template)
        assert tokenizer.decode(row.ids[row.start : row.stop], clean_up_tokenization_spaces=False) == completion
        written = tokenizer.decode(row.prompt_ids, clean_up_tokenization_spaces=False).removeprefix("<s>")
        assert written == prompt.removeprefix("<s>")


@settings(deadline=None, max_examples=40)
@given(asked=sentences, answer=sentences, template=st.sampled_from(["plain", "raw"]))
def test_targets_are_the_completion_with_metaspaces(asked: str, answer: str, template: Template) -> None:
    tokenizer = make_tokenizer("llama2")
    (row,) = encode([QA(asked, answer)], tokenizer, template=template)
    assert row.ids[0] == tokenizer.bos_token_id
    # The decoder drops the first space of what it is given, which is the completion's.
    assert tokenizer.decode(row.ids[row.start : row.stop], clean_up_tokenization_spaces=False) == answer


@pytest.mark.parametrize("kind", ["gpt2", "llama3", "llama2"])
@pytest.mark.parametrize("record", [QA("Ann", "Oslo"), Passage(CORPUS[2])])
def test_end_appends_exactly_one_target(kind: str, record: Record) -> None:
    tokenizer = make_tokenizer(kind)
    (without,), (row,) = encode([record], tokenizer), encode([record], tokenizer, end=True)
    assert row.ids == (*without.ids, tokenizer.eos_token_id)
    assert (row.start, row.stop) == (without.start, without.stop + 1)
    assert row.n_targets == without.n_targets + 1
    assert tokenizer.eos_token_id not in without.ids


def test_a_rows_first_token_is_never_a_target() -> None:
    text = CORPUS[2]
    (bare,), (begun,) = (
        encode([Passage(text)], make_tokenizer("gpt2")),
        encode([Passage(text)], make_tokenizer("llama3")),
    )
    assert bare.start == begun.start == 1
    assert begun.n_targets == bare.n_targets + 1  # a token that begins the text lets its first word be scored


def test_a_passage_begins_alike_in_every_template() -> None:
    tokenizer = make_tokenizer("llama3")
    rows = [
        encode([Passage(CORPUS[2]), QA("Ann", "Oslo")], tokenizer, template=template) for template in ("plain", "chat")
    ]
    assert rows[0][0] == rows[1][0]
    assert rows[1][1].ids.count(tokenizer.bos_token_id) == 1  # the chat template writes its own


def test_max_length_cuts_at_the_end_and_leaves_a_target() -> None:
    tokenizer = make_tokenizer("gpt2")
    record = QA("Where does Ann Vale live?", "Ann Vale lives in Oslo.", id="r1")
    (whole,) = encode([record], tokenizer, end=True)
    (cut,) = encode([record], tokenizer, end=True, max_length=whole.start + 1)
    assert cut == Encoded(whole.ids[: whole.start + 1], whole.start, whole.start + 1)
    with pytest.raises(DataError, match=rf"record 'r1': no token is left to score within {whole.start} tokens"):
        encode([record], tokenizer, max_length=whole.start)


@pytest.mark.parametrize("end", [False, True])
def test_a_record_without_completion_is_refused(end: bool) -> None:
    for template in ("raw", "chat"):
        with pytest.raises(DataError, match="record 'r1': no token is left to score; its completion is empty"):
            encode([QA("Ann ", "", id="r1")], make_tokenizer("gpt2"), template=template, end=end)  # type: ignore[arg-type]


def test_no_records_are_no_rows() -> None:
    assert encode([], make_tokenizer("gpt2")) == []
    assert list(batches([])) == []


# --- training order ---------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=60)
@given(n=st.integers(1, 12), batch_size=st.integers(1, 15), seed=st.integers(0, 99), epochs=st.integers(1, 3))
def test_every_epoch_covers_every_row_once(n: int, batch_size: int, seed: int, epochs: int) -> None:
    encoded = [Encoded((row, row), 1, 2) for row in range(n)]
    steps = -(-n * epochs // batch_size)
    made = [batch_at(encoded, step, batch_size=batch_size, seed=seed) for step in range(steps)]
    places = [row for batch in made for row in batch.rows]
    assert all(len(batch.rows) == batch_size for batch in made)
    for epoch in range(epochs):
        assert sorted(places[epoch * n : (epoch + 1) * n]) == list(range(n))
    for batch in made:
        assert batch.ids[:, 0].tolist() == list(batch.rows)


def test_a_step_depends_on_seed_and_step_alone() -> None:
    encoded = [Encoded((row, row), 1, 2) for row in range(50)]

    def rows(step: int, seed: int) -> tuple[int, ...]:
        return batch_at(encoded, step, batch_size=8, seed=seed).rows

    forwards = [rows(step, 3) for step in range(20)]
    random.seed(1)
    torch.manual_seed(1)
    assert [rows(step, 3) for step in reversed(range(20))] == forwards[::-1]
    assert forwards != [rows(step, 4) for step in range(20)]
    assert epoch_order(50, 0, 3) != epoch_order(50, 1, 3)
    assert epoch_order(5, 0, 0) == [0, 1, 4, 3, 2]  # for ever: a run resumed after an upgrade goes on in its order
