"""Repair: JPEGs and PNGs that lack no pixels, only what ends or describes them."""

import io
import zlib

MAX_BYTES = 1 << 26  # of a file that is held in memory for it
END = b"\xff\xd9"  # JPEG's end marker
PNG_PIXELS = (b"IHDR", b"PLTE", b"tRNS", b"IDAT")  # the chunks on which they depend
PNG_FRAMES = (b"acTL", b"fcTL", b"fdAT")  # of an animation after its first image


def has_one_scan(file: io.BufferedIOBase) -> bool:
    """Whether a JPEG is baseline, all colours in one scan, so that its decoder holds some rows of it at a time."""
    baseline, components = False, 0
    file.seek(2)
    while len(start := file.read(4)) == 4 and start[0] == 0xFF and 0xC0 <= start[1] < 0xFF:
        length = int.from_bytes(start[2:], "big")
        if start[1] == 0xDA:  # the first scan: how many of the components it holds
            return baseline and file.read(1) == bytes([components])
        segment = file.read(max(0, length - 2))
        if start[1] in (0xC0, 0xC1) and len(segment) > 5:
            baseline, components = True, segment[5]
    return False


def end_jpeg(file: io.BufferedIOBase) -> list[io.BytesIO]:
    """A baseline JPEG without its end marker, ended in several ways: with the marker, and with one after other bytes.

    Where all decode to the same pixels, none was missing: any that is would be made of those bytes. Of others nothing.
    """
    if not has_one_scan(file):
        return []
    file.seek(0)
    content = file.read(MAX_BYTES)
    if len(content) == MAX_BYTES:
        return []
    content = content.removesuffix(END[:1])
    return [io.BytesIO(content + other + END) for other in (b"", bytes(999), b"\x55" * 999, b"\xb6\xdb\x6d" * 333)]


def sound_png(file: io.BufferedIOBase) -> io.BytesIO | None:
    """A PNG without what is damaged in it, and with an end; None where its pixels depend on that."""
    content, chunks, at = file.read(MAX_BYTES), [], 8
    while at + 12 <= len(content):
        end = at + 12 + int.from_bytes(content[at : at + 4], "big")
        kind, chunk = content[at + 4 : at + 8], content[at:end]
        sound = len(chunk) == end - at and zlib.crc32(chunk[4:-4]).to_bytes(4, "big") == chunk[-4:]
        if not sound and (kind in PNG_PIXELS or not kind.isalpha()):
            return None
        if kind == b"IEND":
            break
        if sound and kind not in PNG_FRAMES:
            chunks.append(chunk)
        at = end
    if len(content) == MAX_BYTES or not any(chunk[4:8] == b"IDAT" for chunk in chunks):
        return None
    ending = bytes(4) + b"IEND"
    return io.BytesIO(content[:8] + b"".join(chunks) + ending + zlib.crc32(b"IEND").to_bytes(4, "big"))
