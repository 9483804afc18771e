"""Neighbours: which images lie nearest to each among the features, and which of them are the same photo again."""

import functools
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import Dataset

from transfer.backbone import PASS_BATCH, each_image, embed_in_order
from transfer.console import Progress
from transfer.device import Compute

NEAREST = 8  # neighbours of an image that are looked at
TILE = 4096  # rows of either side of a product at a time: 64 MB
# Measured on 150 of the sample's photos, resized, recompressed, cropped by 5% and mirrored: all 600 copies but one are
# among the 8 nearest, at a cosine above 0.7 and a likeness above 0.97; no two photos of a shelf have one above 0.94.
RELATED = 0.7
SAME_PHOTO = 0.955
THUMBNAIL, DETAIL = 32, 16  # pixels of a thumbnail's side, and of what is compared
ROUGHLY = 0.5  # correlation below which two thumbnails are not worth a closer look
PAIRS = 256  # compared at a time: 50 MB
LEVEL = 1 / 255 / 0.225  # one grey level, as NORMALIZE scales it


# By features


def nearest(queries: Tensor, keys: Tensor, itself: bool = False) -> tuple[Tensor, Tensor]:
    """Of each query the distances of its 8 nearest keys, ascending, and their rows: (N, 8) each; fewer of fewer keys.

    queries: (N, D); keys: (M, V, D), of which that of the V views counts which is nearest. itself: the queries are the
    keys' first views, and no image is its own neighbour. In tiles, so that memory grows with N + M.
    """
    count = max(0, min(NEAREST, len(keys) - itself))
    squares = keys.square().sum(2)
    distances, rows = [], []
    for start in range(0, len(queries), TILE):
        block = queries[start : start + TILE]
        near, places = block.new_empty(len(block), 0), torch.empty(len(block), 0, dtype=torch.int64)
        for first in range(0, len(keys), TILE):
            tile, tile_squares = keys[first : first + TILE], squares[first : first + TILE]
            # Less the block's own squares, which are the same for all keys.
            found = torch.stack(
                [torch.addmm(tile_squares[:, view], block, tile[:, view].T, alpha=-2) for view in range(keys.shape[1])]
            ).amin(0)
            if itself and first == start:
                found.fill_diagonal_(torch.inf)
            found, columns = found.topk(min(count, len(tile)), largest=False)
            near, places = torch.cat([near, found], 1), torch.cat([places, columns + first], 1)
            near, columns = near.topk(min(count, near.shape[1]), largest=False)
            places = places.gather(1, columns)
        distances.append((near + block.square().sum(1, keepdim=True)).clamp_min(0).sqrt())
        rows.append(places)
    return torch.cat(distances), torch.cat(rows)


def related(queries: Tensor, keys: Tensor, pairs: Tensor) -> Tensor:
    """Which pairs of rows (P, 2), of a query and a key, are as alike as copies are, as far as features tell: (P,)."""
    mean, deviation = keys[:, 0].mean(0), keys[:, 0].std(0, correction=0).clamp_min(1e-6)
    alike = []
    for some in pairs.split(TILE):
        first = (queries[some[:, 0]] - mean) / deviation
        second = (keys[some[:, 1]] - mean) / deviation
        alike.append(F.cosine_similarity(first[:, None], second, dim=2).amax(1) > RELATED)
    return torch.cat(alike) if alike else torch.empty(0, dtype=torch.bool)


# By pixels


class Grey(nn.Module):
    """In a backbone's place: normalised images (N, 3, 224, 224) to grey thumbnails (N, 32 * 32)."""

    def forward(self, images: Tensor) -> Tensor:
        return F.adaptive_avg_pool2d(images.mean(1, keepdim=True), THUMBNAIL).flatten(1)


def thumbnails(dataset: Dataset, rows: Tensor, compute: Compute) -> Tensor:
    """Grey thumbnails (N, 32, 32), float16, of some rows of a `train.Views` of one view; NaN where unreadable."""
    here = replace(compute, device=torch.device("cpu"), dtype=torch.float32)
    found = torch.full((len(rows), THUMBNAIL, THUMBNAIL), torch.nan, dtype=torch.float16)
    progress = Progress(f"{dataset.listed.name}, audit:", len(rows))
    batches = embed_in_order(Grey(), dataset, rows.tolist(), compute=here, batch_size=PASS_BATCH["cpu"])
    for place, (_, values) in enumerate(each_image(batches)):
        if torch.is_tensor(values):
            found[place] = values.view(THUMBNAIL, THUMBNAIL)
        progress.add(1)
    return found


@functools.cache
def crop_grid() -> Tensor:
    """Where to sample 49 crops of an image, up to a tenth of its sides: (49, 32, 32, 2), as `grid_sample` takes it."""
    along = [(1.0, 0.0), *((1 - cut, cut * side) for cut in (0.05, 0.1) for side in (-1, 0, 1))]
    theta = torch.tensor([[[x, 0, dx], [0, y, dy]] for x, dx in along for y, dy in along])
    return F.affine_grid(theta, [len(theta), 1, THUMBNAIL, THUMBNAIL], align_corners=False)


def details(images: Tensor) -> Tensor:
    """What is left of (..., 32, 32) at half the size without its blur, as unit vectors (..., 256): not light and
    shade, which photos of one shelf share.
    """
    small = F.adaptive_avg_pool2d(images.flatten(0, -3), DETAIL)
    blur = F.avg_pool2d(F.pad(small[:, None], [2] * 4, mode="replicate"), 5, 1)[:, 0]
    return F.normalize((small - blur).flatten(1), dim=1).view(*images.shape[:-2], -1)


def best_crop(images: Tensor, others: Tensor) -> Tensor:
    """The correlation of the details of any crop of an image with those of the other, the largest: (N,)."""
    grid = crop_grid()
    crops = F.grid_sample(
        images[None].expand(len(grid), -1, -1, -1), grid, align_corners=False, padding_mode="border"
    )  # (49, N, 32, 32)
    return (details(crops) * details(others)).sum(2).amax(0)


def likeness(first: Tensor, second: Tensor) -> Tensor:
    """How sure two images are one photo, from their thumbnails (N, 32, 32): (N,), from 0 to 1.

    The correlation of details, at the best of a few crops of either, mirrored or not. Equal thumbnails are alike, also
    where there are no details.
    """
    best = ((first - second).abs().amax((1, 2)) < LEVEL / 2).float()  # false for NaN
    for turned in (second, second.flip(2)):
        small = (F.adaptive_avg_pool2d(each, DETAIL).flatten(1) for each in (first, turned))
        rough = F.cosine_similarity(*(each - each.mean(1, keepdim=True) for each in small))
        near = (rough > ROUGHLY).nonzero().flatten()
        if len(near):
            pair = first[near], turned[near]
            best[near] = torch.stack([best[near], best_crop(*pair), best_crop(*pair[::-1])]).amax(0)
    return best.clamp(0, 1)


# Both


def candidates(queries: Tensor, keys: Tensor, near: Tensor, itself: bool) -> Tensor:
    """Pairs of rows (P, 2), of a query and a key, that may be copies, each once.

    near: rows of each query's nearest keys, (N, k), and the other arguments as `nearest` has them.
    """
    pairs = torch.stack([torch.arange(len(near)).repeat_interleave(near.shape[1]), near.flatten()], 1)
    if itself:
        pairs = pairs.sort(1, descending=True).values.unique(dim=0)
    return pairs[related(queries, keys, pairs)]


def copies(pairs: Tensor, pixels: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Of candidates those that are the same photo, (Q, 2), and how sure that is, (Q,).

    pixels: for queries and keys thumbnails, and of each row its place among them.
    """
    alike = []
    for some in pairs.split(PAIRS):
        shown = (thumbs[places[rows]].float() for (thumbs, places), rows in zip(pixels, some.T, strict=True))
        alike.append(likeness(*shown))
    alike = torch.cat(alike) if alike else torch.empty(0)
    return pairs[alike >= SAME_PHOTO], alike[alike >= SAME_PHOTO]
