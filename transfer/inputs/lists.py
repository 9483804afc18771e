"""Lists: text files of `path label` lines, checked, and divided by class."""

import itertools
import os
import re
import stat
import unicodedata
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from transfer.inputs.formats import HEAD, format_of
from transfer.inputs.labels import Labels, kind_of_lines, kind_of_table, sort_names, split_lines, split_table
from transfer.system.console import (
    SHOWN_PROBLEMS,
    UserError,
    first_three,
    nearest_path,
    os_reason,
    plural,
    printable,
    quoted,
    summarise,
    warn,
    warn_once,
)

LIST_SUFFIXES = (".txt", ".csv")
SLICE = 10_000  # paths that are taken apart at a time


class ImageList:
    """A parsed list of n images. Tensors rather than objects, so that workers share one copy.

    text: all paths as bytes, joined by newlines; ends: (n,) where each ends in it;
    labels: (n,) from 0; lines: (n,) line numbers in the list file `name`, 0 of what is in none;
    classes: the names of labels, where these come from names; is_folder: of class folders, which has no lines;
    labelled: False where a list holds paths alone, or labels that are none of the training images'.
    """

    def __init__(self, name: str, paths: Sequence[bytes], labels: Sequence[int], lines: Sequence[int]):
        self.name = name
        self.text = torch.frombuffer(bytearray(b"\n".join(paths) + b"\n"), dtype=torch.uint8)
        self.ends = torch.tensor([len(path) + 1 for path in paths], dtype=torch.int64).cumsum(0) - 1
        self.labels = torch.tensor(labels, dtype=torch.int64)
        self.lines = torch.tensor(lines, dtype=torch.int32)
        self.classes, self.is_folder, self.labelled = [], False, True

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

    def replaced(self, paths: Sequence[bytes], labels: Sequence[int], lines: Sequence[int]) -> "ImageList":
        """Other images under the same name, of the same kind."""
        other = ImageList(self.name, paths, labels, lines)
        other.classes, other.is_folder, other.labelled = self.classes, self.is_folder, self.labelled
        return other

    def labelled_by(self, labels: Labels) -> "ImageList":
        """This list, its labels in the order of their names where they are names."""
        self.labelled = labels.kind != "none"
        if labels.kind == "names":
            self.classes = list(labels.places)
            set_classes(self, sort_names(labels.places))
        return self

    def line(self, index: int) -> int | None:
        """An image's line in the list; None of a folder, which has none, and of what corrections add."""
        return None if self.is_folder else int(self.lines[index]) or None

    def where(self, index: int) -> str:
        place = f"{self.name}:{line}: " if (line := self.line(index)) else ""
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
        return f"it lies beside the list: add --root {quoted(list_path.parent)}"
    if any(os.path.isfile(path[: space.start()]) for space in re.finditer(rb"\s", path)):
        return "a class name with spaces needs a tab before it"
    return "paths are relative to the working directory, or to --root DIR"


def listed_problem(entry: bytes, path: bytes, list_path: Path) -> str | None:
    """What is wrong with the file of a line, and what to do; None where it may be an image. entry: as it is written."""
    if not (problem := file_problem(path)):
        return None
    hint = missing_hint(entry, list_path) if problem == "no such image" else "fix or remove the line"
    return f"{printable(entry)}: {problem}; {hint}"


class ListsError(UserError):
    """All that is wrong in the lists: the first ten problems and their number."""

    def __init__(self, problems: Sequence[str]):
        total = f"{plural(len(problems), 'problem')} found"
        super().__init__(*summarise(problems, total, "fix and run again"))


def read_text(path: Path) -> bytes:
    """A text file's bytes, known to be UTF-8, without BOM. Raises UserError."""
    name = printable(path)
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise UserError(f"{name}: {os_reason(error)}{nearest_path(path) or '; name an existing text file'}") from None

    def line_of(at: int) -> int:
        return raw.count(b"\n", 0, at) + 1

    nul = raw.find(b"\0")
    if nul >= 0 and (kind := format_of(raw[:HEAD])):
        raise UserError(f"{name}: an image ({kind}), not a text file; name a list, or a folder")
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


def as_stored(path: bytes) -> bytes:
    """The path under which a file lies whose name differs only in composed and decomposed letters; else as it is."""
    if path.isascii() or os.path.exists(path):
        return path
    found = b"/" if path.startswith(b"/") else b""
    for part in os.fsdecode(path).split("/"):
        forms = [os.path.join(found, os.fsencode(unicodedata.normalize(form, part))) for form in ("NFC", "NFD")]
        found = next(filter(os.path.exists, forms), os.path.join(found, os.fsencode(part)))
    return found if os.path.exists(found) else path


def read_list(list_path: Path, root: Path, check_files: bool = True) -> tuple[ImageList, list[str]]:
    """Parse a list. Returns the images and all problems, each as `FILE:LINE: reason; fix`; without check_files, as to
    predict, images may be missing, and all labels.

    Lines are bytes until they are shown: no locale has a say in them.
    """
    name, prefix = printable(list_path), b"" if root == Path() else os.path.join(os.fsencode(root), b"")
    content, is_csv = read_text(list_path), list_path.suffix.lower() == ".csv"
    kind = kind_of_table(name, content, check_files) if is_csv else kind_of_lines(content, check_files)
    labels, paths, lines, problems = Labels(kind, is_csv), [], [], []
    seen, repeats = {}, 0  # seen: each path's place in the list
    for number, fields in split_table(name, content) if is_csv else split_lines(content, kind):
        if problem := labels.problem(fields):
            problems.append(f"{name}:{number}: {problem}")
            continue
        entry = fields[0].removeprefix(b"./") or fields[0]
        path = as_stored(os.path.join(prefix, entry) if prefix else entry)
        earlier = seen.setdefault(path, len(paths))
        if earlier < len(paths):
            repeats += 1
            if (before := labels.values[earlier]) != labels.number(fields):
                here = labels.show(labels.number(fields))
                both = f"label {here} here and {labels.show(before)} on line {lines[earlier]}"
                problems.append(f"{name}:{number}: {printable(entry)} has {both}; keep one of the two")
            continue
        if check_files and (problem := listed_problem(entry, path, list_path)):
            problems.append(f"{name}:{number}: {problem}")
        paths.append(path)
        labels.values.append(labels.number(fields))
        lines.append(number)
    if not paths and not problems:
        problems.append(f"{name}:1: the list is empty; each line is: path, white space, label")
    if repeats:
        warn_once(f"{name}: {plural(repeats, 'repeated line')} dropped")
    return ImageList(name, paths, labels.values, lines).labelled_by(labels), problems


def why_unlistable(path: bytes) -> str | None:
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


def list_entry(path: bytes) -> bytes:
    """A path as a line of a list names it."""
    return b"./" + path if path[:1].isspace() or path.startswith((b"#", b"./")) else path


def set_classes(image_list: ImageList, names: Sequence[str]) -> None:
    """Give the labels of an image list their places among these names, which hold all of its own."""
    places = {name: label for label, name in enumerate(names)}
    if len(image_list):
        image_list.labels = torch.tensor([places[name] for name in image_list.classes])[image_list.labels]
    image_list.classes = list(names)


def check_lists(train: ImageList, held_out: Sequence[ImageList], problems: Sequence[str]) -> None:
    """Raises UserError with the first of the problems that reading found, and of those of all lists together."""
    problems = [*problems]
    known = torch.bincount(train.labels, minlength=len(train.classes)) if len(train) else torch.zeros(1)
    for test in (each for each in held_out if len(train) and each.labelled):
        for index in (~torch.isin(test.labels, known.nonzero())).nonzero().flatten().tolist():
            missing = of_classes(train, [int(test.labels[index])])
            why = f"{train.name} has no image {missing}; add some, or leave this image out"
            problems.append(f"{test.where(index)}: {why}")
    if problems:
        raise ListsError(problems)
    gaps = torch.nonzero(known == 0).flatten().tolist()
    if gaps == [*range(len(gaps))] != []:
        none = f"no image has label {first_three(gaps)}"
        warn(f"{train.name}: labels start at {len(gaps)}, not at 0: {none}")
    elif gaps:
        warn(f"{train.name}: no image {of_classes(train, gaps)}, which can't be learned; add some")
    if single := torch.nonzero(known == 1).flatten().tolist():
        warn(f"{train.name}: only one image {of_classes(train, single)}, too few to learn from; add some")


def of_classes(image_list: ImageList, labels: Sequence[int]) -> str:
    """What its images are called that have these labels: of a class by its name, where it has one."""
    if max(labels) >= len(image_list.classes):  # numbers, which are the labels of a list of numbers alone
        return f"with label {first_three(labels)}"
    return f"of class {first_three([printable(image_list.classes[label]) for label in labels])}"


def most_unreadable(train: ImageList) -> int:
    """How many of the training images may be skipped because they can't be read: one in a hundred, at least one."""
    return max(1, len(train) // 100)


def check_unreadable(
    image_list: ImageList, unreadable: dict[int, str], max_unreadable: int, stopped: bool = False
) -> None:
    """Warn of each image that could not be read. Raises UserError (status 1) where they are too many.

    stopped: the pass ends here, and what comes later in the list was not looked at.
    """
    lines = [f"{image_list.where(index)}: {reason}" for index, reason in sorted(unreadable.items())]
    if len(lines) > max_unreadable or len(lines) == len(image_list):
        most = f" (at most {max_unreadable:,} may be skipped)" if max_unreadable else ""
        total = f"{image_list.name}: {len(lines):,} of {len(image_list):,} images can't be read{most}"
        if stopped:
            total = f"{image_list.name}: {len(lines):,} images can't be read, more than 1% of the list: stopped there"
        fix = "convert, fix or remove them" if image_list.is_folder else "fix or remove these lines"
        raise UserError(*summarise(lines, total, fix), status=1)
    for line in lines[:SHOWN_PROBLEMS]:
        warn(f"{line}; skipped")
    if len(lines) > SHOWN_PROBLEMS:
        total = f"{len(lines):,} of {len(image_list):,} images can't be read and are skipped"
        warn(f"{image_list.name}: {total}, {SHOWN_PROBLEMS} of them shown")
