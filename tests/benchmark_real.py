"""Defaults measured on two backbones: views, sizes, groups, --val-split and calibration, on photos of three kinds.

    python tests/benchmark.py real --data FOLDER [--views 2 4] [--sizes 224 288] [--only sizes groups val-split finetune]

The backbones are a real ImageNet one and the bundled one. FOLDER holds `real_features.py`, which writes the former's
features of a list as NAME.npz (features (N, V, D), labels (N,)), and the lists and photos of flowers and textures.
Features are made there once, in features/, the real ones by an environment that has that script's packages. Figures are
means ± spread of 3 seeds, for --val-split's own images of 10 splits. `swapped` is the sample trained on its test list
and tested on its training list.
"""

import argparse
import contextlib
import csv
import functools
import re
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from benchmark import WEIGHTS as BUNDLED
from benchmark import run
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import train  # noqa: E402
from transfer.backbone import backbone_of, inference_copy  # noqa: E402
from transfer.calibration import calibrate, collect_logits  # noqa: E402
from transfer.checkpoint import load_backbone  # noqa: E402
from transfer.crossval import assign_folds, class_in_other_folds, cross_val_logits, group_split, train_fold_heads  # noqa: E402
from transfer.device import pick_compute  # noqa: E402
from transfer.extraction import extract_features  # noqa: E402
from transfer.features import Features, Split, Splits  # noqa: E402
from transfer.groups import near_duplicates  # noqa: E402
from transfer.history import History  # noqa: E402
from transfer.inputs.lists import read_list  # noqa: E402
from transfer.metrics import calibration_bins  # noqa: E402
from transfer.system.flags import parse_train_args  # noqa: E402
from transfer.training import FeatureLoader, Hyperparameters  # noqa: E402

SEEDS = range(3)
SPLITS = range(10)  # of --val-split, whose own images are few, so that a single split says little
HPARAMS = Hyperparameters.from_flags(vars(parse_train_args([])))
SETS = ("sample", "swapped", "flowers", "textures")


class Source(NamedTuple):
    """A set of photos as a backbone sees it."""

    folder: Path
    backbone: str  # real or bundled
    name: str

    @property
    def root(self) -> Path:
        """Where its lists lie, and their paths begin."""
        return ROOT if self.name == "sample" else self.folder

    def list_path(self, part: str) -> Path:
        return self.root / (f"{part}.txt" if self.name == "sample" else f"{self.name}_{part}.txt")

    def load(self, part: str, size: int = HPARAMS.size, views: int = HPARAMS.views) -> Split:
        """Features of its train or test list: those kept of as many views or more, else made and kept."""
        if self.name == "swapped":
            return self._replace(name="sample").load({"train": "test", "test": "train"}[part], size, views)
        root, path, name = self.root, self.list_path(part), self.name
        kept = [self.folder / "features" / f"{self.backbone}_{name}_{part}_{size}_{v}.npz" for v in (views, 4)]
        found = next((each for each in kept if each.exists()), kept[0])
        if not found.exists():
            found.parent.mkdir(exist_ok=True)
            make = save_bundled_features if self.backbone == "bundled" else save_real_features
            make(path, root, found, size=size, views=views)
        arrays = np.load(found)
        features = torch.from_numpy(arrays["features"][:, :views])
        return Split(None, Features([features], len(features), torch.from_numpy(arrays["labels"]).long()))

    def __str__(self) -> str:
        return f"{self.backbone}, {self.name}"


def save_bundled_features(path: Path, root: Path, kept: Path, *, size: int, views: int) -> None:
    """By the project's own pass."""
    dataset = train.ImageDataset(read_list(path, root)[0], range(views), 0, size)
    features = extract_features(bundled_backbone(), dataset, compute=pick_compute("cpu", "auto", None))
    np.savez(kept, features=features[features.rows].numpy(), labels=features.labels[features.rows].numpy())


@functools.cache
def bundled_backbone() -> nn.Module:
    weights = load_backbone(ROOT / "food" / "resnet18-grocery.pth", "resnet18")
    return inference_copy(backbone_of(train.build_model("resnet18", 20, weights, 0)), pick_compute("cpu", "auto", None))


def save_real_features(path: Path, root: Path, kept: Path, *, size: int, views: int) -> None:
    command = [sys.executable, str(kept.parent.parent / "real_features.py"), str(path), "--root", str(root)]
    options = "--size", str(size), "--views", str(views), "--out", str(kept)
    subprocess.run([*command, *options], check=True, stdout=subprocess.DEVNULL)


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


def train_head(splits: Splits, seed: int) -> tuple[torch.nn.Linear, LastAndBest]:
    """A head at its last epoch, and its history."""
    features = splits.train.features
    torch.manual_seed(seed)
    head = torch.nn.Linear(features.chunks[0].shape[2], int(splits.trainval.features.labels.max()) + 1)
    criterion = train.build_criterion(splits.train, head.out_features, False)
    history, hparams = LastAndBest(), replace(HPARAMS, seed=seed)
    train.train_head(head, criterion, splits, hparams, history=history, checkpointer=NoCheckpoint())
    return head, history


def accuracy(head: nn.Linear, split: Split) -> float:
    return 100 * train.evaluate(head, FeatureLoader(split.features, 1024)).accuracy


def calibration_error(head: nn.Linear, split: Split) -> float:
    """In percent."""
    logits, labels = collect_logits(head, FeatureLoader(split.features, 1024))
    probs = logits.softmax(1)
    return 100 * calibration_bins(probs.max(1).values, probs.argmax(1) == labels)[-1]


def spread(values: list[float]) -> str:
    return f"{statistics.mean(values):.1f} ± {statistics.stdev(values):.1f}"


def best_and_last(source: Source, size: int, views: int) -> str:
    whole, test = source.load("train", size, views), source.load("test", size, 1)
    histories = [train_head(Splits(whole, whole, test, test), seed)[1] for seed in SEEDS]
    best = spread([max(history.accuracies) for history in histories])
    return f"{best} / {spread([history.accuracies[-1] for history in histories])}"


def table(title: str, heads: list[str], row: Callable[..., tuple], sources: list[Source]) -> None:
    print(f"\n{title}\n\n| {' | '.join(['backbone, photos', *heads])} |\n|{'---|' * (len(heads) + 1)}")
    for source in sources:
        print(f"| {' | '.join(map(str, (source, *row(source))))} |", flush=True)


def cross_validated(features: Tensor, labels: Tensor, groups: Tensor, seed: int) -> float:
    """Accuracy in percent of heads on images that they never saw."""
    fold = assign_folds(labels, groups, seed=seed)
    lrs, num_classes = [HPARAMS.lr] * HPARAMS.epochs, int(labels.max()) + 1
    heads = train_fold_heads(
        features, labels, fold, num_classes=num_classes, lrs=lrs, batch_size=HPARAMS.batch_size, seed=seed
    )
    known = class_in_other_folds(labels, fold).nonzero().flatten()
    return 100 * float((heads[known].argmax(1) == labels[known]).double().mean())


def compare_groups(source: Source) -> tuple:
    """What cross-validation says with groups and without, what --val-split's own images say, and the test list."""
    whole, test = source.load("train", views=2), source.load("test", views=1)
    features, labels = whole.features.gather(whole.features.rows, slice(2)), whole.features.labels
    groups, alone = near_duplicates(features, labels), torch.arange(len(labels))
    found = [[cross_validated(features, labels, each, seed) for seed in SEEDS] for each in (groups, alone)]
    parts = [group_split(whole, 0.2, seed, "none to spare") for seed in SPLITS]
    own = [train_head(Splits(whole, *part, test), seed)[1].accuracies[-1] for seed, part in enumerate(parts)]
    tested = [train_head(Splits(whole, whole, test, test), seed)[1].accuracies[-1] for seed in SEEDS]
    gaps = [statistics.mean(values) - statistics.mean(tested) for values in (*found, own)]
    cells = [f"{spread(values)} ({gap:+.1f})" for values, gap in zip((*found, own), gaps, strict=True)]
    return *cells, spread(tested)


def compare_val_split(source: Source) -> tuple:
    """Accuracy on the test list of the split's head, of the one trained again on all, and of one that the test list
    chose; and the calibration errors of the latter two.
    """
    whole, test = source.load("train"), source.load("test", views=1)
    rows = []
    for seed in SEEDS:
        part, val = group_split(whole, 0.2, seed, "none to spare")
        _, history = train_head(Splits(whole, part, val, test), seed)
        hparams, size = replace(HPARAMS, seed=seed), whole.features.chunks[0].shape[2]
        split_head, head = (nn.Linear(size, int(whole.features.labels.max()) + 1) for _ in range(2))
        with contextlib.redirect_stdout(None):
            train.retrain_head(split_head, part, hparams, history.lrs[: history.best_epoch])
            train.retrain_head(head, whole, hparams, history.lrs[: HPARAMS.epochs])
        before, after = accuracy(split_head, test), accuracy(head, test)
        calibrate(head, *cross_val_logits(whole.features, history.lrs[: HPARAMS.epochs], hparams))
        full, history = train_head(Splits(whole, whole, test, test), seed)
        last = accuracy(full, test)
        calibrate(full, *collect_logits(full, FeatureLoader(test.features, 1024)))
        rows.append((before, after, last, calibration_error(head, test), calibration_error(full, test)))
    return tuple(spread(list(column)) for column in zip(*rows, strict=True))


def compare_finetuning(source: Source, size: int) -> tuple:
    """Test accuracy of the head and of ten epochs of fine-tuning on top, best / last; calibration error of the best."""
    root, lists = source.root, [source.list_path(part) for part in ("train", "test")]
    head, tuned, errors = [], [], []
    with tempfile.TemporaryDirectory() as folder:
        out, page = Path(folder) / "o.pth", Path(folder) / "o.html"
        options = ["--train", lists[0], "--test", lists[1], "--root", root, "--weights", BUNDLED, "--out", out]
        options += ["--size", size, "--views", 2, "--cache", Path(folder) / "kept", "--finetune-epochs", 10]
        for seed in SEEDS:
            run(sys.executable, ROOT / "train.py", *options, "--view-seed", 0, "--seed", seed)
            with open(out.with_suffix(".csv"), newline="") as file:
                accuracies = [100 * float(row["test_accuracy"]) for row in csv.DictReader(file)]
            for found, part in ((head, accuracies[: HPARAMS.epochs]), (tuned, accuracies)):
                found.append((max(part), part[-1]))
            run(sys.executable, ROOT / "predict.py", lists[1], "--root", root, "--model", out, "--report", page)
            errors.append(float(re.search(r'id="ece">([\d.]+)%', page.read_text())[1]))
    both = [" / ".join(spread(list(values)) for values in zip(*found, strict=True)) for found in (head, tuned)]
    return *both, spread(errors)


def main(*argv: str) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, metavar="FOLDER")
    parser.add_argument("--views", type=int, nargs="*", default=[1, 2, 4], metavar="V")
    parser.add_argument("--sizes", type=int, nargs="+", default=[224, 288], metavar="N")
    parser.add_argument("--sets", choices=SETS, nargs="+", default=SETS, metavar="SET")
    tables = ("sizes", "groups", "val-split", "finetune")
    parser.add_argument("--only", choices=tables, nargs="+", default=tables, metavar="TABLE")
    args = parser.parse_args(argv)
    sources = [Source(args.data, backbone, name) for backbone in ("real", "bundled") for name in args.sets]
    for views in args.views if "sizes" in args.only else ():
        row = functools.partial(
            lambda source, views: [best_and_last(source, n, views) for n in args.sizes], views=views
        )
        table(f"--views {views}: accuracy, best / last epoch", [*map(str, args.sizes)], row, sources)
    if "groups" in args.only:
        heads = ["cross-validated", "without groups", "--val-split's own images", "test list"]
        table("Groups, two views: accuracy (and its gap to the test list's)", heads, compare_groups, sources)
    if "val-split" in args.only:
        heads = [
            "the split's head",
            "trained again",
            "the full list's",
            "calibration error, trained again",
            "full list's",
        ]
        table("--val-split 0.2, on the test list, last epoch", heads, compare_val_split, sources)
    if "finetune" in args.only:
        trainable = [source for source in sources if source.backbone == "bundled" and source.name != "swapped"]
        for size in args.sizes:
            heads = ["the head alone", "then 10 epochs of `layer4`", "calibration error"]
            row = functools.partial(compare_finetuning, size=size)
            table(f"--size {size} --views 2, fine-tuned: accuracy, best / last epoch", heads, row, trainable)
