"""Sources: what the arguments of predict.py name, read as one list, and which of its images have labels."""

import glob
import itertools
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from transfer.inputs.classes import remap_labels
from transfer.inputs.corrections import ClassLabels, read_corrections
from transfer.inputs.folders import images_below, read_folder
from transfer.inputs.formats import SUFFIXES
from transfer.inputs.labels import NUMBERED, same_name, sort_names
from transfer.inputs.lists import LIST_SUFFIXES, ImageList, ListsError, as_stored, missing_hint, read_list
from transfer.system.console import UserError, nearest_path, printable, quoted, warn
from transfer.system.files import open_regular, path_digest

LONGEST_PATH = 4096  # letters, as most systems have it


class Source(NamedTuple):
    """The images that one argument, a path, names. labelled: None of a folder whose folders may be named as classes."""

    path: str
    image_list: ImageList
    labelled: bool | None


def looks_like_list(path: str) -> bool:
    """Whether a file is a list: it ends as one, or its first line that is no comment ends in a class number."""
    if path.lower().endswith(LIST_SUFFIXES):
        return True
    try:
        with open_regular(path) as file:
            head = b"" if path.lower().endswith(SUFFIXES) else file.read(1 << 12)
    except OSError:
        return False
    lines = [line for line in head.split(b"\n") if line.strip() and line.strip()[:1] != b"#"]
    return b"\0" not in head and bool(lines) and NUMBERED.match(lines[0]) is not None


def read_plain_folder(folder: str) -> Source:
    """All images in a folder and below it, with the names of its folders as classes if none lies beside these.

    Raises UserError where there is none.
    """
    paths, start = images_below(os.fsencode(folder)), len(os.path.join(os.fsencode(folder), b""))
    parts = [os.fsdecode(path[start:]).split(os.sep) for path in paths]
    within = [same_name(part[0]) if len(part) > 1 else "" for part in parts]
    names = sort_names(set(within)) if all(within) else []
    places = {name: label for label, name in enumerate(names)}
    image_list = ImageList(printable(folder), paths, [places.get(name, 0) for name in within], range(len(paths)))
    image_list.classes, image_list.is_folder = names, True
    return Source(folder, image_list, None if names else False)


def expand_pattern(argument: str) -> list[str]:
    """The names that a pattern such as *.jpg fits, which a shell may have left alone; else the argument itself."""
    if os.path.exists(argument) or not glob.has_magic(argument):
        return [argument]
    return sorted(glob.glob(argument)) or [argument]


def check_arguments(arguments: Sequence[str]) -> None:
    """Warn of names that are not there where others like them are. Raises UserError where a path's quotes are missing.

    What is not there still has a row in what is printed.
    """
    for first, argument in enumerate(arguments):
        if os.path.lexists(argument) or glob.has_magic(argument):
            continue
        whole = argument
        for more in arguments[first + 1 :]:
            whole = f"{whole} {more}"
            if len(whole) > LONGEST_PATH:
                break
            if os.path.exists(whole):
                raise UserError(f"a path with spaces needs quotes: {quoted(whole)}")
        if hint := nearest_path(Path(argument)):
            warn(f"{printable(argument)}: no such file{hint}")


def read_left_out(arguments: Sequence[str], root: Path) -> list[Source]:
    """The images that --except names, as `read_sources` has them. Raises UserError also for what is not there."""
    for argument in arguments:
        if not os.path.lexists(argument) and expand_pattern(argument) == [argument]:
            fix = nearest_path(Path(argument)) or "; name photos, folders or lists"
            raise UserError(f"--except {printable(argument)}: no such file or directory{fix}")
    return read_sources(arguments, root, False)


def read_sources(arguments: Sequence[str], root: Path, labelled: bool) -> list[Source]:
    """The images that files, folders and lists name. labelled: folders hold class folders. Raises UserError."""
    sources, problems = [], []
    check_arguments(arguments)
    for argument in itertools.chain.from_iterable(map(expand_pattern, arguments)):
        found = []
        if os.path.isdir(argument) and not labelled:
            sources.append(read_plain_folder(argument))
        elif os.path.isdir(argument) or looks_like_list(argument):
            # Of a list each line has a row, also that of a missing image.
            path = Path(argument)
            image_list, found = read_folder(path) if path.is_dir() else read_list(path, root, check_files=False)
            sources.append(Source(argument, image_list, image_list.labelled))
            if len(image_list) and not any(map(os.path.exists, image_list.each_path())):
                hint = missing_hint(image_list.path(0), path)
                warn(f"{printable(argument)}: none of the images in this list is there; {hint}")
        else:
            photo = ImageList(printable(argument), [as_stored(os.fsencode(argument))], [0], [0])
            sources.append(Source(argument, photo, False))
        problems += found
    if problems:
        raise ListsError(problems)
    return sources


def label_source(source: Source, metadata: dict, model: Path, flag: str | None) -> bool:
    """Give a source the model's labels, and say whether it has any. Raises UserError where it lacks one of them.

    metadata: of the model's checkpoint; flag: what asked for labels, if anything did.
    """
    image_list, classes = source.image_list, metadata["classes"]
    if image_list.classes:
        folders = metadata.get("folders", classes)  # that --classes named otherwise
        names = folders if set(image_list.classes) <= set(map(same_name, folders)) else classes
        strange = set(image_list.classes) - set(map(same_name, names))
        if strange and source.labelled is None and not flag:
            return False
        if problems := remap_labels(image_list, names):
            rename = "rename the folders as those are named" if image_list.is_folder else "use their names"
            fix = f"{printable(model)} was trained on other classes; {rename}"
            raise UserError(*problems, fix)
        if source.labelled is None:
            what = "its folders are named as the model's classes, and taken as labels"
            print(f"{image_list.name}: {what}", file=sys.stderr)
    elif source.labelled and int(image_list.labels.max()) >= len(classes):
        row = int(image_list.labels.argmax())
        both = f"label {image_list.labels[row]}, but {printable(model)} knows {len(classes)} classes, from 0"
        raise UserError(f"{image_list.where(row)}: {both}; use the lists it was trained with")
    return source.labelled is not False


def correct_labels(
    image_list: ImageList, has_label: Tensor, files: Sequence[Path], *, root: Path, metadata: dict
) -> tuple[ImageList, Tensor]:
    """Images and which of them have labels, as corrected; lines about other images count for nothing here. Says what
    that changed. Raises UserError.
    """
    if not files:
        return image_list, has_label
    corrections = read_corrections(files, root, ClassLabels.of_model(metadata))
    if corrections.problems:
        raise ListsError(corrections.problems)
    image_list, rows, _ = corrections.apply(image_list)
    if not rows:
        raise UserError("--corrections: all images are left out; keep some")
    print(corrections.describe(), file=sys.stderr)
    return image_list, has_label[[*rows]]


def join_sources(sources: Sequence[Source], metadata: dict, model: Path, flag: str | None) -> tuple[ImageList, Tensor]:
    """All images as one list, and which of them have labels (n,). Raises UserError as `label_source` does."""
    labelled = [label_source(source, metadata, model, flag) for source in sources]
    image_lists = [source.image_list for source in sources]
    for source, known in zip(sources, labelled, strict=True):
        if known and path_digest(source.path) in metadata.get("trained_lists", []):
            warn(f"{source.image_list.name}: the model was trained on images of it, so the accuracy is far too high")
    has_label = torch.tensor(labelled).repeat_interleave(torch.tensor([len(each) for each in image_lists]))
    if len(sources) == 1:
        return image_lists[0], has_label
    paths = [path for image_list in image_lists for path in image_list.paths()]
    labels = [label for image_list in image_lists for label in image_list.labels.tolist()]
    return ImageList("", paths, labels, range(len(paths))), has_label
