"""Depth: 16-bit greyscale that uses fewer bits is as bright as it was meant, in training and in prediction."""

import base64
import io
import re
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import COLOURS, go, run_main
from PIL import Image

import predict
import train
from transfer.checkpoint import load_checkpoint
from transfer.inputs.depth import grey_bits_of
from transfer.inputs.images import ImageError, decode_image, from_pil, used_bits
from transfer.inputs.lists import read_list
from transfer.pages.html import thumbnail


def save_grey(path, top, format="PNG"):
    """16-bit greyscale from 0 to some value, rising to the right."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.linspace(0, top, 64).astype(np.uint16)[None].repeat(64, 0)).save(path, format)


@pytest.fixture
def scans(tmp_path, monkeypatch):
    """A working directory with photos of 12 bits, one class brighter than the other."""
    monkeypatch.chdir(tmp_path)
    for number in range(5):
        save_grey(f"scans/bright/{number}.png", 4000 + number)
        save_grey(f"scans/dark/{number}.tif", 600 + number, "TIFF")
    Path("list.txt").write_text("".join(f"scans/bright/{n}.png 0\nscans/dark/{n}.tif 1\n" for n in range(5)))
    return tmp_path


def test_the_bits_of_a_list_are_those_of_its_brightest_image(scans):
    assert [used_bits("scans/bright/0.png"), used_bits("scans/dark/0.tif")] == [12, 10]
    bits, notes = grey_bits_of(read_list(Path("list.txt"), Path())[0])
    assert bits == 12 and notes == ["          16-bit greyscale uses 12 bits (all 10): made 16 times as bright"]
    Image.new("RGB", (9, 9)).save("rgb.png")
    Path("broken.png").write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(8) + bytes(8) + b"\x10\0")
    assert [used_bits(name) for name in ("rgb.png", "broken.png", "none.png")] == [0, 0, 0]


def test_training_and_prediction_see_such_images_alike_and_the_header_says_so(scans, small, tiny, monkeypatch):
    seen, embed = [], train.draw_views

    def spy(image, views, *rest, **options):
        seen.append(np.asarray(image).max())
        return embed(image, views, *rest, **options)

    monkeypatch.setattr(train, "draw_views", spy)
    monkeypatch.setattr(predict, "draw_views", spy)
    out = go("--train", "list.txt", "--test", "list.txt", "--epochs", 1)
    assert "\n          16-bit greyscale uses 12 bits (all 10): made 16 times as bright\n" in out
    assert sorted(set(seen)) == [37, 250] and load_checkpoint(Path("best.pth"))[1]["grey_bits"] == 12
    seen.clear()
    assert run_main(predict.main, "scans/dark/0.tif", "scans/bright/0.png", "--workers", 0)[0] == 0
    predict.predict(predict.load("best.pth", "cpu"), ["scans/dark/0.tif", Image.open("scans/bright/0.png")])
    assert seen == [37, 250, 37, 250]


def test_pages_show_such_images_as_the_model_sees_them(scans):
    dark, right = (thumbnail(b"scans/bright/0.png", "", bits) for bits in (16, 12))

    def brightest(drawn):
        content = base64.b64decode(re.search(r"base64,([^\"]+)", drawn)[1])
        return np.asarray(Image.open(io.BytesIO(content))).max()

    assert brightest(dark) < 30 and brightest(right) > 220


def test_the_scale_is_part_of_what_kept_features_depend_on(scans, tiny):
    image_list = read_list(Path("list.txt"), Path())[0]
    recipes = [train.ImageDataset(image_list, [0], 0, grey_bits=bits).describe() for bits in (12, 16)]
    assert recipes[0] != recipes[1]


@pytest.mark.parametrize("bits", [0, 17, -(10**9), "12", True])
def test_a_checkpoint_with_another_depth_is_malformed(scans, small, tiny, bits):
    go("--train", "list.txt", "--test", "list.txt", "--epochs", 1)
    state = torch.load("best.pth", weights_only=True)
    state._metadata["train.py"]["grey_bits"] = bits
    torch.save(state, "odd.pth")
    assert load_checkpoint(Path("odd.pth"))[1].keys() == {"classes", "arch"}


def tiff_of(content, width, bits, sample_format=1):
    """A TIFF of one row of pixels, which lie in it as they are."""
    tags = {256: width, 257: 1, 258: bits, 259: 1, 262: 1, 273: 200, 277: 1, 278: 1, 279: len(content)}
    tags[339] = sample_format
    entries = b"".join(
        struct.pack("<HHII", tag, 4 if tag in (273, 279) else 3, 1, value) for tag, value in tags.items()
    )
    return (b"II*\0\x08\0\0\0" + struct.pack("<H", len(tags)) + entries).ljust(200, b"\0") + content


def test_a_tiffs_own_depth_counts():
    row = bytes.fromhex("000800fff010")  # twelve bits each
    found = np.asarray(decode_image(io.BytesIO(tiff_of(row, 4, 12)), 16))
    assert found[0, :, 0].tolist() == [0, 128, 255, 1]


def test_16_bits_with_a_sign_are_refused_for_what_they_are():
    file = io.BytesIO(tiff_of(bytes(8), 4, 16, sample_format=2))
    with pytest.raises(ImageError, match="^16-bit pixels with a sign; convert it to 8 or 16 bits without$"):
        decode_image(file)


def test_a_16_bit_pgm_is_read():
    content = b"P5 4 1 65535\n" + np.array([0, 256, 32768, 65535], ">u2").tobytes()
    assert np.asarray(decode_image(io.BytesIO(content)))[0, :, 0].tolist() == [0, 1, 128, 255]
    opened = Image.open(io.BytesIO(content))
    assert np.asarray(from_pil(opened))[0, :, 0].tolist() == [0, 1, 128, 255] and opened.mode != "RGB"


def test_a_pil_image_is_read_as_its_file_is_and_a_damaged_one_is_refused(scans):
    whole = Path("scans/dark/0.tif").read_bytes()
    for bits in (12, 16):
        as_file, as_image = decode_image(io.BytesIO(whole), bits), from_pil(Image.open(io.BytesIO(whole)), bits)
        assert np.array_equal(np.asarray(as_file), np.asarray(as_image))
    with pytest.raises(ImageError, match="damaged"):
        from_pil(Image.open(io.BytesIO(Path("scans/bright/0.png").read_bytes()[:-60])))


def test_where_images_are_one_flat_colour_a_warning_says_how_many(tmp_path, monkeypatch, small, tiny):
    monkeypatch.chdir(tmp_path)
    for colour in COLOURS:
        for number in range(3):
            Path(colour).mkdir(exist_ok=True)
            Image.new("RGB", (64, 64), (0, 0, number // 2)).save(f"{colour}/{number}.png")
    Path("list.txt").write_text("".join(f"{c}/{n}.png {i}\n" for i, c in enumerate(COLOURS) for n in range(3)))
    options = ("--train", "list.txt", "--test", "list.txt", "--epochs", 1, "--weights", "none", "--workers", 0)
    status, _, err = run_main(train.main, *options)
    assert status == 0
    assert "warning: list.txt: 6 of 9 images are one flat colour, such as red/0.png; look at some, and at how" in err
