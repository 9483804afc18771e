"""Folders: photos in class folders read as a list."""

import os
from collections.abc import Sequence
from pathlib import Path

import torch

from transfer.console import first_three, plural, printable, warn
from transfer.images import SUFFIXES
from transfer.lists import ImageList


def find_images(folder: bytes) -> tuple[list[bytes], int, int]:
    """The images in a folder and all below it, sorted; how many hidden and how many other files were skipped."""
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
    name, top = printable(folder), os.fsencode(folder)
    with os.scandir(top) as entries:
        inside = sorted((entry.name, entry.is_dir()) for entry in entries)
    classes = [entry for entry, is_folder in inside if is_folder and not entry.startswith(b".")]
    hidden = sum(entry.startswith(b".") for entry, _ in inside)
    others, paths, labels, problems = len(inside) - hidden - len(classes), [], [], []
    for label, each in enumerate(classes):
        found, hidden_there, others_there = find_images(os.path.join(top, each))
        hidden, others = hidden + hidden_there, others + others_there
        if not found:
            problems.append(
                f"{printable(os.path.join(top, each))}: no image in this class folder; add some or remove it"
            )
        paths += found
        labels += [label] * len(found)
    if not classes:
        problems.append(f"{name}: no class folders in it; give each class's photos a folder of its own there")
    passed = [plural(count, noun) for count, noun in ((hidden, "hidden file"), (others, "other")) if count]
    if passed and classes:
        warn(f"{name}: passed over {' and '.join(passed)}, which are no images in class folders")
    image_list = ImageList(name, paths, labels, range(1, len(paths) + 1))
    image_list.classes = [os.fsdecode(each) for each in classes]
    return image_list, problems


def remap_labels(image_list: ImageList, classes: Sequence[str]) -> list[str]:
    """Give the images of a folder the labels of their classes' names; the problems where there is no such class."""
    places = {name: label for label, name in enumerate(classes)}
    strange = [name for name in image_list.classes if name not in places]
    if strange:
        known = first_three([printable(name) for name in classes])
        return [f"{image_list.name}: no class is called {printable(name)}; there are {known}" for name in strange]
    image_list.labels = torch.tensor([places[name] for name in image_list.classes])[image_list.labels]
    image_list.classes = list(classes)
    return []
