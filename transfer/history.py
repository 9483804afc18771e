"""What a run says of itself: its header, then the epochs' figures, a line each on stdout and a row each in the CSV."""

import csv
import io
import math
from pathlib import Path

from transfer.checkpoint import replaced_by
from transfer.console import shown
from transfer.device import Compute
from transfer.distributed import my_rank
from transfer.files import previous_of, save_atomically
from transfer.lists import ImageList


def print_header(
    compute: Compute, backbone: str, train: ImageList, test: ImageList, classes: int, chosen_on: str, out: Path
) -> None:
    print(f"device    {compute.device}, {compute.precision}")
    print(f"backbone  {backbone}")
    print(f"data      {len(train):,} training and {len(test):,} test images of {classes} classes")
    print(f"best      epoch chosen on {chosen_on}", flush=True)
    if old := replaced_by(out):
        print(f"replaces  {old}; kept as {shown(previous_of(out))}", flush=True)


class History:
    """The epochs so far, and which was the best. Rank 0 alone prints and writes.

    chooser: test or val, after the list that chooses the epoch.
    """

    def __init__(self, out: Path, chooser: str):
        self.path, self.chooser = out.with_suffix(".csv"), chooser
        columns = ("epoch", "train_loss", "train_accuracy", f"{chooser}_loss", f"{chooser}_accuracy", "lr", "best")
        self.rows = [columns]
        self.best_epoch, self.best_accuracy = 0, -math.inf

    def add(self, epoch: int, trained: tuple[float, float], val: tuple[float, float], lr: float) -> None:
        """trained, val: loss and accuracy. Raises UserError (status 1) where the disk is full or fails."""
        best = val[1] > self.best_accuracy
        if best:
            self.best_epoch, self.best_accuracy = epoch, val[1]
        self.rows.append((epoch, *trained, *val, lr, int(best)))
        if my_rank():
            return
        if epoch == 1:
            print(f"epoch  train loss  train acc  {self.chooser + ' loss':>9}  {self.chooser + ' acc':>8}        lr")
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerows(self.rows)
        save_atomically(self.path, text.getvalue().encode())
        figures = f"{epoch:5d}  {trained[0]:10.4f}  {trained[1]:9.2%}  {val[0]:9.4f}  {val[1]:8.2%}  {lr:.6f}"
        print(f"{figures}{'  best' if best else ''}", flush=True)

    def rates(self) -> list[float]:
        """The learning rate of each epoch up to the best one."""
        return [row[-2] for row in self.rows[1 : self.best_epoch + 1]]
