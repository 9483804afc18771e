"""Training: the hyperparameters of a run, which views an epoch trains on, batches of features, losses checked."""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler

from transfer.features import Features
from transfer.system.console import QUIET, Progress, UserError


@dataclass(frozen=True)
class Hyperparameters:
    """What a run is trained with, by the names of train.py's flags."""

    epochs: int
    lr: float
    batch_size: int
    seed: int
    finetune_epochs: int
    finetune_lr: float
    unfreeze: str
    balance: bool
    views: int
    view_seed: int
    size: int
    val_split: float | None

    @classmethod
    def from_flags(cls, flags: dict) -> "Hyperparameters":
        if flags["view_seed"] is None:
            flags = flags | {"view_seed": flags["seed"]}
        return cls(*(flags[field.name] for field in fields(cls)))


def epoch_views(epoch: int, num_views: int) -> list[int]:
    """The kept views that an epoch, from 1, trains on: evaluation view, mirror image, and a random one by turns."""
    random_view = [2 + (epoch - 1) % (num_views - 2)] if num_views > 2 else []
    return [*range(min(2, num_views)), *random_view]


class FeatureLoader:
    """Batches (features (B, D), labels (B,)) of kept features, as a DataLoader gives them.

    With shuffle_seed, those to train on: each image in all of the epoch's views, in a new order each time. Without,
    those to evaluate on: each image in the evaluation view, in order.
    """

    def __init__(self, features: Features, batch_size: int, shuffle_seed: int | None = None):
        self.features, self.batch_size, self.epoch = features, batch_size, 1
        self.generator = None if shuffle_seed is None else torch.Generator().manual_seed(shuffle_seed)

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        if self.generator is None:
            return self.features.batches(self.features.rows, 0, self.batch_size)
        views = torch.tensor(epoch_views(self.epoch, self.features.num_views))
        rows, views = torch.cartesian_prod(self.features.rows, views).T
        order = torch.randperm(len(rows), generator=self.generator)
        return self.count(self.features.batches(rows[order], views[order], self.batch_size), len(rows))

    def count(self, batches: Iterator[tuple[Tensor, Tensor]], total: int) -> Iterator[tuple[Tensor, Tensor]]:
        """The same batches, with progress in an epoch that takes long."""
        progress = Progress(f"epoch {self.epoch}:", total, quiet=QUIET, noun="views")
        for batch in batches:
            yield batch
            progress.add(len(batch[1]))


class Loaders(NamedTuple):
    """Batches of (inputs, labels) to train on, which has `set_epoch`, and to evaluate on."""

    train: FeatureLoader
    val: Iterable[tuple[Tensor, Tensor]]


class Training(NamedTuple):
    """A network and what trains it, the head alone or with the last stages. The scheduler makes a step per batch, but
    ReduceLROnPlateau one per epoch.
    """

    network: nn.Module
    optimizer: torch.optim.Optimizer
    scheduler: LRScheduler
    loaders: Loaders


def check_finite(loss: float, where: str, inputs: Iterable[Tensor]) -> None:
    """Raises UserError (status 1) where a loss is not finite; the inputs, looked at only then, show which cause it has.

    where: the loss, the epoch and the step in words.
    """
    if math.isfinite(loss):
        return
    if all(bool(each.isfinite().all()) for each in inputs):
        raise UserError(f"{where}; try a smaller --lr", status=1)
    raise UserError(f"{where}: the backbone's features overflow; give other --weights", status=1)
