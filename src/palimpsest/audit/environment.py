"""What a run was computed with: versions, machine and the code's own hash."""

import hashlib
import os
import platform
from importlib.metadata import version
from pathlib import Path

import torch

PACKAGES = ("palimpsest", "transformers", "tokenizers", "numpy", "scipy")
"""Those whose version can change a number."""


def environment() -> dict[str, str]:
    """Versions, platform, processors, threads, and the code's hash, as text by name."""
    return {
        "python": platform.python_version(),
        **{package: version(package) for package in PACKAGES},
        "torch": torch.__version__,  # with its build, which its package version leaves out: +cpu or +cu130
        "platform": platform.platform(),
        "processors": str(os.cpu_count()),
        "threads": str(torch.get_num_threads()),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
        "code": code_hash(),
    }


def code_hash(package: str | Path = Path(__file__).parents[1]) -> str:
    """SHA-256 (hex) over the paths and contents of a package's source files, in the order of their paths."""
    digest = hashlib.sha256()
    for file in sorted(Path(package).rglob("*")):
        if file.is_file() and "__pycache__" not in file.parts:
            digest.update(f"{file.relative_to(package).as_posix()}\0".encode())
            digest.update(hashlib.sha256(file.read_bytes()).digest())
    return digest.hexdigest()
