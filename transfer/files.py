"""Files: strangers' are read safely, ours are written whole or not at all."""

import contextlib
import errno
import glob
import io
import os
import pickle
import shutil
import stat
import tempfile
import zipfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import torch

from transfer.console import UserError, reason_of, shown

COPIES = 3.1  # of a checkpoint that a folder needs room for: the previous one, the old one and the new one; and figures


def open_regular(path: str | bytes | os.PathLike) -> io.BufferedReader:
    """Open a regular file to read its bytes; a FIFO would wait for a writer. Raises OSError."""
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise OSError(errno.EINVAL, "not a regular file")
    return open(path, "rb")


def load_untrusted(path: Path, mmap: bool = False) -> object:
    """What torch.save wrote: tensors and plain values. Raises UserError where it is damaged or holds more."""
    name = shown(path)
    try:
        file = open_regular(path)
    except OSError as error:
        raise UserError(f"{name}: {reason_of(error)}; name a file of weights") from None
    try:
        with file:
            if zipfile.is_zipfile(file):
                check_zip(file)
        return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except Exception as error:  # parsers of untrusted bytes: damage comes as nearly any exception there is
        code = isinstance(error, pickle.UnpicklingError) and "unsupported global" in str(error).lower()
        reason = "not a weights file: it holds more than tensors" if code else "damaged, or not a weights file"
        raise UserError(f"{name}: {reason}; get it again from its source") from None


def check_zip(file: io.BufferedIOBase) -> None:
    """Raises ValueError unless every member's checksum holds and none claims more bytes than the file has."""
    size = file.seek(0, os.SEEK_END)
    with zipfile.ZipFile(file) as archive:
        members = archive.infolist()
        # torch leaves a member that is marked as a folder (DOS attribute 0x10) unread: its tensor would be whatever
        # the memory held before. One flipped bit does that, and no checksum covers it.
        folders = any(member.is_dir() or member.external_attr & 0x10 for member in members)
        if folders or sum(member.file_size for member in members) > size or archive.testzip() is not None:
            raise ValueError("checksum")


def save_atomically(path: Path, content: bytes | memoryview) -> None:
    """Write beside the file, then rename: at any moment the file is the old one or the new one, whole.

    A link stays one: what it names is replaced. Raises UserError (status 1) where the disk is full or fails.
    """
    target = path.resolve()
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    with disk_errors(path, temporary):
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, target)


@contextlib.contextmanager
def disk_errors(path: Path, temporary: Path) -> Iterator[None]:
    """Tell of a disk that is full or fails in one line, and leave no temporary file."""
    try:
        yield
    except OSError as error:
        reason = "disk full" if error.errno in (errno.ENOSPC, errno.EDQUOT) else reason_of(error)
        raise UserError(f"{shown(path)}: {reason}; what was saved before is intact", status=1) from None
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def previous_of(path: Path) -> Path:
    """Where the file that a run replaces is kept."""
    return path.with_name(f"{path.stem}.previous{path.suffix}")


def keep_previous(path: Path) -> None:
    """Let a file be found under another name too, before it is replaced: one generation.

    Raises UserError (status 1) as `save_atomically` does.
    """
    if path.exists():
        previous = previous_of(path)
        temporary = path.with_name(f".{previous.name}.{os.getpid()}.tmp")
        with disk_errors(previous, temporary):
            try:
                os.link(path.resolve(), temporary)
            except OSError:  # not every file system has links
                shutil.copyfile(path, temporary)
            os.replace(temporary, previous)


def save_tensors(path: Path, content: object) -> None:
    """`torch.save`, atomically: through memory, so that a failing disk raises what `save_atomically` catches."""
    buffer = io.BytesIO()
    torch.save(content, buffer)
    save_atomically(path, buffer.getbuffer())


def outputs_of(path: Path, lists: Sequence[Path]) -> list[Path]:
    """All that a run writes for a checkpoint of this name, and lists beside it."""
    return [saved for each in (path, path.with_suffix(".csv"), *lists) for saved in (each, previous_of(each))]


def check_outputs(flag: str, outputs: Sequence[Path], inputs: Iterable[str | bytes | os.PathLike]) -> None:
    """Raises UserError where an output would replace an input, or is there and no regular file."""
    there = {}
    for path in outputs:
        if path.exists():
            if not path.is_file():
                what = "is a directory; name a file" if path.is_dir() else "not a regular file; name another"
                raise UserError(f"{flag} {shown(path)}: {what}")
            info = path.stat()
            there[info.st_dev, info.st_ino] = path
    for given in inputs if there else ():
        with contextlib.suppress(OSError):  # what is not there can't be overwritten
            info = os.stat(given)
            if path := there.get((info.st_dev, info.st_ino)):
                raise UserError(f"{flag} {shown(path)}: is read by this run; name another file to write")


def prepare_outputs(
    path: Path,
    size: int,
    inputs: Callable[[], Iterable[str | bytes | os.PathLike]],
    *,
    cache: Path | None = None,
    audit: Path | None = None,
    lists: Sequence[Path] = (),
) -> None:
    """Check that a checkpoint of so many bytes, an audit and lists can be saved there, over none of the inputs, and
    features kept; sweep what a killed run left. Raises UserError.
    """
    name, folder = shown(path), path.resolve().parent
    if path.is_dir():
        raise UserError(f"--out {name}: is a directory; name a file, such as {shown(path / 'best.pth')}")
    if path.suffix == ".csv":
        raise UserError(f"--out {name}: the .csv beside the checkpoint has this name; end it in .pth")
    try:
        with tempfile.TemporaryFile(dir=folder):
            free = shutil.disk_usage(folder).free
        for saved in outputs_of(path, lists):
            for stale in saved.resolve().parent.glob(f".{glob.escape(saved.resolve().name)}.*.tmp"):
                stale.unlink(missing_ok=True)
    except OSError as error:
        why = f"can't write in {shown(path.parent)} ({reason_of(error)})"
        raise UserError(f"--out {name}: {why}; name another folder") from None
    try:
        if cache:
            cache.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--cache {shown(cache)}: {reason_of(error)}; name a folder") from None
    if free < (need := int(COPIES * size)):
        raise UserError(f"--out {name}: disk full ({free >> 20} MB free, {need >> 20} needed); free some space")
    check_outputs("--out", outputs_of(path, lists), inputs())
    if audit:
        check_target("--audit", with_table(audit), inputs(), outputs_of(path, lists))


def with_table(page: Path) -> list[Path]:
    """A page, and the table that is written beside it."""
    return [page, page.with_suffix(".csv")]


def check_target(
    flag: str, outputs: Sequence[Path], inputs: Iterable[str | bytes | os.PathLike], others: Sequence[Path] = ()
) -> None:
    """Raises UserError where a page, and what lies beside it, can't be written, would replace one of the inputs, or one
    of the run's other outputs.
    """
    page = outputs[0]
    try:
        with tempfile.TemporaryFile(dir=page.parent):
            pass
    except OSError as error:
        why = f"can't write in {shown(page.parent)} ({reason_of(error)})"
        raise UserError(f"{flag} {shown(page)}: {why}; name a file in another folder") from None
    written = {other.resolve() for other in others}
    for number, path in enumerate(outputs):
        if path.resolve() in written or path in outputs[:number]:
            raise UserError(f"{flag} {shown(page)}: {shown(path)} is written by this run already; name another file")
    check_outputs(flag, outputs, inputs)
