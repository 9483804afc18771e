"""Name what is in images, with the best.pth that train.py saved.

    python predict.py photo.jpg
    python predict.py test.txt --report report.html

Reads images, folders, lists and paths on standard input. Prints one line per image
on stdout: its path, then the likeliest classes with their probabilities. For lists
with labels it then prints the accuracy of each class, and can draw a report.
"""

from transfer.flags import parse_predict_args
from transfer.signals import guard_imports

if __name__ == "__main__":  # before torch's import, which takes seconds: Ctrl-C, --help and typing errors
    guard_imports()
    parse_predict_args()

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

from train import ImageDataset, draw_views
from transfer.backbone import PASS_BATCH, Backbone, embed, embed_batches, embed_dataset, inference_copy, unbatch
from transfer.checkpoint import load_checkpoint
from transfer.console import Progress, UserError, one_line_errors, printable
from transfer.device import Compute, pick_compute
from transfer.files import check_outputs, history_path, page_outputs
from transfer.folders import find_images, read_folder, remap_labels
from transfer.images import SUFFIXES, as_rgb, read_image, upright
from transfer.lists import ImageList, ListsError, read_list
from transfer.metrics import ClassificationScores, classification_report, likeliest
from transfer.pages.report import save_report
from transfer.stdin import PathRows, StdinPaths


@dataclass(frozen=True)
class Classifier:
    """A loaded checkpoint: images go through the backbone, features (N, D) through the head."""

    backbone: nn.Module
    head: nn.Linear
    classes: list[str]
    metadata: dict  # what train.py saved with it; of other files only `arch` and `classes`
    compute: Compute
    views: Sequence[int] = (0,)  # of each image, that its features are the mean of


def load(
    path: str | os.PathLike = "best.pth", device: str = "auto", workers: int | None = 0, mirror: bool = False
) -> Classifier:
    """Load train.py's best.pth, or the state dict of any of torchvision's ResNets with a head. Raises UserError.

    mirror: predict from each image and its mirror image, at twice the cost.
    """
    model, metadata = load_checkpoint(Path(path))
    # As it was trained, so that the accuracy is the one that training reported.
    compute = pick_compute(device, "float32" if metadata.get("precision") == "float32" else "auto", workers)
    backbone, views = inference_copy(Backbone(model), compute), (0, 1) if mirror else (0,)
    return Classifier(backbone, model.fc, metadata["classes"], metadata, compute, views)


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
def predict_images(
    classifier: Classifier, image_list: ImageList, batch_size: int
) -> Iterator[tuple[int, Tensor | str]]:
    """Each image's number and its probabilities (C,), or the reason why it can't be read; in order."""
    compute = classifier.compute if len(image_list) > batch_size else replace(classifier.compute, workers=0)
    dataset, views = ImageDataset(image_list, classifier.views, seed=0), len(classifier.views)
    batches = embed_dataset(
        classifier.backbone,
        dataset,
        range(len(image_list)),
        compute=compute,
        batch_size=max(1, batch_size // views),
        per_image=views,
    )
    for row, features in unbatch(batches):
        yield row, features if isinstance(features, str) else probabilities(classifier, features)


@torch.inference_mode()
def predict_stdin(classifier: Classifier, batch_size: int) -> Iterator[tuple[bytes, Tensor | str]]:
    """The same for the paths on standard input, as soon as they come: each path and its probabilities or the reason.

    Raises UserError (status 1) where standard input can't be read as lines.
    """
    paths, dataset = StdinPaths(batch_size), ImageDataset(PathRows(), classifier.views, seed=0)
    for few, workers in ((True, 0), (False, classifier.compute.workers)):  # they start once they pay, and stay
        if not few and not paths.pending:
            return
        compute, receive = replace(classifier.compute, workers=workers), functools.partial(paths.batches, few)
        batches = embed_batches(classifier.backbone, dataset, receive, compute=compute, per_image=len(classifier.views))
        for (_, path), features in unbatch(batches):
            yield path, features if isinstance(features, str) else probabilities(classifier, features)
            paths.mark_answered()


# What is to be predicted


def read_inputs(arguments: Sequence[str], root: Path, labelled: bool) -> tuple[list[ImageList], bool]:
    """The images that files, folders and lists name, a list each, and whether all have labels. Raises UserError.

    labelled: folders hold class folders.
    """
    image_lists, problems, all_labelled = [], [], True
    for argument in arguments:
        is_folder = os.path.isdir(argument)
        if is_folder and labelled or argument.endswith(".txt") and not is_folder:
            # Of a list each line has a row, also that of a missing image.
            image_list, found = read_folder(Path(argument)) if is_folder else read_list(Path(argument), root, False)
            problems += found
        else:
            all_labelled = False
            paths = find_images(os.fsencode(argument))[0] if is_folder else [os.fsencode(argument)]
            if not paths:
                endings = ", ".join(SUFFIXES)
                problems.append(f"{printable(argument)}: no image in this folder; their names end in {endings}")
            image_list = ImageList(argument, paths, [0] * len(paths), range(len(paths)))
        image_lists.append(image_list)
    if problems:
        raise ListsError(problems)
    return image_lists, all_labelled


def join_lists(image_lists: Sequence[ImageList], classes: Sequence[str], model: Path) -> ImageList:
    """All lists as one, class folders with the model's labels. Raises UserError where it lacks a class."""
    folders = [image_list for image_list in image_lists if image_list.classes]
    if problems := [problem for folder in folders for problem in remap_labels(folder, classes)]:
        raise UserError(
            *problems, f"{printable(model)} was trained on other classes; rename the folders as those are named"
        )
    if len(image_lists) == 1:
        return image_lists[0]
    paths = [path for image_list in image_lists for path in image_list.paths()]
    labels = [label for image_list in image_lists for label in image_list.labels.tolist()]
    return ImageList("", paths, labels, range(len(paths)))


def check_labels(image_list: ImageList, classes: Sequence[str], model: Path) -> None:
    """Raises UserError where a label is none of the model's classes."""
    if int(image_list.labels.max()) >= len(classes):
        row = int(image_list.labels.argmax())
        both = f"label {image_list.labels[row]}, but {printable(model)} knows {len(classes)} classes, from 0"
        raise UserError(f"{image_list.where(row)}: {both}; use the lists it was trained with")


def check_flags(report: Path | None, labelled: bool, *, inputs_labelled: bool) -> None:
    """Raises UserError where what --report or --labelled asks for needs labels, and there are none."""
    if (report or labelled) and not inputs_labelled:
        flag = "--report" if report else "--labelled"
        fix = "give lists of lines with path and label, ending in .txt, or folders of class folders and --labelled"
        raise UserError(f"{flag}: needs labels; {fix}")


# What is printed: a row per image


def row_printer(style: str, classes: Sequence[str], top_k: int, min_prob: float) -> Callable[..., None]:
    """A function that prints one image's row: its path, its true class or None, its probabilities or an error.

    text: for people, errors on stderr. csv: RFC 4180 with a header. json: one object per line. Names are exact in csv
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
            writer.writerow(cells if exact else [printable(cell) if isinstance(cell, str) else cell for cell in cells])
        elif error:
            print(f"error: {printable(path)}: {error}", file=sys.stderr)
        else:
            verdict = "unknown: " if name == "unknown" != tops[0][0] else ""
            print(f"{printable(path)}  {verdict}{', '.join(f'{printable(each)} {prob:.1%}' for each, prob in tops)}")

    return print_row


@one_line_errors()
def main(argv: Sequence[str] | None = None) -> None:
    args = parse_predict_args(argv)
    from_stdin = args.images == ["-"]

    # Everything that can be checked is, before the model is loaded.
    image_lists, labelled = ([], False) if from_stdin else read_inputs(args.images, args.root, args.labelled)
    check_flags(args.report, args.labelled, inputs_labelled=labelled)
    if args.report:
        images = (path for image_list in image_lists for path in image_list.each_path())
        check_outputs(
            page_outputs("--report", args.report, table=False),
            [*args.images, args.model, history_path(args.model), *images],
        )
    classifier = load(args.model, args.device, args.workers, args.mirror)
    classes = classifier.classes
    image_list = None if from_stdin else join_lists(image_lists, classes, args.model)
    if labelled:
        check_labels(image_list, classes, args.model)

    # A row is printed for each image as soon as it is there.
    print_row = row_printer(args.format, classes, args.top_k, args.min_prob or 0)
    batch_size = args.batch_size or PASS_BATCH[classifier.compute.device.type]
    scores, scored, unreadable = ClassificationScores(len(classes)), [], 0
    progress = None if from_stdin or sys.stdout.isatty() else Progress("predicted", len(image_list))
    rows = predict_stdin(classifier, batch_size) if from_stdin else predict_images(classifier, image_list, batch_size)
    for row, probs in rows:
        path, label = (row, None) if from_stdin else (image_list.path(row), int(image_list.labels[row]))
        print_row(path, classes[label] if labelled else None, probs)
        sys.stdout.flush()  # somebody may wait for it
        if isinstance(probs, str):
            unreadable += 1
        elif labelled:
            scores.update(label, probs)
            if args.report:
                scored.append((path, label, probs))
        if progress:
            progress.add(1)

    # Where labels are known, the table and the report follow.
    stream = sys.stdout if args.format == "text" else sys.stderr  # rows alone in what programs read
    if scores.count:
        print(f"\n{classification_report(scores, classes)}", file=stream)
    if scored:
        names = ", ".join(map(printable, args.images))
        save_report(args.report, classifier.metadata, scores, scored, model=args.model, list_name=names)
        print(f"\nreport saved in {printable(args.report)}", file=stream)
    if unreadable:
        sys.exit(1)


if __name__ == "__main__":
    main()
