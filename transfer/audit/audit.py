"""The audit: wrong labels, copies, strange photos and too few photos, found in the lists by their kept features."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from transfer.audit.copies import copy_findings, copy_groups, find_copies
from transfer.audit.findings import KINDS, AuditSplit, Finding
from transfer.audit.label_errors import LabelQuality, score_labels, score_labels_out_of_fold, trainable
from transfer.audit.learning_curve import Curve, learning_curve
from transfer.crossval import MOST_EPOCHS, WORK, CrossValidation
from transfer.device import Compute
from transfer.features import Splits
from transfer.neighbours import nearest
from transfer.system.console import QUIET, Progress
from transfer.training import Hyperparameters

FEWEST_EPOCHS = 3  # of heads out of fold, where images and classes are many
MOST_WORK = 100_000_000  # images times classes, above which a learning curve takes longer than all else
FENCE = 1.5  # interquartile ranges above the upper quartile (Tukey 1977): outside; twice as far is far out


@dataclass(frozen=True)
class Audit:
    """All that an audit found; qualities: of the training labels and the test labels, which, where they were judged
    together, share one estimate. trained_on: images that the heads which judge labels were trained on, all or a part;
    curve: None where the images are too few or too many.
    """

    train: AuditSplit
    test: AuditSplit
    qualities: tuple[LabelQuality, LabelQuality]
    trained_on: int
    curve: Curve | None
    findings: list[Finding]
    judged_together: bool = False

    def not_judged(self) -> str:
        """The photos whose labels were not judged, in words: of these the models know too little. Else nothing."""
        parts = zip((self.train, self.test), self.qualities, ("training", "test"), strict=True)
        counts = [(len(split.rows), name) for split, quality, name in parts if quality.weak]
        noun = "photo" if counts and counts[-1][0] == 1 else "photos"
        return f"{' and '.join(f'{count:,} {name}' for count, name in counts)} {noun}" if counts else ""

    def of_kind(self, kind: str) -> list[Finding]:
        return [finding for finding in self.findings if finding.kind == kind]


def outlier_scores(distances: Tensor, usual: Tensor) -> Tensor:
    """How far outside the training images each image lies: (n,), 0 at their upper quartile, 0.5 at Tukey's fence.

    distances: to its nearest training images, ascending (n, k); usual: the same of the training images themselves. The
    last counts, the 8th, so that a handful of one kind does not hide itself.
    """
    if len(usual) < 4:
        return torch.zeros(len(distances))
    low, high = usual[:, -1].quantile(torch.tensor([0.25, 0.75])).tolist()
    return (distances[:, -1] - high) / max(2 * FENCE * (high - low), 1e-9)


def label_findings(split: AuditSplit, quality: LabelQuality) -> list[Finding]:
    """A finding for each label that is probably wrong."""
    return [
        Finding("label", split, place, float(quality.error_prob[place]), int(quality.suggested[place]))
        for place in quality.suspects.tolist()
    ]


def outlier_findings(split: AuditSplit, distances: Tensor, usual: Tensor) -> list[Finding]:
    """A finding for each image outside the fence, as `outlier_scores` has it."""
    scores = outlier_scores(distances, usual)
    places = (scores >= 0.5).nonzero().flatten().tolist()
    return [Finding("outlier", split, place, min(1.0, float(scores[place]))) for place in places]


def judge_labels(
    parts: Sequence[AuditSplit],
    found: Sequence[tuple[int, int, Tensor, Tensor]],
    test_logits: Tensor | None,
    *,
    num_classes: int,
    lrs: Sequence[float],
    batch_size: int,
) -> tuple[LabelQuality, LabelQuality]:
    """What heads that did not see an image make of its label: of the training images and the test images.

    found: the copies, as `find_copies` has them; test_logits: (n, C), by which the test images are judged; None where
    heads out of fold judge them with the training images.
    """
    judged, first = parts if test_logits is None else parts[:1], (0, len(parts[0].rows))
    features = parts[0].features if test_logits is not None else parts[0].features.joined(parts[1].features)
    labels = torch.cat([part.labels for part in judged])
    among = [
        pairs + torch.tensor([first[query], first[key]])
        for query, key, pairs, _ in found
        if max(query, key) < len(judged)
    ]
    groups = copy_groups(labels, torch.cat(among))
    quality = score_labels_out_of_fold(
        features, labels, groups, num_classes=num_classes, lrs=lrs, batch_size=batch_size
    )
    if test_logits is not None:
        return quality, score_labels(test_logits, parts[1].labels)
    return quality.part(slice(first[1])), quality.part(slice(first[1], None))


def neighbours_of(queries: AuditSplit, keys: AuditSplit) -> tuple[Tensor, Tensor]:
    """Distances and places of the nearest images in keys, as `nearest` has them."""
    progress = Progress(f"{queries.image_list.name}, neighbours:", len(queries.rows), quiet=QUIET)
    return nearest(queries.features, keys.features, queries is keys, progress=progress)


def audit_splits(splits: Splits, test_logits: Tensor, hparams: Hyperparameters, compute: Compute) -> Audit:
    """Audit the training images by heads out of fold, and the test images by the final model's logits (n, C); those
    that were held out of the training images' source by heads out of fold too.
    """
    train, test = parts = AuditSplit.from_split(splits.trainval), AuditSplit.from_split(splits.test)
    num_classes = test_logits.shape[1]
    work = len(train.labels) * num_classes
    lrs = [hparams.lr] * min(hparams.epochs, max(FEWEST_EPOCHS, min(MOST_EPOCHS, MOST_EPOCHS * WORK // work)))
    near = {(query, key): neighbours_of(parts[query], parts[key]) for query, key in ((0, 0), (1, 1), (1, 0))}
    found = find_copies(parts, {ends: places for ends, (_, places) in near.items()}, compute)
    judge = None if splits.test_held_out else test_logits
    qualities = judge_labels(parts, found, judge, num_classes=num_classes, lrs=lrs, batch_size=hparams.batch_size)
    findings = list(copy_findings(parts, qualities, found))
    for number, (part, quality) in enumerate(zip(parts, qualities, strict=True)):
        findings += label_findings(part, quality)
        findings += outlier_findings(part, near[number, 0][0], near[0, 0][0])
    findings.sort(key=lambda finding: (KINDS.index(finding.kind), -finding.score))
    curve = None
    if work <= MOST_WORK:
        images = CrossValidation(train.features, train.labels, hparams.seed)
        curve = learning_curve(images, num_classes, lrs, hparams.batch_size)
    trained_on, _ = trainable(sum(len(part.rows) for part in (parts if judge is None else parts[:1])), num_classes)
    return Audit(train, test, qualities, trained_on, curve, findings, judged_together=judge is None)
