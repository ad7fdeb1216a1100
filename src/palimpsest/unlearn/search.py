"""Every method tuned by the same rule and at the same price, so that a comparison is not one of who was tuned.

A trial runs the method down to the forget level that was asked for. Of the trials that reach it, the best is the one
that did least harm to the held-out retain rows; the rows that the audit judges by are never looked at. The first trial
has the method's own settings, the others are proposed by TPE (Bergstra et al. 2011) from the trials before.
"""

import json
import math
import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from palimpsest.errors import EvidenceError, SpecError, TrainingError
from palimpsest.files import canonical_json, content_hash, refuse_foreign_folder, write_json, write_text
from palimpsest.models.language_model import LanguageModel
from palimpsest.progress import console
from palimpsest.unlearn.method import Method
from palimpsest.unlearn.request import Request
from palimpsest.unlearn.stopping import Stop
from palimpsest.unlearn.update import Update


@dataclass(frozen=True)
class Between:
    """Any number from `low` to `high`, evenly on a logarithmic scale unless `log` is false.

    Raises:
        SpecError: there is no such range, or no logarithm of it.
    """

    low: float
    high: float
    log: bool = True

    def __post_init__(self) -> None:
        if not self.low < self.high or (self.log and self.low <= 0):
            scale = "logarithmic range above 0" if self.log else "range"
            raise SpecError(f"{self.low} to {self.high} is no {scale}; name a lower and a higher number")


Space = Mapping[str, Between | tuple[Any, ...]]
"""What may be chosen for each setting: a range, or one of a few values. Settings not named keep their defaults."""

_RATE_AND_BATCH: Space = {"learning_rate": Between(1e-5, 3e-3), "batch_size": (4, 8, 16, 32)}
_RETAIN: Space = {"retain_weight": Between(0.1, 100), "retain_term": ("nll", "kl")}

SPACES: dict[str, Space] = {
    "kfade": {"forget_copies": (1, 4), "pull_backs": (1, 3)},
    "grad_ascent": _RATE_AND_BATCH,
    "grad_diff": {**_RATE_AND_BATCH, **_RETAIN},
    "npo": {**_RATE_AND_BATCH, **_RETAIN, "beta": Between(0.01, 3)},
    "simnpo": {**_RATE_AND_BATCH, **_RETAIN, "beta": Between(0.5, 10), "gamma": Between(0, 3, log=False)},
    "kl_min": {**_RATE_AND_BATCH, "retain_weight": Between(0.1, 100)},
    "wga": {**_RATE_AND_BATCH, **_RETAIN, "beta": Between(0.1, 10)},
    "satimp": {**_RATE_AND_BATCH, **_RETAIN, "saturation": Between(0.1, 10), "importance": Between(0.1, 10)},
    "npo_tokenmean": {**_RATE_AND_BATCH, **_RETAIN, "beta": Between(0.01, 10)},
    "npo_sam": {**_RATE_AND_BATCH, **_RETAIN, "beta": Between(0.01, 3), "rho": Between(1e-3, 1)},
    "dpo": {**_RATE_AND_BATCH, **_RETAIN, "beta": Between(0.01, 3)},
    "altpo": {**_RATE_AND_BATCH, **_RETAIN, "beta": Between(0.01, 3)},
    "random_labels": {**_RATE_AND_BATCH, **_RETAIN, "labels": ("fixed", "resampled")},
    "idk": {**_RATE_AND_BATCH, **_RETAIN},
    "undial": {**_RATE_AND_BATCH, "strength": Between(1, 30), "retain_weight": (0.0, 0.1, 1.0, 10.0)},
    "ceu": _RATE_AND_BATCH,
    "whp": {**_RATE_AND_BATCH, **_RETAIN, "alpha": Between(1, 30)},
    "pdu": {**_RATE_AND_BATCH, "dual_step": Between(0.01, 10)},
    "rmu": {**_RATE_AND_BATCH, "coefficient": Between(1, 100), "alpha": Between(0.1, 1000)},
}
"""Where to look, by method. RMU's layer is left to the caller, who knows the model's depth: `{"layer": (1, 2, 3)}`."""


@dataclass(frozen=True)
class Trial:
    """One run of a method, and where it ended."""

    settings: dict[str, Any]
    """Those that were searched."""
    reached: bool
    """Whether it came down to the forget level."""
    forget_probability: float | None
    """Mean answer probability on the forget set; None where the run broke off."""
    dev_kl: float | None
    """KL(start || model) on held-out retain answers, nats/token; None where the run broke off."""
    seconds: float
    stopped: str
    """Why it ended, for people."""

    @property
    def order(self) -> tuple[int, float]:
        """Smaller is better: the least harm among those that reached the level, then the nearest to it."""
        if self.forget_probability is None or self.dev_kl is None:
            return 2, 0.0
        return (0, self.dev_kl) if self.reached else (1, self.forget_probability)


@dataclass(frozen=True, eq=False)
class Searched:
    """What a search found."""

    method: Method
    """With the best trial's settings."""
    update: Update
    best: Trial
    """If `best.reached` is false no trial came down to the level, and this one came nearest."""
    trials: tuple[Trial, ...]
    """In the order in which they were run."""


def search(
    method: Method,
    space: Space,
    model: LanguageModel,
    request: Request,
    stop: Stop,
    trials: int,
    seed: int,
    *,
    folder: str | Path | None = None,
) -> Searched:
    """Run a method `trials` times and give back the best, lexicographically: the level first, then KL on dev rows.

    A trial's settings follow from the seed and the trials before it alone.

    Args:
        method: which method, with the settings of the first trial and those that are not searched; its seed is the
            search's.
        space: what may be chosen for its settings; see `SPACES`.
        model: the model to start from; it is left as it was.
        request: what to forget and keep. The dev rows are its `retain_held_out`.
        stop: the forget level, and the most that a trial may take.
        trials: how many runs, the first with the method's own settings; no two have the same, so where all choices are
            among a few values there are at most as many as their combinations.
        seed: of the proposals and of every run.
        folder: keeps `trials.jsonl`, a line a trial, and the best update. A search that was killed or is asked for
            more trials goes on from there.

    Raises:
        SpecError: optuna is missing, `stop` has no forget level, the space does not fit the method, or the folder
            holds another search.
        TrainingError: every run broke off.
        EvidenceError: what the folder holds cannot be read.
        StorageError: the folder holds other files, or cannot be written.
    """
    method, trials = replace(method, seed=seed), min(trials, _size(space))
    _refuse_unless_searchable(method, space, stop, trials)
    asked = {
        "method": method.settings(),
        "space": {name: _plain(choice) for name, choice in space.items()},
        "stop": asdict(stop),
        "seed": seed,
        "request": request.hash,
        "base": model.fingerprint(),
    }
    record = _Record(Path(folder), asked, trials) if folder else None
    done, update = record.read() if record else ([], None)
    for number in range(len(done), trials):
        settings = _proposed(method, space, done, seed)
        trial, made = _tried(replace(method, **settings), settings, model, request, stop)
        done.append(trial)
        if made and _best(done) == number:
            update = made
            if record:
                record.keep(number, made)
        if record:
            record.write(done)
        _say(f"{method.name}, trial {number + 1} of {trials}", trial)
    best = done[_best(done)]
    if update is None:
        raise TrainingError(f"{method.name}: no trial of {trials} came to an end; the best of them: {best.stopped}")
    return Searched(replace(method, **best.settings), update, best, tuple(done))


def _refuse_unless_searchable(method: Method, space: Space, stop: Stop, trials: int) -> None:
    name, defaults = method.name, method.settings()
    if trials > 1 and find_spec("optuna") is None:
        raise SpecError("a search needs optuna, which is not installed; pip install palimpsest[search]")
    if stop.forget_probability is None:
        raise SpecError(f"{name}: a search compares trials at one forget level, but stop has no forget_probability")
    if trials < 1:
        raise SpecError(f"{name}: a search of {trials} trials finds nothing; ask for at least 1")
    for setting, choice in space.items():
        if setting not in method.setting_names():
            known = ", ".join(method.setting_names())
            raise SpecError(f"{name}: has no setting {setting!r} to search; it has {known}")
        if not _holds(choice, defaults[setting]):
            raise SpecError(
                f"{name}: the first trial has {setting} {defaults[setting]}, which is not in its space, "
                f"{_plain(choice)}; widen it"
            )


def _holds(choice: Between | tuple[Any, ...], value: Any) -> bool:
    return choice.low <= value <= choice.high if isinstance(choice, Between) else value in choice


def _size(space: Space) -> int:
    """How many different settings there are."""
    return math.prod(sys.maxsize if isinstance(choice, Between) else len(choice) for choice in space.values())


def _plain(choice: Between | tuple[Any, ...]) -> Any:
    return asdict(choice) if isinstance(choice, Between) else list(choice)


def _proposed(method: Method, space: Space, done: Sequence[Trial], seed: int) -> dict[str, Any]:
    """The next trial's settings, a function of its arguments alone."""
    if not done:
        defaults = method.settings()
        return {name: defaults[name] for name in space}
    import optuna
    from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution

    distributions: dict[str, BaseDistribution] = {
        name: FloatDistribution(choice.low, choice.high, log=choice.log)
        if isinstance(choice, Between)
        else CategoricalDistribution(choice)
        for name, choice in space.items()
    }
    tried = [trial.settings for trial in done]
    # TPE looks at the order of the values only, so a trial's value is its place.
    places = sorted(range(len(done)), key=lambda number: done[number].order)
    verbosity = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        study = optuna.create_study(sampler=optuna.samplers.TPESampler(seed=seed * 1_000_003 + len(done)))
        for number, trial in enumerate(done):
            study.add_trial(
                optuna.trial.create_trial(
                    params=trial.settings, distributions=distributions, value=float(places.index(number))
                )
            )
        while (proposed := study.ask(distributions).params) in tried:
            pass
        return proposed
    finally:
        optuna.logging.set_verbosity(verbosity)


def _tried(
    method: Method, settings: dict[str, Any], model: LanguageModel, request: Request, stop: Stop
) -> tuple[Trial, Update | None]:
    started = time.monotonic()
    try:
        update = method.run(model, request, stop)
    except TrainingError as error:
        return Trial(settings, False, None, None, time.monotonic() - started, str(error)), None
    seconds, last = time.monotonic() - started, update.provenance["trace"][-1]
    forget = last["forget_probability"]
    reached = stop.forget_probability is not None and forget <= stop.forget_probability
    return Trial(settings, reached, forget, last["retain_kl"], seconds, update.provenance["stopped"]), update


def _best(trials: Sequence[Trial]) -> int:
    """The place of the best trial; the first of equals."""
    return min(range(len(trials)), key=lambda number: trials[number].order)


def _say(which: str, trial: Trial) -> None:
    found = "broke off" if trial.dev_kl is None else f"forget {trial.forget_probability:.3f}, dev KL {trial.dev_kl:.3f}"
    note = "" if trial.reached or trial.dev_kl is None else ", short of the level"
    console.print(f"{which}: {found}{note} ({trial.seconds:.0f} s)", markup=False, highlight=False)


class _Record:
    """The folder of a search: `search.json` says which, `trials.jsonl` has a line a trial, `update-N` is trial N's.

    Raises:
        SpecError: the folder holds another search, or more trials than are asked for.
        StorageError: the folder holds other files.
    """

    def __init__(self, folder: Path, asked: Mapping[str, Any], trials: int) -> None:
        refuse_foreign_folder(folder, "search.json")
        self.folder, self.asked, self.n = folder, asked, trials

    def read(self) -> tuple[list[Trial], Update | None]:
        """The trials that are done and the best one's update."""
        if not (self.folder / "search.json").exists():
            write_json(self.folder / "search.json", self.asked)
        path = self.folder / "trials.jsonl"
        try:
            before = json.loads((self.folder / "search.json").read_text(encoding="utf-8"))
            lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
            trials = [Trial(**json.loads(line)) for line in lines]
        except (OSError, ValueError, TypeError) as error:
            raise EvidenceError(f"{self.folder}: its search cannot be read ({error}); restore or remove it") from error
        if content_hash(before) != content_hash(self.asked):
            raise SpecError(f"{self.folder}: holds another search (see search.json); choose another folder")
        if len(trials) > self.n:
            raise SpecError(
                f"{self.folder}: holds {len(trials)} trials already; ask for as many, or choose another folder"
            )
        broken = all(trial.dev_kl is None for trial in trials)
        return trials, None if broken else Update.load(self.folder / f"update-{_best(trials)}")

    def keep(self, number: int, update: Update) -> None:
        """Save the best trial's update, before the trial is written: what is on record can be had."""
        update.save(self.folder / f"update-{number}")

    def write(self, trials: Sequence[Trial]) -> None:
        """Put the trials on record, whole or not at all; updates that are no longer the best go."""
        write_text(self.folder / "trials.jsonl", "".join(canonical_json(asdict(trial)) + "\n" for trial in trials))
        for folder in self.folder.glob("update-*"):
            if folder.name != f"update-{_best(trials)}":
                shutil.rmtree(folder, ignore_errors=True)
