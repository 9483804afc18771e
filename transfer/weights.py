"""The backbone's weights: found, and ImageNet's downloaded, once a machine."""

import contextlib
import http.client
import os
import socket
import sys
import tempfile
import threading
import time
from pathlib import Path
from urllib.parse import urlsplit

import torch
from torch import Tensor
from torch import distributed as dist
from torchvision.models import ResNet18_Weights

from transfer.checkpoint import load_backbone
from transfer.console import UserError, shown
from transfer.distributed import local_rank, my_rank, world_size

BUNDLED_WEIGHTS = Path(__file__).resolve().parent.parent / "food" / "resnet18-grocery.pth"
IMAGENET_URL = ResNet18_Weights.DEFAULT.url
DOWNLOAD_TIMEOUT = 10  # seconds without another 128 KB, torch's step: slower than that would take an hour
DOWNLOAD_ERRORS = (OSError, RuntimeError, http.client.HTTPException)


def imagenet_path() -> Path:
    """Where torchvision keeps its ImageNet weights."""
    return Path(torch.hub.get_dir()) / "checkpoints" / Path(IMAGENET_URL).name


def download_imagenet() -> Path:
    """The file of the ImageNet weights, downloaded if need be. Raises one of DOWNLOAD_ERRORS."""
    path = imagenet_path()
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        if my_rank() == 0:
            host = shown(urlsplit(IMAGENET_URL).netloc)
            print(f"downloading ImageNet weights (45 MB) from {host} ...", file=sys.stderr, flush=True)
        with tempfile.TemporaryDirectory(dir=path.parent, ignore_cleanup_errors=True) as folder:
            part = Path(folder) / path.name
            download(IMAGENET_URL, part)
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


def get_imagenet() -> str | None:
    """Bring the ImageNet weights to this machine; why that failed, in words, on all ranks alike.

    Under torchrun one rank a machine downloads and the others wait. Where one machine stays without, all do: ranks
    with different backbones would make features of two kinds.
    """
    reason = None
    if local_rank() in (None, 0):
        try:
            download_imagenet()
        except DOWNLOAD_ERRORS as error:
            reason = shown(str(getattr(error, "reason", error)))
    reasons = [reason] * world_size()
    if dist.is_initialized():
        dist.all_gather_object(reasons, reason)
    return next(filter(None, reasons), None)


def from_here(path: Path) -> str:
    """A path as it may be printed: relative, or whole where it lies on another drive of Windows."""
    try:
        return shown(os.path.relpath(path))
    except ValueError:
        return shown(path)


def find_weights(wish: str | None) -> tuple[dict[str, Tensor] | None, str, list[str]]:
    """The backbone of `--weights`, its origin in words, and what the user must know of it. Raises UserError.

    An explicit wish is never replaced; with none, the bundled backbone stands in for ImageNet's.
    """
    if wish == "none":
        return None, "random weights", []
    if wish not in (None, "imagenet"):
        return load_backbone(Path(wish)), shown(wish), []
    reason = get_imagenet()
    if reason is None:
        return load_backbone(imagenet_path()), f"ImageNet ({ResNet18_Weights.DEFAULT})", []
    fix = f"fetch {IMAGENET_URL} elsewhere and put it at {shown(imagenet_path())}, or give it as --weights FILE"
    if wish == "imagenet":
        raise UserError(f"ImageNet weights can't be downloaded ({reason}); {fix}")
    bundled = from_here(BUNDLED_WEIGHTS)
    caveat = f"no ImageNet weights ({reason}): using the bundled {bundled}, which is far weaker"
    return load_backbone(BUNDLED_WEIGHTS), f"{bundled} (bundled)", [caveat, f"for the real ones, {fix}"]
