"""What a step really costs on the retain set: the quadratic form D' F D with nothing left out between the matrices.

Block-diagonal curvature underestimates it by about the number of matrices, since all of them climb the same loss
together. Shapes: a direction is one tensor [out, in] for each of its matrices.
"""

import warnings
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.func import functional_call

from palimpsest.curvature.modules import Matrix
from palimpsest.curvature.taps import backward, carrying, tapped
from palimpsest.data.batches import Batch, Encoded, batches
from palimpsest.models.language_model import LanguageModel, evaluating
from palimpsest.models.scoring import predict

Direction = Mapping[str, Tensor]
"""[out, in] by the matrix's name."""


def coupling(
    model: LanguageModel,
    encoded: Sequence[Encoded],
    chosen: Sequence[Matrix],
    directions: Sequence[Direction],
    *,
    seed: int = 0,
    draws: int = 1,
    batch_size: int = 32,
) -> Tensor:
    """[k, k] estimates of D_i' F D_j for k directions, in fp64: 1/M times the sum over rows of v v'.

    v [k] is the inner product of a row's gradient with every direction, for labels sampled from the model, so that one
    pass forward and `draws` passes backward serve any number of directions and any attention kernel.
    """
    products = torch.zeros(len(encoded) * draws, len(directions), dtype=torch.float64)
    using = {
        matrix.name: [
            (place, direction[matrix.name]) for place, direction in enumerate(directions) if matrix.name in direction
        ]
        for matrix in chosen
    }
    n_targets, places, rows = 0, torch.empty(0, dtype=torch.long), torch.empty(0, dtype=torch.long)

    def see(matrix: Matrix, activations: Tensor, gradients: Tensor) -> None:
        for place, direction in using[matrix.name]:
            weight, bias = (direction[:, :-1], direction[:, -1]) if matrix.has_bias else (direction, None)
            back = gradients @ weight.to(gradients.dtype)
            each = (back * activations).sum(1) if bias is None else (back * activations).sum(1) + gradients @ bias
            of_row = torch.zeros(len(places), dtype=torch.float64).index_add_(0, rows, each.double().cpu())
            products[places, place] += of_row

    with tapped(model, chosen, see) as forward:
        for batch in batches(encoded, batch_size=batch_size):
            logits = forward(batch.to(model.device)).logits
            rows = torch.repeat_interleave(carrying(batch).sum(1))
            for draw in range(draws):
                places = torch.tensor(batch.rows) * draws + draw
                backward(logits, batch, seed, draw, last=draw + 1 == draws)
            n_targets += len(logits)
    return products.T @ products / (n_targets * draws)


def quadratic_form(
    model: LanguageModel, encoded: Sequence[Encoded], tangent: Mapping[str, Tensor], *, batch_size: int = 32
) -> float:
    """D' F D exactly, nats/target: the mean over targets of the variance of D's effect on the logits under the model.

    By forward-mode differentiation, which attention kernels refuse; they are set to `eager` meanwhile.

    Args:
        model: where the form is taken.
        encoded: the rows.
        tangent: D, named and shaped like parameters.
        batch_size: rows at a time.
    """
    total, n_targets = 0.0, 0
    network = model.network
    kernel = network.config._attn_implementation
    primal = {name: parameter.detach() for name, parameter in network.named_parameters() if name in tangent}
    network.set_attn_implementation("eager")
    try:
        with evaluating(model), torch.inference_mode(False), torch.no_grad(), forward_ad.dual_level():
            with warnings.catch_warnings():  # torch makes its rules on first use, by its deprecated jit.script
                warnings.simplefilter("ignore", DeprecationWarning)
                duals = {name: forward_ad.make_dual(value, tangent[name].to(value)) for name, value in primal.items()}
            for batch in batches(encoded, batch_size=batch_size):
                logits, change = forward_ad.unpack_dual(_logits(model, duals, batch.to(model.device)))
                total += _variance(logits.softmax(-1), change).double().sum().item()
                n_targets += len(logits)
    finally:
        network.set_attn_implementation(kernel)
    return total / n_targets


def _logits(model: LanguageModel, parameters: Mapping[str, Tensor], batch: Batch) -> Tensor:
    class _Call(torch.nn.Module):
        """`predict` as a module, so that `functional_call` can exchange the network's parameters."""

        def __init__(self) -> None:
            super().__init__()
            self.network = model.network

        def forward(self, batch: Batch) -> Tensor:
            return predict(self.network, batch).logits

    return functional_call(_Call(), {f"network.{name}": value for name, value in parameters.items()}, (batch,))


def _variance(probabilities: Tensor, change: Tensor) -> Tensor:
    mean = (probabilities * change).sum(-1, keepdim=True)
    return (probabilities * (change - mean).square()).sum(-1)
