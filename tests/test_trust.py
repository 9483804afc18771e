"""Trust: bad input gets a clear answer, faults lose nothing. By hand and for longer: `python tests/fuzz.py`."""

import errno
import hashlib
import http.server
import io
import itertools
import multiprocessing
import os
import pickle
import re
import signal
import socket
import stat
import struct
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
import zipfile
import zlib
from collections import OrderedDict
from pathlib import Path

import fuzz
import numpy as np
import pytest
import torch
from conftest import ROOT, make_photos, run_main, run_script
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image, ImageFile
from torch import nn
from torchvision.models import resnet18, resnet34

import predict
import train

BUNDLED = ROOT / "food" / "resnet18-grocery.pth"
PLAIN = ("--weights", "none", "--workers", 0, "--epochs", 1)
NOISE = np.random.default_rng(0).integers(0, 256, (12, 8, 3), dtype=np.uint8)


class SmallNetwork(nn.Module):
    """Stands in for ResNet-18 where the test is not about the network: 512 features and a head, in 0.1 MB."""

    def __init__(self, num_classes=1000):
        super().__init__()
        self.conv1, self.avgpool = nn.Conv2d(3, 512, 4, stride=32), nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(512, num_classes)


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def job(colours, monkeypatch):
    """In a folder with lists of solid colours: what train.py makes of more arguments, with a small network."""
    monkeypatch.setattr(train, "resnet18", SmallNetwork)
    return lambda *args: run_main(train.main, *PLAIN, *args)


@pytest.fixture
def trained(job):
    """The same after one run: best.pth is there."""
    assert job()[0] == 0
    return job


def put(name, image, **options):
    image.save(name, **options)
    return name


def encoded(image, format, **options):
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def add_line(name, line):
    with open(name, "ab") as file:
        file.write(line if isinstance(line, bytes) else line.encode())


def growth(work):
    """Bytes of memory that some work takes at its peak, in a process of its own; it must end well."""
    ours, theirs = os.pipe()

    def measure():
        before = fuzz.peak()
        work()
        os.write(theirs, b"%d" % (fuzz.peak() - before))

    pid = fuzz.forked(measure)
    os.close(theirs)
    with os.fdopen(ours, "rb") as pipe:
        said = pipe.read()
    os.waitpid(pid, 0)
    assert said, "the work failed"
    return int(said)


# Images that are used


def turned(pixels, orientation):
    """What EXIF 2.32 says of each orientation, in plain array terms."""
    return {
        1: pixels,
        2: pixels[:, ::-1],
        3: pixels[::-1, ::-1],
        4: pixels[::-1],
        5: pixels.transpose(1, 0, 2),
        6: np.rot90(pixels, -1),
        7: pixels[::-1, ::-1].transpose(1, 0, 2),
        8: np.rot90(pixels, 1),
    }[orientation]


def exif_of(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif.tobytes()


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP", "TIFF", "TIFF deflate"])
def test_exif_orientation_is_applied_once(tmp_path, format, orientation):
    kind, _, compression = format.partition(" ")
    options = {"WEBP": {"lossless": True}, "TIFF": {"compression": "tiff_deflate" if compression else None}}.get(
        kind, {}
    )
    image = Image.fromarray(NOISE)
    image.save(tmp_path / "turned", kind, exif=exif_of(orientation), **options)
    image.save(tmp_path / "plain", kind, **options)
    stored = np.asarray(Image.open(tmp_path / "plain"))
    assert np.array_equal(np.asarray(train.read_photo(tmp_path / "turned")), turned(stored, orientation))


def test_training_evaluation_and_prediction_all_see_the_upright_image(job, monkeypatch):
    seen = []
    original = train.embed

    def spy(module, views, *rest, **options):
        seen.append(views.clone())
        return original(module, views, *rest, **options)

    monkeypatch.setattr(train, "embed", spy)
    monkeypatch.setattr(predict, "embed", spy)
    for name, orientations in (("train.txt", (1, 2, 3, 4, 5, 6)), ("test.txt", (7, 8))):
        lines = [f"{name}{n}.png {n % 2}\n" for n in orientations]
        Path(name).write_text("".join(lines))
    found = {}
    for how in ("turned", "plain"):
        seen.clear()
        for number in range(1, 9):
            pixels = NOISE if how == "turned" else np.ascontiguousarray(turned(NOISE, number))
            name = f"{'train' if number < 7 else 'test'}.txt{number}.png"
            put(name, Image.fromarray(pixels), exif=exif_of(number if how == "turned" else 1))
        assert job("--epochs", 3, "--views", 3)[0] == 0
        assert run_main(predict.main, "test.txt7.png", "train.txt6.png", "--workers", 0)[0] == 0
        predict.predict(predict.load("best.pth", "cpu"), ["train.txt5.png", Image.open("test.txt8.png")])
        found[how] = torch.cat(seen)
    assert len(found["plain"]) == 6 * 3 + 2 + 2 + 2
    assert torch.equal(found["turned"], found["plain"])


def transparent(mode):
    """A file of one colour at half opacity in each mode that can say so, and that colour."""
    if mode == "LA":
        return encoded(Image.new("LA", (9, 9), (40, 128)), "PNG"), (40, 40, 40)
    if mode == "P, alpha of each colour":
        image = Image.new("P", (9, 9), 1)
        image.putpalette([0, 0, 0, 200, 100, 0])
        return encoded(image, "PNG", transparency=bytes([0, 128])), (200, 100, 0)
    return encoded(Image.new("RGBA", (9, 9), (200, 100, 0, 128)), mode, lossless=True), (200, 100, 0)


@pytest.mark.parametrize("mode", ["PNG", "WEBP", "TIFF", "LA", "P, alpha of each colour"])
def test_half_transparent_pixels_are_composited_on_white(tmp_path, mode):
    content, colour = transparent(mode)
    (tmp_path / "photo").write_bytes(content)
    expected = [round((value * 128 + 255 * 127) / 255) for value in colour]
    found = train.read_photo(tmp_path / "photo").getpixel((4, 4))
    assert all(abs(a - b) <= 1 for a, b in zip(found, expected, strict=True)), (found, expected)


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB"])
def test_a_transparent_colour_becomes_white(tmp_path, mode):
    image = Image.new("RGB", (8, 4), (40, 40, 40)).convert(mode)
    image.save(tmp_path / "photo.png", transparency=image.getpixel((0, 0)))
    assert train.read_photo(tmp_path / "photo.png").getpixel((0, 0)) == (255, 255, 255)


def test_transparency_gives_no_warning_in_either_script(trained):
    for number, mode in enumerate(["PNG", "WEBP", "LA", "P, alpha of each colour"]):
        Path(f"{number}.png").write_bytes(transparent(mode)[0])
        add_line("train.txt", f"{number}.png 0\n")
    status, _, err = trained()
    assert (status, err) == (0, "")
    status, out, err = run_main(predict.main, *(f"{n}.png" for n in range(4)), "--workers", 0)
    assert (status, len(out.splitlines()), err) == (0, 4, "")


FORMATS_OF = {"CMYK": ("JPEG", "TIFF"), "L": ("JPEG", "PNG", "TIFF", "GIF", "BMP")}
FORMATS_OF |= dict.fromkeys(("1", "P"), ("PNG", "TIFF", "GIF", "BMP"))


@pytest.mark.parametrize(("mode", "format"), [(mode, each) for mode, formats in FORMATS_OF.items() for each in formats])
def test_modes_are_converted_to_rgb(tmp_path, mode, format):
    image = Image.new("RGB", (16, 16), (255, 255, 255)).convert(mode)
    image.paste(Image.new("RGB", (16, 8), (0, 0, 0)).convert(mode), (0, 0))
    image.save(tmp_path / "photo", format)
    photo = train.read_photo(tmp_path / "photo")
    assert photo.mode == "RGB"
    assert max(photo.getpixel((8, 2))) <= 3 and min(photo.getpixel((8, 13))) >= 252


@pytest.mark.parametrize(("format", "order"), [("PNG", "<"), ("TIFF", "<"), ("TIFF", ">")])
def test_16_bit_grey_is_scaled_not_clipped(tmp_path, format, order):
    values = np.array([[0, 255, 256, 32768, 65535]], dtype=order + "u2")
    mode = "I;16B" if order == ">" else "I;16"
    Image.frombytes(mode, (5, 1), values.tobytes()).save(tmp_path / "photo", format)
    assert np.asarray(train.read_photo(tmp_path / "photo"))[0].tolist() == [[v] * 3 for v in (0, 0, 1, 128, 255)]


@pytest.mark.parametrize("format", ["GIF", "WEBP", "MPO", "PNG", "TIFF"])
def test_of_several_frames_the_first_is_used(tmp_path, format):
    first, *others = [Image.new("RGB", (16, 16), colour) for colour in ((250, 0, 0), (0, 250, 0), (0, 0, 250))]
    first.save(tmp_path / "photo", format, save_all=True, append_images=others)
    assert Image.open(tmp_path / "photo").n_frames == 3
    red, *rest = train.read_photo(tmp_path / "photo").getpixel((8, 8))
    assert red > 230 and max(rest) < 20


@pytest.mark.parametrize("size", [(1, 1), (1, 20000), (20000, 1)])
@pytest.mark.parametrize("format", ["PNG", "JPEG", "TIFF"])
def test_the_smallest_and_the_longest_images_are_used_at_once(tmp_path, size, format):
    Image.new("RGB", size, (9, 200, 9)).save(tmp_path / "photo", format)
    began = time.perf_counter()
    views = train.draw_views(train.read_photo(tmp_path / "photo"), range(3), 0, 0)
    assert time.perf_counter() - began < 1
    assert views.shape == (3, 224, 224, 3) and views[0, ..., 1].min() > 190
    assert growth(lambda: train.draw_views(train.read_photo(tmp_path / "photo"), range(3), 0, 0)) < 50 << 20


def jpeg_with(marker, content):
    sound = encoded(Image.fromarray(NOISE), "JPEG")
    return sound[:2] + bytes([0xFF, marker]) + (len(content) + 2).to_bytes(2, "big") + content + sound[2:]


def png_with(kind, content):
    sound = encoded(Image.fromarray(NOISE), "PNG")
    chunk = len(content).to_bytes(4, "big") + kind + content + zlib.crc32(kind + content).to_bytes(4, "big")
    return sound[:33] + chunk + sound[33:]


BAD_EXIF = [b"", b"II*", b"II*\0" + b"\xff" * 40, b"\xff" * 60, b"II*\0\x08\0\0\0\xff\xff" + b"\x12\x01" * 30]
BAD_EXIF += [struct.pack("<2sHIHHHII", b"II", 42, 8, 1, 0x0112, kind, 9, 0) for kind in (2, 5, 99)]
BAD_XMP = [
    b"<x:xmpmeta",
    b"\xff\xfe\0<",
    b'<a tiff:Orientation="x"/>',
    b'<a tiff:Orientation="99999999999999"/>',
    b"\0" * 50,
]


@pytest.mark.parametrize(
    "content",
    [jpeg_with(0xE1, b"Exif\0\0" + exif) for exif in BAD_EXIF]
    + [png_with(b"eXIf", exif) for exif in BAD_EXIF]
    + [encoded(Image.fromarray(NOISE), "WEBP", lossless=True, exif=b"Exif\0\0" + exif) for exif in BAD_EXIF if exif]
    + [jpeg_with(0xE1, b"http://ns.adobe.com/xap/1.0/\0" + xmp) for xmp in BAD_XMP]
    + [png_with(b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + xmp) for xmp in BAD_XMP]
    + [jpeg_with(0xE2, b"MPF\0" + exif) for exif in BAD_EXIF],
    ids=lambda content: f"{content[1:4]!r} of {len(content)} bytes",
)
def test_the_pixels_are_used_where_exif_or_xmp_is_corrupt(tmp_path, content):
    (tmp_path / "photo").write_bytes(content)
    sound = encoded(Image.fromarray(NOISE), "JPEG") if content.startswith(b"\xff\xd8") else None
    expected = np.asarray(Image.open(io.BytesIO(sound))) if sound else NOISE
    assert np.array_equal(np.asarray(train.read_photo(tmp_path / "photo")), expected)


# Images that are skipped


def patched(content, at, new):
    return content[:at] + new + content[at + len(new) :]


def png_of(width, height):
    content = encoded(Image.new("L", (8, 8)), "PNG")
    return fuzz.with_right_checksums(patched(content, 16, struct.pack(">II", width, height)))


def bombs(side):
    """Tiny files of each format that claim to be `side` pixels square."""
    grey, colour = Image.new("L", (8, 8)), Image.new("RGB", (8, 8))
    jpeg, gif, bmp, tiff, webp = (
        encoded(grey, "JPEG"),
        encoded(grey, "GIF"),
        *(encoded(colour, f) for f in ("BMP", "TIFF")),
        encoded(colour, "WEBP", lossless=True),
    )
    entries = {
        tag: tiff.index(struct.pack("<HH", tag, 4))
        if struct.pack("<HH", tag, 4) in tiff
        else tiff.index(struct.pack("<HH", tag, 3))
        for tag in (256, 257)
    }
    for at in entries.values():
        tiff = patched(tiff, at, tiff[at : at + 2] + struct.pack("<HII", 4, 1, side))
    webp_side = min(side, 16383) - 1
    return {
        "PNG": png_of(side, side),
        "JPEG": patched(jpeg, jpeg.index(b"\xff\xc0") + 5, struct.pack(">HH", side, side)),
        "GIF": patched(gif, 6, struct.pack("<HH", side, side)),
        "BMP": patched(bmp, 18, struct.pack("<ii", side, side)),
        "TIFF": tiff,
        "WEBP": patched(webp, 21, (webp_side | webp_side << 14).to_bytes(4, "little")),
    }


LIMIT = r"^(9460x9460 pixels, )?over the limit of (89,478,485|29,826,161 for WebP)( pixels)?$"


@pytest.mark.parametrize("side", [9460, 50000])
@pytest.mark.parametrize("format", train.IMAGE_FORMATS)
def test_a_bomb_is_refused_before_it_is_decoded_and_costs_no_memory(tmp_path, format, side):
    (tmp_path / "photo").write_bytes(bombs(side)[format])
    assert (tmp_path / "photo").stat().st_size < 2000
    with pytest.raises(train.PhotoError, match=LIMIT):
        train.read_photo(tmp_path / "photo")

    def read():
        with pytest.raises(train.PhotoError):
            train.read_photo(tmp_path / "photo")

    assert growth(read) < 30 << 20


def large_png(side, channels):
    """Transparent pixels, a row of zeros after another; of 3 channels a chunk says which colour is transparent."""
    packer = zlib.compressobj(1)
    rows = b"".join(packer.compress(bytes(1 + channels * side)) for _ in range(side)) + packer.flush()
    header = b"IHDR" + struct.pack(">IIBBBBB", side, side, 8, {3: 2, 4: 6}[channels], 0, 0, 0)
    chunks = [header, *[b"tRNS" + bytes(6)] * (channels == 3), b"IDAT" + rows, b"IEND"]
    parts = (len(chunk[4:]).to_bytes(4, "big") + chunk + zlib.crc32(chunk).to_bytes(4, "big") for chunk in chunks)
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


@pytest.mark.parametrize("format", ["PNG", "PNG with a transparent colour", "WEBP"])
def test_an_image_at_the_limit_takes_less_than_a_gigabyte(tmp_path, format):
    # As large as it may be, transparent, and still a small file: what costs its decoder most.
    large = bombs(9459)["WEBP"] if format == "WEBP" else large_png(9459, channels=4 if format == "PNG" else 3)
    (tmp_path / "photo").write_bytes(large)

    def read():
        try:
            photo = train.read_photo(tmp_path / "photo")
            assert photo.size == (9459, 9459) and photo.getpixel((0, 0)) == (255, 255, 255)
        except train.PhotoError as error:
            assert format == "WEBP" and "over the limit" in str(error)  # its decoder needs several times the pixels

    assert growth(read) < 1e9


def broken_zlib():
    data = zlib.compress(b"\0" + bytes(8))
    sound = encoded(Image.new("L", (8, 8)), "PNG")
    at = sound.index(b"IDAT")
    return fuzz.with_right_checksums(patched(sound, at + 6, bytes([sound[at + 6] ^ 0xFF]) + data[1:3]))


SHOT = Image.effect_noise((64, 64), 60)
# A JPEG has no checksum, and its decoder goes on after damaged picture data as in every tool: what can be found is
# a file that ends too early, or whose headers are broken.
UNUSABLE = {
    "empty": (b"", "not an image"),
    "text": (b"a cat, asleep\n", "not an image"),
    "HTML": (b"<!doctype html><title>404</title>", "not an image"),
    "EPS": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\n", "not an image"),
    "PDF": (b"%PDF-1.7\n1 0 obj <</Type /Catalog>> endobj\n", "not an image"),
    "PPM, not in the allow-list": (b"P6 1 1 255\n\0\0\0", "not an image"),
    "HEIC": (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", "HEIC; convert it to JPEG"),
    "HEIF": (b"\0\0\0\x18ftypmif1\0\0\0\0mif1heic", "HEIC; convert it to JPEG"),
    "32-bit integers": (encoded(Image.new("I", (4, 4), 70000), "TIFF"), "32-bit pixels; convert it to 8 or 16 bits"),
    "32-bit floats": (encoded(Image.new("F", (4, 4), 0.5), "TIFF"), "32-bit pixels; convert it to 8 or 16 bits"),
    "truncated JPEG": (encoded(SHOT, "JPEG")[:-400], "damaged (image file is truncated"),
    "truncated PNG": (encoded(SHOT, "PNG")[:-400], "damaged ("),
    "truncated GIF": (encoded(SHOT, "GIF")[:-400], "damaged (image file is truncated"),
    "truncated WebP": (encoded(SHOT, "WEBP")[:-100], "damaged (could not create decoder object)"),
    "truncated BMP": (encoded(SHOT, "BMP")[:-400], "damaged (image file is truncated"),
    "truncated TIFF": (encoded(SHOT, "TIFF", compression="tiff_deflate")[:-400], "not an image"),
    "bad deflate data": (patched(encoded(SHOT, "TIFF", compression="tiff_deflate"), 100, b"\0\xff\0"), "damaged ("),
    "bad CRC": (patched(encoded(SHOT, "PNG"), 200, b"\0\xff\0"), "damaged ("),
    "bad zlib data": (broken_zlib(), "damaged ("),
    "JPEG without tables": (encoded(SHOT, "JPEG").replace(b"\xff\xdb", b"\xff\xfe"), "damaged ("),
    "JPEG of a start alone": (b"\xff\xd8\xff\xe0" + bytes(60), "not an image"),
    "a bomb": (png_of(50000, 50000), "over the limit of 89,478,485 pixels"),
}


@pytest.mark.parametrize("kind", UNUSABLE)
def test_an_unusable_image_is_skipped_in_training_with_path_and_reason(job, kind):
    content, reason = UNUSABLE[kind]
    Path("photo.jpg").write_bytes(content)
    add_line("train.txt", "photo.jpg 1\n")
    status, out, err = job()
    assert status == 0
    assert re.fullmatch(rf"warning: train.txt:13: photo.jpg: {re.escape(reason)}.*; skipped\n", err)
    assert train.load_checkpoint(Path("best.pth"))[1]["train_images"] == 12


def test_unusable_images_are_errors_in_prediction_and_the_rest_is_done(trained):
    for kind, (content, _) in UNUSABLE.items():
        Path(f"{kind}.jpg").write_bytes(content)
    names = [f"{kind}.jpg" for kind in UNUSABLE]
    status, out, err = run_main(predict.main, "red/test_0.png", *names, "blue/test_0.png", "--workers", 0)
    assert status == 1
    assert [line.split("  ")[0] for line in out.splitlines()] == ["red/test_0.png", "blue/test_0.png"]
    for line, name, (_, reason) in zip(err.splitlines(), names, UNUSABLE.values(), strict=True):
        assert line.startswith(f"error: {name}: {reason}")


def test_truncated_images_stay_errors():
    assert ImageFile.LOAD_TRUNCATED_IMAGES is False


def test_one_unusable_test_image_ends_the_run(trained):
    before = Path("best.pth").read_bytes()
    Path("photo.jpg").write_bytes(b"text")
    add_line("test.txt", "photo.jpg 1\n")
    status, _, err = trained()
    assert status == 1
    assert err.splitlines() == [
        "error: test.txt:13: photo.jpg: not an image",
        "error: test.txt: 1 of 13 images can't be read; mend or remove these lines",
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
    assert err.splitlines()[-1] == "error: train.txt: 4 of 301 images can't be read; mend or remove these lines"
    Path("train.txt").write_text("".join([*good[:297], *(f"{n}-photo.jpg 0\n" for n in range(3))]))
    status, _, err = trained()
    assert status == 0
    assert [line for line in err.splitlines() if "skipped" in line] == [
        f"warning: train.txt:{298 + n}: {n}-photo.jpg: not an image; skipped" for n in range(3)
    ]


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (SyntaxError("not a TIFF file"), "damaged (not a TIFF file)"),
        (ValueError("bad \x1b[2J chunk"), r"damaged (bad \x1b[2J chunk)"),
        (RuntimeError("stream\nbroken"), r"damaged (stream\nbroken)"),
        (OSError("broken data stream"), "damaged (broken data stream)"),
        (struct.error("unpack requires 4 bytes"), "damaged (unpack requires 4 bytes)"),
        (KeyError(7), "damaged (7)"),
        (MemoryError(), "damaged (MemoryError)"),
        (ZeroDivisionError("division by zero"), "damaged (division by zero)"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else "",
)
@pytest.mark.parametrize("step", ["open", "load"])
def test_whatever_pillow_raises_is_a_skip_with_its_words(tmp_path, monkeypatch, step, error, words):
    put(tmp_path / "photo.png", Image.new("RGB", (4, 4)))

    def fail(*_, **__):
        raise error

    monkeypatch.setattr(*((Image, "open", fail) if step == "open" else (ImageFile.ImageFile, "load", fail)))
    with pytest.raises(train.PhotoError) as caught:
        train.read_photo(tmp_path / "photo.png")
    assert str(caught.value) == words


def test_ctrl_c_while_an_image_is_decoded_is_no_damaged_image(tmp_path, monkeypatch):
    put(tmp_path / "photo.png", Image.new("RGB", (4, 4)))

    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(Image, "open", interrupt)
    with pytest.raises(KeyboardInterrupt):
        train.read_photo(tmp_path / "photo.png")


def make_odd_file(kind):
    if kind == "FIFO":
        os.mkfifo("odd.png")
    elif kind == "device":
        os.symlink("/dev/zero", "odd.png")
    else:
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind("odd.png")


@pytest.mark.parametrize("kind", ["FIFO", "device", "socket"])
def test_only_regular_files_are_opened(trained, kind):
    make_odd_file(kind)
    assert not stat.S_ISREG(os.stat("odd.png").st_mode)
    add_line("train.txt", "odd.png 0\n")
    status, _, err = trained()
    assert (status, err) == (0, "warning: train.txt:13: odd.png: not a regular file; skipped\n")
    status, out, err = run_main(predict.main, "odd.png", "red/test_0.png", "--workers", 0)
    assert (status, err) == (1, "error: odd.png: not a regular file\n") and out.startswith("red/test_0.png  ")


def make_unreadable(kind, monkeypatch):
    if kind == "directory":
        os.mkdir("odd.png")
    elif kind == "link loop":
        os.symlink("odd.png", "odd.png")
    elif kind == "no permission":
        put("odd.png", Image.new("RGB", (1, 1)))
        os.chmod("odd.png", 0)
        access = os.access  # which lets the superuser read everything
        monkeypatch.setattr(os, "access", lambda path, mode: os.fsdecode(path) != "odd.png" and access(path, mode))


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("missing", "no such image; paths are relative to the working directory, or to --root DIR"),
        ("directory", "is a directory, not an image; mend or remove the line"),
        ("link loop", f"{os.strerror(errno.ELOOP).lower()}; mend or remove the line"),
        ("no permission", "no permission to read it; mend or remove the line"),
    ],
)
@pytest.mark.parametrize("name", ["train.txt", "test.txt"])
def test_an_unreadable_path_is_found_before_training(trained, monkeypatch, name, kind, words):
    before = {path: path.read_bytes() for path in (Path("best.pth"), Path("best.csv"))}
    make_unreadable(kind, monkeypatch)
    add_line(name, "odd.png 0\n")
    problem = f"error: {name}:13: odd.png: {words}"
    status, out, err = trained()
    assert (status, out) == (2, "")
    assert err.splitlines() == [problem, "error: 1 problem in the lists; mend the lines and run again"]
    assert all(path.read_bytes() == content for path, content in before.items())
    assert run_main(predict.main, name) == (2, "", f"{problem}\n")


@pytest.mark.parametrize(
    ("kind", "code"),
    [("missing", errno.ENOENT), ("link loop", errno.ELOOP), ("no permission", errno.EACCES), ("directory", 0)],
)
def test_an_unreadable_path_is_an_error_in_prediction_and_the_rest_is_done(trained, monkeypatch, kind, code):
    make_unreadable(kind, monkeypatch)
    if kind == "no permission":

        def opened(path, *rest, **options):
            if path == b"odd.png":
                raise OSError(code, os.strerror(code))
            return open(path, *rest, **options)

        monkeypatch.setattr(train, "open", opened, raising=False)
    status, out, err = run_main(predict.main, "odd.png", "red/test_0.png", "--workers", 0)
    if kind == "directory":  # a folder is walked
        assert status == 2 and err.startswith("error: odd.png: no image in this folder; their names end in .jpg, ")
    else:
        assert (status, err) == (1, f"error: odd.png: {os.strerror(code).lower()}\n")
        assert out.startswith("red/test_0.png  ")


def test_of_many_missing_images_prediction_too_shows_ten_and_a_count(trained):
    Path("list.txt").write_text("".join(f"none_{n}.png 0\n" for n in range(25)))
    status, out, err = run_main(predict.main, "list.txt")
    lines = err.splitlines()
    assert (status, out, len(lines)) == (2, "", 11)
    assert lines[9].startswith("error: list.txt:10: none_9.png: no such image")
    assert lines[10] == "error: 25 problems, 10 of them shown"


ODD_NAMES = {
    "ünï 世界.png": "ünï 世界.png",
    "with  two spaces .png": "with  two spaces .png",
    "red\x1b[31m\x07.png": r"red\x1b[31m\x07.png",
    "right\u202eto left.png": r"right\u202eto left.png",
    os.fsdecode(b"latin-\xe9.png"): r"latin-\udce9.png",
    "new\nline.png": r"new\nline.png",
    "back\rto start.png": r"back\rto start.png",
}


@pytest.mark.parametrize("name", ODD_NAMES, ids=ascii)
def test_odd_names_work_and_are_printed_escaped(trained, name):
    try:
        os.link("red/test_0.png", name)
    except OSError:
        pytest.skip("the file system has no such names")
    os.mkdir("folder")
    os.link(name, f"folder/{name}")
    status, out, err = run_main(predict.main, name, "folder", f"no {name}", "--workers", 0)
    assert [line.rsplit("  ", 1)[0] for line in out.splitlines()] == [ODD_NAMES[name], f"folder/{ODD_NAMES[name]}"]
    assert (status, err) == (1, f"error: no {ODD_NAMES[name]}: {os.strerror(errno.ENOENT).lower()}\n")
    if "\n" not in name and "latin" not in name:  # neither can stand in a UTF-8 list
        os.remove(name)
        Path(name).write_bytes(b"text")
        add_line("train.txt", f"{name} 0\n")
        assert trained()[::2] == (0, f"warning: train.txt:13: {ODD_NAMES[name]}: not an image; skipped\n")


# Lists


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ("red/train_0.png 0\n".encode("utf-16"), "train.txt:1: looks like UTF-16; save it as UTF-8"),
        ("red/train_0.png 0\n".encode("utf-16-be"), "train.txt:1: looks like UTF-16; save it as UTF-8"),
        ("red/train_0.png 0\n".encode("utf-16-le"), "train.txt:1: looks like UTF-16; save it as UTF-8"),
        (
            "red/train_0.png 0\nblé.png 0\n".encode("latin-1"),
            "train.txt:2: not UTF-8 (Latin-1 or Windows-1252, perhaps); save it as UTF-8",
        ),
        (
            b"red/train_0.png 0\n" * 80 + b"\0 1\n",
            "train.txt:81: holds a NUL byte; not a text list",
        ),
    ],
)
def test_a_list_in_another_encoding_gets_an_error_that_names_it(trained, content, problem):
    Path("train.txt").write_bytes(content)
    assert trained() == (2, "", f"error: {problem}\n")
    assert run_main(predict.main, "train.txt") == (2, "", f"error: {problem}\n")


def test_lists_are_utf_8_and_output_is_safe_in_any_locale(colours):
    (colours / "é").mkdir()
    for name in ("train", "test"):
        os.link(f"red/{name}_0.png", f"é/ü {name}.png")
        add_line(f"{name}.txt", f"é/ü {name}.png 0\n")
    locale = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONIOENCODING": ""}
    os.remove("é/ü test.png")
    Path("é/ü test.png").write_bytes(b"text")
    done = run_script("train.py", *PLAIN, cwd=colours, **locale)
    assert done.returncode == 1 and "13 training and 13 test images" in done.stdout
    assert "/".join([r"\udcc3\udca9", r"\udcc3\udcbc test.png: not an image"]) in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        (
            '"red/train_0.png" 0',
            '"red/train_0.png": no such image; remove the quotes: paths may hold spaces as they are',
        ),
        (
            "'red/train_0.png' 0",
            "'red/train_0.png': no such image; remove the quotes: paths may hold spaces as they are",
        ),
        (
            "red/train_0.png, 0",
            "red/train_0.png,: no such image; remove the comma: path and label are separated by white space",
        ),
        ("red/train_0.png,0", "no label; separate path and label by a space, not a comma"),
        ("red/train_0.png", "no label; separate path and label by white space"),
        (r"red\train_0.png 0", r"red\train_0.png: no such image; write / instead of \\"[:-1]),
        ("red/train_1.png 1.0", "label '1.0' is not a whole number; number the classes 0, 1, 2, ..."),
        ("red/train_1.png cat", "label 'cat' is not a whole number; number the classes 0, 1, 2, ..."),
        ("red/train_1.png 1_0", "label '1_0' is not a whole number; number the classes 0, 1, 2, ..."),
        ("red/train_1.png ٣", "label '٣' is not a whole number; number the classes 0, 1, 2, ..."),
        ("red/train_1.png ²", "label '²' is not a whole number; number the classes 0, 1, 2, ..."),
        ("red/train_1.png -1", "label '-1' is not a whole number; number the classes 0, 1, 2, ..."),
        ("red/train_1.png -100", "label '-100' is not a whole number; number the classes 0, 1, 2, ..."),
        ("red/train_1.png +1", "label '+1' is not a whole number; number the classes 0, 1, 2, ..."),
        ("red/train_1.png 0x1", "label '0x1' is not a whole number; number the classes 0, 1, 2, ..."),
        ("red/train_1.png \x1b[2J", r"label '\x1b[2J' is not a whole number; number the classes 0, 1, 2, ..."),
        (f"red/train_1.png {2**63}", f"label {2**63} is not below 100,000; number the classes 0, 1, 2, ..."),
        (f"red/train_1.png {'9' * 5000}", f"label {'9' * 24} is not below 100,000; number the classes 0, 1, 2, ..."),
        ("red/train_1.png 100000", "label 100000 is not below 100,000; number the classes 0, 1, 2, ..."),
        (
            "red/train_0.png 1",
            "red/train_0.png has label 1 here and 0 on line 1; keep one of the two",
        ),
        (
            "./red/train_0.png 2",
            "red/train_0.png has label 2 here and 0 on line 1; keep one of the two",
        ),
    ],
)
def test_a_wrong_line_gets_the_hint_that_fits(trained, line, problem):
    before = Path("best.pth").read_bytes()
    add_line("train.txt", f"{line}\n")
    status, out, err = trained()
    repeated = "warning: train.txt: 1 repeated line dropped\n" if "keep one" in problem else ""
    assert (status, out) == (2, "")
    assert (
        err
        == f"{repeated}error: train.txt:13: {problem}\nerror: 1 problem in the lists; mend the lines and run again\n"
    )
    assert Path("best.pth").read_bytes() == before
    assert run_main(predict.main, "train.txt") == (2, "", f"{repeated}error: train.txt:13: {problem}\n")


def test_paths_found_only_beside_the_list_get_the_root_as_hint(job, monkeypatch):
    os.mkdir("elsewhere")
    monkeypatch.chdir("elsewhere")
    status, _, err = job("--train", "../train.txt", "--test", "../test.txt")
    assert status == 2
    assert err.splitlines()[0] == (
        "error: ../train.txt:1: red/train_0.png: no such image; it lies beside the list: add --root .."
    )
    assert not list(Path().iterdir())


def test_a_missing_list_gets_one_line(job):
    os.remove("train.txt")
    words = os.strerror(errno.ENOENT).lower()
    assert job() == (2, "", f"error: train.txt: {words}; name an existing text file\n")


def test_gaps_and_classes_of_one_image_get_a_warning_that_names_them(job):
    for label in (4, 9, 12):
        os.link("red/train_0.png", f"{label}.png")
        add_line("train.txt", f"{label}.png {label}\n")
    status, _, err = job()
    assert status == 0
    assert err.splitlines() == [
        "warning: train.txt: no image has label 3, 5, 6 and 4 more: its class can never be learned",
        "warning: train.txt: only one image has label 4, 9, 12: its class is learned by heart",
    ]


def test_duplicate_lines_are_dropped_with_a_count(job):
    add_line("train.txt", "red/train_0.png 0\n./red/train_1.png 0\n")
    status, out, err = job()
    assert (status, err) == (0, "warning: train.txt: 2 repeated lines dropped\n")
    assert "12 training and 12 test images" in out


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
    status, _, err = run_main(train.main, "--weights", BUNDLED, "--workers", 0, "--epochs", 3, "--views", 3)
    first = ", ".join(f"test.txt:{13 + n}: {names[n]}" for n in range(3))
    assert (status, err) == (
        0,
        "warning: 4 of 16 test images are in train.txt too, so the test accuracy is not to be believed: "
        f"{first} and 1 more\n",
    )


# Training


def test_a_loss_that_is_not_finite_ends_the_run_with_its_epoch_and_step(trained, monkeypatch):
    before = Path("best.pth").read_bytes()
    monkeypatch.setattr(train, "embed", lambda module, views, *_, **__: torch.full((len(views), 512), torch.nan))
    status, _, err = trained("--batch-size", 5)
    assert status == 1 and err.splitlines()[-1] == "error: the loss is nan in epoch 1, step 1; try a smaller --lr"
    assert Path("best.pth").read_bytes() == before


@pytest.mark.parametrize("epochs", [1, 3])
def test_a_rate_that_is_far_too_large_ends_the_run_and_keeps_the_old_checkpoint(trained, epochs):
    before = Path("best.pth").read_bytes()
    # In one batch the training loss comes before the first step, so that only the evaluation can find it.
    for size, words in (
        (4, "the loss is (nan|inf) in epoch 1, step [23]"),
        (64, "the evaluation loss is (nan|inf) in epoch 1"),
    ):
        status, _, err = trained("--lr", 9e36, "--epochs", epochs, "--batch-size", size)
        assert status == 1
        assert re.fullmatch(rf"error: {words}; try a smaller --lr\n", err)
        assert Path("best.pth").read_bytes() == before


@pytest.mark.parametrize("rate", ["1e37", "1e300", "inf", "nan", "0", "-1", "fast"])
def test_a_rate_that_arithmetic_cannot_hold_is_found_before_training(job, rate):
    status, out, err = job(f"--lr={rate}")
    assert (status, out) == (2, "")
    assert err.splitlines()[-1].endswith(f"argument --lr: '{rate}' is not a number above 0 and below 1e37")


@pytest.mark.parametrize("death", ["killed", "shared memory full"])
def test_a_dead_worker_gets_a_warning_that_names_shm_size_and_the_run_goes_on(trained, monkeypatch, death):
    Path("best.csv").rename("expected.csv")
    parent, read = os.getpid(), train.read_photo

    def dying(path):
        if os.getpid() != parent and b"green" in path:
            if death == "killed":
                os.kill(os.getpid(), signal.SIGKILL)
            raise RuntimeError("unable to write to file </torch_1_2_3>: No space left on device (28)")
        return read(path)

    monkeypatch.setattr(train, "read_photo", dying)
    monkeypatch.setitem(train.PASS_BATCH, "cpu", 3)
    status, _, err = trained("--workers", 2)
    assert status == 0
    assert set(err.splitlines()) == {
        "warning: a worker died: out of memory, or /dev/shm is too small (docker run --shm-size=1g); going on without"
    }
    assert Path("best.csv").read_text() == Path("expected.csv").read_text()
    assert not multiprocessing.active_children()


SLOW_RUN = """
import os, sys, time
sys.path.insert(0, sys.argv.pop(1))
import train
read = train.read_photo

def slow(path):
    open(f"{sys.argv[-1]}.{os.getpid()}", "w").close()
    time.sleep(0.2)
    return read(path)

train.read_photo = slow
train.main(sys.argv[1:])
"""


def test_ctrl_c_and_sigterm_end_a_run_with_one_line_and_no_orphans(tmp_path):
    make_photos(tmp_path, per_class=30)
    cases = [("int", signal.SIGINT, os.killpg), ("term", signal.SIGTERM, os.kill), ("all", signal.SIGTERM, os.killpg)]
    runs = []
    for name, *_ in cases:
        (tmp_path / f"{name}.pth").write_bytes(b"the old one")
        command = [
            sys.executable,
            "-c",
            SLOW_RUN,
            str(ROOT),
            *map(str, PLAIN),
            "--workers",
            "2",
            "--out",
            f"{name}.pth",
        ]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "start_new_session": True}
        runs.append(subprocess.Popen(command, cwd=tmp_path, **pipes))
    for (name, number, send), run in zip(cases, runs, strict=True):
        while len(list(tmp_path.glob(f"{name}.pth.*"))) < 2:  # both workers are at it, for nine seconds
            assert run.poll() is None, run.stderr.read()
            time.sleep(0.05)
        send(run.pid, number)
    for (name, number, _), run in zip(cases, runs, strict=True):
        _, err = run.communicate(timeout=20)
        said = "Ctrl-C" if number == signal.SIGINT else "SIGTERM"
        assert (run.returncode, err) == (128 + number, f"stopped by {said}; what was saved is whole\n"), name
        assert (tmp_path / f"{name}.pth").read_bytes() == b"the old one"
        with pytest.raises(ProcessLookupError):  # nobody is left in its group
            for _ in range(20):
                os.killpg(run.pid, 0)
                time.sleep(0.1)
    assert not [path for path in tmp_path.iterdir() if path.name.endswith(".tmp")]


def test_after_kill_9_at_any_moment_the_checkpoint_is_whole(colours):
    kills = fuzz.kills()
    for seed in range(10):
        fuzz.try_seed(kills, seed)


def test_what_a_killed_run_left_is_swept_by_the_next_and_nothing_else_is(job):
    stale = [Path(".best.pth.123.tmp"), Path(".best.csv.123.tmp")]
    others = [Path(".other.pth.123.tmp"), Path("best.pth.tmp"), Path(".best.pth.bak")]
    for path in (*stale, *others):
        path.write_bytes(b"half")
    assert job()[0] == 0
    assert [path.exists() for path in stale] == [False, False]
    assert all(path.read_bytes() == b"half" for path in others)


class Faults:
    """Makes the nth of one kind of call on the saved files fail, and remembers each file's last whole content."""

    def __init__(self, monkeypatch, call, number, code):
        self.left, self.call, self.code, self.whole = number, call, code, {}
        self.open, self.fsync, self.replace = io.open, os.fsync, os.replace
        monkeypatch.setattr(train, "open", self.opened, raising=False)
        monkeypatch.setattr(os, "fsync", self.synced)
        monkeypatch.setattr(os, "replace", self.replaced)

    def count(self, call):
        self.left -= call == self.call
        if self.left == 0 and call == self.call:
            raise OSError(self.code, os.strerror(self.code))

    def opened(self, path, mode="r", *rest, **options):
        if "w" not in mode:
            return self.open(path, mode, *rest, **options)
        self.count("open")
        file = self.open(path, mode, *rest, **options)
        write = file.write

        class Writer:
            def __getattr__(self, name):
                return getattr(file, name)

            def __enter__(self):
                return self

            def __exit__(self, *_):
                file.close()

            def write(_, content):
                write(bytes(content)[:100])  # a full disk takes the first part
                self.count("write")
                return write(bytes(content)[100:])

        return Writer()

    def synced(self, descriptor):
        self.count("fsync")
        self.fsync(descriptor)

    def replaced(self, source, target):
        self.count("replace")
        self.replace(source, target)
        self.whole[Path(target).name] = Path(target).read_bytes()


@pytest.mark.parametrize("call", ["open", "write", "fsync", "replace"])
@pytest.mark.parametrize(("code", "words"), [("ENOSPC", "disk full"), ("EIO", os.strerror(errno.EIO).lower())])
def test_whichever_write_fails_the_last_whole_files_stay(job, monkeypatch, call, code, words):
    failed = []
    for number in itertools.count(1):
        old = {"best.pth": b"the old one", "best.csv": b"the old figures"}
        for name, content in old.items():
            Path(name).write_bytes(content)
        with monkeypatch.context() as patch:
            scores = iter((0.1, 0.2))  # both epochs save
            patch.setattr(train, "evaluate", lambda *_, scores=scores: (0.5, next(scores)))
            faults = Faults(patch, call, number, getattr(errno, code))
            status, _, err = job("--epochs", 2)
        whole = old | faults.whole
        assert {name: Path(name).read_bytes() for name in whole} == whole
        assert not list(Path().glob(".*.tmp"))
        if status == 0:
            break
        failed.append(re.fullmatch(rf"error: (best\.\w+): {words}; what was saved before is intact\n", err)[1])
        assert status == 1
    assert failed == ["best.pth", "best.csv"] * 2


def test_a_full_disk_is_found_before_training(trained, monkeypatch):
    before = Path("best.pth").read_bytes()
    monkeypatch.setattr(train.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 5 << 20}))
    status, out, err = trained()
    assert (status, out) == (2, "")
    assert err == "error: --out best.pth: disk full (5 MB free, 95 needed); free some space\n"
    assert Path("best.pth").read_bytes() == before


@pytest.mark.parametrize("code", [errno.EROFS, errno.EACCES])
def test_a_folder_that_takes_no_files_is_found_before_training(job, monkeypatch, code):
    def refuse(**_):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(tempfile, "TemporaryFile", refuse)  # the superuser may write anywhere
    status, out, err = job("--out", "sub/best.pth")
    assert (status, out) == (2, "")
    reason = os.strerror(code).lower()
    assert err == f"error: --out sub/best.pth: can't write in sub ({reason}); name another folder\n"


@pytest.mark.parametrize(
    ("out", "problem"),
    [
        ("red", "is a directory; name a file, such as red/best.pth"),
        ("none/best.pth", f"can't write in none ({os.strerror(errno.ENOENT).lower()}); name another folder"),
        ("best.csv", "the .csv beside the checkpoint has this name; end it in .pth"),
    ],
)
def test_an_impossible_output_is_found_before_training(job, out, problem):
    assert job("--out", out) == (2, "", f"error: --out {out}: {problem}\n")


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory. Tried ..."), RuntimeError("MPS backend out of memory (...)")]
)
def test_out_of_memory_halves_the_passs_batch_up_to_three_times(job, monkeypatch, error):
    # A device in name only: no parameter is moved to it.
    monkeypatch.setattr(train, "pick_device", lambda _: torch.device("mps"))
    monkeypatch.setattr(train, "backbone_of", lambda _: nn.Identity())
    monkeypatch.setitem(train.PASS_BATCH, "mps", 12)
    sizes, room = [], 2

    def embed(module, views, *_, **__):
        sizes.append(len(views))
        if len(views) > room:
            raise error
        return torch.ones(len(views), 512)

    monkeypatch.setattr(train, "embed", embed)
    said = "warning: the device is out of memory; the pass goes on in smaller batches\n"
    train.warn_once.cache_clear()
    status, _, err = job()
    assert (status, err.count(said), "error" in err) == (0, 1, False)
    assert sizes == [12, 6, 3, 2, 2, 2, 2, 2, 2] * 2  # in both lists' passes
    room = 1
    train.warn_once.cache_clear()
    status, _, err = job("--out", "other.pth")
    assert (status, err) == (1, f"{said}error: the device is out of memory; run with --device cpu\n")
    assert not Path("other.pth").exists()


def test_other_errors_of_the_device_are_bugs_that_keep_their_traceback():
    def fail(_):
        raise RuntimeError("shapes differ")

    with pytest.raises(RuntimeError, match="shapes differ"):
        train.shrinking(fail)(torch.zeros(4, 1))


# Downloads


@pytest.fixture
def served(tmp_path, monkeypatch):
    """A function that serves ImageNet's weights so: from then on a download meets that answer. And the cache folder."""
    servers, over = [], threading.Event()

    def serve(answer, name="resnet18-0123abcd.pth"):
        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                answer(self, over)

            def log_message(self, *_):
                pass

        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        servers.append(server)
        monkeypatch.setattr(train, "IMAGENET_URL", f"http://127.0.0.1:{server.server_port}/{name}")

    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setattr(urllib.request, "_opener", None)
    yield serve
    over.set()
    for server in servers:
        server.shutdown()
        server.server_close()


def answer_with(body, length=None, status=200, then=None):
    def answer(handler, over):
        handler.send_response(status)
        handler.send_header("Content-Length", str(length or len(body)))
        handler.end_headers()
        handler.wfile.write(body)
        handler.wfile.flush()
        if then:
            then(handler, over)

    return answer


def stall(_, over):
    over.wait(30)


ANSWERS = {
    "silent": stall,
    "stalled": answer_with(b"x" * 1000, 10**7, then=stall),
    "cut": answer_with(b"x" * 1000, 10**7),
    "wrong bytes": answer_with(b"x" * 1000),
    "a login page": answer_with(b"<html>Please log in</html>"),
    "not there": answer_with(b"", status=404),
    "not HTTP": lambda handler, _: handler.wfile.write(b"SSH-2.0-server\r\n"),
}
REASONS = {"silent": "timed out", "stalled": "timed out", "not there": "Not Found|404", "not HTTP": "SSH-2.0"}


@pytest.mark.parametrize("kind", ["refused", "cache is a file", *ANSWERS])
def test_a_download_that_fails_falls_back_or_ends_and_leaves_no_file(served, job, tmp_path, monkeypatch, kind):
    monkeypatch.setattr(train, "resnet18", resnet18)
    monkeypatch.setattr(train, "DOWNLOAD_TIMEOUT", 0.3)
    served(ANSWERS.get(kind, stall))
    if kind == "refused":
        with socket.socket() as unused:
            unused.bind(("127.0.0.1", 0))
            monkeypatch.setattr(
                train, "IMAGENET_URL", f"http://127.0.0.1:{unused.getsockname()[1]}/resnet18-01234567.pth"
            )
    if kind == "cache is a file":
        (tmp_path / "torch").write_bytes(b"")
    reason = {"refused": "refused", "cache is a file": "[Nn]ot a directory|[Ff]ile exists"} | REASONS
    began = time.perf_counter()
    _, origin, (caveat, fix) = train.find_weights(None)
    assert "resnet18-grocery.pth (bundled)" in origin
    words = reason.get(kind, "invalid hash value")
    assert re.fullmatch(rf"no ImageNet weights \(.*({words}).*\): using the bundled .*, which is far weaker", caveat)
    assert fix.startswith(f"for the real ones, fetch {train.IMAGENET_URL} elsewhere and put it at {tmp_path / 'torch'}")
    status, out, err = job("--weights", "imagenet")
    assert (status, out) == (2, "")
    assert re.match(
        r"error: ImageNet weights can't be downloaded \(.*\); fetch .*, or give it as --weights FILE\n", err
    )
    assert time.perf_counter() - began < 10
    assert not [path for path in (tmp_path / "torch").rglob("*") if path.is_file()]
    assert not Path("best.pth").exists()


def test_a_stalled_download_ends_within_a_minute():
    assert train.DOWNLOAD_TIMEOUT * 2 <= 60


def test_a_download_that_arrives_is_used_and_kept(served, tmp_path, monkeypatch):
    content = BUNDLED.read_bytes()
    name = f"resnet18-{hashlib.sha256(content).hexdigest()[:8]}.pth"
    served(answer_with(content), name)
    state, origin, caveats = train.find_weights(None)
    assert origin.startswith("ImageNet") and not caveats
    expected = train.load_backbone(BUNDLED)
    assert state.keys() == expected.keys() and all(torch.equal(state[key], expected[key]) for key in state)
    assert [path.name for path in (tmp_path / "torch").rglob("*") if path.is_file()] == [name]
    served(answer_with(b"", status=404), name)
    assert train.find_weights("imagenet")[0].keys() == state.keys()  # from the cache


# Checkpoints


def tiny_resnet18(classes=3, **changes):
    """A ResNet-18 state dict in 30 kB: each tensor one number, repeated."""
    with torch.device("meta"):
        state = resnet18(num_classes=classes).state_dict()
    for key, value in state.items():
        state[key] = torch.tensor(7) if value.dim() == 0 else torch.full((1,) * value.dim(), 0.01).expand(value.shape)
    state.update({key.replace("__", "."): value for key, value in changes.items()})
    return state


def with_about(about, classes=3):
    state = tiny_resnet18(classes)
    state._metadata[train.ABOUT] = about
    return state


class Runs:
    """What a hostile pickle holds: a call, made when it is loaded."""

    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


def claim(size, stride, storage=4):
    """A tensor that claims more numbers than its storage holds."""
    parts = (torch.zeros(storage).storage(), 0, size, stride, False, OrderedDict())
    return Runs(torch._utils._rebuild_tensor_v2, *parts)


def bomb_in_zip():
    file = io.BytesIO()
    torch.save(tiny_resnet18(), file)
    bomb = io.BytesIO()
    with zipfile.ZipFile(file) as sound, zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in sound.namelist():
            archive.writestr(name, bytes(1 << 28) if name.endswith("/data/1") else sound.read(name))
    return bomb.getvalue()


def legacy_bomb():
    file = io.BytesIO()
    torch.save({"fc.weight": torch.zeros(77777)}, file, _use_new_zipfile_serialization=False)
    old, new = b"J" + struct.pack("<i", 77777), b"\x8a\x06" + (1 << 40).to_bytes(6, "little")
    content = file.getvalue()
    assert old in content
    return content.replace(old, new)[:2000]


def pickled(content):
    file = io.BytesIO()
    torch.save(content, file)
    return file.getvalue()


def legacy(content):
    file = io.BytesIO()
    torch.save(content, file, _use_new_zipfile_serialization=False)
    return file.getvalue()


def nested_tensor():
    return torch.nested.nested_tensor([torch.zeros(2), torch.zeros(3)])


def attributed():
    """A parameter that carries an attribute by a method's name."""
    weight = nn.Parameter(tiny_resnet18()["conv1.weight"].clone())
    weight.isfinite = 5
    return weight


def with_pickle(content):
    """A file of weights, whole but for its pickle."""
    forged = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(pickled({}))) as sound, zipfile.ZipFile(forged, "w") as archive:
        for name in sound.namelist():
            archive.writestr(name, content if name.endswith("data.pkl") else sound.read(name))
    return forged.getvalue()


def marked_as_folder():
    """One bit flipped in a zip's directory makes a member a folder, whose bytes torch leaves unread."""
    content = bytearray(pickled({"weights": torch.ones(1000)}))
    at = content.index(b"PK\x01\x02")
    while b"data/0" not in content[at : at + 90]:
        at = content.index(b"PK\x01\x02", at + 1)
    content[at + 38] ^= 0x10
    return bytes(content)


CODE = "not a weights file: it holds more than tensors; get it again from its source"
DAMAGED = "damaged, or not a weights file; get it again from its source"
MISFIT = r"does not fit a ResNet-18: {}; give one made for resnet18"
REFUSED = {
    "a pickle that runs code": (lambda: pickle.dumps(Runs(open, "pwned", "w")), CODE),
    "a state dict that runs code": (lambda: pickled({"fc.weight": Runs(open, "pwned", "w")}), CODE),
    "a legacy file that runs code": (lambda: legacy({"fc.weight": Runs(os.mkdir, "pwned")}), CODE),
    "a whole model": (lambda: pickled(SmallNetwork()), CODE),
    "empty": (lambda: b"", DAMAGED),
    "HTML": (lambda: b"<!doctype html><title>Log in</title>", DAMAGED),
    "truncated": (lambda: pickled(tiny_resnet18())[:-2000], DAMAGED),
    "truncated legacy": (lambda: legacy(tiny_resnet18())[:-10], DAMAGED),
    "a flipped byte": (lambda: patched(pickled(tiny_resnet18()), 2000, b"\xff\0\xff"), DAMAGED),
    "marked as a folder": (marked_as_folder, DAMAGED),
    "a zip bomb": (bomb_in_zip, DAMAGED),
    "a legacy file that claims terabytes": (legacy_bomb, DAMAGED),
    "more numbers than are stored": (
        lambda: pickled(tiny_resnet18(conv1__weight=claim((64, 3, 7, 7), (147, 49, 7, 1)))),
        DAMAGED,
    ),
    "terabytes that are not stored": (lambda: pickled(tiny_resnet18(conv1__weight=claim((1 << 40,), (1,)))), DAMAGED),
    "a tensor": (lambda: pickled(torch.zeros(3)), r"holds no state dict; save model.state_dict\(\) with torch.save"),
    "a list": (lambda: pickled([1]), r"holds no state dict; save model.state_dict\(\) with torch.save"),
    "repeated into terabytes": (
        lambda: pickled(tiny_resnet18(fc__weight=torch.zeros(1).expand(10**9, 512))),
        MISFIT.format("fc.weight is 1000000000x512, not 1000x512, fc.bias is 3, not 1000"),
    ),
    "sparse terabytes": (
        lambda: pickled(tiny_resnet18(conv1__weight=torch.sparse_coo_tensor(size=(10**6, 10**6)))),
        MISFIT.format("conv1.weight is no plain tensor"),
    ),
    "another architecture": (
        lambda: pickled(
            {key: value[..., :1] if value.dim() == 4 else value for key, value in resnet34().state_dict().items()}
        ),
        MISFIT.format(
            "unexpected layer1.2.conv1.weight, unexpected layer1.2.bn1.weight, unexpected layer1.2.bn1.bias and .* more"
        ),
    ),
    "another class count": (
        lambda: pickled(tiny_resnet18(fc__bias=torch.zeros(4))),
        MISFIT.format("fc.bias is 4, not 3"),
    ),
    "another width": (
        lambda: pickled(tiny_resnet18(fc__weight=torch.zeros(3, 2048))),
        MISFIT.format("fc.weight is 3x2048, not 3x512"),
    ),
    "NaN": (
        lambda: pickled(tiny_resnet18(bn1__bias=torch.full((64,), torch.nan))),
        MISFIT.format("bn1.bias has values that are not finite"),
    ),
    "infinite": (
        lambda: pickled(tiny_resnet18(layer1__0__bn1__running_var=torch.full((64,), torch.inf))),
        MISFIT.format("layer1.0.bn1.running_var has values that are not finite"),
    ),
    "integers": (
        lambda: pickled(tiny_resnet18(bn1__bias=torch.zeros(64, dtype=torch.int64))),
        MISFIT.format("bn1.bias is int64"),
    ),
    "8-bit floats": (
        lambda: pickled(tiny_resnet18(bn1__bias=torch.zeros(64).to(torch.float8_e4m3fn))),
        MISFIT.format("bn1.bias is float8_e4m3fn"),
    ),
    "a word for a tensor": (
        lambda: pickled(tiny_resnet18(bn1__bias="x")),
        MISFIT.format("bn1.bias is no plain tensor"),
    ),
    "on no device": (
        lambda: pickled(tiny_resnet18(bn1__bias=torch.zeros(64, device="meta"))),
        MISFIT.format("bn1.bias is no plain tensor"),
    ),
    # torch refuses to load these from 2.15 on, earlier ones leave it to the check of shapes: either is right.
    "a nested tensor": (
        lambda: pickled(tiny_resnet18(bn1__bias=nested_tensor())),
        f"({CODE}|{MISFIT.format('bn1.bias is no plain tensor')})",
    ),
    "a nested tensor for a head": (
        lambda: pickled(tiny_resnet18(fc__weight=nested_tensor())),
        f"({CODE}|{MISFIT.format('fc.*')})",
    ),
    "attributes for methods": (
        lambda: pickled(tiny_resnet18(conv1__weight=attributed())),
        MISFIT.format("conv1.weight is no plain tensor"),
    ),
    "a key too deep to print": (
        lambda: with_pickle(b"\x80\x02})" + b"\x85" * 3000 + b"Ns."),
        MISFIT.format("unexpected .*, no conv1.weight, no bn1.weight and .* more"),
    ),
    "keys with escapes": (
        lambda: pickled({"\x1b[2J": torch.zeros(1)}),
        MISFIT.format(r"unexpected \\x1b\[2J, no conv1.weight, .*"),
    ),
    "itself within itself": (lambda: pickled(within_itself()), MISFIT.format(r"unexpected model, no conv1.weight, .*")),
    "a directory": (None, "not a regular file; name a file of weights"),
    "a FIFO": (None, "not a regular file; name a file of weights"),
    "missing": (None, f"{os.strerror(errno.ENOENT).lower()}; name a file of weights"),
}


def within_itself():
    found = {}
    found["model"] = found
    return found


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", REFUSED)
def test_a_file_that_is_no_sound_resnet18_is_refused_by_both_scripts(colours, kind):
    make, reason = REFUSED[kind]
    if kind == "a directory":
        os.mkdir("bad.pth")
    elif kind == "a FIFO":
        os.mkfifo("bad.pth")
    elif make:
        Path("bad.pth").write_bytes(make())
    before = sorted(os.listdir())
    began = time.perf_counter()
    for main, *args in ((train.main, "--weights", "bad.pth"), (predict.main, "red/test_0.png", "--model", "bad.pth")):
        status, out, err = run_main(main, *args)
        assert (status, out) == (2, "")
        assert re.fullmatch(rf"error: bad\.pth: {reason}\n", err), err
        assert "weights_only" not in err and err.removesuffix("\n").isprintable()
    assert time.perf_counter() - began < 10
    assert sorted(os.listdir()) == before, "the code ran, or something was written"


@pytest.mark.parametrize("kind", [kind for kind in REFUSED if "bytes" in kind or "bomb" in kind])
def test_a_small_file_that_claims_much_takes_no_memory(tmp_path, kind):
    (tmp_path / "bad.pth").write_bytes(REFUSED[kind][0]())

    def load():
        with pytest.raises(train.UserError):
            train.load_checkpoint(tmp_path / "bad.pth")

    assert growth(load) < 100 << 20


def predicted(tmp_path, content):
    """What predict.py prints with a checkpoint of these bytes: its status, the class names of the line, and stderr."""
    (tmp_path / "model.pth").write_bytes(content)
    put(tmp_path / "photo.png", Image.new("RGB", (8, 8)))
    status, out, err = run_main(predict.main, tmp_path / "photo.png", "--model", tmp_path / "model.pth", "--workers", 0)
    return status, sorted(name.rsplit(" ", 1)[0] for name in out.split("  ", 1)[-1].split(", ")), err


def saved_on_cuda(monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(torch.serialization, "location_tag", lambda _: "cuda:3")
        content = pickled(tiny_resnet18())
    assert b"cuda:3" in content
    return content


@pytest.mark.parametrize(
    "form",
    ["bare", "cuda", "model", "state_dict", "nested twice", "module.", "_orig_mod.", "float16", "float64", "legacy"],
)
def test_usual_forms_of_a_checkpoint_load_in_both_scripts(tmp_path, monkeypatch, form):
    state = tiny_resnet18()
    forms = {
        "cuda": lambda: saved_on_cuda(monkeypatch),
        "model": lambda: pickled({"model": state, "epoch": 3}),
        "state_dict": lambda: pickled({"state_dict": state}),
        "nested twice": lambda: pickled({"model": {"state_dict": state}}),
        "module.": lambda: pickled({f"module.{key}": value for key, value in state.items()}),
        "_orig_mod.": lambda: pickled({f"_orig_mod.{key}": value for key, value in state.items()}),
        "float16": lambda: pickled({k: v.half() if v.is_floating_point() else v for k, v in state.items()}),
        "float64": lambda: pickled({k: v.double() if v.is_floating_point() else v for k, v in state.items()}),
        "legacy": lambda: legacy(state),
    }
    assert predicted(tmp_path, forms.get(form, lambda: pickled(state))()) == (0, ["0", "1", "2"], "")
    assert train.load_backbone(tmp_path / "model.pth")["conv1.weight"].shape == (64, 3, 7, 7)


GOOD_ABOUT = {"format": 1, "classes": ["a", "b", "c"], "accuracy": 0.5}
HOSTILE_ABOUT = {
    "a word": "hello",
    "a list": [1, 2],
    "a number": 5,
    "empty": {},
    "another format": GOOD_ABOUT | {"format": 2},
    "no format": {"classes": ["a", "b", "c"]},
    "no classes": {"format": 1},
    "too few names": GOOD_ABOUT | {"classes": ["a", "b"]},
    "too many names": GOOD_ABOUT | {"classes": list("abcd")},
    "names of another type": GOOD_ABOUT | {"classes": ["a", "b", 3]},
    "names in a word": GOOD_ABOUT | {"classes": "abc"},
    "names in a dict": GOOD_ABOUT | {"classes": {"a": 0, "b": 1, "c": 2}},
    "a tensor for a number": GOOD_ABOUT | {"accuracy": torch.zeros(3)},
    "a number in words": GOOD_ABOUT | {"accuracy": "0.5"},
    "a subclass": OrderedDict(GOOD_ABOUT),
}


@pytest.mark.parametrize("kind", HOSTILE_ABOUT)
def test_a_malformed_account_is_ignored_with_a_warning(tmp_path, kind):
    status, names, err = predicted(tmp_path, pickled(with_about(HOSTILE_ABOUT[kind])))
    assert (status, names) == (0, ["0", "1", "2"])
    model = train.shown(tmp_path / "model.pth")
    assert err == f"warning: {model}: its class names and history are malformed; going on with class numbers\n"


class Armed:
    """An OrderedDict whose own attributes stand before its methods once it is loaded."""

    def __init__(self, content, **attributes):
        self.content, self.attributes = content, attributes

    def __reduce__(self):
        return OrderedDict, (), self.attributes, None, iter(self.content.items())


@pytest.mark.parametrize(
    "attribute", ["_metadata", "items", "get", "keys", "values", "__len__", "__getitem__", "__class__"]
)
def test_a_hostile_ordered_dict_is_read_as_a_dict(tmp_path, attribute):
    state = Armed(tiny_resnet18(), **{attribute: 5})
    assert predicted(tmp_path, pickled(Armed({"model": state}, **{attribute: "x"}))) == (0, ["0", "1", "2"], "")


def test_a_hostile_dict_of_metadata_is_read_as_a_dict(tmp_path):
    metadata = Armed({train.ABOUT: GOOD_ABOUT}, get=5, items=5)
    assert predicted(tmp_path, pickled(Armed(tiny_resnet18(), _metadata=metadata))) == (0, ["a", "b", "c"], "")


def test_class_names_with_escapes_never_reach_the_terminal(tmp_path):
    names = ["\x1b[2J\x1b]0;owned\x07", "two\nlines", "\u202eleft\udcff"]
    status, found, err = predicted(tmp_path, pickled(with_about(GOOD_ABOUT | {"classes": names})))
    assert (status, found, err) == (0, sorted([r"\x1b[2J\x1b]0;owned\x07", r"two\nlines", r"\u202eleft\udcff"]), "")


def test_every_flipped_byte_of_a_checkpoint_is_harmless_or_found(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (content, *_), _, check = fuzz.checkpoints()
    for at in range(2, len(content), 9):
        check(patched(content, at, bytes([content[at] ^ 0x10])))


# Mutated bytes


def try_seeds(kind, count):
    before = fuzz.peak()
    for seed in range(count):
        try:
            fuzz.try_seed(kind, seed)
        except Exception as error:
            raise AssertionError(f"seed {seed}: {error}") from error
    assert fuzz.peak() - before < fuzz.MEMORY


def test_2000_mutated_images_are_images_or_photo_errors(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    images = fuzz.images()
    assert {Image.open(io.BytesIO(content)).format for content in images[0]} == {*train.IMAGE_FORMATS, "MPO"}
    began = time.perf_counter()
    try_seeds(images, 2000)
    assert time.perf_counter() - began < 30


@pytest.fixture
def lists(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return fuzz.lists()


@settings(
    max_examples=2000,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(st.randoms(use_true_random=True), st.binary(max_size=12), st.floats(0, 1))
def test_2000_mutated_lists_are_read_as_written_or_user_errors(lists, rng, extra, place):
    (lines,), tokens, check = lists
    content = fuzz.mutate(lines, rng, tokens)
    at = int(place * len(content))
    check(content[:at] + extra + content[at:])


@pytest.mark.filterwarnings("ignore")
def test_500_mutated_checkpoints_hold_the_saved_weights_or_are_user_errors(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    try_seeds(fuzz.checkpoints(), 500)
