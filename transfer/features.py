"""Features of whole lists: the one pass that makes them, and what is kept of it."""

import copy
import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.utils.data import Dataset

from transfer.backbone import embed_dataset, pass_batch, unbatch
from transfer.cache import FeatureCache, image_keys, recipe_digest
from transfer.device import Compute
from transfer.distributed import broadcast, gather_rows, get_rank, get_world_size, is_main_process, rank_slice
from transfer.inputs.lists import check_unreadable
from transfer.system.console import SHOWN_PROBLEMS, Progress, first_three, printable, warn

CHUNK_ROWS = 1024  # images per file of the cache: what a killed pass may lose
MAX_CHUNKS = 16_384  # files of a list, beyond which they hold more images each: Linux lets a process map 65,530


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
        width = self.chunks[0].shape[2]
        odd = torch.randint(-(2**62), 2**62, (width,), generator=torch.Generator().manual_seed(0)) | 1
        # Sums of the bits as integers, each times a random number, modulo 2**64; in slices, to bound the memory.
        hashes = torch.zeros(len(self.chunks) * self.step, dtype=torch.int64)
        for number, chunk in enumerate(self.chunks):
            for start in range(0, len(chunk), CHUNK_ROWS):
                features = chunk[start : start + CHUNK_ROWS, 0].contiguous()
                first = number * self.step + start
                hashes[first : first + len(features)] = (features.view(torch.int32).long() * odd).sum(1)
        return hashes[: len(self.labels)] if self.places is None else hashes[self.places]


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


def extract_features(
    backbone: nn.Module,
    dataset: Dataset,
    *,
    compute: Compute,
    cache: Path | None = None,
    max_unreadable: int = 0,
    this_rank_only: bool = False,
) -> Features:
    """One pass over an `ImageDataset`: each image decoded once, each of its V views through the backbone once.

    With a cache, images found there are not passed, and new ones are kept. Under torchrun each rank does its slice,
    unless this rank does all, and the features are rank 0's alone. Raises UserError (status 1) where more images than
    max_unreadable can't be read, and as `embed_dataset` and `save_atomically` do.
    """
    image_list = dataset.image_list
    # Whole chunks for each rank, so that another number of ranks keeps the same ones.
    step = CHUNK_ROWS if cache else 1
    rows = range(len(image_list)) if this_rank_only else rank_slice(len(image_list), step=step)
    store = None
    if cache:
        shape = len(dataset.views), backbone.feature_dim
        store = FeatureCache(cache, recipe_digest(backbone, dataset, compute), shape)
    table = extract_table(backbone, dataset, rows, store, compute=compute, max_unreadable=max_unreadable)
    if not this_rank_only and get_world_size() > 1:
        table = share_table(table, store, count=len(image_list), step=step)
    check_unreadable(image_list, table.unreadable, max_unreadable)
    longest = max((len(chunk) for chunk in table.chunks), default=1)
    places = table.places[:, 0] * longest + table.places[:, 1] if table.chunks else None
    return Features(table.chunks, longest, image_list.labels, table.unreadable, places=places)


class Table(NamedTuple):
    """Features of some rows of a list, in chunks (n, V, D): where each row is, its chunk and the row in it, (rows, 2);
    the reasons by row of the list of those without; the files that the chunks are mapped from, where they are.
    """

    chunks: list[Tensor]
    places: Tensor
    unreadable: dict[int, str]
    paths: list[Path]

    def in_order(self) -> Tensor:
        """The features of all rows in one tensor."""
        if not self.chunks:
            return torch.empty(0)
        if not self.paths:  # passed just now, as they come
            return self.chunks[0]
        rows = torch.empty(len(self.places), *self.chunks[0].shape[1:])
        for number, chunk in enumerate(self.chunks):
            here = self.places[:, 0] == number
            rows[here] = chunk[self.places[here, 1]]
        return rows


def extract_table(
    backbone: nn.Module,
    dataset: Dataset,
    rows: range,
    store: FeatureCache | None,
    *,
    compute: Compute,
    max_unreadable: int,
) -> Table:
    """The features of these rows: found in the store, or passed and kept there. Raises as `extract_features` does."""
    keys = image_keys(dataset.image_list, rows) if store else torch.empty(len(rows), 2)
    paths, found, places = store.find(keys) if store else ([], [], torch.full((len(rows), 2), -1))
    table = Table([features for features, _ in found], places, {}, paths)
    for number, (_, reasons) in enumerate(found):
        for row in (places[:, 0] == number).nonzero().flatten().tolist() if reasons else ():
            if reason := reasons.get(int(places[row, 1])):
                table.unreadable[rows.start + row] = reason
    missing = (places[:, 0] < 0).nonzero().flatten()
    parts = missing.split(chunk_rows(len(dataset)) if store else len(rows)) if len(missing) else ()
    listed = [part + rows.start for part in parts]
    passed = extract_chunks(backbone, dataset, listed, compute=compute, max_unreadable=max_unreadable)
    for part, (features, reasons) in zip(parts, passed, strict=True):
        table.unreadable.update({rows.start + int(part[row]): reason for row, reason in reasons.items()})
        if store:
            path, features = store.save(keys[part], features, reasons)
            paths.append(path)
        places[part] = torch.stack([torch.full_like(part, len(table.chunks)), torch.arange(len(part))], 1)
        table.chunks.append(features)
    return table


def chunk_rows(count: int) -> int:
    """The images per file of the cache, of a list of so many."""
    return CHUNK_ROWS * max(1, math.ceil(count / (CHUNK_ROWS * MAX_CHUNKS)))


def extract_chunks(
    backbone: nn.Module,
    dataset: Dataset,
    parts: Sequence[Tensor],
    *,
    compute: Compute,
    max_unreadable: int,
) -> Iterator[tuple[Tensor, dict[int, str]]]:
    """One pass over these rows of a dataset, some (n,) after the other: of each part its features (n, V, D), and the
    reasons by place in the part of those without. Raises as `extract_features` does.
    """
    rows, views = [row for part in parts for row in part.tolist()], len(dataset.views)
    batch_size = max(1, pass_batch(compute.device, dataset.size) // views)
    images = unbatch(embed_dataset(backbone, dataset, rows, compute=compute, batch_size=batch_size, per_image=views))
    progress, unreadable = Progress(f"{dataset.image_list.name}:", len(rows)), {}
    for part in parts:
        features, reasons = torch.zeros(len(part), views, backbone.feature_dim), {}
        for place, (row, values) in enumerate(itertools.islice(images, len(part))):
            if isinstance(values, str):
                reasons[place] = unreadable[row] = values
                # No use in going on; but as many are named as are shown.
                if max_unreadable and len(unreadable) > max(max_unreadable, SHOWN_PROBLEMS):
                    stopped = row + 1 < len(dataset)
                    check_unreadable(dataset.image_list, unreadable, max_unreadable, stopped=stopped)
            else:
                features[place] = values
            progress.add(1)
        yield features, reasons


def share_table(table: Table, store: FeatureCache | None, *, count: int, step: int) -> Table:
    """All ranks' features on rank 0, none on the others; and all ranks' unreadable rows. step: slices are whole steps.

    From a cache that rank 0 sees they are mapped, so that its memory does not grow with the data. Else they are sent.
    """
    gathered = [None] * get_world_size()
    dist.all_gather_object(gathered, (table.unreadable, [path.resolve() for path in table.paths], table.places))
    unreadable = {row: reason for reasons, *_ in gathered for row, reason in reasons.items()}
    paths = [path for _, theirs, _ in gathered for path in theirs]
    mapped = [store.read(path) for path in paths] if store and is_main_process() else []
    if broadcast(bool(mapped) and all(mapped)):  # else the others must send theirs
        first = list(itertools.accumulate((len(theirs) for _, theirs, _ in gathered), initial=0))
        places = [theirs + torch.tensor([start, 0]) for start, (*_, theirs) in zip(first, gathered, strict=False)]
        return Table([chunk for chunk, _ in mapped], torch.cat(places), unreadable, paths)
    rows = gather_rows(table.in_order(), count, step)
    places = torch.stack([torch.zeros(count, dtype=torch.int64), torch.arange(count)], 1)
    return Table([] if rows is None else [rows], places, unreadable, [])


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
    hashes, counts = split.features.content_hashes()[rows].unique(return_counts=True)
    if len(rows) > 1 and 2 * (most := int(counts.max())) >= len(rows):
        alike = rows[split.features.content_hashes()[rows] == hashes[counts.argmax()]]
        _, views = split.dataset[int(alike[0])]
        if isinstance(views, Tensor) and len(views[0].flatten(0, 1).unique(dim=0)) == 1:
            image_list = split.dataset.image_list
            fix = "look at some, and at how they were saved"
            warn(
                f"{image_list.name}: {most:,} of {len(rows):,} images are one flat colour, such as "
                f"{printable(image_list.path(int(alike[0])))}; {fix}"
            )
