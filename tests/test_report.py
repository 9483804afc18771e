"""The report: its figures are the scores', hostile names are text, nothing is fetched, a browser shows it well."""

import html
import math
import re
from collections import Counter

import pytest
import torch
from browsing import HOSTILE, Page, ask, complaints, fetched, show
from PIL import Image

from transfer.metrics import ClassificationScores, ScoredImage, ScoredImages, calibration_bins, rounded_percent
from transfer.pages import report
from transfer.system.console import UserError, printable
from transfer.system.files import path_digest

CURVES = [
    {
        "epoch": str(epoch),
        "train_loss": str(2 / epoch),
        "train_accuracy": "0.5",
        "test_loss": str(3 / epoch),
        "test_accuracy": "0.4",
        "lr": "0.005" if epoch < 5 else "0.0025",
        "best": str(int(epoch in (1, 3))),
    }
    for epoch in range(1, 9)
]


def scores_of(labels, probs):
    """The scores of labels (N,) and probabilities (N, C)."""
    scores = ClassificationScores(probs.shape[1])
    for label, each in zip(labels.tolist(), probs, strict=True):
        scores.update(label, each)
    return scores


def case(classes, images, name="class"):
    """All that a page is made of, made up; no image file exists, and the last class has no image."""
    generator = torch.Generator().manual_seed(classes)
    labels = torch.arange(images) % (classes - 1)
    logits = 2 * torch.randn(images, classes, generator=generator)
    logits[torch.arange(images), labels] += 2.5
    probs = logits.softmax(1)
    return {
        "metadata": {"epoch": 3, "backbone": "ImageNet", "recipe": {"lr": 0.005}, "seconds": 14.25},
        "scores": scores_of(labels, probs),
        "classes": [f"{name} {number}" for number in range(classes)],
        "paths": [f"photos/{number}.jpg".encode() for number in range(images)],
        "labels": labels,
        "probs": probs,
        "curves": CURVES,
        "model": "best.pth",
        "lists": ["test.txt"],
    }


def written(tmp_path, given, target="report.html"):
    """The page that is made of it; the curves lie beside the model, as training leaves them."""
    labels, names = given["labels"].tolist(), {key: given[key] for key in ("model", "lists")}
    whole = zip(given["paths"][: len(labels)], labels, given["probs"], strict=True)
    images = ScoredImages()
    for path, label, probs in whole:
        images.add(ScoredImage.of(path, label, probs))
    metadata = {"classes": given["classes"]} | given["metadata"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(report, "read_history", lambda model: given["curves"] if model == given["model"] else None)
        report.save_report(tmp_path / target, metadata, given["scores"], images, **names)
    return (tmp_path / target).read_text(encoding="utf-8")


def table(page):
    """The cells of the table of classes, row by row, as text."""
    body = re.search(r'<table id="classes">.*?<tbody>(.*?)</tbody>', page, re.S)[1]
    cells = [re.findall(r"<td[^>]*>(.*?)</td>", row) for row in re.findall(r"<tr>(.*?)</tr>", body, re.S)]
    return [[html.unescape(re.sub(r"<[^>]*>", "", cell)) for cell in row] for row in cells]


def matrix_names(page, kind):
    """(x, y) of the class names on one side of the matrix, and the size of their letters."""
    drawn = re.search(rf'<svg [^>]*class="{kind}"[^>]*font-size:([\d.]+)px.*?</svg>', page, re.S)
    places = re.findall(r'<text [^>]*?x="([\d.]+)" y="([\d.]+)"', drawn[0])
    return [(float(x), float(y)) for x, y in places], float(drawn[1])


# Figures


@pytest.mark.parametrize(("classes", "images"), [(3, 99), (20, 100), (200, 1500)])
def test_the_figures_are_the_scores(tmp_path, classes, images):
    given = case(classes, images)
    scores, page = given["scores"], written(tmp_path, given)
    assert re.search(r'<span id="accuracy">([^<]*)</span>', page)[1] == f"{scores.accuracy:.0%}"
    assert f">{scores.top3:.0%}<" in page
    assert "95% interval {:.0%} to {:.0%}".format(*scores.accuracy_interval) in page
    assert ("too few photos to tell" in page) == (images < 100) == ("points on average" not in page)
    rows = {row[0]: row[2:6] for row in table(page)}
    assert len(rows) == classes
    for index, name in enumerate(given["classes"]):
        figures = [float(column[index]) for column in (scores.recall, scores.precision, scores.f1)]
        recall, precision, f1 = ("–" if math.isnan(figure) else f"{figure:.1%}" for figure in figures)
        assert rows[name] == [recall, f"{int(scores.images[index]):,}", precision, f1]


@pytest.mark.parametrize(
    ("value", "interval", "words"),
    [(0.8, (0.55, 0.93), "80%"), (0.8123, (0.805, 0.82), "81.2%"), (0.81234, (0.812, 0.813), "81.23%")],
)
def test_a_figure_has_no_decimals_that_its_interval_does_not_have(value, interval, words):
    assert rounded_percent(value, interval) == words


@pytest.mark.parametrize(("share", "mark"), [(0.5, "198.5"), (0, "0.0"), (1, "397.0")])
def test_a_share_is_marked_on_its_line_with_its_interval_around_it(share, mark):
    strip = report.interval_strip(share, (0.4, 0.6))
    assert '<rect class="span" x="160.0" y="1" width="80.0"' in strip and f'<rect class="blue" x="{mark}"' in strip


def test_the_mistakes_come_first_and_the_settings_last(tmp_path):
    names = re.findall("<h2>(.*?)</h2>", written(tmp_path, case(3, 12)))
    assert names == ["Mistakes", "Classes", "Confusion matrix", "Confidence", "Learning curves", "Settings"]


def test_the_table_lists_the_worst_recall_first_and_names_what_a_class_is_taken_for(tmp_path):
    given = case(4, 30)
    labels = torch.tensor([1] * 4 + [2] * 4 + [3] * 4)
    guesses = torch.tensor([1, 1, 1, 1, 3, 3, 1, 2, 3, 3, 2, 2])
    probs = torch.eye(4)[guesses]
    given |= {"labels": labels, "probs": probs, "scores": scores_of(labels, probs)}
    page = written(tmp_path, given)
    assert "Most frequent mistakes: class 2 taken for class 3 (2), class 3 taken for class 2 (2), class 2" in page
    assert re.findall(r'class="bar"><span style="--share:(.*?)%', page) == ["25.0", "50.0", "100.0", "0.0"]
    assert [(row[0], row[2], row[6]) for row in table(page)] == [
        ("class 2", "25.0%", "class 3 (2)"),
        ("class 3", "50.0%", "class 2 (2)"),
        ("class 1", "100.0%", "–"),
        ("class 0", "–", "–"),  # no image: it has no recall
    ]


def test_the_matrix_holds_every_count_once(tmp_path):
    given = case(20, 300)
    page = written(tmp_path, given)
    titles = re.findall(r"<title>(class \d+), (found|taken for class \d+): (\d+) of (\d+)</title>", page)
    counts = {(true, taken.removeprefix("taken for ")): int(count) for true, taken, count, _ in titles}
    pairs = Counter(zip(given["labels"].tolist(), given["probs"].argmax(1).tolist(), strict=True))
    assert counts == {
        (f"class {row}", "found" if row == column else f"class {column}"): count
        for (row, column), count in pairs.items()
    }
    drawn = re.search(r'class="cells".*?</svg>', page, re.S)[0]
    assert sorted(map(int, re.findall(r">(\d+)</text>", drawn))) == sorted(counts.values())
    hits = counts["class 0", "found"]
    square = f'x="1" y="1" width="32" height="32" fill-opacity="{0.1 + 0.9 * hits / 16:.2f}"'
    count = f'<text class="mid count" x="17" y="21.3" font-size="12.0">{hits}</text>'
    assert f'<title>class 0, found: {hits} of 16</title><rect class="cell" {square}/>{count}' in drawn
    assert drawn.count('class="grid"') == 19
    assert '<rect class="frame" x=".5" y=".5" width="679" height="679"/>' in drawn  # 20 cells of 34


def test_of_very_many_classes_the_mistakes_are_named_and_not_drawn(monkeypatch):
    scores = scores_of(torch.arange(3), torch.eye(3))
    monkeypatch.setattr(report, "MAX_MATRIX_CLASSES", 3)
    assert "<svg" in report.confusion_matrix(scores, ["a", "b", "c"])
    monkeypatch.setattr(report, "MAX_MATRIX_CLASSES", 2)
    words = "<p>Not drawn of more than 2 classes. No image was taken for another class.</p>"
    assert report.confusion_matrix(scores, ["a", "b", "c"]) == words


def test_calibration_is_what_a_hand_counts():
    # Confidence 0.9 twice, one right; 0.6 twice, both right; 0.5 once, wrong.
    probs = torch.tensor([[0.9, 0.1], [0.9, 0.1], [0.4, 0.6], [0.6, 0.4], [0.5, 0.5]])
    labels = torch.tensor([0, 1, 1, 0, 1])
    count, right, confidence, ece = calibration_bins(probs.amax(1), probs.argmax(1) == labels)
    assert count.tolist() == [0, 0, 0, 0, 1, 2, 0, 0, 2, 0]  # a tenth holds its upper end: (0.8, 0.9]
    assert right.tolist() == [0, 0, 0, 0, 0, 2, 0, 0, 1, 0]
    assert confidence[[4, 5, 8]].tolist() == pytest.approx([0.5, 0.6, 0.9])
    assert ece == pytest.approx((2 * abs(0.5 - 0.9) + 2 * abs(1 - 0.6) + 1 * abs(0 - 0.5)) / 5)


def test_the_histogram_and_its_error_are_on_the_page(tmp_path):
    given = case(3, 12)
    labels = torch.tensor([0, 1, 1, 0])
    probs = torch.tensor([[0.9, 0.05, 0.05], [0.9, 0.05, 0.05], [0.3, 0.6, 0.1], [0.6, 0.3, 0.1]])
    page = written(tmp_path, given | {"labels": labels, "probs": probs, "scores": scores_of(labels, probs)})
    below, above = (f'x="330.8" y="{y}" width="31.6" height="96.0"/>' for y in ("134.0", "38.0"))
    bars = f'<rect class="blue" {below}<rect class="orange" {above}</g><text x="346.6" y="32.0" class="mid">2</text>'
    assert f"80% to 90%: 1 right, 1 wrong</title>{bars}" in page and "50% to 60%: 2 right, 0 wrong" in page
    assert "right and wrong: 0 and 0; 0 and 0; 0 and 0; 0 and 0; 0 and 0; 2 and 0; 0 and 0; 0 and 0; 1 and 1; 0" in page
    assert f'1 of 2 right at a mean confidence of 90.0%</title><rect class="blue few" {below}' in page
    assert page.count('<path class="ideal" d="M44.0 230.0L400.0 38.0"/>') == 1
    shares = ["no images"] * 5 + ["100%", "no images", "no images", "50%", "no images"]
    assert f"Share right in each tenth of confidence: {', '.join(shares)}" in page
    assert report.reliability_chart([9, 10], [5, 5], [0.05, 0.15]).count("blue few") == 1
    assert '<b id="ece">40.00%</b>' in page
    assert "Mean confidence is 75.0%, and 75.0% are right" in page


def test_mistakes_come_by_falling_confidence_and_hits_by_rising(tmp_path):
    given = case(20, 300)
    page = written(tmp_path, given)
    confidence, guesses = given["probs"].max(1)
    right = guesses == given["labels"]
    mistakes = [i for i in confidence.argsort(descending=True).tolist() if not right[i]][:24]
    hits = [i for i in confidence.argsort().tolist() if right[i]][:12]
    cards = re.findall(r'<p class="path">photos/(\d+)\.jpg</p>', page)
    assert len(mistakes) == 24 and list(map(int, cards)) == mistakes + hits
    wrong = int((~right).sum())
    assert f"Most confident mistakes, 24 of {wrong}<" in page and f"Least confident hits, 12 of {300 - wrong}<" in page
    worst = mistakes[0]
    first = re.search(r'<li class="card">(.*?)</li>', page, re.S)[1]
    label, tops = int(given["labels"][worst]), given["probs"][worst].topk(3).indices.tolist()
    assert f"labelled <b>class {label}</b>" in first
    kinds = ["wrong", *("right" if guess == label else "" for guess in tops[1:])]
    assert re.findall(r'<div class="guess ?(\w*)"', first) == kinds
    assert re.findall(r"<span>([\d.]+%)</span>", first) == [f"{p:.1%}" for p in given["probs"][worst].topk(3).values]


def test_curves_mark_the_last_best_epoch_and_the_drop_of_the_rate(tmp_path):
    page = written(tmp_path, case(3, 12))
    assert page.count(">best, epoch 3</text>") == 2  # loss and accuracy
    assert page.count(">0.0025</text>") == 2 and page.count('class="drop" d=') == 2
    # Of a loss of 3 at most, 1 is 64 high; from epoch to epoch it is 356 / 7.
    line = re.search(r'class="line orange" d="([^"]*)"', page)[1]
    assert line.startswith("M44.0 38.0L44.0 38.0L94.9 134.0L145.7 166.0L") and line.endswith("L400.0 206.0")
    assert '<circle class="ring" cx="145.7" cy="166.0"' in page
    assert page.count('<text x="400.0" y="248.0" class="mid">8</text>') == 2
    assert "Loss by epoch, train from 2 to 0.25, test from 3 to 0.375; best epoch 3" in page
    assert page.count("test list<") == 1 == page.count("those of the test list.<") and "validation" not in page
    split = [{key.replace("test", "val"): value for key, value in row.items()} for row in CURVES]
    other = written(tmp_path, case(3, 12) | {"curves": split})
    assert other.replace("validation split", "test list") == page and other.count("validation split") == 2


@pytest.mark.parametrize(("x", "place"), [(104, ""), (104.1, "mid"), (340, "mid"), (340.1, "end")])
def test_the_best_epochs_name_stays_within_the_chart(x, place):
    mark = report.best_mark(x, 166, 3)
    assert f'<text x="{x:.1f}" y="11.0" class="ink {place}">best, epoch 3<' in mark
    assert f'd="M{x:.1f} 15.0L{x:.1f} 161.0"' in mark


def test_the_history_beside_a_checkpoint_is_read_and_a_damaged_one_is_none(tmp_path):
    (tmp_path / "best.csv").write_text("epoch,lr\n1,0.005\n")
    assert report.read_history(tmp_path / "best.pth") == [{"epoch": "1", "lr": "0.005"}]
    (tmp_path / "best.csv").write_bytes(b"epoch,lr\n1,\xff\n")
    assert report.read_history(tmp_path / "best.pth") == report.read_history(tmp_path / "other.pth") == []


def test_a_rate_is_written_above_its_drop_where_there_is_room():
    marks = report.drop_marks([44, 100, 170, 170.5, 372], [8, 7, 6, 5, 4])
    assert marks.count('class="drop"') == 4 and 'd="M100.0 32.0L100.0 230.0"' in marks
    assert len(report.drops(range(13, 0, -1))) == 12 and report.drops(range(14, 0, -1)) == []
    assert re.findall(r'<text x="([\d.]+)" y="27.0" class="mid">(\d)<', marks) == [("100.0", "7"), ("170.5", "5")]


def test_no_epoch_is_marked_where_none_was_best(tmp_path):
    page = written(tmp_path, case(3, 12) | {"curves": [row | {"best": "0"} for row in CURVES]})
    assert page.count('class="line orange"') == 2 and "best, epoch" not in page and 'class="ring"' not in page


def test_the_metadata_of_the_checkpoint_is_on_the_page(tmp_path):
    metadata = {"backbone": "ImageNet", "train_images": 4750, "accuracy": 0.51234, "seconds": 14.25, "device": "cpu"}
    page = written(tmp_path, case(3, 12) | {"metadata": metadata | {"recipe": {"lr": 0.005, "device": "auto"}}})
    facts = dict(re.findall(r"<dt>(.*?)</dt><dd>(.*?)</dd>", page))
    assert facts == {
        "Backbone": "ImageNet",
        "Training images": "4,750",
        "Accuracy at that epoch": "51.23%",
        "Training time": "14.2 s",
        "Device": "cpu",  # the one it ran on, rather than the setting
        "lr": "0.005",
    }


def test_a_rate_that_drops_every_epoch_is_not_marked(tmp_path):
    curves = [CURVES[0] | {"epoch": str(epoch), "lr": str(1 / epoch)} for epoch in range(1, 40)]
    page = written(tmp_path, case(3, 12) | {"curves": curves})
    assert page.count(">best, epoch 39</text>") == 2
    assert 'class="drop" d=' not in page and "learning rate drops" not in page


# What may be missing, damaged or hostile


def test_hostile_names_are_text(tmp_path):
    given = case(3, 12, name=HOSTILE)
    given["paths"] = [f"{number}{HOSTILE}".encode() + b"\xff.jpg" for number in range(12)]
    given["metadata"] = {"backbone": HOSTILE, "date": [HOSTILE], "seconds": HOSTILE, "recipe": {HOSTILE: HOSTILE}}
    page = written(tmp_path, given | {"model": HOSTILE, "lists": [HOSTILE]})
    parsed = Page(page)
    assert "<script" not in page and "<img src=x" not in page
    assert not [tag for tag, attrs in parsed.tags if tag in ("script", "img") or any(a.startswith("on") for a in attrs)]
    assert "<img src=x onerror=alert(1)>\"'&</title><script>alert(2)</script>\\x1b[31m\\u202e\\udcff.jpg" in parsed.text
    assert "\x1b" not in page and "\u202e" not in page


def test_a_checkpoint_without_metadata_and_no_curves_leave_a_page(tmp_path):
    page = written(tmp_path, case(3, 12) | {"metadata": {"classes": ["a", "b", "c"]}, "curves": []})
    assert "does not lie beside the checkpoint" in page
    assert "Backbone" not in page and "Training time" not in page and "None" not in page


@pytest.mark.parametrize("loss", ["0", "-1", "1e-12", "1e300"])
def test_a_single_epoch_of_any_loss_is_drawn(tmp_path, loss):
    row = CURVES[0] | {"train_loss": loss, "test_loss": loss, "extra": "x"}
    page = written(tmp_path, case(3, 12) | {"curves": [row]})
    assert page.count(">best, epoch 1</text>") == page.count('y="248.0" class="mid">1</text>') == 2


@pytest.mark.parametrize("damage", [{"lr": "x"}, {"test_loss": None}, {"train_loss": "nan"}])
def test_malformed_curves_are_left_out_with_a_sentence(tmp_path, damage):
    page = written(tmp_path, case(3, 12) | {"curves": [*CURVES, CURVES[0] | damage]})
    assert "has a number that can't be read" in page and "best, epoch" not in page


def test_of_an_older_checkpoint_the_page_says_what_its_sentence_tells(tmp_path):
    given = case(3, 12)
    assert "also chose the epoch" in written(tmp_path, given | {"metadata": {"chosen_on": "./test.txt"}})
    for elsewhere in ("other/test.txt", "25% of test.txt", "val.txt"):  # whether this list had a say is not known
        page = written(tmp_path, given | {"metadata": {"chosen_on": elsewhere}})
        assert f"The epoch was chosen on {elsewhere}.</p>" in page and "also chose" not in page
    assert "chose" not in Page(written(tmp_path, given | {"metadata": {}}).partition("</style>")[2]).text


@pytest.mark.parametrize(
    ("lists", "words"),
    [
        (["test.txt"], "This list also chose the epoch"),
        (["here/../test.txt"], "This list also chose the epoch"),
        (["linked.txt"], "This list also chose the epoch"),
        (["new.txt", "./test.txt"], "./test.txt also chose the epoch"),
        (["train.txt"], "The model was trained on images of this list"),
        (["new.txt", "train.txt"], "The model was trained on images of this list"),
        (["new.txt"], "The epoch was chosen on test.txt, another list.</p>"),
        (["elsewhere/test.txt"], "The epoch was chosen on test.txt.</p>"),  # perhaps the same list, of another machine
    ],
)
def test_the_page_says_whether_the_list_chose_the_epoch_by_where_it_lies(tmp_path, monkeypatch, lists, words):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "test.txt").touch()
    (tmp_path / "linked.txt").symlink_to("test.txt")
    (tmp_path / "here").mkdir()
    metadata = {
        "chosen_on": "test.txt",
        "chosen_list": path_digest("test.txt"),
        "trained_lists": [path_digest("train.txt")],
    }
    assert words in written(tmp_path, case(3, 12) | {"metadata": metadata, "lists": lists})


def test_photos_are_embedded_small_and_a_lost_one_is_a_grey_square(tmp_path):
    Image.new("RGB", (640, 320), (200, 30, 30)).save(tmp_path / "red.png")
    given = case(3, 2)
    given["paths"] = [bytes(tmp_path / "red.png"), b"lost.png"]
    parsed = Page(written(tmp_path, given))
    (photo,) = [attrs for tag, attrs in parsed.tags if tag == "img"]
    assert photo["src"].startswith("data:image/jpeg;base64,") and (photo["width"], photo["height"]) == ("112", "56")
    assert [a["aria-label"] for _, a in parsed.tags if a.get("class") == "image" and "role" in a] == [
        "no such file or directory"
    ]


def test_a_folder_as_target_is_one_line(tmp_path):
    with pytest.raises(UserError, match=f"{re.escape(printable(tmp_path))}: is a directory"):
        written(tmp_path, case(3, 12), target="")


# Form


@pytest.mark.parametrize("classes", [3, 20, 200])
def test_every_picture_has_a_text_alternative(tmp_path, classes):
    Image.new("RGB", (64, 64)).save(tmp_path / "black.png")
    given = case(classes, 2 * classes)
    given["paths"] = [bytes(tmp_path / "black.png")] * (2 * classes)
    pictures = [(tag, attrs) for tag, attrs in Page(written(tmp_path, given)).tags if tag in ("svg", "img")]
    assert len(pictures) > 8
    assert all(attrs.get("alt") or attrs.get("role") == "img" and attrs.get("aria-label") for _, attrs in pictures)


def test_nothing_is_fetched_and_nothing_runs(tmp_path):
    page = written(tmp_path, case(20, 300))
    assert '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; img-src data:' in page
    assert "<script" not in page and not re.search(r"https?:|//|url\(|@import", page)
    links = [v for _, attrs in Page(page).tags for k, v in attrs.items() if k in ("src", "href", "srcset", "data")]
    assert all(link.startswith("data:") for link in links)


@pytest.mark.parametrize(
    ("classes", "name", "letter"),
    [(3, "class", 12), (24, "pomegranate", 12), (60, "果物", 11), (200, "a very long name", 9.5)],
)
def test_names_beside_the_matrix_do_not_overlap(tmp_path, classes, name, letter):
    page = written(tmp_path, case(classes, 3 * classes, name))
    rows, size = matrix_names(page, "rows")
    columns, _ = matrix_names(page, "columns")
    assert len(rows) == len(columns) == classes and size == letter
    assert min(b[1] - a[1] for a, b in zip(rows, rows[1:])) >= size
    # At 45 degrees, lines of text lie cos 45° of their step apart.
    assert min(b[0] - a[0] for a, b in zip(columns, columns[1:])) * math.cos(math.pi / 4) >= size
    cell = rows[1][1] - rows[0][1]
    assert columns[0][0] == pytest.approx(cell / 2 + size / 4, abs=0.1)
    drawn = re.findall(r'class="(rows|columns|cells)" width="(\d+)" height="(\d+)"', page)
    wide, high = ({kind: int(each[side]) for kind, *each in drawn} for side in (0, 1))
    assert wide["cells"] == high["cells"] == high["rows"] == pytest.approx(classes * cell, abs=classes * 0.1)
    assert wide["columns"] == pytest.approx(wide["cells"] + high["columns"], abs=1)
    assert columns[0][1] == pytest.approx(high["columns"] - 5, abs=1)
    assert rows[0] == pytest.approx((wide["rows"] - 8, cell / 2 + 0.36 * size), abs=1)
    fit = float(re.search(r"--fit:([\d.]+)", page)[1])
    assert fit == pytest.approx(min(1, 660 / (wide["rows"] + wide["columns"])), abs=0.002)


def test_a_report_of_two_hundred_classes_is_no_giant(tmp_path):
    written(tmp_path, case(200, 20_000))
    assert (tmp_path / "report.html").stat().st_size < 5_000_000


# In a browser


@pytest.mark.parametrize("width", [390, 1440])
@pytest.mark.parametrize("classes", [20, 200])
def test_a_browser_shows_it_without_errors_requests_or_sideways_scrolling(tmp_path, browser, width, classes):
    Image.new("RGB", (640, 320), (200, 30, 30)).save(tmp_path / "red.png")
    given = case(classes, 5 * classes, name="a_very_long_name_without_any_space_in_it")
    given["paths"] = [bytes(tmp_path / "red.png")] + [b"x" * 200 + HOSTILE.encode()] * (5 * classes - 1)
    given["model"] = "a_model_with_a_very_long_name_indeed" * 3 + ".pth"
    written(tmp_path, given)
    show(browser, tmp_path / "report.html", width)
    look = "return [document.documentElement.scrollWidth, innerWidth, document.getElementById('accuracy').textContent]"
    wide, window, accuracy = ask(browser, look)
    assert window == width and wide <= window
    assert accuracy == f"{given['scores'].accuracy:.0%}"
    look = """return ['rows', 'columns'].flatMap(side => {
        const svg = document.querySelector('.' + side), box = svg.getBoundingClientRect()
        return [...svg.querySelectorAll('text')].filter(text => {
            const name = text.getBoundingClientRect()
            return name.left < box.left || name.top < box.top || name.right > box.right || name.bottom > box.bottom
        }).map(text => side + ' ' + text.textContent)})"""
    assert ask(browser, look) == []  # names cut off
    assert complaints(browser) == []
    assert fetched(browser) == [(tmp_path / "report.html").as_uri()]
