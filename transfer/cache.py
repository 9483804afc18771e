"""Chunks of features on disk: a file each, whose name covers all that its features depend on."""

import contextlib
import hashlib
import os
from collections.abc import Sequence
from pathlib import Path

import PIL
import torch
import torchvision
from torch import Tensor, nn
from torch.utils.data import Dataset

from transfer.backbone import NORMALIZE, READING_VERSION
from transfer.console import UserError, printable, warn
from transfer.device import Compute
from transfer.files import load_untrusted, save_tensors
from transfer.lists import ImageList


def recipe_digest(backbone: nn.Module, dataset: Dataset, compute: Compute) -> bytes:
    """What the features of an `ImageDataset` depend on besides its images: weights, views, arithmetic, versions."""
    recipe = [*dataset.describe(), str(NORMALIZE), READING_VERSION]
    versions = [torch.__version__, torchvision.__version__, PIL.__version__]
    parts = [recipe, versions, list(dataset.views), dataset.seed, compute.device.type, str(compute.dtype)]
    digest = hashlib.sha256(repr(parts).encode())
    for key, value in backbone.state_dict().items():
        digest.update(key.encode())
        digest.update(value.cpu().float().contiguous().numpy().tobytes())
    return digest.digest()


def chunk_path(cache: Path, recipe: bytes, image_list: ImageList, span: range) -> Path:
    """Where the chunk of these rows is kept: each image counts with its row, path, size and modification time."""
    digest = hashlib.sha256(recipe)
    for row in span:
        path = os.path.abspath(image_list.path(row))
        with contextlib.suppress(OSError):  # gone since the list was checked: the pass will say so
            info = os.stat(path)
            digest.update(repr((row, path, info.st_size, info.st_mtime_ns)).encode())
    return cache / f"{digest.hexdigest()[:40]}.pt"


def read_chunk(path: Path, shape: Sequence[int]) -> tuple[Tensor, dict[int, str]] | None:
    """A kept chunk, memory-mapped, and its reasons by row; None, with a warning, where it is damaged."""
    if not path.exists():
        return None
    try:
        chunk = load_untrusted(path, mmap=True)
        features, unreadable = chunk["features"], chunk["unread"]
        fits = features.shape == shape and features.dtype == torch.float32 and type(unreadable) is dict
        if fits and chunk["name"] == path.name:
            return features, unreadable
    except (UserError, KeyError, TypeError, AttributeError):
        pass
    warn(f"{printable(path)}: damaged or foreign; computed again")
    return None


def save_chunk(path: Path, features: Tensor, unreadable: dict[int, str]) -> None:
    save_tensors(path, {"name": path.name, "features": features, "unread": unreadable})
