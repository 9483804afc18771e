"""Cross-validation on kept features: folds, and logits from heads that never saw the image.

A head that is scored on images of the shelf and minute it was fitted on looks far better than it is. So near-duplicates
are linked into groups, whole groups are assigned to folds, and each image's logits come from a head that never saw its
fold. The K heads are trained at once, as one product of features that are known: seconds.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from transfer.distributed import broadcast, is_main_process
from transfer.features import Features, Split, batches_of
from transfer.groups import near_duplicates
from transfer.metrics import class_weights
from transfer.system.console import QUIET, Progress, UserError, track
from transfer.training import Hyperparameters, epoch_views

BLOCK = 1024  # rows of a product at a time
WORK = 500_000  # images times classes: above, heads out of fold take more than seconds
MOST_EPOCHS = 20  # of heads out of fold


def assign_folds(labels: Tensor, groups: Tensor, k: int = 5, seed: int = 0) -> Tensor:
    """Each image's fold (N,), from 0 to k - 1: whole groups, each of one class, and each class spread evenly.

    The largest groups first, those of one size in a random order: each to the fold with the fewest images of its
    class, and among those to the one with the fewest in all.
    """
    sizes = groups.bincount()
    label_of = torch.empty_like(sizes).scatter_(0, groups, labels).tolist()
    shuffled = torch.randperm(len(sizes), generator=torch.Generator().manual_seed(seed))
    order = shuffled[sizes[shuffled].argsort(descending=True, stable=True)]
    of_class, in_all, fold = [[0] * k for _ in range(max(label_of) + 1)], [0] * k, [0] * len(sizes)
    for some in track("folds:", order.split(BLOCK)):
        for group, size in zip(some.tolist(), sizes[some].tolist(), strict=True):
            mine = of_class[label_of[group]]
            chosen = min(range(k), key=lambda number: (mine[number], in_all[number]))
            mine[chosen] += size
            in_all[chosen] += size
            fold[group] = chosen
    return torch.tensor(fold)[groups]


def class_in_other_folds(labels: Tensor, fold: Tensor) -> Tensor:
    """Which images (N,) have others of their class outside their fold; no head can know the rest."""
    table = torch.zeros(int(labels.max()) + 1, int(fold.max()) + 1, dtype=torch.int64)
    table.index_put_((labels, fold), torch.ones_like(labels), accumulate=True)
    return table[labels].sum(1) > table[labels, fold]


@dataclass(frozen=True)
class FoldHeads:
    """Heads that were each trained without one fold: heads[rows] are the logits (n, C) of images from the head that
    never saw their fold. They are computed when asked for, since all together take more memory than the features where
    classes are many.

    features: (N, V, D), of which the mean of the first num_views counts; fold: (N,); weights: (D, K * C) and bias:
    (K * C,), of the K heads side by side.
    """

    features: Tensor | Features
    fold: Tensor
    weights: Tensor
    bias: Tensor
    num_classes: int
    num_views: int

    @property
    def shape(self) -> tuple[int, int]:
        return len(self.fold), self.num_classes

    def __getitem__(self, rows: Tensor) -> Tensor:
        inputs, fold = self.features[rows, : self.num_views].mean(1), self.fold[rows]
        logits = torch.empty(len(rows), self.num_classes)
        for number in fold.unique().tolist():
            here, own = fold == number, slice(number * self.num_classes, (number + 1) * self.num_classes)
            logits[here] = torch.addmm(self.bias[own], inputs[here], self.weights[:, own])
        return logits


def draw_linear(width: int, outputs: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Weights (D, outputs) and bias (outputs,) to be trained, drawn as nn.Linear draws its own."""
    bound = width**-0.5
    weights, bias = (
        torch.empty(shape).uniform_(-bound, bound, generator=generator) for shape in ((width, outputs), (outputs,))
    )
    return weights.requires_grad_(), bias.requires_grad_()


def train_fold_heads(
    features: Tensor | Features,
    labels: Tensor,
    fold: Tensor,
    *,
    num_classes: int,
    lrs: Sequence[float],
    batch_size: int,
    seed: int,
    train_rows: Tensor | None = None,
    num_views: int = 1,
    class_weights: Tensor | None = None,
) -> FoldHeads:
    """The heads of all K folds at once, each trained without its fold.

    features: (N, V, D); labels, fold: (N,). lrs: Adam's learning rate in each epoch, and class_weights: (C,), of the
    loss, as the real head had them: only then are these logits as large as its own, and a temperature fitted on them
    fits it. train_rows: the rows that heads may be trained on, (M,); by default all. num_views: how many views of an
    image its logits are the mean of.
    """
    heads, (_, views, width) = int(fold.max()) + 1, features.shape
    train_rows = torch.arange(len(labels)) if train_rows is None else train_rows
    generator = torch.Generator().manual_seed(seed)
    weights, bias = draw_linear(width, heads * num_classes, generator)
    optimizer = torch.optim.Adam([weights, bias], lr=lrs[0])
    other_folds = (fold[:, None] != torch.arange(heads)).float()  # the heads that an image trains
    drawn = round(batch_size * heads / max(1, heads - 1))  # so that each head's own batch is as large as asked
    epochs = [torch.tensor(epoch_views(epoch, views)) for epoch in range(1, len(lrs) + 1)]
    progress = Progress("cross-validation:", len(train_rows) * sum(map(len, epochs)), quiet=QUIET)
    for lr, views in zip(lrs, epochs, strict=True):
        optimizer.param_groups[0]["lr"] = lr
        order = torch.randperm(len(train_rows) * len(views), generator=generator)
        for rows, inputs in batches_of(features, train_rows[order // len(views)], views[order % len(views)], drawn):
            logits = torch.addmm(bias, inputs, weights)
            loss = sum_of_means(logits, labels[rows], other_folds[rows], class_weights)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            progress.add(len(rows))
    return FoldHeads(features, fold, weights.detach(), bias.detach(), num_classes, num_views)


def sum_of_means(logits: Tensor, labels: Tensor, mine: Tensor, class_weights: Tensor | None = None) -> Tensor:
    """The sum over K heads of each one's mean loss, of which Adam moves each head by its own: a scalar.

    logits: (n, K * C); labels: (n,); mine: (n, K), 1 where the head is trained on the image, else 0; class_weights:
    (C,), of the loss.
    """
    heads = mine.shape[1]
    logits, repeated = logits.view(len(labels) * heads, -1), labels.repeat_interleave(heads)
    losses = F.cross_entropy(logits, repeated, class_weights, reduction="none")
    return (losses.view(-1, heads) * mine / mine.sum(0).clamp_min(1)).sum()


def stratified_group_holdout(labels: Tensor, groups: Tensor, fraction: float, seed: int) -> Tensor:
    """Which images (N,) to hold out: of each class about that fraction, in whole groups drawn by seed; one group at
    least where there are two, and never all.

    Drawn until the next would exceed the fraction by more than half of it. To look for a smaller one instead would
    favour images that are like no other: measured on the sample, that accuracy is 5 points higher.
    """
    generator = torch.Generator().manual_seed(seed)
    held = torch.zeros(len(labels), dtype=torch.bool)
    for rows in labels.argsort(stable=True).split(torch.bincount(labels).tolist()):
        if len(rows) < 2:
            continue
        numbers, sizes = groups[rows].unique(return_counts=True)
        order = torch.randperm(len(numbers), generator=generator)[:-1]  # the last one stays
        before = sizes[order].cumsum(0) - sizes[order] / 2
        count = max(1, int((before <= min(max(1, round(fraction * len(rows))), len(rows) - 1)).sum()))
        held[rows] = torch.isin(groups[rows], numbers[order[:count]])
    return held


def in_several_groups(hashes: Tensor, groups: Tensor) -> Tensor:
    """Which images have an exact copy in another group, as those with two labels: (n,). hashes, groups: (n,)."""
    _, content = hashes.unique(return_inverse=True)
    pairs = torch.stack([content, groups], 1).unique(dim=0)
    return pairs[:, 0].bincount()[content] > 1


def group_split(split: Split, fraction: float, seed: int, none_to_spare: str) -> tuple[Split, Split]:
    """What is left to train on, and a fraction of each class, drawn by seed. Photos of one scene are on one side, since
    a head knows the scenes it has seen; a photo that is in two classes is on the first. Raises UserError (status 1)
    with the words given where no class has two groups.
    """
    held, features = None, split.features
    labels = features.labels[features.rows]
    if is_main_process():  # which alone has features
        groups = near_duplicates(features.subset(features.rows), labels)
        held = stratified_group_holdout(labels, groups, fraction, seed)
        single = held & ~in_several_groups(features.content_hashes()[features.rows], groups)
        held = single if single.any() else held  # where all images look alike to the backbone, they are no copies
    held = broadcast(held)
    if not held.any():
        raise UserError(none_to_spare, status=1)
    kept, out = features.only(features.rows[~held]), features.only(features.rows[held])
    return Split(split.dataset, kept), Split(split.dataset, out)


class CrossValidation:
    """Images assigned to folds, near-duplicates together: what heads make of those they never saw.

    features: (n, V, D); labels, groups, fold: (n,); known: (n,), whose class lies in other folds too.
    """

    def __init__(self, features: Tensor | Features, labels: Tensor, seed: int):
        self.features, self.labels, self.seed = features, labels, seed
        self.groups = near_duplicates(self.features, self.labels)
        self.fold = assign_folds(self.labels, self.groups, seed=seed)
        self.known = class_in_other_folds(self.labels, self.fold)

    def logits(self, lrs: Sequence[float], batch_size: int, balance: bool = False) -> Tensor:
        """Out of fold, of all n images: (n, C). balance: classes weigh alike in the loss."""
        num_classes = int(self.labels.max()) + 1
        heads = train_fold_heads(
            self.features,
            self.labels,
            self.fold,
            num_classes=num_classes,
            lrs=lrs,
            batch_size=batch_size,
            seed=self.seed,
            class_weights=class_weights(self.labels, num_classes) if balance else None,
        )
        return torch.cat([heads[rows] for rows in torch.arange(len(self.labels)).split(BLOCK)])


def cross_val_logits(
    features: Features, lrs: Sequence[float], hparams: Hyperparameters
) -> tuple[Tensor, Tensor] | None:
    """Logits and labels out of fold of the images that a head was trained on, at these learning rates; None where they
    are too many to have in seconds, or too few.
    """
    labels = features.labels[features.rows]
    if len(labels) * (int(labels.max()) + 1) > WORK:
        return None
    images = CrossValidation(features.subset(features.rows), labels, hparams.seed)
    logits, known = images.logits(lrs, hparams.batch_size, hparams.balance), images.known
    return (logits[known], labels[known]) if known.any() else None
