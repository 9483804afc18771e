"""Classes: their names, from folders, labels or a file of names, and the labels that go with them."""

import contextlib
import os
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path

from transfer.inputs.labels import same_name
from transfer.inputs.lists import ImageList, read_text, set_classes
from transfer.system.console import UserError, first_three, plural, printable, warn

NEARLY_ALL = 0.75  # of a class's images in folders of one name: of a list, a tenth may be wrong labels


def remap_labels(image_list: ImageList, classes: Sequence[str]) -> list[str]:
    """Give images that have class names the labels of those names; the problems where there is no such class."""
    known = {same_name(name): name for name in classes}
    strange = [name for name in image_list.classes if same_name(name) not in known]
    if strange:
        some = first_three([printable(name) for name in classes])
        return [f"{image_list.name}: no class is called {printable(name)}; there are {some}" for name in strange]
    image_list.classes = [known[same_name(name)] for name in image_list.classes]
    set_classes(image_list, classes)
    return []


def folders_by_label(image_list: ImageList) -> dict[int, Counter[bytes]]:
    """The folders that images of each label lie in, and how many of them."""
    folders = defaultdict(Counter)
    for path, label in zip(image_list.each_path(), image_list.labels.tolist(), strict=True):
        folders[label][os.path.dirname(path)] += 1
    return folders


def most_common_name(names: Counter[str]) -> str:
    """The name that nearly all images have; none where a list's errors alone don't explain the others."""
    name, count = names.most_common(1)[0]
    return name if count >= NEARLY_ALL * names.total() else ""


def folder_names(folders: dict[int, Counter[bytes]]) -> dict[int, str]:
    """The name of each label where the folders of its images differ by label, else none.

    The images' own folders, or those that lie in the one which all images share.
    """
    shared = b""
    with contextlib.suppress(ValueError):  # some paths are absolute and some are not
        shared = os.path.commonpath({folder for each in folders.values() for folder in each})

    def first_folder(folder: bytes) -> bytes:
        return folder[len(shared) :].replace(os.fsencode(os.sep), b"/").strip(b"/").split(b"/")[0]

    for name_of in (os.path.basename, first_folder):
        names = {}
        for label, some in folders.items():
            found = Counter()
            for folder, count in some.items():
                found[same_name(os.fsdecode(name_of(folder)))] += count
            names[label] = most_common_name(found)
        if all(names.values()) and len(set(names.values())) == len(folders):
            return names
    return {}


def own_names(image_list: ImageList) -> list[str]:
    """One name per class: those of its class folders or labels, else of its images' folders, else numbers."""
    if image_list.classes:
        return list(image_list.classes)
    labels = range(int(image_list.labels.max()) + 1)
    names = folder_names(folders_by_label(image_list))
    numbered = [names.get(label, str(label)) for label in labels]  # labels without an image have no folder
    return numbered if len(set(numbered)) == len(numbered) else [str(label) for label in labels]


def class_names(image_list: ImageList, classes_path: Path | None) -> list[str]:
    """One name per class: from the file, else the list's own.

    A file that holds the list's own names gives their order: labels that came from names follow it. Other names
    rename. Raises UserError where neither is meant without doubt.
    """
    own = own_names(image_list)
    if classes_path is None:
        return own
    names, file = read_names(classes_path), printable(classes_path)
    if len(names) != len(own):
        known = image_list.labels.bincount(minlength=len(own)).nonzero().flatten()
        start = f", labels {known[0]} to {known[-1]} and 0 for what has no image" if known[0] > 0 else ""
        raise UserError(f"{file}: {plural(len(names), 'name')} for {len(own)} classes{start}; write one name a line")
    named = image_list.classes or own != [str(label) for label in range(len(own))]
    moved = [(line, name) for line, name in enumerate(names, 1) if named and name in own and own[line - 1] != name]
    if moved and image_list.classes and set(names) == set(own):
        set_classes(image_list, names)
    elif moved:
        line, name = moved[0]
        there = f"{file}: name {line} is {printable(name)}, but that is the name of class {own.index(name)} already"
        where = f"label {line - 1} is {printable(own[line - 1])} by its images' folder"
        fix = "give all the folders' names in the order you want, or new names" if image_list.classes else where
        raise UserError(f"{there}; {fix}")
    return names


def warn_on_similar_names(image_list: ImageList, classes: Sequence[str]) -> None:
    """Name the classes that are probably one, since their names differ in capitals or spaces alone."""
    alike = defaultdict(list)
    for name in classes:
        alike["".join(name.casefold().split())].append(printable(name))
    for names in alike.values():
        if len(names) > 1:
            fix = "if they are one, give them one name"
            warn(f"{image_list.name}: classes {' and '.join(names)} differ in capitals or spaces alone; {fix}")


def read_names(path: Path) -> list[str]:
    """The names in a file, one per line; lines such as `0 apple` are in the order of their numbers. Raises UserError
    where a name is there twice.
    """
    lines = [same_name(line.strip()) for line in read_text(path).decode().splitlines() if line.strip()]
    fields = [line.replace(",", " ", 1).replace(":", " ", 1).split(None, 1) for line in lines]
    if all(len(pair) == 2 and pair[0].isascii() and pair[0].isdigit() and len(pair[0]) < 9 for pair in fields):
        numbered = {int(number): name for number, name in fields}
        if numbered.keys() == set(range(len(lines))):
            lines = [numbered[label] for label in range(len(lines))]
        elif numbered.keys() == set(range(1, len(lines) + 1)):
            raise UserError(f"{printable(path)}: its numbers start at 1, labels at 0; write the names alone, in order")
    name, count = Counter(lines).most_common(1)[0] if lines else ("", 0)
    if count > 1:
        raise UserError(f"{printable(path)}: {printable(name)} is there twice; give each class a name of its own")
    return lines


def renamed_classes(own: Sequence[str], names: Sequence[str]) -> list[str]:
    """The line for the header that says which classes --classes calls otherwise than the images' folders; or none."""
    renamed = [f"{printable(a)} = {printable(b)}" for a, b in zip(own, names, strict=True) if a != b]
    return [f"names     {first_three(renamed)}"] if renamed else []
