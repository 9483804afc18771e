"""The cache: what an image's key covers, what is found again and what is not, damage, killed passes."""

import errno
import os
import shutil
import tempfile
from pathlib import Path

import pytest
import torch
from conftest import chunks_in, go, plain_backbone, rows_of, run_main, same, weights_of
from PIL import Image
from torch import nn
from torchvision import transforms as T

import train
from transfer import cache, extraction
from transfer.architectures import NORMALIZE
from transfer.backbone import READING_VERSION
from transfer.cache import find_rows, image_keys, recipe_digest
from transfer.device import Compute
from transfer.inputs.lists import read_list
from transfer.system.console import UserError

pytestmark = pytest.mark.usefixtures("tiny")


def test_a_second_run_with_another_recipe_for_the_head_makes_no_pass(few, quick, decoded):
    go("--epochs", 1)
    os.rename("best.pth", "weights.pth")
    decoded.clear()
    go("--epochs", 1, "--cache", "kept", weights="weights.pth")
    assert sum(decoded.values()) == 12
    other = ("--lr", 0.01, "--batch-size", 4, "--epochs", 6, "--seed", 9, "--view-seed", 0)
    decoded.clear()
    go(*other, "--cache", "kept", weights="weights.pth")
    assert not decoded
    kept, rows = weights_of(), rows_of()
    go(*other, weights="weights.pth")
    assert sum(decoded.values()) == 12
    assert same(kept, weights_of()) and rows == rows_of()


def test_a_cache_gives_the_networks_own_features(few, small):
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


def recipe_of(backbone=None, views=range(2), seed=0, device="cpu", dtype=torch.float32, normalize=NORMALIZE):
    """The recipe's part of what features are kept under, for what a test changes."""
    photos, _ = read_list(Path("train.txt"), Path())
    backbone = backbone or plain_backbone()
    compute = Compute(torch.device(device), dtype, normalize=normalize)
    return recipe_digest(backbone, train.ImageDataset(photos, views, seed), compute)


def first_keys():
    """The keys of the first two training images."""
    return image_keys(read_list(Path("train.txt"), Path())[0], range(2)).tolist()


@pytest.mark.parametrize(
    "change",
    [{"seed": 1}, {"views": range(3)}, {"views": [0, 2]}, {"dtype": torch.bfloat16}, {"device": "cuda"}],
    ids=str,
)
def test_what_a_run_asks_for_is_part_of_the_recipe(few, change):
    assert recipe_of(**change) != recipe_of() == recipe_of()


@pytest.mark.parametrize("entry", ["0.weight", "0.bias", "1.running_var"])
def test_every_byte_of_the_backbone_is_part_of_the_recipe(few, entry):
    backbone = plain_backbone()
    flat = backbone.state_dict()[entry].view(-1)
    flat[-1] = torch.nextafter(flat[-1], torch.tensor(9.0))
    assert recipe_of(backbone) != recipe_of()


def test_the_normalisation_is_part_of_the_recipe(few):
    assert recipe_of(normalize=T.Normalize(mean=[0.5] * 3, std=[0.5] * 3)) != recipe_of()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("READING_VERSION", READING_VERSION + 1),
        ("eval", T.Resize((225, 225))),
        ("train_resize", T.Resize((301, 301))),
        ("train", T.Compose(train.make_transforms(224).train.transforms[:-1])),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_the_view_recipe_and_its_version_are_part_of_the_recipe(few, monkeypatch, name, value):
    before = recipe_of()
    if name in train.Transforms._fields:
        changed = train.make_transforms(224)._replace(**{name: value})
        monkeypatch.setattr(train, "make_transforms", lambda size: changed)
    else:
        monkeypatch.setattr(cache, name, value)
    assert recipe_of() != before


def test_each_images_path_inode_size_and_times_are_its_key(few):
    image, lines = Path("red/train_1.png"), Path("train.txt").read_text()
    info = image.stat()
    (same, first), seen = first_keys(), set()
    assert [same, first] == first_keys()

    def is_new():
        unchanged, key = first_keys()
        seen.add(tuple(key))
        return unchanged == same and key != first

    os.utime(image, ns=(info.st_atime_ns, info.st_mtime_ns + 1))
    assert is_new()
    with open(image, "ab") as file:
        file.write(b"\0")
    os.utime(image, ns=(info.st_atime_ns, info.st_mtime_ns))
    assert image.stat().st_mtime_ns == info.st_mtime_ns and is_new()
    image.write_bytes(image.read_bytes()[:-1])  # as it was, but for the change time
    os.utime(image, ns=(info.st_atime_ns, info.st_mtime_ns))
    assert is_new()
    shutil.copy2(image, "red/other.png")
    Path("train.txt").write_text(lines.replace("red/train_1.png", "red/other.png"))
    assert is_new()
    os.unlink("red/other.png")
    assert first_keys()[1] == [0, 0]
    assert len(seen) == 4


def test_neither_an_images_label_nor_its_place_nor_how_its_path_is_written_is_part_of_its_key(few):
    first, second = first_keys()
    Path("train.txt").write_text(f"{Path('red/train_1.png').absolute()} 2\nred/../red/train_0.png 1\n")
    assert first_keys() == [second, first]


def test_files_of_one_size_and_time_that_change_places_are_computed_again(few, quick, decoded):
    for name, rgb in (("a", (200, 0, 0)), ("b", (0, 0, 200))):
        Image.new("RGB", (64, 64), rgb).save(f"{name}.bmp")
        os.utime(f"{name}.bmp", (10**9, 10**9))
    for name in ("train.txt", "test.txt"):
        Path(name).write_text("a.bmp 0\nb.bmp 1\n")
    go("--epochs", 1, "--cache", "kept")
    os.rename("a.bmp", "c.bmp")
    os.rename("b.bmp", "a.bmp")
    os.rename("c.bmp", "b.bmp")
    decoded.clear()
    go("--epochs", 1, "--cache", "kept")
    assert decoded == {"a.bmp": 2, "b.bmp": 3}  # in both lists, and one to see whether it is one flat colour
    changed = weights_of()
    go("--epochs", 1)
    assert same(changed, weights_of())


def test_only_a_changed_image_is_computed_again(colours, quick, decoded, monkeypatch):
    monkeypatch.setattr("transfer.extraction.CHUNK_ROWS", 4)
    go("--epochs", 1, "--cache", "kept")
    assert len(chunks_in("kept")) == 6
    decoded.clear()
    Image.new("RGB", (64, 64), (0, 255, 255)).save("green/train_2.png")
    go("--epochs", 1, "--cache", "kept")
    assert decoded == {"train_2.png": 1}
    changed = weights_of()
    go("--epochs", 1)
    assert same(changed, weights_of())


def test_after_corrections_only_added_images_are_computed(colours, quick, decoded, monkeypatch):
    monkeypatch.setattr("transfer.extraction.CHUNK_ROWS", 4)
    go("--epochs", 1, "--cache", "kept")
    decoded.clear()
    first, second, *lines = Path("train.txt").read_text().splitlines()
    Image.new("RGB", (64, 64), (250, 30, 30)).save("red/added.png")
    # One photo is left out, one has another label, one is added, and all stand elsewhere.
    Path("train.txt").write_text("\n".join(["red/added.png 0", *reversed(lines), f"{second[:-1]}1"]))
    go("--epochs", 1, "--cache", "kept")
    assert decoded == {"added.png": 1}
    corrected = weights_of()
    decoded.clear()
    go("--epochs", 1, "--cache", "kept")
    assert not decoded and same(corrected, weights_of())
    go("--epochs", 1)
    assert same(corrected, weights_of())


@pytest.mark.parametrize(
    ("call", "failure"),
    [
        ("transfer.inputs.images.open_regular", OSError(errno.EMFILE, "too many open files")),
        ("PIL.Image.open", OSError(errno.EIO, "input/output error")),  # in the middle of the file
        ("PIL.Image.open", MemoryError()),
    ],
    ids=repr,
)
def test_what_could_not_be_read_for_a_reason_that_may_pass_is_tried_again(extract, monkeypatch, capsys, call, failure):
    expected, read = extract(), train.read_image
    for path in chunks_in("."):
        path.unlink()

    def fail(*_, **__):
        raise failure

    def read_photo(path, *options):
        with pytest.MonkeyPatch.context() as patch:
            if path == b"green/train_1.png":
                patch.setattr(call, fail)
            return read(path, *options)

    with monkeypatch.context() as patch:
        patch.setattr(train, "read_image", read_photo)
        failed = extract(max_unreadable=1)
    assert list(failed.unreadable) == [3] and "damaged" not in capsys.readouterr().err
    again = extract()
    assert not again.unreadable and torch.equal(whole(again), whole(expected))


def test_keys_are_found_in_whichever_table_holds_them():
    keys = torch.tensor([[5, 1], [3, 2], [9, 9], [5, 2], [0, 0], [-7, 4]])
    tables = [
        torch.tensor([[3, 2], [0, 0]]),
        torch.empty(0, 2, dtype=torch.int64),
        torch.tensor([[-7, 4], [1, 1], [5, 1]]),
    ]
    assert find_rows(keys, tables).tolist() == [[2, 2], [0, 0], [-1, -1], [-1, -1], [-1, -1], [2, 0]]
    assert find_rows(keys, []).tolist() == [[-1, -1]] * 6 and find_rows(keys[:0], tables).shape == (0, 2)


def test_a_list_of_any_length_takes_fewer_files_than_can_be_mapped():
    assert [extraction.chunk_rows(count) for count in (1, 1024 * 16_384)] == [1024, 1024]
    for count in (67 * 10**6, 10**9):
        assert count / extraction.chunk_rows(count) <= 16_384


def test_too_many_mapped_files_are_not_called_damaged(extract, monkeypatch, capsys):
    extract()
    before = {path: path.read_bytes() for path in chunks_in(".")}

    def full(*_, **__):
        raise RuntimeError(f"unable to mmap 12 bytes from file <x>: {os.strerror(errno.ENOMEM)} ({errno.ENOMEM})")

    monkeypatch.setattr(torch, "load", full)
    with pytest.raises(UserError, match=r"\.pt: no memory left, or more files mapped than vm\.max_map_count allows; "):
        extract()
    assert {path: path.read_bytes() for path in chunks_in(".")} == before and not capsys.readouterr().err


def whole(features):
    """All features in the list's order."""
    return features.gather(torch.arange(len(features.labels)), slice(None))


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
    chunk = torch.load(path, weights_only=True)
    torch.save(chunk | {"features": torch.zeros(4, 1, 512)}, path)


def wrong_type(path, _):
    chunk = torch.load(path, weights_only=True)
    torch.save(chunk | {"features": chunk["features"].double()}, path)


def another_chunk(path, other):
    shutil.copy(other, path)


@pytest.mark.parametrize(
    "damage",
    [truncated, one_bit_flipped, empty, text, a_state_dict, a_list, wrong_shape, wrong_type, another_chunk],
    ids=lambda damage: damage.__name__,
)
def test_a_damaged_or_foreign_chunk_is_computed_again_with_a_warning(extract, capsys, damage):
    expected = whole(extract())
    first, second = chunks_in(".")
    content = first.read_bytes()
    damage(first, second)
    assert first.read_bytes() != content
    assert torch.equal(whole(extract()), expected)
    assert capsys.readouterr().err == f"warning: {first.name}: damaged or foreign; computed again\n"
    assert torch.equal(whole(extract()), expected)
    assert capsys.readouterr().err == ""


def test_chunks_are_mapped_into_memory_not_read(extract):
    for _ in range(2):  # as computed and as found
        features = extract()
        maps = Path("/proc/self/maps").read_text()
        assert len(features.chunks) == 2 and all(str(path.absolute()) in maps for path in chunks_in("."))
        del features
        assert not any(str(path.absolute()) in Path("/proc/self/maps").read_text() for path in chunks_in("."))


def test_a_cache_that_cannot_be_written_is_named_before_the_pass_unless_it_is_complete(
    few, quick, decoded, monkeypatch
):
    go("--epochs", 1, "--cache", "kept")
    decoded.clear()
    make = tempfile.TemporaryFile

    def denied(*args, dir=None, **options):
        if dir == Path("kept"):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        return make(*args, dir=dir, **options)

    monkeypatch.setattr(tempfile, "TemporaryFile", denied)
    go("--epochs", 2, "--cache", "kept")
    status, _, err = run_main(train.main, "--weights", "none", "--workers", 0, "--seed", 1, "--cache", "kept")
    reason = os.strerror(errno.EACCES).lower()
    assert (status, decoded) == (2, {}) and f"error: --cache kept: can't write in it ({reason}); name another" in err


def test_a_full_disk_leaves_no_part_of_a_chunk(extract, monkeypatch):
    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match=r"\.pt: disk full; what was saved before is intact"):
        extract()
    assert not [name for name in os.listdir() if name.endswith((".pt", ".tmp"))]
