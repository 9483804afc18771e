"""What a run says of itself: its header, then the epochs' figures, a line each on stdout and a row each in the CSV."""

import csv
import io
import math
from collections.abc import Sequence
from pathlib import Path

from transfer.checkpoint import replaced_by
from transfer.console import shown
from transfer.device import Compute
from transfer.distributed import my_rank
from transfer.files import previous_of, save_atomically
from transfer.lists import ImageList

UNEVEN = 10  # times the images of the smallest class, beyond which the largest one calls for --balance


def print_header(
    compute: Compute,
    backbone: str,
    train: ImageList,
    test: ImageList | None,
    names: Sequence[str],
    chosen_on: str,
    out: Path,
    balanced: bool,
) -> None:
    print(f"device    {compute.device}, {compute.precision}")
    print(f"backbone  {backbone}")
    if test:
        print(f"data      {len(train):,} training and {len(test):,} test images of {len(names)} classes")
    else:
        print(f"data      {len(train):,} images of {len(names)} classes; a fifth of each is held out to test on")
    counts = [(count, label) for label, count in enumerate(train.labels.bincount().tolist()) if count]
    if max(counts)[0] > UNEVEN * min(counts)[0] and not balanced:
        few, many = (f"{count:,} of {shown(names[label])}" for count, label in (min(counts), max(counts)))
        print(f"          {few}, {many}: --balance weighs all classes alike")
    print(f"best      epoch chosen on {chosen_on}", flush=True)
    if old := replaced_by(out):
        print(f"replaces  {old}; kept as {shown(previous_of(out))}", flush=True)


class History:
    """The epochs so far, and which was the best. Rank 0 alone prints and writes.

    chooser: test or val, after the list that chooses the epoch.
    """

    def __init__(self, out: Path, chooser: str, balanced: bool = False):
        self.path, self.chooser, self.balanced = out.with_suffix(".csv"), chooser, balanced
        columns = ("epoch", "train_loss", "train_accuracy", f"{chooser}_loss", f"{chooser}_accuracy")
        self.rows = [(*columns, *([f"{chooser}_recall"] if balanced else []), "lr", "best")]
        self.best_epoch, self.best = 0, (-math.inf, -math.inf)

    def judged(self, val: tuple[float, float, float]) -> float:
        """Of loss, accuracy and macro recall the one that chooses the epoch."""
        return val[2 if self.balanced else 1]

    def is_best(self, val: tuple[float, float, float]) -> bool:
        return self.judged(val) > self.judged((0.0, *self.best))

    def said(self, figures: tuple[float, float]) -> str:
        """Accuracy and, where classes are to count alike, macro recall, in words."""
        return f"accuracy {figures[0]:.2%}" + (f", macro recall {figures[1]:.2%}" if self.balanced else "")

    def add(self, epoch: int, trained: tuple[float, ...], val: tuple[float, float, float], lr: float) -> None:
        """trained, val: loss, accuracy, macro recall. Raises UserError (status 1) where the disk is full or fails."""
        best = self.is_best(val)
        if best:
            self.best_epoch, self.best = epoch, val[1:]
        told = val if self.balanced else val[:2]
        self.rows.append((epoch, *trained[:2], *told, lr, int(best)))
        if my_rank():
            return
        if epoch == 1:
            recall = f"  {self.chooser + ' recall':>11}" if self.balanced else ""
            heads = f"{self.chooser + ' loss':>9}  {self.chooser + ' acc':>8}{recall}"
            print(f"epoch  train loss  train acc  {heads}        lr")
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerows(self.rows)
        save_atomically(self.path, text.getvalue().encode())
        figures = f"{epoch:5d}  {trained[0]:10.4f}  {trained[1]:9.2%}  {val[0]:9.4f}  {val[1]:8.2%}"
        figures += f"  {val[2]:11.2%}  {lr:.6f}" if self.balanced else f"  {lr:.6f}"
        print(f"{figures}{'  best' if best else ''}", flush=True)

    def rates(self) -> list[float]:
        """The learning rate of each epoch up to the best one."""
        return [row[-2] for row in self.rows[1 : self.best_epoch + 1]]
