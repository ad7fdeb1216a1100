"""Relearning: does a little fine-tuning bring back what was forgotten, faster than a model that never knew learns it?

Taught are half of the forgotten subjects and asked the others, which nothing that was taught tells of (RTT, Deeb &
Roger 2024, arXiv 2410.08827); or the forget set itself, asked in other words where it has any; or text that has nothing
to do with it (Łucki et al. 2024, arXiv 2409.18025); or retain rows, as any user's fine-tuning might. An attacker would
choose the rate, the steps and the rows that serve best, so there is a grid of them and the worst case counts.

Gold and original learn from the same rows at the same rates: what gold learns is ordinary learning, and what a taught
original no longer says was broken by the teaching.
"""

import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch

from palimpsest.attacks.attack import Attack
from palimpsest.data.batches import Encoded, batch_at, encode
from palimpsest.data.records import QA, Text, reworded, subject_of
from palimpsest.errors import DataError, SpecError, TrainingError
from palimpsest.metrics.likelihood import answer_probability, target_nll
from palimpsest.models.language_model import LanguageModel
from palimpsest.models.scoring import predict
from palimpsest.models.training import TrainingSettings, build_optimizers
from palimpsest.progress import Report
from palimpsest.relearning.judgement import RelearnReport, RelearnSettings
from palimpsest.relearning.protocol import RelearnSpec, relearn, replayed
from palimpsest.unlearn.request import Request

METRIC, LESSON = "answer_probability", "taught_probability"
"""What is compared: the asked answers' probability (geometric mean per token), the mean over rows; and the same of the
rows that were taught."""


@dataclass(frozen=True)
class Lesson:
    """What is taught, and what is asked after it."""

    taught: tuple[Text, ...]
    asked: tuple[QA, ...]


def related(request: Request, seed: int) -> Lesson:
    """Half of the forgotten subjects are taught, drawn by the seed, and the others asked.

    Raises:
        DataError: the forget set has fewer than two subjects, or none of the others' rows is a question.
    """
    subjects = sorted({subject_of(record) for record in request.forget})
    if len(subjects) < 2:
        raise DataError(
            "relearning: the forget set has one subject; at least 2 are needed to teach one and ask another"
        )
    random.Random(f"relearning/{seed}").shuffle(subjects)
    taught = set(subjects[: len(subjects) // 2])
    return Lesson(
        tuple(record for record in request.forget if subject_of(record) in taught),
        tuple(record for record in _questions(request) if subject_of(record) not in taught),
    )


def forget_set(request: Request, seed: int) -> Lesson:
    """The forget set itself is taught, and asked in the wordings never trained on; as it was taught if it has none."""
    return Lesson(request.forget, tuple(reworded(request.forget)) or _questions(request))


def retain_set(request: Request, seed: int) -> Lesson:
    """Retain rows are taught, and the forget set asked."""
    return Lesson(request.retain, _questions(request))


def unrelated(rows: Sequence[Text], request: Request, seed: int) -> Lesson:
    """Rows that have nothing to do with the request are taught, and the forget set asked."""
    return Lesson(tuple(rows), _questions(request))


MakeLesson = Callable[[Request, int], Lesson]
LESSONS: dict[str, MakeLesson] = {"related": related, "forget": forget_set, "retain": retain_set}
"""What can be taught with a request alone, by name."""


@dataclass(frozen=True, kw_only=True)
class Relearning:
    """The grid: every lesson at every rate, each one training run a seed that is looked at after every budget.

    Raises:
        SpecError: an unknown lesson, no rate, or a rate or batch size that is not above 0.
    """

    lessons: tuple[str, ...] = tuple(LESSONS)
    learning_rates: tuple[float, ...] = (1e-4, 1e-3)
    """AdamW's, constant, without weight decay, of fp32 weights."""
    steps: tuple[int, ...] = (0, 2, 5, 10, 20, 40)
    """Budgets, rising."""
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    """Each draws what is taught and in which order, for every model alike."""
    batch_size: int = 8
    examples: int | None = None
    """The most rows that are taught, drawn by the seed; all when None."""
    margin: float = 0.1
    """The share of the way from gold to original that may come back."""

    def __post_init__(self) -> None:
        for name in self.lessons:
            if name not in LESSONS:
                raise SpecError(f"relearning: lesson {name!r} is unknown; choose from {', '.join(LESSONS)}")
        if not self.learning_rates:
            raise SpecError("relearning: learning_rates is empty; give at least one")
        for name, values in (
            ("learning_rates", self.learning_rates),
            ("batch_size", [self.batch_size]),
            ("examples", [] if self.examples is None else [self.examples]),
        ):
            if not all(value > 0 for value in values):
                raise SpecError(f"relearning: {name} is {getattr(self, name)}; it must be above 0")

    def training(self, learning_rate: float, seed: int) -> TrainingSettings:
        """How one of its models is fine-tuned; the steps are counted by whoever does it."""
        return TrainingSettings(
            batch_size=self.batch_size,
            learning_rate=learning_rate,
            betas=(0.9, 0.999),
            weight_decay=0.0,
            warmup=1,
            schedule="constant",
            seed=seed,
        )


class FineTuning:
    """A learner: a copy of a model that is fine-tuned step by step; the model stays as it is.

    As `train` with the same settings, but it goes on from budget to budget with the optimiser's moments as they are.
    """

    def __init__(
        self,
        model: LanguageModel,
        taught: Sequence[Encoded],
        asked: Mapping[str, Sequence[Encoded]],
        settings: TrainingSettings,
    ) -> None:
        """`asked` are rows by the name under which `probe` gives the mean probability of their targets."""
        self.model = model.copy(f"{model.name}, relearned")
        self.model.network.float()
        self.taught, self.asked, self.settings = taught, asked, settings
        self.optimizers = build_optimizers(self.model, settings)
        self.steps = 0

    def fit_to(self, budget: int) -> None:
        """Go on until `budget` steps are done in all.

        Raises:
            TrainingError: a loss or its gradient is not finite.
        """
        self.model.network.train()
        for _ in range(self.steps, budget):
            self._step()
        self.model.network.eval()

    def probe(self) -> dict[str, float]:
        """Mean answer probabilities (geometric mean per token) of what is asked, by name."""
        return {
            name: float(torch.exp(-target_nll(self.model, rows)).double().mean()) for name, rows in self.asked.items()
        }

    def _step(self) -> None:
        settings, parameters = self.settings, list(self.model.network.parameters())
        torch.manual_seed(settings.seed * 1_000_003 + self.steps)
        batch = batch_at(self.taught, self.steps, batch_size=settings.batch_size, seed=settings.seed)
        predictions = predict(self.model.network, batch.to(self.model.device))
        loss = -predictions.logprobs().sum() / len(predictions.targets)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(parameters, settings.clip).item()
        if not (math.isfinite(loss.item()) and math.isfinite(norm)):
            raise TrainingError(
                f"{self.model.name}, step {self.steps + 1}: the loss is {loss.item():g}, its gradient's norm {norm:g}. "
                f"Leave out the learning rate {settings.learning_rate:g}"
            )
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad()
        self.steps += 1


def relearning(
    models: Mapping[str, LanguageModel],
    gold: LanguageModel,
    original: LanguageModel,
    request: Request,
    settings: Relearning,
    *,
    unrelated_rows: Sequence[Text] = (),
    report: Report | None = None,
) -> dict[str, dict[str, RelearnReport]]:
    """What each unlearned model relearns, between gold (floor) and original (ceiling), at every point of the grid.

    Gold and original are trained once a point and seed, however many models there are.

    Args:
        models: unlearned models by name.
        gold: never knew the forget set.
        original: knew it.
        request: what was forgotten.
        settings: the grid.
        unrelated_rows: rows for the lesson `unrelated`, which there is where there are any.
        report: called with (curves done, of how many, a note).

    Returns:
        Reports by model and by point, such as "related, rate 0.0001"; `worst_case` chooses among a model's.

    Raises:
        DataError: the forget set has no question, or too few subjects.
        TrainingError: a loss is not finite.
    """
    lessons = {name: LESSONS[name] for name in settings.lessons}
    if unrelated_rows:
        lessons["unrelated"] = partial(unrelated, unrelated_rows)
    found: dict[str, dict[str, RelearnReport]] = {name: {} for name in models}
    done, in_all = 0, len(lessons) * len(settings.learning_rates) * len(models) * len(settings.seeds) * 3
    for lesson_name, lesson in lessons.items():
        for rate in settings.learning_rates:
            floor, ceiling = (replayed(_maker(model, request, lesson, settings, rate)) for model in (gold, original))
            for name, model in models.items():
                point = f"{lesson_name}, rate {rate:g}"
                spec = RelearnSpec(
                    _protocol(settings, lesson_name, _before(model, request, lesson, settings.seeds)),
                    _maker(model, request, lesson, settings, rate),
                    floor,
                    ceiling,
                    {name: model, "gold": gold, "original": original},
                )
                found[name][point] = relearn(spec, report=_shifted(report, done, in_all, f"{name}: {point}"))
                done += len(settings.seeds) * 3
    return found


def relearning_attack(
    lesson_name: str, request: Request, settings: Relearning, *, learning_rate: float, steps: int, seed: int
) -> Attack:
    """One point of the grid as an attack, so that answers can be looked at row by row.

    Rows of subjects that the seed's lesson taught are asked too, unless the caller leaves them out: `related(request,
    seed).asked` are those that it did not teach.
    """

    def fine_tuned(model: LanguageModel) -> LanguageModel:
        learner = _maker(model, request, LESSONS[lesson_name], settings, learning_rate)(seed)
        learner.fit_to(steps)
        return learner.model

    name = f"relearn_{lesson_name}_{learning_rate:g}_{steps}"
    return Attack.by_copy(name, f"{steps} steps of fine-tuning at {learning_rate:g}", fine_tuned)


def _protocol(settings: Relearning, lesson: str, incumbent: float) -> RelearnSettings:
    # Retain rows and unrelated text are said before the lesson as well as after it, and show no learner's strength.
    tells = lesson in ("related", "forget")
    return RelearnSettings(
        budgets=settings.steps,
        seeds=settings.seeds,
        metric=METRIC,
        want="stay_gone",
        incumbent=incumbent,
        margin=settings.margin,
        lesson=LESSON if tells else None,
    )


def _before(model: LanguageModel, request: Request, lesson: MakeLesson, seeds: Sequence[int]) -> float:
    """What it says before any lesson of what is asked after it: the mean over seeds, which may ask other rows each."""
    asked = [lesson(request, seed).asked for seed in seeds]
    values = [answer_probability(model, rows, template=request.template).double().mean() for rows in asked]
    return float(torch.stack(values).mean())


def _maker(
    model: LanguageModel, request: Request, lesson: MakeLesson, settings: Relearning, rate: float
) -> Callable[[int], FineTuning]:
    def make(seed: int) -> FineTuning:
        given = _few(lesson(request, seed), settings.examples, seed)
        taught, asked = (
            encode(rows, model.tokenizer, template=request.template) for rows in (given.taught, given.asked)
        )
        return FineTuning(model, taught, {METRIC: asked, LESSON: taught}, settings.training(rate, seed))

    return make


def _few(lesson: Lesson, examples: int | None, seed: int) -> Lesson:
    if examples is None or len(lesson.taught) <= examples:
        return lesson
    return replace(lesson, taught=tuple(random.Random(f"examples/{seed}").sample(lesson.taught, examples)))


def _questions(request: Request) -> tuple[QA, ...]:
    questions = tuple(record for record in request.forget if isinstance(record, QA))
    if not questions:
        raise DataError("relearning: the forget set has no question to ask; give it some beside its passages")
    return questions


def _shifted(report: Report | None, done: int, in_all: int, what: str) -> Report | None:
    if report is None:
        return None
    return lambda step, _, note: report(done + step, in_all, f"{what}, {note}")
