"""What is watched is what decoding would have done; a policy learns from it to stop where stopping costs nothing."""

import math

import numpy as np
import pytest
import torch
from scipy.special import log_softmax
from tests.early_exit.decoders import LAYERS, decoder, frozen
from tests.models.tiny_families import tiny_batch, tiny_rows

from palimpsest.early_exit.policy import Policy, log_exit_probabilities
from palimpsest.early_exit.policy_training import PolicySettings
from palimpsest.early_exit.stack import DECODERS, Stack
from palimpsest.early_exit.token_policy import WATCHED, _drawn, collect, copied_pass, fit_token_policy
from palimpsest.errors import DataError, ModelError, SpecError
from palimpsest.lens.lens import Lens
from palimpsest.models.language_model import LanguageModel

EXITS, TIMES = (1, 3), (0.25, 0.75, 1.0)
PRICES = (0.1, 1.0)


@pytest.mark.parametrize("family", DECODERS)
def test_a_pass_with_exits_freezes_each_token_where_it_exits(family: str) -> None:
    stack, batch = Stack.of(decoder(family).network), tiny_batch(12, 9)
    exits = torch.randint(1, LAYERS + 1, batch.ids.shape, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        found = copied_pass(stack, batch, lambda blocks, _: exits == blocks)
        whole = copied_pass(stack, batch)
        torch.testing.assert_close(found[batch.attention], frozen(stack, batch, exits)[batch.attention])
        everything = torch.full_like(exits, LAYERS)
        torch.testing.assert_close(whole[batch.attention], frozen(stack, batch, everything)[batch.attention])


def drawn_exits(model: LanguageModel, policy: Policy, length: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """[T] which tokens of a lone row are watched, and [T] where each exits, by walking the tokens one by one."""
    batch = tiny_batch(length)
    watched, places, log_prices = _drawn(batch, PRICES, seed)
    stack, exits = Stack.of(model.network), torch.full((1, length), LAYERS)
    with torch.inference_mode():
        for token in range(length):
            if watched[0, token]:
                continue
            # What stands before it has exited already; what it sees itself does not hang on where it exits.
            states = {}
            for blocks in EXITS:
                exits[0, token] = blocks
                states[blocks] = frozen(stack, batch, exits)[:, token]
            gates = torch.stack([policy.at(place, states[blocks], log_prices) for place, blocks in enumerate(EXITS)], 1)
            have_exited = log_exit_probabilities(gates).exp().cumsum(1)[0, :-1]
            place = int((have_exited <= places[0, token]).sum())
            exits[0, token] = (*EXITS, LAYERS)[place]
    return watched[0], exits[0]


def test_losses_are_the_kl_from_an_ordinary_pass_on_the_keys_that_the_others_leave() -> None:
    model, length = decoder("qwen2"), 14
    policy = Policy(3, 16)
    torch.nn.init.normal_(policy.outer, generator=torch.Generator().manual_seed(1))
    seen = collect(model, tiny_rows(length), EXITS, TIMES, policy, prices=PRICES, seed=4)
    watched, exits = drawn_exits(model, policy, length, 4)
    assert 2 < int(watched.sum()) == len(seen.losses) < length and len(set(exits.tolist())) == 3

    batch, stack = tiny_batch(length), Stack.of(model.network)
    head, norm = model.anatomy.unembedding, model.anatomy.final_norm

    def log_p(states: torch.Tensor) -> np.ndarray:
        normed = norm(states).double().numpy()
        return log_softmax(normed @ head.weight.double().numpy().T, axis=-1)

    with torch.no_grad():
        own = log_p(copied_pass(stack, batch)[0])
        for number, token in enumerate(watched.nonzero()[:, 0].tolist()):
            for place, blocks in enumerate((*EXITS, LAYERS)):
                there = exits.clone()
                there[token] = blocks
                state = frozen(stack, batch, there[None])[0, token]
                torch.testing.assert_close(seen.states[number, place], state, rtol=1e-4, atol=1e-5)
                kl = (np.exp(own[token]) * (own[token] - log_p(state))).sum()
                assert float(seen.losses[number, place]) == pytest.approx(kl, rel=1e-3, abs=2e-5)


def test_what_is_watched_does_not_depend_on_the_batch() -> None:
    model, rows, policy = decoder("llama"), tiny_rows(12, 7, 10), Policy(3, 16)
    torch.nn.init.normal_(policy.outer, generator=torch.Generator().manual_seed(1))
    alone = collect(model, rows, EXITS, TIMES, policy, prices=PRICES, batch_size=1)
    together = collect(model, rows, EXITS, TIMES, policy, prices=PRICES, batch_size=3)
    torch.testing.assert_close(alone.states, together.states, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(alone.losses, together.losses, rtol=1e-3, atol=1e-4)
    other = collect(model, rows, EXITS, TIMES, policy, prices=PRICES, seed=1)
    assert len(other.losses) != len(alone.losses) or not torch.allclose(other.losses, alone.losses)


def test_draws_are_as_likely_as_they_should_be() -> None:
    batch = tiny_batch(*[50] * 200)
    watched, places, log_prices = _drawn(batch, PRICES, 0)
    assert float(watched.float().mean()) == pytest.approx(WATCHED, abs=0.02)
    assert float(places.mean()) == pytest.approx(0.5, abs=0.01) and float(places.max()) < 1
    assert math.log(PRICES[0]) <= float(log_prices.min()) and float(log_prices.max()) <= math.log(PRICES[1])
    assert float(log_prices.mean()) == pytest.approx(math.log(PRICES[0] * PRICES[1]) / 2, abs=0.1)


def test_a_policy_stops_where_more_blocks_change_nothing() -> None:
    """The later blocks are switched off, so the first exit says it all; and it is taken at any price."""
    model = decoder("llama")
    with torch.no_grad():
        for layer in (1, 2, 3):
            model.anatomy.value_matrices[layer].weight.zero_()  # type: ignore[operator, union-attr]
            model.anatomy.attention_outputs[layer].weight.zero_()  # type: ignore[operator, union-attr]
    settings = PolicySettings(prices=(0.01, 1.0), steps=150, batch_size=128, learning_rate=0.02)
    policy = fit_token_policy(model, tiny_rows(*[20] * 12), EXITS, TIMES, settings)
    seen = collect(model, tiny_rows(*[20] * 4, seed=9), EXITS, TIMES, policy, prices=(0.01, 1.0))
    assert float(seen.losses.max()) < 1e-4
    for price in (0.02, 1.0):
        gates = policy(seen.states[:, :-1], torch.full((len(seen.states),), price).log())
        assert (gates[:, 0] > 0).float().mean() > 0.95


def test_a_policy_goes_on_where_stopping_is_dear_and_stops_where_time_is() -> None:
    model = decoder("llama")
    settings = PolicySettings(prices=(1e-4, 100.0), steps=200, batch_size=128, learning_rate=0.02)
    policy = fit_token_policy(model, tiny_rows(*[20] * 12), EXITS, TIMES, settings, rounds=1)
    seen = collect(model, tiny_rows(*[20] * 4, seed=9), EXITS, TIMES, policy, prices=(1e-4, 1e-4))
    assert float(seen.losses[:, 0].mean()) > 0.1
    often = []
    for price in (2e-4, 50.0):
        gates = policy(seen.states[:, :-1], torch.full((len(seen.states),), price).log())
        often.append(float(log_exit_probabilities(gates).exp()[:, 0].mean()))
    assert often[0] < 0.2 and often[1] > 0.95


def test_the_same_seed_gives_the_same_policy() -> None:
    model, settings = decoder("gpt2"), PolicySettings(steps=5, batch_size=16)
    first, again = (fit_token_policy(model, tiny_rows(9, 12), EXITS, TIMES, settings) for _ in range(2))
    assert all(torch.equal(one, other) for one, other in zip(first.parameters(), again.parameters(), strict=True))


def test_mistakes_are_told() -> None:
    model, policy = decoder("llama"), Policy(3, 16)
    with pytest.raises(DataError, match="no text to learn exits from; give at least one row"):
        collect(model, [], EXITS, TIMES, policy, prices=PRICES)
    with pytest.raises(SpecError, match="2 times and a policy of 3 exits for 2 exits and the last; give one of each"):
        collect(model, tiny_rows(5), EXITS, (0.5, 1.0), policy, prices=PRICES)
    with pytest.raises(SpecError, match=r"exits \[1, 7\]: name numbers of blocks run"):
        collect(model, tiny_rows(5), (1, 7), TIMES, policy, prices=PRICES)
    with pytest.raises(ModelError, match="this lens was made for another unembedding"):
        collect(model, tiny_rows(5), EXITS, TIMES, policy, prices=PRICES, lens=Lens("logit", LAYERS, "another"))
