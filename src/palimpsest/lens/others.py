"""Lenses that others fitted, and ours for their readers: the tuned-lens package's layout, and Jacobian lenses.

Neither says reliably which unembedding it belongs to (tuned-lens 0.2.0 hashes a printed summary of the matrix, in which
most rows do not appear), so what is read here is bound to the model that is named, after its sizes are compared.
"""

import json
import os
import pickle
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from palimpsest.errors import ModelError
from palimpsest.files import atomic_path, refuse_foreign_folder
from palimpsest.lens.lens import DESCRIPTION, Lens
from palimpsest.lens.readout import Readout
from palimpsest.models.language_model import LanguageModel

CONFIG, PARAMS = "config.json", "params.pt"
HUB, HUB_TYPE, HUB_FOLDER = "AlignmentResearch/tuned-lens", "space", "lens"
"""Where the tuned-lens package's own lenses are; its environment variables name another place."""


def open_lens(name: str | Path, model: LanguageModel) -> Lens:
    """A lens by what the user calls it.

    `logit`; a folder of ours or of the tuned-lens package; a Jacobian lens's file; a resource id on the hub.

    Raises:
        ModelError: there is none, or it cannot be read.
    """
    if str(name) == "logit":
        return Lens.logit(model)
    if Path(name).is_file():
        return read_jacobian_lens(name, model)
    return Lens.load(name) if (Path(name) / DESCRIPTION).exists() else read_tuned_lens(name, model)


def read_tuned_lens(folder_or_id: str | Path, model: LanguageModel) -> Lens:
    """A lens in the layout of the tuned-lens package, from a folder or by its hub resource id (`gpt2`, ...).

    Raises:
        ModelError: there is none, it cannot be read, or it has other sizes than the model.
    """
    folder = Path(folder_or_id)
    if not (folder / CONFIG).exists():
        if folder.exists():
            raise ModelError(f"{folder}: no {CONFIG} there, so it is no lens of the tuned-lens package")
        folder = _from_hub(str(folder_or_id))
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{folder / CONFIG}: cannot be read ({error})") from error
    n, d = model.anatomy.n_layers, model.anatomy.d_model
    if (config.get("num_hidden_layers"), config.get("d_model")) != (n, d):
        raise ModelError(
            f"{folder}: a lens of {config.get('num_hidden_layers')} layers and width {config.get('d_model')}, but "
            f"{model.name} has {n} and {d}"
        )
    stored = _unpickled(folder / PARAMS)
    stored = {name.removeprefix("layer_translators."): value for name, value in stored.items()}
    changes, biases = (_stacked(folder, stored, part, n) for part in ("weight", "bias"))
    if changes is None:
        raise ModelError(f"{folder / PARAMS}: has no weights for {n} layers (0.weight to {n - 1}.weight)")
    return Lens("tuned", n, Readout.of(model).hash(), changes, biases, {"from": str(folder_or_id), "config": config})


def write_tuned_lens(lens: Lens, model: LanguageModel, folder: str | Path) -> Path:
    """Write a lens so that the tuned-lens package reads it; a lens that stands there is replaced.

    Raises:
        ModelError: it was made for another model, whose final norm and unembedding differ.
        StorageError: the folder holds other files, or cannot be written.
    """
    lens.readout(model)
    n, d = lens.n_layers, model.anatomy.d_model
    changes = torch.zeros(n, d, d) if lens.changes is None else lens.changes
    stored = {f"{layer}.weight": changes[layer].clone() for layer in range(n)}
    if lens.biases is not None:
        stored |= {f"{layer}.bias": lens.biases[layer].clone() for layer in range(n)}
    config = {
        "base_model_name_or_path": model.network.config._name_or_path or model.name,
        "d_model": d,
        "num_hidden_layers": n,
        "bias": lens.biases is not None,
        "base_model_revision": None,
        "unembed_hash": lens.unembedding,
        "lens_type": "linear_tuned_lens",
    }
    refuse_foreign_folder(folder, CONFIG)
    with atomic_path(folder) as temporary:
        temporary.mkdir()
        (temporary / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        torch.save(stored, temporary / PARAMS)
    return Path(folder)


def read_jacobian_lens(path: str | Path, model: LanguageModel) -> Lens:
    """A Jacobian lens (`anthropics/jacobian-lens`): for each source layer the mean Jacobian of the last residual by it.

    Its layer l is what block l gives, which the next block reads: our l + 1. Our layer 0, and layers that it leaves
    out, are read as by the logit lens; `provenance` names them.

    Raises:
        ModelError: the file cannot be read, or has other sizes than the model.
    """
    stored = _unpickled(Path(path))
    jacobians, n, d = stored.get("J"), model.anatomy.n_layers, model.anatomy.d_model
    if not isinstance(jacobians, dict):
        raise ModelError(f"{path}: holds no Jacobians by layer under J, so it is no Jacobian lens")
    changes = torch.zeros(n, d, d)
    for layer, jacobian in jacobians.items():
        if not 0 <= int(layer) < n or tuple(jacobian.shape) != (d, d):
            raise ModelError(
                f"{path}: layer {layer} is {list(jacobian.shape)}, but {model.name} has {n} layers of width {d}"
            )
        if int(layer) + 1 < n:  # after the last block there is nothing left to map
            changes[int(layer) + 1] = jacobian.float() - torch.eye(d)
    have = {int(layer) + 1 for layer in jacobians}
    provenance = {
        "from": str(path),
        "n_prompts": stored.get("n_prompts"),
        "unmapped_layers": [layer for layer in range(n) if layer not in have],
    }
    return Lens("jacobian", n, Readout.of(model).hash(), changes, None, provenance)


def _from_hub(name: str) -> Path:
    from huggingface_hub import hf_hub_download

    repository = os.environ.get("TUNED_LENS_REPO_ID", HUB)
    kind = os.environ.get("TUNED_LENS_REPO_TYPE", HUB_TYPE)
    try:
        files = [
            hf_hub_download(repository, f"{HUB_FOLDER}/{name}/{file}", repo_type=kind) for file in (CONFIG, PARAMS)
        ]
    except Exception as error:  # the hub's client raises exceptions of a dozen kinds
        reason = " ".join(str(error).split())
        raise ModelError(f"{name}: no such folder, and no such lens on the hub ({repository}): {reason}") from error
    return Path(files[0]).parent


def _unpickled(path: Path) -> dict[str, Any]:
    """Tensors and plain containers of a torch file; nothing else is ever built from it."""
    try:
        stored = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, ValueError, EOFError, pickle.UnpicklingError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ModelError(f"{path}: cannot be read as tensors alone ({reason})") from error
    if not isinstance(stored, dict):
        raise ModelError(f"{path}: holds a {type(stored).__name__}, not tensors by name")
    return stored


def _stacked(folder: Path, stored: dict[str, Any], part: str, n: int) -> Tensor | None:
    """[n, ...] a tensor a layer, or None where no layer has any."""
    names = [f"{layer}.{part}" for layer in range(n)]
    missing = [name for name in names if name not in stored]
    if len(missing) == n:
        return None
    if missing:
        raise ModelError(f"{folder / PARAMS}: {missing[0]} is missing")
    return torch.stack([stored[name].float() for name in names])
