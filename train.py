"""Train an image classifier from lists or folders: a frozen ResNet-18 with a new head.

    python train.py --epochs 20

Reads train.txt and test.txt, one image a line: its path, white space, its label;
or what --train and --test name, lists or folders of class folders.
Writes best.pth whenever the test accuracy beats the best so far (a plain
torchvision state dict), and best.csv, one row an epoch.

What a frozen backbone says of an image never changes. So one pass decodes each
image once, turns it into a few views and keeps their features; every epoch
then trains the head on those, in milliseconds. `predict.py` uses the result.
This file is the recipe; what it stands on lies in transfer/, a file a subject.
"""

from transfer import interrupts

if __name__ == "__main__":
    interrupts.guard_imports()  # before torch's, which takes seconds

import argparse
import copy
import functools
import itertools
import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.lr_scheduler import ReduceLROnPlateau
from torch.utils.data import Dataset
from torchvision import transforms as T
from torchvision.transforms.functional import hflip

from transfer import finetune
from transfer.architectures import ARCHITECTURES, checkpoint_bytes, new_network
from transfer.backbone import backbone_of, inference_copy
from transfer.calibration import ENOUGH, calibrate, logits_of
from transfer.checkpoint import about_run, keep_epoch, load_state
from transfer.console import Help, UserError, fraction, one_line_errors, paste, positive, shown, warn, whole
from transfer.device import pick_compute
from transfer.distributed import from_rank_0, join_ranks, leave_ranks, my_rank
from transfer.features import Features, extract_features, warn_of_overlap
from transfer.files import prepare_outputs
from transfer.folders import check_split, find_lists, hold_out_test, split_paths
from transfer.folds import PLANS, choose_plan, replay_logits, split_off
from transfer.history import History, print_header
from transfer.images import ImageError, read_image
from transfer.lists import ImageList
from transfer.scores import Tally, balance
from transfer.weights import find_weights

FINETUNE_FROM = 5  # epochs of the head: a later one knows its images by heart, and the stages learn less from it

# Views, by number: 0 is the evaluation view, the only one in evaluation and prediction; 1 is its mirror image; from 2
# on they are random.

EVALUATION_VIEW = T.Resize((224, 224))
RESIZE_TRAINING = T.Resize((300, 300))
TRAINING_VIEW = T.Compose(  # of an image through RESIZE_TRAINING, which all random views share
    [
        T.RandomRotation(45),
        T.CenterCrop(224),
        T.RandomHorizontalFlip(0.5),
        T.RandomVerticalFlip(0.5),
        T.ColorJitter(brightness=0.4, contrast=0.4, saturation=0.4, hue=0.1),
    ]
)


def draw_views(image: Image.Image, views: Sequence[int], seed: int, index: int) -> Tensor:
    """The views of one image, by number: uint8 (V, 224, 224, 3).

    A random view depends on (seed, index, view) alone: not on workers, batches or order.
    """
    drawn, evaluation, resized = [], None, None
    for view in views:
        if view < 2:
            evaluation = evaluation or EVALUATION_VIEW(image)
            drawn.append(hflip(evaluation) if view else evaluation)
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
        return [str(EVALUATION_VIEW), hflip.__name__, str(RESIZE_TRAINING), str(TRAINING_VIEW)]


# Model


def build_model(arch: str, classes: int, state: dict[str, Tensor] | None, seed: int) -> nn.Module:
    """A frozen ResNet in inference mode with a new head for so many classes.

    Frozen means that no buffer moves either: in training mode BatchNorm's running statistics
    would drift towards the new listed, and nothing computed once would stay true.
    """
    torch.manual_seed(seed)
    model = new_network(arch)
    if state is not None:
        model.load_state_dict(state, strict=False)  # what fits and what doesn't was settled by `check_state`
    for parameter in model.parameters():
        parameter.requires_grad = False
    torch.manual_seed(seed)  # the same head, whatever the backbone's origin
    model.fc = nn.Linear(model.fc.in_features, classes)
    return model.eval().to(memory_format=torch.channels_last)


# Training


def train_one_epoch(
    model: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    optimizer: torch.optim.Optimizer,
    epoch: int,
    weight: Tensor | None = None,
) -> tuple[float, float, float]:
    """Mean loss, accuracy and macro recall over the epoch's samples, as they were trained on.

    weight: of each class in the loss, (C,). Raises UserError (status 1) where the loss is not finite.
    """
    tally = Tally(model)
    for step, (inputs, labels) in enumerate(batches, 1):
        logits = model(inputs)
        loss = F.cross_entropy(logits, labels, weight, reduction="sum") / len(labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        mean_loss = loss.item()
        if not math.isfinite(mean_loss):
            raise UserError(f"the loss is {mean_loss} in epoch {epoch}, step {step}; try a smaller --lr", status=1)
        tally.add(mean_loss * len(labels), logits, labels)  # the last batch may be smaller
    return tally.means()


@torch.inference_mode()
def evaluate(model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]]) -> tuple[float, float, float]:
    """Mean loss, accuracy and macro recall over all samples."""
    # Not through DistributedDataParallel: a rank may have nothing to evaluate, and would miss from its forward pass.
    network, tally = finetune.inner(model), Tally(model)
    for inputs, labels in batches:
        logits = network(inputs)
        tally.add(F.cross_entropy(logits, labels, reduction="sum").item(), logits, labels)
    return tally.means()


def train_epochs(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    plateau: ReduceLROnPlateau | None,
    epochs: range,
    train_batches: Callable[[int], Iterable[tuple[Tensor, Tensor]]],
    val_batches: Callable[[], Iterable[tuple[Tensor, Tensor]]],
    history: History,
    save: Callable[[int, float, float], None],
    weight: Tensor | None = None,
) -> None:
    """Train, evaluate, lower the rate where the accuracy has stalled, save the best: the recipe's loop.

    plateau: None where the batches bring a schedule of their own.
    """
    for epoch in epochs:
        lr = optimizer.param_groups[0]["lr"]
        trained = train_one_epoch(model, train_batches(epoch), optimizer, epoch, weight)
        val = evaluate(model, val_batches())
        if not math.isfinite(val[0]):
            raise UserError(f"the evaluation loss is {val[0]} in epoch {epoch}; try a smaller --lr", status=1)
        if plateau:
            plateau.step(history.judged(val))
        if history.is_best(val) and my_rank() == 0:
            save(epoch, *val[1:])
        history.add(epoch, trained, val, lr)


def train_head(
    head: nn.Linear,
    train: Features,
    plan: Callable[[int, int], Sequence[int]],
    val_batches: Callable[[], Iterable[tuple[Tensor, Tensor]]],
    *,
    epochs: int,
    lr: float,
    batch_size: int,
    seed: int,
    history: History,
    save: Callable[[int, float, float], None],
    weight: Tensor | None = None,
) -> dict[str, Tensor]:
    """Train the head on kept features, in each epoch on the plan's views of every image.

    Returns the state that fine-tuning starts from, that of an early epoch.
    """
    optimizer = torch.optim.Adam(head.parameters(), lr=lr)
    plateau = ReduceLROnPlateau(optimizer, mode="max", patience=3, factor=0.5)
    shuffle = torch.Generator().manual_seed(seed)

    def train_batches(epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        rows, views = torch.cartesian_prod(train.rows, torch.tensor(plan(epoch, train.views))).T
        order = torch.randperm(len(rows), generator=shuffle)
        return train.batches(rows[order], views[order], batch_size)

    early, how = min(epochs, FINETUNE_FROM), (train_batches, val_batches, history, save, weight)
    train_epochs(head, optimizer, plateau, range(1, early + 1), *how)
    start = copy.deepcopy(head.state_dict())
    train_epochs(head, optimizer, plateau, range(early + 1, epochs + 1), *how)
    return start


def fine_tune(
    model: nn.Module,
    start: dict[str, Tensor],
    lists: Sequence[tuple[Views, Tensor]],
    epochs: range,
    history: History,
    save: Callable[[int, float, float], None],
    weight: Tensor | None,
    **how,
) -> tuple[nn.Module, Callable[[], Iterator[tuple[Tensor, Tensor]]]]:
    """Train the last stages with the head, from a state of it, as `finetune.prepare` has it: the network, and the
    batches it is evaluated on.
    """
    stages, optimizer, *batches = finetune.prepare(model, start, *lists, epochs=len(epochs), **how)
    weight = weight if weight is None else weight.to(how["compute"].device)
    train_epochs(stages, optimizer, None, epochs, *batches, history, save, weight)
    return finetune.inner(stages), batches[-1]


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        usage="%(prog)s [--train PATH] [--test PATH] [option ...]",
        description="Train a classifier of photos in folders or lists: a frozen ResNet with a new head.",
        epilog="example: python train.py --train photos && python predict.py photo.jpg",
        formatter_class=Help,
    )
    add = parser.add_argument_group("data").add_argument
    add("--train", type=Path, metavar="PATH", help="a list, or a folder of class folders (train.txt)")
    add("--test", type=Path, metavar="PATH", help="likewise (test.txt beside it, or a fifth held out)")
    add("--root", type=Path, default=".", metavar="DIR", help="where the paths in lists begin")
    add("--classes", type=Path, metavar="FILE", help="class names, one a line (the folders' names)")
    add("--val-split", type=fraction, metavar="SHARE", help="choose the epoch on this share of --train")
    add = parser.add_argument_group("output").add_argument
    add("--out", type=Path, default="best.pth", metavar="FILE", help="checkpoint, a .csv beside it")
    add("--audit", type=Path, metavar="FILE", help="page of wrong labels, copies, outliers; and a .csv")
    add = parser.add_argument_group("model").add_argument
    add("--arch", choices=ARCHITECTURES, default=ARCHITECTURES[0], metavar="NAME", help="resnet18, 34, 50, 101 or 152")
    add("--weights", metavar="NAME", help="imagenet (default), none, or a FILE that fits --arch")
    add = parser.add_argument_group("optimisation").add_argument
    add("--epochs", type=whole(1), default=20, metavar="N", help="epochs of the head")
    add("--finetune-epochs", type=whole(0), default=0, metavar="N", help="then of the last stages with it")
    add("--unfreeze", choices=finetune.UNFROZEN_FROM, default="layer4", metavar="STAGE", help="layer4, layer3 or all")
    add("--batch-size", type=whole(1), default=64, metavar="N", help="images a training step")
    add("--lr", type=positive, default=0.005, metavar="RATE", help="Adam's rate for the head")
    add("--finetune-lr", type=positive, default=2e-4, metavar="RATE", help="its peak for the stages")
    add("--balance", action="store_true", help="weigh classes alike, choose by macro recall")
    add("--augment", choices=("auto", *PLANS), default="auto", metavar="NAME", help="auto, mirror or recipe")
    add("--views", type=whole(1), default=4, metavar="V", help="kept of an image, all but 2 random")
    add("--seed", type=whole(0), default=0, metavar="N", help="of views, head and shuffling")
    add("--view-seed", type=whole(0), metavar="N", help="of views and splits alone (default: --seed)")
    add = parser.add_argument_group("running").add_argument
    add("--cache", type=Path, metavar="DIR", help="keep features there, 2 or 8 KB an image and view")
    add("--device", default="auto", metavar="NAME", help="auto, cpu, cuda, cuda:N or mps")
    precisions = ("auto", "float32", "bfloat16")
    add("--precision", choices=precisions, default="auto", metavar="NAME", help="auto, float32 or bfloat16")
    add("--workers", type=whole(0), metavar="N", help="decoding processes (default: one a core)")
    return parser.parse_args(argv)


@one_line_errors()
def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    began = time.perf_counter()

    # Everything that can be checked is, before the first expensive step.
    compute = pick_compute(args.device, args.precision, args.workers, training=args.finetune_epochs > 0)
    train, test, names, test_path = find_lists(args.train, args.test, args.root, args.classes)
    check_split(train, test, args.val_split)
    inputs = [path for path in (args.train or "train.txt", test_path, args.classes, args.weights) if path]
    read = lambda: itertools.chain(inputs, *(listed.each_path() for listed in (train, test) if listed))  # noqa: E731
    written = {"cache": args.cache, "audit": args.audit, "lists": [] if test else split_paths(args.out)}
    prepare_outputs(args.out, checkpoint_bytes(args.arch, len(names)), read, **written)
    join_ranks()
    weights, origin, caveats = find_weights(args.weights, args.arch)  # one rank a machine downloads them
    warn(*caveats)
    test_path, root = (test_path, args.root) if test else (split_paths(args.out)[1], Path())
    chosen_on = f"{args.val_split:.0%} of {train.name}" if args.val_split else shown(test_path)
    print_header(compute, origin, train, test, names, chosen_on, args.out, args.balance)

    # One pass. The list in which no image may be unreadable comes first, so that one does not end the run after the
    # longest.
    model = build_model(args.arch, len(names), weights, args.seed)
    how = {"width": model.fc.in_features, "compute": compute}
    extract = functools.partial(extract_features, inference_copy(backbone_of(model), compute), cache=args.cache, **how)
    view_seed = args.seed if args.view_seed is None else args.view_seed
    views = range(min(args.views, 2) if args.augment == "mirror" else args.views)
    test_features = test and extract(Views(test, [0], view_seed))
    features = extract(Views(train, views, view_seed), tolerated=max(1, len(train) // 100))
    if not test:
        train, features, test, test_features = hold_out_test(train, features, args.out, view_seed)
    elif my_rank() == 0:
        warn_of_overlap(train, test, features, test_features)
    listed, val = features, test_features
    if args.val_split:
        spare = "--val-split: each class is a single scene, none to spare; leave it out"
        features, val = split_off(features, args.val_split, view_seed, spare)
    common = {"batch_size": args.batch_size, "seed": args.seed}
    weight = balance(features.labels[features.rows], len(names)) if args.balance else None
    about = about_run(vars(args), names, origin, chosen_on, compute, len(features.rows), len(test))
    save = functools.partial(keep_epoch, args.out, model, about, began)
    history = History(args.out, "val" if args.val_split else "test", args.balance)
    early, network, val_batches = None, None, functools.partial(val.batches, val.rows, 0, args.batch_size)
    if my_rank() == 0:  # on the CPU: the head is so small that a device's launch times would cost more
        plan, why = choose_plan(features, PLANS, args.augment, epochs=args.epochs, lr=args.lr, **common)
        print(f"views     {why}", flush=True)
        head = {"epochs": args.epochs, "lr": args.lr, "history": history, "save": save, "weight": weight, **common}
        early = train_head(model.fc, features, plan, val_batches, **head)
    if args.finetune_epochs:
        sides, once = Views(train, [0, 1], view_seed), Views(train if args.val_split else test, [0], view_seed)
        lists = (sides, features.rows), (once, val.rows)
        epochs = range(args.epochs + 1, args.epochs + args.finetune_epochs + 1)
        tuning = {"stage": args.unfreeze, "rates": (args.finetune_lr, args.lr / 5), "compute": compute, **common}
        tuned = fine_tune(model, from_rank_0(early), lists, epochs, history, save, weight, **tuning)
        if history.best_epoch > args.epochs:
            network, val_batches = tuned

    if my_rank() == 0:
        model.load_state_dict(load_state(args.out)[0])
        told = [logits_of(network or model.fc.cpu(), val_batches(), ENOUGH)]
        if args.val_split and network is None:  # its images are few to fit a number on, and training has more
            told += replay_logits(features, plan, history.rates(), **common)
        temperature = calibrate(model.fc, told)
        save(history.best_epoch, *history.best, temperature=temperature)
        warn(*caveats)
        print(f"saved     {shown(args.out)} and {shown(history.path)} in {time.perf_counter() - began:.1f} s")
        print(f"best      {history.chooser} {history.said(history.best)}, epoch {history.best_epoch} ({chosen_on})")
        judged = test_features
        if network and (args.val_split or args.audit):  # whose features are others than the frozen backbone's
            backbone = inference_copy(backbone_of(model), compute)
            judged = extract_features(backbone, Views(test, [0], view_seed), alone=True, **how)
        batches = functools.partial(judged.batches, judged.rows, 0, 1024)
        if args.val_split:
            print(f"test      {history.said(evaluate(model.fc.cpu(), batches())[1:])}, scored once")
        if args.audit:
            from transfer.audit import audit_lists  # its searching and drawing are no business of a run without it
            from transfer.audit_page import save_audit

            parts = (Views(train, [0], view_seed), listed), (Views(test, [0], view_seed), test_features)
            logits, _ = logits_of(model.fc.cpu(), batches())
            found = audit_lists(*parts, logits, epochs=args.epochs, lr=args.lr, compute=compute, **common)
            print(f"audit     {save_audit(args.audit, found, names, args.out)}")
        print(f"next      {paste('predict.py', test_path, args.out, root)}")
        if not args.audit:
            print("          or again with --audit audit.html: labels that look wrong, copies, outliers")
    leave_ranks()


if __name__ == "__main__":
    main()
