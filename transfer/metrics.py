"""Metrics: what is right and wrong on images with labels: of an epoch, or of a list with its table and calibration."""

import heapq
import math
from array import array
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.nn.parallel import DistributedDataParallel

from transfer.system.console import letters, padded, shortened

NONE = "–"  # in place of 0 / 0
NAME_WIDTH = 24  # letters of a class name in a line
SHOWN = 24  # images of a kind that a report shows at most
BINS = 10  # of confidence, as Guo et al. (2017) have them


class Metrics(NamedTuple):
    """Of the images of an epoch: mean loss, share that is right, its mean over the classes that have images, and how
    many they are.
    """

    loss: float
    accuracy: float
    macro_recall: float
    images: int | None = None


class MetricMeter:
    """Loss and hits of a model in an epoch, summed over samples: batches differ in size, and ranks share them."""

    def __init__(self, model: nn.Module):
        self.all_ranks = isinstance(model, DistributedDataParallel)
        num_classes = len([*model.parameters()][-1])  # the head's last parameter has a row per class
        self.loss, self.hits, self.images = 0.0, *torch.zeros(2, num_classes, dtype=torch.int64)

    def update(self, loss: float, logits: Tensor, labels: Tensor) -> None:
        """The sum of a batch's losses, its logits (N, C) and labels (N,)."""
        self.loss += loss
        right, labels = (logits.argmax(1) == labels).cpu(), labels.cpu()
        self.hits += labels[right].bincount(minlength=len(self.hits))
        self.images += labels.bincount(minlength=len(self.images))

    def compute(self) -> Metrics:
        """Over the samples of all ranks that train the model."""
        totals = torch.cat([torch.tensor([self.loss], dtype=torch.float64), self.hits, self.images])
        if self.all_ranks:
            dist.all_reduce(totals)
        hits, images = totals[1:].chunk(2)
        there, count = images > 0, int(images.sum())
        recall = (hits[there] / images[there]).mean()
        return Metrics(totals[0].item() / count, hits.sum().item() / count, recall.item(), count)


class ClassificationScores:
    """What is right and wrong, gathered image by image: memory grows with the classes and the kinds of mistakes.

    images, guessed, hits: (C,) images of each class, taken for it, and both; confusions: (label, guess): images.
    """

    def __init__(self, classes: int):
        self.images, self.guessed, self.hits = (torch.zeros(classes, dtype=torch.int64) for _ in range(3))
        self.confusions = Counter()
        self.in_top3 = 0

    def update(self, label: int, probs: Tensor) -> None:
        """One image: its label and its probabilities (C,)."""
        top = probs.topk(min(3, len(probs))).indices.tolist()
        self.images[label] += 1
        self.guessed[top[0]] += 1
        if top[0] == label:
            self.hits[label] += 1
        else:
            self.confusions[label, top[0]] += 1
        self.in_top3 += label in top

    @property
    def count(self) -> int:
        return int(self.images.sum())

    @property
    def right(self) -> int:
        return int(self.hits.sum())

    @property
    def accuracy(self) -> float:
        return self.right / self.count

    @property
    def accuracy_interval(self) -> tuple[float, float]:
        return wilson_interval(self.right, self.count)

    @property
    def top3(self) -> float:
        return self.in_top3 / self.count

    @property
    def top3_interval(self) -> tuple[float, float]:
        return wilson_interval(self.in_top3, self.count)

    # NaN, of 0 / 0, where a class has no images or is never predicted.
    @property
    def precision(self) -> Tensor:
        return self.hits / self.guessed

    @property
    def recall(self) -> Tensor:
        return self.hits / self.images

    @property
    def f1(self) -> Tensor:
        return 2 * self.hits / (self.images + self.guessed)

    def macro_average(self) -> tuple[float, float, float]:
        """Precision, recall and F1, each its mean over the classes that have images; of one never predicted 0."""
        there = self.images > 0
        columns = (self.precision, self.recall, self.f1)
        precision, recall, f1 = (float(column[there].nan_to_num(0).mean()) for column in columns)
        return precision, recall, f1

    def taken_for(self) -> dict[int, tuple[int, int]]:
        """Of each class with mistakes: the class that it is most often taken for, and how often."""
        most = {}
        for (label, guess), count in sorted(self.confusions.items()):
            if count > most.get(label, (0, 0))[1]:
                most[label] = guess, count
        return most

    def worst_first(self) -> list[int]:
        """The classes by rising recall; those without images come last."""
        recall = self.recall.tolist()
        return sorted(range(len(recall)), key=lambda label: (math.isnan(recall[label]), recall[label], label))


class ScoredImage(NamedTuple):
    """What a report keeps of an image: its path and label, the three likeliest classes and their probabilities."""

    path: bytes
    label: int
    guesses: list[int]
    probs: list[float]

    @classmethod
    def of(cls, path: bytes, label: int, probs: Tensor) -> "ScoredImage":
        """probs: (C,)."""
        top = probs.topk(min(3, len(probs)))
        return cls(path, label, top.indices.tolist(), top.values.tolist())

    @property
    def confidence(self) -> float:
        return self.probs[0]

    @property
    def right(self) -> bool:
        return self.guesses[0] == self.label


class ScoredImages:
    """What a report keeps of n images: of all how sure the model was and whether it was right, in 5 bytes each; of the
    most confident mistakes and the least confident hits, SHOWN each at most, all that is shown.
    """

    def __init__(self):
        self.confidences, self.rights = array("f"), bytearray()
        self.ranked = [], []  # heaps: mistakes by confidence, hits by the opposite; of equal ones by their place

    def __len__(self) -> int:
        return len(self.rights)

    def add(self, image: ScoredImage) -> None:
        place = len(self)
        self.confidences.append(image.confidence)
        self.rights.append(image.right)
        heap, sign = self.ranked[image.right], -1 if image.right else 1
        heapq.heappush(heap, (sign * image.confidence, sign * place, image))
        if len(heap) > SHOWN:
            heapq.heappop(heap)

    @property
    def confidence(self) -> Tensor:
        return torch.tensor(self.confidences)

    @property
    def right(self) -> Tensor:
        return torch.tensor(self.rights, dtype=torch.bool)

    def mistakes(self) -> list[ScoredImage]:
        """The most confident first."""
        return [image for *_, image in sorted(self.ranked[False], reverse=True)]

    def hits(self) -> list[ScoredImage]:
        """The least confident first."""
        return [image for *_, image in sorted(self.ranked[True], reverse=True)]


def calibration_bins(confidence: Tensor, right: Tensor) -> tuple[Tensor, Tensor, Tensor, float]:
    """By tenth of confidence: images (10,), right ones (10,), mean confidence (10,); and the expected error.

    confidence, right: (N,), of each image, and whether its guess is right.

    The tenths are (0, 0.1], (0.1, 0.2], ...; the error is the gap between share right and mean
    confidence, weighted by images (Guo et al. 2017, equation 3).
    """
    tenth = torch.bucketize(confidence, torch.arange(1, BINS) / BINS)
    count = torch.bincount(tenth, minlength=BINS)
    hits = torch.bincount(tenth[right], minlength=BINS)
    total = torch.bincount(tenth, confidence.double(), minlength=BINS)
    ece = float((hits - total).abs().sum() / max(1, len(confidence)))
    return count, hits, total / count, ece


def class_weights(labels: Tensor, classes: int) -> Tensor:
    """Weights (C,) of classes in the loss, inverse to their images, so that all that have some weigh alike: 1 on
    average over the images.
    """
    images = labels.bincount(minlength=classes)
    return len(labels) / ((images > 0).sum() * images.clamp_min(1))


def likeliest(probs: Tensor, classes: Sequence[str], count: int) -> list[tuple[str, float]]:
    """The first so many classes of one image's probabilities (C,), likeliest first."""
    values, labels = probs.topk(min(count, len(classes)))
    return [(classes[label], value) for label, value in zip(labels.tolist(), values.tolist())]


def wilson_interval(right: int, count: int) -> tuple[float, float]:
    """The 95% interval of a share (Wilson, 1927, JASA 22): it stays within 0 and 1 and holds for small counts."""
    z, part = 1.959964, right / count
    centre = part + z * z / (2 * count)
    spread = z * math.sqrt(part * (1 - part) / count + z * z / (4 * count * count))
    low, high = (max(0.0, (centre + sign * spread) / (1 + z * z / count)) for sign in (-1, 1))
    return low, min(1.0, high)


def percent(value: float) -> str:
    return NONE if math.isnan(value) else f"{value:.1%}"


def rounded_percent(value: float, interval: tuple[float, float]) -> str:
    """A share in percent, with no decimals that its interval does not have."""
    width = interval[1] - interval[0]
    return f"{value:.{0 if width > 0.02 else 1 if width > 0.002 else 2}%}"


def classification_report(scores: ClassificationScores, classes: Sequence[str]) -> str:
    """Accuracy, then a line per class, worst recall first, then means over the classes with images."""
    lines = []
    for what, right, part, (low, high) in (
        ("accuracy", scores.right, scores.accuracy, scores.accuracy_interval),
        ("top-3", scores.in_top3, scores.top3, scores.top3_interval),
    ):
        interval = f"95% interval {low:.1%} to {high:.1%}"
        lines.append(f"{what:<8}  {part:7.2%}  {right:,} of {scores.count:,}, {interval}")
    names = [shortened(name, NAME_WIDTH) for name in classes]
    width = max(map(letters, [*names, "macro average"]))
    lines += ["", f"{'class':<{width}}  images  precision   recall       F1  most often taken for"]
    images, taken_for, order = scores.images.tolist(), scores.taken_for(), scores.worst_first()
    columns = [column.tolist() for column in (scores.precision, scores.recall, scores.f1)]
    for label in order:
        guess, times = taken_for.get(label, (None, 0))
        other = f"{names[guess]} ({times:,})" if times else ""
        precision, recall, f1 = (percent(column[label]) for column in columns)
        line = f"{padded(names[label], width)}  {images[label]:6,}  {precision:>9}  {recall:>7}  {f1:>7}  {other}"
        lines.append(line.rstrip())
    precision, recall, f1 = scores.macro_average()
    lines.append(f"{'macro average':<{width}}  {scores.count:6,}  {precision:9.1%}  {recall:7.1%}  {f1:7.1%}")
    return "\n".join(lines)
