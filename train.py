"""Train an image classifier from text lists: a frozen ResNet-18 with a new head.

    python train.py --epochs 20

Reads train.txt and test.txt, one image a line: its path, white space, its label.
Writes best.pth whenever the test accuracy beats the best so far (a plain
torchvision ResNet-18 state dict), and best.csv, one row an epoch.

What a frozen backbone says of an image never changes. So one pass decodes each
image once, turns it into a few views and keeps their 512 features; every epoch
then trains the head on those, in milliseconds. `predict.py` uses the result.
"""

import argparse
import contextlib
import copy
import csv
import errno
import functools
import glob
import hashlib
import http.client
import io
import itertools
import math
import os
import pickle
import shutil
import signal
import socket
import stat
import sys
import tempfile
import time
import traceback
import warnings
import zipfile
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from datetime import timedelta
from pathlib import Path

import numpy as np
import PIL
import torch
import torchvision
from PIL import Image, ImageChops
from torch import Tensor, nn
from torch import distributed as dist
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms as T
from torchvision.models import ResNet18_Weights, resnet18

BUNDLED_WEIGHTS = Path(__file__).resolve().parent / "food" / "resnet18-grocery.pth"
IMAGENET_URL = ResNet18_Weights.DEFAULT.url
DOWNLOAD_TIMEOUT = 10  # seconds without an answer or a byte before a download counts as stalled
CHECKPOINT_BYTES = 100_000_000  # a ResNet-18 twice: the old file and the new one
MAX_PIXELS = 89_478_485  # Pillow's own warning limit for decompression bombs
MAX_CLASSES = 100_000  # beyond this a label is a slip of the pen, and its head would not fit
SHOWN_PROBLEMS = 10
# On a CPU, of 4 to 32 views at a time, 8 pass fastest (measured, one thread): more than that outgrow its caches.
PASS_BATCH = {"cpu": 8, "cuda": 256, "mps": 64}
IMAGE_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")  # MPO opens as JPEG
READING_VERSION = 2  # of how images become numbers, up to `embed`: raise it and no cached feature is used
CHUNK_ROWS = 1024  # images a file of the cache: what a killed pass may lose
UNFROZEN_FROM = {"layer4": 7, "layer3": 6, "all": 0}  # places among resnet18's children
UPRIGHT = {  # EXIF orientation: what turns the stored pixels upright (EXIF 2.32, tag 0x0112)
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class UserError(Exception):
    """What the user can mend: one line each, and the exit status (2: before work, 1: during)."""

    def __init__(self, *lines: str, status: int = 2):
        super().__init__("\n".join(lines))
        self.lines, self.status = lines, status


class PhotoError(Exception):
    """Why one image can't be used."""


def shown(name: str | bytes | os.PathLike) -> str:
    """A name as it may be printed: control characters and broken encodings escaped."""
    text = os.fsdecode(name)
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "backslashreplace").decode() for c in text)


def reason_of(error: OSError) -> str:
    """What the operating system says went wrong, as part of a sentence."""
    return (error.strerror or str(error)).lower()


def open_regular(path: str | bytes | os.PathLike) -> io.BufferedReader:
    """Open a regular file to read its bytes; a FIFO would wait for a writer. Raises OSError."""
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise OSError(errno.EINVAL, "not a regular file")
    return open(path, "rb")


def warn(text: str) -> None:
    if my_rank() == 0:
        print(f"warning: {text}", file=sys.stderr, flush=True)


@contextlib.contextmanager
def one_line_errors() -> Iterator[None]:
    """Turn user errors, Ctrl-C and SIGTERM into a line and an exit status; bugs keep their traceback."""

    def terminate(*_) -> None:
        if hasattr(signal, "SIGCHLD"):  # sent to the whole group, as by `timeout`, it ends the workers too: no news
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        raise KeyboardInterrupt(143)

    with contextlib.suppress(ValueError):  # not the main thread: the caller owns the signals
        signal.signal(signal.SIGTERM, terminate)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a name never crashes an ASCII terminal
    try:
        yield
    except UserError as error:
        for line in error.lines if my_rank() == 0 or error.status == 1 else ():
            print(f"error: {line}", file=sys.stderr)
        sys.exit(error.status)
    except RuntimeError as error:
        if not isinstance(error, dist.DistBackendError) and "gloo" not in str(error):  # which has no type of its own
            raise
        print(f"error: another rank died ({str(error).splitlines()[0]}); the saved files are whole", file=sys.stderr)
        sys.exit(1)
    except BrokenPipeError:  # the reader of our output is gone, as in `| head -1`: nobody to tell
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    except KeyboardInterrupt as stop:
        status = stop.args[0] if stop.args else 130
        if my_rank() == 0:
            print(f"stopped by {'SIGTERM' if status == 143 else 'Ctrl-C'}; what was saved is whole", file=sys.stderr)
        sys.exit(status)


# Lists and images


class Photos:
    """A parsed list of n images. Tensors rather than objects, so that workers share one copy.

    text: all paths as bytes, joined by newlines; ends: (n,) where each ends in it;
    labels: (n,) from 0; lines: (n,) line numbers in the list file `name`.
    """

    def __init__(self, name: str, paths: Sequence[bytes], labels: Sequence[int], lines: Sequence[int]):
        self.name = name
        self.text = torch.frombuffer(bytearray(b"\n".join(paths) + b"\n"), dtype=torch.uint8)
        self.ends = torch.tensor([len(path) + 1 for path in paths], dtype=torch.int64).cumsum(0) - 1
        self.labels = torch.tensor(labels, dtype=torch.int64)
        self.lines = torch.tensor(lines, dtype=torch.int32)

    def __len__(self) -> int:
        return len(self.labels)

    def path(self, index: int) -> bytes:
        start = int(self.ends[index - 1]) + 1 if index else 0
        return self.text[start : int(self.ends[index])].numpy().tobytes()

    def paths(self) -> list[bytes]:
        # By their ends: a name may hold a newline itself.
        text, starts = self.text.numpy().tobytes(), [0, *(self.ends + 1).tolist()]
        return [text[start : end - 1] for start, end in itertools.pairwise(starts)]

    def subset(self, rows: Sequence[int]) -> "Photos":
        paths, labels, lines = self.paths(), self.labels.tolist(), self.lines.tolist()
        return Photos(self.name, [paths[r] for r in rows], [labels[r] for r in rows], [lines[r] for r in rows])

    def where(self, index: int) -> str:
        return f"{self.name}:{self.lines[index]}: {shown(self.path(index))}"


def file_problem(path: bytes) -> str | None:
    """Why no image can be read from this path, as far as the file system knows; None where it may."""
    try:
        mode = os.stat(path).st_mode
    except OSError as error:
        return "no such image" if isinstance(error, FileNotFoundError) else reason_of(error)
    if stat.S_ISDIR(mode):
        return "is a directory, not an image"
    # One more system call only where the mode does not already say that everybody may read.
    if mode & 0o444 != 0o444 and not os.access(path, os.R_OK):
        return "no permission to read it"
    return None


def missing_hint(path: bytes, list_path: Path) -> str:
    """What most often makes a listed path miss its file."""
    if path[:1] in b"\"'" and path[-1:] == path[:1]:
        return "remove the quotes: paths may hold spaces as they are"
    if path.endswith((b",", b";")):
        return "remove the comma: path and label are separated by white space"
    if b"\\" in path and os.path.exists(path.replace(b"\\", b"/")):
        return "write / instead of \\"
    if os.path.exists(os.path.join(os.fsencode(list_path.parent), path)):
        return f"it lies beside the list: add --root {shown(list_path.parent)}"
    return "paths are relative to the working directory, or to --root DIR"


def read_text(path: Path) -> bytes:
    """A text file's bytes, known to be UTF-8, without BOM. Raises UserError."""
    name = shown(path)
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise UserError(f"{name}: {reason_of(error)}; name an existing text file") from None
    if raw.startswith((b"\xff\xfe", b"\xfe\xff")) or b"\0" in raw[:1000]:
        raise UserError(f"{name}:1: looks like UTF-16; save it as UTF-8")
    try:
        raw.decode("utf-8")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise UserError(f"{name}:{line}: not UTF-8 (Latin-1 or Windows-1252, perhaps); save it as UTF-8") from None
    if b"\0" in raw:
        raise UserError(f"{name}:{raw.count(chr(10).encode(), 0, raw.index(0)) + 1}: holds a NUL byte; not a text list")
    return raw.removeprefix(b"\xef\xbb\xbf")


def label_problem(fields: Sequence[bytes]) -> str | None:
    """What keeps the last of a line's fields from being a label."""
    label = fields[-1]
    if len(fields) == 1:
        comma = b"," in label or b";" in label
        return f"no label; separate path and label by {'a space, not a comma' if comma else 'white space'}"
    if not label.isdigit():  # of bytes: ASCII digits alone
        return f"label '{shown(label)}' is not a whole number; number the classes 0, 1, 2, ..."
    if len(label) > 18 or int(label) >= MAX_CLASSES:
        return f"label {shown(label)[:24]} is not below {MAX_CLASSES:,}; number the classes 0, 1, 2, ..."
    return None


def read_list(list_path: Path, root: Path) -> tuple[Photos, list[str]]:
    """Parse `path label` lines. Returns the images and all problems, each as `FILE:LINE: reason; fix`.

    Lines are bytes until they are shown: no locale has a say in them.
    """
    name, prefix = shown(list_path), b"" if root == Path() else os.path.join(os.fsencode(root), b"")
    paths, labels, lines, problems = [], [], [], []
    seen = {}  # path: its place in the list
    repeats = 0
    for number, line in enumerate(read_text(list_path).split(b"\n"), 1):
        fields = line.rsplit(None, 1)
        listed = fields[0].strip() if fields else b"#"
        if listed[:1] == b"#":
            continue
        if problem := label_problem(fields):
            problems.append(f"{name}:{number}: {problem}")
            continue
        listed, label = listed.removeprefix(b"./"), int(fields[1])
        path = os.path.join(prefix, listed) if prefix else listed
        earlier = seen.setdefault(path, len(paths))
        if earlier < len(paths):
            repeats += 1
            if labels[earlier] != label:
                both = f"label {label} here and {labels[earlier]} on line {lines[earlier]}"
                problems.append(f"{name}:{number}: {shown(listed)} has {both}; keep one of the two")
            continue
        if problem := file_problem(path):
            hint = missing_hint(listed, list_path) if problem == "no such image" else "mend or remove the line"
            problems.append(f"{name}:{number}: {shown(listed)}: {problem}; {hint}")
        paths.append(path)
        labels.append(label)
        lines.append(number)
    if not paths and not problems:
        problems.append(f"{name}:1: the list is empty; each line is: path, white space, label")
    if repeats:
        warn(f"{name}: {repeats:,} repeated line{'s' * (repeats > 1)} dropped")
    return Photos(name, paths, labels, lines), problems


def read_lists(train_path: Path, test_path: Path, root: Path) -> tuple[Photos, Photos]:
    """Both lists, checked. Raises UserError with the first problems of both together."""
    train, problems = read_list(train_path, root)
    test, more = read_list(test_path, root)
    problems += more
    known = torch.bincount(train.labels) if len(train) else torch.zeros(1)
    for index in torch.nonzero(~torch.isin(test.labels, known.nonzero())).flatten().tolist() if len(train) else []:
        problems.append(
            f"{test.name}:{test.lines[index]}: label {test.labels[index]} is not in {train.name}; "
            "add training images of it or remove the line"
        )
    if problems:
        count = len(problems)
        more = f", {SHOWN_PROBLEMS} of them shown" if count > SHOWN_PROBLEMS else ""
        last = f"{count:,} problem{'s' * (count > 1)} in the lists{more}; mend the lines and run again"
        raise UserError(*problems[:SHOWN_PROBLEMS], last)
    if gaps := torch.nonzero(known == 0).flatten().tolist():
        warn(f"{train.name}: no image has label {some(gaps)}: its class can never be learned")
    if single := torch.nonzero(known == 1).flatten().tolist():
        warn(f"{train.name}: only one image has label {some(single)}: its class is learned by heart")
    return train, test


def some(items: Sequence) -> str:
    """The first three of some items, and how many follow."""
    rest = f" and {len(items) - 3:,} more" if len(items) > 3 else ""
    return ", ".join(str(item) for item in items[:3]) + rest


def class_names(photos: Photos, classes_path: Path | None, classes: int) -> list[str]:
    """One name a class: from the file, else from the folders where they tell the classes apart, else numbers."""
    if classes_path is not None:
        names = [line.strip() for line in read_text(classes_path).decode().splitlines() if line.strip()]
        if len(names) != classes:
            raise UserError(f"{shown(classes_path)}: {len(names)} names for {classes} classes; write one name a line")
        return names
    folders = defaultdict(set)
    for path, label in zip(photos.paths(), photos.labels.tolist()):
        folders[label].add(os.path.dirname(path))
    found = {label: {os.path.basename(folder) for folder in each} for label, each in folders.items()}
    names = [os.fsdecode(next(iter(found[c]))) if len(found.get(c, ())) == 1 else "" for c in range(classes)]
    telling = all(names) and len(set(names)) == classes
    return names if telling else [str(label) for label in range(classes)]


def split_validation(photos: Photos, share: float, seed: int) -> tuple[Photos, Photos]:
    """What is left to train on, and a share of each class drawn by seed: at least one image, never all of them.

    Raises UserError where every class has a single image.
    """
    generator = torch.Generator().manual_seed(seed)
    held = []
    for label in photos.labels.unique():
        rows = (photos.labels == label).nonzero().flatten()
        count = min(max(1, round(share * len(rows))), len(rows) - 1)
        held += rows[torch.randperm(len(rows), generator=generator)[:count]].tolist()
    if not held:
        raise UserError(
            f"--val-split: {photos.name} has one image of each class, none to spare; add some or leave it out"
        )
    kept = sorted(set(range(len(photos))) - set(held))
    return photos.subset(kept), photos.subset(sorted(held))


def read_photo(path: str | bytes | os.PathLike) -> Image.Image:
    """Decode one image to upright RGB, large JPEGs at reduced scale. Raises PhotoError with the reason."""
    try:
        with open_regular(path) as file:
            return decode_photo(file)
    except OSError as error:
        raise PhotoError(reason_of(error)) from None


def decode_photo(file: io.BufferedIOBase) -> Image.Image:
    """The image in an open file, as `read_photo` gives it."""
    head = file.read(32)
    file.seek(0)
    if head[4:8] == b"ftyp" and head[8:12] in (b"heic", b"heix", b"heim", b"heis", b"hevc", b"mif1", b"msf1"):
        raise PhotoError("HEIC; convert it to JPEG")
    # Pillow raises nearly every exception there is on damaged bytes, and warns of what is handled here.
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            image = Image.open(file, formats=IMAGE_FORMATS)
            canvases = 3 if image.format == "WEBP" else 1  # that its decoder holds at once, of a still image too
            if image.width * image.height * canvases > MAX_PIXELS:
                limit = f"{MAX_PIXELS // canvases:,}{' for WebP' if canvases > 1 else ''}"
                raise PhotoError(f"{image.width}x{image.height} pixels, over the limit of {limit}")
            if image.format == "PNG":  # reading pixels skips their checksums
                image.verify()
                file.seek(0)
                image = Image.open(file, formats=IMAGE_FORMATS)
            image.draft("RGB", (2 * RESIZE_TRAINING.size[0], 2 * RESIZE_TRAINING.size[1]))
            image.load()
            image = upright(image)  # the stored pixels are let go
            return as_rgb(image)
    except PhotoError:
        raise
    except (Image.UnidentifiedImageError, Image.DecompressionBombError) as error:
        bomb = isinstance(error, Image.DecompressionBombError)
        raise PhotoError(f"over the limit of {MAX_PIXELS:,} pixels" if bomb else "not an image") from None
    except Exception as error:
        raise PhotoError(f"damaged ({shown(str(error)) or type(error).__name__})") from None


def upright(image: Image.Image) -> Image.Image:
    """Turned as its EXIF orientation says; as stored where that can't be read."""
    try:
        turn = UPRIGHT.get(image.getexif().get(0x0112))
    except Exception:  # damaged EXIF raises anything; the pixels are sound
        return image
    return image if turn is None else image.transpose(turn)


def as_rgb(image: Image.Image) -> Image.Image:
    """Any mode as RGB: transparency on white, 16-bit grey scaled to 8. Raises PhotoError for 32-bit pixels."""
    if image.mode in ("I", "F"):
        raise PhotoError("32-bit pixels; convert it to 8 or 16 bits")
    if image.mode.startswith("I;16"):
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        # No copy more than this: of the largest images each is a third of a gigabyte.
        alpha = (image if image.mode in ("RGBA", "LA") else image.convert("RGBA")).getchannel("A")
        colour = image.convert("RGB")
        colour.paste("white", mask=ImageChops.invert(alpha))
        return colour
    return image if image.mode == "RGB" else image.convert("RGB")


# Views. The evaluation view is the only one in evaluation and prediction, and view 0 in training.

EVALUATION_VIEW = T.Resize((224, 224))
RESIZE_TRAINING = T.Resize((300, 300))
TRAINING_VIEW = T.Compose(  # of an image through RESIZE_TRAINING, which all training views share
    [
        T.RandomRotation(45),
        T.CenterCrop(224),
        T.RandomHorizontalFlip(0.5),
        T.RandomVerticalFlip(0.5),
        T.ColorJitter(brightness=0.4, contrast=0.4, saturation=0.4, hue=0.1),
    ]
)
NORMALIZE = T.Normalize(mean=[0.485, 0.456, 0.406], std=[0.229, 0.224, 0.225])  # ImageNet's


def draw_views(image: Image.Image, views: Sequence[int], seed: int, index: int) -> Tensor:
    """The views of one image, uint8 (V, 224, 224, 3). View 0 is the evaluation view, others are random.

    A random view depends on (seed, index, view) alone: not on workers, batches or order.
    """
    drawn, resized = [], None
    for view in views:
        if view == 0:
            drawn.append(EVALUATION_VIEW(image))
            continue
        resized = resized or RESIZE_TRAINING(image)
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(int(np.random.SeedSequence((seed, index, view)).generate_state(1)[0]))
            drawn.append(TRAINING_VIEW(resized))
    return torch.from_numpy(np.stack([np.asarray(view) for view in drawn]))


class Views(Dataset):
    """Image i of a list as (i, its views), or as (i, the reason) where it can't be read.

    by_turns: one view of each image, the next of them with each next image.
    """

    def __init__(self, photos: Photos, views: Sequence[int], seed: int, by_turns: bool = False):
        self.photos, self.views, self.seed, self.by_turns = photos, views, seed, by_turns

    def __len__(self) -> int:
        return len(self.photos)

    def __getitem__(self, index: int) -> tuple[int, Tensor | str]:
        views = [self.views[index % len(self.views)]] if self.by_turns else self.views
        try:
            return index, draw_views(read_photo(self.photos.path(index)), views, self.seed, index)
        except PhotoError as error:
            return index, str(error)


def collate(
    samples: Sequence[tuple[int, Tensor | str]], embed_views: Callable[[Tensor], Tensor] | None = None
) -> tuple[list[int], Tensor, dict[int, str]]:
    """Row numbers of what could be read, its views (n * V, 224, 224, 3) or what `embed_views` gives for them,
    and the reasons by row number of the rest.
    """
    good = [(index, views) for index, views in samples if isinstance(views, Tensor)]
    bad = {index: reason for index, reason in samples if isinstance(reason, str)}
    views = torch.cat([views for _, views in good]) if good else torch.empty(0)
    return [index for index, _ in good], embed_views(views) if embed_views and good else views, bad


# Model


def pick_device(name: str) -> torch.device:
    """The device of `--device`; auto is CUDA, else MPS, else CPU. Raises UserError."""
    have = ["cpu"]
    if torch.backends.mps.is_available():
        have.insert(0, "mps")
    if torch.cuda.is_available():
        have[:0] = ["cuda", *(f"cuda:{n}" for n in range(torch.cuda.device_count()))]
    if name == "auto":
        rank = os.environ.get("LOCAL_RANK")
        return torch.device(f"cuda:{rank}" if rank and have[0] == "cuda" else have[0])
    if name not in have:
        raise UserError(f"--device {shown(name)}: this machine offers {', '.join(have)}; pick one of them or auto")
    return torch.device(name)


def pick_precision(name: str, device: torch.device) -> torch.dtype:
    """The dtype that convolutions run in; auto is the fastest one that the device runs natively."""
    if name != "auto":
        return {"float32": torch.float32, "bfloat16": torch.bfloat16}[name]
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    if device.type == "cpu" and hasattr(torch.cpu, "get_capabilities"):
        can = torch.cpu.get_capabilities()
        if any(can.get(feature) for feature in ("avx512_bf16", "amx_bf16", "bf16")):
            return torch.bfloat16
    return torch.float32


def build_model(classes: int, state: dict[str, Tensor] | None, seed: int) -> nn.Module:
    """A frozen ResNet-18 in inference mode with a new head for so many classes.

    Frozen means that no buffer moves either: in training mode BatchNorm's running statistics
    would drift towards the new photos, and nothing computed once would stay true.
    """
    torch.manual_seed(seed)
    model = resnet18()
    if state is not None:
        model.load_state_dict(state, strict=False)  # what fits and what doesn't was settled by `check_resnet18`
    for parameter in model.parameters():
        parameter.requires_grad = False
    torch.manual_seed(seed)  # the same head, whatever the backbone's origin
    model.fc = nn.Linear(model.fc.in_features, classes)
    return model.eval().to(memory_format=torch.channels_last)


def backbone_of(model: nn.Module) -> nn.Sequential:
    """Everything but the head, as one module: images (N, 3, 224, 224) to features (N, 512)."""
    return nn.Sequential(*list(model.children())[:-1], nn.Flatten(1))


def frozen(module: nn.Module, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """A copy for `embed`: on the device, its convolutions in the dtype. Autocast gives the same bits, but casts the
    weights anew for every batch.
    """
    module = copy.deepcopy(module).to(device, memory_format=torch.channels_last)
    for part in module.modules():
        if isinstance(part, nn.Conv2d):
            part.to(dtype)
    return module


@torch.inference_mode()
def embed(module: nn.Module, views: Tensor, device: torch.device, dtype: torch.dtype) -> Tensor:
    """What a `frozen` module gives for uint8 views (N, 224, 224, 3), on its device and in its dtype."""
    # NORMALIZE, for bytes and along whole rows of pixels: four times as fast as over three channels.
    rows = views.to(device, non_blocking=True).flatten(2).float()  # (N, 224, 672)
    mean, std = (255 * torch.tensor(three).repeat(views.shape[2]) for three in (NORMALIZE.mean, NORMALIZE.std))
    rows.sub_(mean.to(device)).div_(std.to(device))
    # Seen as (N, 3, 224, 224) the numbers lie in channels_last order already.
    return module(rows.to(dtype).view(views.shape).permute(0, 3, 1, 2))


def cores_of_rank() -> int:
    """The cores that this process may use, shared with the other ranks on this machine."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))


def ignore_interrupts(_: int) -> None:
    """Ctrl-C reaches the whole process group: workers leave it to the parent, which ends them."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


@functools.cache
def warn_once(text: str) -> None:
    warn(text)


def shrinking(embed_views: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """The same function, in 2, 4, then 8 parts where the device's memory is too small for the whole."""
    parts = 1

    def embed_parts(views: Tensor) -> Tensor:
        nonlocal parts
        while True:
            try:
                return torch.cat([embed_views(part) for part in views.chunk(parts)])
            except RuntimeError as error:
                if not isinstance(error, torch.OutOfMemoryError) and "out of memory" not in str(error):
                    raise
                if parts == 8:
                    raise UserError("the device is out of memory; run with --device cpu", status=1) from None
                warn_once("the device is out of memory; the pass goes on in smaller batches")
                parts *= 2

    return embed_parts


def embed_in_order(
    module: nn.Module,
    dataset: Views,
    rows: Sequence[int],
    *,
    device: torch.device,
    dtype: torch.dtype,
    batch_size: int,
    workers: int,
    per_image: int = 1,
) -> Iterator[tuple[list[int], Tensor, dict[int, str]]]:
    """Decode the rows of a dataset, and give what a module makes of their views, batch by batch, in order:
    row numbers, values (n, ...) or (n, per_image, ...), and the reasons by row of what can't be read.

    On a CPU the worker that decodes an image also runs the module on it, single-threaded: no core waits for
    another, and features travel instead of pixels. For other devices workers decode and pixels travel.
    Where workers die, the rest is done without. Raises UserError (status 1) where the device's memory is too
    small for an eighth of a batch.
    """
    embed_views = functools.partial(embed, module, device=device, dtype=dtype)
    here = None if device.type == "cpu" else shrinking(embed_views)
    done = 0
    while done < len(rows):
        loader = DataLoader(
            dataset,
            batch_size=batch_size,
            sampler=rows[done:],
            num_workers=min(workers, math.ceil((len(rows) - done) / batch_size)),
            collate_fn=functools.partial(collate, embed_views=None if here else embed_views),
            pin_memory=device.type == "cuda",
            worker_init_fn=ignore_interrupts,
            # A forked worker starts at once; a spawned one imports torch first, but is safe everywhere.
            multiprocessing_context=("fork" if sys.platform == "linux" else "spawn") if workers else None,
        )
        try:
            for indices, values, bad in loader:
                values = here(values) if here and indices else values
                yield indices, values.unflatten(0, (-1, per_image)) if per_image > 1 and indices else values, bad
                done += len(indices) + len(bad)
        except RuntimeError as error:
            if not workers or "DataLoader worker" not in str(error):
                raise
            warn("a worker died: out of memory, or /dev/shm is too small (docker run --shm-size=1g); going on without")
            traceback.clear_frames(error.__traceback__)  # ends the other workers now, not with the next garbage
            workers = 0


class Progress:
    """Images done, images/s and time left, on stderr where that is a terminal."""

    def __init__(self, what: str, total: int):
        self.what, self.total, self.done, self.width = what, total, 0, 0
        self.began = self.said = time.perf_counter()

    def add(self, count: int) -> None:
        self.done += count
        now = time.perf_counter()
        if my_rank() or not sys.stderr.isatty() or (now - self.said < 0.2 and self.done < self.total):
            return
        self.said = now
        rate = self.done / (now - self.began)
        left = (self.total - self.done) / rate
        line = f"{self.what} {self.done:,}/{self.total:,} images  {rate:.0f}/s  {left:.0f} s left"
        print(f"\r{line:<{self.width}}", end="\n" if self.done == self.total else "", file=sys.stderr, flush=True)
        self.width = len(line)


def each_image(batches: Iterable[tuple[list[int], Tensor, dict[int, str]]]) -> Iterator[tuple[int, Tensor | str]]:
    """Image by image, in order: its row and its values, float32 on the CPU, or the reason why it has none."""
    for rows, values, bad in batches:
        yield from sorted([*zip(rows, values.cpu().float(), strict=False), *bad.items()], key=lambda image: image[0])


class Features:
    """Features of n images, float32 (n, V, 512), in chunks of `step` rows: in memory, or mapped from the cache."""

    def __init__(self, chunks: Sequence[Tensor], step: int):
        self.chunks, self.step = chunks, step

    def take(self, rows: Tensor, view: int) -> Tensor:
        """One view of some rows: (len(rows), 512)."""
        if len(self.chunks) == 1:
            return self.chunks[0][rows, view]
        taken = torch.empty(len(rows), self.chunks[0].shape[2])
        for chunk in (rows // self.step).unique().tolist():
            here = rows // self.step == chunk
            taken[here] = self.chunks[chunk][rows[here] - chunk * self.step, view]
        return taken

    def digests(self, count: int) -> list[int]:
        """A number for each of the first `count` images that tells it by its evaluation view."""
        rows = (features for chunk in self.chunks for features in chunk[:, 0])
        return [hash(features.numpy().tobytes()) for features in itertools.islice(rows, count)]


def extract_features(
    backbone: nn.Module,
    dataset: Views,
    *,
    device: torch.device,
    dtype: torch.dtype,
    workers: int,
    cache: Path | None = None,
    tolerated: int = 0,
    alone: bool = False,
) -> tuple[Features | None, dict[int, str]]:
    """One pass: each image decoded once, each of its V views through the backbone once.

    Returns the features and the reason for each row that could not be read. With a cache, chunks found there
    are not computed, and new ones are kept. Under torchrun each rank does its share, unless it works alone, and
    the features are rank 0's alone. Raises UserError (status 1) where more images than tolerated can't be read,
    and as `embed_in_order` and `save_atomically` do.
    """
    rows = range(len(dataset)) if alone else my_share(len(dataset))
    step = CHUNK_ROWS if cache else max(1, len(rows))
    spans = [range(start, min(start + step, rows.stop)) for start in range(rows.start, rows.stop, step)]
    paths, found = [], [None] * len(spans)
    if cache:
        recipe = recipe_digest(backbone, dataset, device, dtype)
        paths = [chunk_path(cache, recipe, dataset.photos, span) for span in spans]
        found = [
            read_chunk(path, (len(span), len(dataset.views), 512)) for path, span in zip(paths, spans, strict=True)
        ]
    missing = [number for number, chunk in enumerate(found) if chunk is None]
    images = each_image(
        embed_in_order(
            backbone,
            dataset,
            [row for number in missing for row in spans[number]],
            device=device,
            dtype=dtype,
            batch_size=max(1, PASS_BATCH[device.type] // len(dataset.views)),
            workers=workers,
            per_image=len(dataset.views),
        )
    )
    progress = Progress(f"{dataset.photos.name}:", sum(len(spans[number]) for number in missing))
    for number in missing:
        found[number] = fill_chunk(images, spans[number], len(dataset.views), progress)
        if cache:
            save_chunk(paths[number], *found[number])
            found[number] = read_chunk(paths[number], found[number][0].shape) or found[number]
    unread = {row: reason for _, reasons in found for row, reason in reasons.items()}
    features = Features([chunk for chunk, _ in found], step)
    if not alone and world_size() > 1:
        features, unread = gather_features(features, unread, len(dataset))
    settle_unread(dataset.photos, unread, tolerated)
    return features, unread


def fill_chunk(
    images: Iterator[tuple[int, Tensor | str]], span: range, views: int, progress: Progress
) -> tuple[Tensor, dict[int, str]]:
    """The features (len(span), V, 512) of the next images, and the reasons by row of those without."""
    features, unread = torch.zeros(len(span), views, 512), {}
    for row, values in itertools.islice(images, len(span)):
        if isinstance(values, str):
            unread[row] = values
        else:
            features[row - span.start] = values
        progress.add(1)
    return features, unread


# The cache: a file a chunk, whose name covers all that its features depend on.


def recipe_digest(backbone: nn.Module, dataset: Views, device: torch.device, dtype: torch.dtype) -> bytes:
    """What features depend on besides the images: weights, views and their seed, arithmetic, versions."""
    views = [str(EVALUATION_VIEW), str(RESIZE_TRAINING), str(TRAINING_VIEW), str(NORMALIZE), READING_VERSION]
    versions = [torch.__version__, torchvision.__version__, PIL.__version__]
    parts = [views, versions, list(dataset.views), dataset.seed, device.type, str(dtype)]
    digest = hashlib.sha256(repr(parts).encode())
    for key, value in backbone.state_dict().items():
        digest.update(key.encode())
        digest.update(value.cpu().float().contiguous().numpy().tobytes())
    return digest.digest()


def chunk_path(cache: Path, recipe: bytes, photos: Photos, span: range) -> Path:
    """Where the chunk of these rows is kept: each image counts with its row, path, size and modification time."""
    digest = hashlib.sha256(recipe)
    for row in span:
        path = os.path.abspath(photos.path(row))
        with contextlib.suppress(OSError):  # gone since the list was checked: the pass will say so
            info = os.stat(path)
            digest.update(repr((row, path, info.st_size, info.st_mtime_ns)).encode())
    return cache / f"{digest.hexdigest()[:40]}.pt"


def read_chunk(path: Path, shape: Sequence[int]) -> tuple[Tensor, dict[int, str]] | None:
    """A kept chunk, memory-mapped, and its reasons by row; None, with a warning, where it is damaged."""
    if not path.exists():
        return None
    try:
        chunk = load_untrusted(path, mmap=True)
        features, unread = chunk["features"], chunk["unread"]
        fits = features.shape == shape and features.dtype == torch.float32 and type(unread) is dict
        if fits and chunk["name"] == path.name:
            return features, unread
    except (UserError, KeyError, TypeError, AttributeError):
        pass
    warn(f"{shown(path)}: damaged or foreign; computed again")
    return None


def save_chunk(path: Path, features: Tensor, unread: dict[int, str]) -> None:
    save_tensors(path, {"name": path.name, "features": features, "unread": unread})


# Ranks: the processes of one torchrun.


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def my_rank() -> int:
    """This process among torchrun's; 0, the one that prints and writes, where it runs alone."""
    return int(os.environ.get("RANK", 0))


def join_ranks() -> None:
    """Meet the other ranks where torchrun started this process. The others than rank 0 fall silent."""
    if int(os.environ.get("WORLD_SIZE", 1)) > 1 and not dist.is_initialized():
        # gloo for what lies on the CPU, and nccl for the gradients on CUDA. Rank 0 may train the head for hours.
        dist.init_process_group(timeout=timedelta(hours=12))
        if my_rank():
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def my_share(count: int) -> range:
    """This rank's rows of so many: equal slices, the last one shorter."""
    size, rank = math.ceil(count / world_size()), my_rank() if dist.is_initialized() else 0
    return range(min(rank * size, count), min((rank + 1) * size, count))


def gather_features(features: Features, unread: dict[int, str], count: int) -> tuple[Features | None, dict[int, str]]:
    """All ranks' features on rank 0, None on the others, and all ranks' unread rows on each."""
    size = math.ceil(count / world_size())
    shape = torch.tensor(features.chunks[0].shape[1:] if features.chunks else (0, 0))
    dist.all_reduce(shape, op=dist.ReduceOp.MAX)  # a rank without rows does not know it
    mine = torch.zeros(size, *shape.tolist())
    for number, chunk in enumerate(features.chunks):
        mine[number * features.step : number * features.step + len(chunk)] = chunk
    chunks = [torch.empty_like(mine) for _ in range(world_size())] if my_rank() == 0 else None
    dist.gather(mine, chunks)
    reasons = [None] * world_size()
    dist.all_gather_object(reasons, unread)
    return Features(chunks, size) if chunks else None, {row: why for each in reasons for row, why in each.items()}


# Weights and checkpoints

WEIGHT_TYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
FORMAT = 1  # of what `save_checkpoint` adds to a state dict
ABOUT = "train.py"  # its key in the state dict's _metadata, which a plain load_state_dict ignores
ABOUT_TYPES = {
    "format": int,
    "classes": list,  # of their names, str
    "backbone": str,
    "chosen_on": str,  # the list whose accuracy chose the epoch
    "epoch": int,
    "accuracy": float,
    "seconds": float,
    "date": str,
    "device": str,
    "precision": str,
    "train_images": int,
    "test_images": int,
    "recipe": dict,  # the flags
}


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
        # Operand 149 begins every pickle of protocol 4 and later, which torch.save never writes.
        words = str(error).lower() if isinstance(error, pickle.UnpicklingError) else ""
        code = "unsupported global" in words or "unsupported operand 149" in words
        reason = "not a weights file: it holds more than tensors" if code else "damaged, or not a weights file"
        raise UserError(f"{name}: {reason}; get it again from its source") from None


def load_state(path: Path) -> tuple[dict[str, Tensor], object]:
    """A state dict from an untrusted file, under torchvision's names, and what `save_checkpoint` said of it.

    Nested under `model` or `state_dict`, or prefixed by DataParallel or torch.compile, is fine.
    Raises UserError as `load_untrusted` does, and where there is no state dict in it.
    """
    name, found = shown(path), load_untrusted(path)
    about = None
    for _ in range(3):  # a checkpoint in a checkpoint is common, deeper nesting is not
        if not isinstance(found, dict):
            raise UserError(f"{name}: holds no state dict; save model.state_dict() with torch.save")
        # dict's own methods here and below: a hostile OrderedDict may carry attributes by those names.
        metadata = vars(found).get("_metadata") if hasattr(found, "__dict__") else None
        about = dict.get(metadata, ABOUT) if isinstance(metadata, dict) else about
        found = next((found[key] for key in ("model", "state_dict") if isinstance(dict.get(found, key), dict)), found)
    # Only names: whatever else a key is, printing it may fail.
    items = {key if type(key) is str else type(key).__name__: value for key, value in dict.items(found)}
    return {key.replace("module.", "").replace("_orig_mod.", ""): value for key, value in items.items()}, about


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


def is_plain(value: object) -> bool:
    """Whether a value from an untrusted file is a tensor whose methods can be called and numbers read."""
    if type(value) not in (Tensor, nn.Parameter) or vars(value):  # attributes may stand before methods
        return False
    return value.layout == torch.strided and not (value.is_meta or value.is_quantized or value.is_nested)


def check_resnet18(state: dict[str, Tensor], path: Path) -> dict[str, Tensor]:
    """The entries of a ResNet-18, finite and of the right shapes. Raises UserError with the first that don't fit."""
    with torch.device("meta"):
        expected = resnet18().state_dict()
    head = state.get("fc.weight")
    if is_plain(head) and head.dim() == 2 and 0 < len(head) <= MAX_CLASSES:
        expected["fc.weight"] = torch.empty(len(head), 512, device="meta")
        expected["fc.bias"] = torch.empty(len(head), device="meta")
    elif head is None:  # a backbone alone
        expected = {key: value for key, value in expected.items() if not key.startswith("fc.")}
    problems = [f"unexpected {shown(key)[:60]}" for key in state if key not in expected]
    for key, value in expected.items():
        given = state.get(key)
        if given is None:
            if not key.endswith("num_batches_tracked"):  # a count that nothing reads
                problems.append(f"no {key}")
        elif not is_plain(given):
            problems.append(f"{key} is no plain tensor")
        elif given.shape != value.shape:
            problems.append(f"{key} is {'x'.join(map(str, given.shape))}, not {'x'.join(map(str, value.shape))}")
        elif given.dtype not in (WEIGHT_TYPES if value.is_floating_point() else (torch.int64,)):
            problems.append(f"{key} is {str(given.dtype).removeprefix('torch.')}")
        elif not given.isfinite().all():
            problems.append(f"{key} has values that are not finite")
    if problems:
        raise UserError(f"{shown(path)}: does not fit a ResNet-18: {some(problems)}; give one made for resnet18")
    return {key: state[key] if key in state else torch.tensor(0) for key in expected}  # no count: none was tracked


def load_backbone(path: Path) -> dict[str, Tensor]:
    """The state dict of a backbone from any ResNet-18 file, its head dropped. Raises UserError."""
    state = check_resnet18(load_state(path)[0], path)
    return {key: value for key, value in state.items() if not key.startswith("fc.")}


def load_checkpoint(path: Path) -> tuple[nn.Module, dict]:
    """A ResNet-18 in inference mode and what is known of it: at least its `classes`, a list of names.

    Raises UserError as `load_state` and `check_resnet18` do, and where the file has no head.
    """
    state, about = load_state(path)
    state = check_resnet18(state, path)
    if "fc.weight" not in state:
        raise UserError(f"{shown(path)}: has no head (fc.weight); give the best.pth that train.py saved")
    classes = len(state["fc.weight"])
    with torch.device("meta"):
        model = resnet18(num_classes=classes)
    model.load_state_dict({key: value.float() for key, value in state.items()}, assign=True)
    if about is not None and not is_about(about, classes):
        warn(f"{shown(path)}: its class names and history are malformed; going on with class numbers")
        about = None
    return model.eval(), about or {"classes": [str(label) for label in range(classes)]}


def is_about(about: object, classes: int) -> bool:
    """Whether a checkpoint's own account has the form that `save_checkpoint` gives it."""
    # Exact types: a subclass from a hostile file may carry anything under dict's method names.
    if type(about) is not dict or any(type(about[key]) is not ABOUT_TYPES[key] for key in about if key in ABOUT_TYPES):
        return False
    names = about.get("classes", ())
    return about.get("format") == FORMAT and len(names) == classes and all(type(name) is str for name in names)


def save_atomically(path: Path, content: bytes | memoryview) -> None:
    """Write beside the file, then rename: at any moment the file is the old one or the new one, whole.

    Raises UserError (status 1) where the disk is full or fails.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        reason = "disk full" if error.errno in (errno.ENOSPC, errno.EDQUOT) else reason_of(error)
        raise UserError(f"{shown(path)}: {reason}; what was saved before is intact", status=1) from None
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def save_tensors(path: Path, content: object) -> None:
    """`torch.save`, atomically: through memory, so that a failing disk raises what `save_atomically` catches."""
    buffer = io.BytesIO()
    torch.save(content, buffer)
    save_atomically(path, buffer.getbuffer())


def prepare_output(path: Path, cache: Path | None) -> None:
    """Check that a checkpoint can be saved there and features kept; sweep what a killed run left. Raises UserError."""
    name, folder = shown(path), path.parent
    if path.is_dir():
        raise UserError(f"--out {name}: is a directory; name a file, such as {shown(path / 'best.pth')}")
    if path.suffix == ".csv":
        raise UserError(f"--out {name}: the .csv beside the checkpoint has this name; end it in .pth")
    try:
        with tempfile.TemporaryFile(dir=folder):
            free = shutil.disk_usage(folder).free
        for saved in (path, path.with_suffix(".csv")):
            for stale in folder.glob(f".{glob.escape(saved.name)}.*.tmp"):
                stale.unlink(missing_ok=True)
    except OSError as error:
        why = f"can't write in {shown(folder)} ({reason_of(error)})"
        raise UserError(f"--out {name}: {why}; name another folder") from None
    try:
        if cache:
            cache.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--cache {shown(cache)}: {reason_of(error)}; name a folder") from None
    if free < CHECKPOINT_BYTES:
        raise UserError(
            f"--out {name}: disk full ({free >> 20} MB free, {CHECKPOINT_BYTES >> 20} needed); free some space"
        )


def save_checkpoint(path: Path, model: nn.Module, about: dict) -> None:
    """Save a plain torchvision state dict that carries `about` where only this project looks for it."""
    state = model.state_dict()
    for key, value in state.items():
        state[key] = value.detach().cpu().contiguous()
    state._metadata[ABOUT] = {"format": FORMAT, **about}
    save_tensors(path, state)


def imagenet_path() -> Path:
    """Where torchvision keeps its ImageNet weights."""
    return Path(torch.hub.get_dir()) / "checkpoints" / Path(IMAGENET_URL).name


def download_imagenet() -> Path:
    """The file of the ImageNet weights, downloaded if need be. Raises OSError or RuntimeError."""
    path = imagenet_path()
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        before = socket.getdefaulttimeout()
        socket.setdefaulttimeout(DOWNLOAD_TIMEOUT)
        try:
            # Into a temporary file that it removes on failure; the name carries the hash.
            hash_prefix = path.stem.rpartition("-")[2]
            torch.hub.download_url_to_file(IMAGENET_URL, str(path), hash_prefix, progress=sys.stderr.isatty())
        finally:
            socket.setdefaulttimeout(before)
    return path


def find_weights(wish: str | None) -> tuple[dict[str, Tensor] | None, str, list[str]]:
    """The backbone of `--weights`, its origin in words, and what the user must know of it. Raises UserError.

    An explicit wish is never replaced; with none, the bundled backbone stands in for ImageNet's.
    """
    if wish == "none":
        return None, "random weights", []
    if wish not in (None, "imagenet"):
        return load_backbone(Path(wish)), shown(wish), []
    try:
        return load_backbone(download_imagenet()), f"ImageNet ({ResNet18_Weights.DEFAULT})", []
    except (OSError, RuntimeError, http.client.HTTPException) as error:
        reason = shown(str(getattr(error, "reason", error)))
    fix = f"fetch {IMAGENET_URL} elsewhere and put it at {shown(imagenet_path())}, or give it as --weights FILE"
    if wish == "imagenet":
        raise UserError(f"ImageNet weights can't be downloaded ({reason}); {fix}")
    bundled = shown(os.path.relpath(BUNDLED_WEIGHTS))
    caveat = f"no ImageNet weights ({reason}): using the bundled {bundled}, which is far weaker"
    return load_backbone(BUNDLED_WEIGHTS), f"{bundled} (bundled)", [caveat, f"for the real ones, {fix}"]


# Training


class Network(nn.Module):
    """Unfrozen stages and the head on them, as `predict.py` computes both: the head always in float32."""

    def __init__(self, tail: nn.Module, head: nn.Module, device: torch.device, dtype: torch.dtype):
        super().__init__()
        self.tail, self.head, self.device = tail, head, device
        self.dtype = torch.float32 if dtype == torch.float16 else dtype  # float16's gradients would need scaling

    def forward(self, inputs: Tensor) -> Tensor:
        inputs = inputs.to(self.dtype, memory_format=torch.channels_last)
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
            features = self.tail(inputs)
        return self.head(features.float())


def batches_of(features: Features, labels: Tensor, order: Tensor, view: int, batch_size: int) -> Iterator[tuple]:
    """(features, labels) of one view, batch by batch, in the given order of rows."""
    for rows in order.split(batch_size):
        yield features.take(rows, view), labels[rows]


def mean_over(model: nn.Module, total_loss: float, right: int, count: int) -> tuple[float, float]:
    """Loss and accuracy over the samples of all ranks that train the model."""
    totals = torch.tensor([total_loss, right, count], dtype=torch.float64)
    if isinstance(model, DistributedDataParallel):
        dist.all_reduce(totals)
    return (totals[0] / totals[2]).item(), (totals[1] / totals[2]).item()


def train_one_epoch(
    model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]], optimizer: torch.optim.Optimizer, epoch: int
) -> tuple[float, float]:
    """Mean loss and accuracy over the epoch's samples, as they were trained on.

    Raises UserError (status 1) where the loss is not finite.
    """
    total_loss, right, count = 0.0, 0, 0
    for step, (inputs, labels) in enumerate(batches, 1):
        logits = model(inputs)
        loss = F.cross_entropy(logits, labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        mean_loss = loss.item()
        if not math.isfinite(mean_loss):
            raise UserError(f"the loss is {mean_loss} in epoch {epoch}, step {step}; try a smaller --lr", status=1)
        total_loss += mean_loss * len(labels)  # the last batch may be smaller
        right += (logits.argmax(1) == labels).sum().item()
        count += len(labels)
    return mean_over(model, total_loss, right, count)


@torch.inference_mode()
def evaluate(model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]]) -> tuple[float, float]:
    """Mean loss and accuracy over all samples."""
    total_loss, right, count = 0.0, 0, 0
    for inputs, labels in batches:
        logits = model(inputs)
        total_loss += F.cross_entropy(logits, labels, reduction="sum").item()
        right += (logits.argmax(1) == labels).sum().item()
        count += len(labels)
    return mean_over(model, total_loss, right, count)


def train_epochs(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    epochs: range,
    train_batches: Callable[[int], Iterable[tuple[Tensor, Tensor]]],
    judge_batches: Callable[[], Iterable[tuple[Tensor, Tensor]]],
    history: "History",
) -> None:
    """Train, evaluate, lower the rate where the accuracy has stalled, keep the best: the recipe's loop."""
    plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, mode="max", patience=3, factor=0.5)
    for epoch in epochs:
        lr = optimizer.param_groups[0]["lr"]
        trained = train_one_epoch(model, train_batches(epoch), optimizer, epoch)
        judged = evaluate(model, judge_batches())
        if not math.isfinite(judged[0]):
            raise UserError(f"the evaluation loss is {judged[0]} in epoch {epoch}; try a smaller --lr", status=1)
        plateau.step(judged[1])
        history.add(epoch, trained, judged, lr)


def train_head(
    head: nn.Linear,
    train: Photos,
    rows: Tensor,
    judge: Photos,
    features: Features,
    judge_features: Features,
    *,
    epochs: int,
    lr: float,
    batch_size: int,
    seed: int,
    history: "History",
) -> None:
    """Train the head on kept features: epoch t on view t mod V of every image, t from 0."""
    optimizer = torch.optim.Adam(head.parameters(), lr=lr)
    shuffle = torch.Generator().manual_seed(seed)
    views = features.chunks[0].shape[1]

    def train_batches(epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        order = rows[torch.randperm(len(rows), generator=shuffle)]
        return batches_of(features, train.labels, order, (epoch - 1) % views, batch_size)

    def judge_batches() -> Iterator[tuple[Tensor, Tensor]]:
        return batches_of(judge_features, judge.labels, torch.arange(len(judge)), 0, batch_size)

    train_epochs(head, optimizer, range(1, epochs + 1), train_batches, judge_batches, history)


def fine_tune(
    model: nn.Module,
    train: Views,
    rows: Tensor,
    judge: Photos,
    *,
    unfreeze: str,
    epochs: range,
    rates: tuple[float, float],
    batch_size: int,
    seed: int,
    history: "History",
    **how,
) -> None:
    """Train the last stages with the head; the trunk before them stays frozen, outside the graph.

    From the best head on: a random head's gradients would spoil the features first (LP-FT, Kumar et al. 2022).
    Each image comes in a fresh random view and in the evaluation view by turns: of random ones alone the network
    learns their scale and not the test's (Touvron et al. 2019).
    rates: of the stages and of the head. how: device, dtype and workers. Under torchrun each rank takes its
    share of every batch and of the evaluation.
    """
    if my_rank() == 0:  # DistributedDataParallel hands its weights to the others
        best, _ = load_state(history.out)
        model.load_state_dict(best)
    device, dtype, cut = how["device"], how["dtype"], UNFROZEN_FROM[unfreeze]
    parts = list(model.to(device).children())
    trunk, tail = frozen(nn.Sequential(*parts[:cut]), device, dtype), nn.Sequential(*parts[cut:-1], nn.Flatten(1))
    for parameter in tail.parameters():
        parameter.requires_grad = True
    network = Network(tail, model.fc, device, dtype)
    groups = [{"params": each.parameters(), "lr": lr} for each, lr in zip((tail, model.fc), rates, strict=True)]
    optimizer = torch.optim.Adam(groups)
    if world_size() > 1:
        network = DistributedDataParallel(network)
    shuffle = torch.Generator().manual_seed(seed)
    batch = max(1, batch_size // world_size())

    def inputs_of(views: Views, chosen: Sequence[int]) -> Iterator[tuple[Tensor, Tensor]]:
        for indices, values, bad in embed_in_order(trunk, views, chosen, batch_size=batch, **how):
            settle_unread(views.photos, bad, tolerated=0)  # the pass could read it
            # Cloned outside inference mode, so that it can take part in a graph.
            yield values.clone().to(device), views.photos.labels[indices].to(device)

    def train_batches(epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        order = rows[torch.randperm(len(rows), generator=shuffle)]
        even = order[: len(order) - len(order) % world_size()]  # ranks must make the same number of steps
        fresh = len(train.views) + epoch - epochs.start
        mixed = Views(train.photos, (0, fresh) if epoch % 2 else (fresh, 0), train.seed, by_turns=True)
        return inputs_of(mixed, even[my_rank() :: world_size()].tolist())

    judged = list(inputs_of(Views(judge, [0], train.seed), my_share(len(judge))))  # the trunk runs on these once
    train_epochs(network, optimizer, epochs, train_batches, lambda: judged, history)


class History:
    """The epochs' figures: a line each on stdout, a row each in the CSV file; the best one is saved. Rank 0 alone
    prints and writes.

    judge: test, or val, for the list that chooses the epoch.
    """

    def __init__(self, out: Path, save: Callable[[dict], None], about: dict, judge: str, began: float):
        self.out, self.path, self.save, self.about, self.began = out, out.with_suffix(".csv"), save, about, began
        columns = ("epoch", "train_loss", "train_accuracy", f"{judge}_loss", f"{judge}_accuracy", "lr", "best")
        self.rows, self.judge = [columns], judge
        self.best_epoch, self.best_accuracy = 0, -math.inf
        print(f"epoch  train loss  train acc  {judge + ' loss':>9}  {judge + ' acc':>8}        lr")

    def add(self, epoch: int, trained: tuple[float, float], judged: tuple[float, float], lr: float) -> None:
        best = judged[1] > self.best_accuracy
        if best:
            self.best_epoch, self.best_accuracy = epoch, judged[1]
        if my_rank():
            return
        if best:
            seconds = round(time.perf_counter() - self.began, 3)
            self.save({**self.about, "epoch": epoch, "accuracy": judged[1], "seconds": seconds})
        self.rows.append((epoch, *trained, *judged, lr, int(best)))
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerows(self.rows)
        save_atomically(self.path, text.getvalue().encode())
        figures = f"{epoch:5d}  {trained[0]:10.4f}  {trained[1]:9.2%}  {judged[0]:9.4f}  {judged[1]:8.2%}  {lr:.6f}"
        print(f"{figures}{'  best' if best else ''}", flush=True)


def settle_unread(photos: Photos, unread: dict[int, str], tolerated: float) -> None:
    """Warn of each image that could not be read. Raises UserError (status 1) where they are too many."""
    lines = [f"{photos.where(index)}: {reason}" for index, reason in sorted(unread.items())[:SHOWN_PROBLEMS]]
    count = len(unread)
    if count > tolerated or count == len(photos):
        last = f"{photos.name}: {count:,} of {len(photos):,} images can't be read; mend or remove these lines"
        raise UserError(*lines, last, status=1)
    for line in lines:
        warn(f"{line}; skipped")


def warn_of_overlap(train: Photos, test: Photos, train_features: Features, test_features: Features) -> None:
    """Warn where both lists hold an image, by path or by content: the same pixels give the same features."""
    known = set(train_features.digests(len(train)))
    both = [row for row, digest in enumerate(test_features.digests(len(test))) if digest in known]
    if both:
        warn(
            f"{len(both):,} of {len(test):,} test images are in {train.name} too, so the test accuracy is not to be "
            f"believed: {some([test.where(row) for row in both])}"
        )


def score_test(out: Path, test: Photos, features: Features | None, **how) -> float:
    """The saved model's accuracy on the test list, from features where its backbone is still the frozen one."""
    model, _ = load_checkpoint(out)
    if features is None:
        backbone = frozen(backbone_of(model), how["device"], how["dtype"])
        features, _ = extract_features(backbone, Views(test, [0], seed=0), alone=True, **how)
    return evaluate(model.fc, batches_of(features, test.labels, torch.arange(len(test)), 0, 1024))[1]


class Help(argparse.ArgumentDefaultsHelpFormatter):
    """Shows defaults, but not that of a flag whose default is to be off."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default is None else super()._get_help_string(action)


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Train a classifier from lists of images: a frozen ResNet-18 with a new head.",
        epilog="example: python train.py --epochs 20 && python predict.py photo.jpg",
        formatter_class=Help,
    )
    add = parser.add_argument_group("data").add_argument
    add("--train", type=Path, default="train.txt", metavar="LIST", help="training images: a path and a label a line")
    add("--test", type=Path, default="test.txt", metavar="LIST", help="test images, likewise")
    add("--root", type=Path, default=".", metavar="DIR", help="folder that the lists' paths are relative to")
    add("--classes", type=Path, metavar="FILE", help="class names, one a line (default: the folders' names)")
    add("--val-split", type=share, metavar="SHARE", help="choose the epoch on this share of the training list")
    add("--cache", type=Path, metavar="DIR", help="keep features there and reuse them: 2 KB an image and view")
    add("--workers", type=whole(0), metavar="N", help="decoding processes (default: one a core)")
    add = parser.add_argument_group("model").add_argument
    add("--weights", metavar="NAME", help="imagenet (default), none (random), or a ResNet-18 FILE")
    add("--device", default="auto", metavar="NAME", help="cpu, cuda, cuda:N or mps; auto takes the fastest")
    add("--precision", choices=("auto", "float32", "bfloat16"), default="auto", help="of the backbone's arithmetic")
    add("--unfreeze", choices=tuple(UNFROZEN_FROM), default="layer4", help="first stage that fine-tuning trains")
    add = parser.add_argument_group("optimisation").add_argument
    add("--epochs", type=whole(1), default=20, metavar="N", help="epochs of the head")
    add("--finetune-epochs", type=whole(0), default=0, metavar="N", help="then epochs of the last stages and head")
    add("--batch-size", type=whole(1), default=64, metavar="N", help="images a training step")
    add("--lr", type=positive, default=0.005, metavar="RATE", help="Adam's learning rate for the head")
    add("--finetune-lr", type=positive, default=1e-4, metavar="RATE", help="Adam's learning rate for the stages")
    add("--views", type=whole(1), default=4, metavar="V", help="kept of each training image, all but one random")
    add("--seed", type=whole(0), default=0, metavar="N", help="of views, head and shuffling")
    add("--view-seed", type=whole(0), metavar="N", help="of views and split alone (default: --seed)")
    add = parser.add_argument_group("output").add_argument
    add("--out", type=Path, default="best.pth", metavar="FILE", help="checkpoint; a .csv is put beside it")
    return parser.parse_args(argv)


def whole(least: int) -> Callable[[str], int]:
    """An argparse type: a whole number, at least so large."""

    def parse(text: str) -> int:
        if not (text.isascii() and text.isdigit() and least <= int(text) < 2**31):
            raise argparse.ArgumentTypeError(f"'{text}' is not a whole number from {least}")
        return int(text)

    return parse


def positive(text: str) -> float:
    """An argparse type: a number above 0, whose tenfold (Adam's first step) float32 can hold."""
    with contextlib.suppress(ValueError):
        if 0 < float(text) < 1e37:
            return float(text)
    raise argparse.ArgumentTypeError(f"'{text}' is not a number above 0 and below 1e37")


def share(text: str) -> float:
    """An argparse type: a number between 0 and 1."""
    if (value := positive(text)) < 1:
        return value
    raise argparse.ArgumentTypeError(f"'{text}' is not a number between 0 and 1")


@one_line_errors()
def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    began = time.perf_counter()

    # Everything that can be checked is, before the first expensive step.
    device = pick_device(args.device)
    dtype = pick_precision(args.precision, device)
    train, test = read_lists(args.train, args.test, args.root)
    classes = int(train.labels.max()) + 1
    names = class_names(train, args.classes, classes)
    view_seed = args.seed if args.view_seed is None else args.view_seed
    train, judge = split_validation(train, args.val_split, view_seed) if args.val_split else (train, test)
    chosen_on = f"{args.val_split:.0%} of {train.name}" if args.val_split else test.name
    prepare_output(args.out, args.cache)
    weights, origin, caveats = find_weights(args.weights)
    join_ranks()
    for caveat in caveats:
        warn(caveat)
    print(f"device    {device}, {str(dtype).removeprefix('torch.')}")
    print(f"backbone  ResNet-18, {origin}")
    print(f"data      {len(train):,} training and {len(test):,} test images of {classes} classes")
    print(f"best      epoch chosen on {chosen_on}", flush=True)

    # One pass: the features of every view. A cache keeps all views, whatever the epochs of this run.
    model = build_model(classes, weights, args.seed)
    how = {"device": device, "dtype": dtype, "workers": cores_of_rank() if args.workers is None else args.workers}
    extract = functools.partial(extract_features, frozen(backbone_of(model), device, dtype), cache=args.cache, **how)
    views = range(args.views if args.cache else min(args.views, args.epochs))
    features, unread = extract(Views(train, views, view_seed), tolerated=max(1, len(train) // 100))
    rows = torch.tensor([row for row in range(len(train)) if row not in unread])
    judge_features, _ = extract(Views(judge, [0], view_seed))
    test_features = extract(Views(test, [0], view_seed))[0] if args.val_split else judge_features

    recipe = {key: value for key, value in vars(args).items() if isinstance(value, int | float | str)}
    sizes = {"train_images": len(rows), "test_images": len(test)}
    ran = {
        "device": device.type,
        "precision": str(dtype).removeprefix("torch."),
        "date": time.strftime("%Y-%m-%d %H:%M"),
    }
    about = {"classes": names, "backbone": origin, "chosen_on": chosen_on, "recipe": recipe, **sizes, **ran}
    save = functools.partial(save_checkpoint, args.out, model)
    history = History(args.out, save, about, judge="val" if args.val_split else "test", began=began)
    common = {"batch_size": args.batch_size, "seed": args.seed, "history": history}
    if my_rank() == 0:
        warn_of_overlap(train, test, features, test_features)
        # On the CPU: the head is so small that a device's launch times would cost more.
        train_head(model.fc, train, rows, judge, features, judge_features, epochs=args.epochs, lr=args.lr, **common)
    if args.finetune_epochs:
        epochs = range(args.epochs + 1, args.epochs + args.finetune_epochs + 1)
        rates = (args.finetune_lr, args.lr / 10)
        fresh = Views(train, range(args.views), view_seed)  # the same views with a cache and without
        fine_tune(model, fresh, rows, judge, unfreeze=args.unfreeze, epochs=epochs, rates=rates, **common, **how)
    if my_rank() == 0:
        for caveat in caveats:
            warn(caveat)
        print(f"saved     {shown(args.out)} and {shown(history.path)} in {time.perf_counter() - began:.1f} s")
        print(
            f"best      {history.judge} accuracy {history.best_accuracy:.2%}, epoch {history.best_epoch} ({chosen_on})"
        )
        if args.val_split:
            known = test_features if history.best_epoch <= args.epochs else None
            print(f"test      accuracy {score_test(args.out, test, known, **how):.2%}, scored once")
        print(f"next      python predict.py {shown(args.test)} --report report.html")
    if dist.is_initialized():
        dist.destroy_process_group()  # left to the interpreter's end, its threads may abort the process


if __name__ == "__main__":
    main()
