"""Name what is in images, with the best.pth that train.py saved.

    python predict.py photo.jpg
    python predict.py test.txt --report report.html

Images, folders, lists and paths on standard input go in; a line an image comes
out on stdout: its path, then the likeliest classes with their probabilities.
For lists with labels a table of what was right follows, and a report to look at.
"""

import argparse
import csv
import io
import json
import math
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor, nn

from train import (
    PASS_BATCH,
    SHOWN_PROBLEMS,
    Help,
    Photos,
    Progress,
    UserError,
    Views,
    as_rgb,
    backbone_of,
    cores_of_rank,
    draw_views,
    each_image,
    embed,
    embed_in_order,
    frozen,
    load_checkpoint,
    one_line_errors,
    pick_device,
    pick_precision,
    read_list,
    read_photo,
    reason_of,
    share,
    shown,
    upright,
    whole,
)

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".mpo", ".heic")


@dataclass(frozen=True)
class Classifier:
    """A loaded checkpoint: images go through the backbone, features (N, 512) through the head."""

    backbone: nn.Module
    head: nn.Linear
    classes: list[str]
    about: dict  # what train.py said of it; only `classes` where it said nothing
    device: torch.device
    dtype: torch.dtype


def load(path: str | os.PathLike = "best.pth", device: str = "auto") -> Classifier:
    """Load train.py's best.pth, or any ResNet-18 state dict with a head. Raises UserError."""
    model, about = load_checkpoint(Path(path))
    where = pick_device(device)
    # As it was trained, so that the accuracy is the one that training reported.
    dtype = pick_precision("float32" if about.get("precision") == "float32" else "auto", where)
    return Classifier(frozen(backbone_of(model), where, dtype), model.fc, about["classes"], about, where, dtype)


@torch.inference_mode()
def predict(classifier: Classifier, images: Sequence[str | os.PathLike | Image.Image]) -> list[list[tuple[str, float]]]:
    """For each path or PIL image, all classes as (name, probability), likeliest first.

    Raises train.PhotoError where an image can't be read.
    """
    named = []
    for image in images:
        photo = as_rgb(upright(image)) if isinstance(image, Image.Image) else read_photo(image)
        features = embed(classifier.backbone, draw_views(photo, [0], 0, 0), classifier.device, classifier.dtype)
        probs = classifier.head(features.cpu().float()[0]).softmax(0)
        named.append(likeliest(probs, classifier.classes, len(classifier.classes)))
    return named


def likeliest(probs: Tensor, classes: Sequence[str], count: int) -> list[tuple[str, float]]:
    """The first so many classes of one image's probabilities (C,), likeliest first."""
    values, labels = probs.topk(min(count, len(classes)))
    return [(classes[label], value) for label, value in zip(labels.tolist(), values.tolist())]


@torch.inference_mode()
def predict_photos(
    classifier: Classifier, photos: Photos, batch_size: int, workers: int
) -> Iterator[tuple[int, Tensor | str]]:
    """Each image's number and its probabilities (C,), or the reason why it can't be read; in order."""
    batches = embed_in_order(
        classifier.backbone,
        Views(photos, [0], seed=0),
        range(len(photos)),
        device=classifier.device,
        dtype=classifier.dtype,
        batch_size=batch_size,
        workers=workers if len(photos) > batch_size else 0,
    )
    for index, features in each_image(batches):
        yield index, features if isinstance(features, str) else classifier.head(features).softmax(0)


def find_photos(arguments: Sequence[str], root: Path) -> tuple[Photos, bool]:
    """The images that files, folders and lists name, and whether all have labels. Raises UserError."""
    parts, problems, labelled = [], [], True
    for argument in arguments:
        folder = os.path.isdir(argument)
        if argument.endswith(".txt") and not folder:
            photos, wrong = read_list(Path(argument), root)
            problems += wrong
            parts.append(photos)
            continue
        labelled, found = False, [os.fsencode(argument)]
        if folder:
            found = sorted(
                os.path.join(inner, name)
                for inner, _, names in os.walk(os.fsencode(argument))
                for name in names
                if os.fsdecode(name).lower().endswith(SUFFIXES)
            )
            if not found:
                problems.append(f"{shown(argument)}: no image in this folder; their names end in {', '.join(SUFFIXES)}")
        parts.append(Photos(argument, found, [0] * len(found), range(len(found))))
    if problems:
        more = [f"{len(problems):,} problems, {SHOWN_PROBLEMS} of them shown"] if len(problems) > SHOWN_PROBLEMS else []
        raise UserError(*problems[:SHOWN_PROBLEMS], *more)
    if len(parts) == 1:
        return parts[0], labelled
    joined = [[item for part in parts for item in items(part)] for items in (Photos.paths, lambda p: p.labels.tolist())]
    return Photos("", *joined, range(len(joined[0]))), labelled


def piped_photos() -> Iterator[Photos]:
    """The paths that arrive on standard input, one a line, as soon as they do."""
    rest = b""
    while text := sys.stdin.buffer.read1():
        *lines, rest = (rest + text).split(b"\n")
        paths = [line.rstrip(b"\r") for line in lines if line.strip()]
        if paths:
            yield Photos("-", paths, [0] * len(paths), range(len(paths)))
    if rest.strip():
        yield Photos("-", [rest], [0], [0])


# What is printed: a row an image


def row_printer(style: str, classes: Sequence[str], top_k: int, min_prob: float) -> Callable[..., None]:
    """A function that prints one image's row: its path, its true class or None, its probabilities or an error.

    text: for people, errors on stderr. csv: RFC 4180 with a header. json: an object a line.
    """
    count = min(top_k, len(classes))
    writer = csv.writer(sys.stdout)
    if style == "csv":
        if isinstance(sys.stdout, io.TextIOWrapper):
            sys.stdout.reconfigure(newline="")
        tops = [column for n in range(1, count + 1) for column in (f"class{n}", f"prob{n}")]
        writer.writerow(["path", "error", "truth", "name", *tops])

    def print_row(path: bytes, truth: str | None, found: Tensor | str) -> None:
        error = found if isinstance(found, str) else None
        tops = [] if error else likeliest(found, classes, count)
        name = None if error else tops[0][0] if tops[0][1] >= min_prob else "unknown"
        if style == "json":
            top = [{"class": each, "prob": prob} for each, prob in tops]
            print(json.dumps({"path": os.fsdecode(path), "error": error, "truth": truth, "name": name, "top": top}))
        elif style == "csv":
            cells = [item for pair in tops for item in pair] or [None] * (2 * count)
            writer.writerow([os.fsdecode(path), error, truth, name, *cells])
        elif error:
            print(f"error: {shown(path)}: {error}", file=sys.stderr)
        else:
            verdict = "unknown: " if name == "unknown" != tops[0][0] else ""
            print(f"{shown(path)}  {verdict}{', '.join(f'{shown(each)} {prob:.1%}' for each, prob in tops)}")

    return print_row


# Evaluation


class Scores:
    """What is right and wrong in labels (N,) and predictions, gathered image by image.

    confusion: (C, C) counts, a row a true class, a column a predicted one.
    """

    def __init__(self, classes: int):
        self.confusion = torch.zeros(classes, classes, dtype=torch.int64)
        self.in_top3 = 0

    def add(self, label: int, probs: Tensor) -> None:
        top = probs.topk(min(3, len(probs))).indices.tolist()
        self.confusion[label, top[0]] += 1
        self.in_top3 += label in top

    @property
    def count(self) -> int:
        return int(self.confusion.sum())

    @property
    def right(self) -> int:
        return int(self.confusion.diagonal().sum())

    @property
    def accuracy(self) -> float:
        return self.right / self.count

    @property
    def accuracy_interval(self) -> tuple[float, float]:
        return wilson(self.right, self.count)

    @property
    def top3(self) -> float:
        return self.in_top3 / self.count

    @property
    def top3_interval(self) -> tuple[float, float]:
        return wilson(self.in_top3, self.count)

    @property
    def images(self) -> Tensor:
        return self.confusion.sum(1)

    # NaN, of 0 / 0, where a class has no images or is never predicted.
    @property
    def precision(self) -> Tensor:
        return self.confusion.diagonal() / self.confusion.sum(0)

    @property
    def recall(self) -> Tensor:
        return self.confusion.diagonal() / self.confusion.sum(1)

    @property
    def f1(self) -> Tensor:
        return 2 * self.confusion.diagonal() / (self.confusion.sum(0) + self.confusion.sum(1))

    def taken_for(self, label: int) -> tuple[int, int] | None:
        """The wrong class that a class is most often taken for, and how often; None where it never is."""
        wrong = self.confusion[label].clone()
        wrong[label] = 0
        return (int(wrong.argmax()), int(wrong.max())) if wrong.any() else None


def wilson(right: int, count: int) -> tuple[float, float]:
    """The 95% interval of a share (Wilson, 1927, JASA 22): it stays within 0 and 1 and holds for small counts."""
    z, part = 1.959964, right / count
    centre = part + z * z / (2 * count)
    spread = z * math.sqrt(part * (1 - part) / count + z * z / (4 * count * count))
    low, high = (max(0.0, (centre + sign * spread) / (1 + z * z / count)) for sign in (-1, 1))
    return low, min(1.0, high)


def score_table(scores: Scores, classes: Sequence[str]) -> str:
    """Accuracy, then a line a class, worst recall first, then macro averages as scikit-learn takes them."""
    lines = []
    for what, right, part, (low, high) in (
        ("accuracy", scores.right, scores.accuracy, scores.accuracy_interval),
        ("top-3", scores.in_top3, scores.top3, scores.top3_interval),
    ):
        interval = f"95% interval {low:.1%} to {high:.1%}"
        lines.append(f"{what:<8}  {part:7.2%}  {right:,} of {scores.count:,}, {interval}")
    # Of long names the table shows the beginning.
    names = [name if len(name) <= 24 else f"{name[:23]}…" for name in map(shown, classes)]
    width = max(map(len, [*names, "macro average"]))
    lines += ["", f"{'class':<{width}}  images  precision   recall       F1  most often taken for"]
    percent = lambda value: "–" if math.isnan(value) else f"{value:.1%}"  # noqa: E731
    columns = [scores.precision.tolist(), scores.recall.tolist(), scores.f1.tolist()]
    order = sorted(range(len(classes)), key=lambda c: (math.isnan(columns[1][c]), columns[1][c]))
    for c in order:
        taken = scores.taken_for(c)
        other = f"{names[taken[0]]} ({taken[1]:,})" if taken else ""
        precision, recall, f1 = (percent(column[c]) for column in columns)
        line = f"{names[c]:<{width}}  {int(scores.images[c]):6,}  {precision:>9}  {recall:>7}  {f1:>7}  {other}"
        lines.append(line.rstrip())
    present = [c for c in order if not math.isnan(columns[2][c])]
    means = [sum(0 if math.isnan(column[c]) else column[c] for c in present) / len(present) for column in columns]
    lines.append(f"{'macro average':<{width}}  {scores.count:6,}  {means[0]:9.1%}  {means[1]:7.1%}  {means[2]:7.1%}")
    return "\n".join(lines)


def read_history(model: Path) -> list[dict[str, str]]:
    """The rows of the CSV that training left beside a checkpoint; none where there is no such file."""
    try:
        with open(model.with_suffix(".csv"), newline="", encoding="utf-8") as file:
            return list(csv.DictReader(file))
    except (OSError, UnicodeDecodeError, csv.Error):
        return []


def save_report(path: Path, classifier: Classifier, scores: Scores, images: Sequence[tuple], **names: str) -> None:
    """Draw the report from (path, label, probabilities) of each image. Raises UserError (status 1)."""
    from report import write_report  # its drawing is no business of a plain prediction

    paths, labels, probs = zip(*images, strict=True)
    try:
        write_report(
            path,
            about=classifier.about,
            scores=scores,
            classes=classifier.classes,
            paths=list(paths),
            labels=torch.tensor(labels),
            probs=torch.stack(probs),
            **names,
        )
    except OSError as error:
        raise UserError(f"--report {shown(path)}: {reason_of(error)}", status=1) from None


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Name what is in images; of lists with labels, say how much is right.",
        epilog="example: python predict.py test.txt --report report.html",
        formatter_class=Help,
    )
    what = "images, folders, lists ending in .txt, or - for paths on standard input"
    parser.add_argument("images", nargs="+", metavar="IMAGE", help=what)
    parser.add_argument("--model", type=Path, default="best.pth", metavar="FILE", help="what train.py saved")
    parser.add_argument(
        "--root", type=Path, default=".", metavar="DIR", help="folder that lists' paths are relative to"
    )
    output = parser.add_argument_group("output").add_argument
    output("--top-k", type=whole(1), default=3, metavar="K", help="classes named for each image")
    output("--min-prob", type=share, metavar="P", help="below this probability an image is named unknown")
    output("--format", choices=("text", "csv", "json"), default="text", help="of the rows on stdout")
    output("--report", type=Path, metavar="FILE", help="HTML page of the mistakes on lists with labels")
    running = parser.add_argument_group("running").add_argument
    running("--device", default="auto", help="auto, cpu, cuda, cuda:N or mps")
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
    photos, labelled = (None, False) if piped else find_photos(args.images, args.root)
    if args.report and not labelled:
        raise UserError("--report: needs labels; give a list of lines with path and label, ending in .txt")
    classifier = load(args.model, args.device)
    classes = classifier.classes
    if labelled and int(photos.labels.max()) >= len(classes):
        row = int(photos.labels.argmax())
        both = f"label {photos.labels[row]}, but {shown(args.model)} knows {len(classes)} classes, from 0"
        raise UserError(f"{photos.where(row)}: {both}; use the lists it was trained with")

    print_row = row_printer(args.format, classes, args.top_k, args.min_prob or 0)
    batch_size = args.batch_size or PASS_BATCH[classifier.device.type]
    workers = cores_of_rank() if args.workers is None else args.workers
    scores, judged, unread = Scores(len(classes)), [], 0
    for group in piped_photos() if piped else [photos]:
        progress = None if piped or sys.stdout.isatty() else Progress("predicted", len(group))
        for index, found in predict_photos(classifier, group, batch_size, workers):
            path, label = group.path(index), int(group.labels[index])
            print_row(path, classes[label] if labelled else None, found)
            if isinstance(found, str):
                unread += 1
            elif labelled:
                scores.add(label, found)
                if args.report:
                    judged.append((path, label, found))
            if progress:
                progress.add(1)
            if (index + 1) % batch_size == 0:
                sys.stdout.flush()
        sys.stdout.flush()
    if scores.count:
        table = sys.stdout if args.format == "text" else sys.stderr  # rows alone in what programs read
        print(f"\n{score_table(scores, classes)}", file=table)
    if judged:
        names = {"model": shown(args.model), "list_name": ", ".join(map(shown, args.images))}
        save_report(args.report, classifier, scores, judged, curves=read_history(args.model), **names)
        print(f"\nreport saved in {shown(args.report)}", file=table)
    if unread:
        sys.exit(1)


if __name__ == "__main__":
    main()
