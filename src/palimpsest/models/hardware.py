"""What the machine can do by itself."""

from pathlib import Path

import torch


def bf16_instructions() -> list[str]:
    """The processor's own bf16 instructions; without any, bf16 works but is slower than fp32."""
    try:
        flags = set(Path("/proc/cpuinfo").read_text(encoding="utf-8").split())
    except OSError:
        flags = set()
    return sorted(flags & {"avx512_bf16", "amx_bf16", "bf16"})


def bf16_is_fast(device: torch.device) -> bool:
    """Whether a forward pass in bf16 saves time on this device."""
    if device.type == "cpu":
        return bool(bf16_instructions())
    return device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
