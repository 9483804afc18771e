"""The audit: faults put into the sample are found, and what is no fault is not; a run writes what it found."""

import csv
import errno
import io
import math
import os
import re
from pathlib import Path

import benchmark
import numpy as np
import pytest
import torch
from conftest import HPARAMS, go, new_head, run_main
from PIL import Image, ImageDraw
from sklearn.metrics import roc_auc_score
from test_copies import COPIES

import train
from transfer.audit.audit import audit_splits, outlier_scores
from transfer.audit.findings import AuditSplit
from transfer.device import pick_compute
from transfer.extraction import extract_features
from transfer.features import Features, Split, Splits
from transfer.inputs.images import read_image
from transfer.inputs.lists import ImageList
from transfer.neighbours import nearest

COMPUTE = pick_compute("cpu", "auto", None)
RANDOM = np.random.default_rng(0)


def gradient():
    ends = RANDOM.integers(0, 256, (2, 1, 1, 3))
    ramp = np.linspace(0, 1, 348)[None, :, None]
    return Image.fromarray(np.broadcast_to(ends[0] + (ends[1] - ends[0]) * ramp, (261, 348, 3)).astype(np.uint8))


def text():
    page = Image.new("RGB", (348, 261), "white")
    for y in range(0, 261, 14):
        line = "".join(RANDOM.choice(list("the quick brown fox jumps over"), 55))
        ImageDraw.Draw(page).text((4, y), line, fill="black")
    return page


def noise():
    return Image.fromarray(RANDOM.integers(0, 256, (261, 348, 3), dtype=np.uint8))


OUTSIDERS = {"gradients": gradient, "text": text, "noise": noise}


def with_images(split, paths, labels, backbone, views=2):
    """A split with more images behind its own, of its evaluation view and so many of its features' views."""
    image_list, features = split.dataset.image_list, split.features
    count = len(image_list)
    more = ImageList(image_list.name, paths, labels, range(count + 1, count + len(paths) + 1))
    found = extract_features(backbone, train.ImageDataset(more, range(views), 0), compute=COMPUTE)
    both = ImageList(
        image_list.name,
        [*image_list.paths(), *paths],
        [*image_list.labels.tolist(), *labels],
        [*image_list.lines.tolist(), *more.lines.tolist()],
    )
    table = torch.cat([features.gather(features.rows, slice(views)), found.gather(found.rows, slice(views))])
    return Split(train.ImageDataset(both, [0], 0), Features([table], len(table), both.labels))


def audit_of(train_split, test_split):
    """The audit of both lists, the test list's by a head that was trained as the recipe's is."""
    splits, head = Splits(train_split, train_split, test_split, test_split), new_head()
    criterion = train.build_criterion(train_split, 20, balance=False)
    train.train_head(head, criterion, splits, HPARAMS, history=benchmark.Silent(), checkpointer=None)
    with torch.no_grad():
        logits = head(test_split.features.gather(test_split.features.rows, 0))
    return audit_splits(splits, logits, HPARAMS, COMPUTE)


@pytest.fixture(scope="module")
def clean(sample):
    """The audit of the sample as it is."""
    return audit_of(sample["train"], sample["test"])


@pytest.fixture(scope="module")
def faulty(sample, backbone, tmp_path_factory):
    """The audit of the sample with 20 copies and 5 photos of something else; what was put in: kind by path."""
    folder, faults = tmp_path_factory.mktemp("faults"), {}
    chosen = torch.randperm(475, generator=torch.Generator().manual_seed(0))[:20].tolist()
    changes = [COPIES[name] for name in ("half the size", "quality 40", "5% cropped", "mirrored")]
    paths, labels = {"train": [], "test": []}, {"train": [], "test": []}
    original = sample["train"].dataset.image_list

    def put(name, image, label, kind, where):
        image.save(folder / name)
        paths[where].append(bytes(folder / name))
        labels[where].append(label)
        faults[bytes(folder / name)] = kind

    for number, row in enumerate(chosen):
        kind = ("duplicate", "conflict", "leak")[number // 4 % 3]
        label = (int(original.labels[row]) + 5 * (kind == "conflict")) % 20
        image = changes[number % 4](read_image(original.path(row)))
        put(f"copy_{number}.jpg", image, label, kind, "test" if kind == "leak" else "train")
    for number in range(5):
        make = list(OUTSIDERS.values())[number % 3]
        put(f"other_{number}.png", make(), number, "outlier", "train")
    train_split = with_images(sample["train"], paths["train"], labels["train"], backbone)
    test_split = with_images(sample["test"], paths["test"], labels["test"], backbone, views=1)
    return audit_of(train_split, test_split), faults


def test_nothing_in_the_sample_is_a_copy_and_little_looks_wrong(clean):
    assert not [finding for kind in ("duplicate", "conflict", "leak") for finding in clean.of_kind(kind)]
    assert len(clean.of_kind("label")) <= 4 and len(clean.of_kind("outlier")) <= 8


def test_copies_are_found_by_their_kind_and_nothing_else_is(faulty):
    audit, faults = faulty
    found = {f.path: f.kind for kind in ("duplicate", "conflict", "leak") for f in audit.of_kind(kind)}
    put = {path: kind for path, kind in faults.items() if kind != "outlier"}
    # A conflict's finding may be the original's instead, where its label is the more probably wrong one.
    partners = {f.path: f.other_path for f in audit.of_kind("conflict")}
    right = [path for path, kind in put.items() if found.get(path) == kind or path in partners.values()]
    false = [path for path in found if path not in put and partners.get(path) not in put]
    assert len(put) == 20 and len(right) >= 18 and len(false) <= 2
    conflicts = [f for f in audit.of_kind("conflict") if f.path in put]
    assert len(conflicts) >= len(audit.of_kind("conflict")) - 1
    suggestions = [(f.suggestion, int(f.other[0].labels[f.other[1]])) for f in conflicts if f.suggestion is not None]
    assert suggestions and all(suggestion == label for suggestion, label in suggestions)


def test_a_copy_names_its_original_with_list_and_line(faulty):
    audit, faults = faulty
    for finding in audit.of_kind("leak"):
        original = finding.other[0]
        assert finding.split is audit.test and original is audit.train
        number = int(re.search(rb"copy_(\d+)", finding.path)[1])
        row = torch.randperm(475, generator=torch.Generator().manual_seed(0))[number]
        assert finding.other_path == original.image_list.path(int(row))
    assert all(finding.score >= 0.955 for finding in audit.of_kind("leak"))


def test_photos_of_something_else_lie_far_out(faulty):
    audit, faults = faulty
    found = {finding.path for finding in audit.of_kind("outlier")}
    put = {path for path, kind in faults.items() if kind == "outlier"}
    assert len(put & found) >= 4 and len(found - put) <= 8


@pytest.mark.parametrize("kind", OUTSIDERS)
def test_outsiders_of_one_kind_do_not_hide_each_other(sample, backbone, tmp_path, kind):
    areas = []
    for _ in range(3):
        paths = [bytes(tmp_path / f"{number}.png") for number in range(5)]
        for path in paths:
            OUTSIDERS[kind]().save(os.fsdecode(path))
        split = AuditSplit.from_split(with_images(sample["train"], paths, list(range(5)), backbone))
        distances, _ = nearest(split.features, split.features, itself=True)
        areas.append(roc_auc_score(torch.arange(len(split.rows)) >= 475, outlier_scores(distances, distances)))
    assert sum(areas) / len(areas) >= 0.9, areas


def test_findings_come_by_kind_the_most_certain_first_and_from_a_half_up(faulty):
    audit, _ = faulty
    places = [(("label", "conflict", "leak", "duplicate", "outlier").index(f.kind), -f.score) for f in audit.findings]
    assert places == sorted(places) and all(0.5 <= -score <= 1 for _, score in places)


def test_the_samples_curve_rises_to_the_cross_validated_accuracy(clean):
    means = clean.curve.accuracy.mean(1).tolist()
    assert means == sorted(means) and 0.52 < means[-1] < 0.66 and clean.curve.sizes[-1] == 475
    assert means[-1] < sum(clean.curve.doubled()) / 3 < 0.8


def test_a_split_is_audited_by_its_readable_images_in_two_views(tmp_path):
    image_list = ImageList("list.txt", [b"a.png", b"b.png", b"c.png"], [0, 1, 1], [4, 5, 7])
    numbers = 10 * torch.arange(3.0)[:, None, None] + torch.arange(3)[None, :, None]
    features = Features([numbers.expand(-1, -1, 8)], 3, image_list.labels, {1: "damaged"})
    split = AuditSplit.from_split(Split(train.ImageDataset(image_list, range(3), 0), features))
    assert split.features[torch.arange(2)][:, :, 0].tolist() == [[0, 1], [20, 21]] and split.labels.tolist() == [0, 1]
    assert list(split.dataset.views) == [0] and (split.path(1), split.line(1)) == (b"c.png", 7)


# As a user asks for it


def table(path):
    return list(csv.DictReader(io.StringIO(Path(path).read_text(encoding="utf-8"), newline="")))


def test_a_run_writes_the_page_and_the_table_and_names_both(few, tiny):
    out = go("--audit", "look.html", "--epochs", 1)
    figures = r"0 probably wrong labels \(not judged: 6 training and 6 test photos\), \d+ copies, \d+ strange photos?"
    assert re.search(rf"^audit     look\.html and look\.csv: {figures}$", out, re.M)
    assert Path("look.html").read_text().endswith("</html>\n") and table("look.csv") is not None
    assert "--audit" not in out.splitlines()[-1]


def test_photos_held_out_of_a_folder_are_judged_like_the_rest(photos, job):
    os.rename("photos/red/9.png", "photos/blue/red.png")
    found = set()
    for seed in range(3):
        status, out, err = job("--train", "photos", "--audit", "look.html", "--view-seed", seed, "--epochs", 20)
        assert status == 0 and "not judged" not in out, err
        where = "test" if "blue/red.png" in Path("best.test.txt").read_text() else "train"
        rows = [row for row in table("look.csv") if row["kind"] == "label"]
        assert [(row["list"], row["path"], row["suggestion"]) for row in rows] == [
            (f"best.{where}.txt", "photos/blue/red.png", "red")
        ]
        found.add(where)
    assert "test" in found


def test_where_no_label_was_judged_the_page_says_so_instead_of_0(few, tiny):
    go("--audit", "look.html", "--epochs", 1)
    page = Path("look.html").read_text()
    assert 'id="labels">–</span><p>Not judged: 6 training and 6 test photos</p>' in page


def test_a_run_without_it_names_the_flag_at_its_end(few, small, tiny):
    assert "--audit audit.html" in go("--epochs", 1).splitlines()[-1]


@pytest.mark.parametrize("more", [["--val-split", 0.5], ["--views", 1], ["--finetune-epochs", 1]])
def test_any_run_can_be_audited(colours, small, tiny, more):
    go("--audit", "look.html", "--epochs", 2, *more)
    rows = table("look.csv")
    assert all(row["kind"] in ("label", "conflict", "leak", "duplicate", "outlier") for row in rows)


def test_the_table_has_exact_names_and_a_row_a_finding(colours, small, tiny):
    odd = 'red, "so called"\n.png'
    Image.open("red/train_0.png").save(odd)
    Image.open("red/train_0.png").save("twice.png")
    with open("train.txt", "a") as file:
        file.write("twice.png 1\n")
    os.rename(odd, "red/" + odd.replace("\n", " "))
    with open("test.txt", "a") as file:
        file.write(f"red/{odd}".replace("\n", " ") + " 0\n")
    go("--audit", "look.html", "--epochs", 1)
    rows = table("look.csv")
    leak = [row for row in rows if row["kind"] == "leak"]
    assert [(row["list"], row["line"], row["path"]) for row in leak] == [
        ("test.txt", "13", 'red/red, "so called" .png')
    ]
    assert leak[0]["other"] in ("red/train_0.png", "twice.png") and float(leak[0]["score"]) == 1
    conflict = [row for row in rows if row["kind"] == "conflict" and row["list"] == "train.txt"]
    assert {conflict[0]["path"], conflict[0]["other"]} == {"red/train_0.png", "twice.png"}
    assert {row["label"] for row in rows} <= {"red", "green", "blue", "0", "1", "2"}


def test_with_a_cache_an_audit_makes_no_pass(few, small, tiny, decoded):
    go("--cache", "kept", "--epochs", 1)
    decoded.clear()
    go("--cache", "kept", "--epochs", 1, "--audit", "look.html")
    # Once for its pixels where it may be a copy, and no view of it; three folders have each name.
    assert max(decoded.values(), default=0) <= 3


@pytest.mark.parametrize(
    ("path", "error"),
    [
        ("missing/look.html", "missing/look.html: can't write in missing ({}); name a file in another folder"),
        ("look.csv", "look.csv: is a web page; name it look.html"),
        ("red", "red: is a directory; name a file"),
        ("train.txt", "train.txt: is read by this run; name another file to write"),
    ],
)
def test_a_place_that_can_not_be_written_is_one_line_before_any_work(few, small, tiny, decoded, path, error):
    status, out, err = run_main(train.main, "--weights", "none", "--workers", 0, "--audit", path)
    assert (status, err) == (2, f"error: --audit {error.format(os.strerror(errno.ENOENT).lower())}\n")
    assert not decoded and not Path("best.pth").exists()


def test_an_audit_of_the_smallest_lists_says_little_and_does_not_fail(tmp_path, monkeypatch, small, tiny):
    monkeypatch.chdir(tmp_path)
    for name in ("a", "b"):
        Image.new("RGB", (40, 40), (math.prod(map(ord, name)) % 255, 9, 9)).save(f"{name}.png")
    for name in ("train.txt", "test.txt"):
        Path(name).write_text("a.png 0\nb.png 1\n")
    go("--audit", "look.html", "--epochs", 1)
    assert {row["kind"] for row in table("look.csv")} <= {"leak", "outlier"}
    assert "Too few photos to tell: half of them must leave two per class." in Path("look.html").read_text()
