"""Prediction: rows for pipelines, from Python, with the accuracy that training printed."""

import csv
import dataclasses
import errno
import io
import json
import math
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import LOAD, ROOT, answer, run_main, save_photo
from PIL import Image
from processes import run_forked

import predict
import train
from transfer.checkpoint import load_checkpoint
from transfer.inputs.images import ImageError
from transfer.pages.html import page
from transfer.system.console import UserError, printable


def test_predict_names_the_foods_and_has_the_accuracy_that_training_printed(sample_run, sample_answers):
    done = sample_answers[0]
    lines = [line for line in done.stdout.splitlines() if line.startswith("food/")]
    right = sum(line.split("/")[1] == line.split()[1] for line in lines)
    metadata = load_checkpoint(sample_run[1])[1]
    assert len(lines) == 300 and right / 300 == metadata["accuracy"]
    assert f"accuracy  {right / 300:7.2%}  {right} of 300" in done.stdout
    assert f"best      test accuracy {right / 300:.2%}," in sample_run[0].stdout
    assert metadata["classes"] == sorted(path.name for path in (ROOT / "food").iterdir() if path.is_dir())


def test_each_result_stands_under_its_own_images_name(small_run, tmp_path):
    (tmp_path / "broken.png").write_bytes(b"no image")
    images = [
        small_run / "blue/test_0.png",
        tmp_path / "broken.png",
        small_run / "red/test_0.png",
        tmp_path / "gone.jpeg",
    ]
    one = run_forked("predict.py", *images, "--top-k", 1, cwd=small_run)
    assert one.returncode == 1 and "Traceback" not in one.stderr
    assert [line.split()[0] for line in one.stdout.splitlines()] == [str(images[0]), str(images[2])]
    assert one.stderr.splitlines() == [
        f"error: {images[1]}: not an image",
        f"error: {images[3]}: no such file or directory",
    ]
    options = ["--top-k", 1, "--batch-size", 1, "--workers", 2, "--model", small_run / "best.pth"]
    assert run_main(predict.main, *images, *options) == (1, one.stdout, one.stderr)


def test_a_folder_is_walked_in_order(small_run, monkeypatch):
    monkeypatch.chdir(small_run)
    _, out, _ = run_main(predict.main, "red", "green")
    expected = [
        f"{colour}/{name}_{n}.png" for colour in ("red", "green") for name in ("test", "train") for n in range(4)
    ]
    assert [line.split()[0] for line in out.splitlines()] == expected


def test_a_bare_state_dict_gives_class_numbers(tmp_path, small_run):
    state = torch.load(small_run / "best.pth", weights_only=True)
    torch.save(dict(state), tmp_path / "bare.pth")
    classifier = predict.load(tmp_path / "bare.pth", "cpu")
    assert classifier.classes == ["0", "1", "2"]
    found = predict.predict(classifier, [small_run / "red/test_0.png"])[0]
    assert sorted(name for name, _ in found) == ["0", "1", "2"]
    assert sum(probability for _, probability in found) == pytest.approx(1)


def alike(found, expected, tolerance=1e-6):
    """Whether the same names come in the same order, with all but the same probabilities."""
    return [name for name, _ in found] == [name for name, _ in expected] and [prob for _, prob in found] == (
        pytest.approx([prob for _, prob in expected], abs=tolerance)
    )


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
    metadata = load_checkpoint(Path("other.pth"))[1]
    table, _ = answer("wrong.txt", "--root", small_run, "--model", "other.pth")
    percent, right, count = re.search(r"^accuracy +([\d.]+%)  (\d+) of (\d+),", table, re.MULTILINE).groups()
    assert int(count) == 12 and int(right) / 12 == metadata["accuracy"] < 1
    assert percent == f"{metadata['accuracy']:.2%}"
    assert f"best      test accuracy {metadata['accuracy']:.0%} of 12 photos " in out


def test_the_table_keeps_away_from_rows_that_programs_read(model, quick_model):
    Path("list.txt").write_text("red.png 0\ngreen.png 1\n")
    text, err = answer("list.txt")
    assert "\naccuracy " in text and err == ""
    for style in ("csv", "json"):
        out, err = answer("list.txt", "--format", style)
        assert "accuracy" not in out and err.startswith("\naccuracy ")
    assert "accuracy" not in answer("red.png")[0]


def test_labels_beyond_the_models_classes_are_an_error_that_names_the_line(model):
    Path("list.txt").write_text("red.png 0\n# a comment\ngreen.png 3\n")
    out, err = answer("list.txt", status=2)
    assert out == ""
    assert err.splitlines() == [
        "error: list.txt:3: green.png: label 3, but best.pth knows 3 classes, from 0; use the lists it was trained with"
    ]


@pytest.mark.parametrize("flags", [("--report", "report.html"), ("--format", "table")], ids=str)
@pytest.mark.parametrize("images", [["red.png"], ["list.txt", "red.png"], ["."], ["-"]], ids=str)
def test_what_needs_labels_is_an_error_before_any_work_without_them(model, monkeypatch, images, flags):
    monkeypatch.setattr(predict, "load", lambda *args, **_: pytest.fail("worked first"))
    Path("list.txt").write_text("green.png 1\n")
    out, err = answer(*images, *flags, status=2)
    flag = "--format table" if flags[0] == "--format" else flags[0]
    *warnings, error = err.splitlines()
    assert out == "" and error.startswith(f"error: {flag}: needs labels; give lists")
    assert warnings == ["warning: .: skipped 2 other files (./best.pth, ./list.txt)"] * (images == ["."])
    assert not Path("report.html").exists()


TARGETS = {
    "missing/report.html": "can't write in missing ({ENOENT}); name a file in another folder",
    "red.png/report.html": "can't write in red.png ({ENOTDIR}); name a file in another folder",
    "folder": "is a directory; name a file",
    "pipe": "not a regular file; name another",
    "/dev/null": "not a regular file; name another",
    "list.txt": "is read by this run; name another file to write",
    "../{here}/red.png": "is read by this run; name another file to write",
    "./best.pth": "is read by this run; name another file to write",
    "best.csv": "is read by this run; name another file to write",
    "mistakes.pdf": "is a web page; name it mistakes.html",
}


@pytest.mark.parametrize("target", TARGETS)
def test_a_report_that_cannot_or_must_not_be_written_is_an_error_before_any_work(model, monkeypatch, target):
    monkeypatch.setattr(predict, "load", lambda *args, **_: pytest.fail("worked first"))
    Path("list.txt").write_text("red.png 0\ngreen.png 1\n")
    Path("best.csv").write_text("epoch\n")
    os.mkdir("folder")
    os.mkfifo("pipe")
    before = {path: path.read_bytes() for path in Path().iterdir() if path.is_file()}
    why = TARGETS[target]
    for code in ("ENOENT", "ENOTDIR"):
        why = why.replace(f"{{{code}}}", os.strerror(getattr(errno, code)).lower())
    target = target.format(here=Path.cwd().name)
    out, err = answer("list.txt", "--report", target, status=2)
    assert (out, err) == ("", f"error: --report {Path(target)}: {why}\n")
    assert {path: path.read_bytes() for path in Path().iterdir() if path.is_file()} == before


@pytest.mark.parametrize("wrong", [".", "/", ""])
def test_a_report_of_no_model_is_one_line(model, wrong):
    Path("list.txt").write_text("red.png 0\n")
    out, err = answer("list.txt", "--report", "report.html", "--model", wrong, status=2)
    assert out == "" and err.count("\n") == 1 and err.endswith("not a regular file; name a file of weights\n")


def test_a_report_replaces_the_one_before_it_whole(model, quick_model):
    Path("list.txt").write_text("red.png 0\ngreen.png 1\n")
    old = page("a page", "p {}", []) + "the old one" * 10**6
    Path("report.html").write_text(old)
    os.link("report.html", "kept.html")  # what writes into the old file would change this too
    out, _ = answer("list.txt", "--report", "report.html")
    assert out.endswith("\nreport saved in report.html\n")
    assert Path("report.html").read_text().endswith("</html>\n")
    assert Path("kept.html").read_text() == old


@pytest.mark.parametrize("flags", [(), ("--format", "csv")], ids=str)
def test_class_folders_named_as_the_models_classes_are_labels_and_that_is_said(model, flags):
    for colour in ("red", "green", "blue"):
        save_photo(f"photos/{colour}/older/1.png", colour)
    out, err = answer("photos", "--report", "report.html", *flags)
    taken = "photos: its folders are named as the model's classes, and taken as labels\n"
    assert err.startswith(taken) and "accuracy  100.00%  3 of 3, " in out + err and Path("report.html").exists()
    save_photo("photos/purple/1.png", "red")
    out, err = answer("photos", "--format", "csv")
    assert err == "" and [row["truth"] for row in csv.DictReader(io.StringIO(out, newline=""))] == [""] * 4
    out, err = answer("photos", "--report", "report.html", status=2)
    assert out == "" and err.startswith("error: photos: no class is called purple; there are red, green, blue\n")


def test_where_a_photo_lies_beside_the_folders_these_are_no_labels(model):
    save_photo("photos/red/1.png")
    save_photo("photos/2.png")
    out, err = answer("photos")
    assert err == "" and "accuracy" not in out and out.count("\n") == 2


def test_with_a_report_or_where_asked_for_the_table_stands_alone_and_rows_are_printed_on_request(model, quick_model):
    Path("list.txt").write_text("red.png 0\nnone.png 1\ngreen.png 1\n")
    for flags in (("--report", "report.html"), ("--format", "table")):
        out, err = answer("list.txt", *flags, status=1)
        assert out.startswith("accuracy ") and "red.png" not in out and err.startswith("error: none.png: ")
        out, _ = answer("list.txt", *flags, "--format", "text", status=1)
        assert out.startswith("red.png  ") and "\n\naccuracy " in out


def test_a_missing_best_pth_is_named_with_its_folder_and_what_to_do(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_photo("red.png")
    out, err = answer("red.png", status=2)
    assert (out, err) == ("", f"error: no best.pth in {tmp_path}; give --model FILE or run train.py first\n")


def test_a_list_beside_a_photo_keeps_its_labels(model, quick_model):
    Path("list.txt").write_text("green.png 1\n")
    out, err = answer("list.txt", "red.png", "--format", "csv")
    assert [row["truth"] for row in csv.DictReader(io.StringIO(out, newline=""))] == ["green", ""]
    assert " of 1, " in err
    Path("list.txt").write_text("green.png 1\nblue.png 3\n")
    assert "list.txt:2: blue.png: label 3, but" in answer("list.txt", "red.png", status=2)[1]


@pytest.mark.parametrize("name", ["held", "held.lst", "held.csv.bak"])
def test_a_list_is_known_by_its_lines_whatever_its_ending(model, quick_model, name):
    Path(name).write_text("# of today\n\nred.png 0\ngreen.png 1\n")
    assert " of 2, 95% interval" in answer(name)[0]
    Path(name).write_text("a poem of 3 words\n")
    assert answer(name, status=1)[1] == f"error: {name}: not an image\n"
    os.replace("red.png", name)  # a photo needs no ending either
    assert answer(name)[0].startswith(f"{name}  ")


def test_csv_in_a_pipe_has_exact_names_whatever_the_locale(small_run, tmp_path):
    # Over 3 s: a locale is set when Python starts, so that each run imports torch anew.
    names = [b"caf\xe9.png", "crème.png".encode(), "猫.png".encode()]
    for name in names:
        os.link(small_run / "red/test_0.png", os.path.join(bytes(tmp_path), name))
    command = [sys.executable, ROOT / "predict.py", *names, "--format", "csv", "--workers", "0", "--model"]
    locale = {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0", "PYTHONIOENCODING": "ascii"}
    done = subprocess.run(
        [*command, small_run / "best.pth"], cwd=tmp_path, env=os.environ | locale, capture_output=True, timeout=170
    )
    assert done.returncode == 0, done.stderr
    assert [row.split(b",")[0] for row in done.stdout.split(b"\r\n")] == [b"path", *names, b""]


def test_a_class_name_that_is_no_text_is_escaped(model, monkeypatch, tmp_path):
    classes = ["\ud800", *model.classes[1:]]
    monkeypatch.setattr(predict, "load", lambda *_, **__: dataclasses.replace(model, classes=classes))
    with open("rows.csv", "w") as file:
        monkeypatch.setattr(sys, "stdout", file)
        predict.main(["red.png", "--format", "csv", "--workers", "0", "--top-k", "3"])
    assert b"\\ud800" in Path("rows.csv").read_bytes()


@pytest.mark.parametrize("style", ["json", "csv", "text"])
def test_where_the_model_has_no_finite_answer_the_row_is_an_error_and_json_holds_no_nan(model, monkeypatch, style):
    backbone = torch.nn.Sequential(torch.nn.Flatten(1), torch.nn.Linear(3 * 224 * 224, 512, bias=False))
    torch.nn.init.constant_(backbone[1].weight, 1e38)
    broken = dataclasses.replace(model, backbone=backbone)
    monkeypatch.setattr(predict, "load", lambda *_, **__: broken)
    out, err = answer("red.png", "--format", style, status=1)
    assert "the model gives no finite number for it" in out + err
    if style == "json":
        constant = lambda name: pytest.fail(name)  # noqa: E731
        assert json.loads(out, parse_constant=constant)["top"] == []
    with pytest.raises(ImageError, match="no finite number"):
        predict.predict(broken, ["red.png"])


AWKWARD = 'a, "b"\nc.png'


def test_csv_rows_survive_commas_quotes_and_new_lines(model):
    os.rename("red.png", AWKWARD)
    out, err = answer(AWKWARD, "green.png", "--format", "csv", "--top-k", 2)
    assert err == "" and out.count("\r\n") == 3 and out.count("\n") == 4
    header, red, green = csv.reader(io.StringIO(out, newline=""))
    assert header == ["path", "error", "truth", "name", "class1", "prob1", "class2", "prob2"]
    assert red[:5] == [AWKWARD, "", "", "red", "red"] and green[:5] == ["green.png", "", "", "green", "green"]
    expected = predict.predict(model, [AWKWARD])[0]
    assert alike([(red[4], float(red[5])), (red[6], float(red[7]))], expected[:2], tolerance=5e-5)
    assert re.fullmatch(r"0\.\d{4}", red[5])  # four digits; JSON has them all


def test_every_csv_row_has_as_many_fields_as_the_header(model, quick_model):
    Path("bad.png").write_bytes(b"no image")
    out, err = answer("red.png", "bad.png", "green.png", "--format", "csv", status=1)
    rows = list(csv.reader(io.StringIO(out, newline="")))
    assert [len(row) for row in rows] == [10] * 4 and err == ""
    assert rows[2] == ["bad.png", "not an image", *[""] * 8]


def test_json_is_an_object_a_line_under_the_documented_names(model):
    os.rename("red.png", AWKWARD)
    Path("bad.png").write_bytes(b"no image")
    Path("list.txt").write_text("green.png 1\nblue.png 0\n")
    out, err = answer(AWKWARD, "bad.png", "--format", "json", "--top-k", 2, status=1)
    red, bad = map(json.loads, out.splitlines())
    assert err == "" and list(red) == list(bad) == ["path", "error", "truth", "name", "top"]
    assert bad == {"path": "bad.png", "error": "not an image", "truth": None, "name": None, "top": []}
    assert (red["path"], red["error"], red["truth"], red["name"]) == (AWKWARD, None, None, "red")
    expected = predict.predict(model, [AWKWARD])[0][:2]
    assert alike([(each["class"], each["prob"]) for each in red["top"]], expected)
    out, _ = answer("list.txt", "--format", "json")
    assert [(row["truth"], row["name"]) for row in map(json.loads, out.splitlines())] == [
        ("green", "green"),
        ("red", "blue"),
    ]


def test_text_shows_a_line_an_image_whatever_its_name(model):
    os.rename("red.png", AWKWARD)
    out, _ = answer(AWKWARD, "--top-k", 1)
    assert re.fullmatch(r'a, "b"\\nc\.png  red \d+\.\d%\n', out)


def test_rows_come_in_input_order_whatever_the_batch_size_and_workers(model, quick_model):
    for number in range(20):
        Image.new("RGB", (8, 8), (12 * number, 90, 255 - 12 * number)).save(f"{number}.png")
    Path("7.png").write_bytes(b"no image")
    Path("16.png").unlink()
    images = [f"{number}.png" for number in (*range(19, -1, -2), *range(0, 20, 2))]
    outcomes = []
    for batch_size, workers in ((1, 0), (3, 0), (64, 0), (3, 2)):
        options = ("--batch-size", batch_size, "--format", "json", "--device", "cpu", "--workers", workers)
        status, out, err = run_main(predict.main, *images, *options)
        assert (status, err) == (1, "warning: 16.png: no such file; did you mean 6.png?\n")
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
        out, _ = answer("red.png", "--min-prob", least, "--format", "json")
        row = json.loads(out)
        assert row["name"] == name and row["top"][0]["class"] == "red"  # what it is likeliest is still there
        assert answer("red.png", "--min-prob", least, "--format", "csv")[0].splitlines()[1].split(",")[3] == name
        text, _ = answer("red.png", "--min-prob", least, "--top-k", 1)
        assert text.startswith("red.png  unknown: red " if name == "unknown" else "red.png  red ")


def test_a_bad_image_does_not_count_in_the_accuracy(model):
    Path("bad.png").write_bytes(b"no image")
    Path("list.txt").write_text("red.png 0\nbad.png 0\ngreen.png 0\n")
    out, err = answer("list.txt", status=1)
    assert err == "error: bad.png: not an image\n"
    assert "accuracy   50.00%  1 of 2, " in out
    Path("list.txt").write_text("bad.png 0\n")
    out, err = answer("list.txt", status=1)
    assert out == "" and err == "error: bad.png: not an image\n"


def test_a_listed_image_that_is_missing_is_an_error_row_and_the_rest_is_predicted(model, quick_model):
    os.mkdir("folder.png")
    Path("list.txt").write_text("none.png 2\nred.png 0\nfolder.png 0\ngreen.png 1\n")
    words = os.strerror(errno.ENOENT).lower()
    out, err = answer("list.txt", status=1)
    assert err == f"error: none.png: {words}\nerror: folder.png: not a regular file\n"
    assert [line.split("  ")[0] for line in out.splitlines()[:2]] == ["red.png", "green.png"] and " of 2, " in out
    text = answer("list.txt", "--format", "csv", status=1)[0]
    rows = list(csv.DictReader(io.StringIO(text, newline="")))
    assert [(row["path"], row["error"], row["truth"], bool(row["name"])) for row in rows] == [
        ("none.png", words, "blue", False),
        ("red.png", "", "red", True),
        ("folder.png", "not a regular file", "red", False),
        ("green.png", "", "green", True),
    ]
    found = [json.loads(line) for line in answer("list.txt", "--format", "json", status=1)[0].splitlines()]
    assert [row["error"] for row in found] == [words, None, "not a regular file", None]


NASTY = "\x1b[2J\x07\x7f\x9b,\u202e"


@pytest.mark.parametrize("terminal", [False, True])
def test_rows_hold_names_as_they_are_but_never_send_control_characters_to_a_terminal(model, monkeypatch, terminal):
    class Stream(io.StringIO):
        def isatty(self):
            return terminal

    os.rename("red.png", f"{NASTY}.png")
    classes = [f"{NASTY}{name}" for name in model.classes]
    monkeypatch.setattr(predict, "load", lambda *_, **__: dataclasses.replace(model, classes=classes))
    monkeypatch.setattr(io, "StringIO", Stream)
    seen = printable(NASTY) if terminal else NASTY
    out, _ = answer(f"{NASTY}.png", "--format", "csv")
    _, row = csv.reader(out.splitlines())
    assert (row[0], row[3], row[4]) == (f"{seen}.png", f"{seen}red", f"{seen}red") and float(row[5]) > 1 / 3
    assert terminal == out.replace("\r\n", "").isprintable()
    out, _ = answer(f"{NASTY}.png", "--format", "json")
    row = json.loads(out)
    assert (row["path"], row["name"]) == (f"{NASTY}.png", f"{NASTY}red") and out.strip().isprintable()


def test_memory_does_not_grow_with_the_number_of_images(model):
    # Over 3 s: enough images to see their memory.
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
    # Started anew: of a forked process's memory, code that it has yet to touch is not counted at first.
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    *rows, growth = done.stdout.splitlines()
    assert len(rows) == 350
    assert int(growth) < 15_000  # KB: a third of what kept views would take


def test_load_and_predict_take_paths_and_pil_images_and_agree_with_the_command(model):
    text = answer("red.png", "--format", "json", "--top-k", 9)[0]
    expected = [(top["class"], top["prob"]) for top in json.loads(text)["top"]]
    with Image.open("red.png") as image:
        found = predict.predict(model, ["red.png", Path("red.png"), image, image.convert("RGBA")])
    assert len(expected) == 3 and len(found) == 4 and all(alike(each, expected) for each in found)
    probabilities = [probability for _, probability in expected]
    assert probabilities == sorted(probabilities, reverse=True) and sum(probabilities) == pytest.approx(1)
    assert predict.predict(model, []) == []


def test_from_both_sides_an_image_and_its_mirror_image_are_the_same_and_each_way_in_agrees(model, small_run):
    # A red and a green half, so that the sides differ.
    image = Image.new("RGB", (64, 64), (220, 30, 30))
    image.paste((30, 200, 40), (0, 0, 20, 64))
    image.save("sides.png")
    image.transpose(Image.Transpose.FLIP_LEFT_RIGHT).save("mirrored.png")
    both = LOAD("best.pth", "cpu", mirror=True)
    first, second = predict.predict(both, ["sides.png", "mirrored.png"])
    assert alike(first, second)
    plain = predict.predict(model, ["sides.png", "mirrored.png"])
    assert not alike(*plain, tolerance=1e-4)
    # The mean of the logits, up to a constant: of the logarithms of the probabilities.
    logs = [{name: math.log(prob) for name, prob in each} for each in (*plain, first)]
    means = {name: (logs[0][name] + logs[1][name]) / 2 - logs[2][name] for name in logs[2]}
    assert max(means.values()) - min(means.values()) < 1e-3
    arguments = ("sides.png", "--mirror", "--format", "json", "--model", small_run / "best.pth")
    rows = json.loads(answer(*arguments)[0])["top"]
    assert alike([(top["class"], top["prob"]) for top in rows], first)


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
    with pytest.raises(ImageError, match="no such file"):
        predict.predict(model, ["none.png"])
    with pytest.raises(UserError, match="none.pth"):
        LOAD("none.pth")


def test_a_pattern_that_a_shell_left_alone_is_expanded(model, quick_model):
    os.rename("red.png", "[red].png")
    out, _ = answer("[red].png", "*e*n.png", "b?ue.png", "--top-k", 1)
    assert [line.split("  ")[0] for line in out.splitlines()] == ["[red].png", "green.png", "blue.png"]
    assert answer("none*.png", status=1)[1].startswith("error: none*.png: ")


def test_a_name_that_is_not_there_gets_the_one_beside_it_or_its_quotes(model):
    Path("my kiwis").mkdir()
    shutil.copy("red.png", "my kiwis/3.png")
    assert answer("red.pgn", "green.png", status=1)[1].splitlines() == [
        "warning: red.pgn: no such file; did you mean red.png?",
        f"error: red.pgn: {os.strerror(errno.ENOENT).lower()}",
    ]
    error = "error: a path with spaces needs quotes: 'my kiwis/3.png'\n"
    assert answer("green.png", "my", "kiwis/3.png", status=2) == ("", error)
    gone = os.strerror(errno.ENOENT).lower()
    error = f"error: best.pht: {gone}; did you mean best.pth?\n"
    assert answer("red.png", "--model", "best.pht", status=2) == ("", error)
    assert run_main(train.main, "--train", "mi kiwis")[2] == f"error: mi kiwis: {gone}; did you mean 'my kiwis'?\n"


def test_a_list_that_was_trained_on_is_said_to_be(small_run, model):
    err = answer(small_run / "train.txt", "--root", small_run)[1]
    assert "train.txt: the model was trained on images of it, so the accuracy is far too high" in err
    assert not answer(small_run / "test.txt", "--root", small_run)[1]
