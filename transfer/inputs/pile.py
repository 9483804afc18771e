"""Piles: the photos to choose from, each content once, less those that are labelled already."""

import hashlib
import os
import sys
from collections import defaultdict
from collections.abc import Callable, Sequence

from transfer.inputs.lists import ImageList
from transfer.inputs.sources import Source
from transfer.inputs.stdin import read_stdin_paths
from transfer.system.console import UserError, plural
from transfer.system.files import open_regular
from transfer.system.signals import check_stop

HEAD = 1 << 12  # bytes of a file in which nearly all photos of one size differ


def file_size(path: bytes) -> int | bytes:
    return os.stat(path).st_size or path  # empty files are no photos, and so no copies: each is told of


def head_digest(path: bytes) -> bytes:
    with open_regular(path) as file:
        return hashlib.sha256(file.read(HEAD)).digest()


def content_digest(path: bytes) -> bytes:
    digest = hashlib.sha256()
    with open_regular(path) as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.digest()


def read_key(read: Callable[[bytes], object], path: bytes) -> object:
    """What a function reads of a file; of one that can't be read its path."""
    check_stop()
    try:
        return read(path)
    except (OSError, ValueError):  # the latter of a name that no file system takes
        return path


def first_copies(paths: Sequence[bytes]) -> list[int]:
    """Of each path the first place of one with the same bytes in it, its own where there is none before.

    Only what has the size of another is read, and only what begins alike is read to its end.
    """
    first, groups = [*range(len(paths))], [range(len(paths))]
    for read in (file_size, head_digest, content_digest):
        parts = defaultdict(list)
        for number, group in enumerate(groups):
            for place in group:
                parts[number, read_key(read, paths[place])].append(place)
        groups = [part for part in parts.values() if len(part) > 1]
    for group in groups:
        for place in group:
            first[place] = group[0]
    return first


def read_pile(sources: Sequence[Source], leave_out: Sequence[Source]) -> ImageList:
    """The photos to choose from, those of the sources or else on standard input, each once, without the photos to leave
    out; how many that concerns is said. Raises UserError where none is left.
    """
    labelled, paths = ([path for each in some for path in each.image_list.each_path()] for some in (leave_out, sources))
    paths = paths if sources else read_stdin_paths()
    first, start = first_copies([*labelled, *paths]), len(labelled)
    chosen = [path for place, path in enumerate(paths, start) if first[place] == place]
    known = sum(place < start for place in first[start:])
    left_out = f"{known:,} in --except, {plural(len(paths) - known - len(chosen), 'copy', 'copies')}"
    if not chosen:
        why = f"all are left out ({left_out})" if paths else "none is on standard input"
        raise UserError(f"no photo to label: {why}; name others")
    if len(chosen) < len(paths):
        print(f"left out {left_out}; {plural(len(chosen), 'photo')} to choose from", file=sys.stderr)
    return ImageList("pile", chosen, [0] * len(chosen), range(len(chosen)))
