"""Label errors: which labels are probably wrong, by the logits of heads that were not trained on them."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from transfer.calibration import bisect
from transfer.crossval import FoldHeads, assign_folds, train_fold_heads
from transfer.features import Features
from transfer.system.console import track

FOLDS, FEWEST_FOLDS = 10, 2  # measured: with 5, swapped labels are found with an average precision 2 points lower
ROUNDS = 2  # of heads out of fold, the second without the labels that the first one doubts
RIGHT_BEFORE = (
    20  # labels that are assumed to be right beforehand: a few images alone say nothing about the share of wrong ones
)
LEAST_SHARE = 0.01  # of wrong labels, for which a model's power to find them is estimated
WEAK = 0.2  # power or agreement below which a model can't judge labels
MOST_TRAINED = 1_000_000_000  # images times classes times folds: minutes on two cores
MAX_LOGITS = 5_000_000  # that two numbers are fitted on
PART = 1_000_000  # logits at a time: 8 MB in float64


@dataclass(frozen=True)
class MeanHeads:
    """The mean of the logits (N, C) that the heads of some rounds give images that they never saw: see `FoldHeads`."""

    rounds: Sequence[FoldHeads]

    @property
    def shape(self) -> tuple[int, int]:
        return self.rounds[0].shape

    def __getitem__(self, rows: Tensor) -> Tensor:
        mean = self.rounds[0][rows]
        for number, heads in enumerate(self.rounds[1:], 2):
            mean = mean.lerp(heads[rows], 1 / number)
        return mean


@dataclass(frozen=True)
class LabelQuality:
    """What a model makes of labels (n,): its probability of each (confidence), that of an error, and the label it
    would give instead (suggested).

    noise_rate: the estimated share of wrong labels, and temperature: that of the probabilities it goes with; power: the
    share of wrong labels that it would find, were they wrong at random; agreement: the share of labels that it would
    give itself. Where that is small, what the model does not know would pass for wrong labels.
    """

    confidence: Tensor
    error_prob: Tensor
    suggested: Tensor
    noise_rate: float
    temperature: float
    power: float
    agreement: float

    @property
    def weak(self) -> bool:
        return min(self.power, self.agreement) < WEAK

    def part(self, places: slice) -> "LabelQuality":
        """That of some of the images alone."""
        confidence, error_prob, suggested = self.confidence[places], self.error_prob[places], self.suggested[places]
        return replace(self, confidence=confidence, error_prob=error_prob, suggested=suggested)

    @property
    def suspects(self) -> Tensor:
        """Places, the most certain first, of labels that are probably wrong; none of a weak model."""
        places = (self.error_prob > 0.5).nonzero().flatten() if not self.weak else torch.empty(0, dtype=torch.int64)
        return places[self.error_prob[places].argsort(descending=True, stable=True)]


def score_labels(logits: Tensor | MeanHeads, labels: Tensor) -> LabelQuality:
    """How likely each label is wrong, from logits (N, C) of a model that was not trained on it.

    A label y is right with 1 - e, else any other with equal odds: p(y) = (1 - e) q + e (1 - q) / (C - 1), where q is
    its softmax(logits / T). The T and e that make the labels likeliest are taken, and Bayes' rule for each label.
    That orders images by q alone (self-confidence, Northcutt et al. 2021) and finds where to stop. Measured, of labels
    swapped at random in 2 to 20% of the sample's two lists, with noise on the features and without: at least 0.7 of
    those that are more likely wrong than right were; with 20 to 120 images, a half.
    """
    count, num_classes = logits.shape
    if num_classes == 1:
        return LabelQuality(torch.ones(count), torch.zeros(count), torch.zeros_like(labels), 0.0, 1.0, 0.0, 1.0)
    # Every so many of a long list, which may be sorted by class.
    every, part = math.ceil(count * num_classes / MAX_LOGITS), max(1, PART // num_classes)
    drawn = torch.arange(0, count, every)
    some, theirs = torch.cat([logits[rows] for rows in drawn.split(part)]), labels[drawn]
    temperature, noise_rate = fit_noise(some, theirs)
    q, suggested = torch.empty(count, dtype=torch.float64), torch.empty_like(labels)
    for rows in track("labels:", torch.arange(count).split(part)):
        here, own = logits[rows], labels[rows, None]
        q[rows] = self_confidence(here, own, temperature)
        suggested[rows] = here.scatter(1, own, -torch.inf).argmax(1)
    error_prob = noise_rate * (1 - q) / (num_classes - 1) / label_prob(q, noise_rate, num_classes)
    # More likely wrong than right are labels below this q; how many would be, had they any other class?
    share = max(noise_rate, LEAST_SHARE)
    edge = share / (share + (1 - share) * (num_classes - 1))
    found = 0
    for here, own in zip(some.split(part), theirs[:, None].split(part), strict=True):
        found += int(((here.double() / temperature).softmax(1).scatter_(1, own, 1) < edge).sum())
    power = found / len(theirs) / (num_classes - 1)
    agreement = float((some.argmax(1) == theirs).double().mean())
    return LabelQuality(q, error_prob, suggested, noise_rate, temperature, power, agreement)


def fit_noise(logits: Tensor, labels: Tensor) -> tuple[float, float]:
    """The temperature and the share of wrong labels that make labels (n,) likeliest, by logits (n, C)."""
    num_classes, best, part = logits.shape[1], (-math.inf, 1.0, 0.0), max(1, PART // logits.shape[1])
    parts = [*zip(logits.split(part), labels[:, None].split(part), strict=True)]
    for temperature in torch.logspace(-0.6, 1, 33).tolist():  # from 1/4 to 10
        q = torch.cat([self_confidence(here, own, temperature) for here, own in parts])
        noise_rate = fit_noise_rate(q, num_classes)
        likelihood = label_prob(q, noise_rate, num_classes).log().sum() + RIGHT_BEFORE * math.log(1 - noise_rate)
        best = max(best, (float(likelihood), temperature, noise_rate))
    return best[1:]


def self_confidence(logits: Tensor, labels: Tensor, temperature: float) -> Tensor:
    """The probability of each label, (n,), in float64, by logits (n, C); labels: (n, 1)."""
    return (logits.double() / temperature).log_softmax(1).gather(1, labels)[:, 0].exp()


def label_prob(q: Tensor, noise_rate: float, num_classes: int) -> Tensor:
    """The probability of labels of which a share is any other class."""
    return ((1 - noise_rate) * q + noise_rate * (1 - q) / (num_classes - 1)).clamp_min(1e-300)


def fit_noise_rate(q: Tensor, num_classes: int) -> float:
    """The share e of wrong labels that makes them likeliest, from 0 to 1/2: bisection on the slope, which falls."""
    gain = (1 - q) / (num_classes - 1) - q

    def too_low(share: float) -> bool:
        return bool((gain / label_prob(q, share, num_classes)).sum() - RIGHT_BEFORE / (1 - share) > 0)

    return bisect(too_low, 0.0, 0.5)[0]


def trainable(count: int, num_classes: int) -> tuple[int, int]:
    """How many of so many images the heads out of fold are trained on, and in how many folds: of very many images and
    classes a part, in two folds. On 250 images a class a head knows nearly what it would know of all.
    """
    if count * num_classes * FOLDS <= MOST_TRAINED:
        return count, FOLDS
    return min(count, MOST_TRAINED // (FEWEST_FOLDS * num_classes)), FEWEST_FOLDS


def score_labels_out_of_fold(
    features: Tensor | Features,
    labels: Tensor,
    copy_groups: Tensor,
    *,
    num_classes: int,
    lrs: Sequence[float],
    batch_size: int,
) -> LabelQuality:
    """What heads that never saw an image, nor a copy of it, make of its label.

    features: (n, V, D), of views that all count; labels: (n,); copy_groups: groups (n,) of copies. Photos of one scene
    may well be on both sides: a head that knows the scene knows its class better (with them grouped, swapped labels are
    found with an average precision of 0.62 instead of 0.85). What a first round doubts is left out of what a second
    one, in other folds, is trained on.
    """
    heads, trusted = [], torch.arange(len(labels))
    most, folds = trainable(len(labels), num_classes)
    for seed in range(ROUNDS):
        if len(trusted) > most:
            drawn = torch.randperm(len(trusted), generator=torch.Generator().manual_seed(seed))[:most]
            trusted = trusted[drawn.sort().values]
        heads.append(
            train_fold_heads(
                features,
                labels,
                assign_folds(labels, copy_groups, k=folds, seed=seed),
                num_classes=num_classes,
                lrs=lrs,
                batch_size=batch_size,
                seed=seed,
                train_rows=trusted,
                num_views=features.shape[1],
            )
        )
        quality = score_labels(MeanHeads(heads), labels)
        trusted = (quality.error_prob <= 0.5).nonzero().flatten()
    return quality
