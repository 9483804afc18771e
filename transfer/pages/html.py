"""Pages: one HTML file each, its text made safe, its charts and thumbnails inline.

A page opens by a double click, asks nothing of any network, and prints. It has no script, or one, inline and allowed by
its hash alone, without which all is there to read.
"""

import base64
import hashlib
import html
import io
import math
from collections.abc import Iterable, Sequence
from pathlib import Path

from transfer.inputs.images import GREY_BITS, ImageError, read_image
from transfer.system.console import printable

THUMBNAIL = 112  # pixels of the longer side
THUMBNAIL_BYTES = 20_000_000  # of a page's photos
SHELF = 100  # cards that are open at once
WIDTH, HEIGHT = 420, 270  # of a chart, in its own units; the page scales it
LEFT, TOP, RIGHT, BOTTOM = 44, 38, 400, 230  # of a chart's plot
STYLE = Path(__file__).with_name("style.css").read_text(encoding="utf-8")


# Letters and numbers


def escape(value: object) -> str:
    """Any value as text that is safe in HTML: names come from file systems, and may hold anything."""
    return html.escape(printable(value if isinstance(value, bytes) else str(value)))


def number(value: object, form: str) -> str:
    """A figure in a format, the plain value where it is no number."""
    return format(value, form) if isinstance(value, (int, float)) else escape(value)


def ticks(high: float, least: float = 0.0) -> list[float]:
    """Round numbers from 0 to high or just above, a few of them, `least` or more apart."""
    raw = max(high / 5, least, 1e-9)
    scale = 10.0 ** math.floor(math.log10(raw) + 1e-9)
    step = next(factor * scale for factor in (1, 2, 5, 10) if factor * scale > raw * (1 - 1e-9))
    return [step * count for count in range(math.ceil(high / step - 1e-9) + 1)]


# Pieces of charts


def svg(width: float, height: float, label: str, body: str, *, attributes: str = "") -> str:
    """An SVG with its text alternative (plain text, escaped here)."""
    return (
        f'<svg viewBox="0 0 {width:g} {height:g}" role="img" aria-label="{html.escape(label)}"{attributes}>{body}</svg>'
    )


def svg_text(x: float, y: float, text: str, kind: str = "") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" class="{kind}">{text}</text>'


def svg_line(start: tuple[float, float], end: tuple[float, float], kind: str) -> str:
    return f'<path class="{kind}" d="M{start[0]:.1f} {start[1]:.1f}L{end[0]:.1f} {end[1]:.1f}"/>'


def axes(across: Iterable[tuple[float, str]], up: Iterable[tuple[float, str]], name: str) -> str:
    """A base line, and the labels at their places of 0 to 1 along either side of the plot."""
    parts = []
    for place, text in up:
        y = BOTTOM - place * (BOTTOM - TOP)
        parts += [svg_line((LEFT, y), (RIGHT, y), "grid"), svg_text(LEFT - 8, y + 4, text, "end")]
    for place, text in across:
        parts.append(svg_text(LEFT + place * (RIGHT - LEFT), BOTTOM + 18, text, "mid"))
    parts += [svg_line((LEFT, BOTTOM), (RIGHT, BOTTOM), "axis"), svg_text((LEFT + RIGHT) / 2, HEIGHT - 4, name, "mid")]
    return "".join(parts)


def scroller(name: str, body: str, classes: int) -> str:
    """What is wider than a small screen scrolls by itself, by keyboard too; with many classes also up and down."""
    kind = "scroll tall" if classes > 40 else "scroll"
    return f'<div class="{kind}" tabindex="0" role="region" aria-label="{name}">{body}</div>'


def class_table(key: str, heads: Sequence[str], rows: Iterable[tuple[str, float, Sequence[str]]], classes: int) -> str:
    """A table of classes: for each its name, the share that its bar shows, and its other cells, safe in HTML.

    heads: of the name and of the cells; classes: how many rows there are.
    """
    body = "".join(
        f'<tr><td title="{escape(name)}">{escape(name)}</td><td class="bar"><span style="--share:{share:.1%}"></span>'
        f"</td>{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>"
        for name, share, cells in rows
    )
    head = "".join(f'<th scope="col">{name}</th>' for name in (heads[0], "", *heads[1:]))
    table = f'<table id="{key}"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>'
    return scroller("Classes", table, classes)


# Photos


def thumbnail(path: bytes, alt: str, grey_bits: int) -> str:
    """The image in small, or a grey square that says why not."""
    try:
        image = read_image(path, grey_bits)
    except ImageError as error:
        return f'<div class="image" role="img" aria-label="{escape(error)}">can’t be read</div>'
    image.thumbnail((THUMBNAIL, THUMBNAIL))
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=82)
    source = base64.b64encode(buffer.getvalue()).decode()
    size = f'width="{image.width}" height="{image.height}"'
    return f'<div class="image"><img src="data:image/jpeg;base64,{source}" {size} alt="{alt}"></div>'


class Thumbnails:
    """The photos of a page in small, as long as they take no more than 20 MB together; cut: how many were left out.

    grey_bits: of 16-bit greyscale, as the model sees it.
    """

    def __init__(self, grey_bits: int = GREY_BITS):
        self.grey_bits, self.size, self.cut = grey_bits, 0, 0

    def draw(self, path: bytes, alt: str) -> str:
        """As `thumbnail`; or a grey square in its place."""
        if self.size > THUMBNAIL_BYTES:
            self.cut += 1
            return f'<div class="image" role="img" aria-label="{alt}">left out</div>'
        drawn = thumbnail(path, alt, self.grey_bits)
        self.size += len(drawn)
        return drawn

    def describe_cut(self) -> str:
        """What is not there, as a sentence; nothing where all are."""
        words = "picture is" if self.cut == 1 else "pictures are"
        return f" To keep this page small, {self.cut:,} {words} left out." if self.cut else ""


def shelves(cards: Sequence[str]) -> str:
    """Cards a hundred at a time: the first open, the others folded, to open with or without scripts."""
    parts = []
    for first in range(0, len(cards), SHELF):
        shelf = cards[first : first + SHELF]
        shown = f'<ul class="cards">{"".join(shelf)}</ul>'
        words = f"{first + 1:,} to {first + len(shelf):,} of {len(cards):,}"
        parts.append(f"<details><summary>{words}</summary>{shown}</details>" if first else shown)
    return "".join(parts)


# The page


def page(title: str, header: str, sections: Sequence[tuple[str, str, str]], *, foot: str = "", script: str = "") -> str:
    """The document; sections: (name, body, kind); foot: what comes after them, with the script that runs it."""
    body = "".join(f'<section class="{kind}"><h2>{name}</h2>{content}</section>' for name, content, kind in sections)
    policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    if foot:
        policy += f"; script-src 'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'"
        foot += f"<script>{script}</script>"
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{title}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n<header>{header}</header>\n"
        f"<main>{body}</main>\n{foot}\n</body>\n</html>\n"
    )
