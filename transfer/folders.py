"""Folders: photos in class folders read as a list, test images held out, and the lists of such a split written."""

import errno
import os
from collections.abc import Sequence
from pathlib import Path

import torch

from transfer.console import UserError, counted, first_three, shown, warn
from transfer.distributed import my_rank
from transfer.features import Features
from transfer.files import keep_previous, save_atomically
from transfer.folds import split_off
from transfer.images import SUFFIXES
from transfer.lists import ImageList, check_lists, class_names, folders_by_label, read_list

HELD_OUT = 0.2  # of the images of each class, where no test list is named


# Read


def images_in(folder: bytes) -> tuple[list[bytes], int, int]:
    """The images in a folder and all below it, sorted; how many hidden files and how many others were passed over."""
    found, hidden, others = [], 0, 0
    for inner, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(b".")]
        for name in names:
            if name.startswith(b"."):
                hidden += 1
            elif os.fsdecode(name).lower().endswith(SUFFIXES):
                found.append(os.path.join(inner, name))
            else:
                others += 1
    return sorted(found), hidden, others


def read_folder(folder: Path) -> tuple[ImageList, list[str]]:
    """A folder of class folders as a list: labels are the places of their names in order, nested folders belong to
    their class. Returns the images, with the names, and all problems.
    """
    name, top = shown(folder), os.fsencode(folder)
    with os.scandir(top) as entries:
        inside = sorted((entry.name, entry.is_dir()) for entry in entries)
    classes = [entry for entry, is_folder in inside if is_folder and not entry.startswith(b".")]
    hidden = sum(entry.startswith(b".") for entry, _ in inside)
    others, paths, labels, problems = len(inside) - hidden - len(classes), [], [], []
    for label, each in enumerate(classes):
        found, hidden_there, others_there = images_in(os.path.join(top, each))
        hidden, others = hidden + hidden_there, others + others_there
        if not found:
            problems.append(f"{shown(os.path.join(top, each))}: no image in this class folder; add some or remove it")
        paths += found
        labels += [label] * len(found)
    if not classes:
        problems.append(f"{name}: no class folders in it; give each class's photos a folder of its own there")
    passed = [counted(count, noun) for count, noun in ((hidden, "hidden file"), (others, "other")) if count]
    if passed and classes:
        warn(f"{name}: passed over {' and '.join(passed)}, which are no images in class folders")
    listed = ImageList(name, paths, labels, range(1, len(paths) + 1))
    listed.names = [os.fsdecode(each) for each in classes]
    return listed, problems


def read_source(path: Path, root: Path) -> tuple[ImageList, list[str]]:
    """A list, or a folder of class folders. Raises UserError where there is neither."""
    if not path.exists():
        missing = os.strerror(errno.ENOENT).lower()
        raise UserError(f"{shown(path)}: {missing}; name a list, or a folder of class folders")
    return read_folder(path) if path.is_dir() else read_list(path, root)


def relabelled(listed: ImageList, names: Sequence[str]) -> list[str]:
    """Give the images of a folder the labels of their classes' names; the problems where there is no such class."""
    places = {name: label for label, name in enumerate(names)}
    strange = [name for name in listed.names if name not in places]
    if strange:
        known = first_three([shown(name) for name in names])
        return [f"{listed.name}: no class is called {shown(name)}; there are {known}" for name in strange]
    listed.labels = torch.tensor([places[name] for name in listed.names])[listed.labels]
    listed.names = list(names)
    return []


def find_lists(
    train_path: Path | None, test_path: Path | None, root: Path, classes_path: Path | None
) -> tuple[ImageList, ImageList | None, list[str], Path | None]:
    """The training and the test images, the class names, and where the test images come from: lists, or folders.

    By default train.txt and test.txt. Beside another training list a test.txt counts where each class of it lies in
    the same folders; else there is none, and test images are to be held out. Raises UserError.
    """
    if train_path is None:
        train_path, test_path = Path("train.txt"), test_path or Path("test.txt")
    train, problems = read_source(train_path, root)
    names = class_names(train, classes_path) if len(train) else []
    test, more = None, []
    if test_path is not None:
        test, more = read_source(test_path, root)
        if test.names and names:  # of a folder; its classes go by the training folders, whatever --classes calls them
            more += relabelled(test, class_names(train, None))
    elif not train_path.is_dir() and (beside := train_path.with_name("test.txt")).is_file():
        test, more = read_list(beside, root)
        test_path = beside
        if not share_folders(train, test):
            test, more, test_path = None, [], None
    check_lists(train, test, problems + more)
    return train, test, names, test_path


def share_folders(train: ImageList, test: ImageList) -> bool:
    """Whether the test images of each label lie in folders that training images of it lie in, by their names."""
    known, found = (
        {label: set(map(os.path.basename, folders)) for label, folders in folders_by_label(each).items()}
        for each in (train, test)
    )
    return all(folders <= known.get(label, set()) for label, folders in found.items())


# Split


def split_paths(out: Path) -> list[Path]:
    """Where the lists of a split are written, beside the checkpoint: training and test."""
    return [out.with_name(f"{out.stem}.{part}.txt") for part in ("train", "test")]


def check_split(train: ImageList, test: ImageList | None, val_split: float | None) -> None:
    """Raises UserError where there are no images to spare for what is to be held out, or a list of them can't be
    written.
    """
    single = train.labels.bincount().max() == 1
    if val_split and single:
        raise UserError(f"--val-split: {train.name} has one image of each class, none to spare; leave it out")
    if not test and single:
        raise UserError(f"{train.name}: one image of each class, none to spare to test on; name test images by --test")
    for row, path in enumerate(train.each_path() if not test else ()):
        if odd := unlistable(path):
            raise UserError(f"{train.where(row)}: a list can't hold this name ({odd}); rename it")


def unlistable(path: bytes) -> str | None:
    """Why no line of a list can name a path; None where one can."""
    if b"\n" in path or b"\r" in path:
        return "a line break in it"
    if path != path.rstrip():
        return "a space at its end"
    try:
        path.decode("utf-8")
    except UnicodeDecodeError:
        return "not UTF-8"
    return None


def hold_out_test(
    listed: ImageList, features: Features, out: Path, seed: int
) -> tuple[ImageList, Features, ImageList, Features]:
    """Hold a fifth of each class out to test, near-duplicates together, and write both lists beside the checkpoint.

    Returns the training list and its features, then the test list and its. Raises UserError (status 1).
    """
    found = []
    spare = f"{listed.name}: each class is a single scene, none to spare to test on; name test images by --test"
    for part, path in zip(split_off(features, HELD_OUT, seed, spare), split_paths(out), strict=True):
        half = listed.subset(part.rows)
        half.name, half.lines = shown(path), torch.arange(2, len(half) + 2, dtype=torch.int32)
        if my_rank() == 0:
            keep_previous(path)
            write_list(path, half, f"of {listed.name}, by train.py with --view-seed {seed}")
        found += [half, features.subset(part.rows)]
    return tuple(found)


def write_list(path: Path, listed: ImageList, origin: str) -> None:
    """A list as `read_list` reads it, below a comment. Raises UserError (status 1)."""
    lines = [b"# " + origin.encode()]
    for image, label in zip(listed.each_path(), listed.labels.tolist(), strict=True):
        plain = image[:1] not in b"# \t" and not image.startswith(b"./")
        lines.append(b"%s%s %d" % (b"" if plain else b"./", image, label))
    save_atomically(path, b"\n".join(lines) + b"\n")
