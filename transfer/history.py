"""History: what a run prints of itself, its header and a line per epoch, and the CSV with a row per epoch."""

import csv
import io
import math
import textwrap
import time
from pathlib import Path

from transfer.architectures import NORMALIZE
from transfer.checkpoint import describe_existing
from transfer.data import Data
from transfer.device import Compute
from transfer.distributed import is_main_process
from transfer.features import Splits
from transfer.metrics import NAME_WIDTH, Metrics, wilson_interval
from transfer.pretrained import Pretrained
from transfer.system.console import as_argument, plural, predict_command, printable, shortened, warn
from transfer.system.files import history_path, path_digest, save_atomically
from transfer.system.flags import DEFAULT_LR

FEW_IMAGES = 100  # below which an accuracy is told with its interval: 16 points wide or more, at 80%
LARGE_LR = 0.1  # of the head: 20 times the default
SHOWN_CLASSES = 6  # with their sizes in the header; of more the first three, the smallest and the largest
WIDTH = 80  # of a terminal, as most of them open
UNEVEN = 10  # times the images of the smallest class, beyond which the largest one calls for --balance


def print_header(compute: Compute, pretrained: Pretrained, data: Data, history: "History", *, lr: float) -> None:
    """What the run computes on, starts from, trains on, and will replace. lr: of the head."""
    if lr > LARGE_LR:
        warn(f"--lr {lr:g} is very large, and the accuracy will be poor; the default is {DEFAULT_LR:g}")
    print(f"device    {compute.device}, {compute.precision}")
    print(f"backbone  {pretrained.description}")
    val = f", {len(data.val):,} validation" if data.val else ""
    images = f"{len(data.train):,} images"
    if data.test:
        images = f"{len(data.train):,} training{val} and {len(data.test):,} test images"
    of_classes = f"data      {images} of {class_sizes(data)}"
    print(textwrap.fill(of_classes, WIDTH, subsequent_indent=" " * 10, break_long_words=False, break_on_hyphens=False))
    print("".join(f"{note}\n" for note in data.notes), end="")
    counts = [(count, label) for label, count in enumerate(data.train.labels.bincount().tolist()) if count]
    if max(counts)[0] > UNEVEN * min(counts)[0] and not history.balanced:
        few, many = (f"{count:,} of {printable(data.classes[label])}" for count, label in (min(counts), max(counts)))
        print(f"          {few}, {many}: --balance weighs all classes alike")
    print(f"best      epoch chosen on {data.chosen_on}", flush=True)
    if existing := describe_existing(history.checkpoint):
        print(f"replaces  {existing}", flush=True)


def class_sizes(data: Data) -> str:
    """How many classes there are, and their names with their training images: of many the smallest and largest."""
    counts = data.train.labels.bincount(minlength=len(data.classes)).tolist()
    names = [f"{shortened(name, NAME_WIDTH)} {count:,}" for name, count in zip(data.classes, counts, strict=True)]
    words = plural(len(names), "class", "classes")
    if len(names) <= SHOWN_CLASSES:
        return f"{words}: {', '.join(names)}"
    smallest, largest = (names[counts.index(count)] for count in (min(counts), max(counts)))
    return f"{words}: {', '.join(names[: SHOWN_CLASSES - 3])}, ...; smallest {smallest}, largest {largest}"


def run_metadata(flags: dict, data: Data, pretrained: Pretrained, splits: Splits, *, compute: Compute) -> dict:
    """What all checkpoints of a run hold about it."""
    renamed = {"folders": data.folders} if data.folders != data.classes else {}
    norm = compute.normalize
    unusual = {"mean": norm.mean, "std": norm.std} if str(norm) != str(NORMALIZE) else {}
    chosen = data.train_path if flags["val_split"] else data.val_path or data.test_path
    metadata = {
        "classes": data.classes,
        "grey_bits": data.grey_bits,
        "trained_lists": [path_digest(path) for path in (data.train_path, *data.split_paths[:1])],
        "chosen_list": path_digest(chosen),
        "label_names": data.corrections.labels.named,
        "corrections": dict(data.corrections.counts),
        "arch": flags["arch"],
        "size": flags["size"],
        "backbone": pretrained.description,
        "chosen_on": data.chosen_on,
        "recipe": {flag: value for flag, value in flags.items() if isinstance(value, int | float | str)},
        "device": compute.device.type,
        "precision": compute.precision,
        "date": time.strftime("%Y-%m-%d %H:%M"),
        "train_images": len(splits.train.features.rows),
        "test_images": len(splits.test.dataset),
    }
    return renamed | unusual | metadata


def print_result(history: "History", data: Data, pretrained: Pretrained, start_time: float) -> None:
    """Where the checkpoint is, and what it scored."""
    warn(*pretrained.warnings)
    seconds = time.perf_counter() - start_time
    print(f"saved     {printable(history.checkpoint)} and {printable(history.path)} in {seconds:.1f} s")
    print(
        f"best      {history.val_name} {history.describe(history.best)}, epoch {history.best_epoch} ({data.chosen_on})"
    )


def print_next(data: Data, checkpoint: Path, audited: bool) -> None:
    """What to run next: the command that shows what the model gets wrong."""
    labelled = ["--labelled"] if data.test_path.is_dir() else []
    words = [as_argument(data.test_path), *labelled, "--report", "report.html"]
    print(f"next      {predict_command(words, checkpoint, data.root, data.corrections.files)}")
    if not audited:
        print("          or again with --audit audit.html: wrong labels, copies, strange photos")


class History:
    """The epochs so far, and which was the best. Rank 0 alone prints and writes.

    val_name: test or val, after the images that choose the epoch; balanced: they choose it by macro recall; lrs: the
    learning rate of each epoch.
    """

    def __init__(self, checkpoint: Path, val_name: str, balanced: bool = False):
        self.checkpoint, self.path = checkpoint, history_path(checkpoint)
        self.val_name, self.balanced = val_name, balanced
        columns = ("epoch", "train_loss", "train_accuracy", f"{val_name}_loss", f"{val_name}_accuracy")
        self.rows = [(*columns, *([f"{val_name}_recall"] if balanced else []), "lr", "best")]
        self.best_epoch, self.best, self.lrs = 0, Metrics(math.inf, -math.inf, -math.inf), []

    def score(self, val: Metrics) -> float:
        """The one of an epoch's metrics that chooses the best, and that the learning rate follows."""
        return val.macro_recall if self.balanced else val.accuracy

    def is_best(self, val: Metrics) -> bool:
        """Of equal scores, which few images often have, the lower loss is the better."""
        return (self.score(val), -val.loss) > (self.score(self.best), -self.best.loss)

    def describe(self, metrics: Metrics) -> str:
        """Accuracy and, where classes are to count alike, macro recall; where images are few, with its interval."""
        words, images = f"accuracy {metrics.accuracy:.2%}", metrics.images
        if images and images < FEW_IMAGES:
            low, high = wilson_interval(round(metrics.accuracy * images), images)
            words = f"accuracy {metrics.accuracy:.0%} of {plural(images, 'photo')}"
            words += f" (95% interval {100 * low:.0f} to {high:.0%})"
        return words + (f", macro recall {metrics.macro_recall:.2%}" if self.balanced else "")

    def add(self, epoch: int, train: Metrics, val: Metrics, lr: float) -> None:
        """Print and write an epoch. Raises UserError (status 1) where the disk is full or fails."""
        best = self.is_best(val)
        if best:
            self.best_epoch, self.best = epoch, val
        shown = val[: 3 if self.balanced else 2]
        self.lrs.append(lr)
        self.rows.append((epoch, train.loss, train.accuracy, *shown, lr, int(best)))
        if not is_main_process():
            return
        if epoch == 1:
            recall = f"  {self.val_name + ' recall':>11}" if self.balanced else ""
            heads = f"{self.val_name + ' loss':>9}  {self.val_name + ' acc':>8}{recall}"
            print(f"epoch  train loss  train acc  {heads}        lr")
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerows(self.rows)
        save_atomically(self.path, text.getvalue().encode())
        figures = f"{epoch:5d}  {train.loss:10.4f}  {train.accuracy:9.2%}  {val.loss:9.4f}  {val.accuracy:8.2%}"
        figures += f"  {val.macro_recall:11.2%}  {lr:.6f}" if self.balanced else f"  {lr:.6f}"
        print(f"{figures}{'  best' if best else ''}", flush=True)
