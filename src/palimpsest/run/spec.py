"""The specification of a run, read from YAML: strict, with errors that name the key and the nearest known one."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import yaml
from pydantic import (
    BaseModel,
    BeforeValidator,
    Field,
    TypeAdapter,
    ValidationError,
    model_validator,
)
from pydantic_core import to_jsonable_python

from palimpsest.data.prompts import Template
from palimpsest.errors import SpecError
from palimpsest.models.organism import Architecture, Recipe
from palimpsest.models.training import TrainingSettings
from palimpsest.run.data import FactsSource, FileSource, Strict, TofuSource, WmdpSource
from palimpsest.run.lenses import LensKind
from palimpsest.run.mistakes import explain, nearest
from palimpsest.unlearn.method import Method
from palimpsest.unlearn.methods import METHODS
from palimpsest.unlearn.stopping import Stop


class TrainedModel(Strict):
    """A model made here, with its gold, from scratch."""

    kind: Literal["train"] = "train"
    architecture: Architecture = Architecture()
    tokenizer: Literal["words", "bpe"] = "words"
    vocab_size: int = Field(2048, ge=300)
    pack: int | None = Field(64, ge=2)
    training: TrainingSettings = TrainingSettings()

    def recipe(self) -> Recipe:
        """As the organism's recipe."""
        return Recipe(self.architecture, self.tokenizer, self.vocab_size, self.pack, self.training)


class GivenModel(Strict):
    """A model that exists, with gold and sham where they exist."""

    kind: Literal["load"]
    path: str
    gold: str | None = None
    sham: str | None = None


class Sham(Strict):
    """How sham is made from the original: training on retain rows alone."""

    steps: int = Field(60, ge=1)
    learning_rate: float = Field(3e-4, gt=0)


def _level(value: Any) -> Any:
    if value in ("gold", None):
        return value
    try:
        level = float(value)
    except (TypeError, ValueError):
        level = -1.0
    if not 0 < level < 1:
        raise ValueError(f"expected a probability between 0 and 1, gold or null, not {value!r}")
    return level


class StopSpec(Strict):
    """When a method stops."""

    steps: int = Field(200, ge=1)
    forget_probability: Annotated[float | Literal["gold"] | None, BeforeValidator(_level)] = "gold"
    retain_kl: float | None = Field(None, gt=0)
    measure_every: int = Field(5, ge=1)
    forget_accuracy: float | None = Field(None, gt=0, lt=1)

    def stop(self, gold_level: float | None) -> Stop:
        """With gold's level put in; without gold it is no target."""
        level = gold_level if self.forget_probability == "gold" else self.forget_probability
        return Stop(self.steps, level, self.retain_kl, self.measure_every, self.forget_accuracy)


def _method(value: Any) -> Any:
    """`npo`, or `{name: npo, beta: 0.2}`, as the method with its settings."""
    if isinstance(value, Method):
        return value
    settings = {"name": value} if isinstance(value, str) else value
    if not isinstance(settings, dict) or not isinstance(settings.get("name"), str):
        raise ValueError(f"expected a method's name, or a mapping with its name and settings, not {value!r}")
    name = settings["name"]
    if name not in METHODS:
        raise ValueError(f"unknown method {name!r}{nearest(name, METHODS)}")
    method, known = METHODS[name], METHODS[name].setting_names()
    chosen = {key: setting for key, setting in settings.items() if key != "name"}
    for key in chosen:
        if key not in known:
            raise ValueError(f"method {name} has no setting {key!r}{nearest(key, known)}")
    return TypeAdapter(method).validate_python(chosen)


def _with_seed(method: Any, seed: int) -> Any:
    match method:
        case str():
            return {"name": method, "seed": seed}
        case dict():
            return {"seed": seed} | method
    return method


class Spec(Strict):
    """All of a run."""

    title: str = "Unlearning, audited"
    seed: int = 0
    data: Annotated[FactsSource | TofuSource | WmdpSource | FileSource, Field(discriminator="kind")]
    template: Template = "plain"
    model: Annotated[TrainedModel | GivenModel, Field(discriminator="kind")]
    sham: Sham | None = Sham()
    methods: Annotated[tuple[Annotated[Any, BeforeValidator(_method)], ...], Field(min_length=1)]
    stop: StopSpec = StopSpec()
    max_new_tokens: int = Field(48, ge=1)
    lens: LensKind | None = "tuned"

    @model_validator(mode="before")
    @classmethod
    def _one_seed(cls, settings: Any) -> Any:
        """The run's seed is that of the training and of every method too, where they name none of their own."""
        if not isinstance(settings, dict) or not isinstance(seed := settings.get("seed"), int):
            return settings
        settings = dict(settings)
        model, methods = settings.get("model"), settings.get("methods")
        if isinstance(model, dict) and model.get("kind") == "train":
            training = model.get("training", {})
            if isinstance(training, dict):
                settings["model"] = model | {"training": {"seed": seed} | training}
        if isinstance(methods, (list, tuple)):
            settings["methods"] = [_with_seed(method, seed) for method in methods]
        return settings

    @model_validator(mode="after")
    def _holds_together(self) -> "Spec":
        names = [method.name for method in self.methods]
        if len(set(names)) < len(names):
            twice = next(name for name in names if names.count(name) > 1)
            raise ValueError(f"methods: {twice} stands there twice; give each of its settings a run of its own")
        if isinstance(self.model, TrainedModel) and self.template != "plain":
            raise ValueError(f"template: a model of kind train reads plain questions, so it cannot be {self.template}")
        if self.stop.forget_accuracy is not None and not isinstance(self.data, WmdpSource):
            raise ValueError(
                f"stop.forget_accuracy: data of kind {self.data.kind} has no multiple-choice questions to measure; "
                "stop at forget_probability, or take data of kind wmdp"
            )
        return self

    def resolved(self) -> dict[str, Any]:
        """Every setting, the defaults included, as plain data."""
        plain = self.model_dump(mode="json", exclude={"methods"})
        return plain | {"methods": [to_jsonable_python(method.settings()) for method in self.methods]}


def read_spec(path: str | Path, *, data: str | None = None) -> Spec:
    """Read a YAML specification.

    Args:
        path: the file.
        data: put in place of the specification's `data.path`.

    Raises:
        SpecError: the file is missing or not YAML, a key is unknown or a value is not what it must be.
    """
    path = Path(path)
    try:
        settings = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise SpecError(f"{path}: cannot be read ({getattr(error, 'strerror', None) or error})") from error
    except yaml.YAMLError as error:
        raise SpecError(f"{path}: is not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(settings, dict):
        raise SpecError(f"{path}: a specification is a mapping with the keys {', '.join(Spec.model_fields)}")
    if data is not None:
        if not isinstance(settings.get("data"), dict) or settings["data"].get("kind") != "tofu":
            raise SpecError(f"{path}: --data replaces data.path, but this specification's data has no path")
        settings["data"]["path"] = data
    return make_spec(settings, str(path))


def make_spec(settings: dict[str, Any], where: str = "specification") -> Spec:
    """Check a specification given as plain data.

    Raises:
        SpecError: names the key, what was expected, and the nearest known key.
    """
    try:
        return Spec.model_validate(settings)
    except ValidationError as error:
        raise SpecError(f"{where}: {_mistake(error)}") from error
    except SpecError as error:  # from the dataclasses, which know their own limits
        raise SpecError(f"{where}: {error}") from error


def make_method(name: str, settings: Sequence[str] = (), seed: int = 0) -> Method:
    """A method by name, with settings written as `beta=0.2`.

    Raises:
        SpecError: no such method or setting, or a value that the setting cannot take.
    """
    chosen: dict[str, Any] = {"name": name, "seed": seed}
    for setting in settings:
        key, equals, value = setting.partition("=")
        if not equals or not key:
            raise SpecError(f"--set {setting}: write it as NAME=VALUE, e.g. --set beta=0.2")
        if key == "name":
            raise SpecError(f"--set {setting}: a method is chosen with --method")
        try:
            chosen[key] = yaml.safe_load(value)
        except yaml.YAMLError:
            chosen[key] = value  # refused below, where the setting's type is known
    try:
        return TypeAdapter(Annotated[Any, BeforeValidator(_method)]).validate_python(chosen)  # type: ignore[no-any-return]
    except ValidationError as error:
        raise SpecError(f"method {name}: {_mistake(error)}") from error


def check_template(name: str) -> Template:
    """The template of that name.

    Raises:
        SpecError: there is none.
    """
    if name not in get_args(Template):
        raise SpecError(f"--template {name}: unknown{nearest(name, get_args(Template))}")
    return name  # type: ignore[return-value]


def check_lens(name: str) -> LensKind | None:
    """The kind of lens of that name; None for `none`.

    Raises:
        SpecError: there is no such kind.
    """
    kinds = (*get_args(LensKind), "none")
    if name not in kinds:
        raise SpecError(f"--lens {name}: unknown{nearest(name, kinds)}; choose {', '.join(kinds)}")
    return None if name == "none" else name  # type: ignore[return-value]


def _mistake(error: ValidationError) -> str:
    first = error.errors()[0]
    return explain(first, _known_beside(first["loc"]))


def _known_beside(location: tuple[int | str, ...]) -> list[str]:
    """The keys that are known where an unknown one stood."""
    sections: dict[str, Any] = {
        "facts": FactsSource,
        "tofu": TofuSource,
        "wmdp": WmdpSource,
        "files": FileSource,
        "train": TrainedModel,
        "load": GivenModel,
        "sham": Sham,
        "stop": StopSpec,
        "architecture": Architecture,
        "training": TrainingSettings,
    }
    owner = next((sections[part] for part in reversed(location[:-1]) if part in sections), Spec)
    return list(owner.model_fields if issubclass(owner, BaseModel) else owner.__dataclass_fields__)  # type: ignore[union-attr]
