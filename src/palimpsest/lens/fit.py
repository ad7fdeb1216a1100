"""Fitting a lens: moments of the residual stream, a closed form, and a few steps down the KL from there."""

import random
import time
from collections.abc import Iterator, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Literal

import torch

from palimpsest.curvature.plan import readable
from palimpsest.data.batches import Encoded
from palimpsest.data.overlap import told_of
from palimpsest.data.prompts import Template
from palimpsest.data.records import Record, records_hash
from palimpsest.errors import DataError, SpecError, TrainingError
from palimpsest.files import content_hash
from palimpsest.lens.hidden import Hidden, read_layers, windows
from palimpsest.lens.jacobian import mean_jacobians
from palimpsest.lens.kept import Kept
from palimpsest.lens.lens import Lens
from palimpsest.lens.readout import Readout
from palimpsest.lens.refine import Refinement
from palimpsest.lens.ridge import Moments, ridge
from palimpsest.models.checkpoint import Checkpoints
from palimpsest.models.language_model import LanguageModel
from palimpsest.models.workers import Workers
from palimpsest.progress import Ticker, console, progress

HELD_OUT = 0.1
"""Share of the rows on which the lens is measured and its layers are stopped."""
MEASURED = 4096
"""Tokens of them, at most."""
CACHE_BYTES = 2_000_000_000
"""For residual streams that are kept for the steps; the closed form sees all tokens, the steps these."""


def fit(
    model: LanguageModel,
    texts: Sequence[Record],
    *,
    kind: Literal["ridge", "tuned", "jacobian"] = "tuned",
    forget: Sequence[Record] = (),
    template: Template = "plain",
    penalty: float = 1.0,
    damping: float = 5.0,
    steps: int = 160,
    tokens_per_step: int = 2048,
    seed: int = 0,
    folder: str | Path | None = None,
    quiet: bool = False,
) -> Lens:
    """Fit a lens to a model on texts that look like what it will be read on.

    `ridge` is the closed form; `tuned` goes on from there down KL(model || lens), each layer until it gains no more;
    `jacobian` is the model's own mean derivative.
    Under `torchrun` or `accelerate launch` every process takes its share of the texts, and all get the same lens.

    Args:
        model: whose layers are to be read; its weights are not touched.
        texts: retain or neutral text. A lens fitted on the forget set stores it.
        kind: `ridge`, `tuned` or `jacobian`.
        forget: what must not be among the texts; it is looked for by subject and by shared words.
        template: how questions among the texts are put.
        penalty: of the closed form, on the squared change from the identity, in mean variances of the residual stream.
        damping: of the steps, in mean eigenvalues of the moments of what a map reads and of the KL's gradient. Less of
            it lowers the KL, as more steps do, and lets the lens read more of what merely goes along with the answer
            (`causal_basis.calibration`).
        steps: at most.
        tokens_per_step: tokens of each.
        seed: of the held-out split, the batches and the labels of the curvature.
        folder: keeps the state between rounds of steps, so that a fit that was stopped goes on.
        quiet: show nothing.

    Raises:
        DataError: there are no two rows of text, or they tell of the forget set.
        SpecError: a setting that means nothing.
        TrainingError: a residual stream that is not finite.
        StorageError: the state cannot be written.
    """
    _refuse_settings(kind, penalty, damping, steps, tokens_per_step)
    if told := told_of(texts, forget):
        raise DataError(
            f"{len(told)} of {len(texts)} texts tell of the forget set ({', '.join(told[:3])}); a lens fitted on them "
            "would store it. Take them out, or leave out `forget` if that is what you want"
        )
    started, workers, readout = time.monotonic(), Workers.here(), Readout.of(model)
    n_steps = steps if kind == "tuned" else 0
    train, held_out = _split(windows(texts, model, template), seed, workers.count)
    a_token = 4 * (model.anatomy.n_layers + 3) * model.anatomy.d_model
    n_kept = len(_within(train, min(n_steps * tokens_per_step, CACHE_BYTES // a_token), workers.count))
    judged_rows = _within(held_out, MEASURED, workers.count)
    if not quiet and workers.rank == 0:
        kept_bytes = a_token * (_tokens(train[:n_kept]) + _tokens(judged_rows))
        moments_bytes = 0 if kind == "jacobian" else 16 * model.anatomy.n_layers * model.anatomy.d_model**2
        steps_planned = f", {n_steps} steps of {tokens_per_step:,} at most" if n_steps else ""
        console.print(
            f"{kind} lens: {_tokens(train):,} tokens to fit to, {_tokens(judged_rows):,} to measure on{steps_planned}; "
            f"takes {readable(kept_bytes + moments_bytes)}",
            highlight=False,
        )
    asked = {
        "kind": kind,
        "penalty": penalty,
        "damping": damping,
        "steps": n_steps,
        "tokens_per_step": tokens_per_step,
        "seed": seed,
        "template": template,
        "texts": records_hash(texts),
        "tokens": _tokens(train),
        "model": model.fingerprint(),
    }
    with progress(quiet or workers.rank > 0) as display:
        judged = Kept.of(model, judged_rows, readout, workers)
        ticker = Ticker(display, "reading the residual stream", _tokens(train), "tokens")
        if kind == "jacobian":
            changes, biases = mean_jacobians(model, train, seed=seed, workers=workers, ticker=ticker)
        else:
            moments, kept = _gather(model, train, n_kept, readout, workers, ticker)
            changes, biases = ridge(moments, penalty)
        maps = torch.cat([changes, biases[:, :, None]], 2).to(judged.layers)
        kls = {"logit": judged.kls(dict(enumerate(torch.zeros_like(maps))), readout)}
        kls["ridge" if kind == "tuned" else kind] = start = judged.kls(dict(enumerate(maps)), readout)
        if kind == "tuned":
            checkpoints = Checkpoints(folder, content_hash(asked)) if folder else None
            run = Refinement(kept, judged, readout, maps, start, damping, seed, tokens_per_step, workers)
            maps, kls["tuned"] = run.to_the_end(steps, checkpoints, display)
    found = {name: list(kl.values()) for name, kl in kls.items()}
    provenance = asked | {"held_out_tokens": judged.n_tokens, "kl": found, "seconds": time.monotonic() - started}
    maps = maps.float()
    return Lens(kind, len(maps), readout.hash(), maps[:, :, :-1].contiguous(), maps[:, :, -1].contiguous(), provenance)


def _gather(
    model: LanguageModel, train: Sequence[Encoded], n_kept: int, readout: Readout, workers: Workers, ticker: Ticker
) -> tuple[Moments, Kept]:
    """Moments of all rows, and the first `n_kept` rows themselves, in one pass."""
    moments = Moments.of(model)

    def read(rows: Sequence[Encoded]) -> Iterator[Hidden]:
        for hidden in read_layers(model, rows[workers.rank :: workers.count]):
            if not torch.isfinite(hidden.layers).all():
                raise TrainingError(f"{model.name}: its residual stream is not finite; the model is damaged")
            moments.add(hidden.layers)
            ticker.advance(hidden.layers.shape[1] * workers.count)
            yield hidden

    kept = Kept.joined(read(train[:n_kept]), train[:n_kept], readout, workers)
    for _ in read(train[n_kept:]):
        pass
    moments.share(workers)
    return moments, kept


def _tokens(rows: Sequence[Encoded]) -> int:
    return sum(len(row.ids) for row in rows)


def _within(rows: Sequence[Encoded], tokens: int, at_least: int) -> Sequence[Encoded]:
    """As many of the first rows as have so many tokens, and at least so many."""
    totals = accumulate(len(row.ids) for row in rows)
    return rows[: max(at_least, sum(total <= tokens for total in totals))]


def _split(rows: list[Encoded], seed: int, n_processes: int) -> tuple[list[Encoded], list[Encoded]]:
    """Rows to fit to, and rows to measure on; each process has one of both at least."""
    if len(rows) < 2 * n_processes:
        raise DataError(
            f"a lens is fitted to some rows of text and measured on others, by each of {n_processes} processes, but "
            f"there are {len(rows)} rows in all; give more text"
        )
    random.Random(f"lens split/{seed}").shuffle(rows)
    n = max(n_processes, round(HELD_OUT * len(rows)))
    return rows[n:], rows[:n]


def _refuse_settings(kind: str, penalty: float, damping: float, steps: int, tokens_per_step: int) -> None:
    if kind not in ("ridge", "tuned", "jacobian"):
        raise SpecError(f"lens: kind {kind!r} is unknown; choose ridge, tuned or jacobian")
    settings = {"penalty": penalty, "damping": damping, "steps": steps, "tokens_per_step": tokens_per_step}
    for name, value in settings.items():
        if not value > 0:
            raise SpecError(f"lens: {name} is {value}; it must be above 0")
