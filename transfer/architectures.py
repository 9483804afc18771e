"""Architectures that a backbone can have: torchvision's ResNets, built by name, inferred from the names of weights."""

import functools
from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torchvision.models import get_model

from transfer.flags import ARCHITECTURES


def arch_title(arch: str) -> str:
    """Its name for people, as ResNet-18."""
    return arch.replace("resnet", "ResNet-")


def new_network(arch: str, classes: int = 1000) -> nn.Module:
    """Images (N, 3, H, W) to logits (N, classes), by random weights."""
    return get_model(arch, num_classes=classes)


def meta_state_dict(arch: str, classes: int = 1000) -> dict[str, Tensor]:
    """Its state dict as names, shapes and dtypes: tensors on the meta device."""
    with torch.device("meta"):
        return new_network(arch, classes).state_dict()


def checkpoint_bytes(arch: str, classes: int) -> int:
    """What its state dict takes on a disk, to within a percent."""
    return sum(value.nbytes for value in meta_state_dict(arch, classes).values())


def weights_among(names: Iterable[str]) -> frozenset[str]:
    """The weights among a state dict's keys, without the head's."""
    return frozenset(name for name in names if name.endswith(".weight") and not name.startswith("fc."))


@functools.cache  # all five take 0.2 s to build, and who loads one file may load more
def weights_of(arch: str) -> frozenset[str]:
    return weights_among(meta_state_dict(arch))


def infer_arch(names: Iterable[str], arch_asked: str | None = None) -> str:
    """The architecture that has exactly these weights; else the one asked for, else that with the fewest more or less.

    names: a state dict's keys. The head is no part of it, nor are counts, which not every file has.
    """
    given, strange = weights_among(names), {}
    for arch in ARCHITECTURES:
        strange[arch] = len(weights_of(arch) ^ given)
        if not strange[arch]:
            return arch
    return arch_asked or min(strange, key=strange.get)
