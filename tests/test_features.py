"""Features of whole lists: what could not be read, overlap, passes that go on."""

import os
import signal
import time
import tracemalloc
from pathlib import Path

import pytest
import torch
from conftest import BUNDLED, add_line, chunks_in, go, put, run_main, same, weights_of
from PIL import Image
from processes import fork_script

import train
from transfer.features import Features


def test_one_unusable_test_image_ends_the_run(trained):
    before = Path("best.pth").read_bytes()
    Path("photo.jpg").write_bytes(b"text")
    add_line("test.txt", "photo.jpg 1\n")
    status, _, err = trained()
    assert status == 1
    assert err.splitlines() == [
        "error: test.txt:13: photo.jpg: not an image",
        "error: test.txt: 1 of 13 images can't be read; fix or remove these lines",
    ]
    assert Path("best.pth").read_bytes() == before


def test_up_to_one_percent_of_the_training_images_may_be_unusable(trained):
    before = Path("best.pth").read_bytes()
    put("good.png", Image.new("RGB", (1, 1)))
    Path("photo.jpg").write_bytes(b"text")
    for name, count in (("good.png", 300), ("photo.jpg", 4)):
        for number in range(count):
            os.link(name, f"{number}-{name}")
    good = [f"{n}-good.png {n % 3}\n" for n in range(300)]
    Path("train.txt").write_text("".join([*good[:297], *(f"{n}-photo.jpg 0\n" for n in range(4))]))
    status, _, err = trained()
    assert status == 1 and Path("best.pth").read_bytes() == before
    total = "4 of 301 images can't be read (at most 3 may be skipped)"
    assert err.splitlines()[-1] == f"error: train.txt: {total}; fix or remove these lines"
    Path("train.txt").write_text("".join([*good[:297], *(f"{n}-photo.jpg 0\n" for n in range(3))]))
    status, _, err = trained()
    assert status == 0
    assert [line for line in err.splitlines() if "skipped" in line] == [
        f"warning: train.txt:{298 + n}: {n}-photo.jpg: not an image; skipped" for n in range(3)
    ]


@pytest.mark.parametrize("way", ["by path", "by content"])
def test_images_in_both_lists_get_a_warning_with_a_count_and_the_first_three(colours, way):
    names = [f"{colour}/train_{n}.png" for colour in ("red", "blue") for n in (0, 1)]
    for number, name in enumerate(names):
        listed = name
        if way == "by content":
            put(listed := f"{number}.bmp", Image.open(name))
        add_line("test.txt", f"{listed} {0 if 'red' in name else 2}\n")
        names[number] = listed
    # The whole network, and batches that differ between the lists: equal pixels must give equal bits.
    status, _, err = run_main(train.main, "--weights", BUNDLED, "--workers", 0, "--epochs", 1, "--views", 2)
    first = ", ".join(f"test.txt:{13 + n}: {names[n]}" for n in range(3))
    assert (status, err) == (
        0,
        "warning: 4 of 16 test images are in train.txt too, so the test accuracy is not to be believed: "
        f"{first} and 1 more\n",
    )


@pytest.mark.usefixtures("tiny")
def test_an_image_that_could_not_be_read_is_reported_from_the_cache_too(extract, decoded, capsys):
    Path("green/train_1.png").write_bytes(b"no image")
    for times in (6, 0):
        decoded.clear()
        features = extract(max_unreadable=1)
        assert features.unreadable == {3: "not an image"} and features.rows.tolist() == [0, 1, 2, 4, 5]
        assert not features.gather(torch.tensor([3]), 0).any()
        assert sum(decoded.values()) == times
        assert capsys.readouterr().err == "warning: train.txt:4: green/train_1.png: not an image; skipped\n"


@pytest.mark.usefixtures("tiny")
def test_features_of_many_chunks_are_taken_as_from_one():
    features = torch.randn(10, 2, 512)
    labels = torch.zeros(10, dtype=torch.int64)
    many, one = Features(features.split(4), 4, labels), Features([features], 10, labels)
    rows = torch.tensor([9, 0, 4, 3, 3, 8, 7])
    for view in (0, 1):
        assert torch.equal(many.gather(rows, view), features[rows, view])
        assert torch.equal(one.gather(rows, view), features[rows, view])
    assert torch.equal(many.content_hashes(), one.content_hashes()) and len(one.content_hashes().unique()) == 10


@pytest.mark.usefixtures("tiny")
def test_a_killed_pass_goes_on_from_its_whole_chunks_to_the_same_weights(colours, full_size, decoded, monkeypatch):
    go("--epochs", 2, "--views", 2)
    expected = weights_of()
    os.unlink("best.pth")
    # The pass takes images 8 at a time: red and green are two whole chunks when it hangs in the third.
    code = """
import time, train, transfer.extraction
read, transfer.extraction.CHUNK_ROWS = train.read_image, 4
train.read_image = lambda path, *rest: time.sleep(600) if b"blue/train" in path else read(path, *rest)
train.main("--weights none --workers 0 --epochs 2 --views 2 --cache kept".split())
"""
    killed = fork_script(code, cwd=colours)
    wait_for(lambda: len(chunks_in("kept")) == 3 + 2, killed)  # all of the test list, and two
    os.kill(killed.pid, signal.SIGKILL)
    assert killed.wait() == -signal.SIGKILL and not Path("best.pth").exists()
    monkeypatch.setattr("transfer.extraction.CHUNK_ROWS", 4)
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


def test_test_images_are_read_first_and_the_training_pass_ends_once_more_are_unreadable_than_are_shown(
    job, monkeypatch
):
    seen, original = [], train.read_image

    def spy(path, *rest):
        seen.append(os.fsdecode(path))
        return original(path, *rest)

    monkeypatch.setattr(train, "read_image", spy)
    for name in ("red/train_1.png", "red/train_2.png", "blue/train_3.png"):
        Path(name).write_bytes(b"text")
    total = "3 of 12 images can't be read (at most 1 may be skipped)"
    assert job()[2].splitlines()[-1] == f"error: train.txt: {total}; fix or remove these lines"
    seen.clear()
    monkeypatch.setattr("transfer.extraction.SHOWN_PROBLEMS", 1)
    status, _, err = job()
    assert status == 1 and err.splitlines() == [
        "error: train.txt:2: red/train_1.png: not an image",
        "error: train.txt:3: red/train_2.png: not an image",
        "error: train.txt: 2 images can't be read, more than 1% of the list: stopped there; fix or remove these lines",
    ]
    assert ["test" in path for path in seen] == [True] * 12 + [False] * (len(seen) - 12)
    assert len(seen) < 24  # of a batch of 8 images some may have been read ahead
    Path("blue/test_3.png").write_bytes(b"text")
    seen.clear()
    assert "test.txt: 1 of 12 images can't be read" in job()[2] and not any("train" in path for path in seen)


def test_an_image_in_both_lists_is_found_by_its_path_where_the_bits_differ(job, monkeypatch):
    noise = torch.Generator().manual_seed(0)
    embed = lambda module, views, compute: torch.randn(len(views), 512, generator=noise)  # noqa: E731
    monkeypatch.setattr("transfer.backbone.embed", embed)
    add_line("test.txt", "red/train_1.png 0\n")
    status, _, err = job()
    assert status == 0
    warning = "1 of 13 test images are in train.txt too, so the test accuracy is not to be believed: "
    assert err == f"warning: {warning}test.txt:13: red/train_1.png\n"


def test_content_hashes_make_no_object_an_image():
    rows = torch.randn(20_000, 1, 512)
    features = Features(rows.split(1024), 1024, torch.zeros(20_000, dtype=torch.int64))
    tracemalloc.start()
    content_hashes = features.content_hashes()
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(content_hashes.unique()) == 20_000 and most < 20_000 * 10


def test_a_subset_is_its_images_alone_numbered_anew():
    table, labels = torch.randn(7, 2, 16, generator=torch.Generator().manual_seed(0)), torch.arange(7)
    whole = Features([table[:4], table[4:]], 4, labels, {2: "damaged"})
    part = whole.subset(torch.tensor([6, 1, 4])).subset(torch.tensor([2, 0]))
    assert part.labels.tolist() == [4, 6] and part.rows.tolist() == [0, 1] and not part.unreadable
    assert torch.equal(part.gather(part.rows, slice(None)), table[[4, 6]])
    assert torch.equal(part.content_hashes(), whole.content_hashes()[[4, 6]])
    ((inputs, known),) = part.batches(torch.tensor([1, 0]), torch.tensor([0, 1]), 8)
    assert torch.equal(inputs, torch.stack([table[6, 0], table[4, 1]])) and known.tolist() == [6, 4]
