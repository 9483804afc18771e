"""Groups: images of a class that may show the same scene, found among kept features, so that they stay together."""

import heapq
import itertools

import torch
from torch import Tensor
from torch.nn import functional as F

from transfer.features import Features, moments
from transfer.neighbours import nearest
from transfer.system.console import QUIET, Progress, track

CHANCE = 0.001  # of the pairs of different classes, the share that is more similar than near-duplicates must be
CHANCE_LINKS = 0.1  # and at most so many links per image by chance, however large its class
OWN_LEVEL = 0.02  # of other classes' images, the share that is more similar to an image than its level
MIRRORS = 3  # times as far apart as two images are from their mirror images, they show two scenes
LARGEST = 1 / 3  # of a class in one group: of larger ones no head could learn the class from the rest
# These values and others about them were measured on photos by scenes and on single photos (tests/README.md).
LINKS = 32  # of an image, to the most similar of its class: memory grows with N, not with N * N
SAMPLE = 2000  # images that the similarity of different classes is measured on: 2 million pairs
BLOCK = 1024  # rows of a product at a time


class Residuals:
    """Features of the first view less the mean of their class, each divided by its deviation over the list, as unit
    vectors.

    features: (N, V, D); labels: (N,), from 0.
    """

    def __init__(self, features: Tensor | Features, labels: Tensor):
        self.features, self.labels = features, labels
        _, self.deviation = moments(features)
        counts = torch.bincount(labels).clamp_min(1)
        sums = torch.zeros(len(counts), features.shape[2], dtype=torch.float64)
        for rows in track("classes:", torch.arange(len(labels)).split(BLOCK)):
            sums.index_add_(0, labels[rows], features[rows, 0].double())
        self.means = (sums / counts[:, None]).float()

    def __getitem__(self, rows: Tensor) -> Tensor:
        """Of some rows, (n, D)."""
        return F.normalize((self.features[rows, 0] - self.means[self.labels[rows]]) / self.deviation, dim=1)

    def distances(self, rows: Tensor, others: Tensor, view: int = 0) -> Tensor:
        """Squared distances between images and a view of others, in deviations: (n,)."""
        parts = zip(rows.split(BLOCK), others.split(BLOCK), strict=True)
        pairs = ((self.features[some, 0], self.features[other, view]) for some, other in parts)
        return torch.cat([((first - second) / self.deviation).square().sum(1) for first, second in pairs])


def near_duplicates(features: Tensor | Features, labels: Tensor, seed: int = 0) -> Tensor:
    """Groups (N,), numbered from 0, of images of one class that may show the same scene.

    features: (N, V, D), of the evaluation view, and the mirror image's after it where it is kept; labels: (N,), from 0.
    Similarity is the cosine of two images' residuals (see `Residuals`) less the level of both: what 1 in 50 images of
    other classes exceeds. The class mean goes first, since with a good backbone all images of a class are similar; the
    level, since some images are similar to all others.
    Two images are linked where that exceeds all but 1 in 1000 pairs of different classes, which no shared scene
    explains, and where they lie at most three times as far apart as from their mirror images: kinds of a class, such as
    a texture's, are similar too, but not so near. Groups are stars: the image with the most links takes those it is
    linked to, and again until no link is left; a chain of links may run through a whole class.
    """
    residuals, counts = Residuals(features, labels), torch.bincount(labels)
    levels, by_chance = similarity_by_chance(residuals, seed)
    groups = torch.arange(len(labels))
    progress = Progress("near-duplicates:", int(counts[counts > 2].sum()), quiet=QUIET)
    for rows in labels.argsort(stable=True).split(counts.tolist()):
        if len(rows) < 3 or not len(by_chance):  # of two images each residual is the other's opposite
            continue
        share = min(1, CHANCE_LINKS / len(rows) / CHANCE)
        # The n residuals of a class sum to 0, which lowers their cosines by 1 / (n - 1).
        threshold = by_chance[min(int(share * len(by_chance)), len(by_chance) - 1)].item() - 1 / (len(rows) - 1)
        units = torch.empty(len(rows), 1, features.shape[2])
        for some, here in zip(rows.split(BLOCK), units.split(BLOCK), strict=True):
            here[:, 0] = residuals[some]
        links = links_within(units, levels[rows], threshold, seed=seed, progress=progress)
        if features.shape[1] > 1:
            links = [links[0], links[1] & within_mirrors(residuals, rows, links)]
        groups[rows] = rows[stars(*links, max(2, int(LARGEST * len(rows))))]
    return groups.unique(return_inverse=True)[1]


def similarity_by_chance(residuals: Residuals, seed: int) -> tuple[Tensor, Tensor]:
    """The level of each image (N,), and the largest similarities of pairs of different classes, CHANCE of them all,
    descending: both from a sample drawn by seed.
    """
    labels = residuals.labels
    sample = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))[:SAMPLE]
    others, levels = residuals[sample], torch.empty(len(labels))
    for rows in track("similarity by chance:", torch.arange(len(labels)).split(BLOCK)):
        differ = labels[rows, None] != labels[sample]
        cosines = (residuals[rows] @ others.T).masked_fill_(~differ, -1)
        ranks = (OWN_LEVEL * differ.sum(1)).long().clamp_min(1)
        levels[rows] = cosines.topk(int(ranks.max()), dim=1).values.gather(1, ranks[:, None] - 1)[:, 0]
    similar = others @ others.T - (levels[sample, None] + levels[sample]) / 2
    similar = similar[labels[sample, None] < labels[sample]]
    return levels, similar.topk(min(int(CHANCE * len(similar)) + 1, len(similar))).values


def links_within(
    units: Tensor, levels: Tensor, threshold: float, *, seed: int, progress: Progress
) -> tuple[Tensor, Tensor]:
    """Of each image of a class the most similar others (n, K), in order, and which of them it is linked to, (n, K).

    units: (n, 1, D), residuals; levels: (n,).
    """
    distances, near = nearest(units, units, True, count=LINKS, seed=seed, progress=progress)
    similar = 1 - distances.square() / 2 - (levels[:, None] + levels[near]) / 2
    similar, order = similar.sort(dim=1, descending=True)
    return near.gather(1, order), similar > threshold


def within_mirrors(residuals: Residuals, rows: Tensor, links: tuple[Tensor, Tensor]) -> Tensor:
    """Which links (n, K) are between images at most MIRRORS times as far apart as they, in the geometric mean, are from
    their mirror images.

    rows: (n,), of a class; links: as `links_within` has them.
    """
    near, linked = links
    own = residuals.distances(rows, rows, view=1)
    here, there = linked.nonzero(as_tuple=True)
    there = near[here, there]
    close = linked.clone()
    close[linked] = residuals.distances(rows[here], rows[there]) <= MIRRORS**2 * (own[here] * own[there]).sqrt()
    return close


def stars(near: Tensor, linked: Tensor, most: int) -> Tensor:
    """For each of n images the row at the centre of its group (n,), of at most so many images.

    near: (n, K), rows by similarity; linked: (n, K), which of them an image is linked to.
    """
    flat, ends = near[linked].tolist(), [0, *linked.sum(1).cumsum(0).tolist()]
    links = [flat[first:last] for first, last in itertools.pairwise(ends)]
    centres, free = torch.arange(len(near)).tolist(), [True] * len(near)
    queue = [(-min(len(mine), most - 1), centre) for centre, mine in enumerate(links) if mine]
    heapq.heapify(queue)
    while queue:
        fewest, centre = heapq.heappop(queue)
        if not free[centre]:
            continue
        taken = [row for row in links[centre] if free[row]][: most - 1]
        if len(taken) < -fewest:  # others have taken some since: back to its place among the rest
            if taken:
                heapq.heappush(queue, (-len(taken), centre))
            continue
        for row in (centre, *taken):
            free[row], centres[row] = False, centre
    return torch.tensor(centres)
