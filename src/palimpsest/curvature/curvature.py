"""The curvature of the retain set's KL as one object: fit it, solve with it, keep it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from palimpsest.curvature.blocks import Block, eigen
from palimpsest.curvature.factors import Factors, collect_factors
from palimpsest.curvature.modules import Matrix, matrices, shared_inputs
from palimpsest.curvature.moments import collect_moments
from palimpsest.curvature.workers import Workers
from palimpsest.data.batches import Encoded, encode
from palimpsest.data.prompts import Template
from palimpsest.data.records import QA, Record
from palimpsest.errors import SpecError
from palimpsest.models.language_model import LanguageModel
from palimpsest.progress import Ticker, progress

Kind = Literal["kfac", "ekfac", "diagonal"]


@dataclass(frozen=True, eq=False)
class RetainCurvature:
    """The Gauss-Newton matrix of the mean KL per target on a set of texts, one block a matrix.

    For a small change D of the weights, KL(model || model + D) is about D' F D / 2, nats per target; block-diagonal
    curvature leaves the matrices' joint effect out and so underestimates it by about their number
    (`quadratic.coupling` measures what it leaves out).
    """

    kind: Kind
    matrices: tuple[Matrix, ...]
    blocks: dict[str, Block]
    """By the matrix's name."""
    n_targets: int
    n_carrying: int

    @staticmethod
    def fit(
        model: LanguageModel,
        texts: Sequence[Record] | Sequence[QA] | Sequence[Encoded],
        *,
        modules: Sequence[str] = ("*",),
        kind: Kind = "kfac",
        template: Template = "plain",
        seed: int = 0,
        draws: int = 1,
        batch_size: int = 32,
        quiet: bool = False,
    ) -> "RetainCurvature":
        """Measure it at the model's present weights: one pass over the texts, and a second one for `ekfac`."""
        if kind not in get_args(Kind):
            raise SpecError(f"curvature {kind!r} is unknown; choose {', '.join(get_args(Kind))}")
        encoded = _encoded(texts, model, template)
        chosen = matrices(model, modules)
        how = {"seed": seed, "draws": draws, "batch_size": batch_size, "workers": Workers.here()}
        n_tokens = sum(len(row.ids) for row in encoded)
        passes = 2 if kind == "ekfac" else 1
        with progress(quiet) as display:
            ticker = Ticker(display, f"{kind} curvature", n_tokens * passes, "tokens")
            if kind == "diagonal":
                plain = {matrix.name: Block(None, None, torch.empty(0)) for matrix in chosen}
                moments = collect_moments(model, encoded, chosen, plain, **how, ticker=ticker)
                blocks = {name: Block(None, None, moment) for name, moment in moments.items()}
                n_targets = sum(row.n_targets for row in encoded)
                return RetainCurvature(kind, chosen, blocks, n_targets, 0)
            owners = shared_inputs(model, chosen)
            factors = collect_factors(model, encoded, chosen, owners, **how, ticker=ticker)
            blocks = kfac_blocks(factors, owners)
            if kind == "ekfac":
                moments = collect_moments(model, encoded, chosen, blocks, **how, ticker=ticker)
                blocks = {name: Block(b.q_out, b.q_in, moments[name]) for name, b in blocks.items()}
        return RetainCurvature(kind, chosen, blocks, factors.n_targets, factors.n_carrying)

    @property
    def mean_eigenvalue(self) -> float:
        """Trace over the number of parameters: the unit of damping."""
        n_parameters = sum(rows * columns for rows, columns in (matrix.shape for matrix in self.matrices))
        return sum(block.trace for block in self.blocks.values()) / n_parameters

    def solve(self, gradient: Mapping[str, Tensor], damping: float) -> dict[str, Tensor]:
        """(F + damping * mean eigenvalue * I)^-1 applied to a gradient named like parameters, for the matrices' own."""
        absolute = damping * self.mean_eigenvalue
        solved: dict[str, Tensor] = {}
        for matrix in self.matrices:
            direction = self.blocks[matrix.name].solve(matrix.gather(gradient), absolute)
            solved |= matrix.scatter(direction)
        return solved


def kfac_blocks(factors: Factors, owners: Mapping[str, str]) -> dict[str, Block]:
    """Each matrix's eigenbasis and eigenvalues; matrices that read the same inputs share theirs."""
    read = {name: eigen(factor, name) for name, factor in factors.inputs.items()}
    blocks = {}
    for name, factor in factors.outputs.items():
        (out_values, q_out), (in_values, q_in) = eigen(factor, name), read[owners[name]]
        blocks[name] = Block(q_out, q_in, (out_values, in_values))
    return blocks


def _encoded(
    texts: Sequence[Record] | Sequence[QA] | Sequence[Encoded], model: LanguageModel, template: Template
) -> list[Encoded]:
    rows = [row for row in texts if isinstance(row, Encoded)]
    return rows or encode(texts, model.tokenizer, template=template)  # type: ignore[arg-type]
