"""Defaults measured on a real ImageNet backbone: views, sizes, groups and --val-split, on three sets of photos.

    python tests/benchmark.py real --data FOLDER [--sizes 224 288]

FOLDER holds `real_features.py`, which writes features of a list as NAME.npz (features (N, V, D), labels (N,)), and the
lists and photos of flowers and textures. Features are made there once, as features/SET_PART_SIZE.npz, by an environment
that has that script's packages. Figures are means ± spread of 3 seeds.
"""

import argparse
import contextlib
import statistics
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import train  # noqa: E402
from transfer.calibration import calibrate  # noqa: E402
from transfer.crossval import (  # noqa: E402
    assign_folds,
    class_in_other_folds,
    cross_val_logits,
    group_split,
    out_of_fold_logits,
)
from transfer.features import Features, Split, Splits  # noqa: E402
from transfer.flags import parse_train_args  # noqa: E402
from transfer.groups import near_duplicates  # noqa: E402
from transfer.history import History  # noqa: E402
from transfer.metrics import calibration_bins  # noqa: E402
from transfer.training import FeatureLoader, Hyperparameters  # noqa: E402

SETS = {"sample": ROOT, "flowers": None, "textures": None}  # and where their lists are; None: in FOLDER
SEEDS = range(3)
HPARAMS = Hyperparameters.from_flags(vars(parse_train_args([])))


class LastAndBest(History):
    """A history that neither prints nor writes."""

    def __init__(self):
        super().__init__(Path("none"), "test")
        self.accuracies = []

    def add(self, epoch: int, train: tuple, val: tuple, lr: float) -> None:
        if self.is_best(val):
            self.best_epoch, self.best = epoch, val
        self.rows.append((epoch, lr, None))
        self.accuracies.append(100 * val.accuracy)


class NoCheckpoint:
    def save(self, *_: object) -> None:
        pass


def load(folder: Path, name: str, part: str, size: int, views: int) -> Split:
    """Features of a list, made if they are not there."""
    path = folder / "features" / f"{name}_{part}_{size}.npz"
    if not path.exists():
        path.parent.mkdir(exist_ok=True)
        root = SETS[name] or folder
        image_list = root / (f"{part}.txt" if name == "sample" else f"{name}_{part}.txt")
        command = [sys.executable, str(folder / "real_features.py"), str(image_list), "--root", str(root)]
        subprocess.run([*command, "--size", str(size), "--out", str(path)], check=True)
    kept = np.load(path)
    features = torch.from_numpy(kept["features"][:, :views])
    return Split(None, Features([features], len(features), torch.from_numpy(kept["labels"]).long()))


def train_head(splits: Splits, seed: int) -> tuple[torch.nn.Linear, LastAndBest]:
    """A head at its last epoch, and its history."""
    features = splits.train.features
    torch.manual_seed(seed)
    head = torch.nn.Linear(features.chunks[0].shape[2], int(splits.trainval.features.labels.max()) + 1)
    criterion = train.build_criterion(splits.train, head.out_features, False)
    history, hparams = LastAndBest(), replace(HPARAMS, seed=seed)
    train.train_head(head, criterion, splits, hparams, history=history, checkpointer=NoCheckpoint())
    return head, history


def accuracy(head: torch.nn.Linear, split: Split) -> float:
    return 100 * train.evaluate(head, FeatureLoader(split.features, 1024)).accuracy


def spread(values: list[float]) -> str:
    return f"{statistics.mean(values):.1f} ± {statistics.stdev(values):.1f}"


def best_and_last(folder: Path, name: str, size: int, views: int) -> str:
    parts = [load(folder, name, part, size, views) for part in ("train", "test")]
    splits = Splits(parts[0], parts[0], parts[1], parts[1])
    histories = [train_head(splits, seed)[1] for seed in SEEDS]
    best = spread([max(history.accuracies) for history in histories])
    return f"{best} / {spread([history.accuracies[-1] for history in histories])}"


def table(title: str, heads: list[str], rows: list[tuple]) -> None:
    print(f"\n{title}\n\n| {' | '.join(heads)} |\n|{'---|' * len(heads)}")
    for row in rows:
        print(f"| {' | '.join(map(str, row))} |", flush=True)


def cross_validated(features: Tensor, labels: Tensor, groups: Tensor, seed: int) -> float:
    """Accuracy in percent of heads on images that they never saw."""
    fold = assign_folds(labels, groups, seed=seed)
    lrs, num_classes = [HPARAMS.lr] * HPARAMS.epochs, int(labels.max()) + 1
    right, known = torch.zeros(len(labels)), class_in_other_folds(labels, fold)
    for rows, logits in out_of_fold_logits(
        features, labels, fold, num_classes=num_classes, lrs=lrs, batch_size=HPARAMS.batch_size, seed=seed
    ):
        right[rows] = (logits.argmax(1) == labels[rows]).float()
    return 100 * float(right[known].double().mean())


def compare_groups(folder: Path, name: str) -> tuple:
    """What cross-validation says with groups and without, what --val-split's own images say, and the test list."""
    whole, test = (load(folder, name, part, 224, 2) for part in ("train", "test"))
    features, labels = whole.features.chunks[0], whole.features.labels
    groups, alone = near_duplicates(features, labels), torch.arange(len(labels))
    found = [[cross_validated(features, labels, each, seed) for seed in SEEDS] for each in (groups, alone)]
    own, tested = [], []
    for seed in SEEDS:
        part, val = group_split(whole, 0.2, seed, "none to spare")
        own.append(train_head(Splits(whole, part, val, test), seed)[1].accuracies[-1])
        tested.append(train_head(Splits(whole, whole, test, test), seed)[1].accuracies[-1])
    return name, *map(spread, (*found, own, tested))


def compare_val_split(folder: Path, name: str) -> tuple:
    """The split's head and the one trained again on all, on the test list; and the calibration error of the latter."""
    whole, test = (load(folder, name, part, 224, HPARAMS.views) for part in ("train", "test"))
    rows = []
    for seed in SEEDS:
        part, val = group_split(whole, 0.2, seed, "none to spare")
        _, history = train_head(Splits(whole, part, val, test), seed)
        hparams, size = replace(HPARAMS, seed=seed), whole.features.chunks[0].shape[2]
        split_head, head = (torch.nn.Linear(size, int(whole.features.labels.max()) + 1) for _ in range(2))
        with contextlib.redirect_stdout(None):
            train.retrain_head(split_head, part, hparams, history.lrs())
            train.retrain_head(head, whole, hparams, history.lrs())
        before, after = accuracy(split_head, test), accuracy(head, test)
        calibrate(head, *cross_val_logits(whole.features, history.lrs(), hparams))
        rows_test = test.features.rows
        probs = head(test.features.gather(rows_test, 0)).softmax(1).detach()
        right = probs.argmax(1) == test.features.labels[rows_test]
        rows.append((before, after, 100 * calibration_bins(probs.max(1).values, right)[-1]))
    return name, *(spread(list(column)) for column in zip(*rows, strict=True))


def main(*argv: str) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, metavar="FOLDER")
    parser.add_argument("--views", type=int, nargs="*", default=[1, 2, 4], metavar="V")
    parser.add_argument("--sizes", type=int, nargs="+", default=[224, 288], metavar="N")
    args = parser.parse_args(argv)
    for views in args.views:
        rows = [(name, *(best_and_last(args.data, name, size, views) for size in args.sizes)) for name in SETS]
        table(f"--views {views}: best / last epoch", ["set", *map(str, args.sizes)], rows)
    heads = ["set", "cross-validated", "without groups", "--val-split's own images", "test list"]
    table("Groups", heads, [compare_groups(args.data, name) for name in SETS])
    heads = ["set", "the split's head", "trained again on all", "its calibration error"]
    table("--val-split 0.2, on the test list", heads, [compare_val_split(args.data, name) for name in SETS])
