"""Folders: photos in class folders read as a list, and what in them is no photo."""

import itertools
import os
from collections import deque
from collections.abc import Container
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from transfer.inputs.formats import SUFFIXES, is_image
from transfer.inputs.labels import same_name, sort_names
from transfer.inputs.lists import ImageList
from transfer.system.console import UserError, first_three, os_reason, plural, printable, quoted, warn

# Of systems and tools: nobody's class.
SYSTEM_FOLDERS = (
    *("@eadir", "__macosx", "$recycle.bin", "system volume information", "lost+found", ".ipynb_checkpoints"),
)
# What the parts of a folder are called that is already split, and what each is for.
PART_NAMES = {"train": "train", "training": "train", "test": "test", "testing": "test"}
PART_NAMES |= dict.fromkeys(("val", "valid", "validation", "dev"), "val")


@dataclass
class Contents:
    """What a folder holds: the paths of images; of folders that can't be read, with the reason; and how many of each
    other kind were skipped, with the first three. Each entry is in one of them, or a folder that was entered.
    """

    images: list[bytes] = field(default_factory=list)
    unreadable: list[tuple[bytes, str]] = field(default_factory=list)
    skipped: dict[str, list[bytes]] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)

    def skip(self, kind: str, path: bytes) -> None:
        self.counts[kind] = self.counts.get(kind, 0) + 1
        if self.counts[kind] <= 3:
            self.skipped.setdefault(kind, []).append(path)

    def describe_skipped(self) -> str:
        """What was skipped, in words; empty where nothing was."""
        described = []
        for kind, count in self.counts.items():
            more = f" and {count - 3:,} more" if count > 3 else ""
            noun, _, rest = kind.partition("|")  # of which the noun has a plural
            described.append(f"{plural(count, noun)}{rest} ({', '.join(map(printable, self.skipped[kind]))}{more})")
        return ", ".join(described)


def place_of(path: bytes) -> tuple[int, int]:
    """What is the same for one folder, by whatever path. Raises OSError."""
    info = os.stat(path)
    return info.st_dev, info.st_ino


def entries_of(folder: bytes) -> list[tuple[bytes, bool, bool]]:
    """The name of each entry, whether it is a folder, and whether a link; in order. Raises OSError."""
    with os.scandir(folder) as entries:
        return sorted((entry.name, os.path.isdir(entry.path), entry.is_symlink()) for entry in entries)


def skipped_kind(name: bytes, is_folder: bool) -> str | None:
    """What is never looked into, in words; None for the rest."""
    if is_folder and os.fsdecode(name).lower() in SYSTEM_FOLDERS:
        return f"{printable(name)} folder"
    if name.startswith(b"."):
        return "hidden folder" if is_folder else "hidden file"
    return None


def find_images(folder: bytes, contents: Contents, elsewhere: Container[tuple[int, int]] = ()) -> None:
    """Add the images in a folder and all below it, in order, and what else is there.

    Links to folders are followed, but no folder is read twice, nor one that is read elsewhere, by `place_of`: so a link
    to one that it lies in ends there.
    """
    found, seen, folders, links = [], set(), deque([folder]), deque()
    while folders or links:
        inner = folders.popleft() if folders else links.popleft()  # what is reached both ways goes by its own name
        try:
            place = place_of(inner)
            if place in seen or seen and place in elsewhere:
                contents.skip("link| to a folder that is read already", inner)
                continue
            seen.add(place)
            entries = entries_of(inner)
        except OSError as error:
            contents.unreadable.append((inner, os_reason(error)))
            continue
        for name, is_folder, is_link in entries:
            path = os.path.join(inner, name)
            if kind := skipped_kind(name, is_folder):
                contents.skip(kind, path)
            elif is_folder:
                (links if is_link else folders).append(path)
            elif is_image(path):
                found.append(path)
            else:
                contents.skip("other file", path)
    contents.images += sorted(found)


def warn_on_skipped(folder: bytes, contents: Contents) -> None:
    if skipped := contents.describe_skipped():
        warn(f"{printable(folder)}: skipped {skipped}")


def images_below(folder: bytes) -> list[bytes]:
    """The images in a folder, of whatever class, to predict; and the folders that can't be read, each to be told as an
    image that can't. Raises UserError where there is none.
    """
    contents = Contents()
    find_images(folder, contents)
    if not contents.images and not contents.unreadable:
        skipped = contents.describe_skipped()
        held = f" (but {skipped})" if skipped else ""
        raise UserError(f"{printable(folder)}: no image in this folder{held}; their names end in {', '.join(SUFFIXES)}")
    warn_on_skipped(folder, contents)
    return contents.images + [path for path, _ in contents.unreadable]


def class_folders(top: bytes, contents: Contents) -> dict[str, list[bytes]]:
    """The class folders in a folder, by class name; what else lies there is skipped. Raises OSError.

    Two whose names are the same but for their form are one class.
    """
    folders = {}
    for name, is_folder, _ in entries_of(top):
        path = os.path.join(top, name)
        if kind := skipped_kind(name, is_folder):
            contents.skip(kind, path)
        elif is_folder:
            folders.setdefault(same_name(os.fsdecode(name)), []).append(path)
        else:
            contents.skip("photo| outside the class folders" if is_image(path) else "other file", path)
    return {name: folders[name] for name in sort_names(folders)}


def read_folder(folder: Path) -> tuple[ImageList, list[str]]:
    """A folder of class folders as a list: labels are the places of their names in order, nested folders belong to
    their class. Returns the images, with the names, and all problems.
    """
    name, top, contents = printable(folder), os.fsencode(folder), Contents()
    try:
        folders = class_folders(top, contents)
    except OSError as error:
        return ImageList(name, [], [], []), [f"{name}: {os_reason(error)}; give yourself permission to read it"]
    labels, problems = [], []
    elsewhere = {place_of(path) for path in [top, *itertools.chain(*folders.values())]}
    for label, paths in enumerate(folders.values()):
        before = len(contents.images), len(contents.unreadable)
        for path in paths:
            find_images(path, contents, elsewhere)
        labels += [label] * (len(contents.images) - before[0])
        if (len(contents.images), len(contents.unreadable)) == before:
            problems.append(f"{printable(paths[0])}: no image in this class folder; add some or remove it")
    for path, reason in contents.unreadable:
        problems.append(f"{printable(path)}: {reason}; give yourself permission to read it, or move it away")
    if not folders:
        fix = "give each class's photos a folder of its own there; if it is a class itself, name the folder it lies in"
        problems.append(f"{name}: no class folders in it; {fix}")
    else:
        warn_on_skipped(top, contents)
    image_list = ImageList(name, contents.images, labels, range(1, len(labels) + 1))
    image_list.classes, image_list.is_folder = list(folders), True
    return image_list, problems


# What a folder of folders may be besides


class Parts(NamedTuple):
    """The folders of class folders that a folder is split into."""

    train: Path
    val: Path | None
    test: Path


def split_folder(folder: Path) -> Parts | None:
    """The parts of a folder that is already split, by their names and since each holds folders; None for any other.

    Without a test part that for validation is tested on. Raises UserError where it is in doubt what is what.
    """
    top = os.fsencode(folder)
    try:
        names = [name for name, is_folder, _ in entries_of(top) if is_folder and not skipped_kind(name, is_folder)]
        uses = {name: PART_NAMES.get(os.fsdecode(name).lower()) for name in names}
        parts = [name for name in names if uses[name]]
        holders = [name for name in parts if any(is_folder for _, is_folder, _ in entries_of(os.path.join(top, name)))]
    except OSError:  # which reading it will tell
        return None
    if len(parts) < 2 or len(holders) < len(parts) < len(names):
        return None
    found = {uses[name]: folder / os.fsdecode(name) for name in parts}
    train, rest = found.get("train"), found.get("test") or found.get("val")
    if train and rest and len(found) == len(holders) == len(names):
        return Parts(train, found.get("val") if "test" in found else None, rest)
    listed = first_three([printable(name) for name in names])
    fix = f"--train {quoted(train or folder / 'FOLDER')} --test {quoted(rest or folder / 'FOLDER')}"
    doubt = f"looks split already ({listed}), but it is in doubt what is for what"
    raise UserError(f"{printable(folder)}: {doubt}; name folders of class folders: {fix}")


def inner_folders(folder: Path, image_list: ImageList) -> list[set[str]]:
    """Of each class the folders in its own that hold its images; '' where its own holds some."""
    inner, start = [set() for _ in image_list.classes], len(os.path.join(os.fsencode(folder), b""))
    for path, label in zip(image_list.each_path(), image_list.labels.tolist(), strict=True):
        _, *below = os.fsdecode(path[start:]).split(os.sep)[:-1]
        inner[label].add(below[0] if below else "")
    return inner


def check_depth(folder: Path, image_list: ImageList) -> list[str]:
    """The problem of a folder that holds class folders one level below where they were looked for, or a warning where
    that is a guess.
    """
    inner = inner_folders(folder, image_list)
    if len(inner) == 1 and len(inner[0]) > 1 and "" not in inner[0]:
        only = folder / image_list.classes[0]
        names = first_three([printable(name) for name in sort_names(inner[0])])
        return [f"{image_list.name}: holds one folder, with {names} in it; name that one: --train {quoted(only)}"]
    deep = [label for label, folders in enumerate(inner) if len(folders) > 1 and "" not in folders]
    if len(inner) > 1 and len(deep) == 1:
        name = image_list.classes[deep[0]]
        names, fix = first_three([printable(each) for each in sort_names(inner[deep[0]])]), folder / name
        those = f"if those are the classes: --train {quoted(fix)}"
        warn(f"{image_list.name}: {printable(name)} is one class, with the folders {names} in it; {those}")
    shared = set.intersection(*inner) if inner else set()
    if len(inner) > 1 and len(shared) > 1 and all(each == shared for each in inner) and "" not in shared:
        names, below = (
            first_three([printable(name) for name in sort_names(each)]) for each in (image_list.classes, shared)
        )
        warn(f"{image_list.name}: the classes are {names}, each with {below} in it; if those are meant, move them up")
    return []
