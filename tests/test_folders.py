"""Folders: class folders are read as a list, in training and in prediction."""

import errno
import os
import re
from pathlib import Path

import pytest
from conftest import COLOURS, PLAIN, ROOT, answer, go, run_main, save_photo
from PIL import Image
from processes import run_forked

import predict
import train
from transfer.checkpoint import load_checkpoint
from transfer.inputs.classes import class_names
from transfer.inputs.folders import Contents, find_images, read_folder
from transfer.inputs.images import read_image
from transfer.inputs.lists import read_list

# Read


def test_a_folder_is_a_list_with_labels_by_the_sorted_names_of_its_folders(photos):
    image_list, problems = read_folder(Path("photos"))
    assert not problems and len(image_list) == 30 and image_list.classes == ["blue", "green", "red"]
    by_folder = {
        path.split(b"/")[1]: label for path, label in zip(image_list.paths(), image_list.labels.tolist(), strict=True)
    }
    assert by_folder == {b"blue": 0, b"green": 1, b"red": 2} and b"photos/red/older/0.png" in image_list.paths()
    assert class_names(image_list, None) == image_list.classes


def test_what_is_no_photo_is_skipped_counted_and_named(photos, capsys):
    names = (".DS_Store", "red/._0.png", "red/.cache/1.png", "notes.txt", "loose.png", "green/clip.mp4", "green/b.txt")
    for name in (*names, "green/c.txt", "@eaDir/red/1.png", "__MACOSX/1.png", "red/lost+found/1.png"):
        (photos / "photos" / name).parent.mkdir(exist_ok=True, parents=True)
        (photos / "photos" / name).touch()
    image_list, problems = read_folder(Path("photos"))
    assert not problems and len(image_list) == 30 and image_list.classes == ["blue", "green", "red"]
    err = capsys.readouterr().err
    assert err.startswith("warning: photos: skipped ") and err.count("\n") == 1
    assert set(re.split(r"(?<=\)), ", err.removeprefix("warning: photos: skipped ").strip())) == {
        "2 hidden files (photos/.DS_Store, photos/red/._0.png)",
        "1 hidden folder (photos/red/.cache)",
        "1 photo outside the class folders (photos/loose.png)",
        "4 other files (photos/notes.txt, photos/green/b.txt, photos/green/c.txt and 1 more)",
        "1 @eaDir folder (photos/@eaDir)",
        "1 __MACOSX folder (photos/__MACOSX)",
        "1 lost+found folder (photos/red/lost+found)",
    }


def entries_below(folder):
    """Every file, and every folder that holds none of them, below a folder."""
    inside = [path for path in Path(folder).iterdir()]
    return sum(entries_below(path) if path.is_dir() and not path.is_symlink() else 1 for path in inside)


def test_photos_used_and_named_and_counted_are_all_that_was_found(photos, monkeypatch):
    os.symlink(photos / "photos/blue", "photos/green/blue again")  # which is read by its own name
    os.symlink("..", "photos/red/loop")
    os.makedirs("elsewhere/deep")
    for number in range(3):
        save_photo(f"elsewhere/deep/{number}.png", "green", number + 50)
    os.symlink(photos / "elsewhere", "photos/green/linked")
    os.symlink("gone", "photos/green/gone.png")
    os.symlink("odd", "photos/green/odd")
    os.mkfifo("photos/green/pipe")
    save_photo("photos/green/locked/1.png", "green")
    scan = os.scandir

    def scandir(path):  # the superuser may read everything
        if os.fsencode(path).endswith(b"locked"):
            raise PermissionError(errno.EACCES, "Permission denied")
        return scan(path)

    contents = Contents()
    monkeypatch.setattr(os, "scandir", scandir)
    find_images(b"photos", contents)
    monkeypatch.undo()
    monkeypatch.chdir(photos)
    assert contents.unreadable == [(b"photos/green/locked", "permission denied")]
    used = len(contents.images)
    assert used == 30 + 3 + 1 and b"photos/green/linked/deep/0.png" in contents.images
    # The folder that can't be read holds one; of the links, one leads to three that no other way leads to.
    named_and_counted = len(contents.unreadable) + sum(contents.counts.values())
    assert used + named_and_counted == entries_below("photos") - 1 + 3
    assert contents.counts == {"other file": 2, "link| to a folder that is read already": 2}


def test_a_folder_that_may_not_be_read_is_named_in_training_and_a_row_in_prediction(photos, model, monkeypatch):
    scan = os.scandir

    def scandir(path):
        if type(path) is not int and os.fsencode(path).endswith((b"older", b"blue")):  # pytest removes by numbers
            raise PermissionError(errno.EACCES, "Permission denied")
        return scan(path)

    monkeypatch.setattr(os, "scandir", scandir)
    _, problems = read_folder(Path("photos"))
    fix = "give yourself permission to read it, or move it away"
    assert problems == [f"photos/{name}: permission denied; {fix}" for name in ("blue", "red/older")]
    _, problems = read_folder(Path("photos/blue"))
    assert problems == ["photos/blue: permission denied; give yourself permission to read it"]
    out, err = answer("photos/red", status=1)
    assert out.count(" red ") == 7 and err == "error: photos/red/older: permission denied\n"


@pytest.mark.parametrize(
    "ending", ["jfif", "jpe", "jif", "JPG_LARGE", "jpg.1", "", "apng", "dib", "ppm", "avifs", "bin"]
)
def test_a_file_is_an_image_by_its_first_bytes_where_its_ending_says_nothing(photos, ending):
    format = {"apng": "PNG", "dib": "BMP", "ppm": "PPM", "avifs": "AVIF", "bin": "TIFF", "": "WEBP"}.get(ending, "JPEG")
    Image.new("RGB", (9, 9)).save(f"photos/red/odd.{ending}" if ending else "photos/red/odd", format)
    Path("photos/red/BMW").write_bytes(b"BMW and P1 are no photos")
    Path("photos/red/P1").write_bytes(b"P1: not one")
    contents = Contents()
    find_images(b"photos/red", contents)
    assert len(contents.images) == 11 and contents.counts == {"other file": 2}
    assert [read_image(path).size for path in contents.images if b"odd" in path] == [(9, 9)]


def test_predicting_a_folder_counts_what_it_skips(model, quick_model):
    save_photo("photos/1.png")
    Path("photos/notes.txt").touch()
    out, err = answer("photos")
    assert out.startswith("photos/1.png  ") and err == ("warning: photos: skipped 1 other file (photos/notes.txt)\n")


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (lambda: os.mkdir("photos/yellow"), "photos/yellow: no image in this class folder; add some or remove it"),
        (
            lambda: save_photo("flat/1.png"),
            "flat: no class folders in it; give each class's photos a folder of its own there; if it is a class "
            "itself, name the folder it lies in",
        ),
        (lambda: None, "nowhere: no such file or directory; name a list, or a folder of class folders"),
    ],
)
def test_a_folder_that_is_none_of_class_folders_is_named_with_what_to_do(photos, make, why):
    make()
    folder = re.match(r"[^:/]+", why)[0]
    status, out, err = run_main(train.main, "--train", folder, "--weights", "none")
    assert status == 2 and not out and f"error: {why}\n" in err and "Traceback" not in err


def test_names_with_spaces_quotes_and_umlauts_are_read_trained_and_predicted(tmp_path, monkeypatch, small, tiny):
    monkeypatch.chdir(tmp_path)
    odd = ["crème brûlée", 'it\'s a "dog"', "#1 tag 7", "猫"]
    for number, (name, colour) in enumerate(zip(odd, [*COLOURS, "red"], strict=True)):
        for each in range(4):
            save_photo(f"my photos/{name}/{each} .a.png", colour, 20 * number + each)
    out = go("--train", "my photos", "--epochs", 1)
    assert load_checkpoint(Path("best.pth"))[1]["classes"] == sorted(odd)
    command = re.search(r"^next      python \S+predict.py (.*)$", out, re.MULTILINE)[1]
    assert command == "best.test.txt --report report.html"
    image_list, problems = read_list(Path("best.test.txt"), Path())
    assert not problems and set(image_list.labels.tolist()) == {0, 1, 2, 3}
    assert class_names(read_list(Path("best.train.txt"), Path())[0], None) == sorted(odd)


@pytest.mark.parametrize(("classes", "per_class"), [(2, 2), (200, 2)])
def test_folders_of_any_shape_are_trained_on(tmp_path, monkeypatch, small, tiny, classes, per_class):
    monkeypatch.chdir(tmp_path)
    for label in range(classes):
        for number in range(per_class):
            save_photo(f"photos/{label:03d}/{number}.png", [*COLOURS][label % 3], label + number, size=(20, 20))
    go("--train", "photos", "--epochs", 1, "--audit", "look.html")
    assert len(load_checkpoint(Path("best.pth"))[1]["classes"]) == classes
    assert len(read_list(Path("best.test.txt"), Path())[0]) >= classes


@pytest.mark.parametrize(
    ("names", "why"),
    [
        (["pics/a/b/red", "pics/a/b/blue"], "; the folders in pics/a/b are classes, perhaps: --train pics/a/b"),
        (["pics/red"], "; put a second class's photos in a folder of their own beside pics/red"),
        (["pics/red/older"], "; put a second class's photos in a folder of their own beside pics/red"),
    ],
)
def test_a_folder_of_a_single_class_is_an_error_that_names_the_folder_below(tmp_path, monkeypatch, names, why):
    monkeypatch.chdir(tmp_path)
    for name in names:
        for number in range(3):
            save_photo(f"{name}/{number}.png", "red", number)
    status, out, err = run_main(train.main, "--train", "pics", "--weights", "none")
    only = names[0].split("/")[1]
    assert (status, out, err) == (2, "", f"error: pics: a single class, {only}{why}\n")


def test_the_folder_that_one_is_in_is_trained_on(photos, small, tiny, monkeypatch):
    monkeypatch.chdir("photos")
    assert "data      30 images of 3 classes" in go("--train", ".", "--epochs", 1, "--out", "../best.pth")
    for out in (".", ""):
        status, _, err = run_main(train.main, "--train", ".", "--weights", "none", "--out", out)
        assert (status, err) == (2, "error: --out .: is a directory; name a file, such as best.pth\n")


def test_after_corrections_the_single_class_is_the_one_that_is_left(photos):
    lines = [f"photos/{colour}/{n}.png -\n" for colour in ("blue", "green") for n in range(10)]
    Path("out.txt").write_text("".join(lines))
    err = run_main(train.main, "--train", "photos", "--weights", "none", "--corrections", "out.txt")[2]
    assert "photos: a single class, red; " in err


def test_a_list_of_one_named_class_is_an_error_too(photos):
    Path("one.txt").write_text("photos/red/3.png cat\nphotos/red/4.png cat\n")
    status, out, err = run_main(train.main, "--train", "one.txt", "--weights", "none")
    why = "all images have one label; add images of another class"
    assert (status, out, err) == (2, "", f"error: one.txt: {why}\n")


def test_a_command_that_is_suggested_can_be_pasted(photos):
    os.makedirs("my photos/all")
    for colour in COLOURS:
        os.rename(f"photos/{colour}", f"my photos/all/{colour}")
    err = run_main(train.main, "--train", "my photos", "--weights", "none")[2]
    assert "; name that one: --train 'my photos/all'\n" in err


# Predicted


def test_a_labelled_folder_is_scored_as_its_list_is(model, small_run):
    os.symlink(small_run, "here")
    os.mkdir("folder")
    for colour in COLOURS:
        os.mkdir(f"folder/{colour}")
        for number in range(4):
            os.symlink(small_run / colour / f"test_{number}.png", f"folder/{colour}/test_{number}.png")
    scored = run_main(predict.main, "folder", "--labelled", "--report", "report.html")
    listed = run_main(predict.main, "here/test.txt", "--root", "here", "--report", "report.html")
    assert scored[0] == listed[0] == 0 and scored[1] == listed[1] and scored[1].startswith("accuracy ")
    both = run_main(predict.main, "folder", "here/test.txt", "--root", "here", "--labelled")
    assert both[0] == 0 and " of 24, 95% interval" in both[1]


def test_a_folder_of_another_class_is_named_and_plain_images_have_no_labels(model):
    save_photo("folder/purple/1.png")
    status, out, err = run_main(predict.main, "folder", "--labelled")
    assert (
        status == 2
        and not out
        and err.startswith("error: folder: no class is called purple; there are red, green, blue\n")
    )
    assert "was trained on other classes; rename the folders as those are named" in err
    status, _, err = run_main(predict.main, "red.png", "--labelled")
    assert status == 2 and err.startswith(
        "error: --labelled: needs labels; give lists, a path and a class number per line"
    )


def test_the_name_of_a_folder_brings_no_control_character_to_a_terminal_and_is_known_again(photos, small, tiny):
    os.rename("photos", name := "ev\x1b[31mil")
    shown = re.escape(r"ev\x1b[31mil")
    assert run_main(train.main, *PLAIN, "--train", name)[0] == 0
    err = run_main(predict.main, name, "--report", "report.html", "--workers", 0)[2]
    assert "\x1b" not in err and re.search(rf"^warning: {shown}: the model was trained on images of it", err, re.M)
    os.rename(os.path.join(name, "red"), os.path.join(name, "purple"))
    err = run_main(predict.main, name, "--report", "report.html", "--workers", 0)[2]
    assert "\x1b" not in err and re.match(f"error: {shown}: no class is called purple", err)


def test_from_a_folder_to_a_report_in_two_commands(tmp_path):
    for food in ("apple", "banana"):
        os.makedirs(tmp_path / "photos" / food)
        for number in range(1, 9):
            os.symlink(ROOT / f"food/{food}/train_{number:02d}.jpg", tmp_path / f"photos/{food}/{number}.jpg")
    done = run_forked("train.py", "--train", "photos", "--epochs", 2, "--views", 2, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert 2 <= len(read_list(tmp_path / "best.test.txt", tmp_path)[0]) <= 6
    command = re.search(r"^next      python (\S+)/predict\.py (.*)$", done.stdout, re.MULTILINE)
    assert Path(command[1]) == ROOT
    done = run_forked("predict.py", *command[2].split(), cwd=tmp_path)
    assert done.returncode == 0 and (tmp_path / "report.html").stat().st_size > 10_000
