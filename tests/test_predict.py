"""What the model does: evaluation tables, rows for pipelines, predictions from Python, plain torchvision."""

import csv
import dataclasses
import functools
import io
import json
import math
import os
import re
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from conftest import ROOT, run_main
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from sklearn.metrics import confusion_matrix, precision_recall_fscore_support, top_k_accuracy_score
from torch.nn import functional as F
from torchvision import transforms as T
from torchvision.models import resnet18

import predict
import train

# Four classes by hand: apple 2 of 3 right, bean 1 of 2, corn 0 of 1 and never predicted, dill without images.
LABELS = [0, 0, 0, 1, 1, 2]
PREDICTED = [0, 0, 1, 1, 0, 0]
NAMES = ["apple", "bean", "corn", "dill"]


def scores_of(labels, predicted, classes=4):
    scores = predict.Scores(classes)
    for label, guess in zip(labels, predicted, strict=True):
        scores.add(label, F.one_hot(torch.tensor(guess), classes).float())
    return scores


def alike(found, expected, tolerance=1e-6):
    """Whether the same names come in the same order, with all but the same probabilities."""
    return [name for name, _ in found] == [name for name, _ in expected] and [prob for _, prob in found] == (
        pytest.approx([prob for _, prob in expected], abs=tolerance)
    )


pytestmark = pytest.mark.usefixtures("one_thread")


LOAD = predict.load
load_once = functools.cache(LOAD)


@pytest.fixture
def model(small_run, tmp_path, monkeypatch):
    """A working directory with a best.pth that tells red, green and blue apart, and one image of each.

    Loaded once, since it is always the same file.
    """
    monkeypatch.chdir(tmp_path)
    os.link(small_run / "best.pth", "best.pth")
    for colour in ("red", "green", "blue"):
        shutil.copy(small_run / colour / "test_0.png", f"{colour}.png")
    loaded = load_once("best.pth", "cpu")
    monkeypatch.setattr(predict, "load", lambda path, device: loaded if str(path) == "best.pth" else LOAD(path, device))
    return loaded


@pytest.fixture
def quick(model, monkeypatch):
    """A backbone of next to no work: for tests in which what the network sees plays no part."""
    torch.manual_seed(0)
    backbone = torch.nn.Sequential(torch.nn.AdaptiveAvgPool2d(4), torch.nn.Flatten(1), torch.nn.Linear(48, 512)).eval()
    monkeypatch.setattr(predict, "load", lambda path, device: dataclasses.replace(model, backbone=backbone))


def go(*args, status=0):
    """A prediction with this exit status: stdout and stderr."""
    found, out, err = run_main(predict.main, "--workers", 0, "--device", "cpu", *args)
    assert found == status, err
    return out, err


# The table


def test_figures_are_those_worked_out_by_hand():
    scores = scores_of(LABELS, PREDICTED)
    assert scores.confusion.tolist() == [[2, 1, 0, 0], [1, 1, 0, 0], [1, 0, 0, 0], [0, 0, 0, 0]]
    assert (scores.count, scores.right, scores.accuracy) == (6, 3, 0.5)
    nan = math.nan
    assert scores.images.tolist() == [3, 2, 1, 0]
    assert scores.precision.tolist() == pytest.approx([2 / 4, 1 / 2, nan, nan], nan_ok=True)
    assert scores.recall.tolist() == pytest.approx([2 / 3, 1 / 2, 0, nan], nan_ok=True)
    assert scores.f1.tolist() == pytest.approx([4 / 7, 1 / 2, 0, nan], nan_ok=True)
    assert [scores.taken_for(label) for label in range(4)] == [(1, 1), (0, 1), (0, 1), None]


def test_the_table_puts_the_worst_recall_first_and_macro_averages_last():
    lines = predict.score_table(scores_of(LABELS, PREDICTED), NAMES).splitlines()
    # Wilson of 3 of 6: 0.5 plus or minus 1.96 sqrt(0.25 / 6 + 0.98^2 / 6^2) / (1 + 3.8415 / 6). Top 3 holds ties.
    assert lines[0] == "accuracy   50.00%  3 of 6, 95% interval 18.8% to 81.2%"
    assert lines[1].startswith("top-3    ") and lines[2] == ""
    assert [line.split() for line in lines[3:]] == [
        "class images precision recall F1 most often taken for".split(),
        "corn 1 – 0.0% 0.0% apple (1)".split(),
        "bean 2 50.0% 50.0% 50.0% apple (1)".split(),
        "apple 3 50.0% 66.7% 57.1% bean (1)".split(),
        "dill 0 – – –".split(),
        # Means of the three classes that occur: 1/3, 7/18 and 5/14.
        "macro average 6 33.3% 38.9% 35.7%".split(),
    ]


def test_top_3_counts_images_whose_class_is_among_the_three_likeliest():
    scores = predict.Scores(5)
    probs = torch.tensor([0.3, 0.25, 0.2, 0.15, 0.1])
    for label in range(5):
        scores.add(label, probs)
    assert (scores.right, scores.in_top3, scores.top3) == (1, 3, 0.6)
    two = predict.Scores(2)
    two.add(1, torch.tensor([0.9, 0.1]))
    assert (two.accuracy, two.top3) == (0, 1)


@pytest.mark.parametrize(
    ("right", "count", "low", "high"),
    [
        # Newcombe (1998), Statistics in Medicine 17, table I, method 3.
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0000, 0.1611),
        (1, 29, 0.0061, 0.1718),
        (8, 10, 0.4902, 0.9433),
        (10, 10, 0.7225, 1.0),  # 1 / (1 + 1.96^2 / 10)
    ],
)
def test_intervals_are_wilsons(right, count, low, high):
    assert predict.wilson(right, count) == pytest.approx((low, high), abs=5e-5)
    mirrored = predict.wilson(count - right, count)
    assert mirrored == pytest.approx((1 - high, 1 - low), abs=5e-5)
    assert all(0 <= end <= 1 for end in mirrored)


@settings(max_examples=60, deadline=None)
@given(st.integers(2, 6), st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), min_size=1, max_size=40))
def test_figures_are_scikit_learns(classes, pairs):
    pairs = [(label % classes, guess % classes) for label, guess in pairs]
    labels, predicted = zip(*pairs, strict=True)
    scores = scores_of(labels, predicted, classes)
    everyone = list(range(classes))
    assert scores.confusion.tolist() == confusion_matrix(labels, predicted, labels=everyone).tolist()
    assert scores.accuracy == sum(a == b for a, b in pairs) / len(pairs)
    *columns, images = precision_recall_fscore_support(labels, predicted, labels=everyone, zero_division=0)
    ours = (scores.precision, scores.recall, scores.f1, scores.images)
    for found, expected in zip(ours, (*columns, images), strict=True):
        assert found.nan_to_num(0).tolist() == pytest.approx(expected.tolist(), abs=1e-6)
    macro = precision_recall_fscore_support(labels, predicted, average="macro", zero_division=0)[:3]
    lines = predict.score_table(scores, [f"c{n}" for n in everyone]).splitlines()
    assert lines[-1].startswith("macro average")
    shown = [float(part) for part in re.findall(r"([\d.]+)%", lines[-1])]
    assert shown == pytest.approx([100 * value for value in macro], abs=0.0501)
    assert {line.split()[0] for line in lines[4:-1]} == {f"c{n}" for n in everyone}
    recalls = [float(line.split()[3].rstrip("%")) for line in lines[4:-1] if line.split()[3] != "–"]
    assert recalls == sorted(recalls)


def test_top_3_is_scikit_learns():
    generator = torch.Generator().manual_seed(0)
    probs = torch.rand(50, 7, generator=generator).softmax(1)
    labels = torch.randint(0, 7, (50,), generator=generator).tolist()
    scores = predict.Scores(7)
    for label, each in zip(labels, probs, strict=True):
        scores.add(label, each)
    assert scores.top3 == top_k_accuracy_score(labels, probs.numpy(), k=3, labels=range(7))


def test_accuracy_is_what_training_reported_to_the_last_digit(small_run, model):
    lines = [line.split() for line in (small_run / "test.txt").read_text().splitlines()]
    # Half of the labels of one class are wrong, so that the accuracy is neither 0 nor 1.
    wrong = "".join(f"{path} {1 if path in ('red/test_0.png', 'red/test_1.png') else label}\n" for path, label in lines)
    Path("wrong.txt").write_text(wrong)
    lists = ["--train", small_run / "train.txt", "--test", "wrong.txt", "--root", small_run]
    status, out, err = run_main(
        train.main, *lists, "--weights", "best.pth", "--epochs", 2, "--views", 1, "--workers", 0, "--out", "other.pth"
    )
    assert status == 0, err
    about = train.load_checkpoint(Path("other.pth"))[1]
    table, _ = go("wrong.txt", "--root", small_run, "--model", "other.pth")
    percent, right, count = re.search(r"^accuracy +([\d.]+%)  (\d+) of (\d+),", table, re.MULTILINE).groups()
    assert int(count) == 12 and int(right) / 12 == about["accuracy"] < 1
    assert f"best      test accuracy {percent}, " in out


def test_the_table_keeps_away_from_rows_that_programs_read(model, quick):
    Path("list.txt").write_text("red.png 0\ngreen.png 1\n")
    text, err = go("list.txt")
    assert "\naccuracy " in text and err == ""
    for style in ("csv", "json"):
        out, err = go("list.txt", "--format", style)
        assert "accuracy" not in out and err.startswith("\naccuracy ")
    assert "accuracy" not in go("red.png")[0]


def test_labels_beyond_the_models_classes_are_an_error_that_names_the_line(model):
    Path("list.txt").write_text("red.png 0\n# a comment\ngreen.png 3\n")
    out, err = go("list.txt", status=2)
    assert out == ""
    assert err.splitlines() == [
        "error: list.txt:3: green.png: label 3, but best.pth knows 3 classes, from 0; use the lists it was trained with"
    ]


@pytest.mark.parametrize("images", [["red.png"], ["list.txt", "red.png"], ["."], ["-"]], ids=str)
def test_a_report_without_labels_is_an_error_before_any_work(model, monkeypatch, images):
    monkeypatch.setattr(predict, "load", lambda *args: pytest.fail("worked first"))
    Path("list.txt").write_text("green.png 1\n")
    out, err = go(*images, "--report", "report.html", status=2)
    assert out == "" and err.startswith("error: --report: needs labels") and err.count("\n") == 1
    assert not Path("report.html").exists()


# Rows

AWKWARD = 'a, "b"\nc.png'


def test_csv_rows_survive_commas_quotes_and_new_lines(model):
    os.rename("red.png", AWKWARD)
    out, err = go(AWKWARD, "green.png", "--format", "csv", "--top-k", 2)
    assert err == "" and out.count("\r\n") == 3 and out.count("\n") == 4
    header, red, green = csv.reader(io.StringIO(out, newline=""))
    assert header == ["path", "error", "truth", "name", "class1", "prob1", "class2", "prob2"]
    assert red[:5] == [AWKWARD, "", "", "red", "red"] and green[:5] == ["green.png", "", "", "green", "green"]
    expected = predict.predict(model, [AWKWARD])[0]
    assert alike([(red[4], float(red[5])), (red[6], float(red[7]))], expected[:2])


def test_every_csv_row_has_as_many_fields_as_the_header(model, quick):
    Path("bad.png").write_bytes(b"no image")
    out, err = go("red.png", "bad.png", "green.png", "--format", "csv", status=1)
    rows = list(csv.reader(io.StringIO(out, newline="")))
    assert [len(row) for row in rows] == [10] * 4 and err == ""
    assert rows[2] == ["bad.png", "not an image", *[""] * 8]


def test_json_is_an_object_a_line_under_the_documented_names(model):
    os.rename("red.png", AWKWARD)
    Path("bad.png").write_bytes(b"no image")
    Path("list.txt").write_text("green.png 1\nblue.png 0\n")
    out, err = go(AWKWARD, "bad.png", "--format", "json", "--top-k", 2, status=1)
    red, bad = map(json.loads, out.splitlines())
    assert err == "" and list(red) == list(bad) == ["path", "error", "truth", "name", "top"]
    assert bad == {"path": "bad.png", "error": "not an image", "truth": None, "name": None, "top": []}
    assert (red["path"], red["error"], red["truth"], red["name"]) == (AWKWARD, None, None, "red")
    expected = predict.predict(model, [AWKWARD])[0][:2]
    assert alike([(each["class"], each["prob"]) for each in red["top"]], expected)
    out, _ = go("list.txt", "--format", "json")
    assert [(row["truth"], row["name"]) for row in map(json.loads, out.splitlines())] == [
        ("green", "green"),
        ("red", "blue"),
    ]


def test_text_shows_a_line_an_image_whatever_its_name(model):
    os.rename("red.png", AWKWARD)
    out, _ = go(AWKWARD, "--top-k", 1)
    assert re.fullmatch(r'a, "b"\\nc\.png  red \d+\.\d%\n', out)


def test_rows_come_in_input_order_whatever_the_batch_size_and_workers(model, quick):
    for number in range(20):
        Image.new("RGB", (8, 8), (12 * number, 90, 255 - 12 * number)).save(f"{number}.png")
    Path("7.png").write_bytes(b"no image")
    Path("16.png").unlink()
    images = [f"{number}.png" for number in (*range(19, -1, -2), *range(0, 20, 2))]
    outcomes = []
    for batch_size, workers in ((1, 0), (3, 0), (64, 0), (3, 2)):
        options = ("--batch-size", batch_size, "--format", "json", "--device", "cpu", "--workers", workers)
        status, out, err = run_main(predict.main, *images, *options)
        assert (status, err) == (1, "")
        rows = [json.loads(line) for line in out.splitlines()]
        assert [row["path"] for row in rows] == images
        assert [row["path"] for row in rows if row["error"]] == ["7.png", "16.png"]
        outcomes.append([[(top["class"], top["prob"]) for top in row["top"]] for row in rows])
    for outcome in outcomes[1:]:
        assert all(map(alike, outcome, outcomes[0]))


def test_below_min_prob_an_image_is_unknown(model):
    probability = predict.predict(model, ["red.png"])[0][0][1]
    below, above = probability - 1e-4, min(probability + 1e-4, 0.999999)
    assert 1 / 3 < below < above
    for least, name in ((below, "red"), (above, "unknown")):
        out, _ = go("red.png", "--min-prob", least, "--format", "json")
        row = json.loads(out)
        assert row["name"] == name and row["top"][0]["class"] == "red"  # what it is likeliest is still told
        assert go("red.png", "--min-prob", least, "--format", "csv")[0].splitlines()[1].split(",")[3] == name
        text, _ = go("red.png", "--min-prob", least, "--top-k", 1)
        assert text.startswith("red.png  unknown: red " if name == "unknown" else "red.png  red ")


def test_a_bad_image_does_not_count_in_the_accuracy(model):
    Path("bad.png").write_bytes(b"no image")
    Path("list.txt").write_text("red.png 0\nbad.png 0\ngreen.png 0\n")
    out, err = go("list.txt", status=1)
    assert err == "error: bad.png: not an image\n"
    assert "accuracy   50.00%  1 of 2, " in out
    Path("list.txt").write_text("bad.png 0\n")
    out, err = go("list.txt", status=1)
    assert out == "" and err == "error: bad.png: not an image\n"


# Pipes


def test_paths_on_standard_input_are_answered_while_it_is_open_and_a_closed_pipe_ends_quietly(model):
    command = [sys.executable, str(ROOT / "predict.py"), "-", "--workers", "0", "--device", "cpu"]
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    buffered = os.environ | {"PYTHONUNBUFFERED": ""}
    with subprocess.Popen(command, env=buffered, **pipes) as piped:
        overdue = threading.Timer(60, piped.kill)  # what is not flushed would be waited for without end
        overdue.start()
        for colour in ("red", "green"):
            piped.stdin.write(f"{colour}.png\n".encode())
            piped.stdin.flush()
            assert piped.stdout.readline().startswith(f"{colour}.png  {colour} ".encode())
        piped.stdout.close()  # as `| head -2` does
        piped.stdin.write(b"blue.png\n")
        piped.stdin.close()
        assert piped.stderr.read() == b""
        overdue.cancel()
    assert piped.returncode == 141  # as of any program that SIGPIPE ends


def test_standard_input_is_a_path_a_line_in_either_systems_line_ends(model, monkeypatch):
    pipe = io.BufferedReader(io.BytesIO(b"red.png\r\n\nnone.png\n green.png\nblue.png"))
    os.rename("green.png", " green.png")
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(pipe))
    out, err = go("-", "--format", "json", status=1)
    rows = [json.loads(line) for line in out.splitlines()]
    expected = [("red.png", "red"), ("none.png", None), (" green.png", "green"), ("blue.png", "blue")]
    assert [(row["path"], row["name"]) for row in rows] == expected and err == ""


def test_standard_input_stands_alone(model):
    out, err = go("-", "red.png", status=2)
    assert out == "" and "- stands alone" in err


def test_memory_does_not_grow_with_the_number_of_images(model):
    # Kept views would take 150 KB an image: 45 MB. One process, whose peak only ever rises.
    for number in range(350):
        os.link("red.png", f"{number}.png")
    for name, numbers in (("few", range(50)), ("many", range(50, 350))):
        Path(f"{name}.txt").write_text("".join(f"{number}.png 0\n" for number in numbers))
    code = """
import resource, torch, predict
backbone = torch.nn.Sequential(torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(1), torch.nn.Linear(3, 512))
predict.backbone_of = lambda model: backbone
def peak(name):
    predict.main([name, "--workers", "0", "--device", "cpu", "--format", "json"])
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
few, many = peak("few.txt"), peak("many.txt")
print(many - few)
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=170,
    )
    assert done.returncode == 0, done.stderr
    *rows, growth = done.stdout.splitlines()
    assert len(rows) == 350
    assert int(growth) < 15_000  # KB: a third of what kept views would take


# From Python


def test_load_and_predict_take_paths_and_pil_images_and_agree_with_the_command(model):
    text = go("red.png", "--format", "json", "--top-k", 9)[0]
    expected = [(top["class"], top["prob"]) for top in json.loads(text)["top"]]
    with Image.open("red.png") as image:
        found = predict.predict(model, ["red.png", Path("red.png"), image, image.convert("RGBA")])
    assert len(expected) == 3 and len(found) == 4 and all(alike(each, expected) for each in found)
    probabilities = [probability for _, probability in expected]
    assert probabilities == sorted(probabilities, reverse=True) and sum(probabilities) == pytest.approx(1)
    assert predict.predict(model, []) == []


def test_a_pil_image_is_turned_as_its_exif_says(model):
    # A gradient on its side, so that the turn shows.
    image = Image.linear_gradient("L").convert("RGB")
    exif = Image.Exif()
    exif[0x0112] = 6
    image.transpose(Image.Transpose.ROTATE_90).save("turned.png", exif=exif)
    image.save("upright.png")
    with Image.open("turned.png") as turned:
        found = predict.predict(model, ["upright.png", "turned.png", turned, image])
    assert all(alike(each, found[0]) for each in found[1:])
    assert not alike(predict.predict(model, [image.transpose(Image.Transpose.ROTATE_90)])[0], found[0], 1e-4)


def test_an_image_that_cannot_be_read_raises_from_python(model):
    with pytest.raises(train.PhotoError, match="no such file"):
        predict.predict(model, ["none.png"])
    with pytest.raises(train.UserError, match="none.pth"):
        LOAD("none.pth")


# In plain torchvision


def test_best_pth_loads_into_plain_torchvision_and_exports(model):
    state = torch.load("best.pth", weights_only=True)
    plain = resnet18(num_classes=len(state["fc.bias"]))
    plain.load_state_dict(state)
    plain.eval()
    view = T.Compose([T.Resize((224, 224)), T.ToTensor(), T.Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])])
    images = torch.stack([view(Image.open(f"{colour}.png")) for colour in ("red", "green")])
    exported = torch.export.export(plain, (images,), dynamic_shapes=({0: torch.export.Dim("batch", min=1)},))
    torch.export.save(exported, "best.pt2")
    with torch.inference_mode():
        found = torch.export.load("best.pt2").module()(images)
        assert torch.allclose(found, plain(images), atol=1e-4)
        one = exported.module()(images[:1])  # another batch size than it was exported with
    assert torch.allclose(one, found[:1], atol=1e-4)
    ours = predict.predict(model, ["red.png", "green.png"])
    for row, named in zip(found.softmax(1).tolist(), ours, strict=True):
        assert dict(named) == pytest.approx(dict(zip(model.classes, row, strict=True)), abs=1e-4)
