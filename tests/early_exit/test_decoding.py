"""Tokens decoded one by one have the states of whole rows in which each token is frozen where it exits."""

import itertools
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.early_exit.decoders import LAYERS, decoder, frozen
from tests.models.tiny_families import tiny_batch
from torch import Tensor
from transformers import DynamicCache

from palimpsest.data.batches import Batch
from palimpsest.early_exit.decoding import Cache, Decoding, Fill
from palimpsest.early_exit.stack import DECODERS, Given, Stack
from palimpsest.errors import ModelError

PROMPT = 3


def stack_of(family: str) -> Stack:
    model = decoder(family)
    return Stack(model.network.double(), model.anatomy.blocks, True)


def decoded(stack: Stack, batch: Batch, exits: Tensor, fill: Fill) -> tuple[Tensor, Decoding]:
    """[B, T - PROMPT, d] the state of each later token where it exits; rows are padded on the left."""
    prompt = Batch(batch.ids[:, :PROMPT], batch.attention[:, :PROMPT], batch.targets[:, :PROMPT], batch.rows)
    decoding = Decoding(stack, prompt, batch.ids.shape[1] - PROMPT, fill)
    decoding.prefill()
    states = []
    for column in range(PROMPT, batch.ids.shape[1]):
        own = exits[:, column]
        hidden = state = decoding.enter(batch.ids[:, column])
        for layer in range(int(own.max())):
            after = decoding.run(layer, hidden)
            state = torch.where((own > layer)[:, None, None], after, state)
            hidden = after if fill == "catch_up" else state
        decoding.wait(int(own.max()), hidden)
        states.append(state)
    return torch.cat(states, 1), decoding


def ragged(n_rows: int, width: int, seed: int = 0) -> Tensor:
    exits = torch.randint(1, LAYERS + 1, (n_rows, width), generator=torch.Generator().manual_seed(seed))
    exits[:, :PROMPT] = LAYERS
    return exits


@pytest.mark.parametrize("family", DECODERS)
def test_both_copying_fills_give_the_states_of_whole_rows_for_ragged_exits(family: str) -> None:
    stack, batch = stack_of(family), tiny_batch(12, 10, 11, side="left")
    exits = ragged(3, 12)
    with torch.inference_mode():
        expected = frozen(stack, batch, exits)[:, PROMPT:]
        for fill in ("eager", "lazy"):
            found, _ = decoded(stack, batch, exits, fill)
            torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox"])
def test_eager_attention_is_given_its_mask_in_numbers(family: str) -> None:
    model, batch, exits = decoder(family), tiny_batch(12, 10, 11, side="left"), ragged(3, 12)
    model.network.set_attn_implementation("eager")
    stack = Stack.of(model.network)
    with torch.inference_mode():
        expected = frozen(stack, batch, exits)[:, PROMPT:]
        for fill in ("eager", "lazy"):
            found, _ = decoded(stack, batch, exits, fill)
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@contextmanager
def fill_without_norm(stack: Stack, decoding_of: list[Decoding]) -> Iterator[None]:
    """The mistake of projecting the bare residual stream (a block's first norm does nothing while it is filled)."""

    def bare(_: object, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        return inputs[0] if decoding_of[-1].cache.filling else output

    norms = [getattr(block, "input_layernorm", None) or block.ln_1 for block in stack.blocks]
    handles = [norm.register_forward_hook(bare) for norm in norms]
    yield
    for handle in handles:
        handle.remove()


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_fill_without_the_blocks_norm_would_be_seen(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    stack, batch, exits = stack_of(family), tiny_batch(12, 12, side="left"), ragged(2, 12)
    made: list[Decoding] = []
    own = Decoding.__init__
    monkeypatch.setattr(Decoding, "__init__", lambda self, *given: made.append(self) or own(self, *given))
    with torch.inference_mode():
        right, _ = decoded(stack, batch, exits, "lazy")
        with fill_without_norm(stack, made):
            wrong, _ = decoded(stack, batch, exits, "lazy")
    assert (right - wrong).abs().max() > 0.05 * right.std()


@pytest.mark.parametrize("family", DECODERS)
def test_catching_up_gives_the_whole_networks_keys_and_values(family: str) -> None:
    stack, batch = stack_of(family), tiny_batch(12, 12, side="left")
    exits = ragged(2, 12)
    exits[:, -1] = LAYERS
    cache = DynamicCache(config=stack.network.config)
    with torch.inference_mode():
        stack.network(input_ids=batch.ids, past_key_values=cache, use_cache=True)
        found, decoding = decoded(stack, batch, exits, "catch_up")
        whole = [frozen(stack, batch, torch.full_like(exits, exit)) for exit in range(1, LAYERS + 1)]
    for layer in range(LAYERS):
        keys, values = decoding.cache.of(layer)
        torch.testing.assert_close(keys, cache.layers[layer].keys, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(values, cache.layers[layer].values, rtol=1e-9, atol=1e-9)
    for row, column in itertools.product(range(2), range(PROMPT, 12)):
        expected = whole[exits[row, column] - 1][row, column]
        torch.testing.assert_close(found[row, column - PROMPT], expected, rtol=1e-9, atol=1e-9)


@given(st.lists(st.integers(1, LAYERS), min_size=1, max_size=14), st.sampled_from(["eager", "lazy", "catch_up"]))
@settings(max_examples=25)
def test_what_waits_at_a_block_follows_on_its_keys(exits: list[int], fill: Fill) -> None:
    stack, n = stack_of("llama"), PROMPT + len(exits)
    batch, given_exits = tiny_batch(n), torch.tensor([[LAYERS] * PROMPT + exits])
    with torch.inference_mode():
        found, decoding = decoded(stack, batch, given_exits, fill)
        lengths, waiting = decoding.cache.lengths, [sum(part.shape[1] for part in at) for at in decoding.waiting]
        assert lengths[0] == n and waiting[0] == 0 == waiting[LAYERS]
        assert all(lengths[layer] + waiting[layer] == lengths[layer - 1] for layer in range(1, LAYERS))
        if fill == "catch_up":
            return
        torch.testing.assert_close(found, frozen(stack, batch, given_exits)[:, PROMPT:], rtol=1e-9, atol=1e-9)
        # A token that runs every block finds them all full, whoever was waiting.
        decoding.settle()
        assert decoding.cache.lengths == [n] * LAYERS and not any(decoding.waiting[:LAYERS])


def test_a_span_of_columns_cuts_what_has_as_many() -> None:
    angles, one_line = torch.arange(24.0).reshape(1, 6, 4), torch.zeros(1, 4)
    cut = Given((angles, None), {"both": (angles, one_line), "flag": True}).span(2, 5, 6)
    assert torch.equal(cut.positional[0], angles[:, 2:5]) and cut.positional[1] is None
    assert torch.equal(cut.named["both"][0], angles[:, 2:5]) and cut.named["both"][1] is one_line and cut.named["flag"]


def test_a_cache_keeps_what_it_is_given_and_forgets_what_is_cropped() -> None:
    cache, drawn = Cache(2, 6), [torch.randn(1, 2, n, 3) for n in (3, 1, 2)]
    cache.update(drawn[0], -drawn[0], 0)
    keys, values = cache.update(drawn[1], -drawn[1], 0)
    torch.testing.assert_close(keys, torch.cat(drawn[:2], 2))
    torch.testing.assert_close(values, -keys)
    assert cache.lengths == [4, 0]
    cache.crop(2)
    keys, _ = cache.update(drawn[2], drawn[2], 0)
    torch.testing.assert_close(keys, torch.cat([drawn[0][:, :, :2], drawn[2]], 2))
    with pytest.raises(ModelError, match="block 1 has been given nothing yet"):
        cache.of(1)


def test_a_window_narrower_than_prompt_and_answer_is_refused() -> None:
    stack = Stack.of(decoder("mistral", sliding_window=8).network)
    with pytest.raises(ModelError, match="this mistral looks back 8 tokens, but prompt and answer may have 9; shorten"):
        Decoding(stack, tiny_batch(4), 5, "lazy")
    assert Decoding(stack, tiny_batch(4), 4, "lazy").prefill().isfinite().all()


def test_an_attention_that_takes_no_mask_is_refused() -> None:
    stack = stack_of("llama")
    stack.network.config._attn_implementation = "flash_attention_2"
    with pytest.raises(ModelError, match="masks of its own, which 'flash_attention_2' does not take; load the model"):
        Decoding(stack, tiny_batch(4), 5, "lazy")
