"""The audit's page: its figures are the table's, names are text, nothing is fetched, a browser shows it well."""

import csv
import html
import io
import os
import re
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from browsing import HOSTILE, Page, ask, call, complaints, fetched, show
from conftest import COLOURS, ROOT, go
from PIL import Image

import train
from transfer.audit.audit import Audit
from transfer.audit.findings import KINDS, AuditSplit, Finding
from transfer.audit.label_errors import score_labels
from transfer.audit.learning_curve import Curve
from transfer.inputs.corrections import ClassLabels, Corrections
from transfer.inputs.lists import ImageList
from transfer.pages.audit_page import TITLES, WORDS, balance_table, save_audit
from transfer.pages.choices import SCRIPT, Choices


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
            step = {"conflict": 1, "leak": 1, "duplicate": classes}.get(kind)  # a duplicate is of one class
            other = (splits[0], (number + step) % count) if step else None
            suggestion = (number + 1) % classes if kind in ("label", "conflict") else None
            split = splits[kind == "leak"]
            found.append(Finding(kind, split, number % count, 0.99 - number / 1000, suggestion, other))
    curve = Curve(
        [10, 20, 40],
        torch.tensor([[0.3, 0.32], [0.4, 0.41], [0.5, 0.5]]),
        torch.full((classes,), 50),
        torch.tensor([[0.2] * classes, [0.3] * classes, [0.7] * classes]),
    )
    return Audit(*splits, qualities, count, curve, found), [f"{name} {number}" for number in range(classes)]


def written(tmp_path, audit, names, model="best.pth", earlier=()):
    """The page, the rows of the table beside it, and the line that says what was found."""
    corrections = Corrections([Path(name) for name in earlier], ClassLabels(names, names, named=True))
    summary = save_audit(tmp_path / "audit.html", audit, corrections, tmp_path / model, argv=["--train", "my photos"])
    table = (tmp_path / "audit.csv").read_bytes().decode(errors="surrogateescape")
    page = (tmp_path / "audit.html").read_text(encoding="utf-8")
    return page, list(csv.DictReader(io.StringIO(table, newline=""))), summary


def test_the_figures_are_those_of_the_table(tmp_path):
    audit, names = case(tmp_path, findings=7)
    page, rows, summary = written(tmp_path, audit, names)
    count = {kind: sum(row["kind"] == kind for row in rows) for kind in KINDS}
    figures = {key: int(re.search(rf'id="{key}">([\d,]+)<', page)[1]) for key in ("labels", "copies", "outliers")}
    copies = count["conflict"] + count["leak"] + count["duplicate"]
    assert figures == {"labels": count["label"], "copies": copies, "outliers": count["outlier"]} and copies == 21
    assert summary.endswith("audit.csv: 7 probably wrong labels, 21 copies, 7 strange photos")
    assert page.count('<li class="card"') == 14 and page.count('<li class="card twin"') == 21
    label = next(row for row in rows if row["kind"] == "label")
    first = re.search(r'<li class="card"[^>]*>(.*?)</li>', page, re.S)[1]
    assert f"not <b>{label['label']}</b>? perhaps <b>{label['suggestion']}</b>" in first
    score = float(label["score"])
    assert f'<span>{score:.0%}</span><i style="--share:{score:.1%}"></i></div>' in first
    assert f"{label['list']}:{label['line']} " in first
    for name, quality in zip(("train.txt", "test.txt"), audit.qualities, strict=True):
        words = f"<p>{name}: {len(quality.suspects)} labels of 12 probably wrong. Estimate: {quality.noise_rate:.1%}"
        power = f"Of wrong labels it finds about {10 * quality.power:.0f} in 10.</p>"
        assert page.count(f"{words} of the labels are wrong. {power}") == 1
    assert "Not judged" not in page and page.count("both labelled <b>class 0</b>") == 2
    assert "labelled <b>class 0</b> and <b>class 1</b>; probably <b>class 1</b>" in page
    assert page.count("; probably <b>") == count["conflict"] and page.count('<p class="path">') == 14 + 2 * 21
    weak = replace(audit.qualities[1], power=0.14)
    page, _, summary = written(tmp_path, replace(audit, qualities=(audit.qualities[0], weak)), names)
    words = "test.txt: 12 photos not judged. The model knows these classes too little. Of wrong labels it finds about 1"
    assert f"{words} in 10.</p>" in page and page.count("<p>Not judged: 12 test photos</p>") == 1
    assert "(not judged: 12 test photos)" in summary
    weak = replace(audit.qualities[1], power=0.6, agreement=0.019)
    page, _, _ = written(tmp_path, replace(audit, qualities=(audit.qualities[0], weak)), names)
    assert "knows these classes too little. It would give 1.9% of the labels itself.</p>" in page


def test_the_table_has_the_columns_that_are_promised(tmp_path):
    _, rows, _ = written(tmp_path, *case(tmp_path, findings=1))
    assert list(rows[0]) == ["list", "line", "path", "kind", "label", "suggestion", "score", "other"]
    leak = next(row for row in rows if row["kind"] == "leak")
    assert (leak["list"], leak["line"], leak["other"]) == ("test.txt", "1", "photo 1\udcff")


def test_all_findings_are_there_a_hundred_of_a_kind_open(tmp_path, monkeypatch):
    monkeypatch.setattr("transfer.pages.html.SHELF", 15)
    page, rows, _ = written(tmp_path, *case(tmp_path, classes=20, findings=40))
    assert len(rows) == 200 == page.count('<li class="card')
    assert page.count("<details><summary>16 to 30 of 40</summary>") == 5 == page.count("<summary>31 to 40 of 40<")


def test_pictures_beyond_20_mb_are_left_out_and_counted(tmp_path, monkeypatch):
    monkeypatch.setattr("transfer.pages.html.THUMBNAIL_BYTES", 2000)
    page, _, _ = written(tmp_path, *case(tmp_path, findings=5))
    cut = int(re.search("To keep this page small, ([0-9]+) pictures are left out.", page)[1])
    assert page.count(">left out</div>") == cut and 30 <= cut < 40 and page.count('<li class="card') == 25


def test_where_nothing_was_found_the_page_says_so(tmp_path):
    page, rows, summary = written(tmp_path, *case(tmp_path, findings=0))
    kinds = (
        "one photo, two labels; test photos that are also training photos; photos that are there twice; strange photos"
    )
    assert f"<p>None found: labels that are probably wrong; {kinds}.</p>" in page and page.count("None found") == 1
    assert page.count(" of 12 probably wrong. Estimate: ") == 2
    assert 'id="labels"' in page and "href" not in page and '<li class="card' not in page
    assert rows == [] and summary.endswith("0 probably wrong labels, 0 copies, 0 strange photos")


def test_where_heads_were_trained_on_a_part_or_no_curve_was_drawn_the_page_says_so(tmp_path, monkeypatch):
    audit, names = case(tmp_path)
    page, *_ = written(tmp_path, replace(audit, trained_on=5), names)
    assert page.count("were trained on 5 of the 12 photos") == 1
    page, *_ = written(tmp_path, replace(audit, curve=None), names)
    assert "trained on" not in page and "Too few photos to tell" in page
    monkeypatch.setattr("transfer.pages.audit_page.MOST_WORK", 3)
    page, *_ = written(tmp_path, replace(audit, curve=None), names)
    assert "Not computed: with so many photos and classes" in page


def test_of_lists_that_were_judged_together_the_estimate_is_told_once(tmp_path):
    audit, names = case(tmp_path)
    assert written(tmp_path, audit, names)[0].count("Estimate: ") == 2
    page, *_ = written(tmp_path, replace(audit, judged_together=True), names)
    assert re.search(r"<p>train.txt: .* of 12 probably wrong; test.txt: .* of 12 probably wrong. Estimate: ", page)
    assert page.count("Estimate: ") == 1
    weak = tuple(replace(quality, power=0.0) for quality in audit.qualities)
    page, *_ = written(tmp_path, replace(audit, judged_together=True, qualities=weak), names)
    assert "<p>train.txt and test.txt: 24 photos not judged." in page


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
    assert page.count('class="line blue"') == 1 and "line blue dash" not in page


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
    # Each size is twice the one before: equal steps; and 1% is 1.92 high, from 230 up.
    ahead = f"M276.7 134.0L386.0 {230 - 96 * sum(expected):.1f}"
    lines = [("line blue", "M58.0 170.5L167.3 152.2L276.7 134.0"), ("line blue dash", ahead)]
    assert re.findall(r'<path class="(line [^"]*)" d="([^"]*)"', page) == lines
    dots = re.findall(r'<circle class="blue" cx="([\d.]+)" cy="([\d.]+)"', page)
    assert dots[:2] == [("58.0", "172.4"), ("58.0", "168.6")] and len(dots) == 6
    assert '<text x="58.0" y="158.6" class="mid ink">31%</text>' in page  # above the highest dot
    assert '<text x="386.0" y="248.0" class="mid">80</text>' in page


@pytest.mark.parametrize(
    ("points", "named"), [([0.3, 0.4, 0.5], True), ([0.9, 0.9, 0.9], False), ([0.5, 0.6, 0.5], False)]
)
def test_where_more_photos_would_help_and_only_there_the_command_that_chooses_them_is_named(
    tmp_path, monkeypatch, points, named
):
    audit, names = case(tmp_path)
    monkeypatch.chdir(ROOT)
    audit = replace(audit, curve=replace(audit.curve, accuracy=torch.tensor(points)[:, None]))
    page, _, _ = written(tmp_path, audit, names, model="my model.pth")
    command = "python predict.py FOLDER --label-next 40 --report next.html --model "
    assert (f"{command}&#x27;{tmp_path}/my model.pth&#x27;</code>" in page) == named == ("--label-next" in page)
    monkeypatch.chdir(tmp_path)  # where the command must find its script
    assert (f"python {ROOT}/predict.py FOLDER --label-next" in written(tmp_path, audit, names)[0]) == named


def test_the_balance_counts_every_image(tmp_path):
    audit, names = case(tmp_path, classes=4, findings=5)
    page, rows, _ = written(tmp_path, audit, names)
    body = re.search(r'<table id="balance">.*?<tbody>(.*?)</tbody>', page, re.S)[1]
    cells = [
        re.findall(r"<td[^>]*>(?:<span[^>]*></span>)?(.*?)</td>", row) for row in re.findall(r"<tr>(.*?)</tr>", body)
    ]
    assert [row[2:4] for row in cells] == [["3", "3"]] * 4
    suspects = {name: sum(row["kind"] == "label" and row["label"] == name for row in rows) for name, *_ in cells}
    assert [int(row[4]) for row in cells] == list(suspects.values()) and sum(suspects.values()) == 5
    assert "The largest class has 3 training images, 1.0 times the smallest’s." in page
    uneven = replace(audit, train=replace(audit.train, labels=torch.tensor([0] * 8 + [2] * 4)))
    text = balance_table(uneven, names)
    assert "The largest class has 8 training images, any number of times the smallest’s." in text
    assert re.findall(r'<td title="(.*?)"', text) == ["class 1", "class 3", "class 2", "class 0"]
    assert re.findall(r"--share:(.*?)%", text) == ["0.0", "0.0", "50.0", "100.0"]


def test_hostile_names_are_text_and_nothing_is_fetched(tmp_path):
    audit, names = case(tmp_path, name=HOSTILE, path=HOSTILE)
    page, rows, _ = written(tmp_path, audit, names)
    parsed = Page(page)
    assert page.count("<script") == 1 and page.count(f"<script>{SCRIPT}</script>") == 1
    assert "<img src=x" not in page and "\x1b" not in page and "\u202e" not in page
    rest = re.sub(r"base64,[^\"]*", "", page.replace(SCRIPT, "")).replace("\\", "")
    assert not re.search(r"https?:|//|url\(|@import", rest)
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


def test_printed_all_findings_are_there_and_nothing_to_press(tmp_path, browser, monkeypatch):
    monkeypatch.setattr("transfer.pages.html.SHELF", 4)
    written(tmp_path, *case(tmp_path, classes=20, findings=10))
    show(browser, tmp_path / "audit.html", 1280)
    look = """const seen = (some) => [...document.querySelectorAll(some)].filter(each => each.checkVisibility()).length
        return [seen('.card'), seen('summary, .choices, .dock')]"""
    assert ask(browser, look)[0] == 20
    call("POST", f"{browser}/goog/cdp/execute", {"cmd": "Emulation.setEmulatedMedia", "params": {"media": "print"}})
    assert ask(browser, look) == [50, 0]


def test_cards_out_of_sight_are_not_drawn(tmp_path, browser):
    written(tmp_path, *case(tmp_path, classes=20, findings=30))
    show(browser, tmp_path / "audit.html", 1280)
    look = """const drawn = (each) => each.checkVisibility({contentVisibilityAuto: true})
        return [...document.querySelectorAll('.card > .path')].filter(drawn).length"""
    assert 0 < ask(browser, look) < 100


# Corrections


def press(browser, *keys):
    """Type keys in the page, whatever has the focus; and let it answer."""
    actions = [{"type": kind, "value": key} for key in keys for kind in ("keyDown", "keyUp")]
    call("POST", f"{browser}/actions", {"actions": [{"type": "key", "id": "keys", "actions": actions}]})


def click(browser, selector):
    ask(browser, f"document.querySelector('{selector}').scrollIntoView({{block: 'center'}})")  # not below the foot
    element = call("POST", f"{browser}/element", {"using": "css selector", "value": selector})
    call("POST", f"{browser}/element/{next(iter(element.values()))}/click", {})


def downloads(browser, folder):
    """Have the browser save downloads in a folder."""
    params = {"behavior": "allow", "downloadPath": str(folder)}
    call("POST", f"{browser}/goog/cdp/execute", {"cmd": "Browser.setDownloadBehavior", "params": params})


def downloaded(path):
    deadline = time.monotonic() + 10
    while not path.exists():
        assert time.monotonic() < deadline, f"no {path.name} was saved"
        time.sleep(0.05)
    return path.read_bytes().decode().splitlines()[1:]  # below a comment


STATE = """return [document.querySelector('[role=status]').textContent,
    document.activeElement.closest('li')?.dataset.paths ?? document.activeElement.textContent,
    [...document.querySelectorAll('[aria-pressed=true]')].map(each => each.textContent.slice(2))]"""
NAMES = ['"><script>document.title="mine"</script>', "plum", "dragon fruit", "kiwi"]


@pytest.fixture
def colourful(few):
    """An audit, made up, of three labels, a conflict and a duplicate among solid colours, and the names of classes."""
    for row, (colour, name) in enumerate(zip(COLOURS, NAMES, strict=False)):
        os.rename(colour, f"photos {row}")
    audit, _ = case(few)
    paths = [*(f"photos {n}/train_{k}.png".encode() for n in range(3) for k in range(2)), b"a\nb.png"]
    image_list = ImageList("train.txt", paths, [0, 0, 1, 1, 2, 2, 3], range(1, 8))
    split = AuditSplit(train.ImageDataset(image_list, [0], 0), torch.arange(7), torch.randn(7, 1, 8), image_list.labels)
    found = [Finding("label", split, place, 0.9, suggestion) for place, suggestion in ((0, 1), (2, 0), (3, 2), (6, 0))]
    found += [Finding("conflict", split, 4, 0.9, 0, (split, 1)), Finding("duplicate", split, 5, 0.9, None, (split, 4))]
    return replace(audit, train=split, findings=found), NAMES


def test_decisions_are_clicked_typed_undone_kept_and_saved_as_corrections(colourful, tiny, quick, tmp_path, browser):
    written(tmp_path, *colourful, earlier=["corrections.txt"])
    show(browser, tmp_path / "audit.html", 1280)
    downloads(browser, tmp_path)
    assert ask(browser, STATE)[0] == "0 decided, 5 to go" and ask(browser, "return document.title") != "mine"
    click(browser, "li:nth-of-type(1) button")  # plum, as suggested
    assert ask(browser, STATE)[::2] == ["1 decided, 4 to go", ["plum"]]
    click(browser, "li:nth-of-type(2) button")  # whose name is hostile
    press(browser, "2")  # keep, after all; and on to the next
    assert ask(browser, STATE) == ["2 decided, 3 to go", "photos%201/train_1.png", ["plum", "keep"]]
    press(browser, "\ue014", "\ue014", "\ue007")  # arrow right, twice, and Enter: leave out
    assert ask(browser, STATE)[0] == "3 decided, 2 to go"
    press(browser, "u")
    assert ask(browser, STATE)[:2] == ["2 decided, 3 to go", "photos%201/train_1.png"]
    press(browser, "4", "k")  # the list of all classes
    press(browser, "\ue012")  # arrow left, out of it
    assert ask(browser, STATE)[0] == "3 decided, 2 to go"
    press(browser, "\ue015", "1")  # arrow down, to the conflict: both what the other is
    assert ask(browser, STATE)[:2] == ["4 decided, 1 to go", "photos%202/train_1.png photos%202/train_0.png"]
    press(browser, "2")  # a duplicate: leave out one
    assert ask(browser, STATE)[:2] == ["5 decided, 0 to go", "Save corrections"]
    asks = "const leave = new Event('beforeunload', {cancelable: true}); return !window.dispatchEvent(leave)"
    assert ask(browser, asks)
    press(browser, "\ue007")
    lines = downloaded(tmp_path / "corrections2.txt")
    hostile = NAMES[0]
    assert lines == [
        "photos 0/train_0.png plum",
        "photos 1/train_1.png kiwi",
        f"photos 2/train_0.png {hostile}",
        f"photos 0/train_1.png {hostile}",
        "photos 2/train_1.png -",
    ]
    assert not ask(browser, asks)
    for _ in range(3):  # beside much other work the browser's storage may answer a page too late
        call("POST", f"{browser}/refresh", {})
        if (after := ask(browser, STATE)[0]) == "5 decided, 0 to go":
            break
    assert after == "5 decided, 0 to go"
    assert complaints(browser) == [] and set(fetched(browser)) <= {(tmp_path / "audit.html").as_uri()}
    (tmp_path / "train.txt").write_text("".join(f"photos {n}/train_{k}.png {n}\n" for n in range(3) for k in range(2)))
    (tmp_path / "test.txt").write_text("".join(f"photos {n}/test_0.png {n}\n" for n in range(2)))
    Path("names").write_text("\n".join(NAMES[:3]))
    (tmp_path / "corrections2.txt").write_text("\n".join(lines).replace("kiwi", "plum"))
    out = go("--epochs", 1, "--classes", "names", "--corrections", "corrections2.txt")
    assert "\ncorrections 2 labels, 1 left out, 2 as they were (corrections2.txt)\n" in out


def test_two_tabs_of_one_page_show_the_same_decisions(colourful, tmp_path, browser):
    written(tmp_path, *colourful)
    show(browser, tmp_path / "audit.html", 1280)
    ask(browser, "localStorage.clear()")  # what other tests decided of the same cards
    show(browser, tmp_path / "audit.html", 1280)
    click(browser, "li button")
    tab, other = call("GET", f"{browser}/window"), call("POST", f"{browser}/window/new", {"type": "tab"})["handle"]
    call("POST", f"{browser}/window", {"handle": other})
    call("POST", f"{browser}/url", {"url": (tmp_path / "audit.html").as_uri()})
    click(browser, "li:nth-of-type(2) button")
    call("DELETE", f"{browser}/window")
    call("POST", f"{browser}/window", {"handle": tab})
    assert ask(browser, STATE)[0] == "2 decided, 3 to go" and ask(browser, STATE)[2] == ["plum", NAMES[0]]
    click(browser, "li button")
    assert ask(browser, STATE)[0] == "1 decided, 4 to go"


def test_a_browser_that_keeps_nothing_says_so(colourful, tmp_path, browser):
    written(tmp_path, *colourful)
    closed = "Object.defineProperty(window, 'localStorage', {get() { throw new Error('closed') }})"
    body = {"cmd": "Page.addScriptToEvaluateOnNewDocument", "params": {"source": closed}}
    script = call("POST", f"{browser}/goog/cdp/execute", body)
    show(browser, tmp_path / "audit.html", 1280)
    body = {"cmd": "Page.removeScriptToEvaluateOnNewDocument", "params": script}
    call("POST", f"{browser}/goog/cdp/execute", body)
    assert ask(browser, "return document.querySelector('.volatile').checkVisibility()")
    click(browser, "li button")
    assert ask(browser, STATE)[0] == "1 decided, 4 to go" and complaints(browser) == []


def test_without_scripts_there_are_no_choices_and_names_that_no_list_can_hold_never_have_any(colourful, tmp_path):
    page, _, _ = written(tmp_path, *colourful)
    tags = [(tag, attrs) for tag, attrs in Page(page).tags if "choices" in attrs.get("class", "") or tag == "aside"]
    assert len(tags) == 7 and all("hidden" in attrs for _, attrs in tags)
    assert [tag for tag, _ in tags] == ["div", "div", "div", "p", "div", "div", "aside"]
    assert "No choices: a list can’t hold this name (a line break in it)." in page
    command = "train.py --train &#x27;my photos&#x27; --corrections corrections.txt</code>"
    assert command in page and "Put corrections.txt into the folder that you run this in: " in page


def test_new_corrections_are_called_as_no_file_there_and_no_earlier_ones(colourful, few):
    def name():
        return re.search('data-file="(.*?)"', written(few, *colourful, earlier=["old/corrections2.txt"])[0])[1]

    assert name() == "corrections.txt"
    (few / "corrections.txt").touch()
    assert name() == "corrections3.txt"


@pytest.mark.parametrize(
    ("kind", "other", "words"),
    [
        ("label", None, ["plum", "keep", "leave out"]),
        ("outlier", None, ["keep", "leave out"]),
        ("conflict", 1, ["both plum", "both kiwi", "keep", "leave out both"]),
        ("leak", 1, ["keep", "leave out of test", "leave out of training"]),
        ("leak", 0, ["keep", "leave out"]),  # one path in both lists
        ("duplicate", 1, ["keep", "leave out one"]),
    ],
)
def test_each_kind_of_finding_has_its_choices(colourful, kind, other, words):
    split = colourful[0].train
    image_list = ImageList("train.txt", [b"a", b"b"], [1, 0], [1, 2])
    split = replace(split, dataset=train.ImageDataset(image_list, [0], 0), labels=torch.tensor([1, 0]))
    classes = ["plum", "kiwi"]
    found = Finding(kind, split, 0, 0.9, 0 if kind == "label" else None, None if other is None else (split, other))
    assert [name for name, _ in Choices(ClassLabels(classes, classes, True)).of_finding(found)] == words
