"""What every rule would do with the same examples: accuracy against the time that it takes, foretold from its parts.

No setting is chosen here: every point is one setting, and says what it would do. What is best on these examples will be
a little worse on others, by the more settings the more are tried.

Shapes: N examples, E exits.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from palimpsest.data.batches import batches
from palimpsest.early_exit.bench import Costs, costs, predicted
from palimpsest.early_exit.classifier import ExitClassifier
from palimpsest.early_exit.examples import Examples
from palimpsest.early_exit.rules import (
    Confident,
    Fixed,
    Learned,
    Patience,
    Rule,
    Sureness,
    exits_by,
    oracle,
    thresholds,
)
from palimpsest.errors import SpecError

SETTINGS = 25
"""Prices, and thresholds of each measure of confidence."""
SURENESS: tuple[tuple[str, Sureness], ...] = (
    ("entropy", "entropy"),
    ("largest probability", "max_probability"),
    ("margin", "margin"),
)


@dataclass(frozen=True)
class RulePoint:
    """One rule at one setting."""

    setting: str
    accuracy: float
    blocks: float
    """Of an example, on average."""
    milliseconds: float
    """The same, foretold."""


@dataclass(frozen=True)
class RuleLine:
    """One rule at several settings, from fast to slow."""

    name: str
    points: tuple[RulePoint, ...]

    def fastest(self, accuracy: float) -> RulePoint | None:
        """The fastest of those that are so accurate."""
        enough = [one for one in self.points if one.accuracy >= accuracy]
        return min(enough, key=lambda one: one.milliseconds, default=None)


@dataclass(frozen=True)
class Frontier:
    """All rules, beside the whole network."""

    n: int
    batch_size: int
    threads: int
    lines: tuple[RuleLine, ...]
    """The learned policy first."""
    whole: RulePoint
    """All blocks, nothing being asked on the way."""
    oracle: RulePoint
    """The first exit that is right, at no cost of asking: what no rule can know, luck included."""
    chosen: RulePoint | None
    """The policy at the price that it was calibrated to."""


def frontier(exits: ExitClassifier, examples: Examples, *, batch_size: int = 16) -> Frontier:
    """Time the parts, see every exit's answers in one pass, and go through all rules on paper.

    Args:
        exits: with a policy.
        examples: labelled, and others than heads, policy and price were found on.
        batch_size: rows at a time.

    Raises:
        SpecError: there is no policy.
    """
    if exits.policy is None or exits.settings is None:
        raise SpecError("early exit: there is no policy yet; call fit_policy first")
    table = exits.table(examples)
    order = [row for batch in batches(examples.rows, batch_size=batch_size) for row in batch.rows]
    by_state, by_logits, unasked = (
        costs(exits, examples.rows, batch_size, rule=rule) for rule in (None, Confident("entropy", 0.0), Fixed())
    )

    def point(setting: str, exits_taken: Tensor, parts: Costs) -> RulePoint:
        left = torch.tensor(table.layers)[exits_taken]
        milliseconds = predicted(parts, left[order].tolist(), batch_size)
        return RulePoint(setting, table.accuracy(exits_taken), table.mean_layers(exits_taken), milliseconds)

    def line(name: str, rules: Sequence[tuple[str, Rule]], parts: Costs) -> RuleLine:
        points = [point(setting, exits_by(rule, table), parts) for setting, rule in rules]
        return RuleLine(name, tuple(sorted(points, key=lambda one: one.milliseconds)))

    policy, prices = exits.policy, np.geomspace(*exits.settings.prices, SETTINGS).tolist()
    lines = [line("learned policy", [(f"price {price:.3g}", Learned(policy, price)) for price in prices], by_state)]
    for name, measure in SURENESS:
        sure = [(f"threshold {level:.3g}", Confident(measure, level)) for level in thresholds(measure, table, SETTINGS)]
        lines.append(line(name, sure, by_logits))
    patience = [(f"{times} in agreement", Patience(times)) for times in range(1, len(exits.layers))]
    fixed = [(f"after {layer}", Fixed(exit)) for exit, layer in enumerate(exits.layers)]
    lines += [line("patience", patience, by_logits), line("fixed", fixed, unasked)]
    whole = point("all blocks", exits_by(Fixed(), table), unasked)
    chosen = None
    if exits.point is not None:
        chosen = point(f"price {exits.point.price:.3g}", exits_by(Learned(policy, exits.point.price), table), by_state)
    lucky = point("first right", oracle(table), unasked)
    return Frontier(len(examples), batch_size, torch.get_num_threads(), tuple(lines), whole, lucky, chosen)
