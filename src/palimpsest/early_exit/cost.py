"""What a decoded token takes: a few parts are measured once, and say what any exit would take before one is trained.

Layers do not count, milliseconds do: a head may cost as much as several blocks, and what a token skips still needs its
keys and values. Every part is a run of the very loop that generates or a difference between two, so what Python adds is
in it. A few blocks that run over and over stay in the processor's caches and are faster than their share of all: so a
token is timed until several depths, each run after one of its own kind.

A part is a median over runs that take turns. The clock is this thread's processor time where torch computes on one
thread of the CPU, which other load on the machine moves little; else it is the one on the wall.

Shapes: one row; L blocks, E exits.
"""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import median
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from palimpsest.data.batches import Batch
from palimpsest.early_exit.decoding import Decoding, Fill
from palimpsest.early_exit.generation import (
    Answers,
    ConfidentExit,
    ExitRule,
    FixedExit,
    Heads,
    PolicyExit,
    refuse_unusable,
    step,
)
from palimpsest.early_exit.policy import Policy
from palimpsest.early_exit.self_speculation import draft_and_check
from palimpsest.early_exit.stack import Stack
from palimpsest.errors import SpecError
from palimpsest.lens.lens import Lens
from palimpsest.models.language_model import LanguageModel, evaluating
from palimpsest.progress import Report

TOKENS = 8
"""Decoded in each run; in the run of lazy fills all but the last of them wait."""
ROUNDS = 2
"""Of self-speculation in each run."""


@dataclass(frozen=True)
class Parts:
    """Milliseconds of one row of one model, on one machine."""

    n_layers: int
    context: int
    """Tokens that were seen already, about."""
    threads: int
    clock: Literal["processor", "wall"]
    depths: tuple[int, ...]
    """After how many blocks a token was timed, from the first to the last."""
    tokens: tuple[float, ...]
    """One token of many that all exit there, from its embedding to its head, nothing being filled."""
    fill: float
    """One block's keys and values of one token (`eager`)."""
    lazy_fill: float
    """The same where several that wait are filled together (`lazy`), for each."""
    gate: float
    """A policy's decision at one exit."""
    head: float
    """Being confident or not at one exit: the head, and the largest probability."""
    drafts: int
    check: float
    """One block for all of a round's tokens, the drafts and the one before them."""
    round: float
    """Once a round of self-speculation, beyond its tokens and blocks."""

    @property
    def full(self) -> float:
        """A token that runs every block, with nothing asked on the way."""
        return self.fixed(self.n_layers)

    def fixed(self, blocks: int, fill: Fill = "lazy") -> float:
        """A token of many that all exit after so many blocks: lazily nothing is ever filled."""
        skipped = self.n_layers - blocks if fill == "eager" else 0
        return float(np.interp(blocks, self.depths, self.tokens)) + skipped * self.fill

    def policy(self, blocks: int, exits: Sequence[int]) -> float:
        """A token that passes a gate at each of the exits up to its own, among others that go deeper."""
        gates = sum(exit <= blocks for exit in exits if exit < self.n_layers)
        return self.fixed(blocks) + gates * self.gate + (self.n_layers - blocks) * self.lazy_fill

    def confidence(self, blocks: int, exits: Sequence[int]) -> float:
        """The same with a head at each of the exits up to its own; that of its own is what it is read by."""
        heads = sum(exit <= blocks for exit in exits if exit < self.n_layers)
        read = self.head if blocks < self.n_layers else 0.0
        return self.fixed(blocks) + heads * self.head - read + (self.n_layers - blocks) * self.lazy_fill

    def speculation(self, blocks: int, kept: float) -> float:
        """A token of self-speculation.

        Args:
            blocks: how many draft.
            kept: the chance that a draft is kept, if those before it were.
        """
        return self._round(blocks) / sum(kept**place for place in range(self.drafts + 1))

    def needed(self, blocks: int) -> float | None:
        """The chance at which self-speculation takes as long as every block does; None where it always takes longer."""
        low, high = 0.0, 1.0
        if self.speculation(blocks, high) > self.full:
            return None
        for _ in range(40):
            middle = (low + high) / 2
            low, high = (middle, high) if self.speculation(blocks, middle) > self.full else (low, middle)
        return high

    def times(self, exits: Sequence[int]) -> list[float]:
        """[E] until each exit and the last, as shares of the last: what a policy for tokens is to reckon with."""
        whole = self.policy(self.n_layers, exits)
        return [self.policy(blocks, exits) / whole for blocks in (*exits, self.n_layers)]

    def _round(self, blocks: int) -> float:
        drafting = (self.drafts + 1) * self.fixed(blocks)
        return drafting + (self.n_layers - blocks) * self.check + self.round


@dataclass(frozen=True)
class BreakEven:
    """What exiting after so many blocks would gain, if every token did."""

    blocks: int
    fixed_eager: float
    """How many times as fast as every block; below 1 it is slower. The same for the next three."""
    fixed_lazy: float
    policy: float
    confidence: float
    drafts_needed: float | None
    """The share of drafts that must be kept for self-speculation to gain anything; None: there is none."""


def break_even(parts: Parts, exits: Sequence[int]) -> list[BreakEven]:
    """A line an exit: where anything is to be gained, and by what."""
    return [
        BreakEven(
            blocks,
            parts.full / parts.fixed(blocks, "eager"),
            parts.full / parts.fixed(blocks),
            parts.full / parts.policy(blocks, exits),
            parts.full / parts.confidence(blocks, exits),
            parts.needed(blocks) if blocks < parts.n_layers else None,
        )
        for blocks in exits
    ]


def measure(
    model: LanguageModel,
    *,
    context: int = 128,
    drafts: int = 4,
    lens: Lens | None = None,
    repeats: int = 9,
    stack: Stack | None = None,
    report: Report | None = None,
) -> Parts:
    """Take a model's parts, with a few runs of a few tokens each.

    Args:
        model: a decoder with at least three blocks.
        context: tokens that the decoded ones see.
        drafts: of a round of self-speculation.
        lens: read with, or the bare final norm.
        repeats: of every run; the median counts.
        stack: the model's, where it is at hand.
        report: told (runs done, of how many, nothing).

    Raises:
        ModelError: what cannot be decoded.
        SpecError: too few blocks to tell the parts apart, or no context.
    """
    loop = _Loop(model, context, drafts, lens, stack)
    last = loop.stack.n_layers
    if last < 3:
        raise SpecError(f"the parts of {last} blocks cannot be told apart; it takes three")
    inside, half = tuple(range(1, last)), last // 2
    depths = sorted({1, max(1, last // 4), half, 3 * last // 4, last - 1, last})
    never = Policy(last, loop.stack.d_model).to(model.device).requires_grad_(False)
    never.outer_bias.fill_(-100.0)
    seconds = _medians(
        model,
        {
            **{str(depth): partial(loop.steps, FixedExit(depth)) for depth in depths},
            "half, filled": lambda: loop.steps(FixedExit(half), "eager"),
            "lazy": lambda: loop.steps(_AllButTheLast()),
            "gates": lambda: loop.steps(PolicyExit(inside, never, 1.0)),
            "heads": lambda: loop.steps(ConfidentExit(inside, 1.0)),
            "first drafts": lambda: loop.rounds(1, drafts),
            "all but one draft": lambda: loop.rounds(last - 1, drafts),
        },
        repeats,
        report,
    )
    until = {depth: seconds[str(depth)] / TOKENS for depth in depths}
    full = until[last]
    waited = seconds["lazy"] - (TOKENS - 1) * until[1] - full
    checks = [
        seconds[name] / ROUNDS - (drafts + 1) * until[blocks]
        for name, blocks in (("first drafts", 1), ("all but one draft", last - 1))
    ]
    check = (checks[0] - checks[1]) / (last - 2)
    milliseconds = {
        # After a single block the caches still hold what the fills read, which is no case that anyone runs.
        "fill": (seconds["half, filled"] / TOKENS - until[half]) / (last - half),
        "lazy_fill": waited / ((TOKENS - 1) * (last - 1)),
        "gate": (seconds["gates"] / TOKENS - full) / (last - 1),
        "head": (seconds["heads"] / TOKENS - full) / (last - 1),
        "check": check,
        "round": checks[1] - check,
    }
    return Parts(
        n_layers=last,
        context=context,
        threads=torch.get_num_threads(),
        clock="processor" if _alone(model) else "wall",
        depths=tuple(depths),
        tokens=tuple(1e3 * until[depth] for depth in depths),
        drafts=drafts,
        **{name: 1e3 * value for name, value in milliseconds.items()},
    )


@dataclass(frozen=True)
class Checked:
    """A prediction beside what generation took, milliseconds a token."""

    blocks: int
    fill: Fill
    predicted: float
    measured: float

    @property
    def error(self) -> float:
        """Of the prediction, as a share of what was measured."""
        return self.predicted / self.measured - 1


def predicted_and_measured(
    model: LanguageModel,
    parts: Parts,
    exits: Sequence[int],
    *,
    lens: Lens | None = None,
    repeats: int = 9,
    stack: Stack | None = None,
    report: Report | None = None,
) -> list[Checked]:
    """Generate with every token exiting at each exit, by both fills, and hold it against what the parts predict.

    Raises:
        ModelError: what cannot be decoded.
        SpecError: exits that the model does not have.
    """
    loop = _Loop(model, parts.context, parts.drafts, lens, stack)
    refuse_unusable(loop.stack, exits, lens)
    fills: tuple[Fill, ...] = ("eager", "lazy")
    cases = {f"{blocks} {fill}": (blocks, fill) for blocks in exits for fill in fills}
    runs = {name: partial(loop.steps, FixedExit(blocks), fill) for name, (blocks, fill) in cases.items()}
    seconds = _medians(model, runs, repeats, report)
    return [
        Checked(blocks, fill, parts.fixed(blocks, fill), 1e3 * seconds[name] / TOKENS)
        for name, (blocks, fill) in cases.items()
    ]


class _AllButTheLast:
    """Exits after one block, but for the last token of a run."""

    exits, reads_logits = (1,), False

    def __init__(self) -> None:
        self.asked = 0

    def leaves(self, place: int, given: Tensor) -> Tensor:
        self.asked += 1
        return given.new_full((len(given),), self.asked < TOKENS, dtype=torch.bool)


class _Loop:
    """Generation after one prompt, over and over, that nothing ends."""

    def __init__(self, model: LanguageModel, context: int, drafts: int, lens: Lens | None, stack: Stack | None) -> None:
        self.room = max(TOKENS, ROUNDS * (drafts + 1)) + 1
        limit = getattr(model.network.config, "max_position_embeddings", None) or math.inf
        if not 1 <= context <= limit - self.room:
            raise SpecError(
                f"a context of {context} tokens: it must be 1 or more, and leave {self.room} of the model's {limit} "
                "positions"
            )
        self.model, self.heads, self.stack = model, Heads(model, lens), stack or Stack.of(model.network)
        refuse_unusable(self.stack, (1,), lens)
        vocabulary = model.network.config.vocab_size
        ids = torch.randint(vocabulary, (1, context), generator=torch.Generator().manual_seed(0)).to(model.device)
        self.prompt = Batch(ids, torch.ones_like(ids, dtype=torch.bool), torch.zeros_like(ids, dtype=torch.bool), (0,))
        self.decodings: dict[Fill, Decoding] = {}

    def steps(self, rule: ExitRule, fill: Fill = "lazy") -> float:
        """Seconds of a run of tokens, the prompt's pass not counted."""
        decoding, answers, tokens = self._begun(fill)
        started = self._now()
        for _ in range(TOKENS):
            tokens, exits = step(decoding, rule, self.heads, tokens, answers.going)
            answers.add(tokens, exits)
        if fill == "eager":
            decoding.settle()  # else the last token's fill would be the next one's
        return self._now() - started

    def rounds(self, blocks: int, drafts: int) -> float:
        """Seconds of a run of rounds of self-speculation."""
        decoding, answers, tokens = self._begun("catch_up")
        started = self._now()
        for _ in range(ROUNDS):
            tokens, _ = draft_and_check(decoding, self.heads, answers, tokens, blocks, drafts)
        return self._now() - started

    def _begun(self, fill: Fill) -> tuple[Decoding, Answers, Tensor]:
        if fill not in self.decodings:
            self.decodings[fill] = Decoding(self.stack, self.prompt, self.room, fill)
            self.decodings[fill].prefill()
        decoding = self.decodings[fill]
        decoding.crop(decoding.n_prompt)
        answers = Answers(self.model, self.prompt, self.room)
        answers.stops = answers.stops[:0]
        return decoding, answers, self.prompt.ids[:, -1]

    def _now(self) -> float:
        if self.model.device.type == "cuda":
            torch.cuda.synchronize()
        return time.thread_time() if _alone(self.model) else time.perf_counter()


def _alone(model: LanguageModel) -> bool:
    """Whether this thread does all the work."""
    return model.device.type == "cpu" and torch.get_num_threads() == 1


def _medians(
    model: LanguageModel, runs: Mapping[str, Callable[[], float]], repeats: int, report: Report | None
) -> dict[str, float]:
    """Seconds of each run, the runs taking turns, each after one of its own kind that is not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    with evaluating(model):
        for turn in range(repeats):
            for name, run in runs.items():
                run()
                seconds[name].append(run())
            if report:
                report(turn + 1, repeats, "")
    return {name: median(took) for name, took in seconds.items()}
