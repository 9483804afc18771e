"""Labels: what a line of a list says of its image's class, a number or a name."""

import csv
import io
import re
import unicodedata
from collections.abc import Iterable, Iterator, Sequence

from transfer.inputs.formats import SUFFIXES
from transfer.system.console import UserError, printable

MAX_CLASSES = 100_000  # beyond this a label is a slip of the pen, and its head would not fit
NUMBERED = re.compile(rb"^[^\S\n]*[^#\s].*[^\S\n]\d+[^\S\n]*$", re.MULTILINE)  # a line that ends in a whole number
SUFFIX_BYTES = tuple(map(str.encode, SUFFIXES))
PATH_COLUMNS = ("path", "filename", "file", "filepath", "image", "image_path")
LABEL_COLUMNS = ("label", "class", "category", "target")


def same_name(name: str) -> str:
    """One form of names that differ only in composed and decomposed letters, as a Mac's archive on Linux has them."""
    return unicodedata.normalize("NFC", name)


def sort_names(names: Iterable[str]) -> list[str]:
    """Class names in the order of their labels: by number where all are numbers, else as text."""
    names = list(names)
    if all(name.isascii() and name.isdigit() for name in names):
        return sorted(names, key=lambda name: (len(name.lstrip("0")), name.lstrip("0"), name))
    return sorted(names)


def is_path_alone(fields: Sequence[bytes]) -> bool:
    """Whether a line holds a path and no label."""
    ends_as_image = fields[-1].decode().lower().endswith(SUFFIXES)
    return ends_as_image or len(fields) == 1 and not re.search(rb"[,;]\w*$", fields[0])


def looks_numeric(label: str) -> bool:
    """Whether a label would be a number of some kind, as -1 or 1.0."""
    return re.fullmatch(r"[+-]?(\d[\d_]*\.?\d*|\.\d+|0x[\da-f]+)(e[+-]?\d+)?", label, re.IGNORECASE) is not None


class Labels:
    """The labels of a list: of each image so far its class, from 0.

    kind: 'numbers', 'names' or 'none', where a list holds paths alone; of_table: whether it is a CSV.
    """

    def __init__(self, kind: str, of_table: bool = False):
        self.kind, self.of_table, self.values, self.places = kind, of_table, [], {}

    def problem(self, fields: Sequence[bytes]) -> str | None:
        """What keeps the last of a line's fields from being a label."""
        label = fields[-1]
        if self.kind == "none":
            return None
        if len(fields) == 1 or is_path_alone(fields):
            if self.of_table:
                return "no label in this row; add it, or remove the row"
            comma, first = b"," in label or b";" in label, ", the path first" if len(fields) > 1 else ""
            return f"no label; separate path and label by {'a space, not a comma' if comma else f'white space{first}'}"
        if self.kind == "names" and not looks_numeric(label.decode()):
            full = len(self.places) >= MAX_CLASSES and same_name(label.decode()) not in self.places
            return (
                f"more than {MAX_CLASSES:,} names of classes; each line is: path, white space, label" if full else None
            )
        if not label.isdigit():  # of bytes: ASCII digits alone
            return f"label '{printable(label)}' is not a whole number; number the classes 0, 1, 2, ..."
        if len(label) > 18 or int(label) >= MAX_CLASSES:
            return f"label {printable(label)[:24]} is not below {MAX_CLASSES:,}; number the classes 0, 1, 2, ..."
        return None

    def number(self, fields: Sequence[bytes]) -> int:
        """The class of a line without a problem; of names in the order in which they came."""
        if self.kind == "numbers":
            return int(fields[-1])
        return self.places.setdefault(same_name(fields[-1].decode()), len(self.places)) if self.kind == "names" else 0

    def show(self, number: int) -> str:
        """A class as the list has it."""
        return printable(list(self.places)[number]) if self.kind == "names" else str(number)


# Lines: path, white space, label


def split_at_tab(line: bytes) -> list[bytes] | None:
    """An image's name and what stands behind a tab after it, as a spreadsheet copies two cells; None without those."""
    path, _, name = line.rpartition(b"\t")
    return [path, name.strip()] if path.strip().lower().endswith(SUFFIX_BYTES) and name.strip() else None


def split_lines(content: bytes, kind: str) -> Iterator[tuple[int, list[bytes]]]:
    """The number of each line that is no comment, with its path and its label if it has one.

    kind: 'names' where a tab may come before a name with spaces; 'none' without labels.
    """
    for number, line in enumerate(content.split(b"\n"), 1):
        fields = split_at_tab(line) if kind == "names" else None
        fields = fields or ([line.strip()] if kind == "none" else line.rsplit(None, 1))
        entry = fields[0].strip() if fields else b"#"
        if entry and entry[:1] != b"#":
            yield number, [entry, *fields[1:]]


def kind_of_lines(content: bytes, need_labels: bool) -> str:
    """What labels the lines of a list have: numbers where any has one; but names that end in numbers are names, where
    all lines have a tab before them.
    """
    if b"\t" in content:
        lines = [line for line in content.split(b"\n") if line.strip() and line.strip()[:1] != b"#"]
        cells = [split_at_tab(line) for line in lines]
        if all(cells) and not all(looks_numeric(name.decode()) for _, name in cells):
            return "names"
    if NUMBERED.search(content):
        return "numbers"
    alone = [is_path_alone(fields) for _, fields in split_lines(content, "")]
    if alone and all(alone):
        return "numbers" if need_labels else "none"  # so that the missing ones are told
    numeric = [looks_numeric(fields[-1].decode()) for _, fields in split_lines(content, "") if len(fields) == 2]
    return "names" if not all(numeric) else "numbers"


# Tables: a header, and a row per image


def split_table(name: str, content: bytes, need_labels: bool = False) -> Iterator[tuple[int, list[bytes]]]:
    """The line number of each row of a CSV, with its path and its label if it has one. Raises UserError."""
    delimiter = ";" if b";" in content.split(b"\n", 1)[0] else ","
    rows = csv.reader(io.StringIO(content.decode(), newline=""), delimiter=delimiter)
    try:
        header = [cell.strip().lower() for cell in next(rows, [])]
        columns = [
            next((header.index(each) for each in of if each in header), None) for of in (PATH_COLUMNS, LABEL_COLUMNS)
        ]
        if columns[0] is None:
            raise UserError(f"{name}:1: no column is called path or filename; write path,label in the first line")
        if need_labels and columns[1] is None:
            raise UserError(f"{name}:1: no column is called label or class; write path,label in the first line")
        for row in rows:
            fields = [row[column].strip().encode() for column in columns if column is not None and column < len(row)]
            if fields and fields[0]:
                yield rows.line_num, [each for each in fields if each]
    except csv.Error as error:
        raise UserError(f"{name}:{rows.line_num}: damaged CSV ({error}); save it again as CSV in UTF-8") from None


def kind_of_table(name: str, content: bytes, need_labels: bool) -> str:
    """What labels the rows of a CSV have: numbers where any has one."""
    labels = {fields[1] for _, fields in split_table(name, content, need_labels) if len(fields) == 2}
    if any(label.isdigit() for label in labels) or not labels and need_labels:
        return "numbers"
    return "names" if labels else "none"
