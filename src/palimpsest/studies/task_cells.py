"""What the study of random-label forgetting measures of one seed (Zhang, Choshen & Andreas 2024, arXiv 2409.02228).

Stage one teaches a model many binary tasks at once. Stage two, from there and for each task by itself, goes on with
labels drawn at random (or flipped). Then every task is evaluated on rows that stage two never saw. What the paper
leaves open is set here: all tasks are taught jointly, labels are drawn once, and a hundred rows are trained on for as
many steps as a thousand.
"""

import json
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from palimpsest.data.batches import Encoded, encode
from palimpsest.data.records import QA, Choice
from palimpsest.data.tasks import Task, read_tasks
from palimpsest.errors import SpecError
from palimpsest.files import write_json
from palimpsest.metrics.cloze import cloze, encode_choices
from palimpsest.metrics.probe import probe_accuracy
from palimpsest.models.anatomy import Site
from palimpsest.models.language_model import LanguageModel, load
from palimpsest.models.organism import Architecture, new_model, untrained_like
from palimpsest.models.states import hidden_states
from palimpsest.models.tokenizers import word_tokenizer
from palimpsest.models.training import TrainingSettings, train
from palimpsest.progress import console, progress
from palimpsest.studies.forget_matrix import LEARNED
from palimpsest.worlds.tasks import TasksWorld

Cell = dict[str, Any]
"""What was measured of one model, by name."""
Look = Callable[[LanguageModel, int], None]
"""Given the model and the number of steps it has been trained for."""
Kind = Literal["random", "few", "flipped"]
"""Labels drawn at random for many rows, the same for few, the other label for many."""

FEW, MANY = 100, 1000
"""Rows whose labels are taken away."""
FEWEST_TASKS = 3
"""Of learned ones, below which a matrix says nothing about its rows and columns."""
CROSSED = 0.6
"""The confidence whose crossing dates when an example was learned (upwards) and forgotten (downwards)."""
LOOKS = 24
"""How often confidence is measured on the way, evenly over the steps."""


@dataclass(frozen=True)
class Setting:
    """What one seed of the study starts from."""

    start: LanguageModel
    """Before it was taught."""
    tasks: tuple[Task, ...]
    learning: TrainingSettings
    forgetting: TrainingSettings


def toy(seed: int) -> Setting:
    """A Llama of 0.2 M parameters, from random weights, with twenty generated tasks."""
    world = TasksWorld(seed=seed)
    start = new_model(Architecture(3, 64, 256, 4, 64), word_tokenizer(world.vocabulary_texts()), seed)
    return Setting(
        start,
        world.tasks,
        TrainingSettings(steps=2500, batch_size=128, muon_learning_rate=0.02, warmup=100, seed=seed),
        _forgetting(3e-4, seed),
    )


def given(model: str | Path, tasks: str | Path, seed: int) -> Setting:
    """A model and a folder of multiple-choice tasks; the rate of forgetting and its 1,000 rows are the paper's."""
    learning = TrainingSettings(
        epochs=1, batch_size=16, learning_rate=1e-5, betas=(0.9, 0.999), weight_decay=0.0, warmup=20, seed=seed
    )
    return Setting(load(model), read_tasks(tasks, seed=seed, forget=MANY), learning, _forgetting(1e-4, seed))


def _forgetting(learning_rate: float, seed: int) -> TrainingSettings:
    """Ten epochs of a thousand rows."""
    return TrainingSettings(
        steps=200,
        batch_size=50,
        learning_rate=learning_rate,
        betas=(0.9, 0.999),
        weight_decay=0.0,
        warmup=1,
        schedule="constant",
        seed=seed,
    )


@dataclass(frozen=True)
class Measured:
    """All that is known of one seed."""

    learned: Cell
    forgotten: Mapping[str, Mapping[str, Cell]] = field(repr=False)
    """By kind (`random`, `few`, `flipped`), then by the task that was forgotten."""

    @property
    def tasks(self) -> list[str]:
        """Those that were learned."""
        return [name for name, accuracy in self.learned["accuracy"].items() if accuracy >= LEARNED]


class Seed:
    """Measures one seed; what stands in its folder is not measured again."""

    def __init__(self, setting: Setting, seed: int, folder: Path) -> None:
        self.setting, self.seed, self.folder = setting, seed, folder
        self.layer = probed_layer(setting.start.anatomy.n_layers)

    @cached_property
    def untrained(self) -> LanguageModel:
        """The same architecture with random weights."""
        return untrained_like(self.setting.start, self.seed)

    def measure(self) -> Measured:
        """Teach, then forget each task that was learned, in three ways."""
        learned = self._kept("learned", self._learn)
        model = load(self.folder / "model", check=False)
        tasks = [task for task in self.setting.tasks if learned["accuracy"][task.name] >= LEARNED]
        if len(tasks) < FEWEST_TASKS:
            raise SpecError(
                f"seed {self.seed}: {len(tasks)} of {len(self.setting.tasks)} tasks were learned (accuracy {LEARNED} "
                f"or more on test rows); a matrix needs at least {FEWEST_TASKS}"
            )
        forgotten = {
            kind: {
                task.name: self._kept(f"{kind}/{task.name}", partial(self._forget, model, task, kind)) for task in tasks
            }
            for kind in get_args(Kind)
        }
        return Measured(learned, forgotten)

    def _kept(self, name: str, make: Callable[[], Cell]) -> Cell:
        path = self.folder / f"{name}.json"
        if path.exists():
            cell: Cell = json.loads(path.read_text(encoding="utf-8"))
            return cell
        console.print(f"seed {self.seed}: {name}", highlight=False)
        cell = make()
        write_json(path, cell)
        return cell

    def _learn(self) -> Cell:
        setting = self.setting
        model = setting.start.copy("learned")
        confidences: dict[int, dict[str, list[float]]] = {}

        def look(model: LanguageModel, step: int) -> None:
            confidences[step] = {task.name: confidence(model, task.test) for task in setting.tasks}

        self._train(model, taught_rows(setting.tasks, model), setting.learning, look)
        model.save(self.folder / "model")
        scores = {task.name: cloze(model, task.test) for task in setting.tasks}
        return {
            "rows": {task.name: len(task.test) for task in setting.tasks},
            "accuracy": {name: score.correct.mean().item() for name, score in scores.items()},
            "confidence": {name: score.probability.mean().item() for name, score in scores.items()},
            "variance": {task.name: self._variance(model, task) for task in setting.tasks},
            "learned_at": {
                task.name: crossings({step: all[task.name] for step, all in confidences.items()}, up=True)
                for task in setting.tasks
            },
            "probes": {task.name: self._probes(model, task) for task in setting.tasks},
        }

    def _forget(self, learned: LanguageModel, task: Task, kind: Kind) -> Cell:
        model, rows = learned.copy(f"{task.name}, {kind}"), task.forget[: FEW if kind == "few" else MANY]
        confidences: dict[int, list[float]] = {0: confidence(model, task.test)}

        def look(model: LanguageModel, step: int) -> None:
            confidences[step] = confidence(model, task.test)

        wrong = relabelled(rows, self.seed, flipped=kind == "flipped")
        self._train(
            model,
            encode(answered(wrong), model.tokenizer, template="raw"),
            self.setting.forgetting,
            look if kind == "random" else None,
        )
        evaluated = [task] if kind == "few" else self.setting.tasks
        cell: Cell = {
            "task": task.name,
            "rows": len(rows),
            "train_accuracy": cloze(model, rows).correct.mean().item(),
            "label_fit": cloze(model, wrong).correct.mean().item(),
            "accuracy": {other.name: cloze(model, other.test).correct.mean().item() for other in evaluated},
        }
        if kind == "random":
            cell["forgotten_at"] = crossings(confidences, up=False)
            cell["probe"] = self._probe(self._features(model, task.forget), self._features(model, task.test), task)
        return cell

    def _train(
        self, model: LanguageModel, rows: Sequence[Encoded], settings: TrainingSettings, look: Look | None
    ) -> None:
        n_steps = settings.n_steps(len(rows))
        every = max(1, n_steps // LOOKS)
        with progress() as display:
            shown = display.add_task(f"training {model.name}", total=n_steps, note="")
            train(
                model,
                rows,
                settings,
                report=lambda step, _, note: display.update(shown, completed=step, note=note),
                after_step=lambda step: look(model, step) if look and step % every == 0 else None,
            )

    def _variance(self, model: LanguageModel, task: Task) -> float:
        """Trace of the covariance of the hidden states at the question's last token; no label is looked at."""
        encoded = encode_choices(task.test, model.tokenizer)[::2]
        states = hidden_states(model, encoded, Site("resid", self.layer), [row.start - 1 for row in encoded])
        return states.var(0, correction=1).sum().item()

    def _probes(self, model: LanguageModel, task: Task) -> Cell:
        """The probe on the model that learned, and its controls."""
        train_, test = self._features(model, task.forget), self._features(model, task.test)
        raw = self.untrained
        return {
            "learned": self._probe(train_, test, task),
            "untrained": self._probe(self._features(raw, task.forget), self._features(raw, task.test), task),
            "words": self._probe(*_bags_of_words(task, model), task),
            "shuffled": self._probe(train_, test, task, shuffled=True),
        }

    def _features(self, model: LanguageModel, rows: Sequence[Choice]) -> NDArray[np.float32]:
        """[n, 2, d] the hidden state at the end of each of two candidates."""
        encoded = encode_choices(rows, model.tokenizer)
        states = hidden_states(model, encoded, Site("resid", self.layer), [row.stop - 1 for row in encoded])
        return states.reshape(len(rows), 2, -1).numpy()

    def _probe(
        self, train_: NDArray[np.float32], test: NDArray[np.float32], task: Task, *, shuffled: bool = False
    ) -> float:
        right = np.array([row.answer for row in task.forget])
        if shuffled:
            np.random.default_rng(self.seed).shuffle(right)
        return probe_accuracy(train_, right, test, np.array([row.answer for row in task.test]))


def probed_layer(n_layers: int) -> int:
    """The fifth block from the end, counted from 0 (`hidden_states[-5]` of transformers); the last but one of few."""
    return n_layers - 5 if n_layers >= 10 else max(0, n_layers - 2)


def confidence(model: LanguageModel, rows: Sequence[Choice]) -> list[float]:
    """[n] the right choice's share of the probability of both."""
    return [round(value, 4) for value in cloze(model, rows).probability.tolist()]


def answered(rows: Sequence[Choice]) -> list[QA]:
    """Each question with its answer."""
    return [QA(row.question, row.choices[row.answer], id=row.id) for row in rows]


def taught_rows(tasks: Sequence[Task], model: LanguageModel) -> list[Encoded]:
    """Every task's rows with their answers, small tasks repeated until each has as many rows as the largest."""
    most = max(len(task.taught) for task in tasks)
    rows = [task.taught[place % len(task.taught)] for task in tasks for place in range(most)]
    return encode(answered(rows), model.tokenizer, template="raw")


def relabelled(rows: Sequence[Choice], seed: int, *, flipped: bool = False) -> list[Choice]:
    """The rows with labels drawn evenly from both choices, once for each row, or with the other choice."""
    if flipped:
        return [replace(row, answer=1 - row.answer) for row in rows]
    return [replace(row, answer=random.Random(f"label/{seed}/{row.id}").randrange(2)) for row in rows]


def crossings(confidences: Mapping[int, Sequence[float]], *, up: bool) -> list[int | None]:
    """[n] the first step at which each example's confidence was beyond `CROSSED`; None if it never was."""
    steps = sorted(confidences)
    columns = zip(*(confidences[step] for step in steps), strict=True)
    return [
        next((step for step, value in zip(steps, column, strict=True) if (value >= CROSSED) == up), None)
        for column in columns
    ]


def _bags_of_words(task: Task, model: LanguageModel) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """[n, 2, words] how often each token occurs in question and candidate."""
    train_, test = (encode_choices(rows, model.tokenizer) for rows in (task.forget, task.test))
    places = {token: place for place, token in enumerate(sorted({t for row in (*train_, *test) for t in row.ids}))}

    def bags(encoded: Sequence[Encoded]) -> NDArray[np.float32]:
        counts = np.zeros((len(encoded), len(places)), np.float32)
        for line, row in enumerate(encoded):
            np.add.at(counts[line], [places[token] for token in row.ids], 1)
        return counts.reshape(-1, 2, len(places))

    return bags(train_), bags(test)
