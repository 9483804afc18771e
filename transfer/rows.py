"""Rows: what predict.py prints of each image, for people, for spreadsheets and for programs."""

import codecs
import csv
import io
import itertools
import json
import os
import sys
from collections.abc import Callable, Sequence

from torch import Tensor

from transfer.console import printable
from transfer.metrics import likeliest


def exact_bytes(error: UnicodeEncodeError) -> tuple[bytes, int]:
    """An encoding's error handler: bytes of a path that are no UTF-8 as they were; what no path can hold, escaped."""
    code = ord(error.object[error.start])
    byte = code - 0xDC00
    return bytes([byte]) if 0x80 <= byte <= 0xFF else f"\\u{code:04x}".encode(), error.start + 1


codecs.register_error("exact_bytes", exact_bytes)


def csv_writer(classes: int) -> Callable[[Sequence], None]:
    """A function that prints a row of CSV (RFC 4180), below a header for so many classes.

    In a file or a pipe names are exact: UTF-8, whatever the locale, and bytes that are none as they are. Without a byte
    order mark, which programs would read as part of the first column's name. A terminal gets no control characters.
    """
    exact = not sys.stdout.isatty()
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(newline="")
        if exact:
            sys.stdout.reconfigure(encoding="utf-8", errors="exact_bytes")
    writer = csv.writer(sys.stdout)
    writer.writerow(
        ["path", "error", "truth", "name", *(f"{c}{n + 1}" for n in range(classes) for c in ("class", "prob"))]
    )
    return lambda cells: writer.writerow(cells if exact else [each and printable(each) for each in cells])


def row_printer(style: str, classes: Sequence[str], top_k: int, min_prob: float) -> Callable[..., None]:
    """A function that prints one image's row: its path, its true class or None, its probabilities or an error.

    text: for people, errors on stderr; table: these errors alone, where the table is all that is wanted. csv: RFC 4180
    with a header, probabilities to four digits. json: one object per line, probabilities in full.
    """
    count = min(top_k, len(classes))
    write_csv = csv_writer(count) if style == "csv" else None

    def print_row(path: bytes, truth: str | None, found: Tensor | str) -> None:
        error = found if isinstance(found, str) else None
        tops = [] if error else likeliest(found, classes, count)
        name = None if error else tops[0][0] if tops[0][1] >= min_prob else "unknown"
        if style == "json":
            top = [{"class": each, "prob": prob} for each, prob in tops]
            print(json.dumps({"path": os.fsdecode(path), "error": error, "truth": truth, "name": name, "top": top}))
        elif style == "csv":
            cells = [(each, f"{prob:.4f}") for each, prob in tops] or [(None, None)] * count
            write_csv([os.fsdecode(path), error, truth, name, *itertools.chain(*cells)])
        elif error:
            print(f"error: {printable(path)}: {error}", file=sys.stderr)
        elif style == "text":
            verdict = "unknown: " if name == "unknown" != tops[0][0] else ""
            print(f"{printable(path)}  {verdict}{', '.join(f'{printable(each)} {prob:.1%}' for each, prob in tops)}")

    return print_row
