"""The ranks: the processes of one torchrun, and what each of them takes on."""

import math
import os
import sys
from datetime import timedelta

from torch import distributed as dist


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def my_rank() -> int:
    """This process among torchrun's; 0, the one that prints and writes, where it runs alone."""
    return int(os.environ.get("RANK", 0))


def join_ranks() -> None:
    """Meet the other ranks where torchrun started this process. The others than rank 0 fall silent."""
    if int(os.environ.get("WORLD_SIZE", 1)) > 1 and not dist.is_initialized():
        # gloo for what lies on the CPU, and nccl for the gradients on CUDA. Rank 0 may train the head for hours.
        dist.init_process_group(timeout=timedelta(hours=12))
        if my_rank():
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def rank_slice(count: int) -> range:
    """This rank's rows of so many: equal slices, the last one shorter."""
    size, rank = math.ceil(count / world_size()), my_rank() if dist.is_initialized() else 0
    return range(min(rank * size, count), min((rank + 1) * size, count))


def cores_of_rank() -> int:
    """The cores that this process may use, shared with the other ranks on this machine."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
