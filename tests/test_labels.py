"""Labels: numbers or names, of lines and of tables, or none at all."""

import csv
import io
import json
import unicodedata
from pathlib import Path

import fuzz
import pytest
from conftest import COLOURS, answer, go, run_main, save_photo, try_seeds

import train
from transfer.checkpoint import load_checkpoint
from transfer.data import load_data
from transfer.inputs.labels import kind_of_lines
from transfer.inputs.lists import read_list
from transfer.system.console import UserError

NUMBERED_NAMES = {"blue": "Type 1", "green": "iPhone 15", "red": "rose red"}


@pytest.fixture
def named(photos):
    """A working directory with train.txt and test.txt whose labels are names."""
    for name, numbers in (("train", range(3, 8)), ("test", (8, 9))):
        lines = [f"photos/{colour}/{number}.png the_{colour}\n" for colour in COLOURS for number in numbers]
        Path(f"{name}.txt").write_text("".join(lines))
    return photos


def test_labels_that_are_names_are_classes_by_sorted_name(named, quick):
    go("--epochs", 1)
    assert load_checkpoint(Path("best.pth"))[1]["classes"] == ["the_blue", "the_green", "the_red"]
    image_list, problems = read_list(Path("train.txt"), Path())
    assert not problems and image_list.labels.tolist() == [2] * 5 + [1] * 5 + [0] * 5


def test_a_list_of_names_is_scored_by_them_and_numbers_stay_the_recipes(model, quick_model):
    Path("list.txt").write_text("green.png green\nred.png red\n")
    rows = [json.loads(line) for line in answer("list.txt", "--format", "json")[0].splitlines()]
    assert [row["truth"] for row in rows] == ["green", "red"]
    Path("list.txt").write_text("green.png purple\n")
    assert "list.txt: no class is called purple; there are red, green, blue\n" in answer("list.txt", status=2)[1]


@pytest.mark.parametrize(
    ("line", "why"),
    [
        ("photos/red/9.png 0", "train.txt:1: label 'the_red' is not a whole number; number the classes 0, 1, 2, ..."),
        ("photos/red/9.png 1.5", "train.txt:16: label '1.5' is not a whole number; number the classes 0, 1, 2, ..."),
        ("photos/red/9.png", "train.txt:16: no label; separate path and label by white space"),
        ("photos/red/8 9.png", "train.txt:16: no label; separate path and label by white space, the path first"),
        ("photos/red/3.png the_blue", "train.txt:16: photos/red/3.png has label the_blue here and the_red on line 1"),
    ],
)
def test_a_mixture_of_names_and_numbers_is_an_error(named, line, why):
    with open("train.txt", "a") as file:
        file.write(f"{line}\n")
    status, out, err = run_main(train.main, "--weights", "none")
    assert status == 2 and not out and f"error: {why}" in err


def test_numbers_beside_names_in_the_other_list_are_an_error(named):
    Path("test.txt").write_text("photos/red/8.png 0\nphotos/red/9.png 7\n")
    words = r"^test.txt:1: labels are numbers here, and names in train.txt; use names in both\n1 problem found"
    with pytest.raises(UserError, match=words):
        load_data(None, None, Path(), None, val_split=None, out=Path("o.pth"))


def test_a_list_of_paths_alone_is_predicted_and_refused_in_training(model, quick_model):
    save_photo("my photo.png")
    Path("list.TXT").write_text("red.png\n# a comment\n./green.png\nmy photo.png\nnone at all.png\n")
    out, err = answer("list.TXT", "--format", "json", status=1)
    rows = [json.loads(line) for line in out.splitlines()]
    assert [row["path"] for row in rows] == ["red.png", "green.png", "my photo.png", "none at all.png"]
    assert {row["truth"] for row in rows} == {None} and rows[3]["error"] and "accuracy" not in err
    assert answer("list.TXT", "--report", "r.html", status=2)[1].startswith("error: --report: needs labels")
    _, problems = read_list(Path("list.TXT"), Path())
    assert len(problems) == 4 and all("no label" in problem for problem in problems)


def test_a_csv_with_a_header_is_a_list(model, quick_model):
    rows = [("green.png", "green"), ("red, too.png", "red")]
    save_photo("red, too.png")
    for columns in (("path", "label"), ("Filename", "class")):
        text = io.StringIO()
        csv.writer(text).writerows([("id", *columns), *((number, *row) for number, row in enumerate(rows))])
        Path("list.csv").write_text(text.getvalue())
        out = answer("list.csv", "--format", "json")[0]
        found = [json.loads(line) for line in out.splitlines()]
        assert [(row["path"], row["truth"]) for row in found] == rows
    image_list, problems = read_list(Path("list.csv"), Path())
    assert not problems and image_list.classes == ["green", "red"] and image_list.lines.tolist() == [2, 3]
    Path("list.csv").write_text("filename;label\nred.png;2\n")
    assert read_list(Path("list.csv"), Path())[0].labels.tolist() == [2]
    Path("list.csv").write_text("path\nred.png\n")
    assert '"truth": null' in answer("list.csv", "--format", "json")[0]
    Path("list.csv").write_text("red.png,red\n")
    words = "list.csv:1: no column is called path or filename; write path,label in the first line"
    assert answer("list.csv", status=2) == ("", f"error: {words}\n")


def test_names_of_classes_are_one_in_either_unicode_form(named):
    forms = [unicodedata.normalize(form, "crème") for form in ("NFC", "NFD")]
    Path("list.txt").write_text(f"photos/red/1.png {forms[0]}\nphotos/red/2.png {forms[1]}\n".replace("/1", "/4"))
    image_list, problems = read_list(Path("list.txt"), Path(), check_files=False)
    assert not problems and image_list.classes == [forms[0]] and image_list.labels.tolist() == [0, 0]


def test_a_path_of_a_point_and_a_slash_alone_is_a_directory(named):
    Path("list.txt").write_text("./ 0\n")
    assert read_list(Path("list.txt"), Path())[1] == [
        "list.txt:1: ./: is a directory, not an image; fix or remove the line"
    ]


def test_1000_mutated_lists_and_tables_are_read_or_user_errors(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    try_seeds(fuzz.labels(), 1000)


def test_names_with_spaces_behind_a_tab_may_end_in_numbers(photos, small, tiny):
    rows = [f"photos/{colour}/{n}.png\t{name}\n" for colour, name in NUMBERED_NAMES.items() for n in range(3, 8)]
    Path("tabs.txt").write_text("".join(rows))
    go("--train", "tabs.txt", "--epochs", 1)
    assert load_checkpoint(Path("best.pth"))[1]["classes"] == sorted(NUMBERED_NAMES.values())
    out, _ = answer("tabs.txt", "--format", "csv")
    assert {row["truth"] for row in csv.DictReader(out.splitlines())} == {*NUMBERED_NAMES.values()}
    assert kind_of_lines(b"a b.png\t3\nc.png\t 12 \n# x.png\tno number\n", True) == "numbers"


@pytest.mark.parametrize(
    ("content", "error"),
    [
        ("path,species\nphotos/red/3.png,cat\n", "s.csv:1: no column is called label or class; write path,label"),
        ("path,label\nphotos/red/3.png,\n", "s.csv:2: no label in this row; add it, or remove the row"),
    ],
)
def test_a_table_without_labels_is_told_so(photos, content, error):
    Path("s.csv").write_text(content)
    assert f"error: {error}" in run_main(train.main, "--train", "s.csv", "--weights", "none")[2]
    if "species" in content:
        fixes = run_main(train.main, "--train", "photos", "--weights", "none", "--corrections", "s.csv")[2]
        assert fixes.startswith(f"error: {error}")


def test_a_class_that_only_the_test_images_have_is_the_one_problem(photos):
    for colour in ("green", "red"):
        save_photo(f"few/{colour}/1.png", colour)
        save_photo(f"few/{colour}/2.png", colour, 9)
    err = run_main(train.main, "--train", "few", "--test", "photos", "--weights", "none")[2]
    assert err.splitlines()[0].startswith("error: photos: no class is called blue") and len(err.splitlines()) == 2
