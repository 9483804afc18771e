"""Name what is in images, with the best.pth that train.py saved.

    python predict.py photo.jpg
    python predict.py test.txt --report report.html
    python predict.py pile --label-next 40 --report next.html

Reads images, folders, lists and paths on standard input. Prints one line per image
on stdout: its path, then the likeliest classes with their probabilities. For lists
and class folders, whose labels are known, it then prints the accuracy of each class,
and can draw a report; with a report the lines are left out unless --format asks for them.
With --label-next it prints those photos alone whose labels would help the model most.
"""

from transfer.system.flags import parse_predict_args
from transfer.system.signals import guard_imports

if __name__ == "__main__":  # before torch's import, which takes seconds: Ctrl-C, --help and typing errors
    guard_imports()
    parse_predict_args()

import functools
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor, nn
from torchvision import transforms as T

from train import ImageDataset, draw_views
from transfer.architectures import check_arch, head_of, preprocessing
from transfer.audit.copies import thumbnails
from transfer.backbone import backbone_of, embed, embed_batches, embed_dataset, inference_copy, pass_batch, unbatch
from transfer.checkpoint import load_checkpoint
from transfer.device import Compute, pick_compute
from transfer.inputs.images import GREY_BITS, ImageError, from_pil, read_image
from transfer.inputs.lists import ImageList
from transfer.inputs.pile import read_pile
from transfer.inputs.sources import Source, correct_labels, join_sources, read_left_out, read_sources
from transfer.inputs.stdin import PathRows, StdinPaths
from transfer.labelling import propose
from transfer.metrics import classification_report, likeliest
from transfer.pages.next_page import save_next
from transfer.pages.report import save_report
from transfer.rows import Answer, print_rows, row_printer
from transfer.system.console import Progress, UserError, one_line_errors, printable
from transfer.system.files import history_path
from transfer.system.outputs import check_outputs, page_outputs


@dataclass(frozen=True)
class Classifier:
    """A loaded checkpoint: images go through the backbone, features (N, D) through the head."""

    backbone: nn.Module
    head: nn.Linear
    classes: list[str]
    metadata: dict  # what train.py saved with it; of other files only `arch` and `classes`
    compute: Compute
    views: Sequence[int] = (0,)  # of each image, that its features are the mean of

    @property
    def size(self) -> int:
        """Of an image's sides, in pixels, as it was trained."""
        return self.metadata.get("size", preprocessing(self.metadata["arch"]).size)

    @property
    def grey_bits(self) -> int:
        """Of 16-bit greyscale, from black to white, as in training."""
        return self.metadata.get("grey_bits", GREY_BITS)

    def dataset(self, image_list: ImageList | PathRows) -> ImageDataset:
        """Images as this model takes them."""
        return ImageDataset(image_list, self.views, 0, self.size, grey_bits=self.grey_bits)


def load(
    path: str | os.PathLike = "best.pth",
    device: str = "auto",
    workers: int | None = 0,
    mirror: bool = False,
    *,
    arch: str | None = None,
) -> Classifier:
    """Load train.py's best.pth, or the state dict of any of torchvision's classifiers with a head. Raises UserError.

    mirror: predict from each image and its mirror image, at twice the cost; arch: its name, where its weights do not
    show it.
    """
    model, metadata = load_checkpoint(Path(path), arch)
    # As it was trained, so that the accuracy is the one that training reported.
    precision = "float32" if metadata.get("precision") == "float32" else "auto"
    compute = pick_compute(device, precision, workers, arch=metadata["arch"])
    if "mean" in metadata:
        compute = replace(compute, normalize=T.Normalize(metadata["mean"], metadata["std"]))
    backbone, views = inference_copy(backbone_of(model), compute), (0, 1) if mirror else (0,)
    return Classifier(backbone, head_of(model), metadata["classes"], metadata, compute, views)


def probabilities(classifier: Classifier, features: Tensor | str) -> Tensor | str:
    """Of one image's features, (D,) or (V, D), as its backbone gives them: (C,); or the reason why there are none.

    The logits of the mean of two views are the mean of their logits: the head is linear.
    """
    if isinstance(features, str):
        return features
    probs = classifier.head(features.cpu().float().view(-1, features.shape[-1]).mean(0)).softmax(0)
    return probs if probs.isfinite().all() else "the model gives no finite number for it"


@torch.inference_mode()
def predict(classifier: Classifier, images: Sequence[str | os.PathLike | Image.Image]) -> list[list[tuple[str, float]]]:
    """For each path or PIL image, all classes as (name, probability), likeliest first.

    Raises ImageError where an image can't be read, or the model has no answer.
    """
    named = []
    for image in images:
        read = from_pil if isinstance(image, Image.Image) else read_image
        image = read(image, classifier.grey_bits)
        views = draw_views(image, classifier.views, 0, size=classifier.size)
        features = embed(classifier.backbone, views, classifier.compute)
        probs = probabilities(classifier, features)
        if isinstance(probs, str):
            raise ImageError(probs)
        named.append(likeliest(probs, classifier.classes, len(classifier.classes)))
    return named


def list_features(classifier: Classifier, image_list: ImageList, batch_size: int) -> Iterator[tuple[int, Tensor | str]]:
    """Each image's row and its features, as `probabilities` takes them."""
    compute = classifier.compute if len(image_list) > batch_size else replace(classifier.compute, workers=0)
    dataset, views = classifier.dataset(image_list), len(classifier.views)
    batches = embed_dataset(
        classifier.backbone,
        dataset,
        range(len(image_list)),
        compute=compute,
        batch_size=max(1, batch_size // views),
        per_image=views,
    )
    return unbatch(batches)


@torch.inference_mode()
def predict_images(
    classifier: Classifier, image_list: ImageList, has_label: Tensor, batch_size: int
) -> Iterator[Answer]:
    """What is found for each image, with its label where it has one."""
    for row, features in list_features(classifier, image_list, batch_size):
        label = int(image_list.labels[row]) if has_label[row] else None
        yield Answer(image_list.path(row), probabilities(classifier, features), label)


@torch.inference_mode()
def predict_stdin(classifier: Classifier, batch_size: int) -> Iterator[Answer]:
    """The same for the paths on standard input, as soon as they come.

    Raises UserError (status 1) where standard input can't be read as lines.
    """
    paths, dataset = StdinPaths(batch_size), classifier.dataset(PathRows())
    for few, workers in ((True, 0), (False, classifier.compute.workers)):  # they start once they pay, and stay
        if not few and not paths.pending:
            return
        compute, receive = replace(classifier.compute, workers=workers), functools.partial(paths.batches, few)
        batches = embed_batches(classifier.backbone, dataset, receive, compute=compute, per_image=len(classifier.views))
        for (_, path), features in unbatch(batches):
            yield Answer(path, probabilities(classifier, features))
            paths.mark_answered()


# What to label next


@torch.inference_mode()
def label_next(classifier: Classifier, pile: ImageList, count: int, batch_size: int) -> Iterator[Answer]:
    """What can't be read of a pile; then so many photos of it that are most worth a label, the most worthy first.

    Features and probabilities of all are in memory: 4 bytes per feature and class.
    """
    width, progress = classifier.head.in_features, Progress("looked at", len(pile))
    features, probs = torch.empty(len(pile), width), torch.empty(len(pile), len(classifier.classes))
    rows = []
    for row, found in list_features(classifier, pile, batch_size):
        answer = probabilities(classifier, found)
        if isinstance(answer, str):
            yield Answer(pile.path(row), answer)
        else:
            features[len(rows)], probs[len(rows)] = found.view(-1, width).mean(0), answer
            rows.append(row)
        progress.add(1)
    dataset, alone = replace(classifier.dataset(pile), views=[0]), replace(classifier.compute, workers=0)

    def thumbnail(place: int) -> Tensor:
        return thumbnails(dataset, torch.tensor([rows[place]]), alone)[0].float()

    proposals = propose(features[: len(rows)], probs[: len(rows)], count, thumbnail)
    for rank, (place, worth) in enumerate(proposals, 1):
        yield Answer(pile.path(rows[place]), probs[place], rank=rank, worth=worth)


# What is asked for


def check_model(path: Path, arch: str | None) -> None:
    """Raises UserError where no model was named and none lies here, or its architecture is none of torchvision's."""
    if path == Path("best.pth") and not path.exists():
        raise UserError(f"no best.pth in {printable(Path.cwd())}; give --model FILE or run train.py first")
    if arch:
        check_arch(arch, None)


def check_request(
    report: Path | None, flag: str | None, sources: Sequence[Source], reads: Sequence[str | bytes | Path]
) -> None:
    """Raises UserError where what a flag asks for needs labels, or the report's page can't be written."""
    if flag and not (sources and all(source.labelled is not False for source in sources)):
        fix = "give lists, a path and a class number per line, or folders of class folders"
        raise UserError(f"{flag}: needs labels; {fix}")
    if report:
        check_outputs(page_outputs("--report", report), reads)


@one_line_errors()
def main(argv: Sequence[str] | None = None) -> None:
    args = parse_predict_args(argv)
    from_stdin, page_alone = args.images == ["-"], args.report and not args.label_next
    style = args.format or ("table" if page_alone else "text")
    asking = {"--report": page_alone, "--labelled": args.labelled, "--corrections": args.corrections}
    asking["--format table"] = style == "table"
    needs_labels = next((flag for flag, asked in asking.items() if asked), None)

    # Everything that can be checked is, before the model is loaded.
    check_model(args.model, args.arch)
    sources = [] if from_stdin else read_sources(args.images, args.root, args.labelled)
    pile = read_pile(sources, read_left_out(args.leave_out, args.root)) if args.label_next else None
    lists = [pile] if pile else [source.image_list for source in sources]
    images = [path for image_list in lists for path in image_list.each_path()] if args.report else []
    reads = [*args.images, *args.leave_out, *args.corrections, args.model, history_path(args.model), *images]
    check_request(args.report, needs_labels, sources, reads)
    classifier = load(args.model, args.device, args.workers, args.mirror, arch=args.arch)
    classes, batch_size = classifier.classes, args.batch_size or pass_batch(classifier.compute.device, classifier.size)
    on_screen, progress = style != "table" and sys.stdout.isatty(), None
    if pile:
        answers = label_next(classifier, pile, args.label_next, batch_size)
    elif from_stdin:
        answers = predict_stdin(classifier, batch_size)
    else:
        joined = join_sources(sources, classifier.metadata, args.model, needs_labels)
        image_list, has_label = correct_labels(*joined, args.corrections, root=args.root, metadata=classifier.metadata)
        answers = predict_images(classifier, image_list, has_label, batch_size)
        progress = None if on_screen else Progress("predicted", len(image_list))

    # A row is printed for each image as soon as it is there.
    print_row = row_printer(style, classes, args.top_k, args.min_prob or 0, ranks=pile is not None)
    scores, shown, unreadable = print_rows(answers, len(classes), print_row, keep=args.report, progress=progress)

    # Where labels are known, the table follows; then the page.
    stream = sys.stdout if style in ("text", "table") else sys.stderr  # rows alone in what programs read
    if scores.count:
        gap = "" if style == "table" else "\n"
        print(f"{gap}{classification_report(scores, classes)}", file=stream)
    if shown and pile:
        save_next(args.report, shown, classifier.metadata, pile=len(pile), model=args.model, sources=args.images)
    elif shown:
        save_report(args.report, classifier.metadata, scores, shown, model=args.model, lists=args.images)
    if shown:
        print(f"\nreport saved in {printable(args.report)}", file=stream)
    if unreadable:
        sys.exit(1)


if __name__ == "__main__":
    main()
