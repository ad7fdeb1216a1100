"""Mistakes in a specification, put into one sentence that names the key, what was expected, and the nearest known."""

import difflib
import re
from collections.abc import Iterable, Sequence
from typing import Any

from pydantic_core import ErrorDetails


def nearest(key: object, known: Iterable[str]) -> str:
    """`; did you mean 'x'?`, or what is known where nothing is near."""
    names = sorted(known)
    close = difflib.get_close_matches(str(key), names, n=1)
    return f"; did you mean {close[0]!r}?" if close else f"; known are {', '.join(names)}"


def explain(error: ErrorDetails, known: Sequence[str]) -> str:
    """Pydantic's error in the words of someone who writes YAML.

    Args:
        error: the first of a `ValidationError`.
        known: the keys that may stand where the error was found.
    """
    place = key_path(error["loc"])
    key, said, context = ".".join(place), error["input"], error.get("ctx", {})
    match error["type"]:
        case "extra_forbidden" | "unexpected_keyword_argument":
            return f"unknown key {key!r}{nearest(place[-1], known)}"
        case "missing":
            return f"key {key!r} is missing"
        case "union_tag_not_found":
            return f"key '{key}.kind' is missing"
        case "union_tag_invalid":
            return f"{key}.kind: unknown {context['tag']!r}{nearest(context['tag'], _quoted(context['expected_tags']))}"
        case "literal_error":
            return f"{key}: unknown {said!r}{nearest(said, _quoted(context['expected']))}"
        case "tuple_type" | "list_type":
            return f"{key}: expected a list, not {said!r}"
        case "model_type" | "model_attributes_type" | "dataclass_type":
            return f"{key}: expected a mapping of keys to values, not {said!r}"
        case "too_short":
            return f"{key}: expected at least {context['min_length']} in the list"
        case "value_error":
            message = str(context["error"])
            return f"{key}: {message}" if key else message
    message = error["msg"][:1].lower() + error["msg"][1:].split(", unable")[0]
    return f"{key}: {message}, not {_short(said)}"


def key_path(location: Sequence[int | str]) -> list[str]:
    """An error's place as it stands in the file: pydantic puts the value of `kind` into it as if it were a key."""
    parts = [str(part) for part in location]
    return parts[:1] + parts[2:] if parts[:1] in (["data"], ["model"]) else parts


def _quoted(text: str) -> list[str]:
    return re.findall(r"'([^']*)'", text)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:39]}…"
