"""Checkpoints: files of a ResNet checked, loaded and saved."""

import time
from pathlib import Path

import torch
from torch import Tensor, nn

from transfer.architectures import entries_of, new_network, titled, told_by
from transfer.console import UserError, first_three, shown, warn
from transfer.device import Compute
from transfer.files import keep_previous, load_untrusted, save_tensors
from transfer.lists import MAX_CLASSES

WEIGHT_TYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
FORMAT = 1  # of what `save_checkpoint` adds to a state dict
ABOUT = "train.py"  # its key in the state dict's _metadata, which a plain load_state_dict ignores
ABOUT_TYPES = {
    "format": int,
    "classes": list,  # of their names, str
    "arch": str,  # torchvision's name
    "backbone": str,  # in words: what it is and whose weights it has
    "chosen_on": str,  # the list whose accuracy chose the epoch
    "epoch": int,
    "accuracy": float,
    "recall": float,  # macro, at the same epoch
    "seconds": float,
    "temperature": float,  # that the head's weights were divided by
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


def check_state(state: dict[str, Tensor], path: Path, wish: str | None = None) -> tuple[str, dict[str, Tensor]]:
    """The architecture of a state dict, and its entries, finite and of the right shapes.

    Raises UserError with the first that don't fit, and where it has another architecture than is wished.
    """
    arch = told_by(state, wish)
    expected, head = entries_of(arch), state.get("fc.weight")
    if is_plain(head) and head.dim() == 2 and 0 < len(head) <= MAX_CLASSES:
        expected["fc.weight"] = torch.empty(len(head), expected["fc.weight"].shape[1], device="meta")
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
        misfit = f"does not fit a {titled(arch)}: {first_three(problems)}"
        raise UserError(f"{shown(path)}: {misfit}; give one made for {wish or arch}")
    if wish not in (None, arch):
        raise UserError(f"{shown(path)}: is a {titled(arch)}, not a {titled(wish)}; add --arch {arch}")
    # Where there is no count, none was tracked.
    return arch, {key: state[key] if key in state else torch.tensor(0) for key in expected}


def load_backbone(path: Path, arch: str) -> dict[str, Tensor]:
    """The state dict of a backbone from any file of this architecture, its head dropped. Raises UserError."""
    _, state = check_state(load_state(path)[0], path, arch)
    return {key: value for key, value in state.items() if not key.startswith("fc.")}


def load_checkpoint(path: Path) -> tuple[nn.Module, dict]:
    """A ResNet in inference mode and what is known of it: at least its `arch`, and its `classes`, a list of names.

    Raises UserError as `load_state` and `check_state` do, and where the file has no head.
    """
    state, about = load_state(path)
    arch, state = check_state(state, path)
    if "fc.weight" not in state:
        raise UserError(f"{shown(path)}: has no head (fc.weight); give the best.pth that train.py saved")
    classes = len(state["fc.weight"])
    with torch.device("meta"):
        model = new_network(arch, classes)
    model.load_state_dict({key: value.float() for key, value in state.items()}, assign=True)
    if about is not None and not is_about(about, classes):
        warn(f"{shown(path)}: its class names and history are malformed; going on with class numbers")
        about = None
    # What it is, its weights say themselves, whatever is said of them.
    return model.eval(), (about or {"classes": [str(label) for label in range(classes)]}) | {"arch": arch}


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


def about_run(
    flags: dict, names: list[str], backbone: str, chosen_on: str, compute: Compute, train_images: int, test_images: int
) -> dict:
    """What all checkpoints of a run say of it."""
    return {
        "classes": names,
        "arch": flags["arch"],
        "backbone": backbone,
        "chosen_on": chosen_on,
        "recipe": {flag: value for flag, value in flags.items() if isinstance(value, int | float | str)},
        "device": compute.device.type,
        "precision": compute.precision,
        "date": time.strftime("%Y-%m-%d %H:%M"),
        "train_images": train_images,
        "test_images": test_images,
    }


def keep_epoch(
    out: Path, model: nn.Module, about: dict, began: float, epoch: int, accuracy: float, recall: float, **more
) -> None:
    """Save the best epoch so far. The first one keeps what lay there before under another name."""
    if epoch == 1 and not more:
        keep_previous(out)
        keep_previous(out.with_suffix(".csv"))
    seconds = round(time.perf_counter() - began, 3)
    save_checkpoint(
        out, model, {**about, "epoch": epoch, "accuracy": accuracy, "recall": recall, "seconds": seconds, **more}
    )
