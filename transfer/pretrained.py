"""Pretrained weights of the backbone: found, and ImageNet's downloaded, once per machine."""

import contextlib
import http.client
import os
import socket
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import NamedTuple
from urllib.parse import urlsplit

import torch
from torch import Tensor
from torch import distributed as dist
from torchvision.models import get_model_weights

from transfer.architectures import arch_title
from transfer.checkpoint import load_backbone
from transfer.distributed import get_local_rank, get_rank, get_world_size
from transfer.system.console import UserError, printable

BUNDLED_WEIGHTS = Path(__file__).resolve().parent.parent / "food" / "resnet18-grocery.pth"
BUNDLED_ARCH = "resnet18"
DOWNLOAD_TIMEOUT = 10  # seconds without another 128 KB, torch's step: slower than that would take an hour
DOWNLOAD_ERRORS = (OSError, RuntimeError, http.client.HTTPException)


def imagenet_url(arch: str) -> str:
    return get_model_weights(arch).DEFAULT.url


def imagenet_path(arch: str) -> Path:
    """Where torchvision keeps its ImageNet weights."""
    return Path(torch.hub.get_dir()) / "checkpoints" / Path(imagenet_url(arch)).name


def download_imagenet(arch: str) -> Path:
    """The file of the ImageNet weights, downloaded if need be. Raises one of DOWNLOAD_ERRORS."""
    path, url = imagenet_path(arch), imagenet_url(arch)
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        if get_rank() == 0:
            size, host = get_model_weights(arch).DEFAULT.meta["_file_size"], printable(urlsplit(url).netloc)
            print(f"downloading ImageNet weights ({size:.0f} MB) from {host} ...", file=sys.stderr, flush=True)
        with tempfile.TemporaryDirectory(dir=path.parent, ignore_cleanup_errors=True) as folder:
            part = Path(folder) / path.name
            download(url, part)
            os.replace(part, path)
    return path


def download(url: str, path: Path) -> None:
    """Fetch a file whose name ends in its hash into a folder of its own. Raises one of DOWNLOAD_ERRORS.

    A thread does it, since a socket's timeout covers neither looking up the name nor all its addresses together.
    It is left behind where DOWNLOAD_TIMEOUT passes without news.
    """
    failed = []

    def fetch() -> None:
        try:
            torch.hub.download_url_to_file(url, str(path), path.stem.rpartition("-")[2], progress=sys.stderr.isatty())
        except DOWNLOAD_ERRORS as error:
            failed.append(error)

    thread = threading.Thread(target=fetch, daemon=True)
    before, size, news = socket.getdefaulttimeout(), 0, time.monotonic()
    socket.setdefaulttimeout(DOWNLOAD_TIMEOUT)
    try:
        thread.start()
        while thread.is_alive():
            thread.join(0.05)
            with contextlib.suppress(FileNotFoundError):  # renamed meanwhile
                if size < (size := sum(part.stat().st_size for part in path.parent.iterdir())):
                    news = time.monotonic()
            if time.monotonic() - news > DOWNLOAD_TIMEOUT:
                raise TimeoutError(f"timed out: nothing came for {DOWNLOAD_TIMEOUT} s")
    finally:
        socket.setdefaulttimeout(before)
    if failed:
        raise failed[0]


def get_imagenet(arch: str) -> str | None:
    """Bring the ImageNet weights to this machine; why that failed, in words, on all ranks alike.

    Under torchrun one rank a machine downloads and the others wait. Where one machine stays without, all do: ranks
    with different backbones would make features of two kinds.
    """
    reason = None
    if get_local_rank() in (None, 0):
        try:
            download_imagenet(arch)
        except DOWNLOAD_ERRORS as error:
            reason = printable(str(getattr(error, "reason", error)))
    reasons = [reason] * get_world_size()
    if dist.is_initialized():
        dist.all_gather_object(reasons, reason)
    return next(filter(None, reasons), None)


def relative_path(path: Path) -> str:
    """A path as it may be printed: relative, or whole where it lies on another drive of Windows."""
    try:
        return printable(os.path.relpath(path))
    except ValueError:
        return printable(path)


class Pretrained(NamedTuple):
    """A backbone's weights (None: random), what they are in words, and what the user must know of them."""

    state_dict: dict[str, Tensor] | None
    description: str
    warnings: list[str]


def load_pretrained(weights: str | None, arch: str) -> Pretrained:
    """The backbone of `--weights` and `--arch`. Under torchrun one rank per machine downloads ImageNet's.

    What is named is never replaced; where nothing is, the bundled backbone stands in for ImageNet's of its
    architecture. Raises UserError.
    """
    name = arch_title(arch)
    if weights == "none":
        return Pretrained(None, f"{name}, random weights", [])
    if weights not in (None, "imagenet"):
        return Pretrained(load_backbone(Path(weights), arch), f"{name}, {printable(weights)}", [])
    reason, path = get_imagenet(arch), imagenet_path(arch)
    if reason is None:
        description = f"{name}, ImageNet ({get_model_weights(arch).DEFAULT})"
        return Pretrained(load_backbone(path, arch), description, [])
    fix = f"fetch {imagenet_url(arch)} elsewhere and put it at {printable(path)}, or give it as --weights FILE"
    if weights == "imagenet" or arch != BUNDLED_ARCH:
        raise UserError(f"ImageNet weights can't be downloaded ({reason}); {fix}")
    bundled = relative_path(BUNDLED_WEIGHTS)
    caveat = (
        f"no ImageNet weights ({reason}): used the bundled {bundled}, which is far weaker; for the real ones, {fix}"
    )
    return Pretrained(
        load_backbone(BUNDLED_WEIGHTS, arch), f"{name}, {bundled} (bundled: no ImageNet weights)", [caveat]
    )
