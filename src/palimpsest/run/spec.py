"""The specification of a run, read from YAML: strict, with errors that name the key and the nearest known one."""

import difflib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, TypeAdapter, ValidationError
from pydantic_core import ErrorDetails

from palimpsest.data.prompts import Template
from palimpsest.errors import SpecError
from palimpsest.models.organism import Architecture, Recipe
from palimpsest.models.training import TrainingSettings
from palimpsest.unlearn.method import Method
from palimpsest.unlearn.methods import METHODS
from palimpsest.unlearn.stopping import Stop


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class FactsSource(_Strict):
    """Invented people and worlds (`worlds/facts.py`)."""

    kind: Literal["facts"]
    people: int = Field(120, ge=4)
    worlds: int = Field(24, ge=0)
    forget_people: int = Field(12, ge=0)
    forget_worlds: int = Field(3, ge=0)
    exposures: int = Field(60, ge=1)


class TofuSource(_Strict):
    """TOFU's invented authors, twenty questions each; the last ones are forgotten."""

    kind: Literal["tofu"]
    path: str
    """A folder with TOFU's JSON files, or its hub id."""
    authors: int = Field(40, ge=4, le=200)
    forget_authors: int = Field(4, ge=1, le=20)


class FileSource(_Strict):
    """The user's own rows."""

    kind: Literal["files"]
    forget: str
    retain: str
    format: str | None = None


class TrainedModel(_Strict):
    """A model made here, with its gold, from scratch."""

    kind: Literal["train"] = "train"
    architecture: Architecture = Architecture()
    tokenizer: Literal["words", "bpe"] = "words"
    vocab_size: int = Field(2048, ge=300)
    pack: int | None = Field(64, ge=2)
    training: TrainingSettings = Field(default_factory=TrainingSettings)

    def recipe(self) -> Recipe:
        """As the organism's recipe."""
        return Recipe(self.architecture, self.tokenizer, self.vocab_size, self.pack, self.training)


class GivenModel(_Strict):
    """A model that exists, with gold and sham where they exist."""

    kind: Literal["load"]
    path: str
    gold: str | None = None
    sham: str | None = None


class Sham(_Strict):
    """How sham is made from the original: training on retain rows alone."""

    steps: int = Field(60, ge=1)
    learning_rate: float = Field(3e-4, gt=0)


class StopSpec(_Strict):
    """When a method stops."""

    steps: int = Field(200, ge=1)
    forget_probability: float | Literal["gold"] | None = "gold"
    retain_kl: float | None = Field(None, gt=0)
    measure_every: int = Field(5, ge=1)

    def stop(self, gold_level: float | None) -> Stop:
        """With gold's level put in; without gold it is no target."""
        level = gold_level if self.forget_probability == "gold" else self.forget_probability
        return Stop(self.steps, level, self.retain_kl, self.measure_every)


def _method(value: Any) -> Any:
    """`npo`, or `{name: npo, beta: 0.2}`, as the method with its settings."""
    if isinstance(value, Method):
        return value
    settings = {"name": value} if isinstance(value, str) else dict(value) if isinstance(value, dict) else {}
    name = settings.pop("name", None)
    if name not in METHODS:
        raise ValueError(f"unknown method {name!r}{nearest(str(name), METHODS)}")
    method = METHODS[name]
    for key in settings:
        if key not in method.setting_names():
            raise ValueError(f"method {name} has no setting {key!r}{nearest(key, method.setting_names())}")
    return TypeAdapter(method).validate_python(settings)


class Spec(_Strict):
    """All of a run."""

    title: str = "Unlearning, audited"
    seed: int = 0
    data: Annotated[FactsSource | TofuSource | FileSource, Field(discriminator="kind")]
    template: Template = "plain"
    model: Annotated[TrainedModel | GivenModel, Field(discriminator="kind")]
    sham: Sham | None = Sham()
    methods: Annotated[tuple[Annotated[Any, BeforeValidator(_method)], ...], Field(min_length=1)]
    stop: StopSpec = StopSpec()
    max_new_tokens: int = Field(48, ge=1)

    def resolved(self) -> dict[str, Any]:
        """Every setting, the defaults included, as plain data."""
        plain = self.model_dump(mode="json", exclude={"methods"})
        return plain | {"methods": [method.settings() for method in self.methods]}


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
        raise SpecError(f"{where}: {_explain(error.errors()[0])}") from error


def make_method(name: str, settings: Sequence[str] = (), seed: int = 0) -> Method:
    """A method by name, with settings written as `beta=0.2`.

    Raises:
        SpecError: no such method or setting, or a value that the setting cannot take.
    """
    chosen: dict[str, Any] = {"name": name, "seed": seed}
    for setting in settings:
        key, equals, value = setting.partition("=")
        if not equals:
            raise SpecError(f"--set {setting}: write it as NAME=VALUE, e.g. --set beta=0.2")
        chosen[key] = yaml.safe_load(value)
    try:
        return TypeAdapter(Annotated[Any, BeforeValidator(_method)]).validate_python(chosen)  # type: ignore[no-any-return]
    except ValidationError as error:
        raise SpecError(f"method {name}: {_explain(error.errors()[0])}") from error


def check_template(name: str) -> Template:
    """The template of that name.

    Raises:
        SpecError: there is none.
    """
    if name not in get_args(Template):
        raise SpecError(f"--template {name}: unknown{nearest(name, get_args(Template))}")
    return name  # type: ignore[return-value]


def nearest(key: str, known: Iterable[str]) -> str:
    """`; did you mean 'x'?`, or what is known where nothing is near."""
    names = sorted(known)
    close = difflib.get_close_matches(key, names, n=1)
    return f"; did you mean {close[0]!r}?" if close else f"; known are {', '.join(names)}"


def _explain(error: ErrorDetails) -> str:
    # Pydantic puts the discriminator's value into the place; a person did not write it there.
    kinds = {"facts", "tofu", "files", "train", "load"}
    place = [str(part) for part in error["loc"] if part not in kinds]
    key = ".".join(place)
    if error["type"] in ("extra_forbidden", "unexpected_keyword_argument"):
        return f"unknown key {key!r}{nearest(place[-1], _known_beside(error['loc']))}"
    message = error["msg"].removeprefix("Value error, ")
    message = message[:1].lower() + message[1:]
    if error["type"] == "missing":
        return f"key {key!r} is missing"
    return f"{key or 'the whole'}: {message}"


def _known_beside(location: tuple[int | str, ...]) -> list[str]:
    """The keys that are known where an unknown one stood."""
    sections: dict[str, Any] = {
        "facts": FactsSource,
        "tofu": TofuSource,
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
