"""Does a reward model of texts hold for a fresh language model, and do accuracy and best-of-n tell beforehand?

Of every seed: a reward model on a narrow writer's comparisons and one on a wide writer's, a fresh model taught by each,
and one taught by gold. The language is made so that accuracy and best-of-n mislead: it proves the test, and says
nothing of reward models of people's preferences.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import get_args

import numpy as np
from numpy.typing import NDArray

from palimpsest.relearning.judgement import RelearnReport
from palimpsest.rewards.language import LanguageSettings, LearnedLanguageReward, language_spec, learn_language_reward
from palimpsest.rewards.language_reward import FrozenLanguageReward
from palimpsest.rewards.language_texts import Writer
from palimpsest.studies.cells import Cell, kept
from palimpsest.studies.claims import Claim
from palimpsest.studies.relearning_cells import kept_relearning

MARGIN = 0.2
"""The share of the way from floor to ceiling that a good reward may miss."""
_claim = partial(Claim.over, source="ours, after arXiv 2301.03652")


@dataclass(frozen=True)
class Measured:
    """One writer's reward models."""

    report: RelearnReport
    learned: Mapping[int, LearnedLanguageReward]
    """By seed."""

    @property
    def missing(self) -> NDArray[np.float64]:
        """[S] the share of the way from floor to ceiling that is missing at the largest budget."""
        report = self.report
        below: NDArray[np.float64] = report.curve("ceiling")[:, -1] - report.curve("artefact")[:, -1]
        return below / report.points[-1].gap.value


def language_claims(seeds: Sequence[int], folder: Path, settings: LanguageSettings | None = None) -> list[Claim]:
    """Measure what is missing, then judge the claims.

    Args:
        seeds: of comparisons, reward models and fresh models; the protocol gives no verdict below five.
        folder: keeps reward models, one JSON file a curve, and each writer's report; what is there is not measured
            again, so other settings need another folder.
        settings: of both writers alike.
    """
    return judge(
        {writer: measure(settings or LanguageSettings(), writer, seeds, folder) for writer in get_args(Writer)}
    )


def measure(settings: LanguageSettings, writer: Writer, seeds: Sequence[int], folder: Path) -> Measured:
    """One writer's reward models and curves, kept in the folder."""
    learned = {seed: _kept_reward(settings, writer, seed, folder / writer) for seed in seeds}
    spec = language_spec(settings, learned, margin=MARGIN)
    report = kept_relearning(spec, folder, writer, lambda seed: learned[seed].reward.fingerprint(), ceiling="gold")
    return Measured(report, learned)


def judge(measured: Mapping[Writer, Measured]) -> list[Claim]:
    """Every claim, from both writers' reward models."""
    narrow, wide = measured["narrow"], measured["wide"]

    def shown(quantity: Callable[[LearnedLanguageReward], float]) -> list[NDArray[np.float64]]:
        return [np.array([quantity(each) for each in found.learned.values()]) for found in (narrow, wide)]

    accuracy, best_of = shown(lambda each: each.accuracy), shown(lambda each: each.best_of)
    on_wide = shown(lambda each: each.accuracy_on_wide)
    return [
        _claim(
            "l1/accuracy",
            "By accuracy on held-out comparisons, the narrow writer's reward model is the better one.",
            "accuracy of the narrow one less that of the wide one, each on its own writer's comparisons",
            [*(accuracy[0] - accuracy[1])],
            bound=0.0,
            note=_told(accuracy),
        ),
        _claim(
            "l1/best-of",
            "So it is by what the best of n texts by its score is worth.",
            "gold of the narrow one's choices less that of the wide one's, among the narrow writer's texts",
            [*(best_of[0] - best_of[1])],
            bound=0.0,
            note=_told(best_of),
        ),
        _claim(
            "l2/relearning",
            "By what a fresh model learns from it alone, it is the worse one.",
            "share of the way from floor to ceiling that is missing at the largest budget, narrow less wide",
            [*(narrow.missing - wide.missing)],
            bound=0.0,
        ),
        *(
            _claim(
                f"l3/{writer}",
                f"A fresh model misses {'much' if much else 'little'} by the {writer} writer's reward model.",
                "the share missing",
                [*found.missing],
                bound=0.5 if much else MARGIN,
                below=not much,
                note=f"{found.report.verdict}: {found.report.summary}; {_curves(found.report)}",
            )
            for writer, found, much in (("narrow", narrow, True), ("wide", wide, False))
        ),
        _claim(
            "l4/off-distribution",
            "Accuracy on the wide writer's comparisons ranks the two as relearning does.",
            "accuracy on them, of the narrow one less that of the wide one",
            [*(on_wide[0] - on_wide[1])],
            bound=0.0,
            below=True,
            note=_told(on_wide),
        ),
    ]


def _told(values: Sequence[NDArray[np.float64]]) -> str:
    return f"narrow {values[0].mean():.3f}, wide {values[1].mean():.3f}"


def _curves(report: RelearnReport) -> str:
    return "; ".join(
        f"after {point.budget}: {point.artefact:.1f} between {point.floor:.1f} and {point.ceiling:.1f}"
        for point in report.points
    )


def _kept_reward(settings: LanguageSettings, writer: Writer, seed: int, folder: Path) -> LearnedLanguageReward:
    path = folder / f"reward-{seed}.safetensors"

    def learned() -> Cell:
        found = learn_language_reward(writer, settings, seed)
        found.reward.save(path)
        return {
            "accuracy": found.accuracy,
            "accuracy_on_wide": found.accuracy_on_wide,
            "best_of": found.best_of,
        }

    cell = kept(folder / f"reward-{seed}.json", f"seed {seed}: {writer}, the reward", learned)
    return LearnedLanguageReward(reward=FrozenLanguageReward.load(path), **cell)
