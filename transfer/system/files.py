"""Files: strangers' are read safely, ours are written whole or not at all."""

import contextlib
import errno
import hashlib
import io
import json
import os
import pickle
import secrets
import shlex
import shutil
import socket
import stat
import warnings
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from transfer.system.console import Saves, UserError, nearest_path, os_reason, printable
from transfer.system.safetensors import is_safetensors, load_safetensors


def open_regular(path: str | bytes | os.PathLike) -> io.BufferedReader:
    """Open a regular file to read its bytes; a FIFO would wait for a writer. Raises OSError."""
    mode = os.stat(path).st_mode
    if stat.S_ISDIR(mode):
        os.scandir(path).close()  # one that may not be read says so
    if not stat.S_ISREG(mode):
        raise OSError(errno.EINVAL, "not a regular file")
    return open(path, "rb")


class MappingError(UserError):
    """Why a sound file can't be mapped into memory: there is no room, or there are too many mapped files already."""


def load_untrusted(path: Path, mmap: bool = False, check: bool = True) -> object:
    """What torch.save wrote, tensors and plain values, or a safetensors file's tensors. Raises UserError where it is
    damaged or holds more.

    mmap: map the tensors into memory, which only reads what is asked for; check: read all of it for its checksums.
    """
    name = printable(path)
    try:
        file = open_regular(path)
    except OSError as error:
        raise UserError(f"{name}: {os_reason(error)}{nearest_path(path) or '; name a file of weights'}") from None
    try:
        with file, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what torch says of odd files does not name them, as our errors do
            head, size = file.read(9), os.fstat(file.fileno()).st_size
            if is_safetensors(head, size):
                return load_safetensors(path)
            if check and zipfile.is_zipfile(file):
                check_zip(file)
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except Exception as error:  # parsers of untrusted bytes: damage comes as nearly any exception there is
        if mmap and os.strerror(errno.ENOMEM) in str(error):
            limit = "no memory left, or more files mapped than vm.max_map_count allows"
            raise MappingError(f"{name}: {limit}; raise that limit (sysctl -w vm.max_map_count=262144)") from None
        if isinstance(error, pickle.UnpicklingError) and "unsupported global" in str(error).lower():
            code = "holds more than tensors, and to load it would run code of its own"
            raise UserError(f"{name}: {code}; only if you trust it: {plain_copy_command(path)}") from None
        if "TorchScript" in str(error):
            raise UserError(f"{name}: is a TorchScript program; save its model.state_dict() with torch.save") from None
        raise UserError(f"{name}: damaged, or not a weights file; get it again from its source") from None


def plain_copy_command(path: Path) -> str:
    """The command that runs a file's code and saves its tensors, in dicts as they were, as a file that has none."""
    copy = path.with_name(f"{path.stem}.plain.pth")
    tensors = "m if isinstance(m, torch.Tensor) else {k: plain(v) for k, v in names(m) if isinstance(v, kinds)}"
    lines = (
        "import torch",
        "kinds = (dict, torch.Tensor, torch.nn.Module)",
        'names = lambda m: (m.state_dict() if hasattr(m, "state_dict") else m).items()',
        f"plain = lambda m: {tensors}",
        f'm = torch.load({json.dumps(str(path))}, "cpu", weights_only=False)',
        f"torch.save(plain(m), {json.dumps(str(copy))})",
    )
    return shlex.join(["python", "-c", "; ".join(lines)])


def check_zip(file: io.BufferedIOBase) -> None:
    """Raises ValueError unless every member's checksum holds and none claims more bytes than the file has, and where
    they are a program's.
    """
    size = file.seek(0, os.SEEK_END)
    with zipfile.ZipFile(file) as archive:
        members = archive.infolist()
        if any(member.filename.endswith("/constants.pkl") for member in members):
            raise ValueError("TorchScript")
        # torch leaves a member that is marked as a folder (DOS attribute 0x10) unread: its tensor would be whatever
        # the memory held before. One flipped bit does that, and no checksum covers it.
        folders = any(member.is_dir() or member.external_attr & 0x10 for member in members)
        if folders or sum(member.file_size for member in members) > size or archive.testzip() is not None:
            raise ValueError("checksum")


def temporary_path(target: Path) -> Path:
    """Where a file is written before it is renamed: a name of its own, also beside other machines and containers."""
    host = "".join(character for character in socket.gethostname() if character.isalnum())[:20]
    return target.with_name(f".{target.name}.{host}-{os.getpid()}-{secrets.token_hex(8)}.tmp")


def save_atomically(path: Path, content: bytes | memoryview) -> None:
    """Write beside the file, then rename: at any moment the file is the old one or the new one, whole.

    A link stays one: what it names is replaced. Raises UserError (status 1) where the disk is full or fails.
    """
    save_together([(path, content)])


def save_together(files: Sequence[tuple[Path, bytes | memoryview]], backups: Sequence[Path] = ()) -> None:
    """`save_atomically` for files that belong together: each stays the old one until all new ones are on the disk.

    backups: files that are kept, each under another name, before any is replaced.
    """
    temporaries = [temporary_path(path.resolve()) for path, _ in files]
    try:
        for (path, content), temporary in zip(files, temporaries, strict=True):
            with disk_errors(path), open(temporary, "xb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
        for path in backups:
            backup(path)
        for (path, _), temporary in zip(files, temporaries, strict=True):
            with disk_errors(path):
                os.replace(temporary, path.resolve())
                Saves.any = True
    finally:
        for temporary in temporaries:
            temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Tell of a disk that is full or fails in one line."""
    try:
        yield
    except OSError as error:
        reason = "disk full" if error.errno in (errno.ENOSPC, errno.EDQUOT) else os_reason(error)
        raise UserError(f"{printable(path)}: {reason}; what was saved before is intact", status=1) from None


def backup_path(path: Path) -> Path:
    """Where the file that a run replaces is kept."""
    return path.with_name(f"{path.stem}.previous{path.suffix}")


def backup(path: Path) -> None:
    """Let a file be found under another name too, before it is replaced: one generation.

    Raises UserError (status 1) as `save_atomically` does.
    """
    if path.exists():
        previous = backup_path(path)
        temporary = temporary_path(previous)
        try:
            with disk_errors(previous):
                try:
                    os.link(path.resolve(), temporary)
                except OSError:  # not every file system has links
                    shutil.copyfile(path, temporary)
                os.replace(temporary, previous)
        finally:
            temporary.unlink(missing_ok=True)


def file_stamp(path: Path) -> tuple[int, ...] | None:
    """What changes when a file is replaced; None where there is none."""
    try:
        info = os.stat(path)
    except OSError:
        return None
    return info.st_dev, info.st_ino, info.st_size, info.st_mtime_ns


def serialized(content: object) -> memoryview:
    """What `torch.save` writes, in memory, so that a failing disk raises what `save_atomically` catches."""
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getbuffer()


def history_path(checkpoint: Path) -> Path:
    """The CSV beside a checkpoint, with a row per epoch."""
    return checkpoint.parent / f"{checkpoint.stem}.csv"


def path_digest(path: str | os.PathLike) -> str:
    """The same for all ways to write a path, by which it is known again: a checkpoint need not tell where files lie."""
    return hashlib.sha256(os.fsencode(os.path.realpath(path))).hexdigest()[:32]
