"""The learning curve: accuracy by training images, and what twice as many would give."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from transfer.crossval import (
    CrossValidation,
    assign_folds,
    class_in_other_folds,
    out_of_fold_logits,
    stratified_group_holdout,
)

SHARES, DRAWS = (1 / 8, 1 / 4, 1 / 2, 1), 3  # of the training images, and how often each is drawn


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

    def growing(self) -> list[tuple[int, float]]:
        """The classes whose recall the last doubling raised by more than two standard errors, and by how much."""
        half, full = self.recall[-2:].double()
        spread = ((half * (1 - half) + full * (1 - full)) / self.images).sqrt()
        clear = (full - half > 2 * spread).nonzero().flatten().tolist()  # false for NaN
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
            right = torch.empty(len(labels), dtype=torch.bool)
            for rows, logits in out_of_fold_logits(
                images.features,
                labels,
                fold,
                num_classes=num_classes,
                lrs=lrs,
                batch_size=batch_size,
                seed=draw,
                train_rows=train_rows,
            ):
                right[rows] = logits.argmax(1) == labels[rows]
            known = class_in_other_folds(labels, fold)
            right = right[known]
            accuracy[step, draw] = right.double().mean()
            by_class = labels[known]
            hits, total = (some.bincount(minlength=num_classes) for some in (by_class[right], by_class))
            recall[step, draw] = hits / total
        sizes.append(len(train_rows))
    return Curve(sizes, accuracy, labels.bincount(minlength=num_classes), recall.mean(1))
