"""Features of whole lists: the one pass that makes them, and what is kept of it."""

import copy
import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.utils.data import Dataset

from transfer.backbone import PASS_BATCH, each_image, embed_in_order
from transfer.cache import chunk_path, read_chunk, recipe_digest, save_chunk
from transfer.console import Progress, first_three, warn
from transfer.device import Compute
from transfer.distributed import from_rank_0, gather_rows, my_rank, rank_slice, world_size
from transfer.lists import ImageList, check_unread

CHUNK_ROWS = 1024  # images a file of the cache: what a killed pass may lose


class Features:
    """Features of n images, float32 (n, V, D), in chunks of `step` rows: in memory, or mapped from the cache.

    labels: (n,); rows: the numbers of the images that are meant, at first all that could be read. Under torchrun only
    rank 0 has chunks.
    """

    def __init__(self, chunks: Sequence[Tensor], step: int, labels: Tensor, unread: dict[int, str] | None = None):
        self.chunks, self.step, self.labels, self.unread = chunks, step, labels, unread or {}
        readable = torch.ones(len(labels), dtype=torch.bool)
        readable[list(self.unread)] = False
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
        part.labels, part.rows, part.unread = self.labels[rows], torch.arange(len(rows)), {}
        return part

    @property
    def views(self) -> int:
        return self.chunks[0].shape[1]

    def take(self, rows: Tensor, views: int | Tensor | slice) -> Tensor:
        """Of some rows one view, the same or each its own, (len(rows), D); or several, (len(rows), V, D)."""
        rows = rows if self.places is None else self.places[rows]
        if len(self.chunks) == 1:
            return self.chunks[0][rows, views]
        taken = None
        for chunk in (rows // self.step).unique().tolist():
            here = rows // self.step == chunk
            found = self.chunks[chunk][rows[here] - chunk * self.step, views[here] if torch.is_tensor(views) else views]
            taken = found.new_empty(len(rows), *found.shape[1:]) if taken is None else taken
            taken[here] = found
        return taken

    def batches(self, rows: Tensor, views: int | Tensor, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """(features, labels), batch by batch, of rows in order: of each the same view, or its own (len(rows),)."""
        for start in range(0, len(rows), batch_size):
            batch = slice(start, start + batch_size)
            yield self.take(rows[batch], views[batch] if torch.is_tensor(views) else views), self.labels[rows[batch]]

    def digests(self) -> Tensor:
        """A number for each image that tells it by the bits of its evaluation view: (n,)."""
        width = self.chunks[0].shape[2]
        odd = torch.randint(-(2**62), 2**62, (width,), generator=torch.Generator().manual_seed(0)) | 1
        # Sums of the bits as integers, each times a random number, modulo 2**64; in slices, to bound the memory.
        slices = (part[:, 0].contiguous() for chunk in self.chunks for part in chunk.split(CHUNK_ROWS))
        digests = torch.cat([(features.view(torch.int32).long() * odd).sum(1) for features in slices])
        return digests if self.places is None else digests[self.places]


def extract_features(
    backbone: nn.Module,
    dataset: Dataset,
    *,
    width: int,
    compute: Compute,
    cache: Path | None = None,
    tolerated: int = 0,
    alone: bool = False,
) -> Features:
    """One pass over a `train.Views`: each image decoded once, each of its V views through the backbone once, which
    gives so many features (width).

    With a cache, chunks found there are not computed, and new ones are kept. Under torchrun each rank does its slice,
    unless it works alone, and the features are rank 0's alone. Raises UserError (status 1) where more images than
    tolerated can't be read, and as `embed_in_order` and `save_atomically` do.
    """
    listed = dataset.listed
    # Whole chunks for each rank, so that another number of ranks finds them in the cache.
    rows = range(len(listed)) if alone else rank_slice(len(listed), step=CHUNK_ROWS if cache else 1)
    step = CHUNK_ROWS if cache else max(1, len(rows))
    spans = [range(start, min(start + step, rows.stop)) for start in range(rows.start, rows.stop, step)]
    paths = []
    if cache and spans:
        digest = recipe_digest(backbone, dataset, compute)
        paths = [chunk_path(cache, digest, listed, span) for span in spans]
    found = embed_chunks(backbone, dataset, spans, paths, width=width, compute=compute, tolerated=tolerated)
    chunks, unread = [chunk for chunk, _ in found], {row: why for _, reasons in found for row, why in reasons.items()}
    if not alone and world_size() > 1:
        chunks, step, unread = share_chunks(chunks, step, unread, paths, len(listed))
    check_unread(listed, unread, tolerated)
    return Features(chunks, step, listed.labels, unread)


def embed_chunks(
    backbone: nn.Module,
    dataset: Dataset,
    spans: Sequence[range],
    paths: Sequence[Path],
    *,
    width: int,
    compute: Compute,
    tolerated: int,
) -> list[tuple[Tensor, dict[int, str]]]:
    """The features (len(span), V, width) of each span of rows, and the reasons by row of those without.

    paths: where each span is kept, or none. Raises UserError as `extract_features` does.
    """
    views = len(dataset.views)
    kept = (
        [read_chunk(path, (len(span), views, width)) for path, span in zip(paths, spans, strict=True)] if paths else []
    )
    found = kept or [None] * len(spans)
    missing = [number for number, chunk in enumerate(found) if chunk is None]
    rows = [row for number in missing for row in spans[number]]
    batch_size = max(1, PASS_BATCH[compute.device.type] // views)
    images = each_image(
        embed_in_order(backbone, dataset, rows, compute=compute, batch_size=batch_size, per_image=views)
    )
    progress, unread = Progress(f"{dataset.listed.name}:", len(rows)), {}
    for number in missing:
        features, reasons = torch.zeros(len(spans[number]), views, width), {}
        for row, values in itertools.islice(images, len(spans[number])):
            if isinstance(values, str):
                reasons[row] = unread[row] = values
                if tolerated and len(unread) > tolerated:  # no use in going on
                    check_unread(dataset.listed, unread, tolerated, stopped=row + 1 < len(dataset))
            else:
                features[row - spans[number].start] = values
            progress.add(1)
        found[number] = features, reasons
        if paths:
            save_chunk(paths[number], *found[number])
            found[number] = read_chunk(paths[number], features.shape) or found[number]
    return found


def share_chunks(
    chunks: Sequence[Tensor], step: int, unread: dict[int, str], paths: Sequence[Path], count: int
) -> tuple[list[Tensor], int, dict[int, str]]:
    """All ranks' features on rank 0, none on the others, in chunks of how many rows; and all ranks' unread rows.

    From a cache that rank 0 sees they are mapped, so that its memory does not grow with the data. Else they are sent.
    """
    told = [None] * world_size()
    dist.all_gather_object(told, (unread, [path.resolve() for path in paths], [chunk.shape for chunk in chunks]))
    everywhere = {row: reason for reasons, *_ in told for row, reason in reasons.items()}
    mapped = []
    if my_rank() == 0 and paths:
        places = [(path, shape) for _, theirs, shapes in told for path, shape in zip(theirs, shapes, strict=True)]
        mapped = [read_chunk(path, shape) for path, shape in places]
    if from_rank_0(bool(mapped) and all(mapped)):  # else the others must send theirs
        return [chunk for chunk, _ in mapped], step, everywhere
    mine = chunks[0] if len(chunks) == 1 else torch.cat(chunks) if chunks else torch.empty(0)
    rows = gather_rows(mine, count, step if paths else 1)
    return [rows] if rows is not None else [], count, everywhere


def warn_of_overlap(train: ImageList, test: ImageList, train_features: Features, test_features: Features) -> None:
    """Warn where both lists hold an image, by path or by content: the same pixels give the same features on a CPU."""
    both = torch.isin(test_features.digests(), train_features.digests())
    # Hashes, since a million paths as Python's objects would take a hundred times the eight bytes of each.
    paths = [np.fromiter(map(hash, listed.each_path()), np.int64, len(listed)) for listed in (train, test)]
    both = (both | torch.from_numpy(np.isin(paths[1], paths[0]))).nonzero().flatten()
    if len(both):
        warn(
            f"{len(both):,} of {len(test):,} test images are in {train.name} too, so the test accuracy is not to be "
            f"believed: {first_three([test.where(row) for row in both.tolist()])}"
        )
