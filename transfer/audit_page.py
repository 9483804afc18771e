"""The audit's page: what it found, kind by kind, with the photos, the classes' sizes, and whether more would help."""

import math
from collections.abc import Sequence
from pathlib import Path

from transfer.audit import Audit, Curve, Finding, Part, save_findings
from transfer.console import counted, shown
from transfer.files import save_atomically, with_table
from transfer.page import (
    BOTTOM,
    HEIGHT,
    LEFT,
    RIGHT,
    TOP,
    WIDTH,
    axes,
    drawing,
    letter,
    page,
    plain,
    rule,
    scroller,
    thumbnail,
)
from transfer.suspects import Labels

SHOWN = 24  # findings of a kind
FEW_POINTS = 0.01  # of accuracy, that are not worth the double of photos
TITLES = {
    "label": "Labels that look wrong",
    "conflict": "One photo, two labels",
    "leak": "Test photos that are in the training list",
    "duplicate": "Photos that are there twice",
    "outlier": "Photos unlike all others",
}
WORDS = {
    "conflict": "The same photo, perhaps resized, recompressed, cropped or mirrored, under different labels. One "
    "of them is wrong: the first, as far as the model can tell.",
    "leak": "The same photo in both lists makes the test accuracy look better than it is: remove it from one of them.",
    "duplicate": "The same photo twice under one label counts twice in training. Different photos of one scene are not "
    "meant: they do no harm.",
    "outlier": "Far from every training photo, by the distance to its 8th nearest: perhaps a photo of something else, "
    "put there by mistake, perhaps a rare but right one.",
}


# Findings


def place_of(part: Part, place: int) -> str:
    """Where an image stands; a click selects its path."""
    line = part.line(place)
    listed = "" if line is None else f"{plain(part.listed.name)}:{line} "
    return f'<p class="path">{listed}<span class="copy">{plain(part.path(place))}</span></p>'


def finding_card(finding: Finding, names: Sequence[str]) -> str:
    """A finding with its photo, or with both, its label, and what it might be instead."""
    label = plain(names[finding.label])
    picture = thumbnail(finding.path, f"labelled {label}")
    said = f"labelled <b>{label}</b>"
    where, guess = place_of(finding.part, finding.place), ""
    if finding.other:
        part, place = finding.other
        other = plain(names[int(part.labels[place])])
        said = f"both {said}" if other == label else f"{said} and <b>{other}</b>"
        picture = f'<div class="twins">{picture}{thumbnail(finding.other_path, f"labelled {other}")}</div>'
        where += place_of(part, place)
    elif finding.suggestion is not None:
        name = plain(names[finding.suggestion])
        guess = f'<div class="guess wrong"><span title="{name}">{name}?</span><span>{finding.score:.0%}</span>'
        guess += f'<i style="--share:{finding.score:.1%}"></i></div>'
    kind = "card twin" if finding.other else "card"
    return f'<li class="{kind}">{picture}<div><p class="true">{said}</p>{guess}</div>{where}</li>'


def label_words(judged: Labels, name: str, images: int) -> str:
    """How many labels of a list look wrong, and what the model can see of such mistakes at all."""
    power = f"of labels that are wrong at random it would notice about {judged.power:.0%}"
    if judged.weak:
        return f"<p>{plain(name)}: the model knows these classes too little to judge their labels; {power}.</p>"
    count = len(judged.suspects)
    sure = f", {judged.doubt[judged.suspects].mean():.0%} of them wrong by its own reckoning" if count else ""
    return (
        f"<p>{plain(name)}: {counted(count, 'label')} of {images:,} more likely wrong than right{sure}. All in all it "
        f"reckons with {judged.wrong:.1%} wrong labels; {power}.</p>"
    )


def findings_section(audit: Audit, kind: str, names: Sequence[str], table: str) -> str:
    found = audit.of_kind(kind)
    parts = [f"<p>{WORDS[kind]}</p>"] if found and kind in WORDS else []
    if kind == "label":
        parts += [
            label_words(judged, part.listed.name, len(part.rows))
            for part, judged in zip((audit.train, audit.test), audit.labels, strict=True)
        ]
    if not found:
        return "".join(parts) or "<p>None found.</p>"
    if len(found) > SHOWN:
        parts.append(f"<p>The {SHOWN} surest of {len(found):,}; all are in {plain(table)}.</p>")
    return f'{"".join(parts)}<ul class="cards">{"".join(finding_card(each, names) for each in found[:SHOWN])}</ul>'


# Classes


def balance_table(audit: Audit, names: Sequence[str]) -> str:
    """One row a class, the smallest first: its training and test images, and its labels that look wrong."""
    counts = [part.labels.bincount(minlength=len(names)).tolist() for part in (audit.train, audit.test)]
    doubted = [0] * len(names)
    for finding in audit.of_kind("label"):
        doubted[finding.label] += 1
    largest, rows = max(counts[0]), []
    for label in sorted(range(len(names)), key=lambda label: (counts[0][label], label)):
        name = plain(names[label])
        rows.append(
            f'<tr><td title="{name}">{name}</td><td class="bar"><span style="--share:{counts[0][label] / largest:.1%}">'
            f"</span></td><td>{counts[0][label]:,}</td><td>{counts[1][label]:,}</td><td>{doubted[label]:,}</td></tr>"
        )
    heads = ("Class", "", "Training images", "Test images", "Labels that look wrong")
    head = "".join(f'<th scope="col">{name}</th>' for name in heads)
    table = f'<table id="balance"><thead><tr>{head}</tr></thead><tbody>{"".join(rows)}</tbody></table>'
    smallest = min(counts[0])
    times = f"{largest / smallest:.1f} times" if smallest else "any number of times"
    return (
        f"<p>The smallest first. The largest class has {largest:,} training images, {times} the smallest’s.</p>"
        f"{scroller('Classes', table, len(names))}"
    )


# More photos


def curve_words(curve: Curve, names: Sequence[str]) -> str:
    """What twice the photos would give, as far as the curve can tell, and for which classes."""
    now, ahead = float(curve.accuracy[-1].mean()), curve.doubled()
    expected = sum(ahead) / len(ahead)
    spread = f" ({min(ahead):.1%} to {max(ahead):.1%} by the draw)"
    verdict = f"Twice the photos would give about <b>{expected:.1%}</b>{spread} instead of {now:.1%}"
    if expected - now < FEW_POINTS:
        verdict = f"Hardly: twice the photos would give about <b>{expected:.1%}</b>{spread}, and these give {now:.1%}"
    grown = [f"{plain(names[label])} (+{100 * gain:.0f} points)" for label, gain in curve.growing()[:5]]
    where = "no single class gained more by the last doubling than chance explains"
    if grown:
        where = f"by the last doubling these classes gained most: {', '.join(grown)}"
    return (
        f"<p>{verdict}, if the curve goes on as it went; {where}. Each point is the accuracy of heads on photos of "
        "scenes they never saw; it may lie below the test accuracy.</p>"
    )


def curve_chart(curve: Curve) -> str:
    """Accuracy by training images, on a logarithmic axis, and the double of all as a dashed line."""
    sizes = [*curve.sizes, 2 * curve.sizes[-1]]
    first, extent = math.log(sizes[0]), math.log(sizes[-1] / sizes[0])
    xs = [LEFT + 14 + (RIGHT - LEFT - 28) * (math.log(size) - first) / extent for size in sizes]
    means = curve.accuracy.mean(1).tolist()
    expected = sum(curve.doubled()) / curve.accuracy.shape[1]

    def y(share: float) -> float:
        return BOTTOM - share * (BOTTOM - TOP)

    across = [((x - LEFT) / (RIGHT - LEFT), f"{size:,}") for x, size in zip(xs, sizes, strict=True)]
    parts = [axes(across, [(tick / 5, f"{tick / 5:.0%}") for tick in range(6)], "training images")]
    points = [f"{x:.1f} {y(mean):.1f}" for x, mean in zip(xs, means)]
    parts.append(f'<path class="line blue" d="M{points[0]}L{"L".join(points[1:])}"/>')
    parts.append(rule(xs[-2], y(means[-1]), xs[-1], y(expected), "line blue dash"))
    for x, draws in zip(xs, curve.accuracy.tolist()):
        parts += [f'<circle class="blue" cx="{x:.1f}" cy="{y(each):.1f}" r="3"/>' for each in draws]
    for x, mean in zip(xs, [*means, expected]):
        parts.append(letter(x, y(mean) - 14, f"{mean:.0%}", "mid ink"))
    label = "Accuracy out of fold by training images: "
    label += ", ".join(f"{mean:.1%} of {size:,}" for size, mean in zip(sizes, [*means, expected], strict=True))
    return f"<figure>{drawing(WIDTH, HEIGHT, f'{label}, the last as expected', ''.join(parts))}</figure>"


def curve_section(curve: Curve | None, names: Sequence[str]) -> str:
    if curve is None:
        return "<p>Not told: two images a class must be left of at least half of them.</p>"
    key = (
        '<p class="key"><span><i class="blue"></i>mean of the draws</span>'
        '<span><i class="blue dash"></i>as it would go on</span></p>'
    )
    return f"{curve_words(curve, names)}{key}{curve_chart(curve)}"


# The page


def save_audit(path: Path, audit: Audit, names: Sequence[str], model: Path) -> str:
    """Draw the audit of both lists, and write its findings beside it. Returns what was found, in words.

    Raises UserError (status 1).
    """
    lists = " and ".join(plain(part.listed.name) for part in (audit.train, audit.test))
    counts = {kind: len(audit.of_kind(kind)) for kind in TITLES}
    copies = counts["conflict"] + counts["leak"] + counts["duplicate"]
    figures = (
        ("Labels that look wrong", "labels", counts["label"]),
        ("Copies", "copies", copies),
        ("Outliers", "outliers", counts["outlier"]),
    )
    stats = "".join(
        f'<div><p class="name">{name}</p><span class="big" id="{key}">{count:,}</span></div>'
        for name, key, count in figures
    )
    _, table = with_table(path)
    header = (
        f'<p class="eyebrow">Photo audit</p><h1>{lists}</h1><p class="lede">{len(audit.train.rows):,} training and '
        f"{len(audit.test.rows):,} test images of {len(names):,} classes, by what {plain(model)} is built on. "
        f'All findings, a row each: {plain(table)}.</p><div class="stats even">{stats}</div>'
    )
    sections = [(TITLES[kind], findings_section(audit, kind, names, str(table)), "") for kind in TITLES]
    sections.append(("Would more photos help?", curve_section(audit.curve, names), "whole"))
    sections.append(("Classes", balance_table(audit, names), "whole"))
    found = counted(sum(counts.values()), "finding")
    save_findings(table, audit, names)
    save_atomically(path, page(f"Audit of {lists}: {found}", header, sections).encode())
    words = (counted(counts["label"], "doubtful label"), f"{copies:,} copies", counted(counts["outlier"], "outlier"))
    return f"{shown(path)} and {shown(table)}: {', '.join(words)}"
