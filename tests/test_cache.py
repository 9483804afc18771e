"""The cache: what is in a chunk's name, damage, killed passes."""

import os
import shutil
from pathlib import Path

import pytest
import torch
from conftest import BUNDLED, chunks_in, go, plain_backbone, rows_of, same, weights_of
from PIL import Image
from torch import nn
from torchvision import transforms as T

import train
from transfer import cache
from transfer.backbone import READING_VERSION
from transfer.cache import chunk_path, recipe_digest
from transfer.console import UserError
from transfer.device import Compute
from transfer.lists import read_list

pytestmark = pytest.mark.usefixtures("tiny")


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
    photos, _ = read_list(Path("train.txt"), Path())
    backbone = backbone or plain_backbone()
    recipe = recipe_digest(backbone, train.ImageDataset(photos, views, seed), Compute(torch.device(device), dtype))
    return chunk_path(Path("kept"), recipe, photos, rows).name


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
        ("READING_VERSION", READING_VERSION + 1),
        ("eval", T.Resize((225, 225))),
        ("train_resize", T.Resize((301, 301))),
        ("train", T.Compose(train.make_transforms(224).train.transforms[:-1])),
        ("NORMALIZE", T.Normalize(mean=[0.5] * 3, std=[0.5] * 3)),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_the_view_recipe_and_its_version_are_part_of_a_chunks_key(few, monkeypatch, name, value):
    before = key_of()
    if name in train.Transforms._fields:
        changed = train.make_transforms(224)._replace(**{name: value})
        monkeypatch.setattr(train, "make_transforms", lambda size: changed)
    else:
        monkeypatch.setattr(cache, name, value)
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
    monkeypatch.setattr("transfer.features.CHUNK_ROWS", 4)
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


@pytest.mark.parametrize(
    "damage",
    [truncated, one_bit_flipped, empty, text, a_state_dict, a_list, wrong_shape, wrong_type, another_chunk],
    ids=lambda damage: damage.__name__,
)
def test_a_damaged_or_foreign_chunk_is_computed_again_with_a_warning(extract, capsys, damage):
    expected = torch.cat(extract().chunks).clone()
    first, second = chunks_in(".")
    content = first.read_bytes()
    damage(first, second)
    assert first.read_bytes() != content
    assert torch.equal(torch.cat(extract().chunks), expected)
    assert capsys.readouterr().err == f"warning: {first.name}: damaged or foreign; computed again\n"
    assert torch.equal(torch.cat(extract().chunks), expected)
    assert capsys.readouterr().err == ""


def test_chunks_are_mapped_into_memory_not_read(extract):
    for _ in range(2):  # as computed and as found
        features = extract()
        maps = Path("/proc/self/maps").read_text()
        assert len(features.chunks) == 2 and all(str(path.absolute()) in maps for path in chunks_in("."))
        del features
        assert not any(str(path.absolute()) in Path("/proc/self/maps").read_text() for path in chunks_in("."))


def test_a_full_disk_leaves_no_part_of_a_chunk(extract, monkeypatch):
    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match=r"\.pt: disk full; what was saved before is intact"):
        extract()
    assert not [name for name in os.listdir() if name.endswith((".pt", ".tmp"))]
