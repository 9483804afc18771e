"""Where to compute, and in which precision."""

import os
from dataclasses import dataclass

import torch

from transfer.console import UserError, shown


@dataclass(frozen=True)
class Compute:
    """Where the backbone runs: its device, the dtype of its convolutions, and how many processes decode for it."""

    device: torch.device
    dtype: torch.dtype
    workers: int = 0


def pick_device(name: str) -> torch.device:
    """The device of `--device`; auto is CUDA, else MPS, else CPU. Raises UserError."""
    have = ["cpu"]
    if torch.backends.mps.is_available():
        have.insert(0, "mps")
    if torch.cuda.is_available():
        have[:0] = ["cuda", *(f"cuda:{n}" for n in range(torch.cuda.device_count()))]
    if name == "auto":
        rank = os.environ.get("LOCAL_RANK")
        return torch.device(f"cuda:{rank}" if rank and have[0] == "cuda" else have[0])
    if name not in have:
        raise UserError(f"--device {shown(name)}: this machine offers {', '.join(have)}; pick one of them or auto")
    return torch.device(name)


def pick_precision(name: str, device: torch.device) -> torch.dtype:
    """The dtype that convolutions run in; auto is the fastest one that the device runs natively."""
    if name != "auto":
        return {"float32": torch.float32, "bfloat16": torch.bfloat16}[name]
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    if device.type == "cpu" and hasattr(torch.cpu, "get_capabilities"):
        can = torch.cpu.get_capabilities()
        if any(can.get(feature) for feature in ("avx512_bf16", "amx_bf16", "bf16")):
            return torch.bfloat16
    return torch.float32
