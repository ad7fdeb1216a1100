"""Parts are what each step costs by a clock that is known, and predictions are what generation then takes by it."""

from collections.abc import Sequence

import pytest
import torch
from tests.early_exit.decoders import LAYERS, decoder
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from palimpsest.early_exit.cost import TOKENS, Parts, _Loop, break_even, measure, predicted_and_measured
from palimpsest.early_exit.generation import Heads, PolicyExit
from palimpsest.early_exit.stack import Given, Stack
from palimpsest.errors import SpecError
from palimpsest.models.anatomy import Anatomy
from palimpsest.models.language_model import LanguageModel

DRAFTS = 4
PARTS = Parts(
    n_layers=4,
    context=8,
    threads=1,
    clock="processor",
    depths=(1, 4),
    tokens=(3.0, 6.0),
    fill=0.25,
    lazy_fill=0.05,
    gate=0.1,
    head=1.5,
    drafts=DRAFTS,
    check=1.5,
    round=0.5,
)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock that only blocks, fills, heads and gates move on, by what is written here, in seconds."""
    now = [0.0]

    def blocks(self: Stack, layer: int, hidden: Tensor, given: Given) -> Tensor:
        cache = given.named["past_key_values"]
        q = hidden.shape[1]
        now[0] += 0.2 + 0.05 * q if cache and cache.filling else 1 + 0.5 * (q - 1)
        return run(self, layer, hidden, given)

    def heads(self: Heads, states: Tensor, blocks: int) -> Tensor:
        now[0] += 3 + 0.1 * (states.shape[-2] - 1)
        return logits(self, states, blocks)

    def gates(self: PolicyExit, place: int, given: Tensor) -> Tensor:
        now[0] += 0.7
        return leaves(self, place, given)

    run, logits, leaves = Stack.run, Heads.logits, PolicyExit.leaves
    monkeypatch.setattr(Stack, "run", blocks)
    monkeypatch.setattr(Heads, "logits", heads)
    monkeypatch.setattr(PolicyExit, "leaves", gates)
    monkeypatch.setattr(_Loop, "_now", lambda _: now[0])


def close(values: Sequence[float]) -> object:
    return pytest.approx(list(values), rel=1e-9)


def test_parts_are_told_apart(clock: None) -> None:
    parts = measure(decoder("llama"), context=8, drafts=DRAFTS, repeats=1)
    assert (parts.n_layers, parts.context, parts.drafts, parts.threads) == (LAYERS, 8, DRAFTS, 1)
    assert parts.depths == (1, 2, 3, 4) and parts.tokens == close([4000, 5000, 6000, 7000])
    found = [parts.fill, parts.lazy_fill, parts.gate, parts.head, parts.check]
    waiting = TOKENS - 1
    assert found == close([250, 1e3 * (0.2 + 0.05 * waiting) / waiting, 700, 3000, 3000])
    # A round reads its drafts, and all of its tokens at once in the end, where each is reckoned with a head of its own.
    assert parts.round == pytest.approx(1e3 * (DRAFTS * 3 + 3.4 - (DRAFTS + 1) * 3))


def test_predictions_are_what_generation_takes(clock: None) -> None:
    model = decoder("llama")
    parts = measure(model, context=8, drafts=DRAFTS, repeats=1)
    checked = predicted_and_measured(model, parts, (1, 2, 3, LAYERS), repeats=1)
    assert [(one.blocks, one.fill) for one in checked[:3]] == [(1, "eager"), (1, "lazy"), (2, "eager")]
    assert len(checked) == 8 and all(abs(one.error) < 1e-9 for one in checked)
    assert checked[0].measured == pytest.approx(3000 + 1000 + 3 * 250)


def test_modes_cost_their_parts() -> None:
    assert PARTS.full == 6 and PARTS.fixed(2) == 4 and PARTS.fixed(2, "eager") == 4.5
    assert PARTS.policy(2, (1, 2, 3)) == pytest.approx(4 + 2 * 0.1 + 2 * 0.05)
    assert PARTS.policy(4, (1, 2, 3)) == pytest.approx(6 + 3 * 0.1)
    # Of two heads at exits 1 and 2 the second is the one that the token is read by.
    assert PARTS.confidence(2, (1, 2, 3)) == pytest.approx(4 + 1.5 + 2 * 0.05)
    assert PARTS.confidence(4, (1, 2, 3)) == pytest.approx(6 + 3 * 1.5)
    a_round = 5 * (2 + 1) + 3 * 1.5 + 0.5
    assert PARTS.speculation(1, 0.0) == pytest.approx(a_round) and PARTS.speculation(1, 1.0) == pytest.approx(
        a_round / 5
    )


def test_times_are_shares_of_a_whole_pass() -> None:
    times = PARTS.times((1, 3))
    assert times == close([(3 + 0.1 + 0.15) / 6.2, (5 + 0.2 + 0.05) / 6.2, 1.0])


def test_breaking_even_takes_as_long_as_every_block() -> None:
    first, *_, last = break_even(PARTS, (1, 2, 3, 4))
    assert first.drafts_needed is not None and 0 < first.drafts_needed < 1
    assert PARTS.speculation(1, first.drafts_needed) == pytest.approx(PARTS.full)
    assert (first.fixed_lazy, first.fixed_eager) == (6 / 3, 6 / 3.75) and first.policy < first.fixed_lazy
    assert last.fixed_lazy == 1 and last.policy < 1 and last.drafts_needed is None
    dear = Parts(**(vars(PARTS) | {"check": 40.0}))
    assert dear.needed(1) is None


def test_too_few_blocks_and_no_room_are_refused() -> None:
    with pytest.raises(SpecError, match="the parts of 2 blocks cannot be told apart; it takes three"):
        measure(decoder("llama", num_hidden_layers=2), context=8)
    with pytest.raises(SpecError, match="a context of 60 tokens: it must be 1 or more, and leave 11 of the model's 64"):
        measure(decoder("llama"), context=60)


@pytest.mark.slow
def test_predictions_are_right_within_15_percent() -> None:
    """By the real clock, of a model whose blocks outweigh Python."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=2048,
        hidden_size=384,
        intermediate_size=1024,
        num_hidden_layers=8,
        num_attention_heads=6,
        max_position_embeddings=256,
    )
    network = LlamaForCausalLM(config).eval()
    model = LanguageModel(network, decoder("llama").tokenizer, Anatomy.of(network))
    parts = measure(model)
    for one in predicted_and_measured(model, parts, (2, 3, 5, 7)):
        assert abs(one.error) < 0.15, one
