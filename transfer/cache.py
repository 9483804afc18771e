"""The cache: features kept on disk in chunks, each image found by a key of all that its features depend on."""

import contextlib
import hashlib
import itertools
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

import PIL
import torch
import torchvision
from torch import Tensor, nn
from torch.utils.data import Dataset

from transfer.backbone import READING_VERSION
from transfer.device import Compute
from transfer.inputs.images import PassingReason
from transfer.inputs.lists import ImageList
from transfer.system.console import QUIET, Progress, UserError, os_reason, printable, track, warn
from transfer.system.files import MappingError, load_untrusted, save_atomically, serialized

KEY_BYTES = 16  # two int64
Chunk = tuple[Tensor, dict[int, str]]  # features (n, V, D), and the reasons by row of those without


def recipe_digest(backbone: nn.Module, dataset: Dataset, compute: Compute) -> bytes:
    """What the features of an `ImageDataset` depend on besides its images: weights, views, arithmetic, versions."""
    recipe = [*dataset.describe(), str(compute.normalize), READING_VERSION]
    versions = [torch.__version__, torchvision.__version__, PIL.__version__]
    parts = [recipe, versions, list(dataset.views), dataset.seed, compute.device.type, str(compute.dtype)]
    digest = hashlib.sha256(repr(parts).encode())
    # A network's parts by number, as nn.Sequential names them: so the first caches were written.
    numbers = {name: str(number) for number, (name, _) in enumerate(backbone.named_children())}
    for key, value in backbone.state_dict().items():
        child, dot, rest = key.partition(".")
        digest.update(f"{numbers.get(child, child)}{dot}{rest}".encode())
        digest.update(value.cpu().float().contiguous().numpy().tobytes())
    return digest.digest()


def image_keys(image_list: ImageList, rows: range) -> Tensor:
    """A key of each image (n, 2), int64: its path, inode, size, modification time and change time.

    Not its label, nor its place in the list. Two files that change places keep sizes and times, but not the inodes.
    All 0 where there is no such file (any more): the pass will say so.
    """
    keys, progress = bytearray(), Progress("looked up:", len(rows), quiet=QUIET)
    for listed in itertools.islice(image_list.each_path(), rows.start, rows.stop):
        key = bytes(KEY_BYTES)
        with contextlib.suppress(OSError):
            info, path = os.stat(listed), os.path.abspath(listed)
            about = path, info.st_ino, info.st_size, info.st_mtime_ns, info.st_ctime_ns
            key = hashlib.blake2b(repr(about).encode(), digest_size=KEY_BYTES).digest()
        keys += key
        progress.add(1)
    return torch.frombuffer(keys or bytearray(KEY_BYTES), dtype=torch.int64).view(-1, 2)[: len(rows)]


def find_rows(wanted: Tensor, tables: Sequence[Tensor]) -> Tensor:
    """Where keys (n, 2) stand in tables of keys: (n, 2), the table and the row in it; -1 for what is in none."""
    places, table = torch.full((len(wanted), 2), -1), torch.cat(list(tables)) if tables else torch.empty(0)
    if not len(table) or not len(wanted):
        return places
    counts = torch.tensor([len(each) for each in tables])
    numbers = torch.arange(len(tables)).repeat_interleave(counts)
    rows = torch.arange(len(table)) - (counts.cumsum(0) - counts).repeat_interleave(counts)
    order = table[:, 0].argsort(stable=True)
    nearest = order[torch.searchsorted(table[order, 0], wanted[:, 0].contiguous()).clamp(max=len(table) - 1)]
    found = (table[nearest] == wanted).all(1) & wanted.any(1)
    places[found] = torch.stack([numbers[nearest], rows[nearest]], 1)[found]
    return places


class FeatureCache:
    """The chunks of one recipe in a folder. Whichever images a run wants, those that any chunk holds are found.

    shape: of an image's features, (V, D).
    """

    def __init__(self, folder: Path, recipe: bytes, shape: tuple[int, int]):
        self.folder, self.recipe, self.shape = folder, recipe, shape

    def check_writable(self) -> None:
        """Raises UserError where no chunk can be kept."""
        try:
            tempfile.TemporaryFile(dir=self.folder).close()
        except OSError as error:
            why = f"can't write in it ({os_reason(error)}); name another folder"
            raise UserError(f"--cache {printable(self.folder)}: {why}") from None

    def find(self, keys: Tensor) -> tuple[list[Path], list[Chunk], Tensor]:
        """The chunks that hold images of these keys (n, 2), and where: (n, 2), as `find_rows` has it."""
        tables = {path: self.read_keys(path) for path in sorted(self.folder.glob(f"{self.recipe.hex()[:16]}-*.pt"))}
        tables = {path: table for path, table in tables.items() if table is not None}
        while True:
            all_paths, places = list(tables), find_rows(keys, list(tables.values()))
            used = places[:, 0].unique()
            used = used[used >= 0]
            paths = [all_paths[number] for number in used.tolist()]
            alone = track("read from the cache:", [[path] for path in paths], "files")
            chunks = [self.read(path, tables[path]) for (path,) in alone]
            if all(chunks):
                renumbered = torch.searchsorted(used, places[:, 0].contiguous())
                places[:, 0] = torch.where(places[:, 0] < 0, -1, renumbered)
                return paths, chunks, places
            for path in (path for path, chunk in zip(paths, chunks, strict=True) if chunk is None):
                del tables[path]

    def read_keys(self, path: Path) -> Tensor | None:
        """The keys of a chunk's images (n, 2), its checksums unread; None, with a warning, where it is damaged."""
        chunk = self.load(path, check=False)
        return None if chunk is None else chunk["keys"].clone()

    def read(self, path: Path, keys: Tensor | None = None) -> Chunk | None:
        """A chunk, memory-mapped; None where there is none, or, with a warning, it is damaged or of other keys."""
        chunk = self.load(path, keys=keys)
        return None if chunk is None else (chunk["features"], chunk["unread"])

    def load(self, path: Path, check: bool = True, keys: Tensor | None = None) -> dict | None:
        """What a chunk's file holds; where that is no chunk of this name and form, a warning, and the file goes."""
        if not path.exists():
            return None
        try:
            chunk = load_untrusted(path, mmap=True, check=check)
            table, features = chunk["keys"], chunk["features"]
            fits = table.dtype == torch.int64 and table.shape == (len(table), 2)
            fits = fits and features.shape == (len(table), *self.shape) and features.dtype == torch.float32
            fits = fits and type(chunk["unread"]) is dict and (keys is None or torch.equal(table, keys))
            if fits and chunk["name"] == path.name:
                return chunk
        except MappingError:
            raise
        except (UserError, LookupError, TypeError, AttributeError):
            pass
        warn(f"{printable(path)}: damaged or foreign; computed again")
        with contextlib.suppress(OSError):
            path.unlink()
        return None

    def save(self, keys: Tensor, features: Tensor, unreadable: dict[int, str]) -> tuple[Path, Tensor]:
        """Keep the features (n, V, D) of the images of these keys (n, 2), with the reasons by row of those without.

        Returns the file, and the features mapped from it. Those without for a reason that may pass won't be found
        again. Raises UserError (status 1).
        """
        passing = [row for row, reason in unreadable.items() if isinstance(reason, PassingReason)]
        keys = keys.index_fill(0, torch.tensor(passing, dtype=torch.int64), 0)
        lasting = {row: reason for row, reason in unreadable.items() if row not in passing}
        digest = hashlib.sha256(self.recipe + keys.numpy().tobytes()).hexdigest()
        path = self.folder / f"{self.recipe.hex()[:16]}-{digest[:24]}.pt"
        content = {"name": path.name, "keys": keys, "features": features, "unread": lasting}
        save_atomically(path, serialized(content))
        mapped = self.read(path, keys)
        return path, mapped[0] if mapped else features
