"""Drafting and checking says what greedy decoding says, and no block sees a token twice."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.early_exit.decoders import LAYERS, decoder, greedy, prompts

from palimpsest.early_exit.generation import FixedExit, generate
from palimpsest.early_exit.self_speculation import speculate
from palimpsest.early_exit.stack import DECODERS, Stack
from palimpsest.errors import SpecError
from palimpsest.lens.lens import Lens
from palimpsest.models.language_model import LanguageModel

NEW = 11
ASKED = prompts(5, 9, 3, 7)


def alike(family: str) -> LanguageModel:
    """A decoder whose later blocks change little, so that its first ones often draft what it says."""
    model = decoder(family)
    with torch.no_grad():
        for value, attention in zip(model.anatomy.value_matrices[1:], model.anatomy.attention_outputs[1:], strict=True):
            value.weight.mul_(0.4)  # type: ignore[operator, union-attr]
            attention.weight.mul_(0.4)  # type: ignore[operator, union-attr]
    return model


@pytest.mark.parametrize("family", DECODERS)
def test_it_loses_nothing(family: str) -> None:
    model = alike(family)
    expected = [greedy(model, prompt, NEW) for prompt in ASKED]
    kept = 0
    for blocks in range(1, LAYERS):
        for drafts, batch_size in ((1, 1), (3, 4)):
            said = speculate(model, ASKED, blocks=blocks, drafts=drafts, max_new_tokens=NEW, batch_size=batch_size)
            assert [one.tokens for one in said] == expected
            kept += sum(one.exits.count(blocks) for one in said)
    assert kept > 10


@given(st.integers(1, LAYERS - 1), st.integers(1, 6), st.integers(1, 14), st.integers(1, 4), st.integers(0, 50))
@settings(max_examples=15)
def test_it_loses_nothing_however_much_is_asked_for(
    blocks: int, drafts: int, n: int, batch_size: int, seed: int
) -> None:
    asked = prompts(6, 2, 4, seed=seed)
    whole = generate(SHARED, asked, FixedExit(LAYERS), max_new_tokens=n, stack=STACK)
    found = speculate(SHARED, asked, blocks=blocks, drafts=drafts, max_new_tokens=n, batch_size=batch_size, stack=STACK)
    assert [one.tokens for one in found] == [one.tokens for one in whole]
    assert all(set(one.exits) <= {blocks, LAYERS} and one.exits[:1] in ((), (LAYERS,)) for one in found)


SHARED = alike("qwen3")  # it also ends answers by itself
STACK = Stack(SHARED.network, SHARED.anatomy.blocks, True)


def test_every_block_sees_a_drafted_token_once() -> None:
    model, blocks, drafts = alike("gpt_neox"), 2, 3
    seen, calls, handles = [0] * LAYERS, [0] * LAYERS, []
    for layer, block in enumerate(model.anatomy.blocks):

        def count(_: object, inputs: tuple[torch.Tensor, ...], __: object, layer: int = layer) -> None:
            seen[layer] += inputs[0].shape[1]
            calls[layer] += 1

        handles.append(block.register_forward_hook(count))
    prompt, stack = ASKED[0], Stack(model.network, model.anatomy.blocks, True)
    (said,) = speculate(model, [prompt], blocks=blocks, drafts=drafts, max_new_tokens=NEW, stack=stack)
    for handle in handles:
        handle.remove()
    assert len(said.tokens) == NEW
    # A round ends with the one token that the whole network says, after those that it kept.
    ends = [place for place, exit in enumerate(said.exits) if exit == LAYERS][1:]
    left = [NEW - 1 - start for start in [0, *ends[:-1]]]
    drafted = sum(min(drafts, missing - 1) + 1 for missing in left)
    assert 0 < said.exits.count(blocks) and len(ends) < NEW - 1
    assert seen == [len(prompt) + drafted] * LAYERS
    assert calls == [1 + drafted] * blocks + [1 + len(ends)] * (LAYERS - blocks)


@pytest.mark.parametrize("batch_size", [1, 4])
def test_it_ends_where_the_positions_do(batch_size: int) -> None:
    model = decoder("gpt_neox", max_position_embeddings=13)
    whole = generate(model, ASKED, FixedExit(LAYERS), max_new_tokens=20)
    assert [len(one.tokens) for one in whole] == [13 - len(prompt) + 1 for prompt in ASKED]
    said = speculate(model, ASKED, blocks=2, max_new_tokens=20, batch_size=batch_size)
    assert [one.tokens for one in said] == [one.tokens for one in whole]


def test_a_lens_changes_the_drafts_and_not_the_answer() -> None:
    model = alike("llama")
    generator = torch.Generator().manual_seed(3)
    lens = Lens("tuned", LAYERS, "", torch.randn(LAYERS, 16, 16, generator=generator))
    bare = speculate(model, ASKED, blocks=2, max_new_tokens=NEW)
    bent = speculate(model, ASKED, blocks=2, max_new_tokens=NEW, lens=lens)
    assert [one.tokens for one in bare] == [one.tokens for one in bent]
    assert [one.exits for one in bare] != [one.exits for one in bent]


@pytest.mark.parametrize(("blocks", "drafts"), [(LAYERS, 2), (2, 0)])
def test_nothing_to_draft_is_refused(blocks: int, drafts: int) -> None:
    with pytest.raises(SpecError, match="name one draft or more, and fewer blocks than the model's 4"):
        speculate(decoder("llama"), ASKED, blocks=blocks, drafts=drafts, max_new_tokens=2)
