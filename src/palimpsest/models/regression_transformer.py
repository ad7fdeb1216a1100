"""A small transformer that does regression in context: from pairs (x, y) and a new x it tells the new y.

A decoder of pre-norm blocks with learned positions, as GPT-2, that reads and writes real numbers in place of tokens. In
the `interleaved` layout x and y are tokens of their own (Garg et al. 2022, arXiv 2208.01066), and a y is first to be
brought to its x. In the `paired` layout one token is a new x together with the pair before it: half as many tokens, and
nothing to be brought.
"""

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss, pad, scaled_dot_product_attention

from palimpsest.errors import SpecError, TrainingError
from palimpsest.files import content_hash
from palimpsest.models.checkpoint import Checkpoints
from palimpsest.models.muon import muon
from palimpsest.models.training import TrainingSettings
from palimpsest.progress import Report

Layout = Literal["paired", "interleaved"]
BatchAt = Callable[[int], tuple[Tensor, Tensor]]
"""The pairs of a step: x [n, T, d] and y [n, T]."""


@dataclass(frozen=True)
class RegressionArchitecture:
    """The transformer's size."""

    dim: int = 3
    """Of x."""
    points: int = 13
    """Pairs in a prompt, at most."""
    layers: int = 4
    width: int = 64
    heads: int = 4
    layout: Layout = "paired"

    def __post_init__(self) -> None:
        for name in ("dim", "points", "layers", "width", "heads"):
            if getattr(self, name) < 1:
                raise SpecError(f"regression transformer: {name} is {getattr(self, name)}; it must be at least 1")
        if self.width % self.heads:
            raise SpecError(
                f"regression transformer: width {self.width} cannot be shared out to {self.heads} heads; "
                f"choose a multiple of {self.heads}"
            )


class RegressionTransformer(nn.Module):
    """Predicts every y of a prompt from the pairs before it."""

    def __init__(self, architecture: RegressionArchitecture, seed: int) -> None:
        super().__init__()
        self.architecture = architecture
        paired, width = architecture.layout == "paired", architecture.width
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.read_in = nn.Linear(2 * architecture.dim + 1 if paired else architecture.dim, width)
            self.positions = nn.Parameter(0.02 * torch.randn(architecture.points * (1 if paired else 2), width))
            self.blocks = nn.Sequential(*(_Block(width, architecture.heads) for _ in range(architecture.layers)))
            self.norm = nn.LayerNorm(width)
            self.read_out = nn.Linear(width, 1)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """[n, T] a prediction of each y from its x and the pairs before it.

        Args:
            x: [n, T, d].
            y: [n, T]; the last is not looked at.
        """
        if self.architecture.layout == "paired":
            before = pad(torch.cat([x, y.unsqueeze(-1)], -1)[:, :-1], (0, 0, 1, 0))
            return self._read(torch.cat([x, before], -1))
        padded = pad(y.unsqueeze(-1), (0, x.shape[-1] - 1))
        return self._read(torch.stack([x, padded], 2).flatten(1, 2)[:, :-1])[:, ::2]

    def _read(self, tokens: Tensor) -> Tensor:
        states = self.read_in(tokens) + self.positions[: tokens.shape[1]]
        return self.read_out(self.norm(self.blocks(states))).squeeze(-1)


class _Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.attention_norm, self.mlp_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, states: Tensor) -> Tensor:
        """[n, T, width] states after attention to what stands before, and the MLP."""
        q, k, v = self.qkv(self.attention_norm(states)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        attended = scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
        states = states + self.out(attended)
        return states + self.down(nn.functional.gelu(self.up(self.mlp_norm(states))))


def train_regression(
    network: RegressionTransformer,
    batch_at: BatchAt,
    settings: TrainingSettings,
    *,
    checkpoint: str | Path | None = None,
    checkpoint_every: int = 1000,
    identity: str = "",
    report: Report | None = None,
    after_step: Callable[[int], None] | None = None,
) -> RegressionTransformer:
    """Train in place on the mean squared error of every y of a prompt.

    AdamW steps all parameters, or those that are left where the settings give Muon a rate for the blocks' matrices.

    Args:
        network: what to train; returned.
        batch_at: the pairs of each step, drawn by the step alone, on any device.
        settings: `steps` must be given; the batch is as large as `batch_at` makes it.
        checkpoint: a folder for the resumable state, removed at the end; None trains without one.
        checkpoint_every: steps between checkpoints.
        identity: tells this run's data from another's, so that no other run's state is taken up.
        report: told the progress every 25 steps, with a running mean of the loss as the note.
        after_step: called with the number of steps done after each of them.

    Raises:
        SpecError: no number of steps.
        TrainingError: the loss or its gradient is not finite.
        StorageError: a checkpoint cannot be written.
    """
    if settings.steps is None:
        raise SpecError("regression: data are drawn afresh for every step, so training needs `steps`")
    n_steps, parameters = settings.steps, dict(network.named_parameters())
    device = network.positions.device
    optimizers = _optimizers(network, settings)
    peaks = [optimizer.param_groups[0]["lr"] for optimizer in optimizers]
    kept = [asdict(network.architecture), asdict(settings), identity]
    checkpoints = Checkpoints(checkpoint, content_hash(kept)) if checkpoint else None
    state = checkpoints.load(optimizers) if checkpoints else None
    if state is not None:
        network.load_state_dict(state.tensors)
    mean = math.nan
    network.train()
    for step in range(state.step if state else 0, n_steps):
        for optimizer, peak in zip(optimizers, peaks, strict=True):
            optimizer.param_groups[0]["lr"] = peak * settings.rate(step, n_steps)
        x, y = (values.to(device, torch.float32) for values in batch_at(step))
        loss = mse_loss(network(x, y), y)
        network.zero_grad()
        loss.backward()
        norm = nn.utils.clip_grad_norm_(parameters.values(), settings.clip)
        if step % 25 == 0 or step + 1 == n_steps:  # looking at a number waits for the device
            mean = loss.item() if math.isnan(mean) else 0.8 * mean + 0.2 * loss.item()
            if not (math.isfinite(mean) and math.isfinite(norm.item())):
                if checkpoints:
                    checkpoints.remove()
                raise TrainingError(
                    f"step {step + 1} of {n_steps}: the loss is {loss.item():g}, its gradient's norm {norm.item():g}; "
                    f"nothing was saved. Lower the learning rate (its peak is {settings.learning_rate:g})"
                )
            if report:
                report(step + 1, n_steps, f"loss {mean:.3f}")
        for optimizer in optimizers:
            optimizer.step()
        if after_step:
            after_step(step + 1)
        if checkpoints and (step + 1) % checkpoint_every == 0 and step + 1 < n_steps:
            checkpoints.save(step + 1, parameters, optimizers)
    network.eval()
    if checkpoints:
        checkpoints.remove()
    return network


def _optimizers(network: RegressionTransformer, settings: TrainingSettings) -> list[torch.optim.Optimizer]:
    matrices = []
    if settings.muon_learning_rate is not None:
        matrices = [layer.weight for layer in network.blocks.modules() if isinstance(layer, nn.Linear)]
    taken = {id(matrix) for matrix in matrices}
    adam = torch.optim.AdamW(
        [value for value in network.parameters() if id(value) not in taken],
        lr=settings.learning_rate,
        betas=settings.betas,
        weight_decay=settings.weight_decay,
        fused=True,
    )
    return [adam, muon(matrices, settings.muon_learning_rate or 0.0, settings.weight_decay)] if matrices else [adam]


@torch.no_grad()
def predict_regression(
    network: RegressionTransformer, x: Tensor, y: Tensor, *, scale: float = 1.0, batch_size: int = 512
) -> Tensor:
    """[n, T] predictions in float64, on the CPU; with a scale, those of conjugate prompting by label scaling.

    `T(x, scale * y) / scale` (Kotha et al. 2024, arXiv 2309.10105): the scaled prompt asks for the same weights, times
    `scale`, and tasks so large are unlikely to be those of fine-tuning.

    Args:
        network: what predicts.
        x: [n, T, d].
        y: [n, T].
        scale: of the labels, above 0; the noise in them is scaled with them.
        batch_size: prompts in a pass.
    """
    device = network.positions.device
    passes = (
        network(inputs.to(device, torch.float32), scale * labels.to(device, torch.float32)).double().cpu() / scale
        for inputs, labels in zip(x.split(batch_size), y.split(batch_size), strict=True)
    )
    return torch.cat(list(passes))
