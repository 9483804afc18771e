"""Further than the head: fine-tuning, honest selection, kept features, several processes."""

import csv
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
import torch
from conftest import ROOT, make_photos, run_main
from hypothesis import assume, given
from hypothesis import strategies as st
from PIL import Image
from torch import nn
from torch.nn import functional as F
from torchvision import transforms as T

import predict
import train

BUNDLED = ROOT / "food" / "resnet18-grocery.pth"
STAGES = {"layer4": ("layer4.",), "layer3": ("layer3.", "layer4."), "all": ("conv1.", "bn1.", "layer")}
VIEWS = {name: getattr(train, name) for name in ("EVALUATION_VIEW", "RESIZE_TRAINING", "TRAINING_VIEW")}
BUFFERS = ("running_mean", "running_var", "num_batches_tracked")


@pytest.fixture(autouse=True)
def tiny(monkeypatch, one_thread):
    """Views of 64 pixels instead of 224, one thread and no waiting for the disk: nothing here depends on these."""
    steps = [T.CenterCrop(64) if isinstance(step, T.CenterCrop) else step for step in train.TRAINING_VIEW.transforms]
    monkeypatch.setattr(train, "EVALUATION_VIEW", T.Resize((64, 64)))
    monkeypatch.setattr(train, "RESIZE_TRAINING", T.Resize((86, 86)))
    monkeypatch.setattr(train, "TRAINING_VIEW", T.Compose(steps))
    monkeypatch.setattr(os, "fsync", lambda _: None)


@pytest.fixture
def full_size(tiny, monkeypatch):
    """The views as they are: for tests that compare with a process of its own."""
    for name, view in VIEWS.items():
        monkeypatch.setattr(train, name, view)


@pytest.fixture
def few(tmp_path, monkeypatch):
    """A working directory with two solid-colour images a class and list."""
    make_photos(tmp_path, per_class=2)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def quick(monkeypatch):
    """Features that are the pixels at low resolution: for tests in which the network's own arithmetic plays no part."""

    def embed(module, views, device, dtype):
        return F.adaptive_avg_pool2d(views.permute(0, 3, 1, 2) / 255, (13, 14)).flatten(1)[:, :512]

    monkeypatch.setattr(train, "embed", embed)


@pytest.fixture
def decoded(monkeypatch):
    """How often each image is decoded, by its file name."""
    counts, original = Counter(), train.read_photo

    def read_photo(path):
        counts[os.path.basename(os.fsdecode(path))] += 1
        return original(path)

    monkeypatch.setattr(train, "read_photo", read_photo)
    return counts


def go(*args, weights="none"):
    """A run of train.py that must succeed: its stdout."""
    status, out, err = run_main(train.main, "--weights", weights, "--workers", 0, *args)
    assert status == 0, err
    return out


def weights_of(path="best.pth"):
    return torch.load(path, weights_only=True)


def same(first, second):
    return first.keys() == second.keys() and all(torch.equal(value, second[key]) for key, value in first.items())


def rows_of(path="best.csv"):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def script_accuracies(monkeypatch, *accuracies):
    """Let the evaluations give these accuracies, one after the other."""
    coming = iter(accuracies)
    monkeypatch.setattr(train, "evaluate", lambda model, batches: (1.0, next(coming)))


def made_up_photos(labels):
    return train.Photos("list", [b"%d.png" % n for n in range(len(labels))], labels, range(1, len(labels) + 1))


# Fine-tuning


@pytest.mark.parametrize("stage", STAGES)
def test_fine_tuning_changes_the_named_stages_and_the_head_alone(few, monkeypatch, stage):
    script_accuracies(monkeypatch, 0.3, 0.6)
    go("--epochs", 1, "--finetune-epochs", 1, "--unfreeze", stage)
    before, after = train.build_model(3, None, seed=0).state_dict(), weights_of()
    changed = {key for key, value in after.items() if not torch.equal(value, before[key])}
    expected = {key for key in before if key.startswith((*STAGES[stage], "fc.")) and not key.endswith(BUFFERS)}
    assert changed == expected


def test_batch_norm_infers_and_only_the_tail_has_gradients_while_fine_tuning(few, monkeypatch):
    seen, step = [], torch.optim.Adam.step

    def spy(self, *args, **kwargs):
        seen.append({name for name, parameter in models[0].named_parameters() if parameter.grad is not None})
        assert not any(module.training for module in models[0].modules() if isinstance(module, nn.BatchNorm2d))
        return step(self, *args, **kwargs)

    models, build = [], train.build_model
    monkeypatch.setattr(train, "build_model", lambda *args: models.append(build(*args)) or models[0])
    monkeypatch.setattr(torch.optim.Adam, "step", spy)
    go("--epochs", 1, "--finetune-epochs", 1, "--batch-size", 3)
    head = {"fc.weight", "fc.bias"}
    tail = {name for name, _ in models[0].named_parameters() if name.startswith("layer4.")}
    assert seen == [head, head, head | tail, head | tail]


def test_fine_tuning_is_off_unless_asked_for(few, quick, monkeypatch):
    monkeypatch.setattr(train, "fine_tune", lambda *args, **kwargs: pytest.fail("fine-tuned unasked"))
    go("--epochs", 3)
    plain, rows = weights_of(), rows_of()
    go("--epochs", 3, "--finetune-epochs", 0, "--unfreeze", "all", "--finetune-lr", 1)
    assert same(plain, weights_of()) and rows == rows_of()


def test_fine_tuning_starts_from_the_best_head_not_the_last(few, quick, monkeypatch):
    def train_one_epoch(model, batches, optimizer, epoch):
        if epoch == 5:
            heads.append((model.head.weight.clone(), weights_of()["fc.weight"]))
            return 1.0, 0.5
        return original(model, batches, optimizer, epoch)

    heads, original = [], train.train_one_epoch
    monkeypatch.setattr(train, "embed_in_order", cheap_trunk(train.embed_in_order))
    monkeypatch.setattr(train, "train_one_epoch", train_one_epoch)
    script_accuracies(monkeypatch, 0.2, 0.9, 0.2, 0.2, 0.2)
    go("--epochs", 4, "--lr", 0.1, "--finetune-epochs", 1)
    ((start, saved),) = heads
    script_accuracies(monkeypatch, 0.2, 0.9)
    go("--epochs", 2, "--lr", 0.1)
    assert torch.equal(start, saved) and torch.equal(start, weights_of()["fc.weight"])


@pytest.mark.parametrize(("accuracy", "replaced"), [(0.5, False), (0.75, True)])
def test_best_pth_is_replaced_only_where_fine_tuning_beats_the_head(few, monkeypatch, accuracy, replaced):
    script_accuracies(monkeypatch, 0.5)
    go("--epochs", 1, "--out", "head.pth")
    script_accuracies(monkeypatch, 0.5, accuracy)
    out = go("--epochs", 1, "--finetune-epochs", 1)
    assert same(weights_of("head.pth"), weights_of()) != replaced
    assert [row["best"] for row in rows_of()] == ["1", str(int(replaced))]
    about = train.load_checkpoint(Path("best.pth"))[1]
    assert (about["accuracy"], about["epoch"]) == ((0.75, 2) if replaced else (0.5, 1))
    assert f"accuracy {about['accuracy']:.2%}, epoch {about['epoch']} (" in out


def test_epochs_count_on_and_each_part_has_its_own_rate_and_plateau(few, quick, monkeypatch):
    def train_one_epoch(model, batches, optimizer, epoch):
        rates.append([group["lr"] for group in optimizer.param_groups])
        return 1.0, 0.5

    rates = []
    monkeypatch.setattr(train, "embed_in_order", cheap_trunk(train.embed_in_order))
    monkeypatch.setattr(train, "train_one_epoch", train_one_epoch)
    script_accuracies(monkeypatch, 0.9, *[0.5] * 12)
    go("--epochs", 7, "--lr", 0.02, "--finetune-epochs", 6, "--finetune-lr", 0.003)
    assert [int(row["epoch"]) for row in rows_of()] == list(range(1, 14))
    # The head's rate halves after its fifth epoch: the fourth without gain. Fine-tuning counts from its own first.
    assert rates[:7] == [[0.02]] * 5 + [[0.01]] * 2
    assert rates[7:] == [[0.003, 0.002]] * 5 + [[0.0015, 0.001]]
    assert [float(row["lr"]) for row in rows_of()] == [each[0] for each in rates]


def cheap_trunk(original):
    """`embed_in_order` whose images reach fine-tuning as zeros."""

    def embed_in_order(module, dataset, rows, **how):
        if how.get("per_image") is None:
            return iter([(list(rows), torch.zeros(len(rows), 1), {})])
        return original(module, dataset, rows, **how)

    return embed_in_order


def test_an_epoch_of_fine_tuning_decodes_training_images_once_and_test_images_never_again(few, decoded):
    go("--epochs", 1, "--finetune-epochs", 3)
    assert decoded["train_0.png"] == decoded["train_1.png"] == 3 * (1 + 3)  # of three classes: the pass, each epoch
    assert decoded["test_0.png"] == decoded["test_1.png"] == 3 * (1 + 1)  # the pass and the trunk's output, once


@pytest.mark.parametrize("cache", [(), ("--cache", "kept")])
def test_fine_tuning_sees_fresh_views_and_the_evaluation_view_by_turns_with_and_without_a_cache(
    few, quick, monkeypatch, cache
):
    seen, original = [], train.Views

    def spy(photos, views, seed, by_turns=False):
        seen.append((photos.name, list(views), by_turns))
        return original(photos, views, seed, by_turns)

    monkeypatch.setattr(train, "Views", spy)
    monkeypatch.setattr(train, "embed_in_order", cheap_trunk(train.embed_in_order))
    monkeypatch.setattr(train, "train_one_epoch", lambda *args: (1.0, 0.5))
    script_accuracies(monkeypatch, *[0.5] * 5)
    go("--epochs", 2, "--finetune-epochs", 3, "--views", 4, *cache)
    mixed = [(views, by_turns) for name, views, by_turns in seen if name == "train.txt"][-3:]
    assert mixed == [([0, 4], True), ([5, 0], True), ([0, 6], True)]


def test_by_turns_each_image_comes_in_one_of_the_views(few):
    photos, _ = train.read_list(Path("train.txt"), Path())
    mixed, all_views = train.Views(photos, [0, 4], 1, by_turns=True), train.Views(photos, [0, 4], 1)
    for index in range(len(photos)):
        assert torch.equal(mixed[index][1], all_views[index][1][index % 2 : index % 2 + 1])


@pytest.mark.parametrize("split", [(), ("--val-split", 0.5)])
def test_after_fine_tuning_predict_is_right_exactly_as_often_as_training_said(tmp_path, monkeypatch, split):
    monkeypatch.chdir(ROOT)
    for name, step in (("train", 4), ("test", 4)):
        lines = [line for line in (ROOT / f"{name}.txt").read_text().splitlines() if int(line.split()[-1]) < 4]
        (tmp_path / f"{name}.txt").write_text("\n".join(lines[::step]))
    lists = ["--train", tmp_path / "train.txt", "--test", tmp_path / "test.txt", "--out", tmp_path / "best.pth"]
    # A rate at which the head learns nothing leaves the best epoch to fine-tuning.
    rates = ["--lr", 1e-9, "--finetune-lr", 1e-3]
    out = go(*lists, *rates, "--epochs", 1, "--finetune-epochs", 2, *split, weights=BUNDLED)
    about = train.load_checkpoint(tmp_path / "best.pth")[1]
    assert about["epoch"] > 1
    status, table, err = run_main(predict.main, tmp_path / "test.txt", "--model", tmp_path / "best.pth", "--workers", 0)
    assert status == 0, err
    percent, right, count = re.search(r"^accuracy +([\d.]+%)  (\d+) of (\d+)", table, re.MULTILINE).groups()
    if split:
        assert f"test      accuracy {percent}, scored once" in out
    else:
        assert about["accuracy"] == int(right) / int(count)
        assert f"best      test accuracy {percent}, epoch {about['epoch']} (" in out


# A validation split


@given(st.lists(st.integers(1, 40), min_size=1, max_size=6), st.floats(0.01, 0.99), st.integers(0, 2**31 - 1))
def test_a_split_is_stratified_disjoint_seeded_and_leaves_something_to_train_on(sizes, share, seed):
    assume(max(sizes) > 1)  # else there is nothing to hold out
    labels = [label for label, size in enumerate(sizes) for _ in range(size)]
    photos = made_up_photos(labels)
    kept, held = train.split_validation(photos, share, seed)
    assert sorted(kept.paths() + held.paths()) == sorted(photos.paths())  # all, and none twice
    where = dict(zip(photos.paths(), zip(labels, range(1, len(labels) + 1), strict=True), strict=True))
    for part in (kept, held):
        assert [where[path] for path in part.paths()] == list(
            zip(part.labels.tolist(), part.lines.tolist(), strict=True)
        )
        assert part.lines.tolist() == sorted(part.lines.tolist())
    for label, size in enumerate(sizes):
        drawn = held.labels.tolist().count(label)
        assert drawn == min(max(1, round(share * size)), size - 1)
    again = train.split_validation(photos, share, seed)
    assert [part.paths() for part in again] == [kept.paths(), held.paths()]


def test_a_split_of_a_fifth_takes_a_fifth_of_each_class():
    photos = made_up_photos([0] * 100 + [1] * 10 + [2] * 3 + [3])
    kept, held = train.split_validation(photos, 0.2, seed=0)
    assert torch.bincount(held.labels).tolist() == [20, 2, 1]
    assert torch.bincount(kept.labels).tolist() == [80, 8, 2, 1]
    other = train.split_validation(photos, 0.2, seed=1)[1]
    assert other.paths() != held.paths()


def test_with_a_split_the_test_list_has_no_say_and_is_scored_once(colours, quick, monkeypatch):
    def swap_test_labels():
        lines = Path("test.txt").read_text().splitlines()
        Path("test.txt").write_text("".join(f"{line[:-1]}{(int(line[-1]) + 1) % 3}\n" for line in lines))

    scored, evaluate = [], train.evaluate

    def spy(model, batches):
        batches = list(batches)
        scored.append(sum(len(labels) for _, labels in batches))
        return evaluate(model, batches)

    monkeypatch.setattr(train, "evaluate", spy)
    options = ("--epochs", 4, "--lr", 0.05, "--val-split", 0.25)
    out = go(*options)
    # Of 4 images a class one is held out: 3 a validation, and 12 of the test list at the end.
    assert scored == [3, 3, 3, 3, 12]
    first, rows = weights_of(), rows_of()
    swap_test_labels()
    other = go(*options)
    assert same(first, weights_of()) and rows == rows_of()
    line = re.compile(r"^test      accuracy (.*), scored once$", re.MULTILINE)
    assert line.findall(out) == ["100.00%"] and line.findall(other) == ["0.00%"]


def test_the_header_and_the_last_lines_say_which_list_chose_the_epoch(colours, quick):
    for split, chosen, judge in ((), "test.txt", "test"), (("--val-split", 0.25), "25% of train.txt", "val"):
        out = go("--epochs", 2, *split)
        lines = out.splitlines()
        assert f"best      epoch chosen on {chosen}" in lines[:4]
        assert re.search(rf"^best      {judge} accuracy [\d.]+%, epoch \d \({re.escape(chosen)}\)$", out, re.MULTILINE)
        assert ("scored once" in out) == bool(split)
        columns = ["epoch", "train_loss", "train_accuracy", f"{judge}_loss", f"{judge}_accuracy", "lr", "best"]
        assert list(rows_of()[0]) == columns
        about = train.load_checkpoint(Path("best.pth"))[1]
        assert about["chosen_on"] == chosen
        assert about["accuracy"] == max(float(row[f"{judge}_accuracy"]) for row in rows_of())
    assert "data      9 training and 12 test images of 3 classes" in lines


def test_a_split_that_would_hold_nothing_out_is_an_error_before_any_work(few, quick, monkeypatch):
    lines = [line for line in Path("train.txt").read_text().splitlines() if "train_0" in line]
    Path("train.txt").write_text("\n".join(lines))
    monkeypatch.setattr(train, "extract_features", lambda *args, **kwargs: pytest.fail("worked first"))
    status, _, err = run_main(train.main, "--weights", "none", "--workers", 0, "--val-split", 0.2)
    assert status == 2
    (error,) = [line for line in err.splitlines() if line.startswith("error:")]
    assert "--val-split" in error and "train.txt" in error


# Kept features


def chunks_in(folder):
    return sorted(Path(folder).glob("*.pt"))


def test_a_second_run_with_another_recipe_for_the_head_makes_no_pass(few, quick, decoded):
    go("--epochs", 1, "--cache", "kept", weights=BUNDLED)
    assert sum(decoded.values()) == 12
    other = ("--lr", 0.01, "--batch-size", 4, "--epochs", 6, "--seed", 9, "--view-seed", 0)
    decoded.clear()
    go(*other, "--cache", "kept", weights=BUNDLED)
    assert not decoded
    kept, rows = weights_of(), rows_of()
    go(*other, weights=BUNDLED)
    assert sum(decoded.values()) == 12
    assert same(kept, weights_of()) and rows == rows_of()


def test_a_cache_gives_the_networks_own_features(few):
    go("--epochs", 2, "--views", 2)
    plain = weights_of()
    for _ in range(2):
        go("--epochs", 2, "--views", 2, "--cache", "kept")
        assert same(plain, weights_of())


def test_the_cache_takes_2_kb_an_image_and_view(few, quick):
    go("--epochs", 1, "--views", 3, "--cache", "kept")
    sizes = sorted(path.stat().st_size for path in chunks_in("kept"))
    for size, images, views in zip(sizes, (6, 6), (1, 3), strict=True):  # the test list has one view
        assert 0 <= size - images * views * 2048 < 3000  # names and checksums
    assert sorted(os.listdir("kept")) == [path.name for path in chunks_in("kept")]


def key_of(backbone=None, views=range(2), seed=0, device="cpu", dtype=torch.float32, rows=range(2)):
    """The chunk's name for the first two training images, and for what a test changes."""
    photos, _ = train.read_list(Path("train.txt"), Path())
    backbone = backbone or plain_backbone()
    recipe = train.recipe_digest(backbone, train.Views(photos, views, seed), torch.device(device), dtype)
    return train.chunk_path(Path("kept"), recipe, photos, rows).name


def plain_backbone():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))


@pytest.mark.parametrize(
    "change",
    [
        {"seed": 1},
        {"views": range(3)},
        {"views": [0, 2]},
        {"dtype": torch.bfloat16},
        {"device": "cuda"},
        {"rows": range(3)},
        {"rows": range(1, 3)},
    ],
    ids=str,
)
def test_what_a_run_asks_for_is_part_of_a_chunks_key(few, change):
    assert key_of(**change) != key_of() == key_of()


@pytest.mark.parametrize("entry", ["0.weight", "0.bias", "1.running_var"])
def test_every_byte_of_the_backbone_is_part_of_a_chunks_key(few, entry):
    backbone = plain_backbone()
    flat = backbone.state_dict()[entry].view(-1)
    flat[-1] = torch.nextafter(flat[-1], torch.tensor(9.0))
    assert key_of(backbone) != key_of()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("READING_VERSION", train.READING_VERSION + 1),
        ("EVALUATION_VIEW", T.Resize((225, 225))),
        ("RESIZE_TRAINING", T.Resize((301, 301))),
        ("TRAINING_VIEW", T.Compose(train.TRAINING_VIEW.transforms[:-1])),
        ("NORMALIZE", T.Normalize(mean=[0.5] * 3, std=[0.5] * 3)),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_the_view_recipe_and_its_version_are_part_of_a_chunks_key(few, monkeypatch, name, value):
    before = key_of()
    monkeypatch.setattr(train, name, value)
    assert key_of() != before


def test_each_images_path_size_and_time_are_part_of_a_chunks_key(few):
    image, lines = Path("red/train_1.png"), Path("train.txt").read_text()
    info = image.stat()
    keys = {key_of()}
    os.utime(image, ns=(info.st_atime_ns, info.st_mtime_ns + 1))
    keys.add(key_of())
    with open(image, "ab") as file:
        file.write(b"\0")
    os.utime(image, ns=(info.st_atime_ns, info.st_mtime_ns))
    assert image.stat().st_mtime_ns == info.st_mtime_ns
    keys.add(key_of())
    shutil.copy2(image, "red/other.png")
    Path("train.txt").write_text(lines.replace("red/train_1.png", "red/other.png"))
    keys.add(key_of())
    Path("train.txt").write_text(lines.replace("red/train_1.png", f"{Path('red/train_0.png').absolute()}"))
    keys.add(key_of())
    assert len(keys) == 5


def test_only_the_chunk_of_a_changed_image_is_computed_again(colours, quick, decoded, monkeypatch):
    monkeypatch.setattr(train, "CHUNK_ROWS", 4)
    go("--epochs", 1, "--cache", "kept")
    assert len(chunks_in("kept")) == 6
    decoded.clear()
    Image.new("RGB", (64, 64), (0, 255, 255)).save("green/train_2.png")
    go("--epochs", 1, "--cache", "kept")
    assert decoded == {f"train_{number}.png": 1 for number in range(4)}
    changed = weights_of()
    go("--epochs", 1)
    assert same(changed, weights_of())


def truncated(path, _):
    path.write_bytes(path.read_bytes()[:-100])


def one_bit_flipped(path, _):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def empty(path, _):
    path.write_bytes(b"")


def text(path, _):
    path.write_text("a shopping list")


def a_state_dict(path, _):
    torch.save(nn.Linear(2, 2).state_dict(), path)


def a_list(path, _):
    torch.save([1, 2, 3], path)


def wrong_shape(path, _):
    torch.save({"features": torch.zeros(4, 1, 512), "unread": {}}, path)


def wrong_type(path, _):
    features = torch.load(path, weights_only=True)["features"]
    torch.save({"features": features.double(), "unread": {}}, path)


def another_chunk(path, other):
    shutil.copy(other, path)


@pytest.fixture
def extract(few, quick, monkeypatch):
    """A function that extracts two views of the training images in two cached chunks of three."""
    monkeypatch.setattr(train, "CHUNK_ROWS", 3)
    photos, _ = train.read_list(Path("train.txt"), Path())
    how = {"device": torch.device("cpu"), "dtype": torch.float32, "workers": 0, "cache": Path()}
    return lambda **options: train.extract_features(plain_backbone(), train.Views(photos, [0, 1], 0), **how, **options)


@pytest.mark.parametrize(
    "damage",
    [truncated, one_bit_flipped, empty, text, a_state_dict, a_list, wrong_shape, wrong_type, another_chunk],
    ids=lambda damage: damage.__name__,
)
def test_a_damaged_or_foreign_chunk_is_computed_again_with_a_warning(extract, capsys, damage):
    expected = torch.cat(extract()[0].chunks).clone()
    first, second = chunks_in(".")
    content = first.read_bytes()
    damage(first, second)
    assert first.read_bytes() != content
    assert torch.equal(torch.cat(extract()[0].chunks), expected)
    assert capsys.readouterr().err == f"warning: {first.name}: damaged or foreign; computed again\n"
    assert torch.equal(torch.cat(extract()[0].chunks), expected)
    assert capsys.readouterr().err == ""


def test_chunks_are_mapped_into_memory_not_read(extract):
    for _ in range(2):  # as computed and as found
        features, _ = extract()
        maps = Path("/proc/self/maps").read_text()
        assert len(features.chunks) == 2 and all(str(path.absolute()) in maps for path in chunks_in("."))
        del features
        assert not any(str(path.absolute()) in Path("/proc/self/maps").read_text() for path in chunks_in("."))


def test_an_image_that_could_not_be_read_is_reported_from_the_cache_too(extract, decoded, capsys):
    Path("green/train_1.png").write_bytes(b"no image")
    for times in (6, 0):
        decoded.clear()
        features, unread = extract(tolerated=1)
        assert unread == {3: "not an image"} and not features.take(torch.tensor([3]), 0).any()
        assert sum(decoded.values()) == times
        assert capsys.readouterr().err == "warning: train.txt:4: green/train_1.png: not an image; skipped\n"


def test_a_full_disk_leaves_no_part_of_a_chunk(extract, monkeypatch):
    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(train.UserError, match=r"\.pt: disk full; what was saved before is intact"):
        extract()
    assert not [name for name in os.listdir() if name.endswith((".pt", ".tmp"))]


def test_features_of_many_chunks_are_taken_as_from_one():
    features = torch.randn(10, 2, 512)
    many, one = train.Features(features.split(4), 4), train.Features([features], 10)
    rows = torch.tensor([9, 0, 4, 3, 3, 8, 7])
    for view in (0, 1):
        assert torch.equal(many.take(rows, view), features[rows, view])
        assert torch.equal(one.take(rows, view), features[rows, view])
    assert many.digests(10) == one.digests(10) and len(set(one.digests(10))) == 10
    assert many.digests(7) == one.digests(10)[:7]


def test_a_killed_pass_goes_on_from_its_whole_chunks_to_the_same_weights(colours, full_size, decoded, monkeypatch):
    go("--epochs", 2, "--views", 2)
    expected = weights_of()
    os.unlink("best.pth")
    # The pass takes images 8 at a time: red and green are two whole chunks when it hangs in the third.
    code = """
import time, train
read, train.CHUNK_ROWS = train.read_photo, 4
train.read_photo = lambda path: time.sleep(600) if b"blue" in path else read(path)
train.main("--weights none --workers 0 --epochs 2 --views 2 --cache kept".split())
"""
    with subprocess.Popen([sys.executable, "-c", code], env=os.environ | {"PYTHONPATH": str(ROOT)}) as killed:
        wait_for(lambda: len(chunks_in("kept")) == 2, killed)
        os.kill(killed.pid, signal.SIGKILL)
    assert killed.returncode == -signal.SIGKILL and not Path("best.pth").exists()
    monkeypatch.setattr(train, "CHUNK_ROWS", 4)
    decoded.clear()
    go("--epochs", 2, "--views", 2, "--cache", "kept")
    blue_alone = {f"train_{number}.png": 1 for number in range(4)}
    assert {name: count for name, count in decoded.items() if "train" in name} == blue_alone
    assert same(expected, weights_of())


def wait_for(condition, process):
    """Until a process has brought something about; it must be running then, and has a minute."""
    for _ in range(6000):
        if condition():
            break
        time.sleep(0.01)
    assert condition() and process.poll() is None


# Several processes


@given(st.integers(0, 50), st.integers(1, 9))
def test_ranks_share_all_rows_in_order_in_equal_slices(count, world):
    def share(rank):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(train, "world_size", lambda: world)
            patch.setattr(train, "my_rank", lambda: rank)
            patch.setattr(train.dist, "is_initialized", lambda: True)
            return train.my_share(count)

    shares = [share(rank) for rank in range(world)]
    assert [row for each in shares for row in each] == list(range(count))
    assert all(len(each) <= -(-count // world) for each in shares)


def torchrun(script, *args, ranks=2, restarts=0):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", ranks]
    command = list(map(str, [*command, "--max-restarts", restarts, script, *args]))
    # As README says: without the last one a restarted rank may be told a dead one's address.
    environment = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    return subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, timeout=60)


def feature_rows(folder):
    chunks = [torch.load(path, weights_only=True)["features"] for path in chunks_in(folder)]
    return sorted(row.numpy().tobytes() for chunk in chunks for row in chunk)


# Chunks of 2 images. At its third, in the second chunk, rank 1 dies, but not when it is started again.
DIE = """
import os, sys, train
read, decoded = train.read_photo, []
train.CHUNK_ROWS, train.PASS_BATCH["cpu"] = 2, 4
first, rank = os.environ["TORCHELASTIC_RESTART_COUNT"] == "0", os.environ["RANK"]
def read_photo(path):
    decoded.append(os.fsdecode(path))
    if first and rank == "1" and len(decoded) == 3:
        os._exit(1)
    return read(path)
train.read_photo = read_photo
train.main(sys.argv[1:])
open(f"decoded{rank}", "w").write("\\n".join(decoded))
"""


def test_two_ranks_one_of_which_dies_once_give_the_features_and_the_head_of_one_byte_for_byte(colours, full_size):
    lines = Path("train.txt").read_text().splitlines()
    Path("train.txt").write_text("\n".join(lines[:-1]))  # 11 images, of which 3 are for the validation
    Path("die.py").write_text(DIE)
    options = ("--epochs", 3, "--views", 2, "--batch-size", 4, "--val-split", 0.25)
    out = go(*options, "--cache", "one")
    expected, rows = weights_of(), rows_of()
    os.unlink("best.pth")
    done = torchrun("die.py", "--weights", "none", "--workers", 0, *options, "--cache", "two", restarts=1)
    assert done.returncode == 0, done.stderr
    assert same(expected, weights_of()) and rows == rows_of() and feature_rows("one") == feature_rows("two")
    assert len(chunks_in("two")) == 2 * 2 + (1 + 1) + 2 * 3  # of both ranks: 8 training, 3 validation, 12 test images
    # Rank 1 had kept 2 of its 4 training images; of the others each rank has its slice.
    decoded = Path("decoded1").read_text().splitlines()
    assert ["train" in path for path in decoded] == [True] * 3 + [False] * 6
    # Rank 0 alone prints: the same lines, each once, after those of the first attempt.
    timeless = lambda text: re.sub(r"in [\d.]+ s$", "", text, flags=re.MULTILINE)  # noqa: E731
    assert timeless(done.stdout).endswith(timeless(out)) and done.stdout.count("saved  ") == 1
    assert "Traceback" not in done.stderr and "warning: " not in done.stderr


# Fine-tuning with scripted accuracies; a rank notes its weights of each step, and after the fifth rank 1 dies.
TUNE = """
import os, sys, train
step, rank, steps, judged = train.torch.optim.Adam.step, int(os.environ["RANK"]), [], []
scripted = iter([0.25, 0.5, 0.75, 0.875])
def spy(self, *args, **kwargs):
    step(self, *args, **kwargs)
    if len(self.param_groups) == 2:
        steps.append([parameter.detach().clone() for group in self.param_groups for parameter in group["params"]])
        if len(steps) == 5 and rank == 1:
            os._exit(1)
def evaluate(model, batches):
    judged.append(sum(len(labels) for _, labels in batches))
    train.torch.save({"steps": steps, "judged": judged}, f"rank{rank}.pt")
    return 1.0, next(scripted)
train.torch.optim.Adam.step, train.evaluate = spy, evaluate
train.main(sys.argv[1:])
"""


def test_two_ranks_fine_tune_one_model_and_the_death_of_one_ends_the_run_with_best_pth_whole(few):
    Path("tune.py").write_text(TUNE)
    options = "--weights none --workers 0 --epochs 1 --views 1 --batch-size 4 --finetune-epochs 3".split()
    began = time.monotonic()
    done = torchrun("tune.py", *options)
    assert done.returncode == 1 and time.monotonic() - began < 60
    assert re.search(r"^error: another rank died|^stopped by SIGTERM", done.stderr, re.MULTILINE), done.stderr
    assert "[rank0]: Traceback" not in done.stderr
    # Of 6 images each rank trains on 3 an epoch, in batches of 2 and 1, and judges 3; rank 0 alone judged the head.
    rank0, rank1 = (weights_of(f"rank{rank}.pt") for rank in (0, 1))
    assert rank0["judged"] == [6, 3, 3] and rank1["judged"] == [3, 3]
    for first, second in zip(rank0["steps"], rank1["steps"], strict=True):
        assert len(first) == 15 + 2 and all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    # The second epoch, the last whole one, took steps 3 and 4.
    model, about = train.load_checkpoint(Path("best.pth"))
    assert (about["epoch"], about["accuracy"]) == (3, 0.75)
    tail = [value for name, value in model.named_parameters() if name.startswith(("layer4.", "fc."))]
    assert all(torch.equal(a, b) for a, b in zip(tail, rank0["steps"][-1], strict=True))
    epochs = [line.split()[0] for line in done.stdout.splitlines() if line[:5].strip().isdigit()]
    assert epochs == ["1", "2", "3"] == [row["epoch"] for row in rows_of()]
    assert not list(Path().glob(".*.tmp"))
