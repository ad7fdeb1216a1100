"""What a model says by itself: greedy decoding in batches.

The loop is written out here, not left to `generate`, so that nothing in a model's generation configuration (sampling,
forced or suppressed tokens, length limits) can change an audit.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from palimpsest.data.batches import Batch, Encoded, batches, encode
from palimpsest.data.prompts import Template
from palimpsest.data.records import QA, Preference
from palimpsest.models.inputs import forward_inputs
from palimpsest.models.language_model import LanguageModel, evaluating

SILENCE = -1
"""Stands where a row has ended."""


def generate_answers(
    model: LanguageModel,
    records: Sequence[QA] | Sequence[QA | Preference],
    *,
    template: Template = "plain",
    max_new_tokens: int = 32,
    batch_size: int = 32,
) -> list[str]:
    """The greedy answer to each record's question, in the records' order, without the spaces around it.

    An answer ends before the first special token (end of text, end of turn, padding; an unknown word does not end it),
    after `max_new_tokens`, or where the model's positions end.

    Args:
        model: the model that answers.
        records: n questions; their answers are never read.
        template: how a question is put.
        max_new_tokens: the longest answer, in tokens.
        batch_size: rows at a time; in fp32 it does not change an answer.

    Raises:
        DataError: a record without a question.
    """
    # Encoded with its answer, so that generation starts from the very tokens that scoring conditions on.
    prompts = [row.prompt_ids for row in encode(records, model.tokenizer, template=template)]
    said = continuations(model, prompts, max_new_tokens=max_new_tokens, batch_size=batch_size)
    return [text.strip() for text in said]


def continuations(
    model: LanguageModel, prompts: Sequence[Sequence[int]], *, max_new_tokens: int, batch_size: int = 32
) -> list[str]:
    """How a model goes on greedily after each of n prompts of token ids, with the spaces around it.

    It ends as an answer does; arguments as those of `generate_answers`.
    """
    rows = [Encoded(tuple(ids), start=len(ids), stop=len(ids)) for ids in prompts]
    stops = torch.tensor(sorted(stop_ids(model.tokenizer)), device=model.device)
    texts = [""] * len(rows)
    with evaluating(model) as network:
        for batch in batches(rows, batch_size=batch_size, side="left"):
            said = _greedy(network, batch.to(model.device), stops, max_new_tokens)
            for row, ids in zip(batch.rows, said, strict=True):
                texts[row] = str(model.tokenizer.decode(ids, skip_special_tokens=True))
    return texts


def _greedy(network: PreTrainedModel, batch: Batch, stops: Tensor, max_new_tokens: int) -> list[list[int]]:
    """The tokens that each row goes on with, before its stop; `batch` is padded on the left."""
    last_position = getattr(network.config, "max_position_embeddings", None) or math.inf
    attention = batch.attention
    going = attention.any(1)
    inputs = forward_inputs(network, batch)
    said: list[Tensor] = []
    for _ in range(max_new_tokens):
        output = network(**inputs | {"use_cache": True, "logits_to_keep": 1})
        token = output.logits[:, -1].argmax(-1)
        going = going & ~torch.isin(token, stops)
        said.append(token.where(going, SILENCE))
        going = going & (attention.sum(1) < last_position)
        if not going.any():
            break
        # A row that has ended stays in the batch but sees nothing new, so the others do not notice.
        attention = torch.cat([attention, going[:, None]], 1)
        inputs = _next_inputs(network, token, attention) | {"past_key_values": output.past_key_values}
    return [[token for token in row if token != SILENCE] for row in torch.stack(said, 1).tolist()]


def _next_inputs(network: PreTrainedModel, token: Tensor, attention: Tensor) -> dict[str, Any]:
    """What is given for one more token a row, [B], seeing `attention` [B, T] which ends with it."""
    inputs = forward_inputs(network, Batch(token[:, None], attention, attention, ()))
    if "position_ids" in inputs:
        inputs["position_ids"] = inputs["position_ids"][:, -1:]
    return inputs


def stop_ids(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """The tokens before which an answer ends: every special one but the unknown word."""
    # GPT-2's unknown word is its end of text, so the end is added back.
    return ({*tokenizer.all_special_ids} - {tokenizer.unk_token_id} | {tokenizer.eos_token_id}) - {None}
