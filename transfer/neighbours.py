"""Neighbours: which images lie nearest to each among the features."""

import torch
from torch import Tensor

from transfer.signals import check_stop

NEAREST = 8  # neighbours of an image that are looked at
TILE = 4096  # rows of either side of a product at a time: 64 MB


def nearest(queries: Tensor, keys: Tensor, itself: bool = False) -> tuple[Tensor, Tensor]:
    """Of each query the distances of its 8 nearest keys, ascending, and their rows: (N, 8) each; fewer of fewer keys.

    queries: (N, D); keys: (M, V, D), of which that of the V views counts which is nearest. itself: the queries are the
    keys' first views, and no image is its own neighbour. In tiles, so that memory grows with N + M.
    """
    count = max(0, min(NEAREST, len(keys) - itself))
    squares = torch.cat([tile.square().sum(2) for tile in keys.split(TILE)])  # at once it would copy the whole table
    distances, rows = [], []
    for start in range(0, len(queries), TILE):
        block = queries[start : start + TILE]
        near, places = block.new_empty(len(block), 0), torch.empty(len(block), 0, dtype=torch.int64)
        for first in range(0, len(keys), TILE):
            check_stop()
            tile, tile_squares = keys[first : first + TILE], squares[first : first + TILE]
            # Less the block's own squares, which are the same for all keys.
            found = torch.addmm(tile_squares[:, 0], block, tile[:, 0].T, alpha=-2)
            for view in range(1, keys.shape[1]):
                torch.minimum(found, torch.addmm(tile_squares[:, view], block, tile[:, view].T, alpha=-2), out=found)
            if itself and first == start:
                found.fill_diagonal_(torch.inf)
            found, columns = found.topk(min(count, len(tile)), largest=False)
            near, places = torch.cat([near, found], 1), torch.cat([places, columns + first], 1)
            near, columns = near.topk(min(count, near.shape[1]), largest=False)
            places = places.gather(1, columns)
        distances.append((near + block.square().sum(1, keepdim=True)).clamp_min(0).sqrt())
        rows.append(places)
    return torch.cat(distances), torch.cat(rows)
