"""Exits in a folder: one file of weights, and one that says what they are and of which model."""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from palimpsest.early_exit.encoder import Encoder
from palimpsest.errors import ModelError
from palimpsest.files import atomic_path, refuse_foreign_folder
from palimpsest.models.language_model import LanguageModel


def save_exits(
    folder: str | Path,
    name: str,
    model: LanguageModel | Encoder,
    about: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
) -> Path:
    """Write safetensors and JSON of that name, whole or not at all; the model is not in it.

    Raises:
        StorageError: the folder holds other files, or cannot be written.
    """
    refuse_foreign_folder(folder, f"{name}.json")
    text = json.dumps({"format": 1, "model": model.weights_hash(), **about}, indent=2)
    with atomic_path(folder) as temporary:
        temporary.mkdir()
        save_file({key: value.contiguous().cpu() for key, value in tensors.items()}, temporary / f"{name}.safetensors")
        (temporary / f"{name}.json").write_text(text + "\n", encoding="utf-8")
    return Path(folder)


@contextmanager
def saved_exits(
    folder: str | Path, name: str, model: LanguageModel | Encoder, *, made_by: str
) -> Iterator[tuple[dict[str, Any], dict[str, Tensor]]]:
    """What `save_exits` wrote for this model; what cannot be put together from it within counts as damage too.

    Raises:
        ModelError: there is nothing of ours, it is damaged, or the model is another.
    """
    path = Path(folder) / f"{name}.json"
    if not path.exists():
        raise ModelError(f"{folder}: no {path.name} there; make exits with `{made_by}`")
    try:
        about = json.loads(path.read_text(encoding="utf-8"))
        tensors = load_file(path.with_suffix(".safetensors"))
        if about["model"] != model.weights_hash():
            raise ModelError(f"{folder}: these exits were fitted to another model than {model.name}; fit them again")
        yield about, tensors
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
        raise ModelError(f"{folder}: these exits cannot be read ({error}); fit them again") from error
