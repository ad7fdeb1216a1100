"""Training the network itself for its exits: all of them at once, or only where the policy leaves.

ConsistentEE's stages (Zeng et al. 2024, arXiv 2312.11882): first every head, by a weighted sum of their losses; then
the policy alone (`policy_training`); then, if wanted, everything, each head only where its exit is taken.

Shapes: N examples, B of them a step, E exits, d the model's width.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers.pytorch_utils import Conv1D

from palimpsest.data.batches import batch_at
from palimpsest.early_exit.examples import Examples
from palimpsest.early_exit.exit_table import batch_states
from palimpsest.early_exit.heads import ClassHeads
from palimpsest.early_exit.policy import Policy, exact_objective, priced, reinforce_objective
from palimpsest.early_exit.policy_training import PolicySettings
from palimpsest.early_exit.stack import Stack
from palimpsest.errors import SpecError, TrainingError
from palimpsest.models.muon import muon
from palimpsest.progress import Report

Weights = Literal["linear", "uniform"]


@dataclass(frozen=True)
class ExitTraining:
    """How network and heads are trained."""

    steps: int = 300
    batch_size: int = 64
    learning_rate: float = 1e-3
    """Of AdamW, with warm-up over a twentieth of the steps and a linear decay."""
    muon_learning_rate: float | None = None
    """When given, Muon trains the blocks' matrices at this rate."""
    weight_decay: float = 0.01
    clip: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "learning_rate", "clip"):
            if not getattr(self, name) > 0:
                raise SpecError(f"early exit: {name} is {getattr(self, name)}; it must be above 0")


def weighted_sum(logits: Tensor, labels: Tensor, weights: Weights = "linear") -> Tensor:
    """The mean over rows of sum_i w_i CE_i / sum_i w_i, w_i = i for `linear` (the later the exit, the more it counts).

    Args:
        logits: [B, E, C] of every exit.
        labels: [B], or [B, E] where each exit has its own.
        weights: which.
    """
    n, n_exits, n_classes = logits.shape
    targets = labels[:, None].expand(n, n_exits) if labels.dim() == 1 else labels
    losses = cross_entropy(logits.reshape(-1, n_classes), targets.reshape(-1), reduction="none").view(n, n_exits)
    return (losses * exit_weights(n_exits, weights).to(losses.device)).sum(1).mean()


def exit_weights(n_exits: int, weights: Weights) -> Tensor:
    """[E] w_i / sum_i w_i."""
    w = torch.arange(1, n_exits + 1).float() if weights == "linear" else torch.ones(n_exits)
    return w / w.sum()


def fit_heads_on_states(states: Tensor, labels: Tensor, heads: ClassHeads, settings: ExitTraining) -> None:
    """Train the heads in place on the states [N, E, d] of a network that stays as it is."""
    generator, labels = torch.Generator().manual_seed(settings.seed), labels.to(states.device)

    def loss(_: int) -> Tensor:
        rows = torch.randint(len(labels), (settings.batch_size,), generator=generator)
        return weighted_sum(heads(states[rows]), labels[rows], "uniform")

    optimise([heads], loss, settings, None)


def train_all_exits(
    stack: Stack,
    layers: tuple[int, ...],
    heads: ClassHeads,
    examples: Examples,
    settings: ExitTraining,
    *,
    weights: Weights = "linear",
    targets: Tensor | None = None,
    report: Report | None = None,
) -> None:
    """Train network and heads in place, by the weighted sum of every exit's loss.

    Args:
        stack: the network.
        layers: after how many blocks each exit stands.
        heads: one an exit.
        examples: N of them.
        settings: how.
        weights: of the exits.
        targets: [N, E] classes, where each exit is to say something else than the label.
        report: told (steps done, of how many, the loss).

    Raises:
        TrainingError: a loss or a gradient that is not finite.
    """
    targets = examples.labels if targets is None else targets

    def loss(step: int) -> Tensor:
        logits, rows = _pass(stack, layers, heads, examples, settings, step)[1:]
        return weighted_sum(logits, targets[rows].to(logits.device), weights)

    optimise([stack.network, heads], loss, settings, report, stack)


def train_taken_exits(
    stack: Stack,
    layers: tuple[int, ...],
    heads: ClassHeads,
    policy: Policy,
    examples: Examples,
    times: Tensor,
    settings: ExitTraining,
    policy_settings: PolicySettings,
    *,
    hardness: Tensor | None = None,
    report: Report | None = None,
) -> None:
    """ConsistentEE's last stage, in place: network, heads and policy together, each head where its exit is taken.

    The policy reads the states as constants, so that the network is not bent to please it.

    Args:
        stack: the network.
        layers: after how many blocks each exit stands.
        heads: one an exit.
        policy: where the second stage left it.
        examples: N of them.
        times: [E] until each exit, as a share of a whole pass.
        settings: how network, heads and policy are trained.
        policy_settings: the objective and its prices.
        hardness: [N] how much an example's time counts, 1 unless given.
        report: told (steps done, of how many, the loss).

    Raises:
        TrainingError: a loss or a gradient that is not finite.
    """
    policy.requires_grad_(True).train()
    generator = torch.Generator().manual_seed(settings.seed)
    low, high = (math.log(price) for price in policy_settings.prices)

    def loss(step: int) -> Tensor:
        states, logits, rows = _pass(stack, layers, heads, examples, settings, step)
        labels = examples.labels[rows].to(logits.device)
        losses = torch.stack([cross_entropy(one, labels, reduction="none") for one in logits.unbind(1)], 1)
        log_prices = (low + (high - low) * torch.rand(len(rows), generator=generator)).to(logits.device)
        gates = policy(states[:, :-1].detach(), log_prices)
        weights = None if hardness is None else hardness[rows].to(logits.device)
        costs = priced(losses, log_prices.exp(), times.to(logits.device), weights)
        if policy_settings.estimator == "exact":
            return exact_objective(gates, costs)
        return reinforce_objective(gates, costs, generator, samples=policy_settings.samples)

    optimise([stack.network, heads, policy], loss, settings, report, stack)
    policy.requires_grad_(False).eval()


def _pass(
    stack: Stack, layers: tuple[int, ...], heads: ClassHeads, examples: Examples, settings: ExitTraining, step: int
) -> tuple[Tensor, Tensor, list[int]]:
    """States [B, E, d] and logits [B, E, C] of a step's batch, and which examples it has."""
    batch = batch_at(examples.rows, step, batch_size=settings.batch_size, seed=settings.seed)
    states = batch_states(stack, layers, batch.to(stack.network.device))
    return states, heads(states), list(batch.rows)


def optimise(
    modules: list[nn.Module],
    loss_at: Callable[[int], Tensor],
    settings: ExitTraining,
    report: Report | None,
    stack: Stack | None = None,
) -> None:
    """Minimise a loss that each step names.

    Args:
        modules: whose parameters are trained, in place; they are left in evaluation.
        loss_at: a step's loss, by the number of steps before it.
        settings: how.
        report: told (steps done, of how many, the loss).
        stack: whose matrices Muon takes, where the settings ask for it.

    Raises:
        TrainingError: a loss or a gradient that is not finite.
    """
    parameters = [parameter for module in modules for parameter in module.parameters()]
    matrices = []
    if stack and settings.muon_learning_rate:
        linear = [
            module for block in stack.blocks for module in block.modules() if isinstance(module, nn.Linear | Conv1D)
        ]
        matrices = [module.weight for module in linear]
    taken = {id(matrix) for matrix in matrices}
    rest = [parameter for parameter in parameters if id(parameter) not in taken]
    optimizers: list[torch.optim.Optimizer] = [
        torch.optim.AdamW(rest, lr=settings.learning_rate, weight_decay=settings.weight_decay)
    ]
    if matrices:
        optimizers.append(muon(matrices, settings.muon_learning_rate or 0.0, settings.weight_decay))
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    peaks = [group["lr"] for group in groups]
    warmup = max(1, settings.steps // 20)
    for module in modules:
        module.train()
    for step in range(settings.steps):
        torch.manual_seed(settings.seed * 1_000_003 + step)
        share = min((step + 1) / warmup, (settings.steps - step) / max(1, settings.steps - warmup))
        for group, peak in zip(groups, peaks, strict=True):
            group["lr"] = peak * share
        loss = loss_at(step)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(parameters, settings.clip)
        if not (loss.isfinite() and norm.isfinite()):
            raise TrainingError(
                f"step {step + 1} of {settings.steps}: the loss is {loss.item():g}, its gradient's norm "
                f"{norm.item():g}; lower the learning rate ({settings.learning_rate:g})"
            )
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        if report and ((step + 1) % 20 == 0 or step + 1 == settings.steps):
            report(step + 1, settings.steps, f"loss {loss.item():.3f}")
    for module in modules:
        module.eval()
