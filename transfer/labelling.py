"""Labelling: which photos of a pile to label next: those typical of it, unclear to the model, unlike each other."""

import functools
from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from transfer.audit.copies import PAIRS, SAME_PHOTO, SIMILAR, similarity
from transfer.neighbours import nearest
from transfer.system.console import Progress
from transfer.system.signals import check_stop

NEIGHBOURS = 10  # of a photo, whose mean cosine says how typical it is


def unit_vectors(features: Tensor) -> Tensor:
    """Features (N, D) standardised, at length 1, in the memory that they had: a pile's fill much of it."""
    deviation, mean = torch.std_mean(features, 0, correction=0)
    features.sub_(mean).div_(deviation.clamp_min(1e-6))
    return F.normalize(features, dim=1, out=features)


def typicality(units: Tensor, progress: Progress | None = None) -> Tensor:
    """Of each photo the mean cosine to its nearest ones, (N,): low of what stands alone. units: (N, D), of length 1."""
    views = units[:, None]
    distances, _ = nearest(views, views, itself=True, count=NEIGHBOURS, progress=progress)
    cosines = (1 - distances.square() / 2).clamp_min(0)  # of a neighbour that was not found the distance is inf
    return cosines.sum(1) / max(1, distances.shape[1])


def uncertainty(probs: Tensor) -> Tensor:
    """1 less the margin between the two likeliest classes, (N,). probs: (N, C)."""
    tops = probs.topk(min(2, probs.shape[1])).values
    return 1 - tops[:, 0] + tops[:, 1:].sum(1)


def most_worthy(
    units: Tensor, typical: Tensor, unclear: Tensor, count: int, *, is_copy: Callable[[int, list[int]], bool]
) -> Iterator[tuple[int, float]]:
    """Photos in the order in which to label them, at most so many: the place of each, and what its label is worth.

    units: (N, D), of length 1; typical, unclear: (N,). A label is worth typicality times uncertainty, times 1 less the
    cosine to each photo that is taken before. is_copy: whether a place is the same photo as one of those taken; it is
    then left out.
    """
    worth, left, taken = typical * unclear, torch.ones(len(units), dtype=torch.bool), []
    while len(taken) < count and left.any():
        check_stop()
        place = int(worth.where(left, -1).argmax())
        left[place] = False
        if not is_copy(place, taken):
            taken.append(place)
            yield place, float(worth[place])
            worth *= 1 - (units @ units[place]).clamp(0, 1)


def copy_test(units: Tensor, thumbnail: Callable[[int], Tensor]) -> Callable[[int, list[int]], bool]:
    """What tells whether a place is the same photo as one of others, by features (N, D) of length 1, then by pixels.

    thumbnail: of a place, (32, 32), as `thumbnails` has it; asked for where features are alike, once for each.
    """
    thumbnail = functools.cache(thumbnail)

    def is_copy(place: int, taken: list[int]) -> bool:
        near = (units[taken] @ units[place] > SIMILAR).nonzero().flatten()
        for some in near.split(PAIRS) if len(near) else ():
            others = torch.stack([thumbnail(taken[number]) for number in some.tolist()])
            if (similarity(thumbnail(place).expand_as(others), others) >= SAME_PHOTO).any():
                return True
        return False

    return is_copy


def propose(
    features: Tensor, probs: Tensor, count: int, thumbnail: Callable[[int], Tensor]
) -> Iterator[tuple[int, float]]:
    """The photos of a pile to label next, as `most_worthy` gives them, each once however many copies there are.

    features: (N, D), which are lost; probs: (N, C); thumbnail: see `copy_test`.
    """
    if not len(features):
        return
    units = unit_vectors(features)
    typical = typicality(units, Progress("compared", len(units)))
    yield from most_worthy(units, typical, uncertainty(probs), count, is_copy=copy_test(units, thumbnail))
