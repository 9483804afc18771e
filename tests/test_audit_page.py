"""The audit's page: its figures are the table's, names are text, nothing is fetched, a browser shows it well."""

import csv
import html
import io
import re
from dataclasses import replace

import pytest
import torch
from browsing import HOSTILE, Page, ask, complaints, fetched, show
from PIL import Image

import train
from transfer.audit.audit import Audit
from transfer.audit.findings import KINDS, AuditSplit, Finding
from transfer.audit.label_errors import score_labels
from transfer.audit.learning_curve import Curve
from transfer.lists import ImageList
from transfer.pages.audit_page import TITLES, WORDS, save_audit


def case(folder, classes=4, findings=5, name="class", path="photo"):
    """An audit made up, of three images a class and list, with so many findings of each kind; and the class names."""
    Image.new("RGB", (64, 48), (200, 30, 30)).save(folder / "red.png")
    count, generator = 3 * classes, torch.Generator().manual_seed(0)
    splits = []
    for list_name in ("train", "test"):
        paths = [bytes(folder / "red.png"), *(f"{path} {number}".encode() + b"\xff" for number in range(1, count))]
        image_list = ImageList(
            f"{list_name}.txt", paths, [number % classes for number in range(count)], range(1, count + 1)
        )
        rows = torch.arange(count)
        dataset = train.ImageDataset(image_list, [0], 0)
        splits.append(AuditSplit(dataset, rows, torch.randn(count, 1, 8), image_list.labels))
    logits = torch.randn(count, classes, generator=generator) + 9 * torch.eye(classes).repeat(3, 1)
    qualities = tuple(score_labels(logits, split.labels) for split in splits)
    found = []
    for kind in KINDS:
        for number in range(findings):
            other = (splits[0], (number + 1) % count) if kind in ("conflict", "leak", "duplicate") else None
            suggestion = (number + 1) % classes if kind in ("label", "conflict") else None
            split = splits[kind == "leak"]
            found.append(Finding(kind, split, number % count, 0.99 - number / 1000, suggestion, other))
    curve = Curve(
        [10, 20, 40],
        torch.tensor([[0.3, 0.32], [0.4, 0.41], [0.5, 0.5]]),
        torch.full((classes,), 50),
        torch.tensor([[0.2] * classes, [0.3] * classes, [0.7] * classes]),
    )
    return Audit(*splits, qualities, curve, found), [f"{name} {number}" for number in range(classes)]


def written(tmp_path, audit, names, model="best.pth"):
    """The page, the rows of the table beside it, and the line that says what was found."""
    summary = save_audit(tmp_path / "audit.html", audit, names, tmp_path / model)
    table = (tmp_path / "audit.csv").read_bytes().decode(errors="surrogateescape")
    page = (tmp_path / "audit.html").read_text(encoding="utf-8")
    return page, list(csv.DictReader(io.StringIO(table, newline=""))), summary


def test_the_figures_are_those_of_the_table(tmp_path):
    page, rows, summary = written(tmp_path, *case(tmp_path, findings=7))
    count = {kind: sum(row["kind"] == kind for row in rows) for kind in KINDS}
    figures = {key: int(re.search(rf'id="{key}">([\d,]+)<', page)[1]) for key in ("labels", "copies", "outliers")}
    copies = count["conflict"] + count["leak"] + count["duplicate"]
    assert figures == {"labels": count["label"], "copies": copies, "outliers": count["outlier"]} and copies == 21
    assert summary.endswith("audit.csv: 7 probably wrong labels, 21 copies, 7 strange photos")
    assert page.count('<li class="card">') == 14 and page.count('<li class="card twin">') == 21
    label = next(row for row in rows if row["kind"] == "label")
    first = re.search(r'<li class="card">(.*?)</li>', page, re.S)[1]
    assert f"not <b>{label['label']}</b>? perhaps <b>{label['suggestion']}</b>" in first
    assert f"<span>{float(label['score']):.0%}</span>" in first
    assert f"{label['list']}:{label['line']} " in first


def test_the_table_has_the_columns_that_are_promised(tmp_path):
    _, rows, _ = written(tmp_path, *case(tmp_path, findings=1))
    assert list(rows[0]) == ["list", "line", "path", "kind", "label", "suggestion", "score", "other"]
    leak = next(row for row in rows if row["kind"] == "leak")
    assert (leak["list"], leak["line"], leak["other"]) == ("test.txt", "1", "photo 1\udcff")


def test_of_many_findings_the_most_certain_are_shown_and_the_rest_named(tmp_path):
    page, rows, _ = written(tmp_path, *case(tmp_path, classes=20, findings=40))
    assert page.count("The 24 most certain of 40; all are in ") == 5 and len(rows) == 200
    assert page.count('<li class="card') == 5 * 24


def test_where_nothing_was_found_the_page_says_so(tmp_path):
    page, rows, summary = written(tmp_path, *case(tmp_path, findings=0))
    kinds = (
        "one photo, two labels; test photos that are also training photos; photos that are there twice; strange photos"
    )
    assert f"<p>None found: labels that are probably wrong; {kinds}.</p>" in page and page.count("None found") == 1
    assert 'id="labels"' in page and "href" not in page and '<li class="card' not in page
    assert rows == [] and summary.endswith("0 probably wrong labels, 0 copies, 0 strange photos")


def test_findings_come_first_and_their_counts_are_links_to_them(tmp_path):
    page, _, _ = written(tmp_path, *case(tmp_path, findings=3))
    names = [html.unescape(re.sub("<[^>]*>", "", name)) for name in re.findall(r"<h2>(.*?)</h2>", page)]
    assert names == [*TITLES.values(), "Would more photos help?", "Classes"]
    links = re.findall(r'href="#(\w+)" id="(\w+)">', page)
    assert links == [("label", "labels"), ("conflict", "copies"), ("outlier", "outliers")]
    assert all(f'id="{kind}"' in page for kind in KINDS) and all(words in page for words in WORDS.values())


def test_a_curve_that_zigzags_more_than_it_rises_promises_nothing(tmp_path):
    audit, names = case(tmp_path)
    points = torch.tensor([[0.5, 0.52], [0.6, 0.58], [0.52, 0.53]])
    page, _, _ = written(tmp_path, replace(audit, curve=replace(audit.curve, accuracy=points)), names)
    assert "Too few photos to tell: the points of the curve go up and down more than they rise." in page
    assert "as expected" not in page and "points)" not in page and "as it would go on" not in page


def test_the_curve_says_what_twice_the_photos_would_give_and_for_which_classes(tmp_path):
    audit, names = case(tmp_path)
    page, _, _ = written(tmp_path, audit, names)
    expected = audit.curve.doubled()
    assert (
        f"<b>{sum(expected) / 2:.1%}</b> ({min(expected):.1%} to {max(expected):.1%} by the draw) instead of 50.0%"
        in page
    )
    assert "class 0 (+40 points)" in page
    assert f"40.5% of 20, 50.0% of 40, {sum(expected) / 2:.1%} of 80, the last as expected" in page


@pytest.mark.parametrize(
    ("points", "named"), [([0.3, 0.4, 0.5], True), ([0.9, 0.9, 0.9], False), ([0.5, 0.6, 0.5], False)]
)
def test_where_more_photos_would_help_and_only_there_the_command_that_chooses_them_is_named(tmp_path, points, named):
    audit, names = case(tmp_path)
    audit = replace(audit, curve=replace(audit.curve, accuracy=torch.tensor(points)[:, None]))
    page, _, _ = written(tmp_path, audit, names, model="my model.pth")
    command = "python predict.py FOLDER --label-next 40 --report next.html --model "
    assert (f"{command}&#x27;{tmp_path}/my model.pth&#x27;</code>" in page) == named == ("--label-next" in page)


def test_the_balance_counts_every_image(tmp_path):
    page, rows, _ = written(tmp_path, *case(tmp_path, classes=4, findings=5))
    body = re.search(r'<table id="balance">.*?<tbody>(.*?)</tbody>', page, re.S)[1]
    cells = [
        re.findall(r"<td[^>]*>(?:<span[^>]*></span>)?(.*?)</td>", row) for row in re.findall(r"<tr>(.*?)</tr>", body)
    ]
    assert [row[2:4] for row in cells] == [["3", "3"]] * 4
    suspects = {name: sum(row["kind"] == "label" and row["label"] == name for row in rows) for name, *_ in cells}
    assert [int(row[4]) for row in cells] == list(suspects.values()) and sum(suspects.values()) == 5


def test_hostile_names_are_text_and_nothing_is_fetched(tmp_path):
    audit, names = case(tmp_path, name=HOSTILE, path=HOSTILE)
    page, rows, _ = written(tmp_path, audit, names)
    parsed = Page(page)
    assert "<script" not in page and "<img src=x" not in page and "\x1b" not in page and "\u202e" not in page
    assert not re.search(r"https?:|//|url\(|@import", re.sub(r"base64,[^\"]*", "", page).replace("\\", ""))
    pictures = [attrs for tag, attrs in parsed.tags if tag in ("svg", "img")]
    assert pictures and all(attrs.get("alt") or attrs.get("aria-label") for attrs in pictures)
    assert any(row["path"] == f"{HOSTILE} 1\udcff" for row in rows)  # in the table it is exact


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1440])
def test_a_browser_shows_it_in_both_schemes_without_errors_requests_or_sideways_scrolling(
    tmp_path, browser, width, scheme
):
    audit, names = case(
        tmp_path, classes=20, findings=30, name="a_very_long_name_without_any_space" * 2, path="x" * 200
    )
    written(tmp_path, audit, names)
    show(browser, tmp_path / "audit.html", width, scheme)
    look = "return [document.documentElement.scrollWidth, innerWidth, document.getElementById('copies').textContent]"
    wide, window, copies = ask(browser, look)
    assert window == width and wide <= window and copies == "90"
    paper, ink = ask(browser, "const s = getComputedStyle(document.body); return [s.backgroundColor, s.color]")
    light = [sum(map(int, re.findall(r"\d+", colour)[:3])) / 3 for colour in (paper, ink)]
    assert (light[0] > 200 and light[1] < 60) if scheme == "light" else (light[0] < 60 and light[1] > 200)
    # Cards do not run into each other.
    look = """const boxes = [...document.querySelectorAll('.card')].map(card => card.getBoundingClientRect())
        return boxes.filter((a, i) => boxes.slice(i + 1, i + 9).some(b =>
            a.left < b.right - 1 && b.left < a.right - 1 && a.top < b.bottom - 1 && b.top < a.bottom - 1)).length"""
    assert ask(browser, look) == 0
    assert complaints(browser) == []
    assert fetched(browser) == [(tmp_path / "audit.html").as_uri()]
