"""Corrections: lists that change labels, leave images out or add some, in training and in prediction."""

import csv
import os
from pathlib import Path

import pytest
from conftest import answer, go, rows_of, run_main, save_photo

import train
from transfer.checkpoint import load_checkpoint
from transfer.data import load_data
from transfer.inputs.corrections import ClassLabels, read_corrections
from transfer.system.console import UserError

pytestmark = pytest.mark.usefixtures("tiny")


def load(*files, train_path=None, test_path=None, root=Path()):
    return load_data(
        train_path, test_path, root, None, val_split=None, out=Path("best.pth"), corrections=[*map(Path, files)]
    )


def write(text, name="fixes.txt"):
    Path(name).write_text(text)
    return name


def labels_of(image_list):
    return dict(zip(map(os.fsdecode, image_list.paths()), image_list.labels.tolist(), strict=True))


def header_of(data):
    return next(note for note in data.notes if note.startswith("corrections"))


def problems_of(*files, **paths):
    with pytest.raises(UserError) as error:
        load(*files, **paths)
    return error.value.lines[:-1]


def test_labels_change_by_name_or_number_images_are_left_out_and_photos_added(few):
    save_photo("pile/my new.png", "blue", 9)
    before = {path: path.read_bytes() for path in few.rglob("*") if path.is_file()}
    text = "# mine\n./red/train_0.png green\n  green/train_1.png\t2\n\nblue/train_0.png -\npile/my new.png blue\n"
    write("\ufeff" + text.replace("\n", "\r\n"))  # as Windows saves it
    data = load("fixes.txt")
    found = labels_of(data.train)
    assert found.pop("pile/my new.png") == 2 and "blue/train_0.png" not in found and len(found) == 5
    assert (found["red/train_0.png"], found["green/train_1.png"], found["green/train_0.png"]) == (1, 2, 1)
    assert data.classes == ["red", "green", "blue"] and len(data.test) == 6
    assert header_of(data) == "corrections 2 labels, 1 left out, 1 added (fixes.txt)"
    assert data.train.where(5) == "pile/my new.png" and data.train.where(0) == "train.txt:1: red/train_0.png"
    assert all(path.read_bytes() == content for path, content in before.items())


def test_a_correction_of_a_test_image_counts_for_the_test_list_and_is_said(few):
    write("red/test_0.png blue\ngreen/train_0.png green\n")
    write("blue/test_1.png -\n", "more.txt")
    data = load("fixes.txt", "more.txt")
    assert labels_of(data.test)["red/test_0.png"] == 2 and len(data.test) == 5 and len(data.train) == 6
    said = "corrections 1 label, 1 left out, 1 as they were (fixes.txt, more.txt); 2 of them in test.txt"
    assert header_of(data) == said


def test_photos_in_folders_are_named_as_they_are_printed_or_in_another_way(photos):
    write(f"photos/red/older/0.png green\n{photos}/photos/red/older/1.png 0\nphotos/red/older/../3.png -\n")
    data = load("fixes.txt", train_path=Path("photos"))
    found = labels_of(data.train)
    assert (found["photos/red/older/0.png"], found["photos/red/older/1.png"]) == (1, 0) and len(found) == 29
    assert data.train.classes == ["blue", "green", "red"] and data.train.is_folder


def test_paths_begin_in_root_as_those_of_the_lists_or_are_as_printed(few, tmp_path_factory, monkeypatch):
    monkeypatch.chdir(tmp_path_factory.mktemp("elsewhere"))
    shown = os.path.relpath(few)
    write(f"red/train_0.png green\n{shown}/green/train_1.png blue\n")
    data = load("fixes.txt", train_path=few / "train.txt", test_path=few / "test.txt", root=Path(shown))
    found = labels_of(data.train)
    assert found[f"{shown}/red/train_0.png"] == 1 and found[f"{shown}/green/train_1.png"] == 2 and len(found) == 6


def test_each_line_that_fits_nothing_is_an_error_by_file_and_line(few):
    lines = "red/train_0.png melon\ngreen/train_0.png 3\nred/none.png 0\ngreen/train_1.png\nred 1\nred/gone.png -\n"
    write(f"{lines}blue/train_0.png red\nred/train_1.png red\n")
    write("./blue/train_0.png red\ngreen/test_0.png red\n./green/test_0.png -\n", "more.txt")
    assert problems_of("fixes.txt", "more.txt") == (
        "fixes.txt:1: no class is called melon; there are red, green, blue",
        "fixes.txt:2: no class has the number 3; there are 3, from 0",
        "fixes.txt:4: no label; each line is: path, white space, class or -",
        "more.txt:3: green/test_0.png is - here and red in more.txt:2; keep one",
        "fixes.txt:3: red/none.png: no such image; paths are relative to the working directory, or to --root DIR",
        "fixes.txt:5: red: is a directory, not an image; fix or remove the line",
        "fixes.txt:6: red/gone.png: no such image; paths are relative to the working directory, or to --root DIR",
    )
    status, out, err = run_main(train.main, "--corrections", "fixes.txt")
    assert (status, out) == (2, "") and err.startswith("error: fixes.txt:1: no class is called melon")


def test_of_two_files_the_later_one_counts_and_the_same_twice_changes_nothing(few):
    write("red/train_0.png green\ngreen/train_0.png -\nblue/train_0.png red\n")
    write("red/train_0.png -\ngreen/train_0.png blue\n", "more.txt")
    for files in (["fixes.txt", "more.txt"], ["fixes.txt", "more.txt", "./more.txt"]):
        data = load(*files)
        found = labels_of(data.train)
        assert "red/train_0.png" not in found and (found["green/train_0.png"], found["blue/train_0.png"]) == (2, 0)
        assert data.corrections.counts == {"labels": 2, "left_out": 1, "added": 0}


def test_what_corrections_leave_without_images_is_named(photos, capsys):
    folder, tested = Path("photos"), Path("tested")
    write("".join(f"photos/red/{number}.png -\n" for number in (*range(3, 10), *(f"older/{n}" for n in range(3)))))
    assert len(load("fixes.txt", train_path=folder).train) == 20
    assert "warning: photos: no image of class red, which can't be learned; add some" in capsys.readouterr().err
    for colour in ("red", "green"):
        save_photo(f"tested/{colour}/1.png", colour)
    both = {"train_path": folder, "test_path": tested}
    why = "photos has no image of class red; add some, or leave this image out"
    assert problems_of("fixes.txt", **both) == (f"tested/red/1.png: {why}",)
    write("tested/red/1.png -\ntested/green/1.png -\n", "more.txt")
    assert problems_of("more.txt", **both) == ("tested: corrections leave out all of its images; keep some",)


def test_to_leave_out_what_no_list_holds_changes_nothing(few):
    save_photo("pile/new.png")
    data = load(write("pile/new.png -\n"))
    assert len(data.train) == 6 and header_of(data) == "corrections 0 labels (fixes.txt)"


@pytest.mark.parametrize(
    ("classes", "named", "texts"),
    [
        (["cat", "dragon fruit", "-"], True, ["cat", "1", "2"]),
        (["10", "20", "1"], True, ["10", "20", "1"]),  # folders called by numbers
        (["1", "dragon fruit"], True, ["1", None]),  # its number is the other's name
        (["7", "8"], False, ["0", "1"]),  # as in the lists, a number is one
        (["a.jpg", "x\u202ey", "bad\udcff"], True, ["0", "1", "2"]),
    ],
)
def test_what_stands_for_a_class_is_read_as_that_class(tmp_path, classes, named, texts):
    labels = ClassLabels(classes, classes, named)
    assert [labels.text(label) for label in range(len(classes))] == texts
    (tmp_path / "a b.png").touch()
    for label, text in enumerate(texts):
        if text is not None:
            (tmp_path / "fixes.txt").write_text(f"a b.png {text}\n", encoding="utf-8")
            (found,) = read_corrections([tmp_path / "fixes.txt"], tmp_path, labels).by_path.values()
            assert found.label == label and found.entry == b"a b.png"


def test_of_a_name_with_spaces_the_error_says_the_number(photos):
    os.rename("photos/red", "photos/dragon fruit")
    lines = problems_of(write("photos/blue/0.png dragon fruit\n"), train_path=Path("photos"))
    assert lines == ("fixes.txt:1: a name with spaces needs a tab before it; or write for dragon fruit its number, 1",)
    write("path,label\nphotos/blue/0.png,dragon fruit\n", "fixes.csv")
    assert labels_of(load("fixes.csv", train_path=Path("photos")).train)["photos/blue/0.png"] == 1


def test_a_class_that_only_classes_calls_otherwise_has_both_names(few):
    Path("names").write_text("rot\ngreen\nblue\n")
    write("blue/train_0.png rot\ngreen/train_1.png red\n")
    data = load_data(
        None, None, Path(), Path("names"), val_split=None, out=Path("o.pth"), corrections=[Path("fixes.txt")]
    )
    assert data.classes[0] == "rot" and (data.train.labels == 0).sum() == 4


def test_with_a_cache_only_added_photos_pass_and_the_checkpoint_counts_corrections(few, quick, decoded, monkeypatch):
    monkeypatch.setattr("transfer.extraction.CHUNK_ROWS", 3)  # lists lie in several files
    go("--epochs", 1, "--cache", "kept")
    assert sum(decoded.values()) == 12
    decoded.clear()
    save_photo("pile/new.png", "blue", 9)
    write("red/train_0.png green\nred/test_1.png -\nblue/train_0.png -\npile/new.png blue\n")
    out = go("--epochs", 1, "--cache", "kept", "--corrections", "fixes.txt")
    assert decoded == {"new.png": 1}
    assert "\ncorrections 1 label, 2 left out, 1 added (fixes.txt); 1 of them in test.txt\n" in out
    assert "\nnext      python " in out and "test.txt --report report.html --corrections fixes.txt\n" in out
    _, metadata = load_checkpoint(Path("best.pth"))
    assert metadata["corrections"] == {"labels": 1, "left_out": 2, "added": 1}
    assert (metadata["train_images"], metadata["test_images"]) == (6, 5) and len(rows_of()) == 1


def test_the_lists_of_a_split_hold_corrected_labels(photos, quick):
    save_photo("pile/new.png", "blue", 9)
    write("photos/red/3.png green\nphotos/red/4.png -\npile/new.png blue\n")
    go("--epochs", 1, "--train", "photos", "--corrections", "fixes.txt")
    lines = Path("best.train.txt").read_text() + Path("best.test.txt").read_text()
    assert "photos/red/3.png 1\n" in lines and "photos/red/4.png" not in lines and "pile/new.png 0\n" in lines


def test_no_output_replaces_the_corrections(few):
    status, _, err = run_main(train.main, "--corrections", write("path,label\nred/train_0.png,green\n", "best.csv"))
    assert status == 2 and "best.csv: is read by this run" in err


def test_predict_scores_corrected_labels_and_passes_over_other_images(model):
    Path("test.txt").write_text("red.png 0\ngreen.png 0\nblue.png 2\n")
    write("green.png green\nblue.png -\nelsewhere/train_0.png red\n")
    out, err = answer("test.txt", "--corrections", "fixes.txt", "--format", "csv")
    assert err.startswith("corrections 1 label, 1 left out (fixes.txt)\n")
    assert [(row["path"], row["truth"]) for row in csv.DictReader(out.splitlines())] == [
        ("red.png", "red"),
        ("green.png", "green"),
    ]
    write("green.png -\nred.png -\nblue.png -\n", "none.txt")
    error = answer("test.txt", "--corrections", "none.txt", status=2)[1]
    assert error == "error: --corrections: all images are left out; keep some\n"
    error = answer("test.txt", "--corrections", write("red.png melon\n"), status=2)[1]
    assert error.startswith("error: fixes.txt:1: no class is called melon")
    assert "--corrections: needs labels" in answer("red.png", "--corrections", "fixes.txt", status=2)[1]
