"""Findings: what an audit looks at, and what it can find there, an image and a reason to look at it each."""

import csv
import io
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from torch import Tensor
from torch.utils.data import Dataset

from transfer.features import Features, Split
from transfer.inputs.lists import ImageList
from transfer.system.files import save_atomically

KINDS = ("label", "conflict", "leak", "duplicate", "outlier")
COLUMNS = ("list", "line", "path", "kind", "label", "suggestion", "score", "other")


@dataclass(frozen=True)
class AuditSplit:
    """One list in the audit: its n readable images.

    dataset: an `ImageDataset` of their evaluation view; rows: (n,) their numbers in it; features: (n, V, D) of the
    evaluation view and, where it is kept, its mirror image; labels: (n,).
    """

    dataset: Dataset
    rows: Tensor
    features: Tensor | Features
    labels: Tensor

    @classmethod
    def from_split(cls, split: Split) -> "AuditSplit":
        rows = split.features.rows
        dataset, labels = replace(split.dataset, views=[0]), split.features.labels[rows]
        return cls(dataset, rows, split.features.subset(rows, num_views=2), labels)

    @property
    def image_list(self) -> ImageList:
        return self.dataset.image_list

    def path(self, place: int) -> bytes:
        return self.image_list.path(int(self.rows[place]))

    def line(self, place: int) -> int | None:
        """None where it has none, as in a folder."""
        return self.image_list.line(int(self.rows[place]))


@dataclass(frozen=True)
class Finding:
    """Something to look at: a place in a split, what is wrong with it, and how certain that is, from 0.5 to 1.

    suggestion: the label that it might have instead; other: split and place of the image that it goes with.
    """

    kind: str
    split: AuditSplit
    place: int
    score: float
    suggestion: int | None = None
    other: tuple[AuditSplit, int] | None = None

    @property
    def label(self) -> int:
        return int(self.split.labels[self.place])

    @property
    def path(self) -> bytes:
        return self.split.path(self.place)

    @property
    def other_path(self) -> bytes | None:
        return self.other and self.other[0].path(self.other[1])


def save_findings(path: Path, findings: Iterable[Finding], classes: Sequence[str]) -> None:
    """The findings as CSV (RFC 4180), a row each, of each kind the most certain first. Raises UserError (status 1)."""
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow(COLUMNS)
    for finding in findings:
        split, place = finding.split, finding.place
        where = (split.image_list.name, split.line(place), os.fsdecode(finding.path))
        suggestion = "" if finding.suggestion is None else classes[finding.suggestion]
        other = os.fsdecode(finding.other_path) if finding.other else ""
        writer.writerow([*where, finding.kind, classes[finding.label], suggestion, f"{finding.score:.4f}", other])
    save_atomically(path, text.getvalue().encode(errors="surrogateescape"))
