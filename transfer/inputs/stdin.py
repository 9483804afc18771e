"""Paths that arrive on standard input: read ahead, given out in batches, kept until they are answered."""

import contextlib
import itertools
import queue
import sys
import threading
from collections import deque
from collections.abc import Iterator

from transfer.system.console import UserError, os_reason
from transfer.system.signals import check_stop

CHUNK = 1 << 16  # bytes of standard input read at a time, and more than any path has
CHUNKS_AHEAD = 4  # what is read before it is needed, so that an endless pipe takes no more


def is_utf16(start: bytes) -> bool:
    """Whether text begins as UTF-16 does: with its mark, or with a NUL beside each of some letters."""
    marked = start.startswith((b"\xff\xfe", b"\xfe\xff"))
    return marked or len(start) >= 8 and not (any(start[1:8:2]) and any(start[:8:2]))


def read_lines(found: queue.Queue) -> None:
    """Put the lines of standard input into a queue, a list a read; None after the last, or a UserError.

    Where there is a NUL in what comes first, NULs end them.
    """
    rest, source, end = b"", getattr(sys.stdin, "buffer", None), None
    try:
        # Past the buffer: its lock, held by this thread while it waits, would keep the interpreter from ending.
        while source and (chunk := source.raw.read(CHUNK)):
            if end is None:
                if is_utf16(chunk):
                    found.put(UserError("standard input: looks like UTF-16; give it as UTF-8", status=1))
                    return
                chunk = chunk.removeprefix(b"\xef\xbb\xbf")
                end = b"\0" if b"\0" in chunk else b"\n"  # as of `find -print0`, whose names may hold line breaks
            *lines, rest = (rest + chunk).split(end)
            found.put(lines if end == b"\0" else [line.rstrip(b"\r") for line in lines])
            if len(rest) > CHUNK:
                found.put(UserError("standard input: a line too long for a path; give one path a line", status=1))
                return
        found.put([rest if end == b"\0" else rest.rstrip(b"\r")])
        found.put(None)
    except OSError as error:
        found.put(UserError(f"standard input: {os_reason(error)}; pipe paths into it, one a line", status=1))


class StdinPaths:
    """The paths on standard input, one per line or NUL, as rows (number, path) for `embed_batches`.

    pending: rows that have arrived and have no answer, oldest first; given: how many of them are given out.
    """

    def __init__(self, batch_size: int):
        self.batch_size, self.count, self.ended = batch_size, 0, False
        self.pending, self.given = deque(), 0
        self.found = queue.Queue(CHUNKS_AHEAD)
        threading.Thread(target=read_lines, args=(self.found,), daemon=True).start()

    def batches(self, few: bool) -> Iterator[list[tuple[int, bytes]]]:
        """Batches of what has no answer yet, then of what arrives; if few, only until more than a batch is there.

        A DataLoader asks for more batches before it hands out an answer, and whoever writes the paths may wait for
        that answer: so where none is there but some are unanswered, an empty batch is given.
        """
        self.given = 0
        while True:
            if len(self.pending) - self.given <= self.batch_size:
                self.receive(wait=not self.pending)
            if few and len(self.pending) > self.batch_size:
                return
            batch = [*itertools.islice(self.pending, self.given, self.given + self.batch_size)]
            if self.ended and not batch:
                return
            self.given += len(batch)
            yield batch

    def receive(self, wait: bool) -> None:
        """Add the next paths, if they are there or to be waited for. Raises UserError (status 1)."""
        with contextlib.suppress(queue.Empty):
            while not self.ended:
                lines = self.found.get(block=wait)
                if isinstance(lines, UserError):
                    raise lines
                self.ended = lines is None
                paths = [line for line in lines or () if line.strip()]
                self.pending.extend(enumerate(paths, self.count))
                self.count += len(paths)
                if paths:
                    return

    def mark_answered(self) -> None:
        """The oldest row has its answer."""
        self.pending.popleft()
        self.given -= 1


def read_stdin_paths() -> list[bytes]:
    """All paths on standard input, once it has ended. Raises UserError (status 1) where it can't be read as lines."""
    paths = StdinPaths(batch_size=0)
    while not paths.ended:
        check_stop()
        paths.receive(wait=True)
    return [path for _, path in paths.pending]


class PathRows:
    """Stands for an `ImageList` where rows are (number, path) themselves."""

    def path(self, row: tuple[int, bytes]) -> bytes:
        return row[1]
