"""A causal language model with its tokenizer and anatomy: loading, saving, and the fingerprint by which it is known."""

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from palimpsest.errors import ModelError
from palimpsest.files import atomic_path, refuse_foreign_folder
from palimpsest.models.anatomy import Anatomy

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(eq=False)
class LanguageModel:
    """What every other room takes and gives: the network, its tokenizer, and where its parts are."""

    network: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    anatomy: Anatomy
    name: str = "model"
    updates: list[str] = field(default_factory=list)
    """Identities of the updates that are in the weights now, oldest first."""

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.network.device

    def fingerprint(self) -> str:
        """SHA-256 (hex) over weights, configuration and tokenizer: equal for equal content, wherever it came from.

        Tied weights count once. The time is that of hashing the weights, about a second per gigabyte.
        """
        digest = hashlib.sha256()
        digest.update(self.weights_hash().encode())
        digest.update(_config_bytes(self.network))
        digest.update(_tokenizer_bytes(self.tokenizer))
        return digest.hexdigest()

    def weights_hash(self) -> str:
        """SHA-256 (hex) over the parameters' names, types, shapes and bytes."""
        return weights_hash(self.network)

    def copy(self, name: str | None = None) -> "LanguageModel":
        """An independent model with the same weights."""
        twin = deepcopy(self.network).eval()
        return LanguageModel(twin, self.tokenizer, Anatomy.of(twin), name or self.name, list(self.updates))

    def save(self, folder: str | Path) -> Path:
        """Write a Hugging Face model folder (safetensors), whole or not at all; a model that stands there is replaced.

        Raises:
            StorageError: the folder holds files that are no model, or cannot be written.
        """
        folder = Path(folder)
        refuse_foreign_folder(folder, "config.json")
        with atomic_path(folder) as temporary, _no_progress_bars():
            self.network.save_pretrained(temporary)
            self.tokenizer.save_pretrained(temporary)
            (temporary / "palimpsest.json").write_text(json.dumps({"name": self.name, "updates": self.updates}))
        return folder


def load(
    path_or_id: str | Path,
    *,
    precision: Literal["fp32", "bf16"] = "fp32",
    device: str | None = None,
    check: bool = True,
    trust_remote_code: bool = False,
) -> LanguageModel:
    """Load a causal language model from a folder or a hub id.

    Args:
        path_or_id: a Hugging Face model folder, or a hub id.
        precision: the weights' type; scores are computed in fp32 either way.
        device: where to put it; the GPU when there is one.
        check: run the anatomy's numeric self-checks on a tiny input.
        trust_remote_code: run the model folder's own Python code. Off unless asked for.

    Raises:
        ModelError: no such folder, no safetensors weights, an architecture that cannot be named, a failed self-check.
    """
    path = Path(path_or_id)
    if path.exists():
        _refuse_unusable_folder(path)
    elif path.is_absolute() or str(path_or_id).startswith((".", "~")) or str(path_or_id).count("/") > 1:
        raise ModelError(f"{path_or_id}: there is no such model folder")
    try:
        config = AutoConfig.from_pretrained(path_or_id, trust_remote_code=trust_remote_code)
        # A download keeps its bars.
        with _no_progress_bars() if path.exists() else nullcontext():
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                path_or_id,
                config=config,
                dtype=PRECISIONS[precision],
                use_safetensors=True,
                trust_remote_code=trust_remote_code,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # refused below, by name
            )
    except Exception as error:  # transformers, tokenizers and safetensors raise exceptions of a dozen kinds
        raise ModelError(f"{path_or_id}: cannot be loaded as a causal language model: {_one_line(error)}") from error
    network, loading = loaded
    _refuse_invented_weights(path_or_id, loading)
    try:
        tokenizer = AutoTokenizer.from_pretrained(path_or_id, trust_remote_code=trust_remote_code)
    except Exception as error:
        raise ModelError(f"{path_or_id}: its tokenizer cannot be loaded: {_one_line(error)}") from error
    network.to(device or ("cuda" if torch.cuda.is_available() else "cpu")).eval()
    anatomy = Anatomy.of(network)
    if check:
        anatomy.check(network)
    note = _read_note(path / "palimpsest.json")
    return LanguageModel(network, tokenizer, anatomy, note.get("name", path.name), note.get("updates", []))


@contextmanager
def evaluating(model: LanguageModel) -> Iterator[PreTrainedModel]:
    """The network without dropout or gradients; its training mode is put back after."""
    was_training = model.network.training
    model.network.eval()
    try:
        with torch.inference_mode():
            yield model.network
    finally:
        model.network.train(was_training)


def refuse_other_tokenizer(model: LanguageModel, other: LanguageModel) -> None:
    """Refuse to compare models token by token where a token of one is not that of the other.

    Raises:
        ModelError: their vocabularies differ.
    """
    ours, theirs = model.tokenizer.get_vocab(), other.tokenizer.get_vocab()
    if ours == theirs:
        return
    token = min(token for token, _ in ours.items() ^ theirs.items())
    numbers = f"{theirs.get(token, 'missing')} in one and {ours.get(token, 'missing')} in the other"
    raise ModelError(
        f"{other.name}: its tokenizer is not that of {model.name} (token {token!r} is {numbers}); "
        "compare models that share one"
    )


def weights_hash(network: PreTrainedModel) -> str:
    """SHA-256 (hex) over a network's parameters' names, types, shapes and bytes; tied weights count once."""
    digest = hashlib.sha256()
    for name, parameter in sorted(network.named_parameters()):
        digest.update(f"{name} {parameter.dtype} {tuple(parameter.shape)}\n".encode())
        digest.update(tensor_bytes(parameter))
    return digest.hexdigest()


def tensor_bytes(tensor: Tensor) -> memoryview:
    """A tensor's bytes in memory order, for hashing."""
    return tensor.detach().cpu().contiguous().view(torch.uint8).numpy().data.cast("B")


@contextmanager
def _no_progress_bars() -> Iterator[None]:
    """Transformers' bars for reading and writing weights switched off, and the user's setting put back after."""
    if not logging.is_progress_bar_enabled():
        yield
        return
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.enable_progress_bar()


def _refuse_unusable_folder(path: Path) -> None:
    if not path.is_dir():
        raise ModelError(f"{path}: a model is a folder with config.json and safetensors weights, but this is a file")
    if not (path / "config.json").exists():
        raise ModelError(f"{path}: no config.json there, so it is not a Hugging Face model folder")
    if not any(path.glob("*.safetensors")):
        pickles = [*path.glob("*.bin"), *path.glob("*.pt"), *path.glob("*.pth")]
        if pickles:
            raise ModelError(
                f"{path}: the weights are a pickle ({pickles[0].name}), which can run code when it is read. "
                "Convert them to safetensors with save_pretrained where you trust them"
            )
        raise ModelError(f"{path}: no *.safetensors weights in this folder")


def _refuse_invented_weights(path_or_id: str | Path, loading: dict[str, Any]) -> None:
    """Refuse what transformers would fill with random numbers: weights that are missing or of another shape."""
    invented = sorted(loading["missing_keys"] | {name for name, *_ in loading["mismatched_keys"]})
    if invented:
        raise ModelError(
            f"{path_or_id}: {len(invented)} weights are missing or not of the shape that config.json asks for, "
            f"{invented[0]} among them; restore the files or mend config.json"
        )


def _config_bytes(network: PreTrainedModel) -> bytes:
    config: dict[str, Any] = network.config.to_dict()
    # `architectures` is filled in when a model made in memory is first saved.
    for volatile in (
        "_name_or_path",
        "architectures",
        "transformers_version",
        "dtype",
        "torch_dtype",
        "_attn_implementation",
    ):
        config.pop(volatile, None)
    return json.dumps(config, sort_keys=True, default=str).encode()


def _tokenizer_bytes(tokenizer: PreTrainedTokenizerBase) -> bytes:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        # Padding and truncation are settings of the last call, not of the tokenizer.
        state = json.loads(backend.to_str())
        state.pop("padding", None)
        state.pop("truncation", None)
    else:
        state = tokenizer.get_vocab()
    return json.dumps([state, tokenizer.chat_template], sort_keys=True).encode()


def _read_note(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    try:
        note = dict(json.loads(path.read_text()))
    except (ValueError, TypeError) as error:
        raise ModelError(
            f"{path}: not the JSON object that Palimpsest wrote ({error}); restore or remove it"
        ) from error
    return note


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
