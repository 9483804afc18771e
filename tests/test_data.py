"""Data: lists or folders are found, a fifth is held out where no test images are named, and the split is kept."""

import os
import re
from pathlib import Path

import pytest
import torch
from conftest import COLOURS, go, run_main, save_photo

import train
from transfer.checkpoint import load_checkpoint
from transfer.data import check_split, list_text, load_data, share_folders
from transfer.inputs.folders import read_folder
from transfer.inputs.heic import heic_command
from transfer.inputs.lists import ImageList, read_list, why_unlistable
from transfer.system.console import UserError
from transfer.system.files import backup_path


def load(train_path=None, test_path=None, classes_path=None):
    """The data of a run with these lists or folders, without a validation split."""
    return load_data(train_path, test_path, Path(), classes_path, val_split=None, out=Path("best.pth"))


@pytest.mark.parametrize(
    ("path", "why"),
    [
        (b"a/1.png", None),
        (b"a b/\xff.png", "not UTF-8"),
        (b"a\nb/1.png", "a line break in it"),
        (b"1.png ", "a space at"),
    ],
)
def test_a_name_that_no_list_can_hold_is_an_error_before_any_work(path, why):
    assert why_unlistable(path) is None if why is None else why_unlistable(path).startswith(why)
    image_list = ImageList("photos", [b"b/1.png", b"b/2.png", path], [0, 0, 0], range(3))
    image_list.classes = ["b"]
    if why:
        with pytest.raises(UserError, match=why):
            check_split(image_list, None, None)
    else:
        check_split(image_list, None, None)
    check_split(image_list, image_list, None)  # nothing is to be written


def test_a_fifth_of_each_class_is_held_out_and_both_lists_are_kept_beside_the_checkpoint(photos, quick):
    out = go("--train", "photos", "--out", "runs.pth", "--epochs", 1)
    sizes = "blue 10, green 10, red 10"
    assert f"data      30 images of 3 classes: {sizes}\n" in out
    assert "best      epoch chosen on runs.test.txt\n" in out
    lists = {name: read_list(Path(f"runs.{name}.txt"), Path()) for name in ("train", "test")}
    assert not [problem for _, problems in lists.values() for problem in problems]
    paths = {name: set(image_list.paths()) for name, (image_list, _) in lists.items()}
    held = len(paths["test"])
    said = f"{30 - held} photos to train on, {held} ({held / 30:.0%}) held out to test on"
    assert f"\nsplit     {said}; photos of one scene stay together\n" in out
    assert not paths["train"] & paths["test"] and paths["train"] | paths["test"] == set(
        read_folder(Path("photos"))[0].paths()
    )
    # Shades of one colour are near-duplicates, of which half a class may be held out together.
    assert all(1 <= count <= 5 for count in lists["test"][0].labels.bincount())
    metadata = load_checkpoint(Path("runs.pth"))[1]
    assert (metadata["train_images"], metadata["test_images"]) == (len(paths["train"]), len(paths["test"]))
    assert metadata["chosen_on"] == "runs.test.txt" and metadata["classes"] == ["blue", "green", "red"]
    # And the lists do as well as the folder.
    again = go("--train", "runs.train.txt", "--test", "runs.test.txt", "--out", "again.pth", "--epochs", 1)
    assert f"{len(paths['train'])} training and {len(paths['test'])} test images of 3 classes" in again
    assert load_checkpoint(Path("again.pth"))[1]["classes"] == ["blue", "green", "red"]


def test_the_split_is_that_of_the_view_seed(photos, quick):
    def test_list(*options):
        go("--train", "photos", "--epochs", 1, *options)
        return Path("best.test.txt").read_text().splitlines()[1:]

    assert test_list() == test_list("--seed", 5, "--view-seed", 0) != test_list("--view-seed", 1)


def test_of_the_held_out_images_none_is_trained_on_also_with_a_validation_split_and_fine_tuning(photos, small, tiny):
    seen = []
    with pytest.MonkeyPatch.context() as patch:
        original = train.train_head

        def spy(head, criterion, splits, *args, **options):
            seen.append(splits.train.features.gather(splits.train.features.rows, 0))
            return original(head, criterion, splits, *args, **options)

        patch.setattr(train, "train_head", spy)
        out = go("--train", "photos", "--epochs", 1, "--val-split", 0.25, "--finetune-epochs", 1, "--cache", "kept")
        held = len(read_list(Path("best.test.txt"), Path())[0])
        assert re.search(r"^test      accuracy \d+% of \d+ photos \(.*\), scored once$", out, re.MULTILINE)
        go("--train", "best.test.txt", "--test", "best.train.txt", "--epochs", 1, "--out", "o.pth")
    trained, tested = seen
    assert len(tested) == held
    assert not (torch.cdist(trained, tested, compute_mode="donot_use_mm_for_euclid_dist") == 0).any()


def test_a_test_folder_has_the_training_folders_labels_and_an_unknown_class_is_an_error(photos, quick):
    save_photo("held/red/1.png")
    save_photo("held/blue/1.png", "blue")
    data = load(Path("photos"), Path("held"))
    assert data.classes == ["blue", "green", "red"] and sorted(data.test.labels.tolist()) == [0, 2]
    assert data.test_path == Path("held") and data.split_paths == []
    out = go("--train", "photos", "--test", "held", "--epochs", 1)
    assert "30 training and 2 test images of 3 classes" in out and not Path("best.test.txt").exists()
    assert re.search(r"predict\.py held --labelled --report report\.html$", out, re.MULTILINE)
    save_photo("held/rot/1.png")
    status, _, err = run_main(train.main, "--train", "photos", "--test", "held", "--weights", "none")
    assert status == 2 and err.startswith("error: held: no class is called rot; there are blue, green, red\n")


def test_a_test_folder_goes_by_the_training_folders_also_where_classes_are_named_otherwise(photos):
    save_photo("held/red/1.png")
    Path("names").write_text("azul\nverde\nrojo\n")
    data = load(Path("photos"), Path("held"), Path("names"))
    assert data.classes == ["azul", "verde", "rojo"] and data.test.labels.tolist() == [2]


def test_a_test_list_beside_another_training_list_counts_where_its_labels_lie_in_the_same_folders(photos):
    os.makedirs("lists")
    Path("lists/mine.txt").write_text("photos/red/5.png 0\nphotos/red/6.png 0\nphotos/blue/5.png 1\n")
    assert load(Path("lists/mine.txt")).test is None
    Path("lists/test.txt").write_text("photos/red/7.png 0\n")
    data = load(Path("lists/mine.txt"))
    assert data.test.paths() == [b"photos/red/7.png"] and data.test_path == Path("lists/test.txt")
    Path("lists/test.txt").write_text("photos/green/7.png 0\n")  # somebody else's
    assert load(Path("lists/mine.txt")).test is None


def test_a_list_that_is_called_test_txt_does_not_test_on_itself(photos):
    Path("test.txt").write_text("".join(f"photos/{c}/{n}.png {c}\n" for c in ("red", "blue") for n in (5, 6)))
    data = load(Path("test.txt"))
    assert data.test is None and data.split_paths == [Path("best.train.txt"), Path("best.test.txt")]


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b"", "it is not such a list"),
        (b"Notes on the test: bring two cables\n", "its classes do not have the same folders"),
        (b"caf\xe9\n", "it is not such a list"),
        (b"a/images/none.png 0\n", "its classes do not have the same folders"),
        (b"photos/red/7.png 7\n", "its classes do not have the same folders"),
    ],
)
def test_an_unrelated_test_list_beside_another_training_list_is_left_out_and_named(photos, content, why, capsys):
    for colour in ("red", "blue"):
        os.makedirs(f"{colour}/images")
        for number in range(2):
            os.link(f"photos/{colour}/{number + 5}.png", f"{colour}/images/{number}.png")
    Path("mine.txt").write_text(
        "".join(f"{c}/images/{n}.png {i}\n" for i, c in enumerate(("red", "blue")) for n in (0, 1))
    )
    Path("test.txt").write_bytes(content)
    assert load(Path("mine.txt")).test is None
    assert capsys.readouterr().err == f"warning: test.txt is not used: {why}; give --test test.txt to test on it\n"


# A folder that is already split


@pytest.fixture
def split(tmp_path, monkeypatch):
    """A function that makes d/PART/{red,green} for some parts, in a working directory."""
    monkeypatch.chdir(tmp_path)

    def make(*parts):
        for place, part in enumerate(parts):
            for colour in ("red", "green"):
                for number in range(4):
                    save_photo(f"d/{part}/{colour}/{number}.png", colour, 9 * place + 2 * number)

    return make


@pytest.mark.parametrize(("parts", "test"), [(("train", "val"), "val"), (("Training", "test"), "test")])
def test_a_folder_that_is_already_split_is_trained_and_tested_on_as_it_says(split, quick, parts, test):
    split(*parts)
    Path("d/read me.txt").touch()
    out = go("--train", "d", "--epochs", 1)
    assert "data      8 training and 8 test images of 2 classes: " in out
    assert f"          d is split already: {parts[0]} is trained on, {test} tests\n" in out
    assert f"best      epoch chosen on d/{test}\n" in out and not Path("best.test.txt").exists()
    assert load_checkpoint(Path("best.pth"))[1]["classes"] == ["green", "red"]


def test_where_a_folder_holds_both_val_chooses_the_epoch_and_test_is_scored_once(split, small, tiny, monkeypatch):
    split("train", "val", "test")
    chosen = []
    original = train.train_head

    def spy(head, criterion, splits, *args, **options):
        chosen.append(splits.val.dataset.image_list.path(0))
        return original(head, criterion, splits, *args, **options)

    monkeypatch.setattr(train, "train_head", spy)
    out = go("--train", "d", "--epochs", 1, "--finetune-epochs", 1, "--audit", "audit.html")
    assert "data      8 training, 8 validation and 8 test images of 2 classes: " in out
    assert "d is split already: train is trained on, val chooses the epoch, test tests\n" in out
    assert "best      epoch chosen on d/val\n" in out and chosen == [b"d/val/green/0.png"]
    assert re.search(r"^epoch  train loss  train acc   val loss   val acc", out, re.MULTILINE)
    assert re.search(r"^test      accuracy .*, scored once$", out, re.MULTILINE)
    status, _, err = run_main(train.main, "--train", "d", "--val-split", 0.2, "--weights", "none")
    assert status == 2 and err == "error: --val-split: d/val chooses the epoch already; leave it out\n"


@pytest.mark.parametrize(
    ("parts", "options", "command"),
    [
        (("train", "test", "extra"), (), "--train d/train --test d/test"),
        (("val", "test"), (), "--train d/FOLDER --test d/test"),
        (("train", "test"), ("--test", "d/val"), "--train d/train --test d/val"),
        (("photos",), (), "--train d/photos"),
    ],
)
def test_a_folder_in_doubt_ends_in_one_line_with_the_command_to_type(split, parts, options, command):
    split(*parts)
    status, out, err = run_main(train.main, "--train", "d", *options, "--weights", "none")
    assert (status, out) == (2, "") and err.startswith("error: d: ")
    assert err.splitlines()[0].endswith(command)


def test_classes_with_the_same_folders_in_each_are_classes_and_that_is_told(split, capsys):
    split("cat", "dog")
    assert load(Path("d")).classes == ["cat", "dog"]
    words = "d: the classes are cat, dog, each with green, red in it; if those are meant, move them up"
    assert capsys.readouterr().err == f"warning: {words}\n"


def test_a_folder_one_level_above_the_class_folders_is_taken_with_a_warning_that_names_the_right_one(photos, capsys):
    save_photo("more/new/1.png")
    save_photo("more/new/2.png")
    os.rename("photos", "more/my photos")
    assert load(Path("more")).classes == ["my photos", "new"]
    words = "my photos is one class, with the folders blue, green, red in it; if those are the classes"
    assert capsys.readouterr().err == f"warning: more: {words}: --train 'more/my photos'\n"


def test_without_any_argument_the_recipes_lists_are_taken(colours):
    data = load()
    assert (data.train.name, data.test.name, data.test_path) == ("train.txt", "test.txt", Path("test.txt"))
    assert data.classes == list(COLOURS) and share_folders(data.train, data.test)


def test_where_every_class_has_one_image_there_is_none_to_test_on(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for colour in COLOURS:
        save_photo(f"photos/{colour}/1.png", colour)
    status, out, err = run_main(train.main, "--train", "photos", "--weights", "none")
    assert status == 2 and not out
    assert "error: photos: one image of each class, none to spare to test on; name test images by --test\n" in err


def test_a_list_that_would_be_written_over_is_named_and_stays(photos, quick):
    go("--train", "photos", "--epochs", 1)
    before = Path("best.train.txt").read_text()
    status, _, err = run_main(train.main, "--train", "best.train.txt", "--weights", "none")
    assert status == 2 and "error: --out best.train.txt: is read by this run; name another file to write" in err
    assert Path("best.train.txt").read_text() == before


HEIC = b"\0\0\0\x18ftypheic\0\0\0\0mif1heic"
CONVERT = "find photos/red -iname '*.hei[cf]' -exec heif-convert {} {}.jpg \\; -exec mv {} {}.original \\; "


def test_heic_photos_are_named_all_at_once_before_the_pass_with_how_to_convert_them(photos, decoded, monkeypatch):
    monkeypatch.setattr("sys.platform", "linux")
    for number in range(12):
        Path(f"photos/red/IMG_{number:02d}.HEIC").write_bytes(HEIC)
    os.link("photos/blue/1.png", "photos/blue/no.heic")  # by name alone
    status, out, err = run_main(train.main, "--train", "photos", "--weights", "none")
    assert (status, out) == (2, "") and not decoded and "no.heic" not in err
    lines = err.splitlines()
    assert lines[:2] == ["error: photos/red/IMG_00.HEIC", "error: photos/red/IMG_01.HEIC"] and len(lines) == 11
    total = "photos: 12 HEIC photos, which can't be read, 10 of them shown"
    assert lines[-1] == f"error: {total}; to convert: {CONVERT}(needs libheif-examples)"


def test_heic_photos_with_absolute_and_with_relative_paths_are_named_together(photos, monkeypatch):
    monkeypatch.setattr("sys.platform", "linux")
    for name in ("red/1.heic", "blue/2.heic"):
        Path(f"photos/{name}").write_bytes(HEIC)
    lines = [f"photos/red/{n}.png 0\nphotos/blue/{n}.png 1\n" for n in range(3, 10)]
    Path("list.txt").write_text("".join(lines) + f"photos/red/1.heic 0\n{photos}/photos/blue/2.heic 1\n")
    with pytest.raises(UserError) as error:
        load(Path("list.txt"), Path("list.txt"))
    assert f"to convert: find {photos}/photos -iname" in error.value.lines[-1]


def test_a_train_txt_alone_is_trained_on_with_test_images_held_out(photos):
    Path("train.txt").write_text("".join(f"photos/{c}/{n}.png {i}\n" for i, c in enumerate(COLOURS) for n in (3, 4)))
    data = load()
    assert data.test is None and len(data.train) == 6 and data.test_path == Path("best.test.txt")


def test_as_many_heic_photos_as_may_be_unreadable_are_skipped_with_a_word_beforehand(photos, capsys):
    Path("photos/red/IMG.HEIC").write_bytes(HEIC)
    assert len(load(Path("photos")).train) == 31
    err = capsys.readouterr().err
    assert err.startswith(
        "warning: photos: 1 HEIC photo, which can't be read: photos/red/IMG.HEIC; skipped; to convert: "
    )


def test_a_heic_photo_under_the_name_of_a_jpeg_is_named_and_is_to_be_renamed_first(photos, monkeypatch):
    monkeypatch.setattr("transfer.inputs.heic.SAMPLE", 3)  # of 34: every eleventh is opened, and then all
    for name in ("blue/0.jpg", "red/IMG_1.jpg", "red/IMG_2.HEIC", "red/zzz.jpg"):
        Path(f"photos/{name}").write_bytes(HEIC)
    status, _, err = run_main(train.main, "--train", "photos", "--weights", "none")
    assert status == 2 and "photos: 4 HEIC photos, which can't be read; rename " in err
    assert "read; rename photos/blue/0.jpg, photos/red/IMG_1.jpg, photos/red/zzz.jpg to .heic; to convert: " in err


@pytest.mark.parametrize("platform", ["darwin", "win32", "linux", "freebsd14"])
def test_the_command_that_converts_is_that_of_the_platform(monkeypatch, platform):
    monkeypatch.setattr("sys.platform", platform)
    command = heic_command(b"my pics")
    tool = {"darwin": "sips", "win32": "magick"}.get(platform, "heif-convert")
    assert tool in command and "'my pics'" in command and "{{" not in command


def test_an_unreadable_photo_in_a_folder_is_skipped_and_in_neither_list(photos, quick, capsys):
    Path("photos/red/broken.png").write_bytes(b"no image")
    status, out, err = run_main(train.main, "--train", "photos", "--epochs", 1, "--weights", "none", "--workers", 0)
    assert status == 0 and "warning: photos/red/broken.png: not an image; skipped\n" in err
    assert "broken" not in Path("best.train.txt").read_text() + Path("best.test.txt").read_text()


def test_a_path_that_looks_like_a_comment_is_written_so_that_it_is_read_again(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = [b"#1/a.png", b" b/a.png", b"./c/a.png", b"d/e f 7.png"]
    for name in names:
        save_photo(os.fsdecode(name))
    Path("list.txt").write_bytes(list_text(ImageList("x", names, [0, 1, 2, 3], range(4)), "by hand"))
    image_list, problems = read_list(Path("list.txt"), Path())
    assert not problems and image_list.lines.tolist() == [2, 3, 4, 5] and image_list.labels.tolist() == [0, 1, 2, 3]
    assert [os.path.normpath(path) for path in image_list.paths()] == [os.path.normpath(name) for name in names]


def test_the_lists_of_a_split_are_those_of_the_checkpoint_beside_them_also_where_a_later_run_stops_early(photos, quick):
    go("--train", "photos", "--epochs", 1)
    before = {path: path.read_bytes() for path in Path().glob("best.*")}
    assert set(map(str, before)) == {"best.pth", "best.csv", "best.train.txt", "best.test.txt"}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "train_one_epoch", interrupt)
        assert run_main(train.main, "--train", "photos", "--seed", 1, "--weights", "none", "--workers", 0)[0] == 130
    assert {path: path.read_bytes() for path in Path().glob("best.*")} == before
    go("--train", "photos", "--epochs", 1, "--seed", 1)
    assert Path("best.test.txt").read_bytes() != before[Path("best.test.txt")]
    assert {path: backup_path(path).read_bytes() for path in before} == before


def interrupt(*_, **__):
    raise KeyboardInterrupt


def test_lists_of_an_earlier_split_go_with_its_checkpoint_unless_they_are_read_or_ours_no_more(photos, quick):
    go("--train", "photos", "--epochs", 1)
    held = Path("best.test.txt").read_bytes()
    go("--train", "best.train.txt", "--test", "best.test.txt", "--epochs", 1)
    assert Path("best.test.txt").read_bytes() == held and not Path("best.test.previous.txt").exists()
    go("--train", "photos", "--test", "photos", "--epochs", 1)
    assert not Path("best.test.txt").exists() and Path("best.test.previous.txt").read_bytes() == held
    Path("best.test.txt").write_text("photos/red/5.png 0\n")  # somebody's own
    go("--train", "photos", "--test", "photos", "--epochs", 1)
    assert Path("best.test.txt").read_text() == "photos/red/5.png 0\n"


@pytest.mark.parametrize(("folder", "same"), [("cat", True), ("horse", False)])
def test_a_short_test_list_of_other_folders_is_not_of_the_same_classes_however_long_the_training_list(folder, same):
    def listed(*folders):
        paths = [f"photos/{name}/{number}.jpg".encode() for number, name in enumerate(folders)]
        labels = [int(name == "dog") for name in folders]
        return ImageList("list.txt", paths, labels, range(1, len(paths) + 1))

    assert share_folders(listed(*["cat"] * 50, *["dog"] * 50), listed(folder, "dog")) is same
