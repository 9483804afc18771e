"""Features of whole lists: the one pass that makes them, and what is kept of it."""

import itertools
import math
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.utils.data import Dataset

from transfer.backbone import PASS_BATCH, each_image, embed_in_order
from transfer.cache import chunk_path, read_chunk, recipe_digest, save_chunk
from transfer.console import Progress, first_three, warn
from transfer.device import Compute
from transfer.distributed import my_rank, rank_slice, world_size
from transfer.lists import ImageList, check_unread

CHUNK_ROWS = 1024  # images a file of the cache: what a killed pass may lose


class Features:
    """Features of n images, float32 (n, V, 512), in chunks of `step` rows: in memory, or mapped from the cache.

    labels: (n,); rows: the numbers of the images that could be read. Under torchrun only rank 0 has chunks.
    """

    def __init__(self, chunks: Sequence[Tensor], step: int, labels: Tensor, unread: dict[int, str] | None = None):
        self.chunks, self.step, self.labels, self.unread = chunks, step, labels, unread or {}
        readable = torch.ones(len(labels), dtype=torch.bool)
        readable[list(self.unread)] = False
        self.rows = readable.nonzero().flatten()

    def take(self, rows: Tensor, view: int) -> Tensor:
        """One view of some rows: (len(rows), 512)."""
        if len(self.chunks) == 1:
            return self.chunks[0][rows, view]
        taken = torch.empty(len(rows), self.chunks[0].shape[2])
        for chunk in (rows // self.step).unique().tolist():
            here = rows // self.step == chunk
            taken[here] = self.chunks[chunk][rows[here] - chunk * self.step, view]
        return taken

    def digests(self) -> list[int]:
        """A number for each image that tells it by its evaluation view."""
        rows = (features for chunk in self.chunks for features in chunk[:, 0])
        return [hash(features.numpy().tobytes()) for features in itertools.islice(rows, len(self.labels))]


def extract_features(
    backbone: nn.Module,
    dataset: Dataset,
    *,
    compute: Compute,
    cache: Path | None = None,
    tolerated: int = 0,
    alone: bool = False,
) -> Features:
    """One pass over a `train.Views`: each image decoded once, each of its V views through the backbone once.

    With a cache, chunks found there are not computed, and new ones are kept. Under torchrun each rank does its slice,
    unless it works alone, and the features are rank 0's alone. Raises UserError (status 1) where more images than
    tolerated can't be read, and as `embed_in_order` and `save_atomically` do.
    """
    listed, views = dataset.listed, dataset.views
    rows = range(len(listed)) if alone else rank_slice(len(listed))
    step = CHUNK_ROWS if cache else max(1, len(rows))
    spans = [range(start, min(start + step, rows.stop)) for start in range(rows.start, rows.stop, step)]
    paths, found = [], [None] * len(spans)
    if cache:
        digest = recipe_digest(backbone, dataset, compute)
        paths = [chunk_path(cache, digest, listed, span) for span in spans]
        found = [read_chunk(path, (len(span), len(views), 512)) for path, span in zip(paths, spans, strict=True)]
    missing = [number for number, chunk in enumerate(found) if chunk is None]
    images = each_image(
        embed_in_order(
            backbone,
            dataset,
            [row for number in missing for row in spans[number]],
            compute=compute,
            batch_size=max(1, PASS_BATCH[compute.device.type] // len(views)),
            per_image=len(views),
        )
    )
    progress = Progress(f"{listed.name}:", sum(len(spans[number]) for number in missing))
    for number in missing:
        found[number] = fill_chunk(images, spans[number], len(views), progress)
        if cache:
            save_chunk(paths[number], *found[number])
            found[number] = read_chunk(paths[number], found[number][0].shape) or found[number]
    chunks, unread = [chunk for chunk, _ in found], {row: why for _, reasons in found for row, why in reasons.items()}
    if not alone and world_size() > 1:
        chunks, step, unread = gather_chunks(chunks, step, unread, len(listed))
    check_unread(listed, unread, tolerated)
    return Features(chunks, step, listed.labels, unread)


def fill_chunk(
    images: Iterator[tuple[int, Tensor | str]], span: range, views: int, progress: Progress
) -> tuple[Tensor, dict[int, str]]:
    """The features (len(span), V, 512) of the next images, and the reasons by row of those without."""
    features, unread = torch.zeros(len(span), views, 512), {}
    for row, values in itertools.islice(images, len(span)):
        if isinstance(values, str):
            unread[row] = values
        else:
            features[row - span.start] = values
        progress.add(1)
    return features, unread


def gather_chunks(
    chunks: Sequence[Tensor], step: int, unread: dict[int, str], count: int
) -> tuple[list[Tensor], int, dict[int, str]]:
    """All ranks' features on rank 0, a chunk a rank, none on the others; and all ranks' unread rows on each."""
    size = math.ceil(count / world_size())
    shape = torch.tensor(chunks[0].shape[1:] if chunks else (0, 0))
    dist.all_reduce(shape, op=dist.ReduceOp.MAX)  # a rank without rows does not know it
    mine = torch.zeros(size, *shape.tolist())
    for number, chunk in enumerate(chunks):
        mine[number * step : number * step + len(chunk)] = chunk
    gathered = [torch.empty_like(mine) for _ in range(world_size())] if my_rank() == 0 else []
    dist.gather(mine, gathered or None)
    reasons = [None] * world_size()
    dist.all_gather_object(reasons, unread)
    return gathered, size, {row: why for each in reasons for row, why in each.items()}


def warn_of_overlap(train: ImageList, test: ImageList, train_features: Features, test_features: Features) -> None:
    """Warn where both lists hold an image, by path or by content: the same pixels give the same features."""
    known = set(train_features.digests())
    both = [row for row, digest in enumerate(test_features.digests()) if digest in known]
    if both:
        warn(
            f"{len(both):,} of {len(test):,} test images are in {train.name} too, so the test accuracy is not to be "
            f"believed: {first_three([test.where(row) for row in both])}"
        )
