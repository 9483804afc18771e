"""Files: strangers' are read safely, ours are written whole or not at all."""

import contextlib
import errno
import glob
import hashlib
import io
import os
import pickle
import shutil
import stat
import tempfile
import zipfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import torch

from transfer.console import UserError, os_reason, printable

COPIES = 3.1  # of a checkpoint that a folder needs room for: the previous one, the old one and the new one; and figures


def open_regular(path: str | bytes | os.PathLike) -> io.BufferedReader:
    """Open a regular file to read its bytes; a FIFO would wait for a writer. Raises OSError."""
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise OSError(errno.EINVAL, "not a regular file")
    return open(path, "rb")


class MappingError(UserError):
    """Why a sound file can't be mapped into memory: there is no room, or there are too many mapped files already."""


def load_untrusted(path: Path, mmap: bool = False, check: bool = True) -> object:
    """What torch.save wrote: tensors and plain values. Raises UserError where it is damaged or holds more.

    mmap: map the tensors into memory, which only reads what is asked for; check: read all of it for its checksums.
    """
    name = printable(path)
    try:
        file = open_regular(path)
    except OSError as error:
        raise UserError(f"{name}: {os_reason(error)}; name a file of weights") from None
    try:
        with file:
            if check and zipfile.is_zipfile(file):
                check_zip(file)
        return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except Exception as error:  # parsers of untrusted bytes: damage comes as nearly any exception there is
        if mmap and os.strerror(errno.ENOMEM) in str(error):
            limit = "no memory left, or more files mapped than vm.max_map_count allows"
            raise MappingError(f"{name}: {limit}; raise that limit (sysctl -w vm.max_map_count=262144)") from None
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
        reason = "disk full" if error.errno in (errno.ENOSPC, errno.EDQUOT) else os_reason(error)
        raise UserError(f"{printable(path)}: {reason}; what was saved before is intact", status=1) from None
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def backup_path(path: Path) -> Path:
    """Where the file that a run replaces is kept."""
    return path.with_name(f"{path.stem}.previous{path.suffix}")


def backup(path: Path) -> None:
    """Let a file be found under another name too, before it is replaced: one generation.

    Raises UserError (status 1) as `save_atomically` does.
    """
    if path.exists():
        previous = backup_path(path)
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


def history_path(checkpoint: Path) -> Path:
    """The CSV beside a checkpoint, with a row per epoch."""
    return checkpoint.parent / f"{checkpoint.stem}.csv"


def path_digest(path: str | os.PathLike) -> str:
    """The same for all ways to write a path, by which it is known again: a checkpoint need not tell where files lie."""
    return hashlib.sha256(os.fsencode(os.path.realpath(path))).hexdigest()[:32]


def outputs_of(path: Path, lists: Sequence[Path]) -> list[Path]:
    """All that a run writes for a checkpoint of this name, and lists beside it."""
    return [saved for each in (path, history_path(path), *lists) for saved in (each, backup_path(each))]


def free_space(flag: str, path: Path, fix: str) -> int:
    """The bytes that are free in the folder that a file is to be written in. Raises UserError where none can be."""
    folder = path.resolve().parent
    try:
        with tempfile.TemporaryFile(dir=folder):
            return shutil.disk_usage(folder).free
    except OSError as error:
        why = f"can't write in {printable(path.parent)} ({os_reason(error)})"
        raise UserError(f"{flag} {printable(path)}: {why}; {fix}") from None


def check_outputs(outputs: Sequence[tuple[str, Path]], inputs: Iterable[str | bytes | os.PathLike]) -> None:
    """Raises UserError where an output, a flag and a path, would replace another or an input, or is no regular file."""
    there, written, named = {}, set(), {}
    for flag, path in outputs:
        given = named.setdefault(flag, path)  # its first output is the one that the user named
        if path.resolve() in written:
            both = f"{flag} {printable(given)}: {printable(path)}"
            raise UserError(f"{both} is written by this run already; name another file")
        written.add(path.resolve())
        if path.exists():
            if not path.is_file():
                what = "is a directory; name a file" if path.is_dir() else "not a regular file; name another"
                raise UserError(f"{flag} {printable(path)}: {what}")
            info = path.stat()
            there[info.st_dev, info.st_ino] = flag, path
    for given in inputs if there else ():
        with contextlib.suppress(OSError):  # what is not there can't be overwritten
            info = os.stat(given)
            if found := there.get((info.st_dev, info.st_ino)):
                flag, path = found
                raise UserError(f"{flag} {printable(path)}: is read by this run; name another file to write")


def prepare_outputs(
    out: Path,
    size: int,
    inputs: Iterable[str | bytes | os.PathLike],
    *,
    cache: Path | None = None,
    audit: Path | None = None,
    lists: Sequence[Path] = (),
) -> None:
    """Check that a checkpoint of so many bytes, an audit and lists can be saved there, over none of the inputs, and
    features kept; sweep what a killed run left. Raises UserError.
    """
    name = printable(out)
    if out.is_dir():
        raise UserError(f"--out {name}: is a directory; name a file, such as {printable(out / 'best.pth')}")
    if out.suffix == ".csv":
        raise UserError(f"--out {name}: the .csv beside the checkpoint has this name; end it in .pth")
    free = free_space("--out", out, "name another folder")
    for saved in outputs_of(out, lists):
        for stale in saved.resolve().parent.glob(f".{glob.escape(saved.resolve().name)}.*.tmp"):
            with contextlib.suppress(OSError):
                stale.unlink()
    try:
        if cache:
            cache.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--cache {printable(cache)}: {os_reason(error)}; name a folder") from None
    if free < (need := int(COPIES * size)):
        raise UserError(f"--out {name}: disk full ({free >> 20} MB free, {need >> 20} needed); free some space")
    outputs = [("--out", path) for path in outputs_of(out, lists)]
    check_outputs([*outputs, *(page_outputs("--audit", audit) if audit else [])], inputs)


def with_table(page: Path) -> list[Path]:
    """A page, and the table that is written beside it."""
    return [page, page.with_suffix(".csv")]


def page_outputs(flag: str, page: Path, table: bool = True) -> list[tuple[str, Path]]:
    """What a flag that names a page writes, for `check_outputs`. Raises UserError where its folder can't be written."""
    free_space(flag, page, "name a file in another folder")
    return [(flag, path) for path in (with_table(page) if table else [page])]
