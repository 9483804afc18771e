"""Near copies: which of the nearest images are the same photo, resized, recompressed, cropped or mirrored."""

import functools
from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import Dataset

from transfer.architectures import NORMALIZE
from transfer.audit.findings import AuditSplit, Finding
from transfer.audit.label_errors import LabelQuality
from transfer.backbone import PASS_BATCH, embed_dataset, unbatch
from transfer.device import Compute
from transfer.features import Features, moments
from transfer.neighbours import TILE
from transfer.system.console import Progress, track

# Measured on 150 of the sample's photos, resized, recompressed, cropped by 5% and mirrored: all 600 copies but one are
# among the 8 nearest, at a cosine above 0.7 and a likeness above 0.97; no two photos of a shelf have one above 0.94.
SIMILAR = 0.7
SAME_PHOTO = 0.955
THUMBNAIL, DETAIL = 32, 16  # pixels of a thumbnail's side, and of what is compared
ROUGHLY = 0.5  # correlation below which two thumbnails are not worth a closer look
PAIRS = 256  # compared at a time: 50 MB
LEVEL = 1 / 255 / 0.225  # one grey level, as NORMALIZE scales it


# Candidates, by features


def similar_pairs(
    queries: Tensor | Features, keys: Tensor | Features, pairs: Tensor, scale: tuple[Tensor, Tensor]
) -> Tensor:
    """Which pairs of rows (P, 2), of a query and a key, are as similar by their features as copies are: (P,).

    scale: the keys' `moments`.
    """
    mean, deviation = scale
    # One tensor: small ones that are kept between large ones that go make holes, gigabytes of them.
    alike = torch.empty(len(pairs))
    parts = zip(track("copies by features:", pairs.split(TILE), "pairs"), alike.split(TILE), strict=True)
    for some, found in parts:
        first, second = queries[some[:, 0], :1], keys[some[:, 1]]
        found[:] = F.cosine_similarity((first - mean) / deviation, (second - mean) / deviation, dim=2).amax(1)
    return alike > SIMILAR


def candidates(
    queries: Tensor | Features,
    keys: Tensor | Features,
    near: Tensor,
    *,
    itself: bool,
    scale: tuple[Tensor, Tensor],
) -> Tensor:
    """Pairs of rows (P, 2), of a query and a key, that may be copies, each once.

    near: rows of each query's nearest keys, (N, k); scale: the keys' `moments`; the other arguments as `nearest` has
    them.
    """
    pairs = torch.stack([torch.arange(len(near)).repeat_interleave(near.shape[1]), near.flatten()], 1)
    if itself:
        pairs = pairs[pairs[:, 0] != pairs[:, 1]]  # as where cells hold too few
        numbers = (pairs.amax(1) * len(keys) + pairs.amin(1)).unique()  # far faster than rows of two
        pairs = torch.stack([numbers // len(keys), numbers % len(keys)], 1)
    return pairs[similar_pairs(queries, keys, pairs, scale)]


# By pixels


class Grey(nn.Module):
    """In a backbone's place: normalised images (N, 3, S, S) to grey thumbnails (N, 32 * 32)."""

    def forward(self, images: Tensor) -> Tensor:
        return F.adaptive_avg_pool2d(images.mean(1, keepdim=True), THUMBNAIL).flatten(1)


def thumbnails(dataset: Dataset, rows: Tensor, compute: Compute, progress: Progress | None = None) -> Tensor:
    """Grey thumbnails (N, 32, 32), float16, of some rows of a `ImageDataset` of one view; NaN where unreadable."""
    here = replace(compute, device=torch.device("cpu"), dtype=torch.float32, normalize=NORMALIZE)
    found = torch.full((len(rows), THUMBNAIL, THUMBNAIL), torch.nan, dtype=torch.float16)
    batches = embed_dataset(Grey(), dataset, rows.tolist(), compute=here, batch_size=PASS_BATCH["cpu"])
    for place, (_, values) in enumerate(unbatch(batches)):
        if torch.is_tensor(values):
            found[place] = values.view(THUMBNAIL, THUMBNAIL)
        if progress:
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


def similarity(first: Tensor, second: Tensor) -> Tensor:
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


def copies(pairs: Tensor, pixels: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Of candidates those that are the same photo, (Q, 2), and how sure that is, (Q,).

    pixels: for queries and keys thumbnails, and of each row its place among them.
    """
    alike = torch.empty(len(pairs))
    parts = zip(track("copies by pixels:", pairs.split(PAIRS), "pairs"), alike.split(PAIRS), strict=True)
    for some, found in parts:
        pair = (thumbs[places[rows]].float() for (thumbs, places), rows in zip(pixels, some.T, strict=True))
        found[:] = similarity(*pair)
    return pairs[alike >= SAME_PHOTO], alike[alike >= SAME_PHOTO]


# Of both lists


def find_copies(
    splits: Sequence[AuditSplit], near: dict[tuple[int, int], Tensor], compute: Compute
) -> list[tuple[int, int, Tensor, Tensor]]:
    """Copies among the training images, among the test images, and of training images in the test list.

    near: by numbers of the splits of query and key the places of each query's nearest keys, (n, k). Each of what is
    found: the two numbers, pairs of places (Q, 2), and how certain they are (Q,). Within a split the later image is the
    query.
    """
    pairs, scales = {}, [moments(split.features) for split in splits]
    for (query, key), rows in near.items():
        features = splits[query].features, splits[key].features
        pairs[query, key] = candidates(*features, rows, itself=query == key, scale=scales[key])
    pixels = []
    for number, split in enumerate(splits):
        wanted = [pair[:, side] for ends, pair in pairs.items() for side in (0, 1) if ends[side] == number]
        places, index = torch.cat(wanted).unique(), torch.zeros(len(split.rows), dtype=torch.int64)
        index[places] = torch.arange(len(places))
        progress = Progress(f"{split.image_list.name}, audit:", len(places))
        pixels.append((thumbnails(split.dataset, split.rows[places], compute, progress), index))
    return [(query, key, *copies(pair, (pixels[query], pixels[key]))) for (query, key), pair in pairs.items()]


def connected_components(count: int, links: Tensor) -> Tensor:
    """Connected components of a graph with so many nodes and links (2, L): the lowest node of each one's own."""
    lowest, before = torch.arange(count), None
    while before is None or not torch.equal(lowest, before):
        before = lowest
        for here, there in (links, links.flip(0)):
            lowest = lowest.scatter_reduce(0, here, lowest[there], "amin")
        lowest = lowest[lowest]
    return lowest


def copy_groups(labels: Tensor, pairs: Tensor) -> Tensor:
    """Groups (n,) of copies of one label, numbered from 0; other images are alone. labels: (n,); pairs: (Q, 2)."""
    same = labels[pairs[:, 0]] == labels[pairs[:, 1]]
    return connected_components(len(labels), pairs[same].T).unique(return_inverse=True)[1]


def copy_findings(
    splits: Sequence[AuditSplit],
    qualities: Sequence[LabelQuality],
    found: Sequence[tuple[int, int, Tensor, Tensor]],
) -> Iterator[Finding]:
    """A finding for each image with a copy: the most certain one before it in its split, or among the training images.

    Of two labels in conflict the finding's is the one that is more probably wrong; the other is suggested in its place
    where that one is probably right.
    """

    def error_prob(end: tuple[int, int]) -> float:
        return float(qualities[end[0]].error_prob[end[1]])

    for query, key, pairs, scores in found:
        order, reported = scores.argsort(descending=True, stable=True), set()
        for (place, other), score in zip(pairs[order].tolist(), scores[order].tolist(), strict=True):
            ends = [(query, place), (key, other)]
            conflict = splits[query].labels[place] != splits[key].labels[other]
            if conflict:
                (first, at), (second, beside) = sorted(ends, key=error_prob, reverse=True)
                certain = error_prob((first, at)) > 0.5 > error_prob((second, beside))
                suggestion = int(splits[second].labels[beside]) if certain else None
                yield Finding("conflict", splits[first], at, score, suggestion, (splits[second], beside))
            kind = "leak" if query != key else "duplicate"
            if (kind == "leak" or not conflict) and place not in reported:
                reported.add(place)
                yield Finding(kind, splits[query], place, score, None, (splits[key], other))
