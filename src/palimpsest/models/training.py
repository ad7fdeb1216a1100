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
from accelerate import PartialState
from torch import nn
from transformers.pytorch_utils import Conv1D

from palimpsest.data.batches import Batch, Encoded, batch_at
from palimpsest.errors import SpecError, TrainingError
from palimpsest.files import content_hash
from palimpsest.models.checkpoint import Checkpoints
from palimpsest.models.hardware import bf16_is_fast
from palimpsest.models.language_model import LanguageModel
from palimpsest.models.muon import muon
from palimpsest.models.scoring import predict
from palimpsest.progress import Report


@dataclass(frozen=True)
class TrainingSettings:
    """How a model is trained. `epochs` counts passes over the examples; `steps`, when given, is the budget instead."""

    epochs: float = 1.0
    steps: int | None = None
    batch_size: int = 8
    learning_rate: float = 2e-3
    """AdamW's peak rate: for every parameter, or for those Muon does not take."""
    muon_learning_rate: float | None = None
    """When given, Muon trains the blocks' linear layers at this peak rate (Jordan 2024; `torch.optim.Muon`)."""
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
    precision: Literal["fp32", "bf16", "auto"] = "fp32"
    """bf16 runs the forward pass under autocast, auto where that is fast; weights and optimiser stay fp32."""
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("epochs", "steps", "batch_size", "learning_rate", "muon_learning_rate", "clip"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise SpecError(f"training: {name} is {value}; it must be above 0")

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
    after_step: Callable[[int], None] | None = None,
) -> LanguageModel:
    """Train the model in place on next-token prediction over the examples' targets; the loss is nats per target token.

    Args:
        model: what to train; returned.
        examples: encoded records or packed rows.
        settings: how.
        checkpoint: a folder for the resumable state, removed at the end; None trains without one.
        checkpoint_every: steps between checkpoints.
        report: told the progress about four times a second, with loss and tokens/s as the note.
        after_step: called with the number of steps done after each of them, to look at the model on its way.

    Raises:
        TrainingError: loss or gradient is not finite, there are no examples, or fewer rows in a batch than processes.
        StorageError: a checkpoint cannot be written.
    """
    if not examples:
        raise TrainingError("there is nothing to train on: the records make no row of at least two tokens")
    processes = PartialState(cpu=model.device.type == "cpu")
    if processes.num_processes > settings.batch_size:
        raise TrainingError(
            f"a batch of {settings.batch_size} rows cannot be shared out to {processes.num_processes} processes; "
            "raise batch_size or start fewer"
        )
    parameters, n_steps = dict(model.network.named_parameters()), settings.n_steps(len(examples))
    optimizers = build_optimizers(model, settings)
    checkpoints = Checkpoints(checkpoint, _identity(model, examples, settings)) if checkpoint else None
    first = _resume(checkpoints, parameters, optimizers) if checkpoints else 0
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    peaks = [group["lr"] for group in groups]
    fast = settings.precision == "auto" and bf16_is_fast(model.device)
    in_bf16 = fast or settings.precision == "bf16"
    meter = _Meter(n_steps, report)
    model.network.train()
    for step in range(first, n_steps):
        torch.manual_seed(settings.seed * 1_000_003 + step)
        for group, peak in zip(groups, peaks, strict=True):
            group["lr"] = peak * settings.rate(step, n_steps)
        batch = batch_at(examples, step, batch_size=settings.batch_size, seed=settings.seed).to(model.device)
        loss = _backward(processes, model, batch, in_bf16)
        norm = nn.utils.clip_grad_norm_(parameters.values(), settings.clip).item()
        if not (math.isfinite(loss) and math.isfinite(norm)):
            if checkpoints and processes.is_main_process:
                checkpoints.remove()
            raise TrainingError(
                f"step {step + 1} of {n_steps}: the loss is {loss:g}, its gradient's norm {norm:g}; nothing was saved. "
                f"Lower the learning rate (its peak is {_peaks(settings)})"
            )
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        meter.after(step + 1, loss, int(batch.attention.sum()))
        if after_step:
            after_step(step + 1)
        if checkpoints and (step + 1) % checkpoint_every == 0 and step + 1 < n_steps and processes.is_main_process:
            checkpoints.save(step + 1, parameters, optimizers)
    model.network.eval()
    if checkpoints and processes.is_main_process:
        checkpoints.remove()
    return model


def build_optimizers(model: LanguageModel, settings: TrainingSettings) -> list[torch.optim.Optimizer]:
    """AdamW over everything, or Muon over the weights of the blocks' linear layers and AdamW over the rest.

    What is left to AdamW are embeddings, head, norms, biases, and in a mixture of experts the fused experts and the
    router. GPT-2 keeps its linear weights transposed (`Conv1D`), and Muon takes them so: orthogonalising does not mind;
    only the rate's factor for tall matrices, sqrt(rows / columns), goes to those that are wide by right.
    """
    matrices = []
    if settings.muon_learning_rate is not None:
        layers = [module for block in model.anatomy.blocks for module in block.modules()]
        matrices = [layer.weight for layer in layers if isinstance(layer, nn.Linear | Conv1D)]
    taken = {id(matrix) for matrix in matrices}
    others = [value for value in model.network.parameters() if id(value) not in taken]
    groups = [
        {"params": [value for value in others if value.ndim > 1], "weight_decay": settings.weight_decay},
        {"params": [value for value in others if value.ndim <= 1], "weight_decay": 0.0},
    ]
    optimizers: list[torch.optim.Optimizer] = [
        torch.optim.AdamW(
            [group for group in groups if group["params"]], lr=settings.learning_rate, betas=settings.betas
        )
    ]
    if matrices:
        rate = settings.muon_learning_rate or 0.0
        optimizers.append(muon(matrices, rate, settings.weight_decay))
    return optimizers


def _resume(
    checkpoints: Checkpoints, parameters: dict[str, nn.Parameter], optimizers: Sequence[torch.optim.Optimizer]
) -> int:
    """Put the newest checkpoint's state back, if there is one; how many steps are done."""
    state = checkpoints.load(optimizers)
    if state is None:
        return 0
    with torch.no_grad():
        for name, value in state.tensors.items():
            parameters[name].copy_(value)
    return state.step


def _backward(processes: PartialState, model: LanguageModel, batch: Batch, in_bf16: bool) -> float:
    """Add this step's gradient; the loss is the mean over the whole batch's targets, whoever computes which rows."""
    share = slice(processes.process_index, None, processes.num_processes)
    mine = Batch(batch.ids[share], batch.attention[share], batch.targets[share], batch.rows[share])
    with torch.autocast(model.device.type, torch.bfloat16, enabled=in_bf16):
        predictions = predict(model.network, mine)
    loss = -predictions.logprobs().sum() / int(batch.targets.sum())
    loss.backward()
    total = loss.detach()
    if processes.num_processes > 1:
        torch.distributed.all_reduce(total)
        for parameter in model.network.parameters():
            if parameter.grad is not None:
                torch.distributed.all_reduce(parameter.grad)
    return total.item()


def _identity(model: LanguageModel, examples: Sequence[Encoded], settings: TrainingSettings) -> str:
    rows = [[row.ids, row.start, row.stop] for row in examples]
    return content_hash([model.fingerprint(), rows, asdict(settings)])


def _peaks(settings: TrainingSettings) -> str:
    if settings.muon_learning_rate is None:
        return f"{settings.learning_rate:g}"
    return f"{settings.learning_rate:g}, and Muon's {settings.muon_learning_rate:g}"


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
