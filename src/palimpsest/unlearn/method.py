"""What every unlearning method is: frozen settings, and one run that turns a model and a request into an update."""

import json
from abc import ABC, abstractmethod
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, ClassVar

from palimpsest.errors import SpecError
from palimpsest.models.language_model import LanguageModel
from palimpsest.unlearn.request import Request
from palimpsest.unlearn.stopping import Stop
from palimpsest.unlearn.update import Update


@dataclass(frozen=True, kw_only=True)
class Method(ABC):
    """A method's settings. A method is a frozen dataclass in a file of its own."""

    name: ClassVar[str]
    source: ClassVar[str]
    """Paper and equation."""

    seed: int = 0

    @abstractmethod
    def run(
        self, model: LanguageModel, request: Request, stop: Stop | None = None, *, folder: str | Path | None = None
    ) -> Update:
        """Unlearn, and give back the change. The model is left as it was.

        Args:
            model: the model to start from.
            request: what to forget and keep.
            stop: budgets and targets; `Stop()` by default.
            folder: a folder of its own for the resumable state; a run that was killed goes on from there. It is
                left when the run is done, so that nothing is lost until the update is saved.

        Raises:
            SpecError: a setting that the method does not know.
            StorageError: the folder holds other files, or cannot be written.
            TrainingError: a loss or a measurement that is not finite; the resumable state is removed.
        """

    def settings(self) -> dict[str, Any]:
        """Name and settings, for provenance: as JSON gives them back, lists for tuples."""
        settings: dict[str, Any] = json.loads(json.dumps(asdict(self)))
        return {"name": self.name, **settings}

    @classmethod
    def setting_names(cls) -> list[str]:
        """What a specification may set."""
        return [field.name for field in fields(cls)]

    def _refuse_unless_positive(self, *names: str) -> None:
        for name in names:
            value = getattr(self, name)
            if not value > 0:
                raise SpecError(f"{self.name}: {name} is {value}; it must be above 0")
