"""Console: messages, errors in one line, progress."""

import contextlib
import difflib
import errno
import functools
import io
import os
import shlex
import signal
import socket
import sys
import time
import unicodedata
from collections.abc import Iterator, Sequence, Sized
from pathlib import Path

import torch
from torch import distributed as dist

from transfer.distributed import get_rank, is_distributed
from transfer.system.signals import NAMES, check_stop, status_of, stop_on_signals

SHOWN_PROBLEMS = 10
QUIET = 5  # seconds that a step takes without a word


class Saves:
    """Whether this run has saved a file, which then is whole."""

    any = False


class UserError(Exception):
    """What the user can fix: one line each, and the exit status (2: before work, 1: during)."""

    def __init__(self, *lines: str, status: int = 2):
        super().__init__("\n".join(lines))
        self.lines, self.status = lines, status


def printable(name: str | bytes | os.PathLike) -> str:
    """A name as it may be printed: control characters and broken encodings escaped."""
    text = os.fsdecode(name)
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "backslashreplace").decode() for c in text)


def quoted(path: str | bytes | os.PathLike) -> str:
    """A path as it may be printed and pasted into a shell."""
    return shlex.quote(printable(path))


def os_reason(error: OSError) -> str:
    """What the operating system says went wrong, as part of a sentence."""
    return (error.strerror or str(error)).lower()


def plural(count: int, noun: str, nouns: str | None = None) -> str:
    """A number of things: 1 label, 2 labels. nouns: where these are not the noun and an s."""
    return f"{count:,} {noun if count == 1 else nouns or noun + 's'}"


def letters(text: str) -> int:
    """How many letters wide a text is in a terminal: East Asian ones count twice, accents of their own not at all."""
    return sum(2 if unicodedata.east_asian_width(each) in "WF" else not unicodedata.combining(each) for each in text)


def shortened(name: str, most: int) -> str:
    """A name as it may be printed, of one that is wider than so many letters its beginning."""
    text = printable(name)
    if letters(text) <= most:
        return text
    while letters(text) >= most:
        text = text[:-1]
    return text + "…"


def padded(text: str, width: int) -> str:
    """Text and as many spaces as make it so many letters wide."""
    return text + " " * (width - letters(text))


def first_three(items: Sequence) -> str:
    """The first three of some items, and how many follow."""
    rest = f" and {len(items) - 3:,} more" if len(items) > 3 else ""
    return ", ".join(str(item) for item in items[:3]) + rest


def nearest_path(path: Path) -> str:
    """The end of an error about a path that is not there: the most similar name beside it, if there is one."""
    if os.path.lexists(path):
        return ""
    try:
        near = difflib.get_close_matches(path.name, os.listdir(path.parent), 1)
    except OSError:
        near = []
    return f"; did you mean {quoted(path.parent / near[0])}?" if near else ""


def summarise(problems: Sequence[str], total: str, fix: str) -> list[str]:
    """The lines of the first ten problems, and a last one: their total in words, and how to fix them."""
    cut = f", {SHOWN_PROBLEMS} of them shown" if len(problems) > SHOWN_PROBLEMS else ""
    return [*problems[:SHOWN_PROBLEMS], f"{total}{cut}; {fix}"]


def script_command(name: str) -> list[str]:
    """The words that start one of the scripts in this folder."""
    path = Path(__file__).resolve().parents[2] / name
    return ["python", str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)]


def as_argument(path: Path) -> str:
    """A path as a command takes it: one that begins with a dash is no flag."""
    return f"./{path}" if str(path).startswith("-") else str(path)


def predict_command(words: Sequence[str], model: Path, root: Path = Path(), corrections: Sequence[Path] = ()) -> str:
    """predict.py with these words and what it does not find by itself, to be pasted into a shell in this folder."""
    command = [*script_command("predict.py"), *words]
    command += ["--model", as_argument(model)] if model != Path("best.pth") else []
    command += ["--root", as_argument(root)] if root != Path() else []
    command += [word for path in corrections for word in ("--corrections", as_argument(path))]
    return shlex.join(command)


def out_of_memory(error: RuntimeError | MemoryError) -> bool:
    """Whether a device, or the CPU, said that its memory is too small; not all of them have an exception for it."""
    words = str(error)
    return (
        isinstance(error, torch.OutOfMemoryError | MemoryError)
        or "out of memory" in words
        or "can't allocate memory" in words
    )


def warn(*texts: str) -> None:
    for text in texts if get_rank() == 0 else ():
        print(f"warning: {text}", file=sys.stderr, flush=True)


@functools.cache
def warn_once(text: str) -> None:
    """What is found again and again in one run."""
    warn(text)


@contextlib.contextmanager
def one_line_errors() -> Iterator[None]:
    """Turn user errors, Ctrl-C and SIGTERM into a line and an exit status; bugs keep their traceback."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a name never crashes an ASCII terminal
    Saves.any = False
    warn_once.cache_clear()
    try:
        with stop_on_signals():
            yield
            sys.stdout.flush()
    except UserError as error:
        # Each rank for itself: torchrun may end the others before they come to it, and some see other files.
        who = f"rank {get_rank()} on {socket.gethostname()}: " if is_distributed() else ""
        print("".join(f"error: {who}{line}\n" for line in error.lines), end="", file=sys.stderr, flush=True)
        sys.exit(error.status)
    except (RuntimeError, MemoryError) as error:
        if out_of_memory(error):
            device = isinstance(error, torch.OutOfMemoryError)
            fix = "run with a smaller --batch-size, or --device cpu" if device else "close programs, or lower --workers"
            print(f"error: out of memory; {fix}; what was saved is whole", file=sys.stderr)
            sys.exit(1)
        if not isinstance(error, dist.DistBackendError) and "gloo" not in str(error):  # which has no type of its own
            raise
        print(f"error: another rank died ({str(error).splitlines()[0]}); the saved files are whole", file=sys.stderr)
        sys.exit(1)
    except OSError as error:
        if error.filename is not None or error.errno not in (errno.EPIPE, errno.ENOSPC, errno.EDQUOT, errno.EIO):
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if error.errno == errno.EPIPE:  # the reader of our output is gone, as in `| head -1`: nobody to tell
            sys.exit(141)
        print(f"error: standard output: {os_reason(error)}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt as stop:
        status = stop.args[0] if stop.args else status_of(signal.SIGINT)
        if get_rank() == 0:
            saved = "what was saved is whole" if Saves.any else "nothing was saved"
            print(f"stopped by {NAMES[status - 128]}; {saved}", file=sys.stderr)
        sys.exit(status)


def duration(seconds: float) -> str:
    """A time in the two units that matter: 1 h 05 min, 3 min 20 s, 12 s."""
    whole_seconds = round(seconds)
    minutes = round(seconds / 60)
    if whole_seconds < 60:
        return f"{whole_seconds} s"
    if whole_seconds < 3600:
        return f"{whole_seconds // 60} min {whole_seconds % 60:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"


class Progress:
    """Images done, images/s and time left, on rank 0's stderr: a line that renews itself on a terminal, elsewhere
    a line for each tenth of the work, at least a minute apart, so that a log shows life.
    """

    def __init__(self, what: str, total: int, *, quiet: float = 0, noun: str = "images"):
        """quiet: seconds in which a terminal is told nothing; noun: what is counted."""
        self.what, self.total, self.quiet, self.noun = what, total, quiet, noun
        self.done, self.tenths, self.width = 0, 0, 0
        self.start_time = self.printed = time.perf_counter()

    def add(self, count: int) -> None:
        """So many more are done. Raises KeyboardInterrupt as `check_stop` does."""
        check_stop()
        self.done += count
        now, tenths = time.perf_counter(), 10 * self.done // max(1, self.total)
        if get_rank() or not self.done:  # of nothing done there is no speed
            return
        if sys.stderr.isatty():
            last = self.done == self.total
            if now - self.printed < 0.2 and not last or now - self.start_time < self.quiet:
                return
        elif now - self.printed < 60 or tenths == self.tenths:
            return
        self.printed, self.tenths = now, tenths
        rate = self.done / (now - self.start_time)
        left = duration((self.total - self.done) / rate)
        line = f"{self.what} {self.done:,}/{self.total:,} {self.noun}  {rate:.{int(rate < 10)}f}/s  {left} left"
        if sys.stderr.isatty():
            end = "\n" if self.done == self.total else ""
            print(f"\r{line:<{self.width}}", end=end, file=sys.stderr, flush=True)
            self.width = len(line)
        else:
            print(line, file=sys.stderr, flush=True)


def track(what: str, parts: Sequence[Sized], noun: str = "images") -> Iterator[Sized]:
    """Parts of many images, one after the other, with progress where that takes long enough to wonder."""
    progress = Progress(what, sum(map(len, parts)), quiet=QUIET, noun=noun)
    for part in parts:
        yield part
        progress.add(len(part))
