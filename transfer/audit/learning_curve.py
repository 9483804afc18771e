"""The learning curve: accuracy by training images, and what twice as many would give."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from transfer.crossval import (
    BLOCK,
    CrossValidation,
    assign_folds,
    class_in_other_folds,
    stratified_group_holdout,
    train_fold_heads,
)
from transfer.system.console import track

SHARES, DRAWS = (1 / 8, 1 / 4, 1 / 2, 1), 3  # of the training images, and how often each is drawn

FEW_POINTS = 0.01  # of accuracy, that are not worth the double of photos
FEW_IMAGES = 5  # of a class, which say nothing of it


@dataclass(frozen=True)
class Curve:
    """Accuracy out of fold by training images: sizes (S,), accuracy (S, draws); of each class its images (C,) and its
    recall (S, C), NaN where it has none.
    """

    sizes: list[int]
    accuracy: Tensor
    images: Tensor
    recall: Tensor

    def doubled(self) -> list[float]:
        """What twice the images would give, by each draw: the error falls as a power of their number (Hestness et al.
        2017), whose exponent is fitted to all sizes.
        """
        logs = torch.tensor(self.sizes, dtype=torch.float64).log()
        logs -= logs.mean()
        errors = (1 - self.accuracy.double()).clamp_min(1e-3)
        exponents = (logs[:, None] * errors.log()).sum(0) / logs.square().sum()
        return (1 - errors[-1].mean() * 2 ** exponents.clamp(-1, 0)).tolist()

    @property
    def unclear(self) -> bool:
        """Whether its points zigzag more than they rise: the falls of each draw, on average, exceed the rise."""
        rise = (self.accuracy[-1] - self.accuracy[0]).mean()
        falls = -self.accuracy.diff(dim=0).clamp(max=0).sum(0).mean()
        return bool(falls > rise.clamp_min(FEW_POINTS))

    def growing(self) -> list[tuple[int, float]]:
        """The classes whose recall the last doubling raised by more than chance does in one run of forty for any class
        at all, and by how much. A right and a wrong one are added to each (Agresti & Caffo 2000), as of few images all
        may be right by chance.
        """
        half, full = self.recall[-2:].double()
        odds = [(recall * self.images + 1) / (self.images + 2) for recall in (half, full)]
        spread = (sum(each * (1 - each) for each in odds) / (self.images + 2)).sqrt()
        deviations = torch.special.ndtri(torch.tensor(1 - 0.025 / len(half), dtype=torch.float64))
        clear = (full - half > deviations * spread) & (self.images >= FEW_IMAGES)  # false for NaN
        clear = clear.nonzero().flatten().tolist()
        return sorted(((label, float(full[label] - half[label])) for label in clear), key=lambda each: -each[1])


def learning_curve(images: CrossValidation, num_classes: int, lrs: Sequence[float], batch_size: int) -> Curve | None:
    """Cross-validated accuracy of heads trained on an eighth, a quarter, a half and all of the training images, photos
    of one scene together; None where they are too few.
    """
    labels, groups = images.labels, images.groups
    shares = [share for share in SHARES if share * len(labels) >= 2 * num_classes]
    if len(shares) < 2 or not images.known.any():
        return None
    accuracy, recall, sizes = torch.zeros(len(shares), DRAWS), torch.zeros(len(shares), DRAWS, num_classes), []
    folds = [assign_folds(labels, groups, seed=draw) for draw in range(DRAWS)]
    for step, share in enumerate(shares):
        for draw, fold in enumerate(folds):
            drawn = stratified_group_holdout(labels, groups, share, draw) if share < 1 else torch.ones_like(fold)
            train_rows = drawn.nonzero().flatten()
            heads = train_fold_heads(
                images.features,
                labels,
                fold,
                num_classes=num_classes,
                lrs=lrs,
                batch_size=batch_size,
                seed=draw,
                train_rows=train_rows,
            )
            parts = torch.arange(len(labels)).split(BLOCK)
            right = torch.cat([heads[rows].argmax(1) == labels[rows] for rows in track("accuracy:", parts)])
            known = class_in_other_folds(labels, fold)
            right = right[known]
            accuracy[step, draw] = right.double().mean()
            by_class = labels[known]
            hits, total = (some.bincount(minlength=num_classes) for some in (by_class[right], by_class))
            recall[step, draw] = hits / total
        sizes.append(len(train_rows))
    return Curve(sizes, accuracy, labels.bincount(minlength=num_classes), recall.mean(1))
