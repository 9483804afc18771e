"""Lists: what a line may look like, and the error of a wrong one."""

import errno
import os
from pathlib import Path

import fuzz
import pytest
from conftest import PLAIN, add_line, make_unreadable, run_main
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from processes import run_forked, run_script

import predict
import train
from transfer.inputs.classes import class_names
from transfer.inputs.lists import ImageList, read_list
from transfer.system.console import UserError


def test_lists_are_read_as_documented(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a b").mkdir()
    for name in ("a b/1.jpg", "2.jpg", "ü.jpg"):
        (tmp_path / name).touch()
    content = "\ufeff# a comment\r\n./a b/1.jpg 0\r\n\r\n  2.jpg\t 1  \n\u00fc.jpg 12"
    (tmp_path / "list.txt").write_bytes(content.encode())
    photos, problems = read_list(tmp_path / "list.txt", tmp_path.__class__())
    assert not problems
    assert photos.paths() == [b"a b/1.jpg", b"2.jpg", "ü.jpg".encode()] == [photos.path(i) for i in range(3)]
    assert photos.labels.tolist() == [0, 1, 12] and photos.lines.tolist() == [2, 4, 5]


def test_all_problems_of_both_lists_are_reported_together(colours):
    (colours / "train.txt").write_text("red/train_0.png\nred/train_1.png x7\nred/train_2.png -1\nred/none.png 0\n")
    (colours / "test.txt").write_text("\n")
    done = run_forked("train.py", cwd=colours)  # once as a user would
    assert done.returncode == 2 and not done.stdout
    lines = done.stderr.splitlines()
    starts = [
        "train.txt:1: no label",
        "train.txt:2: label 'x7'",
        "train.txt:3: label '-1'",
        "train.txt:4: red/none.png: no such image",
    ]
    for line, start in zip(lines, [*starts, "test.txt:1: the list is empty", "5 problems found"], strict=True):
        assert line.startswith(f"error: {start}")
    assert not (colours / "best.pth").exists()


def test_of_many_problems_the_first_ten_are_shown_and_all_counted(colours):
    (colours / "train.txt").write_text("".join(f"red/none_{n}.png {n % 3}\n" for n in range(25)))
    (colours / "test.txt").write_text("red/test_0.png 0\n")
    status, _, err = run_main(train.main)
    lines = err.splitlines()
    assert status == 2
    assert len(lines) == 11 and "25 problems found, 10 of them shown" in lines[-1]


def test_a_test_label_that_training_lacks_is_an_error(colours):
    with open("test.txt", "a") as file:
        file.write("red/train_0.png 7\n")
    status, _, err = run_main(train.main)
    assert status == 2 and "error: test.txt:13: red/train_0.png: train.txt has no image with label 7; add some" in err


def test_root_is_what_paths_are_relative_to(colours, small, tiny, tmp_path_factory, monkeypatch):
    monkeypatch.chdir(tmp_path_factory.mktemp("elsewhere"))
    options = ["--train", colours / "train.txt", "--test", colours / "test.txt", "--epochs", 1, "--weights", "none"]
    status, _, err = run_main(train.main, *options)
    assert status == 2 and f"it lies beside the list: add --root {colours}" in err
    assert run_main(train.main, *options, "--workers", 0, "--root", colours)[0] == 0
    assert os.path.exists("best.pth")


@pytest.mark.parametrize(
    ("paths", "names"),
    [
        (["a/1", "a/2", "x/b/3"], ["a", "b"]),
        (["a/1", "b/2", "c/3"], ["0", "1"]),  # label 0 in two folders
        (["x/a/1", "y/a/2", "z/a/3"], ["0", "1"]),  # one name for two labels
        (["1", "2", "b/3"], ["0", "1"]),  # no folder
    ],
)
def test_class_names_come_from_folders_where_they_tell_classes_apart(paths, names):
    photos = ImageList("list", [path.encode() for path in paths], [0, 0, 1], [1, 2, 3])
    assert class_names(photos, None) == names


def test_names_come_from_the_folders_below_the_one_that_all_share():
    paths = [b"photos/cat/2020/1.jpg", b"photos/cat/2021/1.jpg", b"photos/dog/2020/1.jpg"]
    assert class_names(ImageList("x", paths, [0, 0, 1], range(3)), None) == ["cat", "dog"]
    mixed = [b"/photos/cat/2020/1.jpg", b"photos/cat/2021/1.jpg", b"photos/dog/2020/1.jpg"]
    assert class_names(ImageList("x", mixed, [0, 0, 1], range(3)), None) == ["0", "1"]


def test_a_classes_file_overrides_folder_names_and_must_fit(tmp_path):
    photos = ImageList("list", [b"a/1", b"b/2"], [0, 1], [1, 2])
    (tmp_path / "names").write_text("first\nsecond\n")
    assert class_names(photos, tmp_path / "names") == ["first", "second"]
    photos = ImageList("list", [b"a/1", b"b/2"], [0, 2], [1, 2])
    with pytest.raises(UserError, match="2 names for 3 classes"):
        class_names(photos, tmp_path / "names")


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("missing", "no such image; paths are relative to the working directory, or to --root DIR"),
        ("directory", "is a directory, not an image; fix or remove the line"),
        ("link loop", f"{os.strerror(errno.ELOOP).lower()}; fix or remove the line"),
        ("no permission", "no permission to read it; fix or remove the line"),
    ],
)
@pytest.mark.parametrize("name", ["train.txt", "test.txt"])
def test_an_unreadable_path_is_found_before_training(trained, monkeypatch, name, kind, words):
    before = {path: path.read_bytes() for path in (Path("best.pth"), Path("best.csv"))}
    make_unreadable(kind, monkeypatch)
    add_line(name, "odd.png 0\n")
    problem = f"error: {name}:13: odd.png: {words}"
    status, out, err = trained()
    assert (status, out) == (2, "")
    assert err.splitlines() == [problem, "error: 1 problem found; fix and run again"]
    assert all(path.read_bytes() == content for path, content in before.items())


def test_of_many_missing_images_ten_and_a_count_are_shown(trained):
    Path("list.txt").write_text("".join(f"none_{n}.png {n % 3}\n" for n in range(25)))
    status, out, err = trained("--train", "list.txt")
    lines = err.splitlines()
    assert (status, out, len(lines)) == (2, "", 11)
    assert lines[9].startswith("error: list.txt:10: none_9.png: no such image")
    assert lines[10] == "error: 25 problems found, 10 of them shown; fix and run again"


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ("red/train_0.png 0\n".encode("utf-16"), "train.txt:1: looks like UTF-16; save it as UTF-8"),
        ("red/train_0.png 0\n".encode("utf-16-be"), "train.txt:1: looks like UTF-16; save it as UTF-8"),
        ("red/train_0.png 0\n".encode("utf-16-le"), "train.txt:1: looks like UTF-16; save it as UTF-8"),
        (
            "red/train_0.png 0\nblé.png 0\n".encode("latin-1"),
            "train.txt:2: not UTF-8 (Latin-1 or Windows-1252, perhaps); save it as UTF-8",
        ),
        (
            b"red/train_0.png 0\n" * 80 + b"\0 1\n",
            "train.txt:81: holds a NUL byte; not a text list",
        ),
    ],
)
def test_a_list_in_another_encoding_gets_an_error_that_names_it(trained, content, problem):
    Path("train.txt").write_bytes(content)
    assert trained() == (2, "", f"error: {problem}\n")
    assert run_main(predict.main, "train.txt") == (2, "", f"error: {problem}\n")


def test_a_photo_in_the_place_of_a_list_is_called_an_image(trained):
    Image.new("RGB", (9, 9)).save("photo.jpg")
    problem = "photo.jpg: an image (JPEG), not a text file; name a list, or a folder"
    assert trained("--train", "photo.jpg") == (2, "", f"error: {problem}\n")


def test_a_class_name_with_spaces_stands_behind_a_tab_and_without_one_the_error_says_so(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("1 a.jpg", "2.jpg", "x.jpg\ty"):
        Path(name).touch()
    Path("list.txt").write_bytes(b"1 a.jpg\tred apple\r\n2.jpg \t kiwi\r\n")
    photos, problems = read_list(Path("list.txt"), Path())
    assert not problems and photos.paths() == [b"1 a.jpg", b"2.jpg"]
    assert [photos.classes[label] for label in photos.labels] == ["red apple", "kiwi"]
    Path("list.txt").write_text("x.jpg\ty 0\n1 a.jpg 1\n")  # with numbers a tab may be part of a path
    assert read_list(Path("list.txt"), Path())[0].paths() == [b"x.jpg\ty", b"1 a.jpg"]
    Path("list.txt").write_text("1 a.jpg red apple\n")
    hint = "a class name with spaces needs a tab before it"
    assert read_list(Path("list.txt"), Path())[1] == [f"list.txt:1: 1 a.jpg red: no such image; {hint}"]


def test_a_list_none_of_whose_images_is_there_gets_one_hint_in_prediction(model, quick_model):
    Path("notes.txt").write_text("milk\n")
    reason = os.strerror(errno.ENOENT).lower()
    hint = "paths are relative to the working directory, or to --root DIR"
    assert run_main(predict.main, "notes.txt") == (
        1,
        "",
        f"warning: notes.txt: none of the images in this list is there; {hint}\nerror: milk: {reason}\n",
    )


def test_lists_are_utf_8_and_output_is_safe_in_any_locale(colours):
    # Over 3 s: a locale is set when Python starts, so that each run imports torch anew.
    (colours / "é").mkdir()
    for name in ("train", "test"):
        os.link(f"red/{name}_0.png", f"é/ü {name}.png")
        add_line(f"{name}.txt", f"é/ü {name}.png 0\n")
    locale = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONIOENCODING": ""}
    os.remove("é/ü test.png")
    Path("é/ü test.png").write_bytes(b"text")
    done = run_script("train.py", *PLAIN, cwd=colours, **locale)
    assert done.returncode == 1 and "13 training and 13 test images" in done.stdout
    assert "/".join([r"\udcc3\udca9", r"\udcc3\udcbc test.png: not an image"]) in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        (
            '"red/train_0.png" 0',
            '"red/train_0.png": no such image; remove the quotes: paths may hold spaces as they are',
        ),
        (
            "'red/train_0.png' 0",
            "'red/train_0.png': no such image; remove the quotes: paths may hold spaces as they are",
        ),
        (
            "red/train_0.png, 0",
            "red/train_0.png,: no such image; remove the comma: path and label are separated by white space",
        ),
        ("red/train_0.png,0", "no label; separate path and label by a space, not a comma"),
        ("red/train_0.png", "no label; separate path and label by white space"),
        (r"red\train_0.png 0", r"red\train_0.png: no such image; write / instead of \\"[:-1]),
        ("red/train_1.png 1.0", "label '1.0' is not a whole number; number the classes 0, 1, 2, ..."),
        ("red/train_1.png cat", "label 'cat' is not a whole number; number the classes 0, 1, 2, ..."),
        ("red/train_1.png 1_0", "label '1_0' is not a whole number; number the classes 0, 1, 2, ..."),
        ("red/train_1.png ٣", "label '٣' is not a whole number; number the classes 0, 1, 2, ..."),
        ("red/train_1.png ²", "label '²' is not a whole number; number the classes 0, 1, 2, ..."),
        ("red/train_1.png -1", "label '-1' is not a whole number; number the classes 0, 1, 2, ..."),
        ("red/train_1.png -100", "label '-100' is not a whole number; number the classes 0, 1, 2, ..."),
        ("red/train_1.png +1", "label '+1' is not a whole number; number the classes 0, 1, 2, ..."),
        ("red/train_1.png 0x1", "label '0x1' is not a whole number; number the classes 0, 1, 2, ..."),
        ("red/train_1.png \x1b[2J", r"label '\x1b[2J' is not a whole number; number the classes 0, 1, 2, ..."),
        (f"red/train_1.png {2**63}", f"label {2**63} is not below 100,000; number the classes 0, 1, 2, ..."),
        (f"red/train_1.png {'9' * 5000}", f"label {'9' * 24} is not below 100,000; number the classes 0, 1, 2, ..."),
        ("red/train_1.png 100000", "label 100000 is not below 100,000; number the classes 0, 1, 2, ..."),
        (
            "red/train_0.png 1",
            "red/train_0.png has label 1 here and 0 on line 1; keep one of the two",
        ),
        (
            "./red/train_0.png 2",
            "red/train_0.png has label 2 here and 0 on line 1; keep one of the two",
        ),
    ],
)
def test_a_wrong_line_gets_the_hint_that_fits(trained, line, problem):
    before = Path("best.pth").read_bytes()
    add_line("train.txt", f"{line}\n")
    repeated = "warning: train.txt: 1 repeated line dropped\n" if "keep one" in problem else ""
    errors = f"{repeated}error: train.txt:13: {problem}\nerror: 1 problem found; fix and run again\n"
    assert trained() == (2, "", errors)
    assert Path("best.pth").read_bytes() == before
    if "no such image" in problem:  # in prediction the error of one image, and the others' rows
        path = line.rpartition(" ")[0]
        status, out, err = run_main(predict.main, "train.txt", "--workers", 0)
        trained = "warning: train.txt: the model was trained on images of it, so the accuracy is far too high\n"
        missing = f"error: {path}: {os.strerror(errno.ENOENT).lower()}\n"
        assert (status, out.count(".png  "), err) == (1, 12, trained + missing)
    else:
        assert run_main(predict.main, "train.txt") == (2, "", errors)


def test_paths_found_only_beside_the_list_get_the_root_as_hint(job, monkeypatch):
    os.mkdir("elsewhere")
    monkeypatch.chdir("elsewhere")
    status, _, err = job("--train", "../train.txt", "--test", "../test.txt")
    assert status == 2
    assert err.splitlines()[0] == (
        "error: ../train.txt:1: red/train_0.png: no such image; it lies beside the list: add --root .."
    )
    assert not list(Path().iterdir())


def test_a_missing_list_gets_one_line(job):
    words = os.strerror(errno.ENOENT).lower()
    fix = "list, or a folder of class folders"
    assert job("--train", "gone.lst") == (2, "", f"error: gone.lst: {words}; name a {fix}\n")
    os.remove("train.txt")
    assert job() == (2, "", f"error: no train.txt in {Path.cwd()}; give --train PATH, a {fix.replace(',', '')}\n")


def test_gaps_and_classes_of_one_image_get_a_warning_that_names_them(job):
    for label in (4, 9, 12):
        os.link("red/train_0.png", f"{label}.png")
        add_line("train.txt", f"{label}.png {label}\n")
    status, _, err = job()
    assert status == 0
    assert err.splitlines() == [
        "warning: train.txt: no image with label 3, 5, 6 and 4 more, which can't be learned; add some",
        "warning: train.txt: only one image with label 4, 9, 12, too few to learn from; add some",
    ]


def test_duplicate_lines_are_dropped_with_a_count(job):
    add_line("train.txt", "red/train_0.png 0\n./red/train_1.png 0\n")
    status, out, err = job()
    assert (status, err) == (0, "warning: train.txt: 2 repeated lines dropped\n")
    assert "12 training and 12 test images" in out
    add_line("test.txt", "./red/test_0.png 0\n")
    os.rename("train.txt", "mine.txt")
    for _ in range(2):  # once in each run, which looks at test.txt twice
        assert job("--train", "mine.txt")[2].count("warning: test.txt: 1 repeated line dropped\n") == 1


@pytest.fixture
def lists(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return fuzz.lists()


@settings(
    max_examples=2000,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(st.randoms(use_true_random=True), st.binary(max_size=12), st.floats(0, 1))
def test_2000_mutated_lists_are_read_as_written_or_user_errors(lists, rng, extra, place):
    # Over 3 s: the rare mistakes of a parser take that many.
    (lines,), tokens, check = lists
    content = fuzz.mutate(lines, rng, tokens)
    at = int(place * len(content))
    check(content[:at] + extra + content[at:])


def test_a_list_of_a_single_class_is_an_error(job):
    for name in ("train", "test"):
        lines = [line for line in Path(f"{name}.txt").read_text().splitlines() if line.endswith(" 0")]
        Path(f"{name}.txt").write_text("\n".join(lines))
    status, out, err = job()
    assert (status, out) == (2, "")
    assert err == "error: train.txt: all images have one label; add images of another class\n"
