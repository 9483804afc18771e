"""Features of whole lists, as they are kept: in memory, or mapped from the cache; and the splits made of them."""

import copy
import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from transfer.distributed import get_rank
from transfer.system.console import first_three, printable, warn

BLOCK = 1024  # rows at a time


class Features:
    """Features of n images, float32 (n, V, D), in chunks of `step` rows: in memory, or mapped from the cache.

    labels: (n,); rows: the numbers of the images that are meant, at first all that could be read; places: (n,) where
    each image is, as chunk * step + row, where chunks may be shorter and hold other images too. Under torchrun only
    rank 0 has chunks.
    """

    def __init__(
        self,
        chunks: Sequence[Tensor],
        step: int,
        labels: Tensor,
        unreadable: dict[int, str] | None = None,
        *,
        places: Tensor | None = None,
    ):
        self.chunks, self.step, self.labels, self.unreadable = chunks, step, labels, unreadable or {}
        readable = torch.ones(len(labels), dtype=torch.bool)
        readable[list(self.unreadable)] = False
        self.rows = readable.nonzero().flatten()
        self.places = places

    def only(self, rows: Tensor) -> "Features":
        """The same features, of which these rows are meant."""
        part = copy.copy(self)
        part.rows = rows
        return part

    def subset(self, rows: Tensor) -> "Features":
        """The features of these images alone, numbered anew."""
        part = copy.copy(self)
        part.places = rows if self.places is None else self.places[rows]
        part.labels, part.rows, part.unreadable = self.labels[rows], torch.arange(len(rows)), {}
        return part

    @property
    def num_views(self) -> int:
        return self.chunks[0].shape[1]

    def gather(self, rows: Tensor, views: int | Tensor | slice) -> Tensor:
        """Of some rows one view, the same or each its own, (len(rows), D); or several, (len(rows), V, D)."""
        rows = rows if self.places is None else self.places[rows]
        if len(self.chunks) == 1:
            return self.chunks[0][rows, views]
        gathered = None
        for chunk in (rows // self.step).unique().tolist():
            here = rows // self.step == chunk
            found = self.chunks[chunk][rows[here] - chunk * self.step, views[here] if torch.is_tensor(views) else views]
            gathered = found.new_empty(len(rows), *found.shape[1:]) if gathered is None else gathered
            gathered[here] = found
        return gathered

    def batches(self, rows: Tensor, views: int | Tensor, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """(features, labels), batch by batch, of rows in order: of each the same view, or its own (len(rows),)."""
        for start in range(0, len(rows), batch_size):
            batch = slice(start, start + batch_size)
            yield self.gather(rows[batch], views[batch] if torch.is_tensor(views) else views), self.labels[rows[batch]]

    def content_hashes(self) -> Tensor:
        """A hash of each image's features in the evaluation view: (n,), int64."""
        hashes = self.chunk_hashes
        return hashes[: len(self.labels)] if self.places is None else hashes[self.places]

    @functools.cached_property  # several look at them, and to compute them reads all features
    def chunk_hashes(self) -> Tensor:
        """The same of each row of the chunks, at chunk * step + row."""
        width = self.chunks[0].shape[2]
        odd = torch.randint(-(2**62), 2**62, (width,), generator=torch.Generator().manual_seed(0)) | 1
        # Sums of the bits as integers, each times a random number, modulo 2**64; in slices, to bound the memory.
        hashes = torch.zeros(len(self.chunks) * self.step, dtype=torch.int64)
        for number, chunk in enumerate(self.chunks):
            for start in range(0, len(chunk), BLOCK):
                features = chunk[start : start + BLOCK, 0].contiguous()
                first = number * self.step + start
                hashes[first : first + len(features)] = (features.view(torch.int32).long() * odd).sum(1)
        return hashes


@dataclass(frozen=True)
class Split:
    """Images for one purpose: an `ImageDataset`, and kept features whose `rows` are the images of it that are meant."""

    dataset: Dataset
    features: Features


@dataclass(frozen=True)
class Splits:
    """What training and testing are done on: trainval is all of the training list, of which train and val are parts.

    Without --val-split train is trainval, and val, which chooses the epoch, is test.
    """

    trainval: Split
    train: Split
    val: Split
    test: Split

    @property
    def test_held_out(self) -> bool:
        """Whether the test images are held out of the training images' source, with the same views."""
        return self.test.features.chunks is self.trainval.features.chunks


def warn_on_leakage(train: Split, test: Split) -> None:
    """Warn where both lists hold an image, by path or by content: the same pixels give the same features on a CPU."""
    if get_rank():  # which has no features
        return
    both = torch.isin(test.features.content_hashes(), train.features.content_hashes())
    # Hashes, since a million paths as Python's objects would take a hundred times the eight bytes of each.
    lists = train.dataset.image_list, test.dataset.image_list
    paths = [np.fromiter(map(hash, each.each_path()), np.int64, len(each)) for each in lists]
    both = (both | torch.from_numpy(np.isin(paths[1], paths[0]))).nonzero().flatten()
    if len(both):
        warn(
            f"{len(both):,} of {len(lists[1]):,} test images are in {lists[0].name} too, so the test accuracy is not "
            f"to be believed: {first_three([lists[1].where(row) for row in both.tolist()])}"
        )


def warn_on_flat_images(split: Split) -> None:
    """Warn where half of the images or more are of one flat colour, the same, as where all came out black."""
    if get_rank():  # which has no features
        return
    rows = split.features.rows
    content = split.features.content_hashes()[rows]
    hashes, counts = content.unique(return_counts=True)
    if len(rows) > 1 and 2 * (most := int(counts.max())) >= len(rows):
        alike = rows[content == hashes[counts.argmax()]]
        _, views = split.dataset[int(alike[0])]
        if isinstance(views, Tensor) and len(views[0].flatten(0, 1).unique(dim=0)) == 1:
            image_list = split.dataset.image_list
            fix = "look at some, and at how they were saved"
            warn(
                f"{image_list.name}: {most:,} of {len(rows):,} images are one flat colour, such as "
                f"{printable(image_list.path(int(alike[0])))}; {fix}"
            )
