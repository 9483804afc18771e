"""Neighbours: which keys lie nearest to each query among features, exactly, or through cells of them.

Features are a tensor, or `Features` that may be mapped from disk: some rows are looked at at a time.
"""

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from transfer.features import Features
from transfer.system.console import Progress, track
from transfer.system.signals import check_stop

NEAREST = 8  # neighbours of an image that are looked at
TILE = 4096  # rows of either side of a product at a time: 64 MB
EXACT = 20_000  # keys up to which all are compared: 40,000 would take half a minute on a core
# Measured: of the 8 nearest, 95% and more are found on real features repeated with noise and on made-up
# clusters, at a cost that grows with N * PROBES * CELL.
CELL = 256  # keys per cell, on average
PROBES = 16  # cells that are looked into for a query: those of the nearest centres
SAMPLED = 16  # keys per cell that its centre is found from
ROUNDS = 4  # of k-means: further ones move the centres, not the neighbours found


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
    squares = keys.square().sum(2)
    products = [torch.addmm(squares[:, v], queries, keys[:, v].T, alpha=-2) for v in range(keys.shape[1])]
    found = products[0] if len(products) == 1 else torch.stack(products).amin(0)
    return found.add_(queries.square().sum(1, keepdim=True)).clamp_min_(0)


def all_tiles(queries: Tensor | Features, keys: Tensor | Features) -> Iterator[tuple[Tensor, Tensor, int]]:
    """Rows of queries and of keys to compare, and how many queries are done with it: all with all."""
    for rows in torch.arange(len(queries)).split(TILE):
        for columns in torch.arange(len(keys)).split(TILE):
            yield rows, columns, len(rows) if columns[-1] == len(keys) - 1 else 0


def cell_tiles(queries: Tensor | Features, keys: Tensor | Features, seed: int) -> Iterator[tuple[Tensor, Tensor, int]]:
    """The same, of an inverted file: the keys of a cell with those queries whose nearest centres include its own."""
    centres = cell_centres(keys, seed)
    probes = min(PROBES, len(centres))
    near = closest(queries, centres, probes)
    mine = near[:, :1] if queries is keys else closest(keys, centres, 1)
    members, sizes = sort_by(mine.flatten(), len(centres))
    askers, asked = sort_by(near.flatten(), len(centres))
    parts = 0  # of queries times probes
    for columns, rows in zip(members.split(sizes.tolist()), askers.split(asked.tolist()), strict=True):
        for some in (rows // probes).split(TILE) if len(columns) else ():
            for part in columns.split(TILE):
                before = parts // probes
                parts += len(some) if part[-1] == columns[-1] else 0
                yield some, part, parts // probes - before


def cell_centres(keys: Tensor | Features, seed: int) -> Tensor:
    """Centres (C, D) of cells of the first views: k-means on a sample, from drawn keys; an empty cell keeps its own."""
    cells = math.ceil(len(keys) / CELL)
    drawn = torch.randperm(len(keys), generator=torch.Generator().manual_seed(seed))[: cells * SAMPLED]
    sample = keys[drawn, :1]
    centres = sample[:cells, 0].clone()
    for _ in range(ROUNDS):
        mine = closest(sample, centres, 1).flatten()
        sizes = torch.bincount(mine, minlength=cells)
        means = torch.zeros_like(centres).index_add_(0, mine, sample[:, 0]) / sizes.clamp_min(1)[:, None]
        centres = torch.where(sizes[:, None] > 0, means, centres)
    return centres


def closest(features: Tensor | Features, centres: Tensor, count: int) -> Tensor:
    """The numbers (N, count), int32, of the nearest centres (C, D) of the first view of each image (N, V, D)."""
    half = centres.square().sum(1) / -2
    parts = track("cells of neighbours:", torch.arange(len(features)).split(TILE))
    return torch.cat([torch.addmm(half, features[rows, 0], centres.T).topk(count).indices.int() for rows in parts])


def sort_by(cells: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Places ordered by their cell, (n,), and how many each of so many cells has, (count,)."""
    return cells.argsort(stable=True), torch.bincount(cells, minlength=count)
