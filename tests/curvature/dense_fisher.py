"""Curvature written out in float64: Jacobians and per-row gradients by autograd, one unpadded row at a time.

A matrix is vectorised row by row, [out, in] with a bias as its last column, so that S (x) A is `torch.kron(S, A)`.
"""

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from tests.models.tiny_families import tiny, tiny_tokenizer
from torch import Tensor, nn
from torch.func import functional_call, jacrev
from transformers.pytorch_utils import Conv1D

from palimpsest.curvature.factors import Factors, collect_factors
from palimpsest.curvature.modules import Matrix, matrices, shared_inputs
from palimpsest.curvature.taps import uniforms
from palimpsest.data.batches import Batch, Encoded, collate
from palimpsest.models.anatomy import Anatomy
from palimpsest.models.language_model import LanguageModel
from palimpsest.models.workers import Workers
from palimpsest.progress import Ticker

VOCABULARY = 11
SMALL = {"vocab_size": VOCABULARY, "hidden_size": 8, "num_hidden_layers": 2}
INNER = {"gpt2": {"n_inner": 12}, "llama": {"intermediate_size": 12}}
EXACT = {"gpt2": 1e-12, "llama": 1e-6}
"""Relative tolerance: transformers' Llama takes norms in fp32 whatever type its weights have, GPT-2 does not."""
SPANS = ((5, 2, 5), (8, 4, 7), (6, 1, 6), (3, 2, 3))
"""(tokens, first target, end of targets): prompts of several lengths, and one row that goes on after its targets."""
N_CARRYING, N_TARGETS = 4 + 6 + 5 + 2, 3 + 3 + 5 + 1


def small_model(family: str = "gpt2", **changes: object) -> LanguageModel:
    """About a thousand random weights in float64."""
    network = tiny(family, **(SMALL | INNER.get(family, {}) | changes)).double()
    return LanguageModel(network, tiny_tokenizer(), Anatomy.of(network), family)


def small_rows(spans: Sequence[tuple[int, int, int]] = SPANS, seed: int = 0) -> list[Encoded]:
    """Rows of random tokens."""
    rng = np.random.default_rng(seed)
    return [Encoded(tuple(rng.integers(3, VOCABULARY, length).tolist()), start, stop) for length, start, stop in spans]


def silent() -> Ticker:
    """Progress that nobody sees."""
    return Ticker(None, "", 0, "")


def relative(found: Tensor, expected: Tensor) -> float:
    """Norm of the difference over the norm of what is expected."""
    return float((found - expected).norm() / expected.norm())


class LeftPadded(Workers):
    """One worker that pads on the left and takes the rows as they come."""

    def batches(self, encoded: Sequence[Encoded], batch_size: int) -> Iterator[Batch]:
        for first in range(0, len(encoded), batch_size):
            rows = range(first, min(first + batch_size, len(encoded)))
            yield collate([encoded[row] for row in rows], rows, side="left")


def fit_factors(
    model: LanguageModel,
    rows: Sequence[Encoded],
    patterns: Sequence[str] = ("*",),
    *,
    seed: int = 0,
    draws: int = 1,
    batch_size: int = 2,
    workers: Workers | None = None,
) -> tuple[tuple[Matrix, ...], dict[str, str], Factors]:
    """The library's matrices, the owners of their inputs, and the factors."""
    chosen = matrices(model, patterns)
    owners = shared_inputs(model, chosen)
    how = {"seed": seed, "draws": draws, "batch_size": batch_size, "workers": workers or Workers(), "ticker": silent()}
    return chosen, owners, collect_factors(model, rows, chosen, owners, **how)


def logits_of(network: nn.Module, row: Encoded) -> Tensor:
    """[N, V] at the row's targets: the plain forward pass of one row, in the network's own type."""
    ids = torch.tensor([row.ids])
    logits = network(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits[0]
    return logits[row.start - 1 : row.stop - 1]


def as_matrix(module: nn.Module, weight: Tensor, bias: Tensor | None) -> Tensor:
    """[..., out, in] of a module's weight and bias with any leading dimensions."""
    weight = weight.transpose(-1, -2) if isinstance(module, Conv1D) else weight
    return weight if bias is None else torch.cat([weight, bias[..., None]], -1)


def jacobian(model: LanguageModel, row: Encoded, name: str) -> Tensor:
    """[N, V, out * in] of one row's logits by one matrix."""
    network, module = model.network, model.network.get_submodule(name)
    ids = torch.tensor([row.ids])
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "use_cache": False}

    def logits(parameters: dict[str, Tensor]) -> Tensor:
        return functional_call(network, parameters, kwargs=inputs).logits[0, row.start - 1 : row.stop - 1]

    if hasattr(network, "set_attn_implementation"):  # the fast kernels have no batched derivative
        network.set_attn_implementation("eager")
    slopes = jacrev(logits)({f"{name}.{part}": value.detach() for part, value in module.named_parameters()})
    return as_matrix(module, slopes[f"{name}.weight"], slopes.get(f"{name}.bias")).flatten(2).detach()


def exact_fisher(model: LanguageModel, rows: Sequence[Encoded], names: Sequence[str]) -> Tensor:
    """[P, P] the Gauss-Newton matrix of the KL over these matrices together: 1/M * sum of J'(diag p - pp')J."""
    total: Tensor | float = 0.0
    for row in rows:
        slopes = torch.cat([jacobian(model, row, name) for name in names], -1)
        p = logits_of(model.network, row).detach().softmax(-1)
        middle = torch.diag_embed(p) - p[:, :, None] * p[:, None]
        total = total + (slopes.transpose(1, 2) @ middle @ slopes).sum(0)
    return total / sum(row.n_targets for row in rows)


def drawn_label_gradient(logits: Tensor, points: np.ndarray) -> Tensor:
    """[N, V] p - onehot(label), in fp32 as the library's logits are, labels by inversion of the cumulative in numpy."""
    gradient = logits.detach().float().softmax(-1).numpy()
    for line, point in zip(gradient, points, strict=True):
        cumulative = np.cumsum(line.astype(np.float64))
        line[np.searchsorted(cumulative, point * cumulative[-1], side="right")] -= 1
    return torch.from_numpy(gradient).to(logits)


def row_gradients(model: LanguageModel, rows: Sequence[Encoded], *, seed: int = 0, draws: int = 1) -> dict[str, Tensor]:
    """[rows * draws, out, in] by linear map: the gradient of each row's -log p(labels), labels as the library draws."""
    modules = {name: part for name, part in model.network.named_modules() if isinstance(part, nn.Linear | Conv1D)}
    found: dict[str, list[Tensor]] = {name: [] for name in modules}
    for place, row in enumerate(rows):
        for draw in range(draws):
            model.network.zero_grad()
            logits = logits_of(model.network, row)
            points = uniforms(collate([row], [place]), seed, draw).numpy()
            logits.backward(drawn_label_gradient(logits, points))
            for name, module in modules.items():
                bias = getattr(module, "bias", None)
                found[name].append(as_matrix(module, module.weight.grad, None if bias is None else bias.grad))
    model.network.zero_grad()
    return {name: torch.stack(values) for name, values in found.items()}


def sampled_fisher(gradients: dict[str, Tensor], names: Sequence[str], n_labels: int) -> Tensor:
    """[P, P] second moment of the rows' gradients over these matrices together, per sampled label."""
    flat = torch.cat([gradients[name].flatten(1) for name in names], 1)
    return flat.T @ flat / n_labels
