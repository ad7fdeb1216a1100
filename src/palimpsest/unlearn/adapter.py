"""An update as a LoRA adapter in PEFT's format, with what it loses on the way.

LoRA (Hu et al. 2022, arXiv 2106.09685) adds B A of low rank to a linear map. The nearest B A to a change is its
truncated singular value decomposition (Eckart & Young 1936).
"""

import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from palimpsest.errors import SpecError, UpdateError
from palimpsest.files import atomic_path, refuse_foreign_folder, write_json
from palimpsest.models.language_model import LanguageModel
from palimpsest.progress import progress
from palimpsest.unlearn.gauge import Gauge
from palimpsest.unlearn.request import Request
from palimpsest.unlearn.update import Update

REPORT = "adapter_report.json"
"""Beside PEFT's own two files; by it such a folder is known."""


@dataclass(frozen=True)
class AdapterLoss:
    """What the adapter does other than the update, each merged into the weights."""

    retain_kl: float
    """KL(with the update || with the adapter) on held-out retain answers, nats/token."""
    update_forget_probability: float
    """Mean answer probability on the forget set with the update."""
    adapter_forget_probability: float
    """The same with the adapter."""


@dataclass(frozen=True)
class AdapterReport:
    """What became of an update of which an adapter was made. Norms are Frobenius."""

    update: str
    """The update's identity."""
    rank: int
    residual: float
    """||update - adapter|| / ||update|| over every parameter, those left out among them."""
    modules: dict[str, float]
    """||update - B A|| / ||update|| of each module that the adapter changes."""
    left_out: dict[str, float]
    """What LoRA on linear maps cannot carry, by parameter: its share of the update's squared norm, which is lost."""
    loss: AdapterLoss | None
    """Measured where a request was given."""


def export_adapter(
    update: Update, model: LanguageModel, folder: str | Path, rank: int = 16, *, request: Request | None = None
) -> AdapterReport:
    """Write an update as a LoRA adapter that `PeftModel.from_pretrained` loads onto the model it was made from.

    `adapter_config.json` (scaling 1, so `lora_alpha` is the rank), `adapter_model.safetensors` in fp32, and this
    report as `adapter_report.json`. The changes of biases, norms and embeddings are left out, and named.

    Args:
        update: what to export, at its scale.
        model: the model it was made from. It is left as it was.
        folder: whole or not at all; an adapter that was exported there before is replaced.
        rank: of every module's B A; no more than the largest change has.
        request: measure, on its forget and held-out retain rows, what the adapter does other than the update.

    Raises:
        SpecError: the rank is not at least 1.
        UpdateError: the update was not made for this model, is in it already, or changes no linear map.
        StorageError: the folder holds other files, or cannot be written.
    """
    if rank < 1:
        raise SpecError(f"adapter: rank is {rank}; it must be at least 1")
    folder = Path(folder)
    refuse_foreign_folder(folder, REPORT)
    update.applicable(model)
    squares = {name: update.change(name).double().square().sum().item() for name in update.delta}
    linear = _linear_maps(update, model)
    if not sum(squares[name] for name in linear):
        raise UpdateError(f"update {update.identity} ({update.method}) changes no linear map, so LoRA cannot carry it")
    rank = min(rank, max(min(update.delta[name].shape) for name in linear))
    tensors, carried, lost = _decompose(update, model, linear, rank)
    total, left_out = sum(squares.values()), {name: value for name, value in squares.items() if name not in linear}
    report = AdapterReport(
        update=update.identity,
        rank=rank,
        residual=math.sqrt((sum(lost.values()) + sum(left_out.values())) / total),
        modules={_module(name): _ratio(lost[name], squares[name]) for name in linear},
        left_out={name: value / total for name, value in left_out.items()},
        loss=_loss(update, carried, model, request) if request else None,
    )
    with atomic_path(folder) as temporary:
        temporary.mkdir()
        save_file(tensors, temporary / "adapter_model.safetensors", metadata={"format": "pt"})
        write_json(temporary / "adapter_config.json", _config(model, linear, rank))
        write_json(temporary / REPORT, asdict(report))
    return report


def _linear_maps(update: Update, model: LanguageModel) -> dict[str, nn.Module]:
    """The modules whose weight changes and that LoRA can stand beside, by the weight's name."""
    modules = {name: model.network.get_submodule(_module(name)) for name in update.delta if name.endswith(".weight")}
    return {name: module for name, module in modules.items() if isinstance(module, nn.Linear | Conv1D)}


def _decompose(
    update: Update, model: LanguageModel, linear: dict[str, nn.Module], rank: int
) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, float]]:
    """PEFT's tensors by PEFT's names; what they add to each weight; and the squared norm of what is lost of it."""
    tensors: dict[str, Tensor] = {}
    carried: dict[str, Tensor] = {}
    lost: dict[str, float] = {}
    with progress() as display:
        task = display.add_task("decomposing the update", total=len(linear), note="")
        for name in linear:
            change = update.change(name, model.device)
            transposed = isinstance(linear[name], Conv1D)  # [in, out], where a Linear has [out, in]
            a, b = _low_rank(change.T if transposed else change, rank)
            product = (b @ a).T if transposed else b @ a
            lost[name] = (change - product).double().square().sum().item()
            carried[name] = product.cpu()
            prefix = f"base_model.model.{_module(name)}"
            tensors |= {f"{prefix}.lora_A.weight": a.cpu(), f"{prefix}.lora_B.weight": b.cpu()}
            display.advance(task)
    return tensors, carried, lost


def _low_rank(change: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """A [rank, in] and B [out, rank], whose product is the nearest of that rank to a change [out, in].

    Where the change's own rank is below, the rows and columns beyond it are zero.
    """
    u, s, vh = torch.linalg.svd(change.float(), full_matrices=False)
    root, missing = s[:rank].sqrt(), max(0, rank - len(s))
    a, b = root[:, None] * vh[:rank], u[:, :rank] * root
    return nn.functional.pad(a, (0, 0, 0, missing)).contiguous(), nn.functional.pad(b, (0, missing)).contiguous()


def _loss(update: Update, carried: dict[str, Tensor], model: LanguageModel, request: Request) -> AdapterLoss:
    adapter = Update(carried, {"method": {"name": "adapter"}, "base_weights": update.provenance["base_weights"]})
    with update.applied(model):
        gauge = Gauge(model, request)
        full = gauge.measure(0)
    with adapter.applied(model):
        low_rank = gauge.measure(0)
    return AdapterLoss(low_rank.retain_kl, full.forget_probability, low_rank.forget_probability)


def _config(model: LanguageModel, linear: dict[str, nn.Module], rank: int) -> dict[str, Any]:
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": model.network.name_or_path or None,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": rank,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": any(isinstance(module, Conv1D) for module in linear.values()),
        "target_modules": [_module(name) for name in linear],
    }


def _module(name: str) -> str:
    """The module that a parameter belongs to."""
    return name.rpartition(".")[0]


def _ratio(lost: float, whole: float) -> float:
    return math.sqrt(lost / whole) if whole else 0.0
