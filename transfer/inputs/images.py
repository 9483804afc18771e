"""Images: a file of any allowed format to upright RGB pixels."""

import contextlib
import io
import os
import sys
import warnings
from collections.abc import Iterator

import numpy as np
from PIL import Image, ImageChops, ImageOps, JpegImagePlugin, features

from transfer.inputs.formats import HEAD, IMAGE_FORMATS, format_of, read_head
from transfer.inputs.repair import end_jpeg, has_one_scan, sound_png
from transfer.system.console import os_reason, printable
from transfer.system.files import open_regular

DRAFT_SIZE = (600, 600)  # a JPEG is decoded at an eighth, a quarter or half its size where that is no smaller
MAX_PIXELS = 89_478_485  # Pillow's own warning limit for decompression bombs
# What a format's pixel costs, in those of a plain image, which are three bytes: WebP and AVIF hold three canvases at
# once, of a still image too. A PPM of text, or of an odd depth, is decoded in Python. A TIFF's strip or tile is held
# whole, beside the image: of up to 48 bits a pixel that is in the limit, but a tile may be larger than its image.
COSTS = {"WEBP": 3, "AVIF": 3}
PYTHON_COST = 16
TIFF_BITS = 48
ONE_SCAN_COST = 1 / 8  # of a JPEG that is decoded row by row, at a reduced scale: 716 megapixels take two seconds
BITS_PER_SAMPLE, SAMPLES, TILE_WIDTH, TILE_LENGTH = 258, 277, 322, 323  # TIFF's tags
GREY_BITS = 16  # of 16-bit greyscale, where no fewer are used
GREY_ROWS = 64  # of it at a time: as numbers that can be computed with, pixels take several times the memory


class ImageError(Exception):
    """Why one image can't be used: its one argument, in words."""


class PassingReason(str):
    """Why an image can't be read now, which its bytes have no part in: another run may read it."""

    __slots__ = ()


def read_image(path: str | bytes | os.PathLike, grey_bits: int = GREY_BITS) -> Image.Image:
    """Decode one image to upright RGB, large JPEGs at reduced scale. Raises ImageError with the reason.

    grey_bits: of 16-bit greyscale, from black to white.
    """
    try:
        with open_regular(path) as file:
            return decode_image(file, grey_bits)
    except OSError as error:
        raise ImageError(PassingReason(os_reason(error))) from None
    except ValueError:  # of a name that no file system takes
        raise ImageError("a NUL character in its name") from None


def decode_image(file: io.BufferedIOBase, grey_bits: int = GREY_BITS) -> Image.Image:
    """The image in an open file, as `read_image` gives it."""
    head = file.read(HEAD)
    if not head:
        raise ImageError("an empty file")
    file.seek(0)
    format = format_of(head)
    if format == "AVIF" and not features.check("avif"):
        raise ImageError("AVIF, which this Pillow does not read; convert it to JPEG")
    if format == "HEIC":
        raise ImageError("HEIC; convert it to JPEG")
    with pillow_errors(format):
        return as_rgb(upright(load_pixels(file, format)), grey_bits)


@contextlib.contextmanager
def pillow_errors(format: str | None) -> Iterator[None]:
    """Raise ImageError for nearly every exception there is, which Pillow raises on damaged bytes; and let neither it
    nor the TIFF library, which has its own way to stderr, say anything besides.
    """
    try:
        with warnings.catch_warnings(), quiet_stderr() if format == "TIFF" else contextlib.nullcontext():
            warnings.simplefilter("ignore")
            yield
    except ImageError:
        raise
    except Image.UnidentifiedImageError:
        raise ImageError(f"damaged {format}" if format else "not an image") from None
    except Image.DecompressionBombError:
        raise ImageError(f"over the limit of {MAX_PIXELS:,} pixels; resize it") from None
    except MemoryError:
        raise ImageError(PassingReason("out of memory")) from None
    except Exception as error:
        if isinstance(error, OSError) and error.errno:  # the system's, not the decoder's
            raise ImageError(PassingReason(os_reason(error))) from None
        raise ImageError(f"damaged ({printable(str(error)) or type(error).__name__})") from None


@contextlib.contextmanager
def quiet_stderr() -> Iterator[None]:
    """What a library writes to stderr by itself goes nowhere: it names no file."""
    sys.stderr.flush()
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


def load_pixels(file: io.BufferedIOBase, format: str | None) -> Image.Image:
    """The image in an open file, decoded; also one that lacks no pixels, only what ends or describes them.

    Raises whatever Pillow does.
    """
    try:
        return load_image(file, format)
    except (OSError, SyntaxError, ValueError) as error:
        file.seek(0)
        if format == "PNG" and (whole := sound_png(file)):
            return load_image(whole, format)
        if format == "JPEG" and "truncated" in str(error) and (ended := end_jpeg(file)):
            first, *others = (load_image(each, format) for each in ended)
            if all(other.tobytes() == first.tobytes() for other in others):
                return first
        raise


def load_image(file: io.BufferedIOBase, format: str | None) -> Image.Image:
    """The image in an open file, decoded as it is."""
    image = open_image(file, format)
    if format == "PNG":  # reading pixels skips their checksums
        image.verify()
        file.seek(0)
        image = open_image(file, format)
    image.draft("RGB", DRAFT_SIZE)
    image.load()
    return image


def open_image(file: io.BufferedIOBase, format: str | None) -> Image.Image:
    """The image in an open file, not yet decoded. Raises ImageError where decoding it would take too much memory."""
    if format == "JPEG":
        one_scan = has_one_scan(file)
        file.seek(0)
        # Past Image.open, which refuses what is over twice its limit, whatever it takes.
        image = JpegImagePlugin.jpeg_factory(file)
        cost = ONE_SCAN_COST if one_scan else coefficient_cost(image)
    else:
        image = Image.open(file, formats=IMAGE_FORMATS)
        in_python = image.tile and image.tile[0][0].startswith("ppm")
        cost = tiff_cost(image) if image.format == "TIFF" else COSTS.get(image.format, 1)
        cost = PYTHON_COST if in_python else cost
    if image.width * image.height * cost > MAX_PIXELS:
        limit = f"{int(MAX_PIXELS / cost):,}{f' for {image.format}' if image.format in COSTS else ''}"
        raise ImageError(f"{image.width}x{image.height} pixels, over the limit of {limit}; resize it")
    return image


def tiff_cost(image: Image.Image) -> float:
    """What a pixel of a TIFF costs, with its share of the largest tile."""
    bits, samples, width, length = (
        max(value) if isinstance(value := image.tag_v2.get(tag, 1), tuple) else value
        for tag in (BITS_PER_SAMPLE, SAMPLES, TILE_WIDTH, TILE_LENGTH)
    )
    tile = width * length / max(1, image.width * image.height)
    return max(1, tile) * max(1, bits * samples / TIFF_BITS)


def coefficient_cost(image: JpegImagePlugin.JpegImageFile) -> float:
    """What a pixel of a JPEG costs that is held whole before any of it is decoded: two bytes a coefficient."""
    shares = [across * down for _, across, down, _ in image.layer]
    return min(
        1, sum(shares) / max(across for _, across, _, _ in image.layer) / max(down for _, _, down, _ in image.layer) / 3
    )


def upright(image: Image.Image) -> Image.Image:
    """The image itself, turned as its EXIF orientation says; as stored where that can't be read."""
    with contextlib.suppress(Exception):  # damaged EXIF raises anything; the pixels are sound
        ImageOps.exif_transpose(image, in_place=True)
    return image


def from_pil(image: Image.Image, grey_bits: int = GREY_BITS) -> Image.Image:
    """A PIL image as `read_image` gives its file; the caller's own stays as it is. Raises ImageError."""
    with pillow_errors(image.format):
        copy = image.copy()  # which lacks what says how its grey is to be read
        copy.format = image.format
        if hasattr(image, "tag_v2"):
            copy.tag_v2 = image.tag_v2
        return as_rgb(upright(copy), grey_bits)


def as_rgb(image: Image.Image, grey_bits: int = GREY_BITS) -> Image.Image:
    """Any mode as RGB: transparency on white, 16-bit grey scaled to 8. Raises ImageError for pixels of more bits.

    grey_bits: of 16-bit grey, from black to white, where the file does not say.
    """
    if is_grey16(image):
        grey, depth = Image.new("L", image.size), own_depth(image) or grey_bits
        for top, values in grey16_rows(image):
            grey.paste(Image.fromarray(np.clip(values << GREY_BITS >> depth >> 8, 0, 255).astype(np.uint8)), (0, top))
        return grey.convert("RGB")
    if image.mode in ("I", "F"):
        if tiff_tag(image, BITS_PER_SAMPLE) == 16:
            raise ImageError("16-bit pixels with a sign; convert it to 8 or 16 bits without")
        raise ImageError("32-bit pixels; convert it to 8 or 16 bits")
    if image.has_transparency_data:
        # No copy more than this: of the largest images each is a third of a gigabyte.
        alpha = (image if image.mode in ("RGBA", "LA") else image.convert("RGBA")).getchannel("A")
        colour = image.convert("RGB")
        colour.paste("white", mask=ImageChops.invert(alpha))
        return colour
    return image if image.mode == "RGB" else image.convert("RGB")


# 16-bit greyscale


def tiff_tag(image: Image.Image, tag: int) -> int | None:
    """A number that a TIFF says of its one channel; None where there is none, or several."""
    values = getattr(image, "tag_v2", {}).get(tag, ())
    return values[0] if isinstance(values, tuple) and len(values) == 1 and isinstance(values[0], int) else None


def is_grey16(image: Image.Image) -> bool:
    """Whether pixels are whole numbers from 0 to 65,535; of a PGM Pillow widens them to 32 bits."""
    return image.mode.startswith("I;16") or image.mode == "I" and image.format == "PPM"


def grey16_rows(image: Image.Image) -> Iterator[tuple[int, np.ndarray]]:
    """Its pixels (rows, width), some rows at a time, each with the number of the first."""
    for top in range(0, image.height, GREY_ROWS):
        strip = image.crop((0, top, image.width, min(top + GREY_ROWS, image.height)))
        yield top, np.asarray(strip).astype(np.int64)


def own_depth(image: Image.Image) -> int | None:
    """How many of 16 bits a TIFF says that it has, where that is not all."""
    bits = tiff_tag(image, BITS_PER_SAMPLE)
    return bits if bits and 8 < bits < GREY_BITS else None


def used_bits(path: str | bytes | os.PathLike) -> int:
    """How many bits the pixels of a 16-bit greyscale image use; 0 for any other, or one with a depth of its own, and
    for what can't be read.
    """
    with contextlib.suppress(OSError, ValueError, ImageError):
        head = read_head(path)
        format = format_of(head)
        if format in ("TIFF", "PPM") or format == "PNG" and head[24:26] == b"\x10\0":  # 16 bits, greyscale
            with open_regular(path) as file, pillow_errors(format):
                if is_grey16(image := open_image(file, format)) and not own_depth(image):
                    file.seek(0)
                    return int(max(rows.max() for _, rows in grey16_rows(load_pixels(file, format)))).bit_length()
    return 0
