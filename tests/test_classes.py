"""Classes: whose names they have, and that no photo gets another's."""

import ntpath
import os
import unicodedata
from pathlib import Path

import pytest
from conftest import COLOURS, go, run_main, save_photo

import train
from transfer.data import load_data
from transfer.inputs.classes import class_names, own_names, read_names, remap_labels, warn_on_similar_names
from transfer.inputs.folders import read_folder
from transfer.inputs.lists import ImageList, read_list
from transfer.system.console import UserError


def name_file(*names):
    Path("names.txt").write_text("".join(f"{name}\n" for name in names))
    return Path("names.txt")


def load(train_path, test_path=None, classes_path=None):
    return load_data(
        Path(train_path),
        Path(test_path) if test_path else None,
        Path(),
        classes_path,
        val_split=None,
        out=Path("best.pth"),
    )


def labels_by_folder(image_list):
    folders = [path.split(b"/")[1].decode() for path in image_list.paths()]
    return dict(zip(folders, image_list.labels.tolist(), strict=True))


def test_a_file_of_the_folders_names_gives_their_order(photos):
    save_photo("held/red/1.png")
    data = load("photos", "held", name_file("red", "blue", "green"))
    assert data.classes == ["red", "blue", "green"]
    assert labels_by_folder(data.train) == {"red": 0, "blue": 1, "green": 2} and data.test.labels.tolist() == [0]
    assert data.notes == []


def test_other_names_rename_and_the_header_says_which(photos, quick):
    out = go("--train", "photos", "--epochs", 1, "--classes", name_file("azul", "verde", "red"))
    assert "\nnames     blue = azul, green = verde\n" in out


@pytest.mark.parametrize(
    ("names", "why"),
    [
        (["green", "azul", "rojo"], "name 1 is green, but that is the name of class 1 already; give all the folders'"),
        (["blue", "green", "green"], "green is there twice; give each class a name of its own"),
        (["1 blue", "2 green", "3 red"], "its numbers start at 1, labels at 0; write the names alone, in order"),
        (["blue", "green"], "2 names for 3 classes; write one name a line"),
    ],
)
def test_names_in_doubt_are_refused(photos, names, why):
    status, out, err = run_main(train.main, "--train", "photos", "--weights", "none", "--classes", name_file(*names))
    assert status == 2 and not out and err.startswith(f"error: names.txt: {why}")


def test_names_in_another_order_than_a_lists_folders_are_refused(colours):
    with pytest.raises(UserError, match="names.txt: name 1 is green, .*; label 0 is red by its images' folder"):
        load("train.txt", "test.txt", name_file("green", "red", "blue"))


def test_numbered_names_are_put_in_order(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert read_names(name_file("1 kiwi", "0 red apple")) == ["red apple", "kiwi"]
    assert read_names(name_file("1,kiwi", "0,apple")) == read_names(name_file("0: apple", "1: kiwi"))
    assert read_names(name_file("10 Euro", "20 Euro")) == ["10 Euro", "20 Euro"]


def test_folders_that_are_numbers_are_sorted_as_numbers(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for label in range(12):
        save_photo(f"photos/{label}/1.png")
    assert read_folder(Path("photos"))[0].classes == [str(label) for label in range(12)]


@pytest.mark.parametrize("form", ["NFC", "NFD"])
def test_names_of_either_unicode_form_are_the_same(tmp_path, monkeypatch, form):
    monkeypatch.chdir(tmp_path)
    other = "NFD" if form == "NFC" else "NFC"
    name = {each: unicodedata.normalize(each, "crème") for each in (form, other)}
    save_photo(f"photos/{name[form]}/1.png")
    save_photo(f"photos/{name[other]}/2.png")
    save_photo("photos/red/1.png")
    save_photo(f"held/{name[other]}/1.png")
    data = load("photos", "held", name_file(name[other], "red"))
    assert data.classes == [name["NFC"], "red"] and data.train.labels.tolist() == [0, 0, 1]
    assert data.test.labels.tolist() == [0] and data.notes == []
    image_list = read_folder(Path("held"))[0]
    assert remap_labels(image_list, ["red", name[form]]) == [] and image_list.labels.tolist() == [1]
    Path("list.txt").write_text(f"held/{name[form]}/1.png 0\n")
    image_list, problems = read_list(Path("list.txt"), Path())
    assert not problems and image_list.paths() == [f"held/{name[other]}/1.png".encode()]
    assert class_names(image_list, None) == [name["NFC"]]


def test_labels_from_1_are_told_and_the_names_of_the_others_stay(photos, capsys):
    Path("list.txt").write_text("".join(f"photos/{c}/{n}.png {i}\n" for i, c in enumerate(COLOURS, 1) for n in (5, 6)))
    data = load("list.txt")
    assert data.classes == ["0", *COLOURS]
    assert capsys.readouterr().err == "warning: list.txt: labels start at 1, not at 0: no image has label 0\n"
    with pytest.raises(UserError, match="3 names for 4 classes, labels 1 to 3 and 0 for what has no image; write one"):
        load("list.txt", None, name_file(*COLOURS))


@pytest.mark.parametrize(("labels", "names"), [([0, 2], ["a", "1", "b"]), ([1, 2], ["0", "a", "b"])])
def test_a_label_without_images_takes_no_names_away(labels, names):
    assert class_names(ImageList("list", [b"a/1", b"b/2"], labels, [1, 2]), None) == names


@pytest.mark.parametrize(("wrong", "names"), [(2, ["cat", "dog"]), (3, ["0", "1"])])
def test_a_list_with_some_wrong_labels_still_has_its_folders_names(wrong, names):
    paths = [f"photos/{'cat' if number < 10 else 'dog'}/{number}.jpg".encode() for number in range(20)]
    labels = [int(number >= 10) for number in range(20)]
    for number in range(wrong):
        labels[number], labels[10 + number] = 1, 0
    assert own_names(ImageList("list.txt", paths, labels, range(1, 21))) == names


def test_of_nested_folders_on_windows_the_first_that_differ_give_the_names(monkeypatch):
    paths = [rf"photos\{name}\{half}\1.jpg".encode() for name in ("cat", "dog") for half in "ab"]
    monkeypatch.setattr(os, "path", ntpath)
    monkeypatch.setattr(os, "sep", ntpath.sep)
    assert own_names(ImageList("list.txt", paths, [0, 0, 1, 1], range(1, 5))) == ["cat", "dog"]


def test_classes_whose_names_differ_in_capitals_or_spaces_alone_are_named(capsys):
    warn_on_similar_names(ImageList("photos", [], [], []), ["Cat", "cat", "dog", "red apple", "Redapple", "redapples"])
    words = "differ in capitals or spaces alone; if they are one, give them one name"
    pairs = ["Cat and cat", "red apple and Redapple"]
    assert capsys.readouterr().err == "".join(f"warning: photos: classes {pair} {words}\n" for pair in pairs)
