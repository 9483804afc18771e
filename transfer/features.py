"""Features of whole lists, as they are kept: in memory, or mapped from the cache; and the splits made of them."""

import copy
import functools
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from transfer.distributed import get_rank
from transfer.system.console import first_three, printable, track, warn

BLOCK = 1024  # rows at a time
GATHERED = 4096  # rows of batches at a time: of many mapped chunks each is looked into once for all of them


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
        self.places, self.num_views = places, chunks[0].shape[1] if chunks else 0

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def shape(self) -> tuple[int, int, int]:
        return len(self), self.num_views, self.chunks[0].shape[2]

    def __getitem__(self, key: Tensor | tuple[Tensor, int | Tensor | slice]) -> Tensor:
        """As of a tensor (n, V, D): features[rows] is (len(rows), V, D), features[rows, views] what `gather` gives."""
        return self.gather(*key) if isinstance(key, tuple) else self.gather(key, slice(None))

    def only(self, rows: Tensor) -> "Features":
        """The same features, of which these rows are meant."""
        part = copy.copy(self)
        part.rows = rows
        return part

    def subset(self, rows: Tensor, num_views: int | None = None) -> "Features":
        """The features of these images alone, numbered anew; num_views: the first so many views of them alone."""
        part = copy.copy(self)
        part.places = rows if self.places is None else self.places[rows]
        part.labels, part.rows, part.unreadable = self.labels[rows], torch.arange(len(rows)), {}
        part.num_views = min(self.num_views, num_views or self.num_views)
        return part

    def joined(self, other: "Features") -> "Features":
        """These images, and after them those of another subset of the same features."""
        both = copy.copy(self)
        both.places, both.labels = torch.cat([self.places, other.places]), torch.cat([self.labels, other.labels])
        both.rows = torch.arange(len(both))
        return both

    def gather(self, rows: Tensor, views: int | Tensor | slice) -> Tensor:
        """Of some rows one view, the same or each its own, (len(rows), D); or several, (len(rows), V, D)."""
        places = (rows if self.places is None else self.places[rows]).numpy()
        several, width = isinstance(views, slice), self.chunks[0].shape[2]
        views = slice(*views.indices(self.num_views)) if several else np.broadcast_to(views, len(places))
        shape = (len(places), len(range(self.num_views)[views]), width) if several else (len(places), width)
        gathered = np.empty(shape, np.float32)
        order = places.argsort(kind="stable")  # so that each of many chunks is looked into once
        chunks, inside = np.divmod(places[order], self.step)
        cuts = np.flatnonzero(np.diff(chunks, prepend=-1, append=-1)).tolist()
        for first, last in itertools.pairwise(cuts):
            here, chunk = order[first:last], self.chunks[chunks[first]].numpy()
            gathered[here] = chunk[inside[first:last], views if several else views[here]]
        return torch.from_numpy(gathered)

    def batches(self, rows: Tensor, views: int | Tensor, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """(features, labels), batch by batch, of rows in order: of each the same view, or its own (len(rows),)."""
        views = views if torch.is_tensor(views) else torch.full_like(rows, views)
        for some, features in batches_of(self, rows, views, batch_size):
            yield features, self.labels[some]

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
        for number, chunk in enumerate(track("exact copies:", self.chunks)):
            for start in range(0, len(chunk), BLOCK):
                features = chunk[start : start + BLOCK, 0].contiguous()
                first = number * self.step + start
                hashes[first : first + len(features)] = (features.view(torch.int32).long() * odd).sum(1)
        return hashes


def batches_of(
    features: Tensor | Features, rows: Tensor, views: Tensor, batch_size: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """(rows, their features (n, D)), batch by batch, of each row its own view; (N,) each."""
    many = batch_size * max(1, GATHERED // batch_size)
    for some, their in zip(rows.split(many), views.split(many), strict=True):
        yield from zip(some.split(batch_size), features[some, their].split(batch_size), strict=True)


def moments(features: Tensor | Features) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of the first view of n images, (D,) each; no deviation is 0."""
    parts, width = torch.arange(len(features)).split(BLOCK), features.shape[2]
    total, squares = torch.zeros(2, width, dtype=torch.float64)
    for rows in track("mean:", parts):
        total += features[rows, 0].sum(0, dtype=torch.float64)
    mean = total / len(features)
    for rows in track("deviation:", parts):
        squares += (features[rows, 0] - mean).square().sum(0)
    return mean.float(), (squares / len(features)).sqrt().float().clamp_min(1e-6)


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


def warn_on_leakage(train: Split, test: Split, noun: str) -> None:
    """Warn where both lists hold an image, by path or by content: the same pixels give the same features on a CPU.

    noun: what the other images are for, test or validation.
    """
    if get_rank():  # which has no features
        return
    both = torch.isin(test.features.content_hashes(), train.features.content_hashes())
    # Hashes, since a million paths as Python's objects would take a hundred times the eight bytes of each.
    lists = train.dataset.image_list, test.dataset.image_list
    paths = [np.fromiter(map(hash, each.each_path()), np.int64, len(each)) for each in lists]
    both = (both | torch.from_numpy(np.isin(paths[1], paths[0]))).nonzero().flatten()
    if len(both):
        warn(
            f"{len(both):,} of {len(lists[1]):,} {noun} images are in {lists[0].name} too, so the {noun} accuracy is "
            f"not to be believed: {first_three([lists[1].where(row) for row in both.tolist()])}"
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
