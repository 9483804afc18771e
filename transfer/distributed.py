"""The ranks: the processes of one torchrun, and what each of them takes on."""

import contextlib
import functools
import math
import os
import secrets
import signal
import socket
import sys
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import torch
from torch import Tensor
from torch import distributed as dist


def is_distributed() -> bool:
    """Whether torchrun, or what sets the same variables, started this process among others.

    RANK alone, left over in a shell, makes no run of several.
    """
    return int(os.environ.get("WORLD_SIZE", 1)) > 1 and "MASTER_ADDR" in os.environ


def get_local_rank() -> int | None:
    """This process among those of its machine; None where it runs alone."""
    return int(os.environ.get("LOCAL_RANK", 0)) if is_distributed() else None


def local_world_size() -> int:
    """How many ranks share this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", 1)) if is_distributed() else 1


def get_world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def get_rank() -> int:
    """This process among all; 0, the one that prints and writes, where it runs alone. Known before the ranks meet."""
    return int(os.environ.get("RANK", 0)) if is_distributed() else 0


def init_distributed(device: torch.device) -> None:
    """Meet the other ranks, this one with its device. The others than rank 0 fall silent on stdout."""
    if is_distributed() and not dist.is_initialized():
        # Whoever waits here for a rank that has ended would not hear SIGTERM: torchrun would wait 30 s and kill it.
        handler = signal.signal(signal.SIGTERM, signal.SIG_DFL)
        # gloo for what lies on the CPU, and nccl for gradients on CUDA: unasked, torch takes the accelerator's alone.
        nccl = device.type == "cuda" and dist.is_nccl_available()
        # Rank 0 may train the head for hours.
        dist.init_process_group("cpu:gloo,cuda:nccl" if nccl else "gloo", timeout=timedelta(hours=12))
        signal.signal(signal.SIGTERM, handler)
        if get_rank():
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def end_distributed() -> None:
    """Part from the other ranks, all at once: with torch 2.10 one that ends long before them may hang as it closes."""
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()  # left to the interpreter's end, its threads may abort the process


def rank_slice(count: int, rank: int | None = None) -> range:
    """A rank's rows of so many, by default this one's: equal slices, the last ones shorter or empty."""
    rank = rank if rank is not None else get_rank() if dist.is_initialized() else 0
    size = math.ceil(count / get_world_size())
    return range(min(rank * size, count), min((rank + 1) * size, count))


def run_id() -> str:
    """A name for this run: `launch/agent`. All attempts under one torchrun share it; any other process has its own.

    torchrun's id for its launch ("none" where it has no --rdzv-id), and the process that starts the attempts.
    """
    launch, host = os.environ.get("TORCHELASTIC_RUN_ID"), socket.gethostname()
    if launch is None:
        return f"none/{host}-{os.getpid()}-{secrets.token_hex(8)}"
    agent, started = os.getppid(), b""
    with contextlib.suppress(OSError, IndexError):  # Linux: in containers the number alone is often 1
        started = Path(f"/proc/{agent}/stat").read_bytes().rpartition(b")")[2].split()[19]
    return f"{launch}/{host}-{agent}-{started.decode()}"


def is_main_process() -> bool:
    """Whether this is rank 0: the one that trains the head, prints and writes."""
    return get_rank() == 0


def broadcast(value: object) -> object:
    """What rank 0 has, on every rank."""
    if get_world_size() == 1:
        return value
    values = [value]
    dist.broadcast_object_list(values)
    return values[0]


def gather(value: object) -> list | None:
    """What each rank has, in their order, on rank 0; None on the others."""
    if get_world_size() == 1:
        return [value]
    values = [None] * get_world_size() if is_main_process() else None
    dist.gather_object(value, values)
    return values


def on_main_process(function: Callable) -> Callable:
    """Decorate a function that rank 0 alone runs: all ranks get what it returns."""

    @functools.wraps(function)
    def on_rank_0(*args, **kwargs):
        return broadcast(function(*args, **kwargs) if is_main_process() else None)

    return on_rank_0


def gather_rows(mine: Tensor, count: int) -> Tensor | None:
    """All ranks' slices (n, ...) of count rows in one tensor on rank 0; None on the others.

    Received into their places: the peak is all rows and this rank's own once more.
    """
    if get_rank():
        if len(mine):
            dist.send(mine, 0)
        return None
    rows = torch.empty(count, *mine.shape[1:], dtype=mine.dtype)
    rows[: len(mine)] = mine
    for rank in range(1, get_world_size()):
        place = rank_slice(count, rank)
        if place:
            dist.recv(rows[place.start : place.stop], rank)
    return rows


def cores_per_rank() -> int:
    """The cores that this process may use, shared with the other ranks on this machine."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // local_world_size())
