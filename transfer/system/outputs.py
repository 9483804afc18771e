"""Outputs: what a run is going to write, checked before its first step to destroy nothing of the user's."""

import contextlib
import glob
import os
import re
import shutil
import tempfile
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from transfer.system.console import UserError, os_reason, printable
from transfer.system.files import backup_path, history_path

COPIES = 3.1  # of a checkpoint that a folder needs room for: the previous one, the old one and the new one; and figures
STALE = 3600  # seconds after which a temporary file is what a killed run left: no write takes so long
CHECKPOINT_ENDINGS = (".pth", ".pt", ".ckpt", ".bin", "")
PAGE_ENDINGS = (".html", ".htm", "")
BOM = b"\xef\xbb\xbf"
STARTS = {  # of the files that we write beside checkpoints, by which an earlier one is known
    "a run's figures": re.compile(rb"epoch,train_loss,"),
    "a list of a split": re.compile(rb"# of .*, by train\.py with --view-seed \d"),
    "an audit's table": re.compile(rb"list,line,path,kind,"),
    "a page of ours": re.compile(
        rb'<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<meta http-equiv="Content-'
    ),
}


class Output(NamedTuple):
    """A file to write: the flag that asks for it, and which of `STARTS` it is; None for a checkpoint, which is kept
    under another name whatever it is.
    """

    flag: str
    path: Path
    kind: str | None = None

    def is_foreign(self) -> bool:
        """Whether something else lies there, that no run wrote. Raises OSError."""
        if self.kind is None or not self.path.exists():
            return False
        with open(self.path, "rb") as file:
            start = file.read(1 << 15).removeprefix(BOM)  # a list's first line names a path
        return bool(start) and not STARTS[self.kind].match(start)


def checkpoint_outputs(path: Path, lists: Sequence[Path]) -> list[Output]:
    """All that a run writes for a checkpoint of this name, and lists beside it."""
    kinds = [(path, None), (history_path(path), "a run's figures"), *((each, "a list of a split") for each in lists)]
    return [Output("--out", saved, kind) for each, kind in kinds for saved in (each, backup_path(each))]


def table_path(page: Path, checkpoint: Path) -> Path:
    """The table beside an audit's page: it has the page's name, or ends in .audit.csv where the figures beside the
    checkpoint have that.
    """
    table = page.parent / f"{page.stem}.csv"
    taken = [path.path.resolve() for path in checkpoint_outputs(checkpoint, [])]
    return page.parent / f"{page.stem}.audit.csv" if table.resolve() in taken else table


def audit_outputs(page: Path, checkpoint: Path) -> list[Output]:
    """What --audit writes. Raises UserError where its folder can't be written."""
    return [*page_outputs("--audit", page), Output("--audit", table_path(page, checkpoint), "an audit's table")]


def page_outputs(flag: str, page: Path) -> list[Output]:
    """What a flag that names a page writes. Raises UserError where its folder can't be written."""
    free_space(flag, page, "name a file in another folder")
    return [Output(flag, page, "a page of ours")]


def free_space(flag: str, path: Path, fix: str) -> int:
    """The bytes that are free in the folder that a file is to be written in. Raises UserError where none can be."""
    folder = path.resolve().parent
    try:
        with tempfile.TemporaryFile(dir=folder):
            return shutil.disk_usage(folder).free
    except OSError as error:
        why = f"can't write in {printable(path.parent)} ({os_reason(error)})"
        raise UserError(f"{flag} {printable(path)}: {why}; {fix}") from None


def check_outputs(outputs: Sequence[Output], inputs: Iterable[str | bytes | os.PathLike]) -> None:
    """Raises UserError where an output would replace another, an input or what no run wrote, or is no regular file."""
    there, written, named = {}, set(), {}
    for output in outputs:
        where = f"{output.flag} {printable(output.path)}"
        if output.path.exists():
            if not output.path.is_file():
                what = "is a directory; name a file" if output.path.is_dir() else "not a regular file; name another"
                raise UserError(f"{where}: {what}")
            info = output.path.stat()
            there[info.st_dev, info.st_ino] = where
    for given in inputs if there else ():
        with contextlib.suppress(OSError):  # what is not there can't be overwritten
            info = os.stat(given)
            if where := there.get((info.st_dev, info.st_ino)):
                raise UserError(f"{where}: is read by this run; name another file to write")
    for output in outputs:
        where = f"{output.flag} {printable(output.path)}"
        if output.kind == "a page of ours" and output.path.suffix.lower() not in PAGE_ENDINGS:
            raise UserError(f"{where}: is a web page; name it {printable(output.path.with_suffix('.html'))}")
        given = named.setdefault(output.flag, output.path)  # its first output is the one that the user named
        if output.path.resolve() in written:
            both = f"{output.flag} {printable(given)}: {printable(output.path)}"
            raise UserError(f"{both} is written by this run already; name another file")
        written.add(output.path.resolve())
        try:
            foreign = output.is_foreign()
        except OSError as error:
            raise UserError(f"{where}: {os_reason(error)}; name another file") from None
        if foreign:
            raise UserError(f"{where}: is there already, and is not {output.kind}; move it, or name another file")


def prepare_outputs(
    out: Path,
    size: int,
    inputs: Iterable[str | bytes | os.PathLike],
    *,
    cache: Path | None = None,
    audit: Path | None = None,
    lists: Sequence[Path] = (),
    roots: Sequence[Path] = (),
) -> None:
    """Check that a checkpoint of so many bytes, an audit and lists can be saved there, over none of the inputs, and
    features kept, in none of the folders that it reads (roots); sweep what killed runs left. Raises UserError.
    """
    name = printable(out)
    if out.is_dir():
        raise UserError(f"--out {name}: is a directory; name a file, such as {printable(out / 'best.pth')}")
    if out.suffix.lower() not in CHECKPOINT_ENDINGS:
        csv = "; the .csv beside it has this name" if out.suffix == ".csv" else ""
        raise UserError(
            f"--out {name}: a checkpoint's name does not end in {printable(out.suffix)}{csv}; end it in .pth"
        )
    free = free_space("--out", out, "name another folder")
    outputs = [*checkpoint_outputs(out, lists), *(audit_outputs(audit, out) if audit else [])]
    for output in outputs:
        sweep(output.path.resolve().parent, f".{glob.escape(output.path.resolve().name)}.*.tmp")
    if cache:
        prepare_cache(cache, roots)
    if free < (need := int(COPIES * size)):
        raise UserError(f"--out {name}: disk full ({free >> 20} MB free, {need >> 20} needed); free some space")
    check_outputs(outputs, inputs)


def prepare_cache(cache: Path, read: Sequence[Path]) -> None:
    """Make the folder of kept features, unless it would lie among photos: the next run would take it for a class."""
    name = printable(cache)
    for source in read:
        if source.is_dir() and cache.resolve().is_relative_to(source.resolve()):
            raise UserError(f"--cache {name}: lies in {printable(source)}, among the photos; name a folder beside that")
    try:
        cache.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--cache {name}: {os_reason(error)}; name a folder") from None
    sweep(cache, ".*.pt.*.tmp")


def sweep(folder: Path, pattern: str) -> None:
    """Remove temporary files that nothing has written to for long: another run may be at work on a newer one."""
    for path in folder.glob(pattern):
        with contextlib.suppress(OSError):
            if time.time() - path.stat().st_mtime > STALE:
                path.unlink()
