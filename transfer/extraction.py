"""The one pass over a list: each image decoded once, its views through the backbone, but for what the cache holds."""

import itertools
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.utils.data import Dataset

from transfer.backbone import embed_dataset, pass_batch, unbatch
from transfer.cache import FeatureCache, image_keys, recipe_digest
from transfer.device import Compute
from transfer.distributed import broadcast, gather_rows, get_world_size, is_main_process, rank_slice
from transfer.features import Features
from transfer.inputs.lists import check_unreadable
from transfer.system.console import SHOWN_PROBLEMS, Progress

CHUNK_ROWS = 1024  # images per file of the cache: what a killed pass may lose
MAX_CHUNKS = 16_384  # files of a list, beyond which they hold more images each: Linux lets a process map 65,530


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
    rows = range(len(image_list)) if this_rank_only else rank_slice(len(image_list))
    store = None
    if cache:
        shape = len(dataset.views), backbone.feature_dim
        store = FeatureCache(cache, recipe_digest(backbone, dataset, compute), shape)
    table = extract_table(backbone, dataset, rows, store, compute=compute, max_unreadable=max_unreadable)
    if not this_rank_only and get_world_size() > 1:
        table = share_table(table, store, len(image_list))
    check_unreadable(image_list, table.unreadable, max_unreadable)
    return table.as_features(image_list.labels, table.unreadable)


class Table(NamedTuple):
    """Features of some rows of a list, in chunks (n, V, D): where each row is, its chunk and the row in it, (rows, 2);
    the reasons by row of the list of those without; the files that the chunks are mapped from, where they are.
    """

    chunks: list[Tensor]
    places: Tensor
    unreadable: dict[int, str]
    paths: list[Path]

    def as_features(self, labels: Tensor, unreadable: dict[int, str] | None = None) -> Features:
        """The features of all rows, with the labels of these."""
        longest = max((len(chunk) for chunk in self.chunks), default=1)
        places = self.places[:, 0] * longest + self.places[:, 1] if self.chunks else None
        return Features(self.chunks, longest, labels, unreadable, places=places)

    def in_order(self) -> Tensor:
        """The features of all rows in one tensor."""
        if not self.chunks:
            return torch.empty(0)
        if not self.paths:  # passed just now, as they come
            return self.chunks[0]
        rows = torch.arange(len(self.places))
        return self.as_features(torch.zeros_like(rows))[rows]


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
    if store and len(missing):  # a complete one need not be writable
        store.check_writable()
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


def share_table(table: Table, store: FeatureCache | None, count: int) -> Table:
    """All ranks' features, of so many images, on rank 0, none on the others; and all ranks' unreadable rows.

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
    rows = gather_rows(table.in_order(), count)
    places = torch.stack([torch.zeros(count, dtype=torch.int64), torch.arange(count)], 1)
    return Table([] if rows is None else [rows], places, unreadable, [])
