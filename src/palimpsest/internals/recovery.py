"""How much of what unlearning took comes back when parts of the original are put into the unlearned model.

Four forms of the Knowledge Recovery Score (Hong et al. 2024, arXiv 2410.06606). Each is 1 - loss after / loss
before, the loss being how far the predictions of an answer are from the original's, so 1 is the original, 0 no change,
and less than 0 further away. The original's activations carry the answer in, so a model that never unlearned anything
gives high scores too; a score is read beside that of a sham (`minus_sham`).
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from palimpsest.data.batches import Encoded, batches
from palimpsest.internals.patching import MEMORY, Plan, Positions, patched_predictions, refuse_unlike
from palimpsest.internals.recording import Recording, residual_stream
from palimpsest.models.anatomy import Site
from palimpsest.models.language_model import LanguageModel
from palimpsest.models.scoring import Predictions
from palimpsest.progress import Report

NOTHING = 1e-6
"""A loss of no more than this is none: there is nothing to recover, and a ratio to it says nothing."""


@dataclass(frozen=True, eq=False)
class LossRecovery:
    """By one loss, the share of it that is gone again, in n rows."""

    before: Tensor
    """[n] the unlearned model's loss, fp32 on the CPU."""
    after: Tensor
    """[n] its loss once parts of the original were put in."""
    nothing: float = NOTHING
    """Rows that lost no more than this do not count. Where there is a sham, its median loss is a better bound."""

    @property
    def counted(self) -> Tensor:
        """[n] bool, the rows with something to recover."""
        return self.before > self.nothing

    @property
    def excluded(self) -> int:
        """How many rows have nothing to recover."""
        return int((~self.counted).sum())

    @property
    def by_row(self) -> Tensor:
        """[n] 1 - after / before; NaN in rows that do not count."""
        return (1 - self.after / self.before).where(self.counted, torch.nan)

    @property
    def mean(self) -> float | None:
        """The mean over the rows that count; None where there are none.

        It is not bounded below, and a row that lost little may decide it.
        """
        return float(self.by_row[self.counted].double().mean()) if self.counted.any() else None

    @property
    def of_sums(self) -> float | None:
        """1 - sum of after / sum of before, over the rows that count: every row weighs what it lost."""
        return float(self.weighted_by_row[self.counted].double().mean()) if self.counted.any() else None

    @property
    def weighted_by_row(self) -> Tensor:
        """[n] values whose mean over the rows that count is `of_sums`; NaN in those that do not."""
        weights = self.before / self.before[self.counted].mean()
        return (weights - self.after / self.before[self.counted].mean()).where(self.counted, torch.nan)


@dataclass(frozen=True, eq=False)
class KnowledgeRecovery:
    """What putting parts of the original into an unlearned model recovers of n answers, by three losses."""

    mse: LossRecovery
    """Of the logits: the mean squared difference over the vocabulary and the answer's tokens."""
    kl: LossRecovery
    """KL(original || model), nats a token; unlike the squares it does not see logits that rise or fall together."""
    logprob: LossRecovery
    """What is missing of the answer's log-probability, nats a token; negative where the model knows it better. The only
    loss that is about the fact and not about the whole distribution."""

    @property
    def krs(self) -> float | None:
        """The paper's Knowledge Recovery Score: by squares of logits, the mean of the rows' ratios."""
        return self.mse.mean

    @property
    def krs_of_sums(self) -> float | None:
        """The same as a ratio of sums, which no row that lost almost nothing can upset."""
        return self.mse.of_sums

    @property
    def krs_kl(self) -> float | None:
        """By the KL, as a ratio of sums."""
        return self.kl.of_sums

    @property
    def lpr(self) -> float | None:
        """Log-probability recovery, sum(after - before) / sum(original - before), over the rows that lost any."""
        return self.logprob.of_sums


def minus_sham(unlearned: LossRecovery, sham: LossRecovery) -> Tensor:
    """[n] what the unlearned model recovers in a row beyond what a sham does; NaN where either has nothing to recover.

    Args:
        unlearned: n rows.
        sham: the same rows, of the original trained on retain data alone for as many steps.
    """
    return unlearned.by_row - sham.by_row


def patching_recovery(
    original: LanguageModel,
    unlearned: LanguageModel,
    rows: Sequence[Encoded],
    plans: Sequence[Plan],
    *,
    positions: Positions = "all",
    batch_size: int = 16,
    memory: int = MEMORY,
    report: Report | None = None,
) -> list[KnowledgeRecovery]:
    """What each plan recovers, if the original's activations are patched into the unlearned model.

    Args:
        original: whose activations are put in, and whose predictions are the goal.
        unlearned: the model that is patched.
        rows: n rows whose targets are the answers.
        plans: what is patched together, see `window_plans`.
        positions: where.
        batch_size: rows at a time; it changes nothing.
        memory: bytes, see `patching.MEMORY`; it changes nothing.
        report: called with (plans done, of how many, a note), a plan once for every batch.

    Raises:
        ModelError: the models are not built alike, or have no such site.
        DataError: a row is longer than the positions that the model was made for.
    """
    sites = list(dict.fromkeys(site for plan in plans for site in plan))

    def patch(goal: Recording, before: Recording) -> Iterator[tuple[int, Predictions]]:
        return patched_predictions(goal, before, plans, positions=positions, memory=memory)

    return recoveries(original, unlearned, rows, len(plans), patch, sites=sites, batch_size=batch_size, report=report)


def recoveries(
    original: LanguageModel,
    unlearned: LanguageModel,
    rows: Sequence[Encoded],
    n_changes: int,
    change: Callable[[Recording, Recording], Iterator[tuple[int, Predictions]]],
    *,
    sites: Sequence[Site] = (),
    batch_size: int = 16,
    report: Report | None = None,
) -> list[KnowledgeRecovery]:
    """What each of so many changes of the unlearned model recovers.

    Args:
        original: the goal.
        unlearned: the model that is changed.
        rows: n rows whose targets are the answers.
        n_changes: how many there are.
        change: from a batch's recordings of the original and the unlearned model, each change's place and predictions.
        sites: what the original's recording holds; the other holds the residual stream.
        batch_size: rows at a time; it changes nothing.
        report: called with (changes done, of how many, a note), a change once for every batch.

    Raises:
        ModelError: the models are not built alike, or have no such site.
        DataError: a row is longer than the positions that the model was made for.
    """
    refuse_unlike(original, unlearned)
    after, before, done = torch.empty(n_changes, 3, len(rows)), torch.empty(3, len(rows)), 0
    in_all = n_changes * -(-len(rows) // batch_size)
    for batch in batches(rows, batch_size=batch_size):
        goal = Recording.of(original, batch, sites)
        start = Recording.of(unlearned, batch, residual_stream(unlearned.anatomy))
        own, target = list(batch.rows), _Goal.of(goal.predictions, unlearned.device)
        before[:, own] = target.losses(start.predictions, len(own))
        for place, predictions in change(goal, start):
            after[place, :, own] = target.losses(predictions, len(own))
            done += 1
            if report:
                report(done, in_all, f"row {own[-1] + 1}")
    return [KnowledgeRecovery(*map(LossRecovery, before, losses)) for losses in after]


@dataclass(frozen=True, eq=False)
class _Goal:
    """What the original predicts at N answer tokens, in the forms that every change is compared with."""

    logits: Tensor
    logprobs: Tensor
    probabilities: Tensor
    possible: Tensor | None
    """[N, V] where the probability is not 0; None where that is everywhere. What is ruled out adds nothing to a KL."""
    said: Tensor
    """[N] log-probability of the answer's token."""

    @staticmethod
    def of(predictions: Predictions, device: torch.device) -> "_Goal":
        logits = predictions.logits.to(device)
        logprobs = logits.log_softmax(-1)
        said = _of_targets(logprobs, predictions.targets.to(device))
        possible = logprobs > -torch.inf
        return _Goal(logits, logprobs, logprobs.exp(), None if possible.all() else possible, said)

    def losses(self, predictions: Predictions, n_rows: int) -> Tensor:
        """[3, B] the rows' distances: squares of logits, KL, missing log-probability; fp32 on the CPU."""
        logprobs = predictions.logits.log_softmax(-1)
        terms = (self.logprobs - logprobs).mul_(self.probabilities)
        if self.possible is not None:
            terms = terms.where(self.possible, 0.0)
        by_token = (
            functional.mse_loss(predictions.logits, self.logits, reduction="none").mean(-1),
            terms.sum(-1),
            self.said - _of_targets(logprobs, predictions.targets),
        )
        mse, kl, missing = (predictions.mean_by_row(values, n_rows) for values in by_token)
        return torch.stack([mse, kl.clamp(min=0), missing]).cpu()


def _of_targets(logprobs: Tensor, targets: Tensor) -> Tensor:
    """[N] of [N, V] at the targets [N]."""
    return logprobs.gather(-1, targets[:, None])[:, 0]
