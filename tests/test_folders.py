"""Folders: class folders are read as a list, a fifth is held out where no test list is named, and the split is kept."""

import os
import re
from pathlib import Path

import pytest
import torch
from conftest import COLOURS, ROOT, go, run_main, run_script
from PIL import Image

import predict
import train
from transfer.checkpoint import load_checkpoint
from transfer.console import UserError
from transfer.folders import check_split, find_lists, read_folder, share_folders, unlistable, write_list
from transfer.lists import ImageList, class_names, read_list


def photo(path, colour="red", shade=0, size=(64, 64)):
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, tuple(max(0, value - shade) for value in COLOURS[colour])).save(path)


@pytest.fixture
def photos(tmp_path, monkeypatch):
    """A working directory with photos/ of three class folders, of which one has a folder of its own."""
    monkeypatch.chdir(tmp_path)
    for colour in COLOURS:
        for number in range(10):
            inner = "older/" if colour == "red" and number < 3 else ""
            photo(f"photos/{colour}/{inner}{number}.png", colour, 2 * number)
    return tmp_path


# Read


def test_a_folder_is_a_list_with_labels_by_the_sorted_names_of_its_folders(photos):
    listed, problems = read_folder(Path("photos"))
    assert not problems and len(listed) == 30 and listed.names == ["blue", "green", "red"]
    by_folder = {path.split(b"/")[1]: label for path, label in zip(listed.paths(), listed.labels.tolist(), strict=True)}
    assert by_folder == {b"blue": 0, b"green": 1, b"red": 2} and b"photos/red/older/0.png" in listed.paths()
    assert class_names(listed, None) == listed.names


def test_hidden_files_and_what_is_no_image_are_passed_over_and_counted(photos, capsys):
    for name in (".DS_Store", "red/._0.png", "red/.cache/1.png", "notes.txt", "loose.png", "green/clip.mp4"):
        (photos / "photos" / name).parent.mkdir(exist_ok=True)
        (photos / "photos" / name).touch()
    listed, problems = read_folder(Path("photos"))
    assert not problems and len(listed) == 30
    words = "photos: passed over 2 hidden files and 3 others"
    assert capsys.readouterr().err == f"warning: {words}, which are no images in class folders\n"


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (lambda: os.mkdir("photos/yellow"), "photos/yellow: no image in this class folder; add some or remove it"),
        (
            lambda: photo("flat/1.png"),
            "flat: no class folders in it; give each class's photos a folder of its own there",
        ),
        (lambda: None, "nowhere: no such file or directory; name a list, or a folder of class folders"),
    ],
)
def test_a_folder_that_is_none_of_class_folders_is_named_with_what_to_do(photos, make, why):
    make()
    folder = re.match(r"[^:/]+", why)[0]
    status, out, err = run_main(train.main, "--train", folder, "--weights", "none")
    assert status == 2 and not out and f"error: {why}\n" in err and "Traceback" not in err


def test_names_with_spaces_quotes_and_umlauts_are_read_trained_and_predicted(tmp_path, monkeypatch, tiny):
    monkeypatch.chdir(tmp_path)
    odd = ["crème brûlée", 'it\'s a "dog"', "#1 tag 7", "猫"]
    for number, (name, colour) in enumerate(zip(odd, [*COLOURS, "red"], strict=True)):
        for each in range(4):
            photo(f"my photos/{name}/{each} .a.png", colour, 20 * number + each)
    out = go("--train", "my photos", "--epochs", 1)
    assert load_checkpoint(Path("best.pth"))[1]["classes"] == sorted(odd)
    command = re.search(r"^next      python \S+predict.py (.*)$", out, re.MULTILINE)[1]
    assert command == "best.test.txt --report report.html"
    listed, problems = read_list(Path("best.test.txt"), Path())
    assert not problems and set(listed.labels.tolist()) == {0, 1, 2, 3}
    assert class_names(read_list(Path("best.train.txt"), Path())[0], None) == sorted(odd)


@pytest.mark.parametrize(
    ("path", "why"),
    [
        (b"a/1.png", None),
        (b"a b/\xff.png", "not UTF-8"),
        (b"a\nb/1.png", "a line break in it"),
        (b"1.png ", "a space at"),
    ],
)
def test_a_name_that_no_list_can_hold_is_told_before_any_work(path, why):
    assert unlistable(path) is None if why is None else unlistable(path).startswith(why)
    listed = ImageList("photos", [b"b/1.png", b"b/2.png", path], [0, 0, 0], range(3))
    listed.names = ["b"]
    if why:
        with pytest.raises(UserError, match=why):
            check_split(listed, None, None)
    else:
        check_split(listed, None, None)
    check_split(listed, listed, None)  # nothing is to be written


# Test images


def test_a_fifth_of_each_class_is_held_out_and_both_lists_are_kept_beside_the_checkpoint(photos, quick):
    out = go("--train", "photos", "--out", "runs.pth", "--epochs", 1)
    assert "data      30 images of 3 classes; a fifth of each is held out to test on\n" in out
    assert "best      epoch chosen on runs.test.txt\n" in out
    lists = {name: read_list(Path(f"runs.{name}.txt"), Path()) for name in ("train", "test")}
    assert not [problem for _, problems in lists.values() for problem in problems]
    paths = {name: set(listed.paths()) for name, (listed, _) in lists.items()}
    assert not paths["train"] & paths["test"] and paths["train"] | paths["test"] == set(
        read_folder(Path("photos"))[0].paths()
    )
    # Shades of one colour are near-duplicates, of which half a class may be held out together.
    assert all(1 <= count <= 5 for count in lists["test"][0].labels.bincount())
    about = load_checkpoint(Path("runs.pth"))[1]
    assert (about["train_images"], about["test_images"]) == (len(paths["train"]), len(paths["test"]))
    assert about["chosen_on"] == "runs.test.txt" and about["classes"] == ["blue", "green", "red"]
    # And the lists do as well as the folder.
    again = go("--train", "runs.train.txt", "--test", "runs.test.txt", "--out", "again.pth", "--epochs", 1)
    assert f"{len(paths['train'])} training and {len(paths['test'])} test images of 3 classes" in again
    assert load_checkpoint(Path("again.pth"))[1]["classes"] == ["blue", "green", "red"]


def test_the_split_is_that_of_the_view_seed(photos, quick):
    def test_list(*options):
        go("--train", "photos", "--epochs", 1, *options)
        return Path("best.test.txt").read_text().splitlines()[1:]

    assert test_list() == test_list("--seed", 5, "--view-seed", 0) != test_list("--view-seed", 1)


def test_of_the_held_out_images_none_is_trained_on_also_with_a_validation_split_and_fine_tuning(photos, tiny):
    seen = []
    with pytest.MonkeyPatch.context() as patch:
        original = train.train_head

        def spy(head, features, *rest, **how):
            seen.append(features.take(features.rows, 0))
            return original(head, features, *rest, **how)

        patch.setattr(train, "train_head", spy)
        out = go("--train", "photos", "--epochs", 1, "--val-split", 0.25, "--finetune-epochs", 1, "--cache", "kept")
        held = len(read_list(Path("best.test.txt"), Path())[0])
        assert re.search(r"^test      accuracy [\d.]+%, scored once$", out, re.MULTILINE)
        go("--train", "best.test.txt", "--test", "best.train.txt", "--epochs", 1, "--out", "o.pth")
    trained, tested = seen
    assert len(tested) == held
    assert not (torch.cdist(trained, tested, compute_mode="donot_use_mm_for_euclid_dist") == 0).any()


def test_a_test_folder_has_the_training_folders_labels_and_an_unknown_class_is_an_error(photos, quick):
    photo("held/red/1.png")
    photo("held/blue/1.png", "blue")
    train_list, test, names, path = find_lists(Path("photos"), Path("held"), Path(), None)
    assert names == ["blue", "green", "red"] and sorted(test.labels.tolist()) == [0, 2] and path == Path("held")
    out = go("--train", "photos", "--test", "held", "--epochs", 1)
    assert "30 training and 2 test images of 3 classes" in out and not Path("best.test.txt").exists()
    assert re.search(r"predict\.py held --labelled --report report\.html$", out, re.MULTILINE)
    photo("held/rot/1.png")
    status, _, err = run_main(train.main, "--train", "photos", "--test", "held", "--weights", "none")
    assert status == 2 and err.startswith("error: held: no class is called rot; there are blue, green, red\n")


def test_a_test_folder_goes_by_the_training_folders_also_where_classes_are_named_otherwise(photos):
    photo("held/red/1.png")
    Path("names").write_text("azul\nverde\nrojo\n")
    _, test, names, _ = find_lists(Path("photos"), Path("held"), Path(), Path("names"))
    assert names == ["azul", "verde", "rojo"] and test.labels.tolist() == [2]


def test_a_test_list_beside_another_training_list_counts_where_its_labels_lie_in_the_same_folders(photos):
    os.makedirs("lists")
    Path("lists/mine.txt").write_text("photos/red/5.png 0\nphotos/red/6.png 0\nphotos/blue/5.png 1\n")
    find = lambda: find_lists(Path("lists/mine.txt"), None, Path(), None)  # noqa: E731
    assert find()[1] is None
    Path("lists/test.txt").write_text("photos/red/7.png 0\n")
    assert find()[1].paths() == [b"photos/red/7.png"] and find()[3] == Path("lists/test.txt")
    Path("lists/test.txt").write_text("photos/green/7.png 0\n")  # somebody else's
    assert find()[1] is None


def test_without_any_argument_the_recipes_lists_are_taken(colours):
    train_list, test, names, path = find_lists(None, None, Path(), None)
    assert (train_list.name, test.name, path) == ("train.txt", "test.txt", Path("test.txt"))
    assert names == list(COLOURS) and share_folders(train_list, test)


def test_where_every_class_has_one_image_there_is_none_to_test_on(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for colour in COLOURS:
        photo(f"photos/{colour}/1.png", colour)
    status, out, err = run_main(train.main, "--train", "photos", "--weights", "none")
    assert status == 2 and not out
    assert "error: photos: one image of each class, none to spare to test on; name test images by --test\n" in err


@pytest.mark.parametrize(("classes", "per_class"), [(1, 6), (2, 2), (200, 2)])
def test_folders_of_any_shape_are_trained_on(tmp_path, monkeypatch, tiny, classes, per_class):
    monkeypatch.chdir(tmp_path)
    for label in range(classes):
        for number in range(per_class):
            photo(f"photos/{label:03d}/{number}.png", [*COLOURS][label % 3], label + number, size=(20, 20))
    go("--train", "photos", "--epochs", 1, "--audit", "look.html")
    assert len(load_checkpoint(Path("best.pth"))[1]["classes"]) == classes
    assert len(read_list(Path("best.test.txt"), Path())[0]) >= classes


def test_a_list_that_would_be_written_over_is_named_and_stays(photos, quick):
    go("--train", "photos", "--epochs", 1)
    before = Path("best.train.txt").read_text()
    status, _, err = run_main(train.main, "--train", "best.train.txt", "--weights", "none")
    assert status == 2 and "error: --out best.train.txt: is read by this run; name another file to write" in err
    assert Path("best.train.txt").read_text() == before


def test_an_unreadable_photo_in_a_folder_is_skipped_and_in_neither_list(photos, quick, capsys):
    Path("photos/red/broken.png").write_bytes(b"no image")
    status, out, err = run_main(train.main, "--train", "photos", "--epochs", 1, "--weights", "none", "--workers", 0)
    assert status == 0 and "warning: photos/red/broken.png: not an image; skipped\n" in err
    assert "broken" not in Path("best.train.txt").read_text() + Path("best.test.txt").read_text()


def test_a_path_that_looks_like_a_comment_is_written_so_that_it_is_read_again(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = [b"#1/a.png", b" b/a.png", b"./c/a.png", b"d/e f 7.png"]
    for name in names:
        photo(os.fsdecode(name))
    write_list(Path("list.txt"), ImageList("x", names, [0, 1, 2, 3], range(4)), "by hand")
    listed, problems = read_list(Path("list.txt"), Path())
    assert not problems and listed.lines.tolist() == [2, 3, 4, 5] and listed.labels.tolist() == [0, 1, 2, 3]
    assert [os.path.normpath(path) for path in listed.paths()] == [os.path.normpath(name) for name in names]


def test_names_come_from_the_folders_below_the_one_that_all_share():
    paths = [b"photos/cat/2020/1.jpg", b"photos/cat/2021/1.jpg", b"photos/dog/2020/1.jpg"]
    assert class_names(ImageList("x", paths, [0, 0, 1], range(3)), None) == ["cat", "dog"]
    mixed = [b"/photos/cat/2020/1.jpg", b"photos/cat/2021/1.jpg", b"photos/dog/2020/1.jpg"]
    assert class_names(ImageList("x", mixed, [0, 0, 1], range(3)), None) == ["0", "1"]


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
    table = lambda out: out[out.index("\naccuracy") :]  # noqa: E731
    assert scored[0] == listed[0] == 0 and table(scored[1]) == table(listed[1])
    both = run_main(predict.main, "folder", "here/test.txt", "--root", "here", "--labelled")
    assert both[0] == 0 and " of 24, 95% interval" in both[1]


def test_a_folder_of_another_class_is_named_and_plain_images_have_no_labels(model):
    photo("folder/purple/1.png")
    status, out, err = run_main(predict.main, "folder", "--labelled")
    assert (
        status == 2
        and not out
        and err.startswith("error: folder: no class is called purple; there are red, green, blue\n")
    )
    assert "was trained on other classes; rename the folders as those are named" in err
    status, _, err = run_main(predict.main, "red.png", "--labelled")
    assert status == 2 and err.startswith("error: --labelled: needs labels; give lists of lines with path and label")


def test_from_a_folder_to_a_report_in_two_commands(tmp_path):
    for food in ("apple", "banana"):
        os.makedirs(tmp_path / "photos" / food)
        for number in range(1, 9):
            os.symlink(ROOT / f"food/{food}/train_{number:02d}.jpg", tmp_path / f"photos/{food}/{number}.jpg")
    done = run_script("train.py", "--train", "photos", "--epochs", 2, "--views", 2, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert 2 <= len(read_list(tmp_path / "best.test.txt", tmp_path)[0]) <= 6
    command = re.search(r"^next      python (\S+)/predict\.py (.*)$", done.stdout, re.MULTILINE)
    assert Path(command[1]) == ROOT
    done = run_script("predict.py", *command[2].split(), cwd=tmp_path)
    assert done.returncode == 0 and (tmp_path / "report.html").stat().st_size > 10_000


# Unbalanced classes


@pytest.fixture
def uneven(tmp_path, monkeypatch):
    """A working directory with 33 photos of red, 3 of green."""
    monkeypatch.chdir(tmp_path)
    for colour, count in (("red", 33), ("green", 3)):
        for number in range(count):
            photo(f"photos/{colour}/{number}.png", colour, 3 * number)
            if number < 3:
                photo(f"held/{colour}/{number}.png", colour, 3 * number + 1)
    return "--train", "photos", "--test", "held", "--epochs", 2


def test_the_header_names_the_flag_where_classes_are_very_unequal_and_only_there(uneven, quick):
    line = "          3 of green, 33 of red: --balance weighs all classes alike\n"
    assert line in go(*uneven)
    assert "--balance" not in go(*uneven, "--balance")
    for number in range(30, 33):
        os.unlink(f"photos/red/{number}.png")
    assert "--balance" not in go(*uneven)


def test_balance_chooses_the_epoch_by_macro_recall_and_says_it(uneven, quick, monkeypatch):
    figures = iter([(1.0, 0.9, 0.5), (1.0, 0.6, 0.7)])
    monkeypatch.setattr(train, "evaluate", lambda *_: next(figures))
    out = go(*uneven, "--balance")
    assert "epoch  train loss  train acc  test loss  test acc  test recall        lr\n" in out
    assert re.search(r"^    2 .* 60\.00% +70\.00%  0\.005000  best$", out, re.MULTILINE)
    assert "best      test accuracy 60.00%, macro recall 70.00%, epoch 2 (held)\n" in out
    about = load_checkpoint(Path("best.pth"))[1]
    assert (about["epoch"], about["accuracy"], about["recall"]) == (2, 0.6, 0.7)
    assert Path("best.csv").read_text().splitlines()[0].endswith("test_accuracy,test_recall,lr,best")


def test_weights_make_classes_count_alike_and_images_one_on_average():
    labels = torch.tensor([0] * 30 + [1] * 10 + [3] * 5)
    weights = train.balance(labels, 4)
    sums = [float(weights[label] * (labels == label).sum()) for label in (0, 1, 3)]
    assert sums == pytest.approx([45 / 4] * 3) and weights[[0, 1, 3]].tolist() == pytest.approx([0.375, 1.125, 2.25])


def test_a_weighted_loss_is_the_weighted_sum_over_samples():
    model = torch.nn.Linear(1, 2, bias=False)
    model.weight.data = torch.tensor([[0.0], [1.0]])
    inputs, labels, weight = torch.tensor([[0.0], [1.0], [3.0]]), torch.tensor([0, 0, 1]), torch.tensor([0.5, 2.0])
    each = torch.nn.functional.cross_entropy(model(inputs), labels, reduction="none") * weight[labels]
    still = torch.optim.SGD(model.parameters(), lr=0.0)
    batches = [(inputs[:2], labels[:2]), (inputs[2:], labels[2:])]
    loss, accuracy, recall = train.train_one_epoch(model, batches, still, 1, weight)
    assert loss == pytest.approx(each.sum().item() / 3)
    assert (accuracy, recall) == pytest.approx((2 / 3, (1 / 2 + 1) / 2))


def test_balance_finds_more_of_a_rare_class(tmp_path, monkeypatch):
    generator = torch.Generator().manual_seed(0)
    labels = torch.tensor([0] * 400 + [1] * 20)
    features = torch.randn(420, 8, generator=generator) + labels[:, None] * 0.7

    def recall_of_rare(weight):
        torch.manual_seed(0)
        head = torch.nn.Linear(8, 2)
        adam = torch.optim.Adam(head.parameters(), lr=0.01)
        for epoch in range(60):
            batches = [(features[n::7], labels[n::7]) for n in range(7)]
            train.train_one_epoch(head, batches, adam, epoch, weight)
        return float((head(features)[400:].argmax(1) == 1).double().mean())

    assert recall_of_rare(train.balance(labels, 2)) > recall_of_rare(None) + 0.3
