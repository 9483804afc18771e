"""Images: a file of any allowed format to upright RGB pixels."""

import contextlib
import io
import os
import warnings

import numpy as np
from PIL import Image, ImageChops, ImageOps, features

from transfer.console import os_reason, printable
from transfer.files import open_regular

DRAFT_SIZE = (600, 600)  # a JPEG is decoded at an eighth, a quarter or half its size where that is no smaller
MAX_PIXELS = 89_478_485  # Pillow's own warning limit for decompression bombs
IMAGE_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF")  # MPO opens as JPEG
CANVASES = {"WEBP": 3, "AVIF": 3}  # that a decoder holds at once, of a still image too, where more than one
SUFFIXES = (
    *(".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".mpo", ".avif"),
    *(".heic", ".heif"),  # not read, but named
)


class ImageError(Exception):
    """Why one image can't be used: its one argument, in words."""


class PassingReason(str):
    """Why an image can't be read now, which its bytes have no part in: another run may read it."""

    __slots__ = ()


def read_image(path: str | bytes | os.PathLike) -> Image.Image:
    """Decode one image to upright RGB, large JPEGs at reduced scale. Raises ImageError with the reason."""
    try:
        with open_regular(path) as file:
            return decode_image(file)
    except OSError as error:
        raise ImageError(PassingReason(os_reason(error))) from None


def decode_image(file: io.BufferedIOBase) -> Image.Image:
    """The image in an open file, as `read_image` gives it."""
    head = file.read(32)
    file.seek(0)
    if head[4:8] == b"ftyp":
        if b"avif" in head[8:] or b"avis" in head[8:]:
            if not features.check("avif"):
                raise ImageError("AVIF, which this Pillow does not read; convert it to JPEG")
        elif head[8:12] in (b"heic", b"heix", b"heim", b"heis", b"hevc", b"mif1", b"msf1"):
            raise ImageError("HEIC; convert it to JPEG")
    # Pillow raises nearly every exception there is on damaged bytes, and warns of what is handled here.
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            image = Image.open(file, formats=IMAGE_FORMATS)
            canvases = CANVASES.get(image.format, 1)
            if image.width * image.height * canvases > MAX_PIXELS:
                limit = f"{MAX_PIXELS // canvases:,}{f' for {image.format}' if canvases > 1 else ''}"
                raise ImageError(f"{image.width}x{image.height} pixels, over the limit of {limit}")
            if image.format == "PNG":  # reading pixels skips their checksums
                image.verify()
                file.seek(0)
                image = Image.open(file, formats=IMAGE_FORMATS)
            image.draft("RGB", DRAFT_SIZE)
            image.load()
            return as_rgb(upright(image))
    except ImageError:
        raise
    except (Image.UnidentifiedImageError, Image.DecompressionBombError) as error:
        bomb = isinstance(error, Image.DecompressionBombError)
        raise ImageError(f"over the limit of {MAX_PIXELS:,} pixels" if bomb else "not an image") from None
    except MemoryError:
        raise ImageError(PassingReason("out of memory")) from None
    except Exception as error:
        if isinstance(error, OSError) and error.errno:  # the system's, not the decoder's
            raise ImageError(PassingReason(os_reason(error))) from None
        raise ImageError(f"damaged ({printable(str(error)) or type(error).__name__})") from None


def upright(image: Image.Image) -> Image.Image:
    """The image itself, turned as its EXIF orientation says; as stored where that can't be read."""
    with contextlib.suppress(Exception):  # damaged EXIF raises anything; the pixels are sound
        ImageOps.exif_transpose(image, in_place=True)
    return image


def as_rgb(image: Image.Image) -> Image.Image:
    """Any mode as RGB: transparency on white, 16-bit grey scaled to 8. Raises ImageError for 32-bit pixels."""
    if image.mode in ("I", "F"):
        raise ImageError("32-bit pixels; convert it to 8 or 16 bits")
    if image.mode.startswith("I;16"):
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        # No copy more than this: of the largest images each is a third of a gigabyte.
        alpha = (image if image.mode in ("RGBA", "LA") else image.convert("RGBA")).getchannel("A")
        colour = image.convert("RGB")
        colour.paste("white", mask=ImageChops.invert(alpha))
        return colour
    return image if image.mode == "RGB" else image.convert("RGB")
