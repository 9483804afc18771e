"""Lists: text files of `path label` lines, checked, and divided by class."""

import contextlib
import itertools
import os
import stat
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from transfer.console import SHOWN_PROBLEMS, UserError, first_three, os_reason, plural, printable, summarise, warn

SLICE = 10_000  # paths that are taken apart at a time
MAX_CLASSES = 100_000  # beyond this a label is a slip of the pen, and its head would not fit


class ImageList:
    """A parsed list of n images. Tensors rather than objects, so that workers share one copy.

    text: all paths as bytes, joined by newlines; ends: (n,) where each ends in it;
    labels: (n,) from 0; lines: (n,) line numbers in the list file `name`; classes: their names, where the list is a
    folder of class folders.
    """

    def __init__(self, name: str, paths: Sequence[bytes], labels: Sequence[int], lines: Sequence[int]):
        self.name = name
        self.text = torch.frombuffer(bytearray(b"\n".join(paths) + b"\n"), dtype=torch.uint8)
        self.ends = torch.tensor([len(path) + 1 for path in paths], dtype=torch.int64).cumsum(0) - 1
        self.labels = torch.tensor(labels, dtype=torch.int64)
        self.lines = torch.tensor(lines, dtype=torch.int32)
        self.classes = []

    def __len__(self) -> int:
        return len(self.labels)

    def path(self, index: int) -> bytes:
        start = int(self.ends[index - 1]) + 1 if index else 0
        return self.text[start : int(self.ends[index])].numpy().tobytes()

    def each_path(self) -> Iterator[bytes]:
        """All paths in order, some at a time: as objects they take several times the memory."""
        for first in range(0, len(self), SLICE):
            # By their ends: a name may hold a newline itself.
            starts = [int(self.ends[first - 1]) + 1 if first else 0, *(self.ends[first : first + SLICE] + 1).tolist()]
            text = self.text[starts[0] : starts[-1]].numpy().tobytes()
            yield from (text[a - starts[0] : b - starts[0] - 1] for a, b in itertools.pairwise(starts))

    def paths(self) -> list[bytes]:
        return list(self.each_path())

    def subset(self, rows: Tensor) -> "ImageList":
        paths = self.paths()
        chosen = [paths[row] for row in rows.tolist()]
        return ImageList(self.name, chosen, self.labels[rows].tolist(), self.lines[rows].tolist())

    def where(self, index: int) -> str:
        place = "" if self.classes else f"{self.name}:{self.lines[index]}: "  # a folder has no lines
        return f"{place}{printable(self.path(index))}"


def file_problem(path: bytes) -> str | None:
    """Why no image can be read from this path, as far as the file system knows; None where it may."""
    try:
        mode = os.stat(path).st_mode
    except OSError as error:
        return "no such image" if isinstance(error, FileNotFoundError) else os_reason(error)
    if stat.S_ISDIR(mode):
        return "is a directory, not an image"
    # One more system call only where the mode does not already say that everybody may read.
    if mode & 0o444 != 0o444 and not os.access(path, os.R_OK):
        return "no permission to read it"
    return None


def missing_hint(path: bytes, list_path: Path) -> str:
    """What most often makes a listed path miss its file."""
    if path[:1] in b"\"'" and path[-1:] == path[:1]:
        return "remove the quotes: paths may hold spaces as they are"
    if path.endswith((b",", b";")):
        return "remove the comma: path and label are separated by white space"
    if b"\\" in path and os.path.exists(path.replace(b"\\", b"/")):
        return "write / instead of \\"
    if os.path.exists(os.path.join(os.fsencode(list_path.parent), path)):
        return f"it lies beside the list: add --root {printable(list_path.parent)}"
    return "paths are relative to the working directory, or to --root DIR"


class ListsError(UserError):
    """All that is wrong in the lists: the first ten problems and their number."""

    def __init__(self, problems: Sequence[str]):
        total = f"{plural(len(problems), 'problem')} in the lists"
        super().__init__(*summarise(problems, total, "mend them and run again"))


def read_text(path: Path) -> bytes:
    """A text file's bytes, known to be UTF-8, without BOM. Raises UserError."""
    name = printable(path)
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise UserError(f"{name}: {os_reason(error)}; name an existing text file") from None

    def line_of(at: int) -> int:
        return raw.count(b"\n", 0, at) + 1

    nul = raw.find(b"\0")
    if raw.startswith((b"\xff\xfe", b"\xfe\xff")) or 0 <= nul < 1000:  # every other byte of English in UTF-16
        raise UserError(f"{name}:1: looks like UTF-16; save it as UTF-8")
    if nul >= 0:
        raise UserError(f"{name}:{line_of(nul)}: holds a NUL byte; not a text list")
    try:
        raw.decode("utf-8")
    except UnicodeDecodeError as error:
        where = f"{name}:{line_of(error.start)}"
        raise UserError(f"{where}: not UTF-8 (Latin-1 or Windows-1252, perhaps); save it as UTF-8") from None
    return raw.removeprefix(b"\xef\xbb\xbf")


def label_problem(fields: Sequence[bytes]) -> str | None:
    """What keeps the last of a line's fields from being a label."""
    label = fields[-1]
    if len(fields) == 1:
        comma = b"," in label or b";" in label
        return f"no label; separate path and label by {'a space, not a comma' if comma else 'white space'}"
    if not label.isdigit():  # of bytes: ASCII digits alone
        return f"label '{printable(label)}' is not a whole number; number the classes 0, 1, 2, ..."
    if len(label) > 18 or int(label) >= MAX_CLASSES:
        return f"label {printable(label)[:24]} is not below {MAX_CLASSES:,}; number the classes 0, 1, 2, ..."
    return None


def read_list(list_path: Path, root: Path, check_files: bool = True) -> tuple[ImageList, list[str]]:
    """Parse `path label` lines. Returns the images and all problems, each as `FILE:LINE: reason; fix`; without
    check_files images may be missing.

    Lines are bytes until they are shown: no locale has a say in them.
    """
    name, prefix = printable(list_path), b"" if root == Path() else os.path.join(os.fsencode(root), b"")
    paths, labels, lines, problems = [], [], [], []
    seen = {}  # path: its place in the list
    repeats = 0
    for number, line in enumerate(read_text(list_path).split(b"\n"), 1):
        fields = line.rsplit(None, 1)
        entry = fields[0].strip() if fields else b"#"
        if entry[:1] == b"#":
            continue
        if problem := label_problem(fields):
            problems.append(f"{name}:{number}: {problem}")
            continue
        entry, label = entry.removeprefix(b"./"), int(fields[1])
        path = os.path.join(prefix, entry) if prefix else entry
        earlier = seen.setdefault(path, len(paths))
        if earlier < len(paths):
            repeats += 1
            if labels[earlier] != label:
                both = f"label {label} here and {labels[earlier]} on line {lines[earlier]}"
                problems.append(f"{name}:{number}: {printable(entry)} has {both}; keep one of the two")
            continue
        if check_files and (problem := file_problem(path)):
            hint = missing_hint(entry, list_path) if problem == "no such image" else "mend or remove the line"
            problems.append(f"{name}:{number}: {printable(entry)}: {problem}; {hint}")
        paths.append(path)
        labels.append(label)
        lines.append(number)
    if not paths and not problems:
        problems.append(f"{name}:1: the list is empty; each line is: path, white space, label")
    if repeats:
        warn(f"{name}: {plural(repeats, 'repeated line')} dropped")
    return ImageList(name, paths, labels, lines), problems


def check_lists(train: ImageList, test: ImageList | None, problems: Sequence[str]) -> None:
    """Raises UserError with the first of the problems that reading found, and of those of both lists together."""
    problems = [*problems]
    known = torch.bincount(train.labels) if len(train) else torch.zeros(1)
    strange = ~torch.isin(test.labels, known.nonzero()) if test and len(train) else torch.zeros(0)
    for index in strange.nonzero().flatten().tolist():
        problems.append(
            f"{test.name}:{test.lines[index]}: label {test.labels[index]} is not in {train.name}; "
            "add training images of it or remove the line"
        )
    if problems:
        raise ListsError(problems)
    if gaps := torch.nonzero(known == 0).flatten().tolist():
        warn(f"{train.name}: no image has label {first_three(gaps)}: its class can never be learned")
    if (known > 0).sum() == 1:
        warn(f"{train.name}: all images have one label: with a single class, 100% right says nothing")
    if single := torch.nonzero(known == 1).flatten().tolist():
        warn(f"{train.name}: only one image has label {first_three(single)}: its class is learned by heart")


def folders_by_label(image_list: ImageList) -> dict[int, set[bytes]]:
    """The folders that images of each label lie in."""
    folders = defaultdict(set)
    for path, label in zip(image_list.each_path(), image_list.labels.tolist(), strict=True):
        folders[label].add(os.path.dirname(path))
    return folders


def class_names(image_list: ImageList, classes_path: Path | None) -> list[str]:
    """One name per class: from the file, else from the folders where they differ by class, else numbers.

    The images' own folders, or those that lie in the one which all images share.
    """
    num_classes = int(image_list.labels.max()) + 1
    if classes_path is not None:
        names = [line.strip() for line in read_text(classes_path).decode().splitlines() if line.strip()]
        if len(names) != num_classes:
            raise UserError(
                f"{printable(classes_path)}: {len(names)} names for {num_classes} classes; write one name a line"
            )
        return names
    if image_list.classes:
        return list(image_list.classes)
    folders, shared = folders_by_label(image_list), b""
    with contextlib.suppress(ValueError):  # some paths are absolute and some are not
        shared = os.path.commonpath({folder for each in folders.values() for folder in each})

    def first_folder(folder: bytes) -> bytes:
        return folder[len(shared) :].strip(b"/").split(b"/")[0]

    for name_of in (os.path.basename, first_folder):
        found = {label: {name_of(folder) for folder in each} for label, each in folders.items()}
        names = [os.fsdecode(next(iter(found[c]))) if len(found.get(c, ())) == 1 else "" for c in range(num_classes)]
        if all(names) and len(set(names)) == num_classes:
            return names
    return [str(label) for label in range(num_classes)]


def check_unreadable(
    image_list: ImageList, unreadable: dict[int, str], max_unreadable: float, stopped: bool = False
) -> None:
    """Warn of each image that could not be read. Raises UserError (status 1) where they are too many.

    stopped: the pass ends here, and what comes later in the list was not looked at.
    """
    lines = [f"{image_list.where(index)}: {reason}" for index, reason in sorted(unreadable.items())]
    if len(lines) > max_unreadable or len(lines) == len(image_list):
        total = f"{image_list.name}: {len(lines):,} of {len(image_list):,} images can't be read"
        if stopped:
            total = f"{image_list.name}: {len(lines):,} images can't be read, more than 1% of the list: stopped there"
        fix = "convert, mend or remove them" if image_list.classes else "mend or remove these lines"
        raise UserError(*summarise(lines, total, fix), status=1)
    for line in lines[:SHOWN_PROBLEMS]:
        warn(f"{line}; skipped")
