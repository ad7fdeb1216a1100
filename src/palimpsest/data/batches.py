"""Records as token ids with a mask over the tokens that count, padded into length-bucketed batches.

Shapes: B rows, T tokens. A mask says which tokens are *targets*; the token at position t is predicted from position
t - 1. Padding is known by the attention mask alone, so it never matters which token pads or whether it is also the end
of text.
"""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from palimpsest.data.prompts import Template, render
from palimpsest.data.records import QA, Passage, Record
from palimpsest.errors import DataError


@dataclass(frozen=True, slots=True)
class Encoded:
    """One record as token ids; `ids[start:stop]` are its targets."""

    ids: tuple[int, ...]
    start: int
    stop: int

    @property
    def n_targets(self) -> int:
        """How many tokens are scored."""
        return self.stop - self.start

    @property
    def prompt_ids(self) -> tuple[int, ...]:
        """The tokens before the first target."""
        return self.ids[: self.start]


@dataclass(frozen=True, slots=True)
class Batch:
    """Padded rows. `rows[b]` is the place of row b in the sequence that was batched."""

    ids: Tensor
    """[B, T] token ids."""
    attention: Tensor
    """[B, T] bool, False at padding."""
    targets: Tensor
    """[B, T] bool, True at tokens that are scored; never True at a row's first real token."""
    rows: tuple[int, ...]

    def to(self, device: torch.device | str) -> "Batch":
        """The same batch on another device."""
        return Batch(self.ids.to(device), self.attention.to(device), self.targets.to(device), self.rows)


def encode(
    records: Sequence[Record] | Sequence[QA],
    tokenizer: PreTrainedTokenizerBase,
    *,
    template: Template = "plain",
    end: bool = False,
    max_length: int | None = None,
    entities: bool = False,
) -> list[Encoded]:
    """Tokenise each record's prompt and completion together; its targets are the tokens that hold the completion.

    Args:
        records: what to encode.
        tokenizer: a fast tokenizer (the boundary is found by character offsets).
        template: how prompt and completion are joined.
        end: append the end-of-text token as a last target (for training a model to stop; never for scoring an answer).
        max_length: cut longer records to their first `max_length` tokens.
        entities: let only the tokens that touch each record's `entity_span` be targets, and end after them.

    Raises:
        DataError: a record with no target token left, without an `entity_span` where entities are asked for, or a
            tokenizer without offsets.
    """
    if not tokenizer.is_fast:
        raise DataError(
            f"{type(tokenizer).__name__} gives no character offsets; load its fast version (tokenizer.json)"
        )
    texts = [render(record, tokenizer, template) for record in records]
    # A chat template writes its own special tokens, but a passage is not put through it.
    special = [template != "chat" or isinstance(record, Passage) for record in records]
    tokens = _tokenize([prompt + completion for prompt, completion in texts], special, tokenizer)
    encoded = []
    for record, (prompt, completion), (ids, offsets) in zip(records, texts, tokens, strict=True):
        begin, until = len(prompt), len(prompt) + len(completion)
        if entities:
            begin, until = _entity(record, until)
        # Some tokenizers trim white space off offsets, which leaves a blank's start at its end.
        inside = [place for place, (first, last) in enumerate(offsets) if last > begin and min(first, last - 1) < until]
        # A row's first token is predicted from nothing, so it can never be a target.
        start, stop = (max(inside[0], 1), inside[-1] + 1) if inside else (0, 0)
        ids = ids[:stop]
        if inside and end and tokenizer.eos_token_id is not None:
            ids, stop = [*ids, tokenizer.eos_token_id], stop + 1
        if max_length is not None:
            ids, stop = ids[:max_length], min(stop, max_length)
        if stop <= start:
            raise DataError(
                f"record {record.id!r}: no token is left to score"
                + (
                    f" within {max_length} tokens; raise max_length"
                    if inside and max_length
                    else "; its completion is empty"
                )
            )
        encoded.append(Encoded(tuple(ids), start, stop))
    return encoded


def _entity(record: Record, end: int) -> tuple[int, int]:
    """Where a record's entity stands in a text that ends, at `end`, with its answer."""
    if not isinstance(record, QA) or record.entity_span is None:
        raise DataError(
            f"record {record.id!r}: field 'entity_span' is missing; give the characters that carry the fact"
        )
    start, stop = (end - len(record.answer) + place for place in record.entity_span)
    return start, stop


def _tokenize(
    texts: Sequence[str], special: Sequence[bool], tokenizer: PreTrainedTokenizerBase
) -> list[tuple[list[int], list[tuple[int, int]]]]:
    """Each text's token ids and their character offsets; `special` says which texts get special tokens."""
    tokens: dict[int, tuple[list[int], list[tuple[int, int]]]] = {}
    for add_special in sorted(set(special)):
        places = [place for place, wanted in enumerate(special) if wanted == add_special]
        encoding = tokenizer(
            [texts[place] for place in places],
            add_special_tokens=add_special,
            return_offsets_mapping=True,
            return_attention_mask=False,
        )
        tokens.update(zip(places, zip(encoding["input_ids"], encoding["offset_mapping"], strict=True), strict=True))
    return [tokens[place] for place in range(len(texts))]


def collate(
    encoded: Sequence[Encoded], rows: Sequence[int], *, pad_id: int = 0, side: Literal["left", "right"] = "right"
) -> Batch:
    """Pad rows to the longest of them."""
    width = max(len(row.ids) for row in encoded)
    ids = torch.full((len(encoded), width), pad_id, dtype=torch.long)
    attention = torch.zeros((len(encoded), width), dtype=torch.bool)
    targets = torch.zeros((len(encoded), width), dtype=torch.bool)
    for line, row in enumerate(encoded):
        shift = width - len(row.ids) if side == "left" else 0
        ids[line, shift : shift + len(row.ids)] = torch.tensor(row.ids)
        attention[line, shift : shift + len(row.ids)] = True
        targets[line, shift + row.start : shift + row.stop] = True
    return Batch(ids, attention, targets, tuple(rows))


def batches(
    encoded: Sequence[Encoded], *, batch_size: int = 32, side: Literal["left", "right"] = "right"
) -> Iterator[Batch]:
    """Every row once, rows of like length together so that little is padded.

    For scoring: order never changes a score.
    """
    order = sorted(range(len(encoded)), key=lambda row: len(encoded[row].ids))
    for first in range(0, len(order), batch_size):
        rows = order[first : first + batch_size]
        yield collate([encoded[row] for row in rows], rows, side=side)


def epoch_order(n: int, epoch: int, seed: int) -> list[int]:
    """A permutation of range(n) that depends on seed and epoch alone."""
    order = list(range(n))
    random.Random(f"{seed}/{epoch}").shuffle(order)
    return order


def batch_at(encoded: Sequence[Encoded], step: int, *, batch_size: int, seed: int) -> Batch:
    """The shuffled training batch of a step.

    Every epoch covers every row, the last batch of an epoch being filled up from the next. Any step can be asked for
    directly, so a resumed run needs no reader's state.
    """
    n = len(encoded)
    rows = []
    orders: dict[int, list[int]] = {}
    for place in range(step * batch_size, (step + 1) * batch_size):
        epoch = place // n
        if epoch not in orders:
            orders[epoch] = epoch_order(n, epoch, seed)
        rows.append(orders[epoch][place % n])
    return collate([encoded[row] for row in rows], rows)
