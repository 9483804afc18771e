"""HEIC: an iPhone's photos, which can't be read, named before the pass with the command that converts them."""

import contextlib
import os
import sys
from collections.abc import Sequence

from transfer.inputs.formats import format_of, read_head
from transfer.inputs.lists import ImageList, most_unreadable
from transfer.system.console import UserError, first_three, plural, printable, quoted, summarise, warn

SUFFIXES = (".heic", ".heif")
SAMPLE = 1000  # images of other names that are opened, evenly over the list; where one of them is HEIC, all are
# A shell command that converts the HEIC photos in a folder, by sys.platform, and renames the originals.
FIND = "find {} -iname '*.hei[cf]' -exec "
COMMANDS = {
    "darwin": FIND + "sips -s format jpeg {{}} --out {{}}.jpg \\; -exec mv {{}} {{}}.original \\;",
    "win32": 'gci {} -r -i *.heic,*.heif | % {{ magick $_ "$_.jpg"; ren $_ "$($_.Name).original" }} '
    "(needs ImageMagick)",
    "linux": FIND + "heif-convert {{}} {{}}.jpg \\; -exec mv {{}} {{}}.original \\; (needs libheif-examples)",
}


def check_heic(train: ImageList, held_out: Sequence[ImageList]) -> None:
    """Name the HEIC photos, which can't be read, all at once and before the pass, with how to convert them. Raises
    UserError where they are more than a hundredth of the training images, or any that are held out.
    """
    name_heic(train, most_unreadable(train))
    for image_list in held_out:
        name_heic(image_list, 0)


def name_heic(image_list: ImageList, most: int) -> None:
    """`check_heic` of one list, of which so many may be left out."""
    rows = heic_rows(image_list)
    if not rows:
        return
    lines = [image_list.where(row) for row in rows]
    total = f"{image_list.name}: {plural(len(rows), 'HEIC photo')}, which can't be read"
    paths = [image_list.path(row) for row in rows]
    folders = [os.path.dirname(path) for path in paths]
    if len(set(map(os.path.isabs, folders))) > 1:
        folders = [os.path.abspath(folder) for folder in folders]
    common = folders[0]
    with contextlib.suppress(ValueError):  # on Windows they may be on several drives
        common = os.path.commonpath(folders)
    fix = f"to convert: {heic_command(common)}"
    if misnamed := [path for path in paths if not has_heic_name(path)]:
        fix = f"rename {first_three(list(map(printable, misnamed)))} to .heic; {fix}"
    fix = fix if image_list.classes else f"name JPEGs in the list; {fix}"
    if len(rows) > most:
        raise UserError(*summarise(lines, total, fix))
    warn(f"{total}: {first_three(lines)}; skipped; {fix}")


def heic_rows(image_list: ImageList) -> list[int]:
    """The rows of HEIC photos; some bear the name of a JPEG, and some JPEGs theirs."""

    def found(step: int) -> list[int]:
        rows = enumerate(image_list.each_path())
        return [row for row, path in rows if (row % step == 0 or has_heic_name(path)) and is_heic(path)]

    step = max(1, len(image_list) // SAMPLE)
    rows = found(step)
    return rows if step == 1 or all(has_heic_name(image_list.path(row)) for row in rows) else found(1)


def has_heic_name(path: bytes) -> bool:
    return os.fsdecode(path).lower().endswith(SUFFIXES)


def is_heic(path: bytes) -> bool:
    """Whether a file is a HEIC photo by its first bytes."""
    try:
        return format_of(read_head(path)) == "HEIC"
    except OSError:
        return False


def heic_command(folder: bytes) -> str:
    """What converts the HEIC photos in a folder, to be pasted into a shell."""
    return COMMANDS.get(sys.platform, COMMANDS["linux"]).format(quoted(folder or b"."))
