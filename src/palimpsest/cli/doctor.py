"""`palimpsest doctor`: what is installed, what works on this machine, and how fast it computes."""

import os
import platform
import re
import shutil
import time
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from palimpsest.cli.output import CHECK_FAILED, Json, print_json
from palimpsest.progress import console

if TYPE_CHECKING:
    import torch

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
SIZE = 1024
"""Rows and columns of the matrices that are multiplied."""


@dataclass(frozen=True, slots=True)
class Package:
    """A package that Palimpsest names in its requirements."""

    name: str
    required: str
    """The range of versions, e.g. `>=2.9`."""
    installed: str | None
    extra: str
    """The extra that asks for it; empty for what is always needed."""
    ok: bool
    """Installed in a version within the range; what belongs to an extra may also be missing."""


def doctor(as_json: Json = False) -> None:
    """Show what is installed, what works here and how fast it computes."""
    with console.status("measuring this machine"):
        packages, machine = _packages(), _machine()
    ok = all(package.ok for package in packages) and machine["torch_works"]
    if as_json:
        print_json({"ok": ok, "packages": [asdict(package) for package in packages], **machine})
    else:
        _show(packages, machine)
    if not ok:
        raise typer.Exit(CHECK_FAILED)


def _packages() -> list[Package]:
    from packaging.requirements import Requirement

    packages = []
    for line in requires("palimpsest") or []:
        requirement = Requirement(line)
        extra = re.search(r"extra == ['\"](\w+)['\"]", line)
        try:
            installed = version(requirement.name)
            ok = requirement.specifier.contains(installed, prereleases=True)
        except PackageNotFoundError:
            installed, ok = None, extra is not None
        name, required = requirement.name, str(requirement.specifier)
        packages.append(Package(name, required, installed, extra.group(1) if extra else "", ok))
    return packages


def _machine() -> dict[str, Any]:
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "processors": os.cpu_count(),
        "disk_free_gb": round(shutil.disk_usage(Path.cwd()).free / 1e9, 1),
        "chromium": next(filter(None, map(shutil.which, BROWSERS)), None),
        **_torch(),
    }


def _torch() -> dict[str, Any]:
    try:
        import torch

        from palimpsest.models.hardware import bf16_instructions

        threads = torch.get_num_threads()
        return {
            "torch_works": True,
            "threads": threads,
            "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
            "bf16": bf16_instructions(),
            "gflops": _speeds(threads),
        }
    except (ImportError, OSError, RuntimeError) as error:
        return {"torch_works": False, "torch_error": str(error).splitlines()[0]}


def _speeds(threads: int) -> dict[str, float]:
    """GFLOP/s of a matrix product, by device, type and number of threads."""
    import torch

    speeds = {}
    types = {"fp32": torch.float32, "bf16": torch.bfloat16}
    for name, dtype in types.items():
        for count in sorted({1, threads}):
            torch.set_num_threads(count)
            speeds[f"cpu {name}, {count} thread{'s' * (count > 1)}"] = _gflops(torch.device("cpu"), dtype)
        torch.set_num_threads(threads)
        if torch.cuda.is_available():
            speeds[f"gpu {name}"] = _gflops(torch.device("cuda"), dtype)
    return speeds


def _gflops(device: "torch.device", dtype: "torch.dtype") -> float:
    """The best of a few products of two square matrices."""
    import torch

    matrix = torch.ones(SIZE, SIZE, dtype=dtype, device=device)
    best = float("inf")
    for _ in range(5):
        start = time.perf_counter()
        total = (matrix @ matrix)[0, 0].item()  # fetching a number waits for the device
        best = min(best, time.perf_counter() - start)
    if total != SIZE:
        raise RuntimeError(f"a matrix product gave {total} where {SIZE} is right")
    return round(2 * SIZE**3 / best / 1e9, 1)


def _show(packages: list[Package], machine: dict[str, Any]) -> None:
    for package in packages:
        needed = f"{package.required}{f' ({package.extra})' if package.extra else ''}"
        mark = typer.style("ok  ", fg="green") if package.ok else typer.style("FAIL", fg="red")
        typer.echo(f"{mark}  {package.name:16} {package.installed or 'not installed':16} {needed}")
    typer.echo()
    for name, value in machine.items():
        if isinstance(value, dict):
            for what, number in value.items():
                typer.echo(f"{what:24} {number:,.0f} GFLOP/s")
        else:
            shown = ", ".join(value) if isinstance(value, list) else value
            typer.echo(f"{name.replace('_', ' '):24} {shown or 'none'}")
