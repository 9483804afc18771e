"""Corrections: text lists that change labels, leave images out or add some, whatever the lists and folders say."""

import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from transfer.inputs.labels import is_path_alone, same_name, split_lines, split_table
from transfer.inputs.lists import ImageList, as_stored, listed_problem, read_text
from transfer.system.console import first_three, plural, printable

LEAVE_OUT = "-"  # in a label's place


class ClassLabels:
    """What stands for a class in corrections: its name, with --classes its folder's too, or its number.

    named: the lists' own labels are names, and so a number that is a class's name means that class.
    """

    def __init__(self, classes: Sequence[str], folders: Sequence[str], named: bool):
        self.classes, self.named, self.places = classes, named, {}
        for names in (classes, folders):
            for label, name in enumerate(names):
                self.places.setdefault(same_name(name), label)

    @classmethod
    def of_model(cls, metadata: dict) -> "ClassLabels":
        """Those of a checkpoint, as it was trained."""
        classes = metadata["classes"]
        return cls(classes, metadata.get("folders", classes), metadata.get("label_names", False))

    def find(self, text: str) -> int | None:
        """The label of a name or number; None where there is no such class."""
        is_number = text.isascii() and text.isdigit()
        if is_number and not (self.named and text in self.places):
            return int(text) if len(text) < 9 and int(text) < len(self.classes) else None
        return self.places.get(same_name(text))

    def problem(self, fields: Sequence[bytes]) -> str | None:
        """What keeps the last of a line's fields from naming a class, or from leaving out."""
        text = fields[-1].decode()
        if len(fields) == 1 or is_path_alone(fields):
            return f"no label; each line is: path, white space, class or {LEAVE_OUT}"
        if text == LEAVE_OUT or self.find(text) is not None:
            return None
        if text.isascii() and text.isdigit():
            return f"no class has the number {printable(text)[:24]}; there are {len(self.classes)}, from 0"
        for label, name in enumerate(self.classes):
            if name.split()[1:] and same_name(name.split()[-1]) == same_name(text):
                return f"a name with spaces needs a tab before it; or write for {printable(name)} its number, {label}"
        some = first_three([printable(name) for name in self.classes])
        return f"no class is called {printable(text)}; there are {some}"

    def text(self, label: int) -> str | None:
        """What to write for a class, its name if a line can hold it, else its number; None where neither means it."""
        for text in (self.classes[label], str(label)):
            plain = text.isprintable() and text.split() == [text] and text != LEAVE_OUT
            if plain and not is_path_alone([b"", text.encode()]) and self.find(text) == label:
                return text
        return None


class Correction(NamedTuple):
    """A line: where it stands, its path as written and as it is read, and the label; None to leave the image out."""

    where: str
    entry: bytes
    path: bytes
    label: int | None


@dataclass
class Corrections:
    """The lines of some files, by absolute path, and what applying them did so far.

    labels: what stands for a class in them; problems: each as `FILE:LINE: reason; fix`; counts: of labels changed
    (`labels`), images `left_out` and `added`, and labels that were so before (`unchanged`); elsewhere: how many of
    these are of each list that is not trained on.
    """

    files: Sequence[Path]
    labels: ClassLabels
    by_path: dict[bytes, Correction] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    counts: Counter = field(default_factory=Counter)
    elsewhere: Counter = field(default_factory=Counter)

    def apply(self, image_list: ImageList) -> tuple[ImageList, Sequence[int], set[bytes]]:
        """A list as corrected, which of its rows are left, and the absolute paths of what was corrected."""
        if not self.by_path:
            return image_list, range(len(image_list)), set()
        labels, left_out, used = image_list.labels.tolist(), set(), set()
        for row, path in enumerate(image_list.each_path()):
            if correction := self.by_path.get(key := os.path.abspath(path)):
                used.add(key)
                if correction.label is None:
                    left_out.add(row)
                elif correction.label == labels[row]:
                    self.counts["unchanged"] += 1
                else:
                    self.counts["labels"] += 1
                    labels[row] = correction.label
        self.counts["left_out"] += len(left_out)
        rows = [row for row in range(len(image_list)) if row not in left_out]
        columns = image_list.paths(), labels, image_list.lines.tolist()
        return image_list.replaced(*([column[row] for row in rows] for column in columns)), rows, used

    def apply_to_all(self, train: ImageList, held_out: Sequence[ImageList]) -> list[ImageList]:
        """All lists as corrected; images that none of them holds are added to the training images, and what is wrong
        with these to the problems.
        """
        (corrected, _, used), others = self.apply(train), []
        for image_list in held_out:
            other, _, more = self.apply(image_list)
            others.append(other)
            self.elsewhere[image_list.name] += len(more)
            used |= more
        added = self.missing_images(used)
        self.counts["added"] += len(added)
        if added:
            paths, labels = zip(*added, strict=True)
            labels, lines = corrected.labels.tolist() + [*labels], corrected.lines.tolist() + [0] * len(added)
            corrected = corrected.replaced([*corrected.paths(), *paths], labels, lines)
        for before, after in zip((train, *held_out), (corrected, *others), strict=True):
            if len(before) and not len(after):
                self.problems.append(f"{after.name}: corrections leave out all of its images; keep some")
        return [corrected, *others]

    def missing_images(self, used: set[bytes]) -> list[tuple[bytes, int]]:
        """Paths and labels of the images that are in no list, since those have the absolute paths used; files that are
        none are problems.
        """
        added = []
        for where, entry, path, label in (each for key, each in self.by_path.items() if key not in used):
            if problem := listed_problem(entry, path, Path(where.rpartition(":")[0])):
                self.problems.append(f"{where}: {problem}")
            elif label is not None:
                added.append((path, label))
        return added

    def describe(self) -> str:
        """What was corrected, in words."""
        counts = self.counts
        parts = [plural(counts["labels"], "label")] if counts["labels"] or not counts.total() else []
        for key, words in (("left_out", "left out"), ("added", "added"), ("unchanged", "as they were")):
            parts += [f"{counts[key]:,} {words}"] if counts[key] else []
        inside = [f"{count:,} of them in {name}" for name, count in self.elsewhere.items() if count]
        files = ", ".join(map(printable, self.files))
        return f"corrections {', '.join(parts)} ({files}){'; ' if inside else ''}{', '.join(inside)}"


def find_image(entry: bytes, root: Path) -> bytes:
    """Where the image of a line lies: its path begins in root as in the lists, or else where the run was started, as
    those of folders, and as all are printed.
    """
    joined = as_stored(entry if root == Path() else os.path.join(os.fsencode(root), entry))
    plain = as_stored(entry)
    return plain if os.path.exists(plain) and not os.path.exists(joined) else joined


def split_fields(file: Path) -> Iterator[tuple[str, list[bytes]]]:
    """Where each line of a text list or CSV stands, and its fields. Raises UserError."""
    name, content = printable(file), read_text(file)
    lines = split_table(name, content, True) if file.suffix.lower() == ".csv" else split_lines(content, "names")
    return ((f"{name}:{number}", fields) for number, fields in lines)


def read_corrections(files: Sequence[Path], root: Path, labels: ClassLabels) -> Corrections:
    """The lines of files, each `path label`, of which a later file's count, with all that is wrong in them. Raises
    UserError where one is no text.
    """
    found = Corrections(files, labels)
    for file in files:
        lines = {}
        for where, fields in split_fields(file):
            if problem := labels.problem(fields):
                found.problems.append(f"{where}: {problem}")
                continue
            entry, text = fields[0].removeprefix(b"./") or fields[0], fields[-1].decode()
            path = find_image(entry, root)
            new = Correction(where, entry, path, None if text == LEAVE_OUT else labels.find(text))
            old = lines.setdefault(os.path.abspath(path), new)
            if old.label != new.label:
                here, there = (
                    LEAVE_OUT if label is None else printable(labels.classes[label]) for label in (new.label, old.label)
                )
                problem = f"{printable(entry)} is {here} here and {there} in {old.where}; keep one"
                found.problems.append(f"{where}: {problem}")
        found.by_path |= lines
    return found
