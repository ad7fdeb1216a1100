"""Greedy generation that stops at a block where a rule says so, token by token.

The prompt goes through the whole network, and so is the first token said. After that every token runs block after
block until the rule lets it exit; it is read there with the model's own norm and unembedding, through a lens if there
is one. What later tokens need of the blocks that it skipped is `decoding`'s business.

Rows are decoded together only as far as the deepest of them: one that exits before is frozen, and exactly what it would
be by itself, but saves nothing. So a row at a time is what is fast.

Shapes: B rows, d the model's width, V the vocabulary, L blocks. An exit is counted in blocks run, 1 to L.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol, get_args

import torch
from torch import Tensor

from palimpsest.data.batches import Batch, Encoded, batches
from palimpsest.early_exit.decoding import Decoding, Fill
from palimpsest.early_exit.policy import Gate, Policy
from palimpsest.early_exit.stack import Stack
from palimpsest.errors import DataError, ModelError, SpecError
from palimpsest.lens.lens import Lens
from palimpsest.metrics.generation import SILENCE, stop_ids
from palimpsest.models.language_model import LanguageModel, evaluating
from palimpsest.progress import Report


@dataclass(frozen=True)
class Generated:
    """How one prompt goes on."""

    tokens: tuple[int, ...]
    """Before the stop, which is not among them."""
    exits: tuple[int, ...]
    """Blocks that each of them was read after; of the first always L."""


class ExitRule(Protocol):
    """Where a token may exit, and whether it does."""

    @property
    def exits(self) -> Sequence[int]:
        """Blocks run, ascending; after L every token exits, whether L is named or not."""
        ...

    @property
    def reads_logits(self) -> bool:
        """Whether it decides by what the head says at every exit, and not by the hidden state."""
        ...

    def leaves(self, place: int, given: Tensor) -> Tensor:
        """[B] bool, at the exit of this place among `exits`, from hidden states [B, d], or logits [B, V]."""
        ...


@dataclass(frozen=True)
class FixedExit:
    """After so many blocks, whatever the token."""

    blocks: int

    reads_logits = False

    @property
    def exits(self) -> tuple[int, ...]:
        """The one."""
        return (self.blocks,)

    def leaves(self, place: int, given: Tensor) -> Tensor:
        """Always."""
        return given.new_ones(len(given), dtype=torch.bool)


@dataclass(frozen=True)
class ConfidentExit:
    """Where the head gives its likeliest token more than a threshold's probability.

    It needs the head at every exit, and a head costs several blocks where the vocabulary is large.
    """

    exits: tuple[int, ...]
    threshold: float

    reads_logits = True

    def leaves(self, place: int, given: Tensor) -> Tensor:
        """By the largest probability."""
        return given.amax(-1) - given.logsumexp(-1) > math.log(self.threshold)


@dataclass(frozen=True, eq=False)
class PolicyExit:
    """Where a policy's gate is likelier to let it exit than not."""

    exits: tuple[int, ...]
    """E - 1 of them, as many as the policy has gates."""
    policy: Policy
    price: float
    """Of a whole pass, in nats, as the policy was trained to read it."""

    reads_logits = False

    def __post_init__(self) -> None:
        if len(self.exits) != self.policy.n_exits - 1:
            raise SpecError(
                f"this policy has {self.policy.n_exits - 1} gates, but {len(self.exits)} exits are named before the "
                "last; name those that it was trained for"
            )

    def leaves(self, place: int, given: Tensor) -> Tensor:
        """By one gate."""
        return self._gates[place](given) > 0

    @cached_property
    def _gates(self) -> list[Gate]:
        return self.policy.gates_at(self.price)


@dataclass(frozen=True, eq=False)
class Heads:
    """What is read after any number of blocks."""

    model: LanguageModel
    lens: Lens | None = None

    def logits(self, states: Tensor, blocks: int) -> Tensor:
        """[..., V] from hidden states [..., d]."""
        return self.model.anatomy.logits(states if self.lens is None else self.lens.translate(states, blocks))

    def tokens(self, logits: Tensor) -> Tensor:
        """[...] the likeliest of logits [..., V].

        Raises:
            ModelError: they are not numbers.
        """
        largest, tokens = logits.max(-1)
        if not largest.isfinite().all():
            raise ModelError(
                f"{self.model.name}: its logits are not finite, so it cannot say anything; look for a weight that is "
                "not, or load it with precision='fp32'"
            )
        return tokens


class Answers:
    """What the rows of a batch have said, and which of them go on."""

    def __init__(self, model: LanguageModel, batch: Batch, max_new_tokens: int) -> None:
        """Nothing yet.

        Args:
            model: whose stops and positions end an answer.
            batch: the prompts.
            max_new_tokens: the longest answer.
        """
        self.stops = torch.tensor(sorted(stop_ids(model.tokenizer)), device=batch.ids.device)
        lengths = batch.attention.sum(1)
        limit = getattr(model.network.config, "max_position_embeddings", None) or math.inf
        # The last token is said from the last position and needs none of its own.
        self.longest = (limit - lengths + 1).clamp(max=max_new_tokens)
        self.going = torch.ones_like(lengths, dtype=torch.bool)
        self.tokens: list[Tensor] = []
        self.exits: list[Tensor] = []

    def add(self, tokens: Tensor, exits: Tensor | int) -> bool:
        """Each row's next token [B] and its exit, [B] or one for all; whether any row goes on."""
        self.going = self.going & ~torch.isin(tokens, self.stops)
        self.tokens.append(tokens.where(self.going, SILENCE))
        self.exits.append(torch.full_like(tokens, exits) if isinstance(exits, int) else exits)
        self.going = self.going & (len(self.tokens) < self.longest)
        return bool(self.going.any())

    def generated(self) -> list[Generated]:
        """Row by row."""
        tokens, exits = torch.stack(self.tokens, 1), torch.stack(self.exits, 1)
        said = tokens != SILENCE
        return [
            Generated(tuple(row[own].tolist()), tuple(where[own].tolist()))
            for row, where, own in zip(tokens, exits, said, strict=True)
        ]


def generate(
    model: LanguageModel,
    prompts: Sequence[Sequence[int]],
    rule: ExitRule,
    *,
    max_new_tokens: int,
    fill: Fill = "lazy",
    lens: Lens | None = None,
    batch_size: int = 1,
    stack: Stack | None = None,
    num_beams: int = 1,
    do_sample: bool = False,
    report: Report | None = None,
) -> list[Generated]:
    """How a model goes on greedily after each prompt of token ids, each token exiting where the rule says.

    An answer ends before the first special token (an unknown word does not end it), after `max_new_tokens`, or where
    the model's positions end.

    Args:
        model: a decoder of one of `stack.DECODERS`.
        prompts: token ids, none of them empty.
        rule: where tokens exit.
        max_new_tokens: the longest answer, in tokens.
        fill: what becomes of the keys and values that a token skipped.
        lens: reads the exits in place of the bare final norm.
        batch_size: rows at a time; in fp32 it does not change an answer.
        stack: the model's, where it is at hand; finding it takes two passes over a few tokens.
        num_beams: 1; more is refused.
        do_sample: False; sampling is refused.
        report: called with (prompts done, of how many, a note).

    Raises:
        ModelError: an architecture, attention or window that this does not do; a lens of another depth; logits that are
            not finite.
        SpecError: exits that the model does not have, or another way to decode than greedily.
        DataError: an empty prompt, one longer than the model's positions, or a token that the model does not have.
    """
    if num_beams != 1 or do_sample:
        raise SpecError("early exit decodes greedily; leave num_beams at 1 and do_sample at False")
    if fill not in get_args(Fill):
        raise SpecError(f"there is no fill {fill!r}; there are {', '.join(get_args(Fill))}")
    stack, heads = stack or Stack.of(model.network), Heads(model, lens)
    refuse_unusable(stack, rule.exits, lens)

    def answer(batch: Batch, answers: Answers) -> None:
        decoding = Decoding(stack, batch, max_new_tokens, fill)
        tokens = heads.tokens(heads.logits(decoding.prefill(), stack.n_layers))
        exits: Tensor | int = stack.n_layers
        while answers.add(tokens, exits):
            tokens, exits = step(decoding, rule, heads, tokens, answers.going)

    return answer_all(model, prompts, answer, max_new_tokens=max_new_tokens, batch_size=batch_size, report=report)


def answer_all(
    model: LanguageModel,
    prompts: Sequence[Sequence[int]],
    answer: Callable[[Batch, Answers], None],
    *,
    max_new_tokens: int,
    batch_size: int,
    report: Report | None,
) -> list[Generated]:
    """The prompts' answers, in their order, prompts of like length together.

    Args:
        model: whose answers; it is put into evaluation meanwhile.
        prompts: token ids, none of them empty.
        answer: adds to a batch's answers until no row goes on.
        max_new_tokens: the longest answer, in tokens.
        batch_size: rows at a time.
        report: called with (prompts done, of how many, a note).

    Raises:
        DataError: an empty prompt, or a token that the model does not have.
        SpecError: there is nothing to say.
    """
    if max_new_tokens < 1:
        raise SpecError(f"max_new_tokens is {max_new_tokens}; it must be 1 or more")
    vocabulary = model.network.config.vocab_size
    for place, prompt in enumerate(prompts):
        if not len(prompt):
            raise DataError(f"prompt {place} (counted from 0) has no tokens; give it at least one")
        if not 0 <= min(prompt) <= max(prompt) < vocabulary:
            raise DataError(
                f"prompt {place} (counted from 0) has a token that is none of the model's {vocabulary}; encode it with "
                "the model's own tokenizer"
            )
    rows = [Encoded(tuple(ids), start=len(ids), stop=len(ids)) for ids in prompts]
    found, done = [Generated((), ())] * len(rows), 0
    with evaluating(model):
        for batch in batches(rows, batch_size=batch_size, side="left"):
            batch = batch.to(model.device)
            answers = Answers(model, batch, max_new_tokens)
            answer(batch, answers)
            for row, generated in zip(batch.rows, answers.generated(), strict=True):
                found[row] = generated
            done += len(batch.rows)
            if report:
                report(done, len(rows), f"{sum(len(one.tokens) for one in found)} tokens")
    return found


def refuse_unusable(stack: Stack, exits: Sequence[int], lens: Lens | None) -> None:
    """Refuse what cannot be decoded.

    Raises:
        ModelError: an encoder, or a lens of another depth.
        SpecError: exits that are not there, or not ascending.
    """
    if not stack.is_decoder:
        raise ModelError(f"a {stack.network.config.model_type} is an encoder and generates nothing; load a decoder")
    if lens is not None and lens.n_layers != stack.n_layers:
        raise ModelError(f"this lens has {lens.n_layers} layers and the model {stack.n_layers}; fit one for this model")
    if not exits or list(exits) != sorted(set(exits)) or not 1 <= exits[0] <= exits[-1] <= stack.n_layers:
        raise SpecError(f"exits {list(exits)}: name numbers of blocks run, ascending, from 1 to {stack.n_layers}")


def step(decoding: Decoding, rule: ExitRule, heads: Heads, tokens: Tensor, going: Tensor) -> tuple[Tensor, Tensor]:
    """The tokens after these.

    Args:
        decoding: the batch, which is one column further after it.
        rule: where tokens exit.
        heads: what is read there.
        tokens: [B] the newest.
        going: [B] bool, which rows go on.

    Returns:
        [B] tokens and [B] their exits; those of rows that do not go on mean nothing.
    """
    n_layers, places = decoding.stack.n_layers, {blocks: place for place, blocks in enumerate(rule.exits)}
    said, exits = tokens.clone(), torch.zeros_like(tokens)
    alive, all_alive = going, bool(going.all())
    hidden = decoding.enter(tokens)
    for blocks in range(1, n_layers + 1):
        after = decoding.run(blocks - 1, hidden)
        # A row that has left stays as it was, unless all that it skipped is to be made up for.
        keep_all = all_alive or decoding.fill == "catch_up"
        hidden = after if keep_all else torch.where(alive[:, None, None], after, hidden)
        if blocks < n_layers and blocks not in places:
            continue
        logits, leaving = None, alive
        if blocks < n_layers:
            states = hidden[:, -1]
            logits = heads.logits(states, blocks) if rule.reads_logits else None
            leaving = alive & rule.leaves(places[blocks], states if logits is None else logits)
        if leaving.any():
            read = heads.logits(hidden[leaving, -1], blocks) if logits is None else logits[leaving]
            said[leaving], exits[leaving] = heads.tokens(read), blocks
            alive, all_alive = alive & ~leaving, False
            if not alive.any():
                break
    decoding.wait(blocks, hidden)
    return said, exits
