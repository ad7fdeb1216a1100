"""Generation with exits: the whole network's answer at the last, whole rows' states before it, alone or in a batch."""

import math

import pytest
import torch
from tests.early_exit.decoders import LAYERS, decoder, frozen, greedy, prompts
from transformers import AutoConfig, AutoModel

from palimpsest.data.batches import Encoded, collate
from palimpsest.early_exit.decoding import Fill
from palimpsest.early_exit.generation import ConfidentExit, ExitRule, FixedExit, Generated, PolicyExit, generate
from palimpsest.early_exit.policy import Policy
from palimpsest.early_exit.stack import DECODERS, Stack
from palimpsest.errors import DataError, ModelError, SpecError
from palimpsest.lens.lens import Lens
from palimpsest.models.anatomy import Anatomy
from palimpsest.models.language_model import LanguageModel

FILLS: tuple[Fill, ...] = ("eager", "lazy", "catch_up")
NEW, POSITIONS = 9, 13
ASKED = prompts(5, 9, 3, 7)


def undecided(n_exits: int = 3, width: int = 16, seed: int = 0) -> PolicyExit:
    """A policy that has learned nothing sensible."""
    policy = Policy(n_exits + 1, width, seed=seed)
    torch.nn.init.normal_(policy.outer, std=2, generator=torch.Generator().manual_seed(seed))
    torch.nn.init.zeros_(policy.outer_bias)
    return PolicyExit(tuple(range(1, n_exits + 1)), policy, 0.1)


class Fickle:
    """Exits now here, now there: by a wave along one direction of the hidden state."""

    exits, reads_logits = (1, 2, 3), False

    def leaves(self, place: int, given: torch.Tensor) -> torch.Tensor:
        direction = torch.randn(given.shape[1], generator=torch.Generator().manual_seed(place))
        return torch.sin(20 * given @ direction) > 0.4


@pytest.mark.parametrize("family", DECODERS)
def test_exits_at_the_end_say_what_transformers_says(family: str) -> None:
    model = decoder(family)
    expected = [greedy(model, prompt, NEW) for prompt in ASKED]
    for fill in FILLS:
        for batch_size in (1, 4):
            said = generate(model, ASKED, FixedExit(LAYERS), max_new_tokens=NEW, fill=fill, batch_size=batch_size)
            assert [one.tokens for one in said] == expected
            assert all(one.exits == (LAYERS,) * len(one.tokens) for one in said)


def replayed(model: LanguageModel, prompt: tuple[int, ...], said: Generated) -> list[int]:
    """What is read of a whole row at once, each token of the answer frozen where it exited; the heads are the model's.

    Token i is read where the one before it was frozen.
    """
    ids = (*prompt, *said.tokens)
    exits = [LAYERS] * len(prompt) + list(said.exits[1:])
    batch = collate([Encoded(ids[:-1], 1, len(ids) - 1)], [0])
    with torch.no_grad():
        states = frozen(Stack.of(model.network), batch, torch.tensor([exits]))[0, len(prompt) - 1 :]
        return model.anatomy.logits(states).argmax(-1).tolist()


@pytest.mark.parametrize("family", DECODERS)
def test_a_policys_answer_is_read_off_the_whole_row_in_every_fill_and_batch(family: str) -> None:
    model, rule = decoder(family), Fickle()
    alone = generate(model, ASKED, rule, max_new_tokens=NEW, fill="eager")
    assert {exit for one in alone for exit in one.exits} >= {1, 2, LAYERS}
    for prompt, said in zip(ASKED, alone, strict=True):
        assert not said.tokens or replayed(model, prompt, said)[: len(said.tokens)] == list(said.tokens)
    for fill in ("eager", "lazy"):
        for batch_size in (1, 3):
            assert generate(model, ASKED, rule, max_new_tokens=NEW, fill=fill, batch_size=batch_size) == alone
    caught_up = generate(model, ASKED, rule, max_new_tokens=NEW, fill="catch_up")
    assert generate(model, ASKED, rule, max_new_tokens=NEW, fill="catch_up", batch_size=3) == caught_up


@pytest.mark.parametrize(
    "rule", [FixedExit(2), ConfidentExit((1, 3), 0.5), undecided(2)], ids=["fixed", "sure", "gate"]
)
@pytest.mark.parametrize("fill", FILLS)
def test_an_answer_does_not_depend_on_its_neighbours(rule: ExitRule, fill: Fill) -> None:
    model = decoder("qwen3")
    together = generate(model, ASKED, rule, max_new_tokens=NEW, fill=fill, batch_size=4)
    assert together[::-1] == generate(model, ASKED[::-1], rule, max_new_tokens=NEW, fill=fill, batch_size=2)
    assert together == generate(model, ASKED, rule, max_new_tokens=NEW, fill=fill)


def test_confidence_exits_where_the_head_is_sure_and_only_there() -> None:
    model, threshold = decoder("gpt2"), 0.27
    (said,) = generate(model, [ASKED[1]], ConfidentExit((1, 2, 3), threshold), max_new_tokens=NEW)
    early = [(place, exit) for place, exit in enumerate(said.exits) if place and exit < LAYERS]
    assert early and len(early) < len(said.exits)
    ids, n_prompt = (*ASKED[1], *said.tokens), len(ASKED[1])
    for place, exit in enumerate(said.exits[1:], 1):
        row = collate([Encoded(ids[: n_prompt + place], 1, 2)], [0])
        for blocks in range(1, LAYERS):
            if blocks > exit:
                break
            exits = torch.tensor([[LAYERS] * n_prompt + [*said.exits[1:place], blocks]])
            with torch.no_grad():
                state = frozen(Stack.of(model.network), row, exits)[0, -1]
                sure = float(model.anatomy.logits(state).double().softmax(-1).max())
            assert (sure > threshold) == (blocks == exit)


def test_a_lens_reads_the_exits_and_leaves_the_end_alone() -> None:
    model, generator = decoder("llama"), torch.Generator().manual_seed(3)
    changes = 0.3 * torch.randn(LAYERS, 16, 16, generator=generator)
    lens = Lens("tuned", LAYERS, "", changes, torch.randn(LAYERS, 16, generator=generator))
    last = generate(model, ASKED, FixedExit(LAYERS), max_new_tokens=NEW)
    assert generate(model, ASKED, FixedExit(LAYERS), max_new_tokens=NEW, lens=lens) == last
    (said,) = generate(model, ASKED[:1], FixedExit(2), max_new_tokens=2, lens=lens)
    row = collate([Encoded((*ASKED[0], said.tokens[0]), 1, 2)], [0])
    with torch.no_grad():
        state = frozen(Stack.of(model.network), row, torch.tensor([[LAYERS] * 5 + [2]]))[0, -1]
        expected = model.anatomy.logits(state + changes[2] @ state + lens.biases[2]).argmax()  # type: ignore[index]
    assert said.tokens[1] == expected != model.anatomy.logits(state).argmax()


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_an_answer_ends_where_the_positions_do(family: str) -> None:
    model = decoder(family, max_position_embeddings=POSITIONS)
    for batch_size in (1, 4):
        said = generate(model, ASKED, undecided(), max_new_tokens=20, batch_size=batch_size)
        roomy = generate(decoder(family), ASKED, undecided(), max_new_tokens=20)
        for prompt, one, longer in zip(ASKED, said, roomy, strict=True):
            room = POSITIONS - len(prompt) + 1  # the last is said from the last position
            assert len(one.tokens) <= room
            if family == "llama":  # GPT-2's table of positions is drawn anew at another length
                assert one.tokens == longer.tokens[:room]
        assert any(len(one.tokens) == POSITIONS - len(prompt) + 1 for prompt, one in zip(ASKED, said, strict=True))


def test_stops_end_an_answer_and_are_not_in_it() -> None:
    model = decoder("qwen3")
    said = generate(model, ASKED, FixedExit(LAYERS), max_new_tokens=12)
    assert [len(one.tokens) for one in said] == [12, 12, 8, 0]  # transformers' own, as the first test shows


def test_weights_that_are_not_numbers_are_an_error_and_not_an_answer() -> None:
    model = decoder("llama")
    torch.nn.init.constant_(model.anatomy.blocks[1].mlp.down_proj.weight, math.nan)  # type: ignore[union-attr, arg-type]
    with pytest.raises(ModelError, match="model: its logits are not finite, so it cannot say anything; look for a"):
        generate(model, ASKED, FixedExit(1), max_new_tokens=2, stack=stack_of_healthy(model))


def stack_of_healthy(model: LanguageModel) -> Stack:
    """The model's stack, unchecked: the check would refuse the weights first."""
    return Stack(model.network, model.anatomy.blocks, True)


@pytest.mark.parametrize(
    ("changes", "error", "told"),
    [
        ({"num_beams": 3}, SpecError, "early exit decodes greedily; leave num_beams at 1 and do_sample at False"),
        ({"do_sample": True}, SpecError, "early exit decodes greedily"),
        ({"fill": "late"}, SpecError, "there is no fill 'late'; there are eager, lazy, catch_up"),
        ({"max_new_tokens": 0}, SpecError, "max_new_tokens is 0; it must be 1 or more"),
        ({"rule": FixedExit(5)}, SpecError, r"exits \[5\]: name numbers of blocks run, ascending, from 1 to 4"),
        ({"rule": ConfidentExit((3, 1), 0.5)}, SpecError, r"exits \[3, 1\]: name numbers"),
        ({"prompts": [(4, 5), ()]}, DataError, r"prompt 1 \(counted from 0\) has no tokens"),
        ({"prompts": [(4, 48)]}, DataError, "prompt 0 .* has a token that is none of the model's 48; encode it with"),
        ({"prompts": [(4,) * 65]}, DataError, "a row has 65 tokens, but the model has 64 positions"),
        ({"lens": Lens("logit", 6, "")}, ModelError, "this lens has 6 layers and the model 4; fit one for this model"),
    ],
)
def test_what_it_does_not_do_is_refused(changes: dict[str, object], error: type[Exception], told: str) -> None:
    asked = {"prompts": ASKED, "rule": FixedExit(2), "max_new_tokens": 3} | changes
    with pytest.raises(error, match=told):
        generate(decoder("llama"), **asked)  # type: ignore[arg-type]


def test_families_without_a_stack_and_encoders_are_refused() -> None:
    with pytest.raises(ModelError, match="does not know the architecture 'bloom'"):
        generate(decoder("bloom"), ASKED, FixedExit(1), max_new_tokens=2)
    sizes = {"vocab_size": 48, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    encoder = AutoModel.from_config(AutoConfig.for_model("bert", **sizes, intermediate_size=24)).eval()
    llama = decoder("llama")
    with pytest.raises(ModelError, match="a bert is an encoder and generates nothing; load a decoder"):
        generate(llama, ASKED, FixedExit(1), max_new_tokens=2, stack=Stack.of(encoder))


def test_a_gate_at_one_price_is_the_policys() -> None:
    rule, states = undecided(), torch.randn(200, 16, generator=torch.Generator().manual_seed(5))
    log_price = torch.full((200,), rule.price).log()
    for place in range(3):
        gates = rule.policy.at(place, states, log_price)
        assert torch.equal(rule.leaves(place, states), gates > 0)
        assert 20 < int((gates > 0).sum()) < 180


def test_a_policy_of_other_exits_is_refused() -> None:
    with pytest.raises(SpecError, match="this policy has 3 gates, but 2 exits are named before the last"):
        PolicyExit((1, 2), Policy(4, 16), 0.1)


def test_progress_is_told_by_prompts() -> None:
    told: list[tuple[int, int, str]] = []
    generate(
        decoder("llama"), ASKED, FixedExit(1), max_new_tokens=2, batch_size=3, report=lambda *one: told.append(one)
    )
    assert [one[:2] for one in told] == [(3, 4), (4, 4)]


def test_anatomy_is_that_of_the_stack() -> None:
    model = decoder("gpt_neox")
    assert Stack.of(model.network).blocks == Anatomy.of(model.network).blocks
