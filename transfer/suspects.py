"""Suspects: which labels are more likely wrong than right, by what a model says that was not trained on them."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from transfer.folds import draw_folds, mirror_plan, out_of_fold_logits

FOLDS = 10  # measured: with 5, swapped labels are found with an average precision 2 points lower
ROUNDS = 2  # of heads out of fold, the second without the labels that the first one doubts
RIGHT_BEFORE = 20  # labels that are taken as seen and right: of a few images alone no share of wrong ones can be told
LEAST_SHARE = 0.01  # of wrong labels, for which a model's power to notice them is told
WEAK = 0.2  # power below which a model has no say
MOST_LOGITS = 10_000_000  # that two numbers are fitted on: 80 MB
CHUNK = 10_000  # images at a time


@dataclass(frozen=True)
class Labels:
    """What a model makes of labels (n,): its probability of each, how likely each is wrong, what it would say instead.

    wrong: the share that fits best, and temperature: that of the probabilities it goes with; power: the share of labels
    wrong at random that it would notice.
    """

    confidence: Tensor
    doubt: Tensor
    instead: Tensor
    wrong: float
    temperature: float
    power: float

    @property
    def weak(self) -> bool:
        return self.power < WEAK

    @property
    def suspects(self) -> Tensor:
        """Places, the surest first, of labels that are more likely wrong than right; none of a weak model."""
        places = (self.doubt > 0.5).nonzero().flatten() if not self.weak else torch.empty(0, dtype=torch.int64)
        return places[self.doubt[places].argsort(descending=True, stable=True)]


def judge_labels(logits: Tensor, labels: Tensor) -> Labels:
    """How likely each label is wrong, from logits (N, C) of a model that was not trained on it.

    A label y is right with 1 - e, else any other with equal odds: p(y) = (1 - e) q + e (1 - q) / (C - 1), where q is
    its softmax(logits / T). The T and e that make the labels likeliest are taken, and Bayes' rule for each label.
    That orders images by q alone (self-confidence, Northcutt et al. 2021) and finds where to stop. Measured, of labels
    swapped at random in 2 to 20% of the sample's two lists, with noise on the features and without: at least 0.7 of
    those that are more likely wrong than right were; with 20 to 120 images, a half.
    """
    classes = logits.shape[1]
    instead = logits.scatter(1, labels[:, None], -torch.inf).argmax(1)
    if classes == 1:
        return Labels(torch.ones(len(labels)), torch.zeros(len(labels)), instead, 0.0, 1.0, 0.0)
    # Every so many of a long list, which may be sorted by class.
    sample = torch.arange(0, len(labels), math.ceil(len(labels) * classes / MOST_LOGITS))
    some, theirs, best = logits[sample].double(), labels[sample], (-math.inf, 1.0, 0.0)
    for temperature in torch.logspace(-0.6, 1, 33).tolist():  # from 1/4 to 10
        q = self_confidence(some, theirs, temperature)
        wrong = likeliest_share(q, classes)
        likelihood = mixed(q, wrong, classes).log().sum() + RIGHT_BEFORE * math.log(1 - wrong)
        best = max(best, (float(likelihood), temperature, wrong))
    _, temperature, wrong = best
    parts = zip(logits.split(CHUNK), labels.split(CHUNK), strict=True)
    q = torch.cat([self_confidence(part.double(), own, temperature) for part, own in parts])
    doubt = wrong * (1 - q) / (classes - 1) / mixed(q, wrong, classes)
    # More likely wrong than right are labels below this q; how many would be, had they any other class?
    share = max(wrong, LEAST_SHARE)
    edge = share / (share + (1 - share) * (classes - 1))
    others = (some / temperature).softmax(1).scatter(1, theirs[:, None], 1)
    power = (others < edge).double().sum(1).mean() / (classes - 1)
    return Labels(q, doubt, instead, wrong, temperature, float(power))


def self_confidence(logits: Tensor, labels: Tensor, temperature: float) -> Tensor:
    """The probability of each label, (N,), by logits (N, C)."""
    return (logits / temperature).log_softmax(1).gather(1, labels[:, None])[:, 0].exp()


def mixed(q: Tensor, wrong: float, classes: int) -> Tensor:
    """The probability of labels of which a share is any other class."""
    return ((1 - wrong) * q + wrong * (1 - q) / (classes - 1)).clamp_min(1e-300)


def likeliest_share(q: Tensor, classes: int) -> float:
    """The share e of wrong labels that makes them likeliest, from 0 to 1/2: bisection on the slope, which falls."""
    gain = (1 - q) / (classes - 1) - q
    low, high = 0.0, 0.5
    for _ in range(30):
        middle = (low + high) / 2
        slope = (gain / mixed(q, middle, classes)).sum() - RIGHT_BEFORE / (1 - middle)
        low, high = (middle, high) if slope > 0 else (low, middle)
    return low


def judge_out_of_fold(
    table: Tensor, labels: Tensor, tied: Tensor, classes: int, rates: Sequence[float], batch_size: int
) -> Labels:
    """What heads that never saw an image, nor a copy of it, make of its label.

    table: (n, V, D), features of views that all count; labels: (n,); tied: groups (n,) of copies. Photos of one scene
    may well be on both sides: who knows the scene knows its class better (with them tied, swapped labels are found with
    an average precision of 0.62 instead of 0.85). The labels that a first round doubts are left out of what a second
    one, in other folds, is trained on.
    """
    kept, told = torch.arange(len(labels)), 0
    for seed in range(ROUNDS):
        fold = draw_folds(labels, tied, k=FOLDS, seed=seed)
        told = told + out_of_fold_logits(
            table,
            labels,
            fold,
            classes,
            rates,
            plan=mirror_plan,
            batch_size=batch_size,
            seed=seed,
            kept=kept,
            sides=table.shape[1],
        )
        judged = judge_labels(told / (seed + 1), labels)
        kept = (judged.doubt <= 0.5).nonzero().flatten()
    return judged
