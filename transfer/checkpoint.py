"""Weights of a ResNet-18: found, checked, loaded and saved."""

import contextlib
import http.client
import os
import socket
import sys
import tempfile
import threading
import time
from pathlib import Path
from urllib.parse import urlsplit

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torchvision.models import ResNet18_Weights, resnet18

from transfer.console import UserError, first_three, shown, warn
from transfer.distributed import local_rank, my_rank, world_size
from transfer.files import load_untrusted, save_tensors
from transfer.lists import MAX_CLASSES

BUNDLED_WEIGHTS = Path(__file__).resolve().parent.parent / "food" / "resnet18-grocery.pth"
IMAGENET_URL = ResNet18_Weights.DEFAULT.url
DOWNLOAD_TIMEOUT = 10  # seconds without another 128 KB, torch's step: slower than that would take an hour
DOWNLOAD_ERRORS = (OSError, RuntimeError, http.client.HTTPException)
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
        raise UserError(f"{shown(path)}: does not fit a ResNet-18: {first_three(problems)}; give one made for resnet18")
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


def replaced_by(path: Path) -> str | None:
    """What a run that saves here replaces, in words; None where there is nothing."""
    if not path.exists():
        return None
    try:
        state, about = load_state(path)
    except UserError:
        return f"{shown(path)} (no checkpoint of ours)"
    if not is_about(about, len(state.get("fc.bias", ()))) or "accuracy" not in about:
        return f"{shown(path)} (of unknown accuracy)"
    return f"{shown(path)}, {about['accuracy']:.2%} on {shown(about['chosen_on'])}, {shown(about['date'])}"


def is_about(about: object, classes: int) -> bool:
    """Whether a checkpoint's own account has the form that `save_checkpoint` gives it."""
    # Exact types: a subclass from a hostile file may carry anything under dict's method names.
    if type(about) is not dict or any(type(about[key]) is not ABOUT_TYPES[key] for key in about if key in ABOUT_TYPES):
        return False
    names = about.get("classes", ())
    return about.get("format") == FORMAT and len(names) == classes and all(type(name) is str for name in names)


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
    """The file of the ImageNet weights, downloaded if need be. Raises one of DOWNLOAD_ERRORS."""
    path = imagenet_path()
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        if my_rank() == 0:
            host = shown(urlsplit(IMAGENET_URL).netloc)
            print(f"downloading ImageNet weights (45 MB) from {host} ...", file=sys.stderr, flush=True)
        with tempfile.TemporaryDirectory(dir=path.parent, ignore_cleanup_errors=True) as folder:
            part = Path(folder) / path.name
            download(IMAGENET_URL, part)
            os.replace(part, path)
    return path


def download(url: str, path: Path) -> None:
    """Fetch a file whose name ends in its hash into a folder of its own. Raises one of DOWNLOAD_ERRORS.

    A thread does it, since a socket's timeout covers neither looking up the name nor all its addresses together.
    It is left behind where DOWNLOAD_TIMEOUT passes without news.
    """
    failed = []

    def fetch() -> None:
        try:
            torch.hub.download_url_to_file(url, str(path), path.stem.rpartition("-")[2], progress=sys.stderr.isatty())
        except DOWNLOAD_ERRORS as error:
            failed.append(error)

    thread = threading.Thread(target=fetch, daemon=True)
    before, size, news = socket.getdefaulttimeout(), 0, time.monotonic()
    socket.setdefaulttimeout(DOWNLOAD_TIMEOUT)
    try:
        thread.start()
        while thread.is_alive():
            thread.join(0.05)
            with contextlib.suppress(FileNotFoundError):  # renamed meanwhile
                if size < (size := sum(part.stat().st_size for part in path.parent.iterdir())):
                    news = time.monotonic()
            if time.monotonic() - news > DOWNLOAD_TIMEOUT:
                raise TimeoutError(f"timed out: nothing came for {DOWNLOAD_TIMEOUT} s")
    finally:
        socket.setdefaulttimeout(before)
    if failed:
        raise failed[0]


def get_imagenet() -> str | None:
    """Bring the ImageNet weights to this machine; why that failed, in words, on all ranks alike.

    Under torchrun one rank a machine downloads and the others wait. Where one machine stays without, all do: ranks
    with different backbones would make features of two kinds.
    """
    reason = None
    if local_rank() in (None, 0):
        try:
            download_imagenet()
        except DOWNLOAD_ERRORS as error:
            reason = shown(str(getattr(error, "reason", error)))
    reasons = [reason] * world_size()
    if dist.is_initialized():
        dist.all_gather_object(reasons, reason)
    return next(filter(None, reasons), None)


def from_here(path: Path) -> str:
    """A path as it may be printed: relative, or whole where it lies on another drive of Windows."""
    try:
        return shown(os.path.relpath(path))
    except ValueError:
        return shown(path)


def find_weights(wish: str | None) -> tuple[dict[str, Tensor] | None, str, list[str]]:
    """The backbone of `--weights`, its origin in words, and what the user must know of it. Raises UserError.

    An explicit wish is never replaced; with none, the bundled backbone stands in for ImageNet's.
    """
    if wish == "none":
        return None, "random weights", []
    if wish not in (None, "imagenet"):
        return load_backbone(Path(wish)), shown(wish), []
    reason = get_imagenet()
    if reason is None:
        return load_backbone(imagenet_path()), f"ImageNet ({ResNet18_Weights.DEFAULT})", []
    fix = f"fetch {IMAGENET_URL} elsewhere and put it at {shown(imagenet_path())}, or give it as --weights FILE"
    if wish == "imagenet":
        raise UserError(f"ImageNet weights can't be downloaded ({reason}); {fix}")
    bundled = from_here(BUNDLED_WEIGHTS)
    caveat = f"no ImageNet weights ({reason}): using the bundled {bundled}, which is far weaker"
    return load_backbone(BUNDLED_WEIGHTS), f"{bundled} (bundled)", [caveat, f"for the real ones, {fix}"]
