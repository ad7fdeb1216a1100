"""What the study of recovery measures of one seed's models: every attack, relearning's curves, and cheap inner scores.

Gold and the original are attacked like the others: they are the ends of the scale on which a recovery is read.
"""

from collections.abc import Sequence
from functools import cached_property
from statistics import mean

import torch
from torch import Tensor

from palimpsest.attacks.attack import Attack, attacked
from palimpsest.attacks.directions import direction_attacks
from palimpsest.attacks.perturbation import perturbation_attacks
from palimpsest.attacks.prompts import prompt_attacks
from palimpsest.attacks.quantisation import quantisation_attacks
from palimpsest.attacks.relearn import LESSON, LESSONS, METRIC, FineTuning, Relearning
from palimpsest.data.batches import encode
from palimpsest.data.records import QA
from palimpsest.internals.depth import logprob_drops, unlearning_depth
from palimpsest.internals.recovery import patching_recovery
from palimpsest.models.language_model import LanguageModel
from palimpsest.studies.cells import Cell
from palimpsest.studies.unlearned_models import UnlearnedModels

GRID = Relearning(learning_rates=(3e-4, 1e-3), steps=(0, 5, 10, 20, 40))
"""Each seed's models relearn once at every point, with that seed."""


class Bench(UnlearnedModels):
    """Attacks one seed's models."""

    def measured(self, model: LanguageModel) -> Cell:
        """Under every attack, and what is cheaply seen inside."""
        return self.behaviour(model) | {
            "attacked": self._attacked(model),
            "relearning": {
                f"{lesson}, rate {rate:g}": self._relearning(model, lesson, rate)
                for lesson in GRID.lessons
                for rate in GRID.learning_rates
            },
            "inside": self._inside(model),
        }

    @cached_property
    def gold_drops(self) -> Tensor:
        """[n, L] the scale of every depth."""
        return logprob_drops(self.setting.gold, self.setting.original, self.rows)

    @cached_property
    def attacks(self) -> list[Attack]:
        """All but relearning, which has a budget."""
        request, tokenizer = self.setting.request, self.setting.original.tokenizer
        kept: Sequence[QA] = [record for record in request.retain if isinstance(record, QA)]
        forget, retain = (encode(rows, tokenizer, template=request.template) for rows in (self.forget, kept))
        return [
            *quantisation_attacks(),
            *perturbation_attacks(seed=self.seed),
            *prompt_attacks(self.forget, kept, template=request.template, seed=self.seed),
            *direction_attacks(
                forget, retain, n_layers=self.setting.original.anatomy.n_layers, original=self.setting.original
            ),
        ]

    def _attacked(self, model: LanguageModel) -> Cell:
        """The forgotten answers' mean probability, by attack."""
        values: dict[str, list[float]] = {}
        for row in attacked(self.attacks, {model.name: model}, self.forget, template=self.setting.request.template):
            values.setdefault(row.measure.split("/")[1], []).append(row.value)
        return {name: mean(found) for name, found in values.items()}

    def _relearning(self, model: LanguageModel, lesson_name: str, rate: float) -> Cell:
        """By budget: the probability of what is asked, and of what was taught."""
        request = self.setting.request
        lesson = LESSONS[lesson_name](request, self.seed)
        taught, asked = (
            encode(rows, model.tokenizer, template=request.template) for rows in (lesson.taught, lesson.asked)
        )
        learner = FineTuning(model, taught, {METRIC: asked, LESSON: taught}, GRID.training(rate, self.seed))
        curves: Cell = {"asked": [], "taught": []}
        for budget in GRID.steps:
            learner.fit_to(budget)
            probed = learner.probe()
            curves["asked"].append(probed[METRIC])
            curves["taught"].append(probed[LESSON])
        return curves

    def _inside(self, model: LanguageModel) -> Cell:
        """Scores that need no training; each is larger the more is gone."""
        sites = frozenset(model.anatomy.sites("coef", "attn"))
        (patched,) = patching_recovery(self.setting.original, model, self.rows, [sites])
        depth = unlearning_depth(self.gold_drops, model, self.setting.original, self.rows).score
        drift = torch.cat(
            [
                (ours - theirs).flatten()
                for ours, theirs in zip(
                    model.network.parameters(), self.setting.original.network.parameters(), strict=True
                )
            ]
        ).norm()
        return {
            "depth": depth,
            "not_patched_back": None if patched.lpr is None else 1 - patched.lpr,
            "distance": drift.item(),
            "silence": -self.probability(model, self.forget),
        }
