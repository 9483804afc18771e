"""Rows: what predict.py prints of each image, for people, for spreadsheets and for programs."""

import codecs
import csv
import io
import itertools
import json
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

from torch import Tensor

from transfer.metrics import ClassificationScores, ScoredImage, ScoredImages, likeliest
from transfer.system.console import Progress, printable


class Answer(NamedTuple):
    """What is found for an image: probabilities (C,), or the reason why there are none; its label where it has one; and
    of a photo to label next its rank, from 1, and what its label is worth.
    """

    path: bytes
    found: Tensor | str
    label: int | None = None
    rank: int | None = None
    worth: float | None = None


def exact_bytes(error: UnicodeEncodeError) -> tuple[bytes, int]:
    """An encoding's error handler: bytes of a path that are no UTF-8 as they were; what no path can hold, escaped."""
    code = ord(error.object[error.start])
    byte = code - 0xDC00
    return bytes([byte]) if 0x80 <= byte <= 0xFF else f"\\u{code:04x}".encode(), error.start + 1


codecs.register_error("exact_bytes", exact_bytes)


def exact_names() -> bool:
    """Have stdout take names as they are, unless it is a terminal. Returns whether it does."""
    exact = not sys.stdout.isatty()
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(newline="")
        if exact:
            sys.stdout.reconfigure(encoding="utf-8", errors="exact_bytes")
    return exact


def csv_writer(columns: Sequence[str]) -> Callable[[Sequence], None]:
    """A function that prints a row of CSV (RFC 4180), below its header.

    In a file or a pipe names are exact: UTF-8, whatever the locale, and bytes that are none as they are. Without a byte
    order mark, which programs would read as part of the first column's name. A terminal gets no control characters.
    """
    exact = exact_names()
    writer = csv.writer(sys.stdout)
    writer.writerow(columns)
    return lambda cells: writer.writerow(
        cells if exact else [printable(each) if isinstance(each, str) else each for each in cells]
    )


def row_printer(
    style: str, classes: Sequence[str], top_k: int, min_prob: float, *, ranks: bool = False
) -> Callable[[Answer], None]:
    """A function that prints one image's row. ranks: with its rank and worth, in place of its true class.

    text: for people, errors on stderr; table: these errors alone, where the table is all that is wanted; paths: the
    path alone, as it is. csv: RFC 4180 with a header, shares to four digits. json: one object per line, all in full.
    """
    count, given = min(top_k, len(classes)), ("rank", "worth") if ranks else ("truth",)
    tops_columns = (f"{column}{number}" for number in range(1, count + 1) for column in ("class", "prob"))
    write_csv = csv_writer(["path", "error", *given, "name", *tops_columns]) if style == "csv" else None
    exact = style == "paths" and exact_names()

    def print_row(answer: Answer) -> None:
        path, found, label, rank, worth = answer
        error = found if isinstance(found, str) else None
        tops = [] if error else likeliest(found, classes, count)
        name = None if error else tops[0][0] if tops[0][1] >= min_prob else "unknown"
        values = (rank, worth) if ranks else (None if label is None else classes[label],)
        if style == "json":
            row = {"path": os.fsdecode(path), "error": error} | dict(zip(given, values, strict=True))
            print(json.dumps(row | {"name": name, "top": [{"class": each, "prob": prob} for each, prob in tops]}))
        elif style == "csv":
            cells = [(each, f"{prob:.4f}") for each, prob in tops] or [(None, None)] * count
            rounded = [f"{value:.4f}" if isinstance(value, float) else value for value in values]
            write_csv([os.fsdecode(path), error, *rounded, name, *itertools.chain(*cells)])
        elif error:
            print(f"error: {printable(path)}: {error}", file=sys.stderr)
        elif style == "paths":
            print(os.fsdecode(path) if exact else printable(path))
        elif style == "text":
            verdict = "unknown: " if name == "unknown" != tops[0][0] else ""
            print(f"{printable(path)}  {verdict}{', '.join(f'{printable(each)} {prob:.1%}' for each, prob in tops)}")

    return print_row


def print_rows(
    answers: Iterable[Answer],
    num_classes: int,
    print_row: Callable[[Answer], None],
    *,
    keep: bool,
    progress: Progress | None,
) -> tuple[ClassificationScores, list[Answer] | ScoredImages, int]:
    """Print a row for each image as soon as it is there. Returns the scores of those with labels; if keep, these or the
    ones to label next, for a page; and how many can't be read.
    """
    scores, proposals, scored, unreadable = ClassificationScores(num_classes), [], ScoredImages(), 0
    for answer in answers:
        print_row(answer)
        sys.stdout.flush()  # somebody may wait for it
        if isinstance(answer.found, str):
            unreadable += 1
        elif answer.label is not None:
            scores.update(answer.label, answer.found)
        if keep and answer.rank:
            proposals.append(answer)
        elif keep and answer.label is not None and not isinstance(answer.found, str):
            scored.add(ScoredImage.of(answer.path, answer.label, answer.found))
        if progress:
            progress.add(1)
    return scores, proposals or scored, unreadable
