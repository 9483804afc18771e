"""Repair: what lacks no pixels is read as the whole file is, and nothing else."""

import io

import fuzz
import numpy as np
import pytest
from PIL import Image

from transfer.inputs.images import ImageError, decode_image
from transfer.inputs.repair import has_one_scan, sound_png

PHOTO = Image.merge("RGB", [Image.effect_noise((61, 43), 60) for _ in range(3)])
SAVED = {
    name: (lambda file: (PHOTO.save(file, **options), file.getvalue())[1])(io.BytesIO())
    for name, options in {
        "JPEG": {"format": "JPEG", "quality": 90},
        "JPEG 4:4:4": {"format": "JPEG", "subsampling": 0},
        "progressive": {"format": "JPEG", "progressive": True},
        "PNG": {"format": "PNG"},
    }.items()
}


def pixels(content):
    return np.asarray(decode_image(io.BytesIO(content)))


@pytest.mark.parametrize("name", ["JPEG", "JPEG 4:4:4"])
@pytest.mark.parametrize("lost", [1, 2])
def test_a_jpeg_without_its_end_marker_has_all_its_pixels(name, lost):
    assert np.array_equal(pixels(SAVED[name][:-lost]), pixels(SAVED[name]))


@pytest.mark.parametrize("lost", [4, 5, 6, 10, 40, 400])
def test_a_jpeg_that_lacks_pixels_stays_damaged(lost):
    with pytest.raises(ImageError, match=r"^damaged \(image file is truncated"):
        pixels(SAVED["JPEG"][:-lost])


def test_only_a_baseline_jpeg_has_one_scan():
    assert has_one_scan(io.BytesIO(SAVED["JPEG"])) and has_one_scan(io.BytesIO(SAVED["JPEG 4:4:4"]))
    assert not has_one_scan(io.BytesIO(SAVED["progressive"])) and not has_one_scan(io.BytesIO(b"\xff\xd8\xff"))


def chunk_at(content, kind):
    return content.index(kind) - 4


def with_text(content, wrong):
    """The PNG with a chunk of text, whose checksum is wrong."""
    text = fuzz.with_right_checksums(content[:33] + b"\0\0\0\4tEXta\0bc" + bytes(4) + content[33:])
    return text.replace(b"a\0bc", b"a\0bd") if wrong else text


def test_a_png_without_its_end_or_with_a_bad_checksum_beside_its_pixels_has_them_all():
    png = SAVED["PNG"]
    broken = [png[:-4], png[:-12], png[:-12] + b"\0\0\0", with_text(png, True), with_text(png, True)[:-12]]
    for content in broken:
        assert np.array_equal(pixels(content), np.asarray(PHOTO))
    assert np.array_equal(pixels(with_text(png, False)), np.asarray(PHOTO))


def test_a_png_whose_pixels_are_damaged_stays_so_and_is_never_called_no_image():
    png = SAVED["PNG"]
    at = png.index(b"IDAT")
    for content in (png[: at + 60], png[: at + 40] + b"\1" + png[at + 41 :], png[:20], png[:8], png[:-12][:-1]):
        with pytest.raises(ImageError, match="^damaged"):
            pixels(content)
    assert sound_png(io.BytesIO(png[: at - 4])) is None


@pytest.mark.parametrize("content", [b"\xff\xd8\xff\xe0" + bytes(60), b"GIF89a", b"II*\0" + bytes(9)])
def test_what_claims_a_format_is_damaged_rather_than_no_image(content):
    with pytest.raises(ImageError, match="^damaged"):
        pixels(content)
