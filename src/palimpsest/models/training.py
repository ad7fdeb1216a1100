"""The training loop: AdamW (Muon on the matrices if asked), warm-up and decay, clipping, mixed precision, resumable.

A batch is chosen by its step and every step seeds its own random numbers, so a run that is killed and started again
ends with the same weights, and so does one on several processes (to rounding): each takes its share of the same batch
and the gradients are summed.
"""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from palimpsest.data.batches import Batch, Encoded, batch_at
from palimpsest.errors import TrainingError
from palimpsest.files import content_hash
from palimpsest.models.checkpoint import Checkpoints
from palimpsest.models.language_model import LanguageModel
from palimpsest.models.scoring import predict

Report = Callable[[int, int, str], None]
"""Called with (steps done, steps in all, a note with loss and tokens/s)."""


@dataclass(frozen=True)
class TrainingSettings:
    """How a model is trained. `epochs` counts passes over the examples; `steps`, when given, is the budget instead."""

    epochs: float = 1.0
    steps: int | None = None
    batch_size: int = 8
    learning_rate: float = 2e-3
    """AdamW's peak rate: for every parameter, or for those Muon does not take."""
    muon_learning_rate: float | None = None
    """When given, Muon trains the blocks' matrices at this peak rate (Jordan 2024; `torch.optim.Muon`)."""
    betas: tuple[float, float] = (0.9, 0.98)
    weight_decay: float = 0.1
    """Decoupled, on matrices and embeddings; never on norms and biases."""
    warmup: int = 40
    """Steps of linear warm-up."""
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    final: float = 0.02
    """What is left of the peak rate at the end."""
    clip: float = 1.0
    """The largest allowed norm of the gradient."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """bf16 runs the forward pass under autocast; weights and optimiser stay fp32."""
    seed: int = 0

    def n_steps(self, n_examples: int) -> int:
        """How many steps these settings make of that many examples."""
        return self.steps if self.steps is not None else math.ceil(self.epochs * n_examples / self.batch_size)

    def rate(self, step: int, n_steps: int) -> float:
        """The share of the peak rate at a step."""
        if step < self.warmup:
            return (step + 1) / self.warmup
        if self.schedule == "constant":
            return 1.0
        done = (step - self.warmup) / max(1, n_steps - self.warmup)
        shape = 1 - done if self.schedule == "linear" else (1 + math.cos(math.pi * done)) / 2
        return self.final + (1 - self.final) * shape


def train(
    model: LanguageModel,
    examples: Sequence[Encoded],
    settings: TrainingSettings,
    *,
    checkpoint: str | Path | None = None,
    checkpoint_every: int = 200,
    report: Report | None = None,
) -> LanguageModel:
    """Train the model in place on next-token prediction over the examples' targets; the loss is nats per target token.

    Args:
        model: what to train; returned.
        examples: encoded records or packed rows.
        settings: how.
        checkpoint: a folder for the resumable state, removed at the end; None trains without one.
        checkpoint_every: steps between checkpoints.
        report: told the progress about four times a second.

    Raises:
        TrainingError: the loss is not finite; the message names step and rate.
    """
    accelerator = Accelerator(
        mixed_precision="bf16" if settings.precision == "bf16" else "no", cpu=model.device.type == "cpu"
    )
    network, n_steps = model.network, settings.n_steps(len(examples))
    parameters = dict(network.named_parameters())
    optimizers = build_optimizers(parameters, settings)
    peaks = [[group["lr"] for group in optimizer.param_groups] for optimizer in optimizers]
    checkpoints = checkpoint and Checkpoints(checkpoint, _identity(model, examples, settings))
    first = 0
    if checkpoints and (state := checkpoints.load(optimizers)):
        first = state.step
        with torch.no_grad():
            for name, value in state.tensors.items():
                parameters[name].copy_(value)
    network.train()
    meter = _Meter(n_steps, report)
    for step in range(first, n_steps):
        torch.manual_seed(settings.seed * 1_000_003 + step)
        rate = settings.rate(step, n_steps)
        for optimizer, peak in zip(optimizers, peaks, strict=True):
            for group, top in zip(optimizer.param_groups, peak, strict=True):
                group["lr"] = top * rate
        batch = batch_at(examples, step, batch_size=settings.batch_size, seed=settings.seed).to(model.device)
        loss = _backward(accelerator, model, batch)
        if not math.isfinite(loss):
            raise TrainingError(
                f"step {step + 1} of {n_steps}: the loss is {loss}; training stopped and nothing was saved. "
                f"Lower the learning rate (its peak is {settings.learning_rate:g})"
            )
        accelerator.clip_grad_norm_(parameters.values(), settings.clip)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        meter.after(step + 1, loss, int(batch.attention.sum()))
        if checkpoints and (step + 1) % checkpoint_every == 0 and step + 1 < n_steps and accelerator.is_main_process:
            checkpoints.save(step + 1, parameters, optimizers)
    network.eval()
    if checkpoints and accelerator.is_main_process:
        checkpoints.remove()
    return model


def build_optimizers(parameters: dict[str, nn.Parameter], settings: TrainingSettings) -> list[torch.optim.Optimizer]:
    """AdamW over everything, or Muon over the blocks' matrices and AdamW over the rest (embeddings, head, norms)."""
    hidden = [
        name for name, value in parameters.items() if value.ndim == 2 and "embed" not in name and "lm_head" not in name
    ]
    by_muon = set(hidden if settings.muon_learning_rate is not None else [])
    others = {name: value for name, value in parameters.items() if name not in by_muon}
    groups = [
        {"params": [value for value in others.values() if value.ndim > 1], "weight_decay": settings.weight_decay},
        {"params": [value for value in others.values() if value.ndim <= 1], "weight_decay": 0.0},
    ]
    optimizers: list[torch.optim.Optimizer] = [
        torch.optim.AdamW(
            [group for group in groups if group["params"]], lr=settings.learning_rate, betas=settings.betas
        )
    ]
    if settings.muon_learning_rate is not None and by_muon:
        matrices = [parameters[name] for name in hidden]
        optimizers.append(
            torch.optim.Muon(matrices, lr=settings.muon_learning_rate, weight_decay=settings.weight_decay)
        )
    return optimizers


def _backward(accelerator: Accelerator, model: LanguageModel, batch: Batch) -> float:
    """Add this step's gradient; the loss is the mean over the whole batch's targets, whoever computes which rows."""
    n_targets = int(batch.targets.sum())
    share = slice(accelerator.process_index, None, accelerator.num_processes)
    mine = Batch(batch.ids[share], batch.attention[share], batch.targets[share], batch.rows[share])
    with accelerator.autocast():
        predictions = predict(model.network, mine)
    loss: Tensor = -predictions.logprobs().sum() / n_targets
    accelerator.backward(loss)
    if accelerator.num_processes > 1:
        for parameter in model.network.parameters():
            if parameter.grad is not None:
                parameter.grad = accelerator.reduce(parameter.grad, "sum")
        loss = accelerator.reduce(loss.detach(), "sum")
    return loss.item()


def _identity(model: LanguageModel, examples: Sequence[Encoded], settings: TrainingSettings) -> str:
    rows = [[row.ids, row.start, row.stop] for row in examples]
    return content_hash([model.fingerprint(), rows, asdict(settings)])


class _Meter:
    """Loss (a running mean) and tokens/s, told about four times a second."""

    def __init__(self, n_steps: int, report: Report | None) -> None:
        self.n_steps, self.report = n_steps, report
        self.loss, self.tokens, self.since = math.nan, 0, time.monotonic()

    def after(self, step: int, loss: float, tokens: int) -> None:
        self.loss = loss if math.isnan(self.loss) else 0.95 * self.loss + 0.05 * loss
        self.tokens += tokens
        elapsed = time.monotonic() - self.since
        if self.report and (elapsed > 0.25 or step == self.n_steps):
            self.report(step, self.n_steps, f"loss {self.loss:.3f}  {self.tokens / max(elapsed, 1e-9):,.0f} tokens/s")
            self.tokens, self.since = 0, time.monotonic()
