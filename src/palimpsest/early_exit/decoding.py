"""Rows that are decoded while tokens stop at different blocks: keys, values, and the hidden states that wait for them.

A token that stops after e blocks has no keys and values from block e on, which a later token that goes deeper needs.
Until then its hidden state waits at block e. What becomes of it is the fill:

- `eager`: before the next token, every block left makes its keys and values of the state as it is (state copying,
  Schuster et al. 2022, CALM, arXiv 2207.07061).
- `lazy`: the same numbers, but made where a later token comes by, for all that waits there in one product.
- `catch_up`: where a later token comes by, all that waits is run through the block with it, so keys and values are
  those of the whole network (Elhoushi et al. 2024, LayerSkip, arXiv 2404.16710).

A block is reached by a token only once it was reached by all before it. So what waits at a block is what follows on
its keys, and no place has to be kept beside a state.

Shapes: B rows padded on the left, C columns (tokens, padding included), q columns of them, d the model's width.
"""

from typing import Any, Literal

import torch
from torch import Tensor

from palimpsest.data.batches import Batch
from palimpsest.early_exit.stack import Given, Stack
from palimpsest.errors import ModelError

Fill = Literal["eager", "lazy", "catch_up"]


class _Filled(Exception):
    """Leaves a block once its keys and values are kept, before attention."""


class Cache:
    """Keys and values as transformers' blocks want them kept, each block's as long as that block has come."""

    def __init__(self, n_layers: int, capacity: int) -> None:
        """Nothing yet.

        Args:
            n_layers: L.
            capacity: C, the most columns.
        """
        self.capacity, self.lengths = capacity, [0] * n_layers
        self.filling = False
        """Whether a block is left as soon as it has made its keys and values."""
        self._kept: list[tuple[Tensor, Tensor] | None] = [None] * n_layers

    def update(self, keys: Tensor, values: Tensor, layer_idx: int, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Keep a block's next keys and values, [B, heads, q, head width], and give all that it has."""
        kept = self._kept[layer_idx]
        if kept is None:
            shape = (*keys.shape[:2], self.capacity)
            kept = (keys.new_empty(*shape, keys.shape[3]), values.new_empty(*shape, values.shape[3]))
            self._kept[layer_idx] = kept
        start = self.lengths[layer_idx]
        stop = self.lengths[layer_idx] = start + keys.shape[2]
        kept[0][:, :, start:stop], kept[1][:, :, start:stop] = keys, values
        if self.filling:
            raise _Filled
        return kept[0][:, :, :stop], kept[1][:, :, :stop]

    def of(self, layer: int) -> tuple[Tensor, Tensor]:
        """A block's keys and values, [B, heads, columns so far, head width]."""
        kept = self._kept[layer]
        if kept is None:
            raise ModelError(f"block {layer} has been given nothing yet, so it has no keys and values")
        return kept[0][:, :, : self.lengths[layer]], kept[1][:, :, : self.lengths[layer]]

    def crop(self, length: int) -> None:
        """Forget the columns from `length` on."""
        self.lengths = [min(length, own) for own in self.lengths]


class Decoding:
    """One batch on its way: where each block has come, and what waits there."""

    def __init__(self, stack: Stack, batch: Batch, n_new: int, fill: Fill) -> None:
        """Before the first token of it.

        Args:
            stack: a decoder's.
            batch: prompts, padded on the left, on the network's device.
            n_new: the most tokens that will follow on a prompt.
            fill: what becomes of the states that wait.

        Raises:
            ModelError: an attention whose mask cannot be given, or that does not look back so far.
            DataError: a prompt is longer than the positions that the model was made for.
        """
        (n_rows, self.n_prompt), network = batch.ids.shape, stack.network
        self.stack, self.batch, self.fill = stack, batch, fill
        self.n_columns = self.n_prompt
        """Columns that have entered."""
        lengths = batch.attention.sum(1, keepdim=True)
        limit = getattr(network.config, "max_position_embeddings", None) or self.n_prompt + n_new
        n_new = max(1, min(n_new, limit - int(lengths.min())))
        capacity = self.n_prompt + n_new
        _refuse(network.config, capacity)
        # A row that has come to the end of its positions is looked at no more.
        to_come = lengths + torch.arange(1, n_new + 1, device=lengths.device) <= limit
        self._real = torch.cat([batch.attention, to_come], 1)
        self._is_padded = not bool(self._real.all())
        self.cache = Cache(stack.n_layers, capacity)
        self.waiting: list[list[Tensor]] = [[] for _ in range(stack.n_layers + 1)]
        """[B, q, d] each, block by block."""
        self._mask = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=lengths.device)  # stands for each span's own
        columns = Batch(torch.zeros_like(self._real, dtype=torch.long), self._real, self._real, batch.rows)
        # What the network adds to an embedding that is zero: its positions, where they are embedded.
        nothing = torch.zeros(n_rows, capacity, stack.d_model, dtype=network.dtype, device=lengths.device)
        self._positions, self._given = stack.enter(
            columns,
            input_ids=None,
            inputs_embeds=nothing,
            attention_mask=self._mask,
            past_key_values=self.cache,
            use_cache=True,
        )
        self._spans: dict[tuple[int, int], Given] = {}

    def prefill(self) -> Tensor:
        """[B, d] what the final norm reads at the prompts' last tokens; the whole network, for every token."""
        hidden = self._embedded(self.batch.ids, 0)
        for layer in range(self.stack.n_layers):
            hidden = self._through(layer, hidden)
        return hidden[:, -1]

    def enter(self, tokens: Tensor) -> Tensor:
        """[B, 1, d] what the first block reads at the next token of every row, [B]."""
        if self.fill == "eager":
            self.settle()
        self.n_columns += 1
        self._spans.clear()
        return self._embedded(tokens[:, None], self.n_columns - 1)

    def run(self, layer: int, hidden: Tensor) -> Tensor:
        """[B, q, d] what block `layer` makes of the newest columns, after what waits there was filled or caught up."""
        if self.fill != "catch_up":
            self._fill(layer)
            return self._through(layer, hidden)
        n_behind = sum(states.shape[1] for states in self.waiting[layer])
        if not n_behind:
            return self._through(layer, hidden)
        together = self._through(layer, torch.cat([*self._called(layer), hidden], 1))
        self.wait(layer + 1, together[:, :n_behind])
        return together[:, n_behind:]

    def wait(self, layer: int, hidden: Tensor) -> None:
        """Leave columns [B, q, d] where they are: before block `layer`, or L where none is left."""
        if layer < self.stack.n_layers:
            self.waiting[layer].append(hidden)

    def settle(self) -> None:
        """Fill every block with what waits there or before, of the states as they are."""
        for layer in range(self.stack.n_layers):
            self._fill(layer)

    def called(self, layer: int) -> Tensor:
        """[B, q, d] all that waits before block `layer`, which waits no more."""
        return torch.cat(self._called(layer), 1)

    def crop(self, n_columns: int) -> None:
        """Take columns back, those that wait among them, so that `n_columns` remain, none of which may be waiting."""
        self.n_columns = n_columns
        self.cache.crop(n_columns)
        for states in self.waiting:
            states.clear()

    def _called(self, layer: int) -> list[Tensor]:
        called, self.waiting[layer] = self.waiting[layer], []
        return called

    def _fill(self, layer: int) -> None:
        """Keys and values of what waits at a block, of the states as they are; they go on to wait at the next."""
        if not self.waiting[layer]:
            return
        states = self.called(layer)
        start = self.cache.lengths[layer]
        self.cache.filling = True
        try:
            self.stack.run(layer, states, self._given.span(start, start + states.shape[1], self.cache.capacity))
        except _Filled:
            self.wait(layer + 1, states)
        finally:
            self.cache.filling = False

    def _through(self, layer: int, hidden: Tensor) -> Tensor:
        """[B, q, d] a block's output for the columns that follow on its keys and values."""
        start = self.cache.lengths[layer]
        span = start, start + hidden.shape[1]
        if span not in self._spans:
            given = self._given.span(*span, self.cache.capacity)
            self._spans[span] = given.swap(self._mask, self._seen(*span))
        return self.stack.run(layer, hidden, self._spans[span])

    def _embedded(self, tokens: Tensor, start: int) -> Tensor:
        embedding = self.stack.network.get_input_embeddings()
        return embedding(tokens) + self._positions[:, start : start + tokens.shape[1]]

    def _seen(self, start: int, stop: int) -> Tensor | None:
        """The mask of the columns from `start` to `stop`, which see what stands before them; None where all is seen."""
        alone, by_flag = stop - start == 1, self.stack.network.config._attn_implementation == "sdpa"
        if not self._is_padded and (alone or (start == 0 and by_flag)):  # sdpa has a flag for a whole row
            return None
        seen = self._real[:, None, None, :stop]
        if not alone:
            keys = torch.arange(stop, device=seen.device)
            queries = keys[start:, None]
            seen = seen & (keys < queries) | (keys == queries)  # padding sees itself, lest it be nothing
        if by_flag:
            return seen
        dtype = self.stack.network.dtype
        return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill(~seen, torch.finfo(dtype).min)


def _refuse(config: Any, capacity: int) -> None:
    attention, window = config._attn_implementation, getattr(config, "sliding_window", None)
    if attention not in ("sdpa", "eager"):
        raise ModelError(
            f"early exit gives attention masks of its own, which {attention!r} does not take; load the model with "
            "attn_implementation='sdpa'"
        )
    if window is not None and window < capacity:
        raise ModelError(
            f"this {config.model_type} looks back {window} tokens, but prompt and answer may have {capacity}; shorten "
            "the prompt or lower max_new_tokens"
        )
