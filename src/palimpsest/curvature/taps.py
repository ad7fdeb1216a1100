"""What every linear map reads and what gradient comes back to it, in one backward pass of sampled labels.

No gradient of a weight is ever computed: every parameter is frozen, and the gradient starts at the embeddings. What is
collected is collected when the gradient arrives, once a pass, also under gradient checkpointing (where the forward hook
runs twice).
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from palimpsest.curvature.modules import Matrix
from palimpsest.data.batches import Batch
from palimpsest.errors import ModelError, TrainingError
from palimpsest.models.language_model import LanguageModel
from palimpsest.models.scoring import Predictions, predict

See = Callable[[Matrix, Tensor, Tensor], None]
"""Called with a matrix, its inputs [P, in] and output gradients [P, out] at the P carrying positions, row by row."""

CHUNK = 2**20
"""Entries of [tokens, vocabulary] worked on at a time."""
BUCKET = 64
"""Neighbours in the vocabulary that a label is first looked for as one."""


def carrying(batch: Batch) -> Tensor:
    """[B, T] bool: real tokens through which a loss term's gradient can flow, prompts included.

    The token at t predicts the target at t + 1; attention is causal, so everything up to a row's last predicting
    position carries gradient and nothing after it does.
    """
    later = batch.targets.flip(1).cumsum(1).flip(1) - batch.targets.long()
    return batch.attention & (later > 0)


@contextmanager
def tapped(model: LanguageModel, chosen: Sequence[Matrix], see: See) -> Iterator[Callable[[Batch], Predictions]]:
    """Yield `forward(batch)`, after which each backward pass calls `see` once for every matrix.

    Raises:
        ModelError: a matrix that does not read one vector a token (the experts of a mixture).
    """
    network, positions = model.network, torch.empty(0, dtype=torch.bool)

    def listen(matrix: Matrix) -> Callable[..., None]:
        def on_forward(module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> None:
            if not output.requires_grad:  # checkpointing's first run
                return
            activations, carries = inputs[0].detach(), positions.flatten()
            if activations.numel() != carries.numel() * activations.shape[-1]:
                raise ModelError(
                    f"{model.name}: {matrix.name} does not read one vector a token; choose modules without it"
                )

            def on_gradient(gradient: Tensor) -> None:
                see(matrix, _select(activations, carries), _select(gradient, carries))

            output.register_hook(on_gradient)

        return on_forward

    def forward(batch: Batch) -> Predictions:
        nonlocal positions
        positions = carrying(batch)
        return predict(network, batch)

    trainable = [parameter for parameter in network.parameters() if parameter.requires_grad]
    was_training = network.training
    handles = [matrix.module.register_forward_hook(listen(matrix)) for matrix in chosen]
    handles.append(model.anatomy.embedding.register_forward_hook(lambda _, inputs, output: output.requires_grad_(True)))
    network.requires_grad_(False).eval()
    try:
        yield forward
    finally:
        for handle in handles:
            handle.remove()
        for parameter in trainable:
            parameter.requires_grad_(True)
        network.train(was_training)


def uniforms(batch: Batch, seed: int, draw: int = 0) -> Tensor:
    """[N] one number in [0, 1) for each target: it depends on seed, draw, row and place in the row alone.

    So what is sampled is the same at every batch size, padding side and number of processes.
    """
    counts = batch.targets.sum(1).tolist()
    streams = [
        np.random.Generator(np.random.Philox(key=[seed, (draw << 40) + row])).random(count)
        for row, count in zip(batch.rows, counts, strict=True)
    ]
    return torch.from_numpy(np.concatenate(streams))


def backward(logits: Tensor, batch: Batch, seed: int, draw: int, *, last: bool) -> None:
    """Backward from a batch's logits for one draw of labels; after the last, the logits are spent.

    They are as large as all activations together, so the last draw's gradient is written over them.
    """
    out = logits.detach() if last else torch.empty_like(logits)
    logits.backward(sampled_label_gradient(logits, uniforms(batch, seed, draw), out), retain_graph=not last)


def sampled_label_gradient(logits: Tensor, draws: Tensor, out: Tensor | None = None) -> Tensor:
    """[N, V] d/dlogits of -log p(label), labels drawn from the model: p - onehot(label).

    Labels are drawn from the model, never taken from the rows: the second moment of this gradient is then the Fisher
    matrix, which is the Gauss-Newton matrix of the KL (Martens 2020, section 9.2).

    Args:
        logits: [N, V].
        draws: [N] uniform in [0, 1).
        out: [N, V] takes the result; it may be the logits' own memory.

    Raises:
        TrainingError: a logit that is not finite.
    """
    gradient = torch.empty_like(logits) if out is None else out
    step = max(1, CHUNK // logits.shape[1])
    for first in range(0, len(logits), step):
        part = slice(first, first + step)
        probabilities = logits.detach()[part].softmax(-1)
        if not torch.isfinite(probabilities).all():
            raise TrainingError(
                "curvature: the model's predictions on the retain set are not finite; its weights are damaged"
            )
        label = _inverse_cdf(probabilities, draws[part, None].to(probabilities.device))
        gradient[part] = probabilities.scatter_add_(1, label, -torch.ones_like(probabilities[:, :1]))
    return gradient


def _inverse_cdf(probabilities: Tensor, draws: Tensor) -> Tensor:
    """[N, 1] the first index at which the sum of [N, V] probabilities passes [N, 1] draws of their total.

    Sums are fp64; first over buckets, then within one, which is many times faster than over the whole vocabulary.
    """
    buckets = nn.functional.pad(probabilities, (0, -probabilities.shape[1] % BUCKET)).unflatten(1, (-1, BUCKET))
    up_to = buckets.sum(-1, dtype=torch.float64).cumsum(-1)
    total = up_to[:, -1:]
    point = torch.minimum(draws * total, total.nextafter(torch.zeros_like(total)))
    bucket = torch.searchsorted(up_to, point, right=True)
    within = buckets.gather(1, bucket[..., None].expand(-1, 1, BUCKET))[:, 0].cumsum(-1, dtype=torch.float64)
    rest = point - torch.where(bucket > 0, up_to.gather(1, (bucket - 1).clamp(min=0)), 0.0)
    # Rounding must carry neither past the last label that has any probability.
    rest = torch.minimum(rest, within[:, -1:].nextafter(torch.zeros_like(rest)))
    return bucket * BUCKET + torch.searchsorted(within, rest, right=True)


def _select(values: Tensor, carries: Tensor) -> Tensor:
    flat = values.reshape(-1, values.shape[-1])
    return flat if bool(carries.all()) else flat[carries]
