"""The audit: what kept features say of the lists themselves, found: wrong labels, copies, outliers, too few photos."""

import csv
import io
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import Dataset

from transfer.device import Compute
from transfer.features import Features
from transfer.files import save_atomically
from transfer.folds import (
    MOST_EPOCHS,
    WORK,
    Dealt,
    components,
    draw_folds,
    hold_out,
    learnable,
    mirror_plan,
    out_of_fold_logits,
)
from transfer.lists import ImageList
from transfer.neighbours import candidates, copies, nearest, thumbnails
from transfer.suspects import Labels, judge_labels, judge_out_of_fold

KINDS = ("label", "conflict", "leak", "duplicate", "outlier")
COLUMNS = ("list", "line", "path", "kind", "label", "suggestion", "score", "other")
FEWEST_EPOCHS = 3  # of heads out of fold, where images and classes are many
CURVE, DRAWS = (1 / 8, 1 / 4, 1 / 2, 1), 3  # shares of the training images, and how often each is drawn
FENCE = 1.5  # interquartile ranges above the upper quartile (Tukey 1977): outside; twice as far is far out


@dataclass(frozen=True)
class Part:
    """One list in the audit: its n readable images.

    dataset: a `train.Views` of their evaluation view; rows: (n,) their numbers in it; table: (n, V, D) features of
    the evaluation view and, where it is kept, its mirror image; labels: (n,).
    """

    dataset: Dataset
    rows: Tensor
    table: Tensor
    labels: Tensor

    @classmethod
    def of(cls, dataset: Dataset, features: Features) -> "Part":
        rows = features.rows
        return cls(dataset, rows, features.take(rows, slice(2)), features.labels[rows])

    @property
    def listed(self) -> ImageList:
        return self.dataset.listed

    def path(self, place: int) -> bytes:
        return self.listed.path(int(self.rows[place]))

    def line(self, place: int) -> int | None:
        """None of a folder, which has no lines."""
        return None if self.listed.names else int(self.listed.lines[self.rows[place]])


@dataclass(frozen=True)
class Finding:
    """Something to look at: a place in a part, what is wrong with it, and how sure that is, from 0.5 to 1.

    suggestion: the label that it might have instead; other: part and place of the image that it goes with.
    """

    kind: str
    part: Part
    place: int
    score: float
    suggestion: int | None = None
    other: tuple[Part, int] | None = None

    @property
    def label(self) -> int:
        return int(self.part.labels[self.place])

    @property
    def path(self) -> bytes:
        return self.part.path(self.place)

    @property
    def other_path(self) -> bytes | None:
        return self.other and self.other[0].path(self.other[1])


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


@dataclass(frozen=True)
class Audit:
    """All that an audit found, of the training part and the test part."""

    train: Part
    test: Part
    labels: tuple[Labels, Labels]
    curve: Curve | None
    findings: list[Finding]

    def of_kind(self, kind: str) -> list[Finding]:
        return [finding for finding in self.findings if finding.kind == kind]


# Copies


def find_copies(
    parts: Sequence[Part], near: dict[tuple[int, int], Tensor], compute: Compute
) -> list[tuple[int, int, Tensor, Tensor]]:
    """Copies within the training part, within the test part, and of training images in the test part.

    near: by numbers of the parts of query and key the places of each query's nearest keys, (n, k). Each of what is
    found: the two numbers, pairs of places (Q, 2), and how sure they are (Q,). Within a part the later image is the
    query.
    """
    pairs = [
        candidates(parts[query].table[:, 0], parts[key].table, rows, query == key)
        for (query, key), rows in near.items()
    ]
    pixels = []
    for number, part in enumerate(parts):
        wanted = [
            pair[:, side] for search, pair in zip(near, pairs, strict=True) for side in (0, 1) if search[side] == number
        ]
        places, index = torch.cat(wanted).unique(), torch.zeros(len(part.rows), dtype=torch.int64)
        index[places] = torch.arange(len(places))
        pixels.append((thumbnails(part.dataset, part.rows[places], compute), index))
    return [
        (query, key, *copies(pair, (pixels[query], pixels[key])))
        for (query, key), pair in zip(near, pairs, strict=True)
    ]


def tied_copies(part: Part, pairs: Tensor) -> Tensor:
    """Groups (n,) of copies of one label, numbered from 0; other images are alone."""
    same = part.labels[pairs[:, 0]] == part.labels[pairs[:, 1]]
    return components(len(part.labels), pairs[same].T).unique(return_inverse=True)[1]


def copy_findings(
    parts: Sequence[Part], labels: Sequence[Labels], found: Sequence[tuple[int, int, Tensor, Tensor]]
) -> Iterator[Finding]:
    """A finding for each image with a copy: the surest one before it within its part, or in the training part.

    Of two labels in conflict the more doubtful one is the finding's.
    """
    for query, key, pairs, scores in found:
        order, told = scores.argsort(descending=True, stable=True), set()
        for (place, other), score in zip(pairs[order].tolist(), scores[order].tolist(), strict=True):
            here, there = parts[query], parts[key]
            ends = [(query, place), (key, other)]
            conflict = here.labels[place] != there.labels[other]
            if conflict:
                ends.sort(key=lambda end: -float(labels[end[0]].doubt[end[1]]))
                (first, at), (second, beside) = ends
                suggestion = int(parts[second].labels[beside])
                yield Finding("conflict", parts[first], at, score, suggestion, (parts[second], beside))
            kind = "leak" if query != key else "duplicate"
            if (kind == "leak" or not conflict) and place not in told:
                told.add(place)
                yield Finding(kind, here, place, score, None, (there, other))


# Outliers


def outlier_scores(distances: Tensor, usual: Tensor) -> Tensor:
    """How far outside the training images each image lies: (n,), 0 at their upper quartile, 0.5 at Tukey's fence.

    distances: to its nearest training images, ascending (n, k); usual: the same of the training images themselves. The
    last counts, the 8th, so that a handful of one kind does not hide itself.
    """
    if len(usual) < 4:
        return torch.zeros(len(distances))
    low, high = usual[:, -1].quantile(torch.tensor([0.25, 0.75])).tolist()
    return (distances[:, -1] - high) / max(2 * FENCE * (high - low), 1e-9)


# More photos


def learning_curve(images: Dealt, classes: int, rates: Sequence[float], batch_size: int) -> Curve | None:
    """Accuracy out of fold of heads trained on an eighth, a quarter, a half and all of the training images, photos of
    one scene together; None where they are too few.
    """
    count = len(images.labels)
    shares = [share for share in CURVE if share * count >= 2 * classes]
    if len(shares) < 2 or not images.known.any():
        return None
    accuracy, recall, sizes = torch.zeros(len(shares), DRAWS), torch.zeros(len(shares), DRAWS, classes), []
    folds = [draw_folds(images.labels, images.groups, seed=draw) for draw in range(DRAWS)]
    for step, share in enumerate(shares):
        for draw, fold in enumerate(folds):
            part = hold_out(images.labels, images.groups, share, draw) if share < 1 else torch.ones_like(fold)
            kept = part.nonzero().flatten()
            known = learnable(images.labels, fold)
            how = {"plan": mirror_plan, "batch_size": batch_size, "seed": draw, "kept": kept}
            logits = out_of_fold_logits(images.table, images.labels, fold, classes, rates, **how)
            right = (logits.argmax(1) == images.labels)[known]
            accuracy[step, draw] = right.double().mean()
            of_class = images.labels[known]
            recall[step, draw] = of_class[right].bincount(minlength=classes) / of_class.bincount(minlength=classes)
        sizes.append(len(kept))
    return Curve(sizes, accuracy, images.labels.bincount(minlength=classes), recall.mean(1))


# All of it


def audit_lists(
    train: tuple[Dataset, Features],
    test: tuple[Dataset, Features],
    test_logits: Tensor,
    *,
    epochs: int,
    lr: float,
    batch_size: int,
    seed: int,
    compute: Compute,
) -> Audit:
    """Audit a training list, by heads out of fold, and a test list, by the final model's logits (n, C) of it.

    train, test: a `train.Views` of the evaluation view, and the features of its list.
    """
    parts = Part.of(*train), Part.of(*test)
    classes = test_logits.shape[1]
    work = len(parts[0].labels) * classes
    rates = [lr] * min(epochs, max(FEWEST_EPOCHS, min(MOST_EPOCHS, MOST_EPOCHS * WORK // work)))
    near = {
        (query, key): nearest(parts[query].table[:, 0], parts[key].table, query == key)
        for query, key in ((0, 0), (1, 1), (1, 0))
    }
    found = find_copies(parts, {ends: places for ends, (_, places) in near.items()}, compute)
    tied = tied_copies(parts[0], found[0][2])
    labels = (
        judge_out_of_fold(parts[0].table, parts[0].labels, tied, classes, rates, batch_size),
        judge_labels(test_logits, parts[1].labels),
    )
    findings = list(copy_findings(parts, labels, found))
    for number, (part, judged) in enumerate(zip(parts, labels, strict=True)):
        findings += [
            Finding("label", part, place, float(judged.doubt[place]), int(judged.instead[place]))
            for place in judged.suspects.tolist()
        ]
        far = outlier_scores(near[number, 0][0], near[0, 0][0])
        findings += [
            Finding("outlier", part, place, min(1.0, float(far[place])))
            for place in (far >= 0.5).nonzero().flatten().tolist()
        ]
    findings.sort(key=lambda finding: (KINDS.index(finding.kind), -finding.score))
    curve = learning_curve(Dealt(parts[0].table, parts[0].labels, seed), classes, rates, batch_size)
    return Audit(*parts, labels, curve, findings)


def save_findings(path: Path, audit: Audit, names: Sequence[str]) -> None:
    """The findings as CSV (RFC 4180), a row each, the surest first of each kind. Raises UserError (status 1)."""
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow(COLUMNS)
    for each in audit.findings:
        other = os.fsdecode(each.other_path) if each.other else ""
        suggestion = "" if each.suggestion is None else names[each.suggestion]
        place = (each.part.listed.name, each.part.line(each.place), os.fsdecode(each.path), each.kind)
        writer.writerow([*place, names[each.label], suggestion, f"{each.score:.4f}", other])
    save_atomically(path, text.getvalue().encode(errors="surrogateescape"))
