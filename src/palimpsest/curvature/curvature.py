"""The curvature of the retain set's KL as one object: fit it, solve with it, keep it."""

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

import torch
from rich.progress import Progress
from torch import Tensor

from palimpsest.curvature.blocks import Block, eigen
from palimpsest.curvature.cache import BlockCache
from palimpsest.curvature.factors import Factors, collect_factors
from palimpsest.curvature.modules import Matrix, matrices, shared_inputs
from palimpsest.curvature.moments import collect_moments
from palimpsest.curvature.plan import Kind, free_memory, memory_plan
from palimpsest.curvature.summary import BlockSummary, summarise, too_few_tokens
from palimpsest.data.batches import Encoded, encode
from palimpsest.data.prompts import Template
from palimpsest.data.records import QA, Record
from palimpsest.errors import SpecError
from palimpsest.models.language_model import LanguageModel
from palimpsest.models.workers import Workers
from palimpsest.progress import Ticker, console, progress


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
    """Positions whose activations it was measured at."""

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
        folder: str | Path | None = None,
        memory: int | None = None,
        display: Progress | None = None,
        quiet: bool = False,
    ) -> "RetainCurvature":
        """Measure it at the model's present weights: one pass over the texts, and a second one for `ekfac`.

        Under `torchrun` or `accelerate launch` every process takes its share of the texts, and all get the same result.

        Args:
            model: whose curvature it is.
            texts: what it is measured on: many more tokens than its widest matrix has inputs.
            modules: patterns of the names of the linear maps inside the blocks, e.g. `*.mlp.*`.
            kind: `kfac`, `ekfac` or `diagonal`.
            template: how questions are put, for texts that are questions.
            seed: of the labels that are sampled.
            draws: labels sampled at every target.
            batch_size: rows at a time; it never changes what is computed.
            folder: keeps what is measured; what is there already for the same model, texts and seed is not measured
                again, and a fit that was stopped goes on at its next group of matrices.
            memory: bytes that it may take at a time; by default most of what is free on the model's device. Matrices
                that do not fit in it together are measured in groups, one pass each, and wait in the host's memory.
            display: an open progress display to be shown on.
            quiet: show nothing.

        Raises:
            SpecError: a kind that is unknown.
            ModelError: a pattern that matches nothing, or a matrix too large for the memory.
            TrainingError: an activation or gradient that is not finite.
            StorageError: a file in the folder is damaged, or cannot be written.
        """
        if kind not in get_args(Kind):
            raise SpecError(f"curvature {kind!r} is unknown; choose {', '.join(get_args(Kind))}")
        encoded, chosen, workers = _encoded(texts, model, template), matrices(model, modules), Workers.here()
        owners = shared_inputs(model, chosen)
        dtype = torch.promote_types(model.network.dtype, torch.float32)
        plan = memory_plan(chosen, owners, kind, dtype.itemsize, memory or free_memory(model.device))
        how = {"kind": kind, "seed": seed, "draws": draws, "type": str(dtype)}
        cache = BlockCache(folder, model, encoded, how) if folder else None
        missing = [group for group in plan.groups if not workers.all(cache is not None and cache.has(group))]
        if missing and not (quiet or display):
            console.print(str(plan), highlight=False)
        home = model.device if len(plan.groups) == 1 else torch.device("cpu")
        blocks: dict[str, Block] = {}
        with nullcontext(display) if display else progress(quiet) as shown:
            n_tokens = sum(len(row.ids) for row in encoded) * (2 if kind == "ekfac" else 1)
            ticker = Ticker(shown, f"{kind} curvature", n_tokens * len(missing) // workers.count, "tokens")
            for group in plan.groups:
                if cache and group not in missing:
                    blocks |= cache.load(group, home)
                    continue
                measured = _measure(model, encoded, group, owners, kind, seed, draws, batch_size, workers, ticker)
                if cache and workers.rank == 0:
                    cache.save(group, measured)
                blocks |= {name: block.to(home) for name, block in measured.items()}
            if display:
                ticker.remove()
        n_targets, n_carrying = sum(row.n_targets for row in encoded), sum(row.stop - 1 for row in encoded)
        found = RetainCurvature(kind, chosen, blocks, n_targets, n_carrying)
        if found.warning and not (quiet or display):
            console.print(f"warning: {found.warning}", style="yellow", highlight=False)
        return found

    @property
    def warning(self) -> str:
        """One line when it was measured at too few tokens; empty otherwise."""
        return too_few_tokens(self.matrices, self.n_carrying)

    def summary(self) -> list[BlockSummary]:
        """Rank and condition of every block."""
        return summarise(self.matrices, self.blocks, self.mean_eigenvalue)

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


def _measure(
    model: LanguageModel,
    encoded: Sequence[Encoded],
    group: Sequence[Matrix],
    owners: Mapping[str, str],
    kind: Kind,
    seed: int,
    draws: int,
    batch_size: int,
    workers: Workers,
    ticker: Ticker,
) -> dict[str, Block]:
    """The blocks of one group of matrices."""
    if kind == "diagonal":
        basis = {matrix.name: Block(None, None, torch.empty(0)) for matrix in group}
    else:
        basis = kfac_blocks(
            collect_factors(
                model,
                encoded,
                group,
                owners,
                seed=seed,
                draws=draws,
                batch_size=batch_size,
                workers=workers,
                ticker=ticker,
            ),
            owners,
        )
    if kind == "kfac":
        return basis
    moments = collect_moments(
        model, encoded, group, basis, seed=seed, draws=draws, batch_size=batch_size, workers=workers, ticker=ticker
    )
    return {name: Block(block.q_out, block.q_in, moments[name]) for name, block in basis.items()}


def kfac_blocks(factors: Factors, owners: Mapping[str, str]) -> dict[str, Block]:
    """Each matrix's eigenbasis and eigenvalues; matrices that read the same inputs share theirs.

    The factors are used up: each is let go of before the next is decomposed.
    """
    read = {name: eigen(factors.inputs.pop(name), name) for name in list(factors.inputs)}
    blocks = {}
    for name in list(factors.outputs):
        (out_values, q_out), (in_values, q_in) = eigen(factors.outputs.pop(name), name), read[owners[name]]
        blocks[name] = Block(q_out, q_in, (out_values, in_values))
    return blocks


def _encoded(
    texts: Sequence[Record] | Sequence[QA] | Sequence[Encoded], model: LanguageModel, template: Template
) -> list[Encoded]:
    rows = [row for row in texts if isinstance(row, Encoded)]
    return rows or encode(texts, model.tokenizer, template=template)  # type: ignore[arg-type]
