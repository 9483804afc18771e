"""Features of whole lists: the one pass that makes them, and what is kept of it."""

import copy
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.utils.data import Dataset

from transfer.backbone import PASS_BATCH, embed_dataset, unbatch
from transfer.cache import chunk_path, read_chunk, recipe_digest, save_chunk
from transfer.console import Progress, first_three, warn
from transfer.device import Compute
from transfer.distributed import broadcast, gather_rows, get_rank, get_world_size, is_main_process, rank_slice
from transfer.lists import check_unreadable

CHUNK_ROWS = 1024  # images per file of the cache: what a killed pass may lose


class Features:
    """Features of n images, float32 (n, V, D), in chunks of `step` rows: in memory, or mapped from the cache.

    labels: (n,); rows: the numbers of the images that are meant, at first all that could be read. Under torchrun only
    rank 0 has chunks.
    """

    def __init__(self, chunks: Sequence[Tensor], step: int, labels: Tensor, unreadable: dict[int, str] | None = None):
        self.chunks, self.step, self.labels, self.unreadable = chunks, step, labels, unreadable or {}
        readable = torch.ones(len(labels), dtype=torch.bool)
        readable[list(self.unreadable)] = False
        self.rows = readable.nonzero().flatten()
        self.places = None  # of the images in the chunks, where these hold others too

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
        slices = (part[:, 0].contiguous() for chunk in self.chunks for part in chunk.split(CHUNK_ROWS))
        hashes = torch.cat([(features.view(torch.int32).long() * odd).sum(1) for features in slices])
        return hashes if self.places is None else hashes[self.places]


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

    With a cache, chunks found there are not computed, and new ones are kept. Under torchrun each rank does its slice,
    unless this rank does all, and the features are rank 0's alone. Raises UserError (status 1) where more images than
    max_unreadable can't be read, and as `embed_dataset` and `save_atomically` do.
    """
    image_list = dataset.image_list
    # Whole chunks for each rank, so that another number of ranks finds them in the cache.
    rows = range(len(image_list)) if this_rank_only else rank_slice(len(image_list), step=CHUNK_ROWS if cache else 1)
    step = CHUNK_ROWS if cache else max(1, len(rows))
    spans = [range(start, min(start + step, rows.stop)) for start in range(rows.start, rows.stop, step)]
    paths = []
    if cache and spans:
        digest = recipe_digest(backbone, dataset, compute)
        paths = [chunk_path(cache, digest, image_list, span) for span in spans]
    found = extract_chunks(backbone, dataset, spans, paths, compute=compute, max_unreadable=max_unreadable)
    chunks = [chunk for chunk, _ in found]
    unreadable = {row: why for _, reasons in found for row, why in reasons.items()}
    if not this_rank_only and get_world_size() > 1:
        chunks, step, unreadable = share_chunks(chunks, unreadable, paths, step=step, count=len(image_list))
    check_unreadable(image_list, unreadable, max_unreadable)
    return Features(chunks, step, image_list.labels, unreadable)


def extract_chunks(
    backbone: nn.Module,
    dataset: Dataset,
    spans: Sequence[range],
    paths: Sequence[Path],
    *,
    compute: Compute,
    max_unreadable: int,
) -> list[tuple[Tensor, dict[int, str]]]:
    """The features (len(span), V, D) of each span of rows, and the reasons by row of those without.

    paths: where each span is kept, or none. Raises UserError as `extract_features` does.
    """
    shapes = [(len(span), len(dataset.views), backbone.feature_dim) for span in spans]
    kept = [read_chunk(path, shape) for path, shape in zip(paths, shapes, strict=True)] if paths else []
    found = kept or [None] * len(spans)
    missing = [number for number, chunk in enumerate(found) if chunk is None]
    rows = [row for number in missing for row in spans[number]]
    views = len(dataset.views)
    batch_size = max(1, PASS_BATCH[compute.device.type] // views)
    images = unbatch(embed_dataset(backbone, dataset, rows, compute=compute, batch_size=batch_size, per_image=views))
    progress, unreadable = Progress(f"{dataset.image_list.name}:", len(rows)), {}
    for number in missing:
        features, reasons = torch.zeros(shapes[number]), {}
        for row, values in itertools.islice(images, len(spans[number])):
            if isinstance(values, str):
                reasons[row] = unreadable[row] = values
                if max_unreadable and len(unreadable) > max_unreadable:  # no use in going on
                    stopped = row + 1 < len(dataset)
                    check_unreadable(dataset.image_list, unreadable, max_unreadable, stopped=stopped)
            else:
                features[row - spans[number].start] = values
            progress.add(1)
        found[number] = features, reasons
        if paths:
            save_chunk(paths[number], features, reasons)
            found[number] = read_chunk(paths[number], features.shape) or found[number]
    return found


def share_chunks(
    chunks: Sequence[Tensor], unreadable: dict[int, str], paths: Sequence[Path], *, step: int, count: int
) -> tuple[list[Tensor], int, dict[int, str]]:
    """All ranks' features on rank 0, none on the others, in chunks of how many rows; and all ranks' unreadable rows.

    From a cache that rank 0 sees they are mapped, so that its memory does not grow with the data. Else they are sent.
    """
    gathered = [None] * get_world_size()
    mine = unreadable, [path.resolve() for path in paths], [chunk.shape for chunk in chunks]
    dist.all_gather_object(gathered, mine)
    everywhere = {row: reason for reasons, *_ in gathered for row, reason in reasons.items()}
    mapped = []
    if is_main_process() and paths:
        places = [(path, shape) for _, theirs, shapes in gathered for path, shape in zip(theirs, shapes, strict=True)]
        mapped = [read_chunk(path, shape) for path, shape in places]
    if broadcast(bool(mapped) and all(mapped)):  # else the others must send theirs
        return [chunk for chunk, _ in mapped], step, everywhere
    own = chunks[0] if len(chunks) == 1 else torch.cat(chunks) if chunks else torch.empty(0)
    rows = gather_rows(own, count, step if paths else 1)
    return [rows] if rows is not None else [], count, everywhere


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
