"""Name what is in images, with the best.pth that train.py saved.

    python predict.py photo.jpg
    python predict.py test.txt --report report.html

Images, folders, lists and paths on standard input go in; a line an image comes
out on stdout: its path, then the likeliest classes with their probabilities.
For lists with labels a table of what was right follows, and a report to look at.
"""

from transfer import interrupts

if __name__ == "__main__":
    interrupts.guard_imports()  # before torch's, which takes seconds

import argparse
import csv
import functools
import io
import itertools
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor, nn

from train import Views, draw_views
from transfer.backbone import PASS_BATCH, backbone_of, each_image, embed, embed_batches, embed_in_order, inference_copy
from transfer.checkpoint import load_checkpoint
from transfer.console import Help, Progress, UserError, fraction, one_line_errors, shown, whole
from transfer.device import Compute, pick_compute
from transfer.files import check_target
from transfer.folders import images_in, read_folder, relabelled
from transfer.images import SUFFIXES, as_rgb, read_image, upright
from transfer.lists import ImageList, ListsError, read_list
from transfer.piped import OwnPaths, PipedPaths
from transfer.scores import Scores, likeliest, score_table


@dataclass(frozen=True)
class Classifier:
    """A loaded checkpoint: images go through the backbone, features (N, D) through the head."""

    backbone: nn.Module
    head: nn.Linear
    classes: list[str]
    about: dict  # what train.py said of it; only `arch` and `classes` where it said nothing
    compute: Compute
    views: Sequence[int] = (0,)  # of each image, that its features are the mean of


def load(
    path: str | os.PathLike = "best.pth", device: str = "auto", workers: int | None = 0, mirror: bool = False
) -> Classifier:
    """Load train.py's best.pth, or the state dict of any of torchvision's ResNets with a head. Raises UserError.

    mirror: predict from each image and its mirror image, at twice the cost.
    """
    model, about = load_checkpoint(Path(path))
    # As it was trained, so that the accuracy is the one that training reported.
    compute = pick_compute(device, "float32" if about.get("precision") == "float32" else "auto", workers)
    backbone, views = inference_copy(backbone_of(model), compute), (0, 1) if mirror else (0,)
    return Classifier(backbone, model.fc, about["classes"], about, compute, views)


def probabilities(classifier: Classifier, features: Tensor) -> Tensor:
    """Of one image's features, (D,) or (V, D), as its backbone gives them: (C,).

    The logits of the mean of two views are the mean of their logits: the head is linear.
    """
    return classifier.head(features.cpu().float().view(-1, features.shape[-1]).mean(0)).softmax(0)


@torch.inference_mode()
def predict(classifier: Classifier, images: Sequence[str | os.PathLike | Image.Image]) -> list[list[tuple[str, float]]]:
    """For each path or PIL image, all classes as (name, probability), likeliest first.

    Raises train.ImageError where an image can't be read.
    """
    named = []
    for image in images:
        # A copy, since `upright` turns the image itself, and this one is the caller's.
        image = as_rgb(upright(image.copy())) if isinstance(image, Image.Image) else read_image(image)
        features = embed(classifier.backbone, draw_views(image, classifier.views, 0, 0), classifier.compute)
        probs = probabilities(classifier, features)
        named.append(likeliest(probs, classifier.classes, len(classifier.classes)))
    return named


@torch.inference_mode()
def predict_images(classifier: Classifier, listed: ImageList, batch_size: int) -> Iterator[tuple[int, Tensor | str]]:
    """Each image's number and its probabilities (C,), or the reason why it can't be read; in order."""
    compute = classifier.compute if len(listed) > batch_size else replace(classifier.compute, workers=0)
    dataset, views = Views(listed, classifier.views, seed=0), len(classifier.views)
    how = {"compute": compute, "batch_size": max(1, batch_size // views), "per_image": views}
    for index, features in each_image(embed_in_order(classifier.backbone, dataset, range(len(listed)), **how)):
        yield index, features if isinstance(features, str) else probabilities(classifier, features)


@torch.inference_mode()
def predict_piped(classifier: Classifier, batch_size: int) -> Iterator[tuple[bytes, Tensor | str]]:
    """The same for the paths on standard input, as soon as they come: each path and its probabilities or the reason.

    Raises UserError (status 1) where standard input can't be read as lines.
    """
    pipe, dataset = PipedPaths(batch_size), Views(OwnPaths(), classifier.views, seed=0)
    for few, workers in ((True, 0), (False, classifier.compute.workers)):  # they start once they pay, and stay
        if not few and not pipe.unanswered:
            return
        how = {"compute": replace(classifier.compute, workers=workers), "per_image": len(classifier.views)}
        batches = embed_batches(classifier.backbone, dataset, functools.partial(pipe.batches, few), **how)
        for (_, path), features in each_image(batches):
            yield path, features if isinstance(features, str) else probabilities(classifier, features)
            pipe.answered()


def find_images(arguments: Sequence[str], root: Path, labelled: bool) -> tuple[list[ImageList], bool]:
    """The images that files, folders and lists name, a part each, and whether all have labels. Raises UserError.

    labelled: folders are such of class folders.
    """
    parts, problems, all_labelled = [], [], True
    for argument in arguments:
        folder = os.path.isdir(argument)
        if folder and labelled or argument.endswith(".txt") and not folder:
            # Of a list each line has a row, also that of a missing image.
            listed, wrong = read_folder(Path(argument)) if folder else read_list(Path(argument), root, False)
            problems += wrong
            parts.append(listed)
            continue
        all_labelled, found = False, [os.fsencode(argument)]
        if folder:
            found, *_ = images_in(os.fsencode(argument))
            if not found:
                problems.append(f"{shown(argument)}: no image in this folder; their names end in {', '.join(SUFFIXES)}")
        parts.append(ImageList(argument, found, [0] * len(found), range(len(found))))
    if problems:
        raise ListsError(problems)
    return parts, all_labelled


def joined(parts: Sequence[ImageList], classes: Sequence[str], model: Path) -> ImageList:
    """All parts as one, class folders with the model's labels. Raises UserError where it lacks a class."""
    if problems := [problem for part in parts if part.names for problem in relabelled(part, classes)]:
        raise UserError(
            *problems, f"{shown(model)} was trained on other classes; rename the folders as those are named"
        )
    if len(parts) == 1:
        return parts[0]
    paths = [path for part in parts for path in part.paths()]
    labels = [label for part in parts for label in part.labels.tolist()]
    return ImageList("", paths, labels, range(len(paths)))


# What is printed: a row an image


def row_printer(style: str, classes: Sequence[str], top_k: int, min_prob: float) -> Callable[..., None]:
    """A function that prints one image's row: its path, its true class or None, its probabilities or an error.

    text: for people, errors on stderr. csv: RFC 4180 with a header. json: an object a line. Names are exact in csv
    and json, for programs; but a terminal never gets their control characters, which JSON escapes by itself.
    """
    count = min(top_k, len(classes))
    writer = csv.writer(sys.stdout)
    if style == "csv":
        if isinstance(sys.stdout, io.TextIOWrapper):
            sys.stdout.reconfigure(newline="")
        tops = [column for n in range(1, count + 1) for column in (f"class{n}", f"prob{n}")]
        writer.writerow(["path", "error", "truth", "name", *tops])
    exact = not sys.stdout.isatty()

    def print_row(path: bytes, truth: str | None, found: Tensor | str) -> None:
        error = found if isinstance(found, str) else None
        tops = [] if error else likeliest(found, classes, count)
        name = None if error else tops[0][0] if tops[0][1] >= min_prob else "unknown"
        if style == "json":
            top = [{"class": each, "prob": prob} for each, prob in tops]
            print(json.dumps({"path": os.fsdecode(path), "error": error, "truth": truth, "name": name, "top": top}))
        elif style == "csv":
            cells = [os.fsdecode(path), error, truth, name, *itertools.chain(*tops or [(None, None)] * count)]
            writer.writerow(cells if exact else [shown(cell) if isinstance(cell, str) else cell for cell in cells])
        elif error:
            print(f"error: {shown(path)}: {error}", file=sys.stderr)
        else:
            verdict = "unknown: " if name == "unknown" != tops[0][0] else ""
            print(f"{shown(path)}  {verdict}{', '.join(f'{shown(each)} {prob:.1%}' for each, prob in tops)}")

    return print_row


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        usage="%(prog)s IMAGE [IMAGE ...] [option ...]",
        description="Name what is in images; of those with labels, say how much is right.",
        epilog="example: python predict.py test.txt --report report.html",
        formatter_class=Help,
    )
    what = "images, folders, lists ending in .txt, or - for paths on standard input"
    parser.add_argument("images", nargs="+", metavar="IMAGE", help=what)
    parser.add_argument("--labelled", action="store_true", help="folders hold class folders: score them")
    parser.add_argument("--model", type=Path, default="best.pth", metavar="FILE", help="what train.py saved")
    parser.add_argument("--root", type=Path, default=".", metavar="DIR", help="where the paths in lists begin")
    output = parser.add_argument_group("output").add_argument
    output("--top-k", type=whole(1), default=3, metavar="K", help="classes named for each image")
    output("--min-prob", type=fraction, metavar="P", help="below this an image is named unknown")
    output("--format", choices=("text", "csv", "json"), default="text", metavar="NAME", help="text, csv or json")
    output("--report", type=Path, metavar="FILE", help="page of the mistakes, where there are labels")
    running = parser.add_argument_group("running").add_argument
    running("--mirror", action="store_true", help="from both sides, at twice the time")
    running("--device", default="auto", metavar="NAME", help="auto, cpu, cuda, cuda:N or mps")
    running("--batch-size", type=whole(1), metavar="N", help="images at a time (default: by device)")
    running("--workers", type=whole(0), metavar="N", help="decoding processes (default: one a core)")
    args = parser.parse_args(argv)
    if "-" in args.images and len(args.images) > 1:
        parser.error("- stands alone: other images can come on standard input too")
    return args


@one_line_errors()
def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    piped = args.images == ["-"]
    parts, labelled = ([], False) if piped else find_images(args.images, args.root, args.labelled)
    if (args.report or args.labelled) and not labelled:
        flag = "--report" if args.report else "--labelled"
        fix = "give lists of lines with path and label, ending in .txt, or folders of class folders and --labelled"
        raise UserError(f"{flag}: needs labels; {fix}")
    if args.report:
        from transfer.report import save_report  # its drawing is no business of a plain prediction

        history = f"{os.path.splitext(args.model)[0]}.csv"
        read = [*args.images, args.model, history, *(path for part in parts for path in part.paths())]
        check_target("--report", [args.report], read)
    classifier = load(args.model, args.device, args.workers, args.mirror)
    classes = classifier.classes
    listed = None if piped else joined(parts, classes, args.model)
    if labelled and int(listed.labels.max()) >= len(classes):
        row = int(listed.labels.argmax())
        both = f"label {listed.labels[row]}, but {shown(args.model)} knows {len(classes)} classes, from 0"
        raise UserError(f"{listed.where(row)}: {both}; use the lists it was trained with")

    print_row = row_printer(args.format, classes, args.top_k, args.min_prob or 0)
    batch_size = args.batch_size or PASS_BATCH[classifier.compute.device.type]
    scores, scored, unread = Scores(len(classes)), [], 0
    progress = None if piped or sys.stdout.isatty() else Progress("predicted", len(listed))
    answers = predict_piped(classifier, batch_size) if piped else predict_images(classifier, listed, batch_size)
    for row, found in answers:
        path, label = (row, None) if piped else (listed.path(row), int(listed.labels[row]))
        print_row(path, classes[label] if labelled else None, found)
        sys.stdout.flush()  # somebody may wait for it
        if isinstance(found, str):
            unread += 1
        elif labelled:
            scores.add(label, found)
            if args.report:
                scored.append((path, label, found))
        if progress:
            progress.add(1)
    if scores.count:
        table = sys.stdout if args.format == "text" else sys.stderr  # rows alone in what programs read
        print(f"\n{score_table(scores, classes)}", file=table)
    if scored:
        found = {"about": classifier.about, "scores": scores, "classes": classes, "images": scored}
        save_report(args.report, **found, model=args.model, list_name=", ".join(map(shown, args.images)))
        print(f"\nreport saved in {shown(args.report)}", file=table)
    if unread:
        sys.exit(1)


if __name__ == "__main__":
    main()
