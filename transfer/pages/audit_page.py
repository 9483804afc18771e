"""The audit's page: what it found, kind by kind, with the photos, the classes' sizes, and whether more would help."""

import math
from collections.abc import Sequence
from pathlib import Path

from transfer.audit.audit import MOST_WORK, Audit
from transfer.audit.findings import AuditSplit, Finding, save_findings
from transfer.audit.label_errors import WEAK, LabelQuality
from transfer.audit.learning_curve import FEW_POINTS, Curve
from transfer.inputs.corrections import Corrections
from transfer.metrics import NONE
from transfer.pages.choices import SCRIPT, Choices
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
    page,
    shelves,
    svg,
    svg_line,
    svg_text,
)
from transfer.system.console import plural, predict_command, printable
from transfer.system.files import save_atomically
from transfer.system.outputs import table_path

TITLES = {
    "label": "Labels that are probably wrong",
    "conflict": "One photo, two labels",
    "leak": "Test photos that are also training photos",
    "duplicate": "Photos that are there twice",
    "outlier": "Strange photos",
}
WORDS = {
    "label": "Look at each photo. If the label is right, keep it. If it is wrong, choose the right class, or move the "
    "photo to the right folder, or correct its line in the list; then train again.",
    "conflict": "The same photo, perhaps resized, recompressed, cropped or mirrored, with two labels. One of them is "
    "wrong: delete that photo, or correct its label. Where one is probably right, the card says which.",
    "leak": "The same photo in both lists makes the test accuracy look better than it is: remove it from one of them.",
    "duplicate": "The same photo twice with one label counts twice in training. Different photos of one scene are not "
    "meant: they do no harm. Delete one of the two, or leave them: they do little harm.",
    "outlier": "Far from every training photo, by the distance to its 8th nearest: perhaps a screenshot or another "
    "subject, put there by mistake, perhaps a rare but right photo. Delete what does not belong to its class; keep the "
    "rest.",
}


# Findings


def place_of(split: AuditSplit, place: int) -> str:
    """Where an image stands; a click selects its path."""
    line = split.line(place)
    where = "" if line is None else f"{escape(split.image_list.name)}:{line} "
    return f'<p class="path">{where}<span class="copy">{escape(split.path(place))}</span></p>'


def finding_card(finding: Finding, choices: Choices, thumbnails: Thumbnails) -> str:
    """A finding with its photo, or with both, its label, and what it might be instead; and what to make of it."""
    classes = choices.labels.classes
    label, paths = escape(classes[finding.label]), [finding.path]
    picture = thumbnails.draw(finding.path, f"labelled {label}")
    caption = f"labelled <b>{label}</b>"
    where, guess = place_of(finding.split, finding.place), ""
    if finding.other:
        split, place = finding.other
        other = escape(classes[int(split.labels[place])])
        caption = f"both {caption}" if other == label else f"{caption} and <b>{other}</b>"
        if finding.suggestion is not None:
            caption += f"; probably <b>{other}</b>"
        picture = f'<div class="twins">{picture}{thumbnails.draw(finding.other_path, f"labelled {other}")}</div>'
        where += place_of(split, place)
        paths.append(finding.other_path)
    elif finding.suggestion is not None:
        caption = f"not <b>{label}</b>? perhaps <b>{escape(classes[finding.suggestion])}</b>"
        guess = f'<div class="guess wrong"><span>probably wrong</span><span>{finding.score:.0%}</span>'
        guess += f'<i style="--share:{finding.score:.1%}"></i></div>'
    kind = "card twin" if finding.other else "card"
    buttons = choices.buttons(paths, choices.of_finding(finding), f"{escape(finding.path)}, labelled {label}")
    text = f'<div><p class="true">{caption}</p>{guess}</div>{where}{buttons}'
    return f'<li class="{kind}"{choices.attributes(paths)}>{picture}{text}</li>'


def label_words(parts: Sequence[tuple[AuditSplit, LabelQuality]]) -> str:
    """How many labels of lists that were judged together are probably wrong, and how many of such errors the model can
    find at all.
    """
    quality = parts[0][1]
    power = f"Of wrong labels it finds about {10 * quality.power:.0f} in 10"
    if quality.weak:
        names = " and ".join(escape(split.image_list.name) for split, _ in parts)
        images = sum(len(split.rows) for split, _ in parts)
        little = f"It would give {quality.agreement:.1%} of the labels itself" if quality.power >= WEAK else power
        return f"<p>{names}: {images:,} photos not judged. The model knows these classes too little. {little}.</p>"
    counts = (
        f"{escape(split.image_list.name)}: {plural(len(each.suspects), 'label')} of {len(split.rows):,} probably wrong"
        for split, each in parts
    )
    return f"<p>{'; '.join(counts)}. Estimate: {quality.noise_rate:.1%} of the labels are wrong. {power}.</p>"


def judged_words(audit: Audit) -> str:
    """What was made of the labels of both lists."""
    parts = list(zip((audit.train, audit.test), audit.qualities, strict=True))
    photos = len(audit.train.rows) + (len(audit.test.rows) if audit.judged_together else 0)
    few = f"<p>The models that judge labels were trained on {audit.trained_on:,} of the {photos:,} photos.</p>"
    few = few if audit.trained_on < photos else ""
    return "".join(map(label_words, [parts] if audit.judged_together else [[part] for part in parts])) + few


def nothing_found(audit: Audit) -> str:
    """The kinds of which nothing was found, in one line; nothing where all kinds were."""
    kinds = [kind for kind in TITLES if not audit.of_kind(kind)]
    if not kinds:
        return ""
    words = "; ".join(TITLES[kind][0].lower() + TITLES[kind][1:] for kind in kinds)
    return f"<p>None found: {words}.</p>{judged_words(audit) if 'label' in kinds else ''}"


def findings_section(audit: Audit, kind: str, choices: Choices, thumbnails: Thumbnails) -> str:
    """What was found of a kind, some at least, and what to do about it: the most certain open, the others folded."""
    cards = [finding_card(finding, choices, thumbnails) for finding in audit.of_kind(kind)]
    return f"<p>{WORDS[kind]}</p>{judged_words(audit) if kind == 'label' else ''}{shelves(cards)}"


# Classes


def balance_table(audit: Audit, classes: Sequence[str]) -> str:
    """One row per class, the smallest first: its training and test images, and its labels that are probably wrong."""
    train, test = (split.labels.bincount(minlength=len(classes)).tolist() for split in (audit.train, audit.test))
    suspects = [0] * len(classes)
    for finding in audit.of_kind("label"):
        suspects[finding.label] += 1
    largest, smallest = max(train), min(train)
    order = sorted(range(len(classes)), key=lambda label: (train[label], label))
    rows = [
        (classes[label], train[label] / largest, [f"{column[label]:,}" for column in (train, test, suspects)])
        for label in order
    ]
    heads = ("Class", "Training images", "Test images", "Probably wrong labels")
    times = f"{largest / smallest:.1f} times" if smallest else "any number of times"
    return (
        f"<p>The smallest first. The largest class has {largest:,} training images, {times} the smallest’s.</p>"
        f"{class_table('balance', heads, rows, len(classes))}"
    )


# More photos


def next_words(model: Path) -> str:
    """The command that says which photos to label next."""
    command = predict_command(["FOLDER", "--label-next", "40", "--report", "next.html"], model)
    return (
        "<p>You have more photos without labels, in a folder? This shows which 40 of them to label first: "
        f'<code class="copy">{escape(command)}</code></p>'
    )


def curve_words(curve: Curve, classes: Sequence[str], model: Path) -> str:
    """What twice the photos would give, as far as the curve shows, and for which classes; where that is much, how to
    choose them.
    """
    if curve.unclear:
        return "<p>Too few photos to tell: the points of the curve go up and down more than they rise.</p>"
    now, ahead = float(curve.accuracy[-1].mean()), curve.doubled()
    expected = sum(ahead) / len(ahead)
    spread = f" ({min(ahead):.1%} to {max(ahead):.1%} by the draw)"
    verdict = f"Twice the photos would give about <b>{expected:.1%}</b>{spread} instead of {now:.1%}"
    few = expected - now < FEW_POINTS
    if few:
        verdict = f"Hardly: twice the photos would give about <b>{expected:.1%}</b>{spread}, and these give {now:.1%}"
    grown = [f"{escape(classes[label])} (+{100 * gain:.0f} points)" for label, gain in curve.growing()[:5]]
    where = "no single class would gain most"
    if grown:
        where = f"these classes gained most by the last doubling: {', '.join(grown)}"
    return (
        f"<p>{verdict}, if the curve goes on as it went; {where}. Each point is the accuracy on photos that were not "
        "trained on (cross-validated); it may be below the test accuracy.</p>"
        f"{'' if few else next_words(model)}"
    )


def curve_chart(curve: Curve) -> str:
    """Accuracy by training images, on a logarithmic axis, and the double of all as a dashed line."""
    sizes = [*curve.sizes, *([] if curve.unclear else [2 * curve.sizes[-1]])]
    first, extent = math.log(sizes[0]), math.log(sizes[-1] / sizes[0])
    xs = [LEFT + 14 + (RIGHT - LEFT - 28) * (math.log(size) - first) / extent for size in sizes]
    means = curve.accuracy.mean(1).tolist()
    expected = [] if curve.unclear else [sum(curve.doubled()) / curve.accuracy.shape[1]]

    def y(share: float) -> float:
        return BOTTOM - share * (BOTTOM - TOP)

    across = [((x - LEFT) / (RIGHT - LEFT), f"{size:,}") for x, size in zip(xs, sizes, strict=True)]
    parts = [axes(across, [(tick / 5, f"{tick / 5:.0%}") for tick in range(6)], "training images")]
    points = [f"{x:.1f} {y(mean):.1f}" for x, mean in zip(xs, means)]
    parts.append(f'<path class="line blue" d="M{points[0]}L{"L".join(points[1:])}"/>')
    parts += [svg_line((xs[-2], y(means[-1])), (xs[-1], y(each)), "line blue dash") for each in expected]
    for x, draws in zip(xs, curve.accuracy.tolist()):
        parts += [f'<circle class="blue" cx="{x:.1f}" cy="{y(each):.1f}" r="3"/>' for each in draws]
    tops = [*curve.accuracy.amax(1).tolist(), *expected]  # above which there is room for a number
    for x, top, mean in zip(xs, tops, [*means, *expected]):
        parts.append(svg_text(x, y(top) - 10, f"{mean:.0%}", "mid ink"))
    label = "Cross-validated accuracy by training images: "
    label += ", ".join(f"{mean:.1%} of {size:,}" for size, mean in zip(sizes, [*means, *expected], strict=True))
    label += ", the last as expected" if expected else ""
    return f"<figure>{svg(WIDTH, HEIGHT, label, ''.join(parts))}</figure>"


def curve_section(audit: Audit, classes: Sequence[str], model: Path) -> str:
    if (curve := audit.curve) is None:
        if len(audit.train.rows) * len(classes) > MOST_WORK:
            return "<p>Not computed: with so many photos and classes it would take hours.</p>"
        return "<p>Too few photos to tell: half of them must leave two per class.</p>"
    ahead = "" if curve.unclear else '<span><i class="blue dash"></i>as it would go on</span>'
    key = f'<p class="key"><span><i class="blue"></i>mean of the draws</span>{ahead}</p>'
    return f"{curve_words(curve, classes, model)}{key}{curve_chart(curve)}"


# The page


def headline(audit: Audit, counts: dict[str, int]) -> str:
    """How much was found, large, and what was not judged; a count is a link to what it counts."""
    skipped, copies = audit.not_judged(), ("conflict", "leak", "duplicate")
    none = all(quality.weak for quality in audit.qualities)
    parts = []
    for name, key, kinds in (
        ("Probably wrong labels", "labels", ("label",)),
        ("Copies", "copies", copies),
        ("Strange photos", "outliers", ("outlier",)),
    ):
        count, first = sum(counts[kind] for kind in kinds), next((kind for kind in kinds if counts[kind]), None)
        figure = f"{count:,}" if key != "labels" or not none else NONE
        big = (
            f'<a class="big" href="#{first}" id="{key}">{figure}</a>'
            if first
            else f'<span class="big" id="{key}">{figure}</span>'
        )
        note = f"<p>Not judged: {skipped}</p>" if key == "labels" and skipped else ""
        parts.append(f'<div><p class="name">{name}</p>{big}{note}</div>')
    return "".join(parts)


def save_audit(path: Path, audit: Audit, corrections: Corrections, model: Path, *, argv: Sequence[str]) -> str:
    """Draw the audit of both lists, and write its findings beside it. Returns what was found, in words.

    corrections: those that the lists have already; argv: the arguments of the run, which is to be repeated with more.
    Raises UserError (status 1).
    """
    choices, classes = Choices.after(argv, corrections.labels, corrections.files), corrections.labels.classes
    lists = " and ".join(escape(split.image_list.name) for split in (audit.train, audit.test))
    counts = {kind: len(audit.of_kind(kind)) for kind in TITLES}
    copies = counts["conflict"] + counts["leak"] + counts["duplicate"]
    table, thumbnails = table_path(path, model), Thumbnails(audit.train.dataset.grey_bits)
    sections = [
        (f'<span id="{kind}">{TITLES[kind]}</span>', findings_section(audit, kind, choices, thumbnails), "")
        for kind in TITLES
        if counts[kind]
    ]
    cards = "".join(body for _, body, _ in sections)
    sections += [("Nothing found", none, "")] if (none := nothing_found(audit)) else []
    sections.append(("Would more photos help?", curve_section(audit, classes, model), "whole"))
    sections.append(("Classes", balance_table(audit, classes), "whole"))
    header = (
        f'<p class="eyebrow">Photo audit</p><h1>{lists}</h1><p class="lede">{len(audit.train.rows):,} training and '
        f"{len(audit.test.rows):,} test images of {len(classes):,} classes, checked with {escape(model)}’s network. "
        f"All findings, one row each: {escape(table)}.{thumbnails.describe_cut()}</p>"
        f'<div class="stats even">{headline(audit, counts)}</div>'
    )
    title = f"Audit of {lists}: {plural(sum(counts.values()), 'finding')}"
    save_findings(table, audit.findings, classes)
    save_atomically(path, page(title, header, sections, foot=choices.dock(cards), script=SCRIPT).encode())
    words = (
        plural(counts["label"], "probably wrong label")
        + (f" (not judged: {skipped})" if (skipped := audit.not_judged()) else ""),
        plural(copies, "copy", "copies"),
        plural(counts["outlier"], "strange photo"),
    )
    return f"{printable(path)} and {printable(table)}: {', '.join(words)}"
