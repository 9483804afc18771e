"""Images: which are used, how, and the reason why one is not."""

import errno
import io
import os
import re
import struct
import time
import zlib
from pathlib import Path

import fuzz
import numpy as np
import pytest
import torch
from conftest import add_line, growth, make_unreadable, patched, put, run_main, try_seeds
from PIL import Image, ImageFile

import predict
import train
from transfer.checkpoint import load_checkpoint
from transfer.inputs.images import IMAGE_FORMATS, ImageError, read_image

NOISE = np.random.default_rng(0).integers(0, 256, (12, 8, 3), dtype=np.uint8)


def encoded(image, format, **options):
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


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
    assert np.array_equal(np.asarray(read_image(tmp_path / "turned")), turned(stored, orientation))


def test_training_evaluation_and_prediction_all_see_the_upright_image(job, monkeypatch):
    seen = []
    original = predict.embed

    def spy(module, views, *rest, **options):
        seen.append(views.clone())
        return original(module, views, *rest, **options)

    monkeypatch.setattr("transfer.backbone.embed", spy)
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
    found = read_image(tmp_path / "photo").getpixel((4, 4))
    assert all(abs(a - b) <= 1 for a, b in zip(found, expected, strict=True)), (found, expected)


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB"])
def test_a_transparent_colour_becomes_white(tmp_path, mode):
    image = Image.new("RGB", (8, 4), (40, 40, 40)).convert(mode)
    image.save(tmp_path / "photo.png", transparency=image.getpixel((0, 0)))
    assert read_image(tmp_path / "photo.png").getpixel((0, 0)) == (255, 255, 255)


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
    photo = read_image(tmp_path / "photo")
    assert photo.mode == "RGB"
    assert max(photo.getpixel((8, 2))) <= 3 and min(photo.getpixel((8, 13))) >= 252


@pytest.mark.parametrize(("format", "order"), [("PNG", "<"), ("TIFF", "<"), ("TIFF", ">")])
def test_16_bit_grey_is_scaled_not_clipped(tmp_path, format, order):
    values = np.array([[0, 255, 256, 32768, 65535]], dtype=order + "u2")
    mode = "I;16B" if order == ">" else "I;16"
    Image.frombytes(mode, (5, 1), values.tobytes()).save(tmp_path / "photo", format)
    assert np.asarray(read_image(tmp_path / "photo"))[0].tolist() == [[v] * 3 for v in (0, 0, 1, 128, 255)]


@pytest.mark.parametrize("format", ["GIF", "WEBP", "MPO", "PNG", "TIFF"])
def test_of_several_frames_the_first_is_used(tmp_path, format):
    first, *others = [Image.new("RGB", (16, 16), colour) for colour in ((250, 0, 0), (0, 250, 0), (0, 0, 250))]
    first.save(tmp_path / "photo", format, save_all=True, append_images=others)
    assert Image.open(tmp_path / "photo").n_frames == 3
    red, *rest = read_image(tmp_path / "photo").getpixel((8, 8))
    assert red > 230 and max(rest) < 20


@pytest.mark.parametrize("size", [(1, 1), (1, 20000), (20000, 1)])
@pytest.mark.parametrize("format", ["PNG", "JPEG", "TIFF"])
def test_the_smallest_and_the_longest_images_are_used_at_once(tmp_path, size, format):
    Image.new("RGB", size, (9, 200, 9)).save(tmp_path / "photo", format)
    began = time.perf_counter()
    views = train.draw_views(read_image(tmp_path / "photo"), range(3), 0)
    assert time.perf_counter() - began < 1
    assert views.shape == (3, 224, 224, 3) and views[0, ..., 1].min() > 190
    assert growth(lambda: train.draw_views(read_image(tmp_path / "photo"), range(3), 0)) < 50 << 20


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
    assert np.array_equal(np.asarray(read_image(tmp_path / "photo")), expected)


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
    avif = encoded(colour, "AVIF")
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
        "PPM": b"P6 %d %d 255\n" % (side, side),
        "AVIF": patched(avif, avif.index(b"ispe") + 8, struct.pack(">II", *[min(side, 16384)] * 2)),
        "WEBP": patched(webp, 21, (webp_side | webp_side << 14).to_bytes(4, "little")),
    }


LIMIT = (
    r"^(\d+x\d+ pixels, )?over the limit of (89,478,485|715,827,880|29,826,161 for (WEBP|AVIF))( pixels)?; resize it$"
)


@pytest.mark.parametrize("side", [9460, 50000])
@pytest.mark.parametrize("format", IMAGE_FORMATS)
def test_a_bomb_is_refused_before_it_is_decoded_and_costs_no_memory(tmp_path, format, side):
    side = 26760 if format == "JPEG" and side < 10000 else side  # a baseline one is decoded at an eighth
    (tmp_path / "photo").write_bytes(bombs(side)[format])
    assert (tmp_path / "photo").stat().st_size < 2000
    with pytest.raises(ImageError, match=LIMIT):
        read_image(tmp_path / "photo")

    def read():
        with pytest.raises(ImageError):
            read_image(tmp_path / "photo")

    assert growth(read) < 30 << 20


def test_a_large_jpeg_is_read_where_its_decoder_holds_little_of_it(tmp_path):
    # Over 3 s: 108 megapixels are written and read.
    photo = Image.new("RGB", (12000, 9000), (9, 200, 9))  # 108 megapixels
    photo.save(tmp_path / "photo", "JPEG", quality=60)
    photo.save(tmp_path / "progressive", "JPEG", quality=60, progressive=True)
    photo.save(tmp_path / "full", "JPEG", quality=60, progressive=True, subsampling=0)
    assert growth(lambda: read_image(tmp_path / "photo").getpixel((9, 9))) < 30 << 20
    assert read_image(tmp_path / "photo").size == (1500, 1125)
    assert 50 << 20 < growth(lambda: read_image(tmp_path / "progressive").getpixel((9, 9))) < 400 << 20
    with pytest.raises(ImageError, match="^12000x9000 pixels, over the limit of 89,478,485; resize it$"):
        read_image(tmp_path / "full")  # which would hold 648 MB


def test_a_slowly_decoded_ppm_has_a_lower_limit(tmp_path):
    (tmp_path / "photo").write_bytes(b"P5 3000 2000 4095\n" + bytes(9))
    with pytest.raises(ImageError, match="^3000x2000 pixels, over the limit of 5,592,405; resize it$"):
        read_image(tmp_path / "photo")


def test_the_tiff_librarys_own_lines_are_not_printed(tmp_path, capfd):
    content = patched(encoded(SHOT, "TIFF", compression="tiff_deflate"), 100, b"\0\xff\0")
    (tmp_path / "photo.tif").write_bytes(content)
    with pytest.raises(ImageError, match=r"^damaged \("):
        read_image(tmp_path / "photo.tif")
    assert capfd.readouterr().err == ""


def large_png(side, channels):
    """Transparent pixels, a row of zeros after another; of 3 channels a chunk says which colour is transparent. Of one
    channel 16-bit greyscale.
    """
    packer, depth = zlib.compressobj(1), 16 if channels == 1 else 8
    rows = b"".join(packer.compress(bytes(1 + channels * depth // 8 * side)) for _ in range(side)) + packer.flush()
    header = b"IHDR" + struct.pack(">IIBBBBB", side, side, depth, {1: 0, 3: 2, 4: 6}[channels], 0, 0, 0)
    chunks = [header, *[b"tRNS" + bytes(6)] * (channels == 3), b"IDAT" + rows, b"IEND"]
    parts = (len(chunk[4:]).to_bytes(4, "big") + chunk + zlib.crc32(chunk).to_bytes(4, "big") for chunk in chunks)
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


@pytest.mark.parametrize("format", ["PNG", "PNG with a transparent colour", "PNG of 16 bits", "WEBP"])
def test_an_image_at_the_limit_takes_less_than_a_gigabyte(tmp_path, format):
    # As large as it may be, transparent, and still a small file: what costs its decoder most.
    channels = {"PNG": 4, "PNG with a transparent colour": 3, "PNG of 16 bits": 1}
    large = bombs(9459)["WEBP"] if format == "WEBP" else large_png(9459, channels[format])
    white = (0, 0, 0) if format == "PNG of 16 bits" else (255, 255, 255)
    (tmp_path / "photo").write_bytes(large)

    def read():
        try:
            photo = read_image(tmp_path / "photo")
            assert photo.size == (9459, 9459) and photo.getpixel((0, 0)) == white
        except ImageError as error:
            assert format == "WEBP" and "over the limit" in str(error)  # its decoder needs several times the pixels

    assert growth(read) < 1e9


def tiff_header(size, *, bits=(8, 8, 8), **tags):
    """A TIFF without pixels: its directory says what these are."""
    fields = {256: (size,), 257: (size,), 258: bits, 259: (8,), 262: (2,), 277: (len(bits),), 278: (size,), 284: (1,)}
    fields |= {int(tag.removeprefix("tag")): values for tag, values in tags.items()}
    fields |= {324: (8,), 325: (9,)} if 322 in fields else {273: (8,), 279: (9,)}
    end, entries, beyond = 8 + 2 + 12 * len(fields) + 4, b"", b""
    for tag, values in sorted(fields.items()):
        packed = struct.pack(f"<{len(values)}I", *values)
        place = packed if len(values) == 1 else struct.pack("<I", end + len(beyond))
        beyond += packed if len(values) > 1 else b""
        entries += struct.pack("<HHI", tag, 4, len(values)) + place
    return b"II*\0" + struct.pack("<IH", 8, len(fields)) + entries + bytes(4) + beyond


@pytest.mark.parametrize(
    ("header", "limit"),
    [
        (tiff_header(9459, bits=(16, 16, 16)), None),
        (tiff_header(9459, bits=(16, 16, 16, 16), tag338=(2,)), 67_108_863),
        (tiff_header(64, tag322=(26_000,), tag323=(26_000,)), 542),  # a small image in a tile of 2 GB
        (tiff_header(64, tag322=(9_000,), tag323=(9_000,)), None),
    ],
)
def test_of_a_tiff_the_tile_and_the_bits_count_too(tmp_path, header, limit):
    (tmp_path / "photo.tif").write_bytes(header)
    words = f"x.* pixels, over the limit of {limit:,}; resize it" if limit else r"damaged \("
    with pytest.raises(ImageError, match=words):
        read_image(tmp_path / "photo.tif")


def broken_zlib():
    data = zlib.compress(b"\0" + bytes(8))
    sound = encoded(Image.new("L", (8, 8)), "PNG")
    at = sound.index(b"IDAT")
    return fuzz.with_right_checksums(patched(sound, at + 6, bytes([sound[at + 6] ^ 0xFF]) + data[1:3]))


SHOT = Image.effect_noise((64, 64), 60)


# A JPEG has no checksum, and its decoder goes on after damaged picture data as in every tool: what can be found is
# a file that ends too early, or whose headers are broken.
UNUSABLE = {
    "empty": (b"", "an empty file"),
    "text": (b"a cat, asleep\n", "not an image"),
    "HTML": (b"<!doctype html><title>404</title>", "not an image"),
    "EPS": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\n", "not an image"),
    "PDF": (b"%PDF-1.7\n1 0 obj <</Type /Catalog>> endobj\n", "not an image"),
    "truncated PPM": (b"P6 2 2 255\n\0\0\0", "damaged (image file is truncated"),
    "HEIC": (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", "HEIC; convert it to JPEG"),
    "HEIF": (b"\0\0\0\x18ftypmif1\0\0\0\0mif1heic", "HEIC; convert it to JPEG"),
    "32-bit integers": (encoded(Image.new("I", (4, 4), 70000), "TIFF"), "32-bit pixels; convert it to 8 or 16 bits"),
    "32-bit floats": (encoded(Image.new("F", (4, 4), 0.5), "TIFF"), "32-bit pixels; convert it to 8 or 16 bits"),
    "truncated JPEG": (encoded(SHOT, "JPEG")[:-400], "damaged (image file is truncated"),
    "truncated PNG": (encoded(SHOT, "PNG")[:-400], "damaged ("),
    "truncated GIF": (encoded(SHOT, "GIF")[:-400], "damaged (image file is truncated"),
    "truncated WebP": (encoded(SHOT, "WEBP")[:-100], "damaged (could not create decoder object)"),
    "truncated BMP": (encoded(SHOT, "BMP")[:-400], "damaged (image file is truncated"),
    "truncated TIFF": (encoded(SHOT, "TIFF", compression="tiff_deflate")[:-400], "damaged TIFF"),
    "bad deflate data": (patched(encoded(SHOT, "TIFF", compression="tiff_deflate"), 100, b"\0\xff\0"), "damaged ("),
    "bad CRC": (patched(encoded(SHOT, "PNG"), 200, b"\0\xff\0"), "damaged ("),
    "bad zlib data": (broken_zlib(), "damaged ("),
    "JPEG without tables": (encoded(SHOT, "JPEG").replace(b"\xff\xdb", b"\xff\xfe"), "damaged ("),
    "JPEG of a start alone": (b"\xff\xd8\xff\xe0" + bytes(60), "damaged ("),
    "a bomb": (png_of(50000, 50000), "over the limit of 89,478,485 pixels; resize it"),
}


@pytest.mark.parametrize("kind", UNUSABLE)
def test_an_unusable_image_is_skipped_in_training_with_path_and_reason(job, kind):
    content, reason = UNUSABLE[kind]
    Path("photo.jpg").write_bytes(content)
    add_line("train.txt", "photo.jpg 1\n")
    status, out, err = job()
    assert status == 0
    *before, last = err.splitlines()
    assert re.fullmatch(rf"warning: train.txt:13: photo.jpg: {re.escape(reason)}.*; skipped", last)
    assert len(before) == (kind in ("HEIC", "HEIF"))  # which are named before the pass, too
    assert load_checkpoint(Path("best.pth"))[1]["train_images"] == 12


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


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (SyntaxError("not a TIFF file"), "damaged (not a TIFF file)"),
        (ValueError("bad \x1b[2J chunk"), r"damaged (bad \x1b[2J chunk)"),
        (RuntimeError("stream\nbroken"), r"damaged (stream\nbroken)"),
        (OSError("broken data stream"), "damaged (broken data stream)"),
        (struct.error("unpack requires 4 bytes"), "damaged (unpack requires 4 bytes)"),
        (KeyError(7), "damaged (7)"),
        (MemoryError(), "out of memory"),
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
    with pytest.raises(ImageError) as caught:
        read_image(tmp_path / "photo.png")
    assert str(caught.value) == words


def test_ctrl_c_while_an_image_is_decoded_is_no_damaged_image(tmp_path, monkeypatch):
    put(tmp_path / "photo.png", Image.new("RGB", (4, 4)))

    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(Image, "open", interrupt)
    with pytest.raises(KeyboardInterrupt):
        read_image(tmp_path / "photo.png")


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

        monkeypatch.setattr("transfer.system.files.open", opened, raising=False)
    status, out, err = run_main(predict.main, "odd.png", "red/test_0.png", "--workers", 0)
    if kind == "directory":  # a folder is walked
        assert status == 2 and err.startswith("error: odd.png: no image in this folder; their names end in .jpg, ")
    else:
        assert (status, err) == (1, f"error: odd.png: {os.strerror(code).lower()}\n")
        assert out.startswith("red/test_0.png  ")


def test_2000_mutated_images_are_images_or_photo_errors(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    images = fuzz.images()
    assert {Image.open(io.BytesIO(content)).format for content in images[0]} == {*IMAGE_FORMATS, "MPO"}
    began = time.perf_counter()
    try_seeds(images, 2000)
    assert time.perf_counter() - began < 30


def test_avif_is_read_where_pillow_reads_it_and_named_with_what_to_do_where_not(tmp_path, monkeypatch):
    Image.new("RGB", (40, 30), (200, 40, 30)).save(tmp_path / "photo.avif")
    photo = read_image(tmp_path / "photo.avif")
    assert photo.size == (40, 30) and all(abs(a - b) < 9 for a, b in zip(photo.getpixel((20, 15)), (200, 40, 30)))
    monkeypatch.setattr("transfer.inputs.images.features.check", lambda name: False)
    with pytest.raises(ImageError, match="^AVIF, which this Pillow does not read; convert it to JPEG$"):
        read_image(tmp_path / "photo.avif")
