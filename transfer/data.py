"""Data: the training and test images of a run, from lists or folders; and test images held out where none are named."""

import errno
import itertools
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from transfer.crossval import group_split
from transfer.distributed import is_main_process
from transfer.features import Split, Splits
from transfer.inputs.classes import (
    class_names,
    folder_names,
    folders_by_label,
    own_names,
    remap_labels,
    renamed_classes,
    warn_on_similar_names,
)
from transfer.inputs.corrections import ClassLabels, Corrections, read_corrections
from transfer.inputs.depth import grey_bits_of
from transfer.inputs.folders import check_depth, read_folder, split_folder
from transfer.inputs.heic import check_heic
from transfer.inputs.lists import ImageList, check_lists, list_entry, read_list, why_unlistable
from transfer.system.console import UserError, nearest_path, printable, quoted, warn
from transfer.system.files import backup_path
from transfer.system.outputs import Output

TEST_SHARE = 0.2  # of the images of each class, held out where no test list is named


@dataclass(frozen=True)
class Data:
    """Training and test images and the names of their classes.

    folders: the classes' names without --classes; train_path: the list or folder of train.
    val: what the epoch is chosen on, where that is a list of its own, of val_path; test: None where a part of train is
    to be held out, whose lists then go to split_paths with the checkpoint; test_path: the list or folder that
    predict.py scores, and root, where its paths begin; files: the lists that were read; chosen_on: what the epoch is
    chosen on, in words; notes: what else of the reading is to be known, for the header; grey_bits: of 16-bit greyscale,
    from black to white; corrections: what --corrections named.
    """

    train: ImageList
    val: ImageList | None
    test: ImageList | None
    classes: list[str]
    folders: list[str]
    train_path: Path
    val_path: Path | None
    split_paths: list[Path]
    test_path: Path
    root: Path
    files: list[Path]
    chosen_on: str
    notes: list[str]
    grey_bits: int
    corrections: Corrections

    def inputs(self, weights: str | None) -> Iterator[str | bytes | os.PathLike]:
        """Every file that the run reads; weights: what --weights names."""
        lists = [image_list for image_list in (self.train, self.val, self.test) if image_list]
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
    corrections: Sequence[Path] = (),
) -> Data:
    """The images that --train and --test name: lists, or folders of class folders. By default train.txt and test.txt.

    A folder that is already split gives all. Beside another training list a test.txt counts where both lists' classes
    have the same folders; else there is none, and test images are to be held out. Raises UserError.
    """
    train_path, val_path, test_path, notes = find_parts(train_path, test_path, val_split)
    train, problems = read_source(train_path, root)
    problems += check_depth(train_path, train) if train.is_folder else []
    classes = class_names(train, classes_path) if len(train) else []
    folders = own_names(train) if classes_path and len(train) else [*classes]  # in the order of --classes
    test_path = test_path or find_test_list(train_path, train, root, quiet=bool(problems))
    paths = [path for path in (val_path, test_path) if path]
    held_out, more = read_held_out(paths, root, train, folders)
    labels = ClassLabels(classes, folders, named=bool(train.classes))
    corrected = read_corrections(corrections if len(train) else (), root, labels)
    train, *held_out = corrected.apply_to_all(train, held_out)
    check_lists(train, held_out, [*problems, *more, *corrected.problems])
    check_classes(train, train_path)
    warn_on_similar_names(train, classes)
    val, test = held_out[0] if val_path else None, held_out[-1] if test_path else None
    check_split(train, test, val_split)
    check_heic(train, held_out)
    grey_bits, depth = grey_bits_of(train)
    notes += [*renamed_classes(folders, classes), *depth, *([corrected.describe()] if corrections else [])]
    lists = [] if test else split_paths(out)
    files = [path for path in (train_path, *paths, classes_path, *corrections) if path]
    scored, root = (test_path, root) if test else (lists[1], Path())
    chosen_on = f"{val_split:.0%} of {train.name}" if val_split else printable(val_path or scored)
    named = train_path, val_path, lists, scored, root, files, chosen_on, notes
    return Data(train, val, test, classes, folders, *named, grey_bits, corrected)


def find_parts(
    train_path: Path | None, test_path: Path | None, val_split: float | None
) -> tuple[Path, Path | None, Path | None, list[str]]:
    """What to train on, to choose the epoch on and to test on, and a line for the header where a folder is already
    split. Raises UserError.
    """
    if train_path is None:
        if not Path("train.txt").exists():
            fix = "give --train PATH, a list or a folder of class folders"
            raise UserError(f"no train.txt in {printable(Path.cwd())}; {fix}")
        beside = Path("test.txt") if Path("test.txt").exists() else None
        return Path("train.txt"), None, test_path or beside, []
    parts = split_folder(train_path) if train_path.is_dir() else None
    if parts is None:
        return train_path, None, test_path, []
    if test_path is not None:
        fix = f"give --train {quoted(parts.train)} --test {quoted(test_path)}"
        raise UserError(f"{printable(train_path)}: holds {parts.test.name} already, and --test names another; {fix}")
    if parts.val and val_split:
        raise UserError(f"--val-split: {printable(parts.val)} chooses the epoch already; leave it out")
    chooses = f"{parts.val.name} chooses the epoch, " if parts.val else ""
    note = f"          {printable(train_path)} is split already: {parts.train.name} is trained on, {chooses}"
    return parts.train, parts.val, parts.test, [f"{note}{parts.test.name} tests"]


def read_source(path: Path, root: Path) -> tuple[ImageList, list[str]]:
    """A list, or a folder of class folders. Raises UserError where there is neither."""
    if not path.exists():
        missing = os.strerror(errno.ENOENT).lower()
        fix = nearest_path(path) or "; name a list, or a folder of class folders"
        raise UserError(f"{printable(path)}: {missing}{fix}")
    return read_folder(path) if path.is_dir() else read_list(path, root)


def read_held_out(
    paths: Sequence[Path], root: Path, train: ImageList, folders: list[str]
) -> tuple[list[ImageList], list[str]]:
    """Lists and folders whose labels are those of the training images, and all problems. Raises UserError."""
    held_out, problems = [], []
    for path in paths:
        image_list, found = read_source(path, root)
        unmatched = match_labels(image_list, train, folders) if len(train) else []
        image_list.labelled = not unmatched  # else its labels are not those of the training images
        problems += found + unmatched
        held_out.append(image_list)
    return held_out, problems


def match_labels(test: ImageList, train: ImageList, folders: list[str]) -> list[str]:
    """Give test images whose labels are names the training images' labels; the problems where that can't be done."""
    if test.classes:  # by the training folders, whatever --classes calls them
        return remap_labels(test, folders)
    if train.classes and not train.is_folder and len(test):
        return [f"{test.name}:{test.lines[0]}: labels are numbers here, and names in {train.name}; use names in both"]
    return []


def find_test_list(train_path: Path, train: ImageList, root: Path, *, quiet: bool) -> Path | None:
    """The test.txt beside a training list, where it is of the same classes by the names of their folders."""
    if train_path.is_dir():
        return None
    beside = train_path.with_name("test.txt")
    if not beside.is_file() or beside.samefile(train_path):
        return None
    try:
        test, _ = read_list(beside, root, check_files=False)
    except UserError:  # no list at all
        test = None
    if test and share_folders(train, test):
        return beside
    unlike = "its classes do not have the same folders" if test else "it is not such a list"
    if not quiet:
        warn(f"{printable(beside)} is not used: {unlike}; give --test {quoted(beside)} to test on it")
    return None


def check_classes(train: ImageList, path: Path) -> None:
    """Raises UserError where there is a single class; of a folder's it names the one below that was probably meant."""
    if len(train.labels.unique()) > 1:
        return
    if not train.is_folder:
        raise UserError(f"{train.name}: all images have one label; add images of another class")
    only, folders = train.classes[int(train.labels[0])], []
    below = inner = path / only
    while inner.is_dir():  # not where its name is written in another form of Unicode
        folders = [each for each in inner.iterdir() if each.is_dir() and each.name[0] != "."]
        if len(folders) != 1:
            break
        inner = folders[0]
    why = f"{train.name}: a single class, {printable(only)}"
    if folders:
        raise UserError(f"{why}; the folders in {printable(inner)} are classes, perhaps: --train {quoted(inner)}")
    raise UserError(f"{why}; put a second class's photos in a folder of their own beside {printable(below)}")


def share_folders(train: ImageList, test: ImageList) -> bool:
    """Whether both lists are of the same classes: folders of one name hold the images of one label, in both."""
    if train.classes or test.classes:  # labels that are names are to be the same
        return set(test.classes) <= set(train.classes)
    trained, tested = folders_by_label(train), folders_by_label(test)
    if tested.keys() - trained.keys():
        return False
    # A label's images weigh the same in both lists, however few the one has.
    for folders in (trained, tested):
        for label, counts in folders.items():
            folders[label] = Counter({folder: count / counts.total() for folder, count in counts.items()})
    return bool(folder_names({label: counts + tested[label] for label, counts in trained.items()}))


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


def hold_out_test(split: Split, paths: list[Path], seed: int) -> tuple[Split, Split]:
    """Hold about a fifth of each class out to test, near-duplicates together, and say how many that are; paths: what
    the lists of both will be called.

    Returns the training images and the test images. Raises UserError (status 1).
    """
    whole, halves = split.dataset.image_list, []
    spare = f"{whole.name}: each class is a single scene, none to spare to test on; name test images by --test"
    for part, path in zip(group_split(split, TEST_SHARE, seed, spare), paths, strict=True):
        rows = part.features.rows
        half = whole.subset(rows)
        half.name, half.lines = printable(path), torch.arange(2, len(half) + 2, dtype=torch.int32)
        halves.append(Split(replace(split.dataset, image_list=half), split.features.subset(rows)))
    trained, tested = (len(half.features.rows) for half in halves)
    if is_main_process():
        words = f"{tested:,} ({tested / (trained + tested):.0%}) held out to test on; photos of one scene stay together"
        print(f"split     {trained:,} photos to train on, {words}", flush=True)
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
    return [out.parent / f"{out.stem}.{part}.txt" for part in ("train", "test")]


def list_text(image_list: ImageList, origin: str) -> bytes:
    """A list as `read_list` reads it, below a comment."""
    lines = [b"# " + origin.encode(errors="surrogateescape")]
    for image, label in zip(image_list.each_path(), image_list.labels.tolist(), strict=True):
        lines.append(b"%s %d" % (list_entry(image), label))
    return b"\n".join(lines) + b"\n"
