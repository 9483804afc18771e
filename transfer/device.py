"""Where to compute, and in which precision."""

import contextlib
import os
import re
from dataclasses import dataclass
from pathlib import Path

import torch
from torchvision import transforms as T

from transfer.architectures import NORMALIZE, preprocessing
from transfer.distributed import cores_per_rank, get_local_rank, is_distributed, local_world_size
from transfer.system.console import UserError, printable
from transfer.system.flags import DEFAULT_ARCH

CGROUP = Path("/sys/fs/cgroup")  # of a container, version 2


@dataclass(frozen=True)
class Compute:
    """Where and how the backbone runs: its device, its dtype but for BatchNorm's, how many processes decode for it, and
    what images are normalised by.
    """

    device: torch.device
    dtype: torch.dtype
    workers: int = 0
    normalize: T.Normalize = NORMALIZE

    @property
    def precision(self) -> str:
        return str(self.dtype).removeprefix("torch.")


def free_memory() -> int:
    """Bytes of main memory that may still be taken, as far as the system knows; of a container, its own."""
    limits = []
    with contextlib.suppress(OSError, ValueError, TypeError):
        limits.append(1024 * int(re.search(r"MemAvailable: *(\d+)", Path("/proc/meminfo").read_text())[1]))
        most, taken = (int((CGROUP / f"memory.{name}").read_text()) for name in ("max", "current"))
        # What was read of files and is not in use is given back when memory is asked for.
        spare = re.search(r"^inactive_file (\d+)", (CGROUP / "memory.stat").read_text(), re.M)
        limits.append(most - taken + int(spare[1]))  # no number, and so no limit, outside a container
    if not limits and hasattr(os, "sysconf"):
        limits.append(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2)  # macOS does not say what is free
    return max(0, min(limits, default=4 << 30))


def pick_device(name: str) -> torch.device:
    """The device of `--device`; auto is CUDA, else MPS, else CPU. Under torchrun each rank has a card of its own.

    Raises UserError.
    """
    cards = torch.cuda.device_count() if torch.cuda.is_available() else 0
    have = [*(["cuda"] if cards else []), *(f"cuda:{card}" for card in range(cards))]
    have += ["mps", "cpu"] if torch.backends.mps.is_available() else ["cpu"]
    if name not in ("auto", *have):
        raise UserError(f"--device {printable(name)}: this machine offers {', '.join(have)}; pick one of them or auto")
    name = have[0] if name == "auto" else name
    device = torch.device(card_of_rank(name, cards) if name.startswith("cuda") else name)
    if device.index is not None:  # without one it is the current card, and torch refuses to make it that
        # What names no card, as pinning memory and asking for bfloat16, means this one from here on.
        torch.cuda.set_device(device)
    return device


def pick_compute(
    device: str, precision: str, workers: int | None, training: bool = False, *, arch: str = DEFAULT_ARCH
) -> Compute:
    """What `--device`, `--precision` and `--workers` ask for, with images normalised for the architecture. Raises
    UserError as the functions for each do.
    """
    where, workers = pick_device(device), cores_per_rank() if workers is None else workers
    if training and where.type == "mps" and is_distributed():
        raise UserError("--finetune-epochs: torch joins no ranks' gradients on MPS; run one process, or --device cpu")
    return Compute(where, pick_precision(precision, where, training), workers, preprocessing(arch).normalize)


def card_of_rank(name: str, cards: int) -> str:
    """The card that this process is to use where `--device` named one or any. Raises UserError."""
    if local_world_size() == 1:
        return name
    if name != "cuda":
        raise UserError(
            f"--device {name}: {local_world_size()} ranks would share it; name cuda, and each takes its own"
        )
    if local_world_size() > cards:
        fix = f"torchrun --nproc-per-node {cards}, or --device cpu"
        raise UserError(f"--device cuda: {local_world_size()} ranks on this machine and {cards} cards; run {fix}")
    return f"cuda:{get_local_rank()}"


def pick_precision(name: str, device: torch.device, training: bool = False) -> torch.dtype:
    """The dtype that convolutions run in; auto is the fastest one that the device runs natively.

    training: convolutions will be trained as well, for which float16 will not do. Raises UserError.
    """
    if name == "bfloat16" and device.type == "mps" and not torch.backends.mps.is_macos_or_newer(14, 0):
        raise UserError("--precision bfloat16: on MPS it needs macOS 14; run with --precision float32")
    if name != "auto":
        return {"float32": torch.float32, "bfloat16": torch.bfloat16}[name]
    if device.type == "cuda":
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return torch.bfloat16
        # float16's gradients would need scaling, and a network trained in one precision but used in another would not
        # be right as often as training reported.
        return torch.float32 if training else torch.float16
    if device.type == "cpu" and hasattr(torch.cpu, "get_capabilities"):
        can = torch.cpu.get_capabilities()
        if any(can.get(feature) for feature in ("avx512_bf16", "amx_bf16", "bf16")):
            return torch.bfloat16
    return torch.float32
