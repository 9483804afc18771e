"""Train an image classifier from text lists: a frozen ResNet-18 with a new head.

    python train.py --epochs 20

Reads train.txt and test.txt, one image a line: its path, white space, its label.
Writes best.pth whenever the test accuracy beats the best so far (a plain
torchvision ResNet-18 state dict), and best.csv, one row an epoch.

What a frozen backbone says of an image never changes. So one pass decodes each
image once, turns it into a few views and keeps their 512 features; every epoch
then trains the head on those, in milliseconds. `predict.py` uses the result.
This file is the recipe; what it stands on lies in transfer/, a file a subject.
"""

from transfer import interrupts

if __name__ == "__main__":
    interrupts.guard_imports()  # before torch's, which takes seconds

import argparse
import csv
import functools
import io
import itertools
import math
import shlex
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch import distributed as dist
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import Dataset
from torchvision import transforms as T
from torchvision.models import resnet18

from transfer import finetune
from transfer.backbone import backbone_of, inference_copy
from transfer.checkpoint import find_weights, load_checkpoint, replaced_by, save_checkpoint
from transfer.console import Help, UserError, fraction, one_line_errors, positive, shown, warn, whole
from transfer.device import Compute, pick_device, pick_precision
from transfer.distributed import cores_of_rank, join_ranks, my_rank
from transfer.features import Features, extract_features, warn_of_overlap
from transfer.files import check_outputs, keep_previous, outputs_of, prepare_output, previous_of, save_atomically
from transfer.images import ImageError, read_image
from transfer.lists import ImageList, class_names, read_lists, split_validation

# Views. The evaluation view is the only one in evaluation and prediction, and view 0 in training.

EVALUATION_VIEW = T.Resize((224, 224))
RESIZE_TRAINING = T.Resize((300, 300))
TRAINING_VIEW = T.Compose(  # of an image through RESIZE_TRAINING, which all training views share
    [
        T.RandomRotation(45),
        T.CenterCrop(224),
        T.RandomHorizontalFlip(0.5),
        T.RandomVerticalFlip(0.5),
        T.ColorJitter(brightness=0.4, contrast=0.4, saturation=0.4, hue=0.1),
    ]
)


def draw_views(image: Image.Image, views: Sequence[int], seed: int, index: int) -> Tensor:
    """The views of one image, uint8 (V, 224, 224, 3). View 0 is the evaluation view, others are random.

    A random view depends on (seed, index, view) alone: not on workers, batches or order.
    """
    drawn, resized = [], None
    for view in views:
        if view == 0:
            drawn.append(EVALUATION_VIEW(image))
            continue
        resized = resized or RESIZE_TRAINING(image)
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(int(np.random.SeedSequence((seed, index, view)).generate_state(1)[0]))
            drawn.append(TRAINING_VIEW(resized))
    return torch.from_numpy(np.stack([np.asarray(view) for view in drawn]))


class Views(Dataset):
    """Image i of a list as (i, its views), or as (i, the reason) where it can't be read.

    by_turns: one view of each image, the next of them with each next image.
    """

    def __init__(self, listed: ImageList, views: Sequence[int], seed: int, by_turns: bool = False):
        self.listed, self.views, self.seed, self.by_turns = listed, views, seed, by_turns

    def __len__(self) -> int:
        return len(self.listed)

    def __getitem__(self, index: int) -> tuple[int, Tensor | str]:
        views = [self.views[index % len(self.views)]] if self.by_turns else self.views
        try:
            return index, draw_views(read_image(self.listed.path(index)), views, self.seed, index)
        except ImageError as error:
            return index, str(error)

    def drawn(self, views: Sequence[int], by_turns: bool) -> "Views":
        """Other views of the same images."""
        return Views(self.listed, views, self.seed, by_turns)

    def recipe(self) -> list[str]:
        """What the views depend on, in words: part of the name under which their features are kept."""
        return [str(EVALUATION_VIEW), str(RESIZE_TRAINING), str(TRAINING_VIEW)]


# Model


def build_model(classes: int, state: dict[str, Tensor] | None, seed: int) -> nn.Module:
    """A frozen ResNet-18 in inference mode with a new head for so many classes.

    Frozen means that no buffer moves either: in training mode BatchNorm's running statistics
    would drift towards the new listed, and nothing computed once would stay true.
    """
    torch.manual_seed(seed)
    model = resnet18()
    if state is not None:
        model.load_state_dict(state, strict=False)  # what fits and what doesn't was settled by `check_resnet18`
    for parameter in model.parameters():
        parameter.requires_grad = False
    torch.manual_seed(seed)  # the same head, whatever the backbone's origin
    model.fc = nn.Linear(model.fc.in_features, classes)
    return model.eval().to(memory_format=torch.channels_last)


# Training


def batches_of(features: Features, order: Tensor, view: int, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """(features, labels) of one view, batch by batch, in the given order of rows."""
    for rows in order.split(batch_size):
        yield features.take(rows, view), features.labels[rows]


def mean_over(model: nn.Module, total_loss: float, right: int, count: int) -> tuple[float, float]:
    """Loss and accuracy over the samples of all ranks that train the model."""
    totals = torch.tensor([total_loss, right, count], dtype=torch.float64)
    if isinstance(model, DistributedDataParallel):
        dist.all_reduce(totals)
    return (totals[0] / totals[2]).item(), (totals[1] / totals[2]).item()


def train_one_epoch(
    model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]], optimizer: torch.optim.Optimizer, epoch: int
) -> tuple[float, float]:
    """Mean loss and accuracy over the epoch's samples, as they were trained on.

    Raises UserError (status 1) where the loss is not finite.
    """
    total_loss, right, count = 0.0, 0, 0
    for step, (inputs, labels) in enumerate(batches, 1):
        logits = model(inputs)
        loss = F.cross_entropy(logits, labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        mean_loss = loss.item()
        if not math.isfinite(mean_loss):
            raise UserError(f"the loss is {mean_loss} in epoch {epoch}, step {step}; try a smaller --lr", status=1)
        total_loss += mean_loss * len(labels)  # the last batch may be smaller
        right += (logits.argmax(1) == labels).sum().item()
        count += len(labels)
    return mean_over(model, total_loss, right, count)


@torch.inference_mode()
def evaluate(model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]]) -> tuple[float, float]:
    """Mean loss and accuracy over all samples."""
    # Not through DistributedDataParallel: a rank may have nothing to evaluate, and would miss from its forward pass.
    network = model.module if isinstance(model, DistributedDataParallel) else model
    total_loss, right, count = 0.0, 0, 0
    for inputs, labels in batches:
        logits = network(inputs)
        total_loss += F.cross_entropy(logits, labels, reduction="sum").item()
        right += (logits.argmax(1) == labels).sum().item()
        count += len(labels)
    return mean_over(model, total_loss, right, count)


def train_epochs(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    epochs: range,
    train_batches: Callable[[int], Iterable[tuple[Tensor, Tensor]]],
    val_batches: Callable[[], Iterable[tuple[Tensor, Tensor]]],
    history: "History",
) -> None:
    """Train, evaluate, lower the rate where the accuracy has stalled, keep the best: the recipe's loop."""
    plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, mode="max", patience=3, factor=0.5)
    for epoch in epochs:
        lr = optimizer.param_groups[0]["lr"]
        trained = train_one_epoch(model, train_batches(epoch), optimizer, epoch)
        val_loss, val_accuracy = evaluate(model, val_batches())
        if not math.isfinite(val_loss):
            raise UserError(f"the evaluation loss is {val_loss} in epoch {epoch}; try a smaller --lr", status=1)
        plateau.step(val_accuracy)
        history.add(epoch, trained, (val_loss, val_accuracy), lr)


def train_head(
    head: nn.Linear,
    train: Features,
    val: Features,
    *,
    epochs: int,
    lr: float,
    batch_size: int,
    seed: int,
    history: "History",
) -> None:
    """Train the head on kept features: epoch t on view t mod V of every image, t from 0."""
    optimizer = torch.optim.Adam(head.parameters(), lr=lr)
    shuffle = torch.Generator().manual_seed(seed)
    views = train.chunks[0].shape[1]

    def train_batches(epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        order = train.rows[torch.randperm(len(train.rows), generator=shuffle)]
        return batches_of(train, order, (epoch - 1) % views, batch_size)

    val_batches = functools.partial(batches_of, val, val.rows, 0, batch_size)
    train_epochs(head, optimizer, range(1, epochs + 1), train_batches, val_batches, history)


class History:
    """The epochs' figures: a line each on stdout, a row each in the CSV file; the best one is saved. Rank 0 alone
    prints and writes.

    chooser: test or val, after the list that chooses the epoch.
    """

    def __init__(self, out: Path, save: Callable[[dict], None], about: dict, chooser: str, began: float):
        self.out, self.path, self.save, self.about, self.began = out, out.with_suffix(".csv"), save, about, began
        columns = ("epoch", "train_loss", "train_accuracy", f"{chooser}_loss", f"{chooser}_accuracy", "lr", "best")
        self.rows, self.chooser = [columns], chooser
        self.best_epoch, self.best_accuracy = 0, -math.inf
        print(f"epoch  train loss  train acc  {chooser + ' loss':>9}  {chooser + ' acc':>8}        lr")

    def add(self, epoch: int, trained: tuple[float, float], val: tuple[float, float], lr: float) -> None:
        best = val[1] > self.best_accuracy
        if best:
            self.best_epoch, self.best_accuracy = epoch, val[1]
        if my_rank():
            return
        if len(self.rows) == 1:  # the first epoch, which is the best so far
            keep_previous(self.out)
            keep_previous(self.path)
        if best:
            seconds = round(time.perf_counter() - self.began, 3)
            self.save({**self.about, "epoch": epoch, "accuracy": val[1], "seconds": seconds})
        self.rows.append((epoch, *trained, *val, lr, int(best)))
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerows(self.rows)
        save_atomically(self.path, text.getvalue().encode())
        figures = f"{epoch:5d}  {trained[0]:10.4f}  {trained[1]:9.2%}  {val[0]:9.4f}  {val[1]:8.2%}  {lr:.6f}"
        print(f"{figures}{'  best' if best else ''}", flush=True)


def score_test(out: Path, test: ImageList, features: Features | None, compute: Compute) -> float:
    """The saved model's accuracy on the test list, from features where its backbone is still the frozen one."""
    model, _ = load_checkpoint(out)
    if features is None:
        backbone = inference_copy(backbone_of(model), compute)
        features = extract_features(backbone, Views(test, [0], seed=0), compute=compute, alone=True)
    return evaluate(model.fc, batches_of(features, features.rows, 0, 1024))[1]


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Train a classifier from lists of images: a frozen ResNet-18 with a new head.",
        epilog="example: python train.py --epochs 20 && python predict.py photo.jpg",
        formatter_class=Help,
    )
    add = parser.add_argument_group("data").add_argument
    add("--train", type=Path, default="train.txt", metavar="LIST", help="training images: a path and a label a line")
    add("--test", type=Path, default="test.txt", metavar="LIST", help="test images, likewise")
    add("--root", type=Path, default=".", metavar="DIR", help="folder that the lists' paths are relative to")
    add("--classes", type=Path, metavar="FILE", help="class names, one a line (default: the folders' names)")
    add("--val-split", type=fraction, metavar="SHARE", help="choose the epoch on this share of the training list")
    add("--cache", type=Path, metavar="DIR", help="keep features there and reuse them: 2 KB an image and view")
    add("--workers", type=whole(0), metavar="N", help="decoding processes (default: one a core)")
    add = parser.add_argument_group("model").add_argument
    add("--weights", metavar="NAME", help="imagenet (default), none (random), or a ResNet-18 FILE")
    add("--device", default="auto", metavar="NAME", help="cpu, cuda, cuda:N or mps; auto takes the fastest")
    add("--precision", choices=("auto", "float32", "bfloat16"), default="auto", help="of the backbone's arithmetic")
    stages = tuple(finetune.UNFROZEN_FROM)
    add("--unfreeze", choices=stages, default="layer4", help="first stage that fine-tuning trains")
    add = parser.add_argument_group("optimisation").add_argument
    add("--epochs", type=whole(1), default=20, metavar="N", help="epochs of the head")
    add("--finetune-epochs", type=whole(0), default=0, metavar="N", help="then epochs of the last stages and head")
    add("--batch-size", type=whole(1), default=64, metavar="N", help="images a training step")
    add("--lr", type=positive, default=0.005, metavar="RATE", help="Adam's learning rate for the head")
    add("--finetune-lr", type=positive, default=1e-4, metavar="RATE", help="Adam's learning rate for the stages")
    add("--views", type=whole(1), default=4, metavar="V", help="kept of each training image, all but one random")
    add("--seed", type=whole(0), default=0, metavar="N", help="of views, head and shuffling")
    add("--view-seed", type=whole(0), metavar="N", help="of views and split alone (default: --seed)")
    add = parser.add_argument_group("output").add_argument
    add("--out", type=Path, default="best.pth", metavar="FILE", help="checkpoint; a .csv is put beside it")
    return parser.parse_args(argv)


def report_command(test: Path, model: Path, root: Path) -> str:
    """What to paste into a shell in this folder to see what the model gets wrong."""
    script = Path(__file__).with_name("predict.py")
    command = ["python", str(script.relative_to(Path.cwd())) if script.is_relative_to(Path.cwd()) else str(script)]
    command += [str(test), "--report", "report.html"]
    command += ["--model", str(model)] if model != Path("best.pth") else []
    command += ["--root", str(root)] if root != Path() else []
    return shlex.join(command)


def describe(args: argparse.Namespace, compute: Compute, origin: str, names: list[str], chosen_on: str) -> dict:
    """What a checkpoint says of the run that made it."""
    return {
        "classes": names,
        "backbone": origin,
        "chosen_on": chosen_on,
        "recipe": {key: value for key, value in vars(args).items() if isinstance(value, int | float | str)},
        "device": compute.device.type,
        "precision": str(compute.dtype).removeprefix("torch."),
        "date": time.strftime("%Y-%m-%d %H:%M"),
    }


@one_line_errors()
def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    began = time.perf_counter()

    # Everything that can be checked is, before the first expensive step.
    device = pick_device(args.device)
    workers = cores_of_rank() if args.workers is None else args.workers
    compute = Compute(device, pick_precision(args.precision, device, training=args.finetune_epochs > 0), workers)
    train, test = read_lists(args.train, args.test, args.root)
    classes = int(train.labels.max()) + 1
    names = class_names(train, args.classes, classes)
    view_seed = args.seed if args.view_seed is None else args.view_seed
    train, val = split_validation(train, args.val_split, view_seed) if args.val_split else (train, test)
    chosen_on = f"{args.val_split:.0%} of {train.name}" if args.val_split else test.name
    prepare_output(args.out, args.cache)
    read = [path for path in (args.train, args.test, args.classes, args.weights) if path]
    check_outputs("--out", outputs_of(args.out), itertools.chain(read, train.each_path(), test.each_path()))
    join_ranks()
    weights, origin, caveats = find_weights(args.weights)  # one rank a machine downloads them
    for caveat in caveats:
        warn(caveat)
    print(f"device    {device}, {str(compute.dtype).removeprefix('torch.')}")
    print(f"backbone  ResNet-18, {origin}")
    print(f"data      {len(train):,} training and {len(test):,} test images of {classes} classes")
    print(f"best      epoch chosen on {chosen_on}", flush=True)
    if old := replaced_by(args.out):
        print(f"replaces  {old}; kept as {shown(previous_of(args.out))}", flush=True)

    # One pass: the features of every view. A cache keeps all views, whatever the epochs of this run.
    model = build_model(classes, weights, args.seed)
    backbone = inference_copy(backbone_of(model), compute)
    extract = functools.partial(extract_features, backbone, compute=compute, cache=args.cache)
    views = range(args.views if args.cache else min(args.views, args.epochs))
    # The lists in which no image may be unreadable come first, so that one does not end the run after the longest.
    test_features = extract(Views(test, [0], view_seed))
    val_features = extract(Views(val, [0], view_seed)) if args.val_split else test_features
    features = extract(Views(train, views, view_seed), tolerated=max(1, len(train) // 100))

    about = describe(args, compute, origin, names, chosen_on)
    about |= {"train_images": len(features.rows), "test_images": len(test)}
    save = functools.partial(save_checkpoint, args.out, model)
    history = History(args.out, save, about, chooser="val" if args.val_split else "test", began=began)
    common = {"batch_size": args.batch_size, "seed": args.seed}
    if my_rank() == 0:
        warn_of_overlap(train, test, features, test_features)
        # On the CPU: the head is so small that a device's launch times would cost more.
        train_head(model.fc, features, val_features, epochs=args.epochs, lr=args.lr, history=history, **common)
    if args.finetune_epochs:
        epochs = range(args.epochs + 1, args.epochs + args.finetune_epochs + 1)
        fresh, whole_val = Views(train, range(args.views), view_seed), Views(val, [0], view_seed)
        how = {"stage": args.unfreeze, "epochs": epochs, "rates": (args.finetune_lr, args.lr / 10), "compute": compute}
        network, optimizer, *batches = finetune.prepare(
            model, args.out, fresh, features.rows, whole_val, **how, **common
        )
        train_epochs(network, optimizer, epochs, *batches, history)
    if my_rank() == 0:
        for caveat in caveats:
            warn(caveat)
        print(f"saved     {shown(args.out)} and {shown(history.path)} in {time.perf_counter() - began:.1f} s")
        best = f"{history.best_accuracy:.2%}, epoch {history.best_epoch}"
        print(f"best      {history.chooser} accuracy {best} ({chosen_on})")
        if args.val_split:
            known = test_features if history.best_epoch <= args.epochs else None
            print(f"test      accuracy {score_test(args.out, test, known, compute):.2%}, scored once")
        print(f"next      {report_command(args.test, args.out, args.root)}")
    if dist.is_initialized():
        dist.destroy_process_group()  # left to the interpreter's end, its threads may abort the process


if __name__ == "__main__":
    main()
