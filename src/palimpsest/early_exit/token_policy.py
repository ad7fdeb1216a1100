"""A policy for tokens: what each exit would have cost on text, learned on the keys and values that exits leave behind.

Where one token exits changes what later ones attend to. So a token's exits are compared while the others exit as the
policy lets them: about half of the tokens of a text are watched and run to the end, and every other is frozen where
its exit is drawn, which leaves the keys and values that decoding leaves (`copied_pass`). Policies are fitted in rounds,
each on what the one before does; in the first every exit is as likely as any other.

An exit's loss is the KL from what the model predicts in an ordinary pass, so nothing is asked that it does not say.

Shapes: B rows, T tokens, N watched tokens, E exits of which the last is the whole network, d the model's width.
"""

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from palimpsest.data.batches import Batch, Encoded, batches
from palimpsest.early_exit.generation import refuse_unusable
from palimpsest.early_exit.policy import Policy
from palimpsest.early_exit.policy_training import Observations, PolicySettings, fit_policy
from palimpsest.early_exit.stack import Stack
from palimpsest.errors import DataError, SpecError
from palimpsest.lens.lens import Lens
from palimpsest.lens.readout import Readout
from palimpsest.models.language_model import LanguageModel, evaluating
from palimpsest.progress import Report

WATCHED = 0.5
"""Share of the tokens whose exits are compared."""
CHUNK = 512
"""Tokens whose losses are worked out together."""


def copied_pass(stack: Stack, batch: Batch, leaves: Callable[[int, Tensor], Tensor] | None = None) -> Tensor:
    """[B, T, d] every token's state where it exits; later blocks make its keys and values of that, as decoding does.

    Args:
        stack: a decoder's.
        batch: whole rows, on the network's device.
        leaves: given the number of blocks run and the states [B, T, d], which tokens exit there, [B, T] bool. It is
            not asked after the last. None: none does.
    """
    hidden, given = stack.enter(batch)
    alive = batch.attention
    for blocks in range(1, stack.n_layers + 1):
        hidden = torch.where(alive[..., None], stack.run(blocks - 1, hidden, given), hidden)
        if leaves and blocks < stack.n_layers:
            alive = alive & ~leaves(blocks, hidden)
    return hidden


def collect(
    model: LanguageModel,
    encoded: Sequence[Encoded],
    exits: Sequence[int],
    times: Sequence[float],
    policy: Policy,
    *,
    prices: tuple[float, float],
    seed: int = 0,
    lens: Lens | None = None,
    batch_size: int = 8,
    stack: Stack | None = None,
    report: Report | None = None,
) -> Observations:
    """Watch about half of the tokens of n texts, the others exiting as a policy draws.

    Args:
        model: a decoder.
        encoded: n rows; every token counts.
        exits: E - 1 numbers of blocks run, ascending; the last exit is the whole network.
        times: [E] until each exit, as shares of a whole pass.
        policy: lets the tokens exit that are not watched; a new one draws every exit alike.
        prices: the lowest and the highest of a whole pass, nats; each row draws one between them, evenly in logarithm.
        seed: of the tokens watched, the prices and the exits; a row's draws are its own, whatever stands beside it.
        lens: reads the exits in place of the bare final norm.
        batch_size: rows at a time; it changes nothing.
        stack: the model's, where it is at hand.
        report: told (rows done, of how many, what is done).

    Raises:
        ModelError: an architecture that is not known, or a lens that was not made for this model.
        SpecError: exits that the model does not have, or times that are not theirs.
        DataError: there are no rows, or one is longer than the model's positions.
    """
    if not encoded:
        raise DataError("there is no text to learn exits from; give at least one row")
    if not len(times) == len(exits) + 1 == policy.n_exits or list(times) != sorted(times):
        raise SpecError(
            f"{len(times)} times and a policy of {policy.n_exits} exits for {len(exits)} exits and the last; give one "
            "of each to each, the times rising"
        )
    stack, lens = stack or Stack.of(model.network), lens or Lens.logit(model)
    refuse_unusable(stack, exits, lens)
    readout, device = lens.readout(model), model.device
    states: list[Tensor] = [torch.empty(0)] * len(encoded)
    losses, done = list(states), 0
    with evaluating(model):
        for batch in batches(encoded, batch_size=batch_size):
            watched, places, log_prices = (drawn.to(device) for drawn in _drawn(batch, prices, seed))
            batch = batch.to(device)
            taught = copied_pass(stack, batch)
            seen = _seen(stack, batch, exits, policy, watched, places, log_prices)
            for line, row in enumerate(batch.rows):
                own = watched[line]
                states[row] = seen[line, own].float().cpu()
                losses[row] = _losses(readout, lens, [*exits, stack.n_layers], seen[line, own], taught[line, own]).cpu()
            done += len(batch.rows)
            if report:
                report(done, len(encoded), "watching tokens")
    return Observations(torch.cat(states), torch.cat(losses), torch.tensor(times))


def fit_token_policy(
    model: LanguageModel,
    encoded: Sequence[Encoded],
    exits: Sequence[int],
    times: Sequence[float],
    settings: PolicySettings | None = None,
    *,
    rounds: int = 2,
    lens: Lens | None = None,
    batch_size: int = 8,
    stack: Stack | None = None,
    report: Report | None = None,
) -> Policy:
    """A policy of the model's tokens on texts like these, for every price in a range; the model is not changed.

    Args:
        model: a decoder.
        encoded: n rows; every token counts.
        exits: E - 1 numbers of blocks run, ascending; the last exit is the whole network.
        times: [E] until each exit, as shares of a whole pass (`cost.Parts.times`).
        settings: how a round's policy is trained, and for which prices.
        rounds: of watching and training.
        lens: reads the exits in place of the bare final norm.
        batch_size: rows watched together; it changes nothing.
        stack: the model's, where it is at hand.
        report: told (done, of how many, what is done), for each round's watching and training from 0.

    Raises:
        ModelError, SpecError, DataError: as `collect`.
        TrainingError: a state or a loss that is not finite.
    """
    settings, stack = settings or PolicySettings(), stack or Stack.of(model.network)
    policy = Policy(len(exits) + 1, stack.d_model, seed=settings.seed).to(model.device)
    for number in range(rounds):
        seen = collect(
            model,
            encoded,
            exits,
            times,
            policy,
            prices=settings.prices,
            seed=settings.seed * 1_000_003 + number,
            lens=lens,
            batch_size=batch_size,
            stack=stack,
            report=report,
        )
        policy = fit_policy(seen, settings, report=report).to(model.device)
    return policy


def _drawn(batch: Batch, prices: tuple[float, float], seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """[B, T] whether a token is watched, [B, T] numbers that say where the others exit, [B] the logarithms of prices.

    Each row draws from a stream of its own.
    """
    watched, places = torch.zeros_like(batch.attention), torch.zeros(batch.ids.shape)
    log_prices, (low, high) = torch.zeros(len(batch.rows)), (math.log(price) for price in prices)
    for line, row in enumerate(batch.rows):
        stream, real = np.random.default_rng((seed, row)), batch.attention[line]
        log_prices[line] = low + (high - low) * stream.random()
        numbers = torch.from_numpy(stream.random((2, int(real.sum()))))
        watched[line, real], places[line, real] = numbers[0] < WATCHED, numbers[1].float()
    return watched, places, log_prices


def _seen(
    stack: Stack,
    batch: Batch,
    exits: Sequence[int],
    policy: Policy,
    watched: Tensor,
    places: Tensor,
    log_prices: Tensor,
) -> Tensor:
    """[B, T, E, d] the states at every exit, which are a watched token's own; others are frozen on the way."""
    kept: list[Tensor] = []
    stayed, prices = torch.ones_like(places), log_prices[:, None].expand(places.shape)

    def leaves(blocks: int, states: Tensor) -> Tensor:
        if blocks not in exits:
            return torch.zeros_like(watched)
        kept.append(states)
        gates = policy.at(exits.index(blocks), states.flatten(0, 1), prices.flatten()).view(places.shape)
        stayed.mul_(torch.sigmoid(-gates))
        # It exits where the probability of having exited overtakes its number.
        return ~watched & (1 - stayed > places)

    last = copied_pass(stack, batch, leaves)
    return torch.stack([*kept, last], 2)


def _losses(readout: Readout, lens: Lens, blocks: Sequence[int], states: Tensor, taught: Tensor) -> Tensor:
    """[n, E] KL from the ordinary pass's predictions to those of states [n, E, d] after so many blocks, nats."""
    losses = torch.empty(len(states), len(blocks), dtype=readout.precision, device=states.device)
    for start in range(0, len(states), CHUNK):
        some = slice(start, start + CHUNK)
        teacher = readout.teacher(taught[some])
        for place, number in enumerate(blocks):
            losses[some, place] = readout.kl(readout.z(lens.translate(states[some, place], number)), teacher)
    return losses
