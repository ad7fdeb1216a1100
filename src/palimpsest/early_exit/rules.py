"""When to leave: the rules that a learned policy is compared with, and the policy itself, all asked in the same way.

A rule is asked at one exit after another, with the states there and, if it reads it, what the exits so far said. So one
definition serves a table of examples and a batch that is being classified.

Shapes: N examples that are still there, e + 1 exits so far, E in all, d the model's width, C classes.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Literal, Protocol

import torch
from torch import Tensor

from palimpsest.early_exit.exit_table import ExitTable
from palimpsest.early_exit.policy import Gate, Policy


class Rule(Protocol):
    """Whether to leave at an exit; the last one is never asked about."""

    @property
    def reads_logits(self) -> bool:
        """Whether it decides by what the heads say; then they are asked at every exit, of all rows."""
        ...

    def leaves(self, exit: int, states: Tensor, logits: Tensor) -> Tensor:
        """[N] bool.

        Args:
            exit: e, counted from 0.
            states: [N, d] there.
            logits: [N, e + 1, C] of the exits so far; not to be looked at by a rule that does not read them.
        """
        ...


Sureness = Literal["max_probability", "entropy", "margin"]


def sureness(logits: Tensor, measure: Sureness) -> Tensor:
    """[...] how sure predictions [..., C] are, more being surer.

    - `max_probability`: of the likeliest class.
    - `entropy`: its negative, nats (DeeBERT, Xin et al. 2020, arXiv 2004.12993).
    - `margin`: how far the likeliest class is ahead of the second, in probability.
    """
    log_p = logits.log_softmax(-1)
    if measure == "entropy":
        return (log_p.exp() * log_p).sum(-1)
    if measure == "max_probability":
        return log_p.amax(-1).exp()
    first, second = log_p.exp().topk(2, dim=-1).values.unbind(-1)
    return first - second


@dataclass(frozen=True)
class Confident:
    """Leave once an exit is as sure as this."""

    measure: Sureness
    threshold: float

    reads_logits = True

    def leaves(self, exit: int, states: Tensor, logits: Tensor) -> Tensor:
        """[N] bool; see `Rule`."""
        return sureness(logits[:, -1], self.measure) >= self.threshold


@dataclass(frozen=True)
class Patience:
    """Leave once so many exits after one another have said what the one before did (PABEE, Zhou et al. 2020)."""

    times: int

    reads_logits = True

    def leaves(self, exit: int, states: Tensor, logits: Tensor) -> Tensor:
        """[N] bool; see `Rule`."""
        said = logits.argmax(-1)
        if said.shape[1] <= self.times:
            return torch.zeros(len(said), dtype=torch.bool, device=said.device)
        latest = said[:, said.shape[1] - self.times - 1 :]
        return (latest == latest[:, :1]).all(1)


@dataclass(frozen=True)
class Fixed:
    """Leave at one exit, counted from 0, whatever it says; None is the last."""

    exit: int | None = None

    reads_logits = False

    def leaves(self, exit: int, states: Tensor, logits: Tensor) -> Tensor:
        """[N] bool; see `Rule`."""
        here = self.exit is not None and exit >= self.exit
        return torch.full((len(states),), here, device=states.device)


@dataclass(frozen=True, eq=False)
class Learned:
    """Leave where the policy finds that more likely than not, at this price of a whole pass."""

    policy: Policy
    price: float
    """Nats: what a whole pass must lower the loss by to be worth its time."""

    reads_logits = False

    def leaves(self, exit: int, states: Tensor, logits: Tensor) -> Tensor:
        """[N] bool; see `Rule`."""
        device = self.policy.outer.device
        return (self._gates[exit](states.to(device)) > 0).to(states.device)

    @cached_property
    def _gates(self) -> list[Gate]:
        return self.policy.gates_at(self.price)


def exits_by(rule: Rule, table: ExitTable) -> Tensor:
    """[N] the exit, counted from 0, at which each of the table's examples leaves."""
    last = len(table.layers) - 1
    exits = torch.full((len(table.labels),), last)
    with torch.no_grad():
        for exit in range(last - 1, -1, -1):
            exits[rule.leaves(exit, table.states[:, exit], table.logits[:, : exit + 1])] = exit
    return exits


def oracle(table: ExitTable) -> Tensor:
    """[N] the first exit that is right, or the first of all where none is: what no rule can know, luck included."""
    return torch.where(table.right.any(1), table.right.long().argmax(1), 0)


def thresholds(measure: Sureness, table: ExitTable, n: int = 40) -> list[float]:
    """Thresholds that split the table's examples evenly, for a sweep of `Confident`."""
    values = sureness(table.logits[:, :-1], measure).flatten().double()
    points: list[float] = values.quantile(torch.linspace(0, 1, n, dtype=torch.float64)).tolist()
    return sorted(set(points))
