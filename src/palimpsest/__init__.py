"""Palimpsest makes a language model forget, and shows what is still legible underneath.

The names below are imported when they are first used, so `import palimpsest` is quick.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from palimpsest.audit.results import Audit, Verdict
    from palimpsest.curvature.curvature import RetainCurvature
    from palimpsest.data.readers import read_records
    from palimpsest.data.records import QA, Choice, Passage, Preference
    from palimpsest.errors import PalimpsestError
    from palimpsest.lens.lens import Lens
    from palimpsest.metrics.scores import Score
    from palimpsest.models.anatomy import Anatomy, Site
    from palimpsest.models.language_model import LanguageModel, load
    from palimpsest.unlearn.gradient_ascent import GradientAscent, GradientDifference
    from palimpsest.unlearn.kfade import KFade
    from palimpsest.unlearn.npo import NPO
    from palimpsest.unlearn.random_labels import RandomLabels
    from palimpsest.unlearn.reapply import reapply
    from palimpsest.unlearn.request import Request
    from palimpsest.unlearn.update import Update

    __version__: str

_HOMES = {
    "load": "models.language_model",
    "LanguageModel": "models.language_model",
    "Anatomy": "models.anatomy",
    "Site": "models.anatomy",
    "QA": "data.records",
    "Passage": "data.records",
    "Choice": "data.records",
    "Preference": "data.records",
    "read_records": "data.readers",
    "Lens": "lens.lens",
    "Request": "unlearn.request",
    "Update": "unlearn.update",
    "GradientAscent": "unlearn.gradient_ascent",
    "GradientDifference": "unlearn.gradient_ascent",
    "KFade": "unlearn.kfade",
    "RetainCurvature": "curvature.curvature",
    "NPO": "unlearn.npo",
    "RandomLabels": "unlearn.random_labels",
    "reapply": "unlearn.reapply",
    "Audit": "audit.results",
    "Verdict": "audit.results",
    "Score": "metrics.scores",
    "PalimpsestError": "errors",
}
"""Every public name's module within the package."""

__all__ = [
    "NPO",
    "QA",
    "Anatomy",
    "Audit",
    "Choice",
    "GradientAscent",
    "GradientDifference",
    "KFade",
    "LanguageModel",
    "Lens",
    "PalimpsestError",
    "Passage",
    "Preference",
    "RandomLabels",
    "Request",
    "RetainCurvature",
    "Score",
    "Site",
    "Update",
    "Verdict",
    "__version__",
    "load",
    "read_records",
    "reapply",
]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        value: Any = version("palimpsest")
    elif name in _HOMES:
        value = getattr(import_module(f"palimpsest.{_HOMES[name]}"), name)
    else:
        raise AttributeError(f"module 'palimpsest' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
