"""Neighbours: which keys lie nearest to each query among features, exactly, or through cells of them.

Features are a tensor, or `Features` that may be mapped from disk: some rows are looked at at a time.
"""

import functools
import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from transfer.features import Features
from transfer.system.console import Progress, track
from transfer.system.signals import check_stop

NEAREST = 8  # neighbours of an image that are looked at
TILE = 4096  # rows of either side of a product at a time: 64 MB
EXACT = 20_000  # keys up to which all are compared: 40,000 would take half a minute on a core
# Measured: of the 8 nearest, 96% and more are found on real features repeated with noise and on made-up clusters, at a
# cost that grows with N * PROBES * CELL.
CELL = 256  # keys per cell, on average
PROBES = 16  # cells that are looked into for a query: those that it lies along most
SAMPLED = 16  # keys per cell that its centre is found from
ROUNDS = 4  # of k-means; more find no more neighbours


def nearest(
    queries: Tensor | Features,
    keys: Tensor | Features,
    itself: bool = False,
    *,
    count: int = NEAREST,
    seed: int = 0,
    progress: Progress | None = None,
) -> tuple[Tensor, Tensor]:
    """Of each query the distances of its nearest keys, ascending, and their rows: (N, count) each; fewer of fewer keys.

    queries: (N, V, D), of which the first view counts; keys: (M, V, D), of which that of the V views counts which is
    nearest. itself: the queries are the keys, and no image is its own neighbour. Exact up to EXACT keys; above, through
    cells that are drawn by seed: a few neighbours are missed, and where a query's cells hold too few, its distance is
    inf and its row its own place or 0. progress: counts each query that is done.
    """
    count = max(0, min(count, len(keys) - itself))
    best = torch.full((len(queries), count), torch.inf), torch.zeros(len(queries), count, dtype=torch.int64)
    if not count:
        return best
    pairs = all_tiles(queries, keys) if len(keys) <= EXACT else cell_tiles(queries, keys, seed)
    for rows, columns, done in pairs:
        check_stop()
        found = squared_distances(queries[rows, 0], keys[columns])
        if itself:
            found.masked_fill_(rows[:, None] == columns, torch.inf)
        near, places = found.topk(min(count, len(columns)), largest=False)
        near, places = torch.cat([best[0][rows], near], 1), torch.cat([best[1][rows], columns[places]], 1)
        best[0][rows], order = near.topk(count, largest=False)
        best[1][rows] = places.gather(1, order)
        if progress:
            progress.add(done)
    return best[0].sqrt(), best[1]


def squared_distances(queries: Tensor, keys: Tensor) -> Tensor:
    """Between queries (n, D) and keys (m, V, D), to the nearest view of each: (n, m)."""
    squares = torch.linalg.vector_norm(keys, dim=2).square()  # keys.square() would take as much memory again
    products = (torch.addmm(squares[:, v], queries, keys[:, v].T, alpha=-2) for v in range(keys.shape[1]))
    found = functools.reduce(torch.minimum, products)
    return found.add_(queries.square().sum(1, keepdim=True)).clamp_min_(0)


def all_tiles(queries: Tensor | Features, keys: Tensor | Features) -> Iterator[tuple[Tensor, Tensor, int]]:
    """Rows of queries and of keys to compare, and how many queries are done with it: all with all."""
    for rows in torch.arange(len(queries)).split(TILE):
        for columns in torch.arange(len(keys)).split(TILE):
            yield rows, columns, len(rows) if columns[-1] == len(keys) - 1 else 0


def cell_tiles(queries: Tensor | Features, keys: Tensor | Features, seed: int) -> Iterator[tuple[Tensor, Tensor, int]]:
    """The same, of an inverted file: the keys of a cell with those queries that look into it."""
    cells = find_cells(keys, seed)
    probes = min(PROBES, len(cells.centres))
    near = cells.closest(queries, probes)
    mine = near[:, :1] if queries is keys else cells.closest(keys, 1)
    members, sizes = sort_by(mine.flatten(), len(cells.centres))
    askers, asked = sort_by(near.flatten(), len(cells.centres))
    parts = 0  # of queries times probes
    for columns, rows in zip(members.split(sizes.tolist()), askers.split(asked.tolist()), strict=True):
        for some in (rows // probes).split(TILE) if len(columns) else ():
            for part in columns.split(TILE):
                before = parts // probes
                parts += len(some) if part[-1] == columns[-1] else 0
                yield some, part, parts // probes - before


class Cells(NamedTuple):
    """Directions (C, D) from the mean (D,) of all images, unit vectors: an image's cell is the one it lies along most.

    Not the nearest centre: in many dimensions a few near the mean are that of most images, and their cells hold ten
    times as many as others.
    """

    mean: Tensor
    centres: Tensor

    def closest(self, features: Tensor | Features, count: int) -> Tensor:
        """The numbers (N, count), int32, of the cells that the first views of images (N, V, D) lie along most."""
        offset, near = self.centres @ -self.mean, []
        for rows in track("cells of neighbours:", torch.arange(len(features)).split(TILE)):
            near.append(torch.addmm(offset, features[rows, 0], self.centres.T).topk(count).indices.int())
        return torch.cat(near)


def find_cells(keys: Tensor | Features, seed: int) -> Cells:
    """Cells by k-means of a sample's directions, from drawn keys; an empty one stays as it is."""
    count = math.ceil(len(keys) / CELL)
    drawn = torch.randperm(len(keys), generator=torch.Generator().manual_seed(seed))[: count * SAMPLED]
    sample = keys[drawn, :1]
    mean = sample[:, 0].mean(0)
    units = F.normalize(sample[:, 0] - mean, dim=1)
    cells = Cells(mean, units[:count])
    for _ in range(ROUNDS):
        mine = cells.closest(sample, 1).flatten()
        sums = torch.zeros(count, len(mean)).index_add_(0, mine, units)
        empty = torch.bincount(mine, minlength=count)[:, None] == 0
        cells = Cells(mean, torch.where(empty, cells.centres, F.normalize(sums, dim=1)))
    return cells


def sort_by(cells: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Places ordered by their cell, (n,), and how many each of so many cells has, (count,)."""
    return cells.argsort(stable=True), torch.bincount(cells, minlength=count)
