"""The report: a page that shows what a classifier gets right and wrong, for predict.py."""

import csv
import html
import math
import os
from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from transfer.inputs.images import GREY_BITS
from transfer.metrics import (
    BINS,
    NONE,
    ClassificationScores,
    ScoredImage,
    ScoredImages,
    calibration_bins,
    percent,
    rounded_percent,
)
from transfer.pages.html import (
    BOTTOM,
    HEIGHT,
    LEFT,
    RIGHT,
    TOP,
    WIDTH,
    Thumbnails,
    axes,
    class_table,
    escape,
    number,
    page,
    scroller,
    svg,
    svg_line,
    svg_text,
    ticks,
)
from transfer.system.console import letters, shortened
from transfer.system.files import history_path, path_digest, save_atomically

HITS = 12  # images shown
MAX_DROPS = 12  # of the learning rate that are marked
FEW = 10  # images below which a share says little
ENOUGH_IMAGES = 100  # for a calibration error: by chance alone it is some 15 points of 15 images
CELLS = ((24, 34, 12), (60, 23, 11), (math.inf, 15, 9.5))  # matrix: classes up to, cell and letter size in pixels
MATRIX_NAME_WIDTH = 22  # letters of a class name beside it
PRINT_WIDTH = 660  # pixels of A4 between its margins
MAX_MATRIX_CLASSES = 1000  # classes: a larger matrix is read by nobody


# The header


def interval_strip(value: float, interval: tuple[float, float]) -> str:
    """A share on a line from 0 to 100%, its interval around it."""
    low, high = (400 * end for end in interval)
    body = (
        '<rect class="track" y="4.5" width="400" height="3" rx="1.5"/>'
        f'<rect class="span" x="{low:.1f}" y="1" width="{high - low:.1f}" height="10" rx="2"/>'
        f'<rect class="blue" x="{min(397, max(0, 400 * value - 1.5)):.1f}" width="3" height="12"/>'
    )
    label = f"{value:.2%} on a line from 0 to 100%, 95% interval {interval[0]:.1%} to {interval[1]:.1%}"
    return svg(400, 12, label, body, attributes=' preserveAspectRatio="none"')


def headline(scores: ClassificationScores, ece: float) -> str:
    """The accuracy, large, beside top-3 accuracy and calibration error."""
    figures = (
        ("Accuracy", 'id="accuracy"', scores.accuracy, scores.accuracy_interval),
        ("Top-3 accuracy", 'class="big"', scores.top3, scores.top3_interval),
    )
    parts = [
        f'<div><p class="name">{name}</p><span {kind}>{rounded_percent(value, interval)}</span>'
        f"{interval_strip(value, interval)}<p>95% interval {rounded_percent(interval[0], interval)} to "
        f"{rounded_percent(interval[1], interval)}</p></div>"
        for name, kind, value, interval in figures
    ]
    figure, words = NONE, "too few photos to tell"
    if scores.count >= ENOUGH_IMAGES:
        figure = f"{ece:.1%}"
        words = f"‘80% sure’ should mean right 8 times in 10; it is off by {100 * ece:.1f} points on average"
    parts.append(f'<div><p class="name">Calibration error</p><span class="big">{figure}</span><p>{words}</p></div>')
    return f'<div class="stats">{"".join(parts)}</div>'


def facts(metadata: dict) -> str:
    """What the checkpoint says of itself; what it does not say is left out."""
    found = [
        (name, number(metadata[key], form) + unit)
        for key, name, form, unit in (
            ("date", "Trained", "", ""),
            ("backbone", "Backbone", "", ""),
            ("train_images", "Training images", ",", ""),
            ("test_images", "Test images", ",", ""),
            ("epoch", "Epoch kept", "", ""),
            ("chosen_on", "Epoch chosen on", "", ""),
            ("accuracy", "Accuracy at that epoch", ".2%", ""),
            ("recall", "Macro recall at that epoch", ".2%", ""),
            ("seconds", "Training time", ",.1f", " s"),
            ("device", "Device", "", ""),
            ("precision", "Precision", "", ""),
        )
        if metadata.get(key) is not None
    ]
    recipe = metadata.get("recipe")
    settings = recipe.items() if isinstance(recipe, dict) else ()
    settings = [(escape(key), escape(value)) for key, value in settings if key not in metadata]
    lists = (("", found), (' class="recipe"', settings))
    return "".join(
        f"<dl{kind}>{''.join(f'<div><dt>{name}</dt><dd>{value}</dd></div>' for name, value in entries)}</dl>"
        for kind, entries in lists
        if entries
    )


# Learning curves


def read_history(model: Path) -> list[dict[str, str]]:
    """The rows of the CSV that training left beside a checkpoint; none where there is no such file."""
    try:
        with open(history_path(model), newline="", encoding="utf-8") as file:
            return list(csv.DictReader(file))
    except (OSError, UnicodeDecodeError, csv.Error):
        return []


def read_curves(curves: list[dict[str, str]]) -> dict[str, list[float]] | None:
    """The columns as finite numbers; None where there are none, or one is malformed.

    With a validation split its figures stand where the test list's otherwise do.
    """
    names = ("epoch", "train_loss", "train_accuracy", "test_loss", "test_accuracy", "lr")
    split = bool(curves) and "val_loss" in curves[0]
    try:
        columns = {
            name: [float(row[name.replace("test", "val") if split else name]) for row in curves] for name in names
        }
    except (KeyError, TypeError, ValueError):
        return None
    return (
        columns if curves and all(math.isfinite(figure) for column in columns.values() for figure in column) else None
    )


def drops(rates: Sequence[float]) -> list[int]:
    """The epochs (their places) where the learning rate drops; none where it glides down all the time."""
    found = [index for index in range(1, len(rates)) if rates[index] < rates[index - 1]]
    return found if len(found) <= MAX_DROPS else []


def drop_marks(xs: Sequence[float], rates: Sequence[float]) -> str:
    """A dotted line where the learning rate drops, lettered where there is room for it."""
    parts, lettered = [], -math.inf
    for x, rate in ((xs[index], rates[index]) for index in drops(rates)):
        parts.append(svg_line((x, TOP - 6), (x, BOTTOM), "drop"))
        if x - lettered > 70 and x < RIGHT - 28:  # wider than the letters of a rate
            parts.append(svg_text(x, TOP - 11, f"{rate:.3g}", "mid"))
            lettered = x
    return "".join(parts)


def best_mark(x: float, y: float, epoch: float) -> str:
    """A ring on the test curve, and which epoch it is above the plot."""
    place = "end" if x > RIGHT - 60 else "mid" if x > LEFT + 60 else ""
    ring = f'<circle class="ring" cx="{x:.1f}" cy="{y:.1f}" r="5"/>'
    return svg_line((x, 15), (x, y - 5), "grid") + ring + svg_text(x, 11, f"best, epoch {epoch:g}", f"ink {place}")


def curve_chart(name: str, columns: dict[str, list[float]], best: int | None, *, tick_format: str, high: float) -> str:
    """One figure of both lists by epoch, the best epoch and the drops of the rate marked."""
    epochs, up = columns["epoch"], ticks(high)
    first, extent = epochs[0], max(1.0, epochs[-1] - epochs[0])
    marked = [first, *(epoch for epoch in ticks(epochs[-1], 1) if first + extent / 12 < epoch <= epochs[-1])]
    across = [((epoch - first) / extent, f"{epoch:g}") for epoch in marked]
    xs = [LEFT + (epoch - first) / extent * (RIGHT - LEFT) for epoch in epochs]
    parts = [
        axes(across, [(tick / up[-1], f"{tick:{tick_format}}") for tick in up], "epoch"),
        drop_marks(xs, columns["lr"]),
    ]
    label = f"{name.capitalize()} by epoch"
    for which, kind in (("train", "blue dash"), ("test", "orange")):
        values = columns[f"{which}_{name}"]
        ys = [BOTTOM - value / up[-1] * (BOTTOM - TOP) for value in values]
        points = [f"{x:.1f} {y:.1f}" for x, y in zip(xs, ys)]
        parts.append(f'<path class="line {kind}" d="M{points[0]}L{"L".join(points)}"/>')
        label += f", {which} from {values[0]:.3g} to {values[-1]:.3g}"
    if best is not None:
        parts.append(best_mark(xs[best], ys[best], epochs[best]))
        label += f"; best epoch {epochs[best]:g}"
    return f"<figure><h3>{name.capitalize()}</h3>{svg(WIDTH, HEIGHT, label, ''.join(parts))}</figure>"


def learning_curves(curves: list[dict[str, str]]) -> str:
    """Loss and accuracy by epoch, or a sentence on why they are left out."""
    columns = read_curves(curves)
    if columns is None:
        why = "has a number that can't be read" if curves else "does not lie beside the checkpoint"
        return f"<p>Left out: the .csv of the training {why}.</p>"
    best = max((index for index, row in enumerate(curves) if row.get("best") == "1"), default=None)
    highest = max(0.0, *columns["train_loss"], *columns["test_loss"]) or 1.0
    drop_key = '<span><i class="drop"></i>learning rate drops</span>' if drops(columns["lr"]) else ""
    judge = "validation split" if "val_loss" in curves[0] else "test list"
    return (
        "<p>Training figures are taken while the weights still move, on other views too; "
        f"they may lie below those of the {judge}.</p>"
        f'<p class="key"><span><i class="blue dash"></i>training list</span><span><i class="orange"></i>{judge}</span>'
        f'{drop_key}</p><div class="pair">'
        + curve_chart("loss", columns, best, tick_format="g", high=highest)
        + curve_chart("accuracy", columns, best, tick_format=".0%", high=1.0)
        + "</div>"
    )


# Confusion matrix


def slanted_names(names: Sequence[str], cell: int, size: float, height: float) -> str:
    """The names above the columns, at 45 degrees: lines of text then lie 0.7 cells apart."""
    parts = []
    for index, name in enumerate(names):
        x, y = (index + 0.5) * cell + size / 4, height - 5
        turned = f'<text x="{x:.1f}" y="{y:.1f}" transform="rotate(-45 {x:.1f} {y:.1f})">'
        parts.append(f"{turned}{html.escape(shortened(name, MATRIX_NAME_WIDTH))}<title>{escape(name)}</title></text>")
    return "".join(parts)


def matrix_cells(scores: ClassificationScores, classes: Sequence[str], cell: int, size: float) -> str:
    """The cells that hold images, as dark as their share of the row; the pointer gets them in words."""
    side = cell * len(classes)
    parts = [f'<rect class="frame" x=".5" y=".5" width="{side - 1}" height="{side - 1}"/>']
    parts += [svg_line((0, index * cell), (side, index * cell), "grid") for index in range(1, len(classes))]
    totals, hits = scores.images.tolist(), enumerate(scores.hits.tolist())
    names = [escape(name) for name in classes]
    counts = {(label, label): count for label, count in hits if count} | scores.confusions
    for (row, column), count in sorted(counts.items()):
        share = count / totals[row]
        depth = 0.1 + 0.9 * share
        letter_size = min(size, 1.5 * cell / len(str(count)))
        x, y = column * cell, row * cell
        taken = "found" if row == column else f"taken for {names[column]}"
        parts.append(
            f"<g><title>{names[row]}, {taken}: {count} of {totals[row]}</title>"
            f'<rect class="cell" x="{x + 1}" y="{y + 1}" width="{cell - 2}" height="{cell - 2}" '
            f'fill-opacity="{depth:.2f}"/>'
            f'<text class="mid count{" on" * (depth > 0.62)}" x="{x + cell / 2:g}" '
            f'y="{y + cell / 2 + letter_size * 0.36:.1f}" font-size="{letter_size:.1f}">{count}</text></g>'
        )
    return "".join(parts)


def confusion_matrix(scores: ClassificationScores, classes: list[str]) -> str:
    """A heat map whose cells have a fixed size; the page scrolls it, and its names stay in sight."""
    if len(classes) > MAX_MATRIX_CLASSES:
        return f"<p>Not drawn of more than {MAX_MATRIX_CLASSES:,} classes. {common_mistakes(scores, classes)}</p>"
    cell, size = next((cell, size) for most, cell, size in CELLS if len(classes) <= most)
    side = cell * len(classes)
    widest = max(letters(shortened(name, MATRIX_NAME_WIDTH)) for name in classes) * size * 0.62
    margin, slant = max(72, widest + 12), widest * 0.71 + size + 8
    rows = "".join(
        f'<text class="end" x="{margin - 8:.1f}" y="{(index + 0.5) * cell + size * 0.36:.1f}">'
        f"{html.escape(shortened(name, MATRIX_NAME_WIDTH))}<title>{escape(name)}</title></text>"
        for index, name in enumerate(classes)
    )

    def part(kind: str, extent: tuple[float, float], label: str, body: str) -> str:
        width, height = map(round, extent)
        attributes = f' class="{kind}" width="{width}" height="{height}" style="font-size:{size}px"'
        return svg(width, height, label, body, attributes=attributes)

    fit = min(1, PRINT_WIDTH / (margin + side + slant))
    words = f"Confusion matrix of {len(classes)} classes: {scores.right} of {scores.count} images on the diagonal"
    parts = (
        '<div class="corner"><span>taken for →</span><span>true ↓</span></div>',
        part("columns", (side + slant, slant), "Names of the columns", slanted_names(classes, cell, size, slant)),
        part("rows", (margin, side), "Names of the rows", rows),
        part("cells", (side, side), words, matrix_cells(scores, classes, cell, size)),
    )
    matrix = f'<div class="matrix" style="--fit:{fit:.3f}">{"".join(parts)}</div>'
    return (
        "<p>A row is a true class, a column what its images were taken for; the stronger the colour, the larger the "
        f"share of the row. {common_mistakes(scores, classes)}</p>{scroller('Confusion matrix', matrix, len(classes))}"
    )


def common_mistakes(scores: ClassificationScores, classes: list[str]) -> str:
    """The largest cells beside the diagonal, in words."""
    pairs = [
        f"{escape(classes[label])} taken for {escape(classes[guess])} ({count})"
        for (label, guess), count in scores.confusions.most_common(5)
    ]
    return f"Most frequent mistakes: {', '.join(pairs)}." if pairs else "No image was taken for another class."


# Classes


def recall_table(scores: ClassificationScores, classes: list[str]) -> str:
    """One row per class, the worst recall first; classes without images come last."""
    recall, precision, f1 = (column.tolist() for column in (scores.recall, scores.precision, scores.f1))
    images, taken_for, rows = scores.images.tolist(), scores.taken_for(), []
    for label in scores.worst_first():
        guess, times = taken_for.get(label, (None, 0))
        taken = f"{escape(classes[guess])} ({times})" if times else NONE
        share = 0.0 if math.isnan(recall[label]) else recall[label]
        found, exact, both = (percent(column[label]) for column in (recall, precision, f1))
        rows.append((classes[label], share, (found, f"{images[label]:,}", exact, both, taken)))
    heads = ("Class", "Recall", "Images", "Precision", "F1", "Most often taken for")
    return (
        "<p>The worst first. Recall: the share of a class’s images that were found. Precision: the share of images "
        f"taken for the class that are of it. F1: their harmonic mean.</p>"
        f"{class_table('classes', heads, rows, len(classes))}"
    )


# Images


def card(image: ScoredImage, classes: list[str], thumbnails: Thumbnails) -> str:
    """One image, its label, and the three likeliest classes."""
    bars, label = [], image.label
    for place, (value, guess) in enumerate(zip(image.probs, image.guesses, strict=True)):
        kind = " right" if guess == label else " wrong" if place == 0 else ""
        bars.append(
            f'<div class="guess{kind}"><span title="{escape(classes[guess])}">{escape(classes[guess])}</span>'
            f'<span>{value:.1%}</span><i style="--share:{value:.1%}"></i></div>'
        )
    alt = f"labelled {escape(classes[label])}, taken for {escape(classes[image.guesses[0]])}"
    return (
        f'<li class="card">{thumbnails.draw(image.path, alt)}<p class="true">labelled <b>{escape(classes[label])}</b></p>'
        f'<div>{"".join(bars)}</div><p class="path">{escape(image.path)}</p></li>'
    )


def gallery(images: ScoredImages, classes: list[str], thumbnails: Thumbnails) -> str:
    """The most confident mistakes and the least confident hits."""
    right = sum(images.rights)
    wrong = len(images) - right
    parts = [
        "<p>Where a true label looks wrong, this is the place to see it. "
        "Blue is the class of the label, orange the mistake.</p>"
    ]
    mistakes, hits = images.mistakes(), images.hits()[:HITS]
    for name, chosen, total in (("Most confident mistakes", mistakes, wrong), ("Least confident hits", hits, right)):
        count = f"{len(chosen)} of {total:,}" if chosen else "there are none"
        cards = "".join(card(image, classes, thumbnails) for image in chosen)
        parts.append(f'<h3 class="shelf">{name}, {count}</h3><ul class="cards">{cards}</ul>')
    return "".join(parts)


# Confidence


def confidence_chart(count: Sequence[int], right: Sequence[int]) -> str:
    """A histogram of confidence: hits below, mistakes above them."""
    step, high = (RIGHT - LEFT) / BINS, max(1, *count)
    parts = [axes([(tenth / 5, f"{tenth / 5:.0%}") for tenth in range(6)], [], "confidence")]
    for tenth, (images, hits) in enumerate(zip(count, right)):
        x, whole, lower = LEFT + tenth * step + 2, *((BOTTOM - TOP) * part / high for part in (images, hits))
        words = f"{tenth / BINS:.0%} to {(tenth + 1) / BINS:.0%}: {hits} right, {images - hits} wrong"
        parts.append(
            f'<g><title>{words}</title><rect class="blue" x="{x:.1f}" y="{BOTTOM - lower:.1f}" width="{step - 4:.1f}" '
            f'height="{lower:.1f}"/><rect class="orange" x="{x:.1f}" y="{BOTTOM - whole:.1f}" width="{step - 4:.1f}" '
            f'height="{whole - lower:.1f}"/></g>'
        )
        if images:
            parts.append(svg_text(x + step / 2 - 2, BOTTOM - whole - 6, f"{images:,}", "mid"))
    label = "Images by confidence in tenths, right and wrong: "
    label += "; ".join(f"{hits} and {images - hits}" for images, hits in zip(count, right))
    return f"<figure><h3>Images in each tenth</h3>{svg(WIDTH, HEIGHT, label, ''.join(parts))}</figure>"


def reliability_chart(count: Sequence[int], right: Sequence[int], confidence: Sequence[float]) -> str:
    """The share right in each tenth, against the line where confidence and share agree."""
    step, high = (RIGHT - LEFT) / BINS, BOTTOM - TOP
    sides = [(tenth / 5, f"{tenth / 5:.0%}") for tenth in range(6)]
    parts, shares = [axes(sides, sides, "confidence")], []
    for tenth, (images, hits, mean) in enumerate(zip(count, right, confidence)):
        shares.append(f"{hits / images:.0%}" if images else "no images")
        if images:
            tall = high * hits / images
            parts.append(
                f"<g><title>{hits} of {images} right at a mean confidence of {mean:.1%}</title>"
                f'<rect class="blue{" few" * (images < FEW)}" x="{LEFT + tenth * step + 2:.1f}" '
                f'y="{BOTTOM - tall:.1f}" width="{step - 4:.1f}" height="{tall:.1f}"/></g>'
            )
    parts.append(svg_line((LEFT, BOTTOM), (RIGHT, TOP), "ideal"))
    label = f"Share right in each tenth of confidence: {', '.join(shares)}"
    return f"<figure><h3>Share right in each tenth</h3>{svg(WIDTH, HEIGHT, label, ''.join(parts))}</figure>"


def confidence_section(scores: ClassificationScores, confidence: Tensor, right: Tensor) -> str:
    """Both charts, and the expected calibration error in words."""
    count, hits, means, ece = calibration_bins(confidence, right)
    tenths, mean = (count.tolist(), hits.tolist()), float(confidence.mean())
    return (
        f"<p>Confidence is the probability of the likeliest class. Mean confidence is {mean:.1%}, and "
        f"{scores.accuracy:.1%} are right. Where the two agree in every tenth, the bars end on the dashed line; the "
        "expected calibration error is how far they lie apart, averaged over the images: "
        f'<b id="ece">{ece:.2%}</b>. Pale bars hold fewer than {FEW} images.</p>'
        '<p class="key"><span><i class="blue box"></i>right</span><span><i class="orange box"></i>wrong</span></p>'
        f'<div class="pair">{confidence_chart(*tenths)}{reliability_chart(*tenths, means.tolist())}</div>'
    )


# The page


def chosen_note(metadata: dict, lists: Sequence[str]) -> str:
    """Whether the model was trained on what is reported on, or its epoch chosen on it.

    Lists are compared by where they lie; older checkpoints name the one that chose the epoch, and no more.
    """
    chosen_on, trained = metadata.get("chosen_on"), metadata.get("trained_lists")
    if chosen_on is None:
        return ""
    where = [path_digest(path) for path in lists]
    if trained is None:
        choosing = [path for path in lists if os.path.normpath(path) == os.path.normpath(str(chosen_on))]
    elif any(digest in trained for digest in where):
        return "<p>The model was trained on images of this list: the figures are far too high.</p>"
    else:
        choosing = [path for path, digest in zip(lists, where, strict=True) if digest == metadata.get("chosen_list")]
    if choosing:
        which = "This list" if len(lists) == 1 else escape(choosing[0])
        return f"<p>{which} also chose the epoch that was kept, so the figures are a little too high.</p>"
    # A list of the same name may be the same, from another machine.
    names = {os.path.basename(os.path.normpath(path)) for path in lists}
    another = trained is not None and os.path.basename(os.path.normpath(str(chosen_on))) not in names
    return f"<p>The epoch was chosen on {escape(chosen_on)}{', another list' if another else ''}.</p>"


def save_report(
    path: Path,
    metadata: dict,
    scores: ClassificationScores,
    images: ScoredImages,
    *,
    model: Path,
    lists: Sequence[str],
) -> None:
    """Draw the report of a model on labelled images. Raises UserError (status 1).

    metadata: of the checkpoint; lists: the lists and folders whose images they are.
    """
    classes, list_name = metadata["classes"], ", ".join(lists)
    confidence, right = images.confidence, images.right
    header = (
        f'<p class="eyebrow">Image classifier report</p><h1>{escape(model)}</h1><p class="lede">Tested on the '
        f"{len(images):,} images of {escape(list_name)}, {len(classes):,} classes.</p>"
        f"{headline(scores, calibration_bins(confidence, right)[-1])}{chosen_note(metadata, lists)}"
    )
    accuracy = rounded_percent(scores.accuracy, scores.accuracy_interval)
    thumbnails = Thumbnails(metadata.get("grey_bits", GREY_BITS))
    sections = (
        ("Mistakes", gallery(images, classes, thumbnails), ""),
        ("Classes", recall_table(scores, classes), "whole"),
        ("Confusion matrix", confusion_matrix(scores, classes), "whole"),
        ("Confidence", confidence_section(scores, confidence, right), "whole"),
        ("Learning curves", learning_curves(read_history(model)), "whole"),
        *([("Settings", settings, "")] if (settings := facts(metadata)) else []),
    )
    text = page(f"{escape(model)}: {accuracy} of {escape(list_name)}", header, sections)
    save_atomically(path, text.encode())
