"""Name what is in images, with the best.pth that train.py saved.

    python predict.py photo.jpg

Images, folders and lists of images go in; a line an image comes out on stdout:
its path, then the likeliest classes with their probabilities.
"""

import argparse
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor, nn

from train import (
    PASS_BATCH,
    Photos,
    UserError,
    Views,
    as_rgb,
    backbone_of,
    cores_of_rank,
    draw_views,
    each_image,
    embed,
    embed_in_order,
    load_checkpoint,
    one_line_errors,
    pick_device,
    pick_precision,
    read_list,
    read_photo,
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
    backbone = backbone_of(model).to(where, memory_format=torch.channels_last)
    return Classifier(backbone, model.fc, about["classes"], about, where, dtype)


@torch.inference_mode()
def predict(classifier: Classifier, images: Sequence[str | os.PathLike | Image.Image]) -> list[list[tuple[str, float]]]:
    """For each path or PIL image, all classes as (name, probability), likeliest first.

    Raises train.PhotoError where an image can't be read.
    """
    named = []
    for image in images:
        photo = as_rgb(upright(image)) if isinstance(image, Image.Image) else read_photo(image)
        features = embed(classifier.backbone, draw_views(photo, [0], 0, 0), classifier.device, classifier.dtype)
        named.append(
            likeliest(classifier.head(features.float()[0]).softmax(0), classifier.classes, len(classifier.classes))
        )
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
        yield index, features if isinstance(features, str) else classifier.head(features.float()).softmax(0)


def find_photos(arguments: Sequence[str]) -> Photos:
    """The images that the arguments name: files, folders' contents, lists' lines. Raises UserError."""
    paths, labels, problems = [], [], []
    for argument in arguments:
        if os.path.isdir(argument):
            found = [
                os.path.join(folder, name)
                for folder, _, names in os.walk(os.fsencode(argument))
                for name in names
                if os.fsdecode(name).lower().endswith(SUFFIXES)
            ]
            if not found:
                problems.append(f"{shown(argument)}: no images in this folder; they end in {', '.join(SUFFIXES)}")
            paths += sorted(found)
            labels += [0] * len(found)
        elif argument.endswith(".txt"):
            listed, wrong = read_list(Path(argument), Path())
            problems += wrong
            paths += listed.paths()
            labels += listed.labels.tolist()
        else:
            paths.append(os.fsencode(argument))
            labels.append(0)
    if problems:
        raise UserError(*problems[:10], *([f"{len(problems):,} problems in all"] if len(problems) > 10 else []))
    return Photos("", paths, labels, range(1, len(paths) + 1))


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Name what is in images.", formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("images", nargs="+", metavar="IMAGE", help="images, folders, or lists ending in .txt")
    parser.add_argument("--model", type=Path, default="best.pth", metavar="FILE", help="what train.py saved")
    parser.add_argument("--top-k", type=whole(1), default=3, metavar="K", help="classes named for each image")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N or mps")
    parser.add_argument("--batch-size", type=whole(1), metavar="N", help="images at a time (default: by device)")
    parser.add_argument("--workers", type=whole(0), metavar="N", help="decoding processes (default: one a core)")
    return parser.parse_args(argv)


@one_line_errors()
def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    photos = find_photos(args.images)
    classifier = load(args.model, args.device)
    batch_size = args.batch_size or PASS_BATCH[classifier.device.type]
    workers = cores_of_rank() if args.workers is None else args.workers
    unread = 0
    for index, found in predict_photos(classifier, photos, batch_size, workers):
        path = shown(photos.path(index))
        if isinstance(found, str):
            unread += 1
            print(f"error: {path}: {found}", file=sys.stderr)
            continue
        names = ", ".join(
            f"{shown(name)} {prob:.1%}" for name, prob in likeliest(found, classifier.classes, args.top_k)
        )
        print(f"{path}  {names}")
    if unread:
        sys.exit(1)


if __name__ == "__main__":
    main()
