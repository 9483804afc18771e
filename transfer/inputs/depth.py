"""Depth: how many bits of 16-bit greyscale the images of a list use, where these are fewer than 16."""

import itertools

from transfer.inputs.images import GREY_BITS, used_bits
from transfer.inputs.lists import ImageList

SAMPLE = 1000  # images that are looked at, evenly over the list: of each a few bytes, of 16-bit greyscale all


def grey_bits_of(image_list: ImageList) -> tuple[int, list[str]]:
    """The bits from black to white of a list's 16-bit images, and a line for the header where these are not 16.

    The camera or scanner has so many, 8 or 12 as a rule: read as 16 its images would be all but black. One number for
    all, so that bright images stay brighter than dark ones.
    """
    paths = itertools.islice(image_list.each_path(), 0, None, max(1, -(-len(image_list) // SAMPLE)))
    used = [bits for bits in map(used_bits, paths) if bits]
    bits = max(used, default=GREY_BITS)
    if bits == GREY_BITS:
        return bits, []
    seen = f"the {len(used):,} looked at" if len(image_list) > SAMPLE else f"all {len(used):,}"
    note = f"16-bit greyscale uses {bits} bits ({seen}): made {2 ** (GREY_BITS - bits):,} times as bright"
    return bits, [f"          {note}"]
