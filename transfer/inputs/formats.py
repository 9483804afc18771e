"""Formats: what a file's name and its first bytes say of the image in it."""

import os

from transfer.system.files import open_regular

IMAGE_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "PPM")  # MPO opens as JPEG, PGM and PBM as PPM
SUFFIXES = (
    *(".jpg", ".jpeg", ".jpe", ".jif", ".jfif", ".png", ".apng", ".webp", ".gif", ".bmp", ".dib", ".tif", ".tiff"),
    *(".mpo", ".avif", ".avifs", ".ppm", ".pgm", ".pbm", ".pnm"),
    *(".heic", ".heif"),  # not read, but named
)
# Of what lies beside photos: these files are not opened to see what they hold.
OTHER_SUFFIXES = (
    *(".txt", ".csv", ".tsv", ".json", ".xml", ".yaml", ".yml", ".md", ".html", ".pdf", ".doc", ".docx", ".xls"),
    *(".xlsx", ".ini", ".db", ".py", ".ipynb", ".mat", ".npy", ".npz", ".pth", ".zip", ".gz", ".tar", ".rar", ".7z"),
    *(".mp3", ".mp4", ".mov", ".avi", ".mkv", ".xmp", ".aae"),
)
HEAD = 32  # bytes, which tell the format
HEIF_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"mif1", b"msf1")
BMP_HEADERS = (12, 16, 40, 52, 56, 64, 108, 124)  # their sizes: 'BM' alone begins many a text


def format_of(head: bytes) -> str | None:
    """The format that a file's first bytes claim, by Pillow's name or as HEIC; None where they claim none."""
    for format, signature in (("JPEG", b"\xff\xd8\xff"), ("PNG", b"\x89PNG\r\n\x1a\n"), ("GIF", b"GIF8")):
        if head.startswith(signature):
            return format
    if head.startswith((b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")):
        return "TIFF"
    if head[:4] == b"RIFF" and head[8:12] == b"WEBP":
        return "WEBP"
    if head[4:8] == b"ftyp":
        if b"avif" in head[8:] or b"avis" in head[8:]:
            return "AVIF"
        return "HEIC" if head[8:12] in HEIF_BRANDS else None
    if head[:2] == b"BM" and int.from_bytes(head[14:18], "little") in BMP_HEADERS:
        return "BMP"
    if head[:1] == b"P" and head[1:2] in tuple(b"%d" % kind for kind in range(1, 7)) and head[2:3].isspace():
        return "PPM"
    return None


def read_head(path: str | bytes | os.PathLike) -> bytes:
    """The first bytes of a regular file. Raises OSError."""
    with open_regular(path) as file:
        return file.read(HEAD)


def is_image(path: bytes) -> bool:
    """Whether a file is an image by its ending; where that says nothing, by its first bytes."""
    ending = os.fsdecode(path).lower()
    if ending.endswith(SUFFIXES):
        return True
    try:
        return not ending.endswith(OTHER_SUFFIXES) and format_of(read_head(path)) is not None
    except OSError:
        return False
