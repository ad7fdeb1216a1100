"""From the residual stream to the vocabulary: what a lens reads with, and the KL that it is fitted and judged by.

The vocabulary is gone through in pieces, so nothing of its size is kept. The teacher enters a KL only through the mean
of its unembedding rows and its entropy, which are worked out once a token and serve every layer; the KL's gradient is
the student's mean less the teacher's. No autograd through the vocabulary is needed.

Shapes: N tokens, d the model's width, V the vocabulary. z [N, d] stands after the final norm.
"""

import hashlib
from collections.abc import Iterator
from copy import deepcopy
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from palimpsest.curvature.taps import sampled_label_gradient
from palimpsest.models.language_model import LanguageModel, tensor_bytes

PIECE = 4096
"""Vocabulary entries at a time."""
TOKENS = 512
"""Tokens at a time."""
SAMPLED = 64
"""Tokens at a time where all of their logits are needed at once."""


@dataclass(frozen=True, eq=False)
class Expectation:
    """Of N predictions over the vocabulary, what a KL needs of them."""

    log_partition: Tensor
    """[N] log of the sum of exp(logit)."""
    logit: Tensor
    """[N] mean logit."""
    row: Tensor
    """[N, d] mean of d logit / d z, the unembedding's rows but for the logits' scale and cap."""

    @property
    def entropy(self) -> Tensor:
        """[N] nats."""
        return self.log_partition - self.logit


@dataclass(frozen=True, eq=False)
class Teacher:
    """The model's own predictions at N tokens."""

    z: Tensor
    """[N, d] its residual stream after the final norm."""
    expected: Expectation

    def take(self, tokens: Tensor) -> "Teacher":
        """Some of the tokens, by their places."""
        expected = self.expected
        return Teacher(
            self.z[tokens],
            Expectation(expected.log_partition[tokens], expected.logit[tokens], expected.row[tokens]),
        )


@dataclass(frozen=True, eq=False)
class Readout:
    """A model's final norm and unembedding, frozen; the unembedding is the model's own tensor, not a copy."""

    norm: nn.Module
    weight: Tensor
    """[V, d]"""
    bias: Tensor | None
    """[V]"""
    scale: float
    cap: float | None
    """Logits are cap(scale * (weight z + bias)); cap(x) is cap * tanh(x / cap)."""
    precision: torch.dtype
    """Of norms and sums: fp32, or the weights' own type where that has more digits."""
    products: torch.dtype
    """In which z and the unembedding are multiplied; bf16 is fast, and good for gradients alone."""

    @staticmethod
    def of(model: LanguageModel) -> "Readout":
        """A model's readout, with products in its `precision`."""
        head = model.anatomy.unembedding
        weight = head.get_parameter("weight").detach()
        bias = getattr(head, "bias", None)
        precision = torch.promote_types(weight.dtype, torch.float32)
        norm = deepcopy(model.anatomy.final_norm).to(precision).requires_grad_(False)
        return Readout(
            norm,
            weight,
            None if bias is None else bias.detach(),
            model.anatomy.logit_scale,
            model.anatomy.logit_cap,
            precision,
            precision,
        )

    def with_products(self, products: torch.dtype) -> "Readout":
        """The same readout with its products in another type."""
        return replace(self, products=products)

    def hash(self) -> str:
        """SHA-256 (hex) over every byte of unembedding and norm, and over scale and cap."""
        digest = hashlib.sha256(f"{self.scale} {self.cap}".encode())
        for name, tensor in [("weight", self.weight), ("bias", self.bias), *self.norm.named_parameters()]:
            if tensor is not None:
                digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
                digest.update(tensor_bytes(tensor))
        return digest.hexdigest()

    def z(self, residual: Tensor) -> Tensor:
        """[..., d] the residual stream after the final norm; gradients flow."""
        normed: Tensor = self.norm(residual.to(self.precision))
        return normed

    def logits(self, z: Tensor) -> Tensor:
        """[N, V] all logits at once, for a few tokens."""
        return torch.cat([logits for logits, _ in self._pieces(z)], dim=-1)

    def teacher(self, residual: Tensor) -> Teacher:
        """The model's predictions from what its final norm reads, [N, d]."""
        z = self.z(residual)
        return Teacher(z, self.expected(z))

    def expected(self, z: Tensor) -> Expectation:
        """What a KL needs of the predictions at z [N, d], by one running softmax over the vocabulary."""
        return _joined([self._expected(some) for some in z.split(TOKENS)])

    def kl(self, z: Tensor, teacher: Teacher) -> Tensor:
        """KL(teacher || student) [N], nats a token, for the student's z [N, d]."""
        if self.cap is None:
            log_partition = torch.cat([self._log_partition(some) for some in z.split(TOKENS)])
            return log_partition - self._mean_logit(z, teacher) - teacher.expected.entropy
        return self.kl_and_slope(z, teacher)[0]

    def kl_and_slope(self, z: Tensor, teacher: Teacher) -> tuple[Tensor, Tensor]:
        """KL(teacher || student) [N], and its gradient [N, d] in the student's z [N, d]: twice `kl`'s products."""
        student = self.expected(z)
        if self.cap is None:
            cross, row = self._mean_logit(z, teacher), teacher.expected.row
        else:
            found = [self._crossed(*some) for some in zip(z.split(TOKENS), _split(teacher), strict=True)]
            cross, row = (torch.cat(parts) for parts in zip(*found, strict=True))
        return student.log_partition - cross - teacher.expected.entropy, student.row - row

    def sampled(self, z: Tensor, uniform: Tensor) -> Tensor:
        """[N, d] d log p(label) / d z for one label drawn from each prediction, by a number [N] in [0, 1) each."""
        scores = []
        for some, where in zip(z.split(SAMPLED), uniform.split(SAMPLED), strict=True):
            pieces = list(self._pieces(some))
            gradient = sampled_label_gradient(torch.cat([logits for logits, _ in pieces], dim=-1), where)
            weights = gradient.split(PIECE, dim=-1)
            rows = [slopes_times(part) for (_, slopes_times), part in zip(pieces, weights, strict=True)]
            scores.append(-torch.stack(rows).sum(0))
        return torch.cat(scores)

    def _mean_logit(self, z: Tensor, teacher: Teacher) -> Tensor:
        """[N] the student's, under the teacher: without a cap logits are linear in z, so its mean row tells."""
        return teacher.expected.logit + ((z - teacher.z) * teacher.expected.row).sum(-1)

    def _log_partition(self, z: Tensor) -> Tensor:
        found = z.new_full((len(z),), -torch.inf)
        for logits, _ in self._pieces(z):
            found = torch.logaddexp(found, logits.logsumexp(-1))
        return found

    def _expected(self, z: Tensor) -> Expectation:
        largest = z.new_full((len(z), 1), -torch.inf)
        total, logit, row = z.new_zeros(len(z), 1), z.new_zeros(len(z), 1), torch.zeros_like(z)
        for logits, slopes_times in self._pieces(z):
            higher = torch.maximum(largest, logits.amax(-1, keepdim=True))
            shrink = (largest - higher).exp_()
            weights = (logits - higher).exp_()
            total = total * shrink + weights.sum(-1, keepdim=True)
            logit = logit * shrink + (weights * logits).sum(-1, keepdim=True)
            row = row * shrink + slopes_times(weights)
            largest = higher
        return Expectation((largest + total.log()).squeeze(1), (logit / total).squeeze(1), row / total)

    def _crossed(self, z: Tensor, teacher: Teacher) -> tuple[Tensor, Tensor]:
        """[N] the student's mean logit, and [N, d] mean row, under the teacher's predictions."""
        cross, row = z.new_zeros(len(z)), torch.zeros_like(z)
        for (logits, slopes_times), (theirs, _) in zip(self._pieces(z), self._pieces(teacher.z), strict=True):
            weights = (theirs - teacher.expected.log_partition[:, None]).exp_()
            cross += (weights * logits).sum(-1)
            row += slopes_times(weights)
        return cross, row

    def _pieces(self, z: Tensor) -> Iterator[tuple[Tensor, "_SlopesTimes"]]:
        """Logits [N, piece] of piece after piece, and what turns weights of that shape into mean rows."""
        for start in range(0, len(self.weight), PIECE):
            rows = self.weight[start : start + PIECE].to(self.products)
            logits = (z.to(self.products) @ rows.T).to(self.precision)
            if self.bias is not None:
                logits = logits + self.bias[start : start + PIECE].to(self.precision)
            if self.scale != 1:
                logits = logits * self.scale
            slopes = None
            if self.cap is not None:
                squashed = torch.tanh(logits / self.cap)
                logits, slopes = self.cap * squashed, 1 - squashed.square()
            yield logits, _SlopesTimes(rows, self.scale, slopes, self.precision)


@dataclass(frozen=True, eq=False)
class _SlopesTimes:
    """Weights over one piece of the vocabulary, times how each logit changes with z."""

    rows: Tensor
    scale: float
    slopes: Tensor | None
    precision: torch.dtype

    def __call__(self, weights: Tensor) -> Tensor:
        if self.slopes is not None:
            weights = weights * self.slopes
        return (weights.to(self.rows.dtype) @ self.rows).to(self.precision) * self.scale


def _joined(parts: list[Expectation]) -> Expectation:
    return Expectation(
        torch.cat([part.log_partition for part in parts]),
        torch.cat([part.logit for part in parts]),
        torch.cat([part.row for part in parts]),
    )


def _split(teacher: Teacher) -> Iterator[Teacher]:
    for tokens in torch.arange(len(teacher.z), device=teacher.z.device).split(TOKENS):
        yield teacher.take(tokens)
