"""Data: the training and test images of a run, from lists or folders; and test images held out where none are named."""

import errno
import itertools
import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from transfer.console import UserError, printable
from transfer.crossval import group_split
from transfer.features import Split, Splits
from transfer.files import backup_path
from transfer.folders import read_folder, remap_labels
from transfer.lists import ImageList, check_lists, class_names, folders_by_label, read_list
from transfer.outputs import Output

TEST_SHARE = 0.2  # of the images of each class, held out where no test list is named


@dataclass(frozen=True)
class Data:
    """Training and test images and the names of their classes.

    folders: the classes' names without --classes; train_path: the list or folder of train.
    test: None where a part of train is to be held out, whose lists then go to split_paths with the checkpoint;
    test_path: the list or folder that predict.py scores, and root, where its paths begin; files: the lists that were
    read; chosen_on: what the epoch is chosen on, in words.
    """

    train: ImageList
    test: ImageList | None
    classes: list[str]
    folders: list[str]
    train_path: Path
    split_paths: list[Path]
    test_path: Path
    root: Path
    files: list[Path]
    chosen_on: str

    def inputs(self, weights: str | None) -> Iterator[str | bytes | os.PathLike]:
        """Every file that the run reads; weights: what --weights names."""
        lists = [image_list for image_list in (self.train, self.test) if image_list]
        files = [*self.files, weights] if weights else self.files
        return itertools.chain(files, *(image_list.each_path() for image_list in lists))


def load_data(
    train_path: Path | None,
    test_path: Path | None,
    root: Path,
    classes_path: Path | None,
    *,
    val_split: float | None,
    out: Path,
) -> Data:
    """The images that --train and --test name: lists, or folders of class folders. By default train.txt and test.txt.

    Beside another training list a test.txt counts where each class of it lies in the same folders; else there is none,
    and test images are to be held out. Raises UserError.
    """
    if train_path is None:
        train_path, test_path = Path("train.txt"), test_path or Path("test.txt")
    train, problems = read_source(train_path, root)
    folders = class_names(train, None) if len(train) else []
    classes = class_names(train, classes_path) if classes_path and folders else folders
    test = None
    if test_path is not None:
        test, test_problems = read_source(test_path, root)
        if test.classes and classes:  # of a folder; it goes by the training folders, whatever --classes calls them
            test_problems += remap_labels(test, folders)
        problems += test_problems
    elif not train_path.is_dir() and (beside := train_path.with_name("test.txt")).is_file():
        beside_list, test_problems = read_list(beside, root)
        if share_folders(train, beside_list):
            test, test_path = beside_list, beside
            problems += test_problems
    check_lists(train, test, problems)
    check_split(train, test, val_split)
    lists = [] if test else split_paths(out)
    files = [path for path in (train_path, test_path, classes_path) if path]
    scored, root = (test_path, root) if test else (lists[1], Path())
    chosen_on = f"{val_split:.0%} of {train.name}" if val_split else printable(scored)
    return Data(train, test, classes, folders, train_path, lists, scored, root, files, chosen_on)


def read_source(path: Path, root: Path) -> tuple[ImageList, list[str]]:
    """A list, or a folder of class folders. Raises UserError where there is neither."""
    if not path.exists():
        missing = os.strerror(errno.ENOENT).lower()
        raise UserError(f"{printable(path)}: {missing}; name a list, or a folder of class folders")
    return read_folder(path) if path.is_dir() else read_list(path, root)


def share_folders(train: ImageList, test: ImageList) -> bool:
    """Whether the test images of each label lie in folders that training images of it lie in, by their names."""
    train_folders, test_folders = (
        {label: set(map(os.path.basename, folders)) for label, folders in folders_by_label(each).items()}
        for each in (train, test)
    )
    return all(folders <= train_folders.get(label, set()) for label, folders in test_folders.items())


# Test images held out


def check_split(train: ImageList, test: ImageList | None, val_split: float | None) -> None:
    """Raises UserError where there are no images to spare for what is to be held out, or a list of them can't be
    written.
    """
    single = train.labels.bincount().max() == 1
    if val_split and single:
        raise UserError(f"--val-split: {train.name} has one image of each class, none to spare; leave it out")
    if not test and single:
        raise UserError(f"{train.name}: one image of each class, none to spare to test on; name test images by --test")
    for row, path in enumerate(train.each_path() if not test else ()):
        if reason := why_unlistable(path):
            raise UserError(f"{train.where(row)}: a list can't hold this name ({reason}); rename it")


def why_unlistable(path: bytes) -> str | None:
    """Why no line of a list can name a path; None where one can."""
    if b"\n" in path or b"\r" in path:
        return "a line break in it"
    if path != path.rstrip():
        return "a space at its end"
    try:
        path.decode("utf-8")
    except UnicodeDecodeError:
        return "not UTF-8"
    return None


def hold_out_test(split: Split, paths: list[Path], seed: int) -> tuple[Split, Split]:
    """Hold a fifth of each class out to test, near-duplicates together; paths: what the lists of both will be called.

    Returns the training images and the test images. Raises UserError (status 1).
    """
    whole, halves = split.dataset.image_list, []
    spare = f"{whole.name}: each class is a single scene, none to spare to test on; name test images by --test"
    for part, path in zip(group_split(split, TEST_SHARE, seed, spare), paths, strict=True):
        rows = part.features.rows
        half = whole.subset(rows)
        half.name, half.lines = printable(path), torch.arange(2, len(half) + 2, dtype=torch.int32)
        halves.append(Split(replace(split.dataset, image_list=half), split.features.subset(rows)))
    return halves[0], halves[1]


def split_lists(data: Data, splits: Splits, out: Path) -> list[tuple[Path, bytes | None]]:
    """The lists that go beside a checkpoint: paths and contents, where test images were held out. Else None for those
    of an earlier checkpoint that lie there, since this one may have been trained on what they call test images; but
    not for what this run reads.
    """
    if data.test is None:
        origin = f"of {data.train.name}, by train.py with --view-seed {splits.trainval.dataset.seed}"
        halves = splits.trainval.dataset.image_list, splits.test.dataset.image_list
        return [(path, list_text(half, origin)) for path, half in zip(data.split_paths, halves, strict=True)]
    read = [path.resolve() for path in data.files]
    earlier = [Output("--out", path, "a list of a split") for path in split_paths(out) if path.is_file()]
    earlier = [output.path for output in earlier if not output.is_foreign()]
    return [(path, None) for path in earlier if not {path.resolve(), backup_path(path).resolve()} & {*read}]


def split_paths(out: Path) -> list[Path]:
    """Where the lists of training and test images of a split go, beside a checkpoint."""
    return [out.with_name(f"{out.stem}.{part}.txt") for part in ("train", "test")]


def list_text(image_list: ImageList, origin: str) -> bytes:
    """A list as `read_list` reads it, below a comment."""
    lines = [b"# " + origin.encode(errors="surrogateescape")]
    for image, label in zip(image_list.each_path(), image_list.labels.tolist(), strict=True):
        plain = image[:1] not in b"# \t" and not image.startswith(b"./")
        lines.append(b"%s%s %d" % (b"" if plain else b"./", image, label))
    return b"\n".join(lines) + b"\n"
