"""Label errors: which labels are probably wrong, by the logits of heads that were not trained on them."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from transfer.calibration import bisect
from transfer.crossval import assign_folds, out_of_fold_logits

FOLDS = 10  # measured: with 5, swapped labels are found with an average precision 2 points lower
ROUNDS = 2  # of heads out of fold, the second without the labels that the first one doubts
RIGHT_BEFORE = (
    20  # labels that are assumed to be right beforehand: a few images alone say nothing about the share of wrong ones
)
LEAST_SHARE = 0.01  # of wrong labels, for which a model's power to find them is estimated
WEAK = 0.2  # power below which a model can't judge labels
MAX_LOGITS = 10_000_000  # that two numbers are fitted on
PART = 1_000_000  # logits at a time: 8 MB in float64


@dataclass(frozen=True)
class LabelQuality:
    """What a model makes of labels (n,): its probability of each (confidence), that of an error, and the label it
    would give instead (suggested).

    noise_rate: the estimated share of wrong labels, and temperature: that of the probabilities it goes with; power: the
    share of wrong labels that it would find, were they wrong at random.
    """

    confidence: Tensor
    error_prob: Tensor
    suggested: Tensor
    noise_rate: float
    temperature: float
    power: float

    @property
    def weak(self) -> bool:
        return self.power < WEAK

    def part(self, places: slice) -> "LabelQuality":
        """That of some of the images alone."""
        confidence, error_prob, suggested = self.confidence[places], self.error_prob[places], self.suggested[places]
        return replace(self, confidence=confidence, error_prob=error_prob, suggested=suggested)

    @property
    def suspects(self) -> Tensor:
        """Places, the most certain first, of labels that are probably wrong; none of a weak model."""
        places = (self.error_prob > 0.5).nonzero().flatten() if not self.weak else torch.empty(0, dtype=torch.int64)
        return places[self.error_prob[places].argsort(descending=True, stable=True)]


def score_labels(logits: Tensor, labels: Tensor) -> LabelQuality:
    """How likely each label is wrong, from logits (N, C) of a model that was not trained on it.

    A label y is right with 1 - e, else any other with equal odds: p(y) = (1 - e) q + e (1 - q) / (C - 1), where q is
    its softmax(logits / T). The T and e that make the labels likeliest are taken, and Bayes' rule for each label.
    That orders images by q alone (self-confidence, Northcutt et al. 2021) and finds where to stop. Measured, of labels
    swapped at random in 2 to 20% of the sample's two lists, with noise on the features and without: at least 0.7 of
    those that are more likely wrong than right were; with 20 to 120 images, a half.
    """
    num_classes = logits.shape[1]
    suggested = torch.cat([part.scatter(1, own[:, None], -torch.inf).argmax(1) for part, own in parts(logits, labels)])
    if num_classes == 1:
        return LabelQuality(torch.ones(len(labels)), torch.zeros(len(labels)), suggested, 0.0, 1.0, 0.0)
    # Every so many of a long list, which may be sorted by class.
    every = math.ceil(len(labels) * num_classes / MAX_LOGITS)
    some, theirs, best = logits[::every], labels[::every], (-math.inf, 1.0, 0.0)
    for temperature in torch.logspace(-0.6, 1, 33).tolist():  # from 1/4 to 10
        q = self_confidence(some, theirs, temperature)
        noise_rate = fit_noise_rate(q, num_classes)
        likelihood = label_prob(q, noise_rate, num_classes).log().sum() + RIGHT_BEFORE * math.log(1 - noise_rate)
        best = max(best, (float(likelihood), temperature, noise_rate))
    _, temperature, noise_rate = best
    q = self_confidence(logits, labels, temperature)
    error_prob = noise_rate * (1 - q) / (num_classes - 1) / label_prob(q, noise_rate, num_classes)
    # More likely wrong than right are labels below this q; how many would be, had they any other class?
    share = max(noise_rate, LEAST_SHARE)
    edge = share / (share + (1 - share) * (num_classes - 1))
    found = 0
    for part, own in parts(some, theirs):
        found += int(((part.double() / temperature).softmax(1).scatter_(1, own[:, None], 1) < edge).sum())
    power = found / len(theirs) / (num_classes - 1)
    return LabelQuality(q, error_prob, suggested, noise_rate, temperature, power)


def parts(logits: Tensor, labels: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Logits (n, C) and labels (n,) of some images at a time: what is computed of all at once takes several times the
    memory of the logits.
    """
    rows = max(1, PART // logits.shape[1])
    return zip(logits.split(rows), labels.split(rows), strict=True)


def self_confidence(logits: Tensor, labels: Tensor, temperature: float) -> Tensor:
    """The probability of each label, (N,), by logits (N, C), in float64."""
    scaled = ((part.double() / temperature, own) for part, own in parts(logits, labels))
    return torch.cat([part.log_softmax(1).gather(1, own[:, None])[:, 0].exp() for part, own in scaled])


def label_prob(q: Tensor, noise_rate: float, num_classes: int) -> Tensor:
    """The probability of labels of which a share is any other class."""
    return ((1 - noise_rate) * q + noise_rate * (1 - q) / (num_classes - 1)).clamp_min(1e-300)


def fit_noise_rate(q: Tensor, num_classes: int) -> float:
    """The share e of wrong labels that makes them likeliest, from 0 to 1/2: bisection on the slope, which falls."""
    gain = (1 - q) / (num_classes - 1) - q

    def too_low(share: float) -> bool:
        return bool((gain / label_prob(q, share, num_classes)).sum() - RIGHT_BEFORE / (1 - share) > 0)

    return bisect(too_low, 0.0, 0.5)[0]


def score_labels_out_of_fold(
    features: Tensor, labels: Tensor, copy_groups: Tensor, *, num_classes: int, lrs: Sequence[float], batch_size: int
) -> LabelQuality:
    """What heads that never saw an image, nor a copy of it, make of its label.

    features: (n, V, D), of views that all count; labels: (n,); copy_groups: groups (n,) of copies. Photos of one scene
    may well be on both sides: a head that knows the scene knows its class better (with them grouped, swapped labels are
    found with an average precision of 0.62 instead of 0.85). What a first
    round doubts is left out of what a second one, in other folds, is trained on.
    """
    train_rows, mean = torch.arange(len(labels)), torch.zeros(len(labels), num_classes)
    for seed in range(ROUNDS):
        fold = assign_folds(labels, copy_groups, k=FOLDS, seed=seed)
        for rows, logits in out_of_fold_logits(
            features,
            labels,
            fold,
            num_classes=num_classes,
            lrs=lrs,
            batch_size=batch_size,
            seed=seed,
            train_rows=train_rows,
            average_views=features.shape[1],
        ):
            mean[rows] = mean[rows].lerp(logits, 1 / (seed + 1))  # of the rounds so far
        quality = score_labels(mean, labels)
        train_rows = (quality.error_prob <= 0.5).nonzero().flatten()
    return quality
