"""Checkpoints: networks loaded from files, and saved with what is known of them."""

import io
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from transfer.architectures import NORMALIZE, head_prefix, is_arch, meta_network, takes_images, versioned
from transfer.distributed import broadcast, is_main_process, run_id
from transfer.inputs.images import GREY_BITS
from transfer.metrics import Metrics
from transfer.state_dict import METADATA_KEY, is_plain, load_state, validate_state_dict
from transfer.system.console import UserError, printable, warn
from transfer.system.files import backup_path, file_stamp, history_path, save_atomically, save_together, serialized
from transfer.system.flags import IMAGE_SIZE, SIZES

FORMAT = 1  # of what `serialize` adds to a state dict
METADATA_TYPES = {
    "format": int,
    "classes": list,  # of their names, str
    "arch": str,  # torchvision's name
    "backbone": str,  # in words: what it is and whose weights it has
    "chosen_on": str,  # the list whose accuracy chose the epoch
    "chosen_list": str,  # `path_digest` of it
    "trained_lists": list,  # `path_digest` of each list or folder that was trained on, or partly
    "folders": list,  # names of the class folders, where --classes gave the classes others
    "label_names": bool,  # whether the lists' own labels were names
    "corrections": dict,  # how many labels they changed, images they left out and added
    "epoch": int,
    "accuracy": float,
    "recall": float,  # macro, at the same epoch
    "seconds": float,
    "temperature": float,  # that the head's weights were divided by
    "size": int,  # of the images' sides, in pixels: 224 where it is not there
    "mean": list,  # that images are normalised by, and their deviation, where these are not ImageNet's usual ones
    "std": list,
    "date": str,
    "run": str,  # `run_id`, of whose attempts each may replace what another saved
    "device": str,
    "precision": str,
    "grey_bits": int,  # of 16-bit greyscale, from black to white
    "train_images": int,
    "test_images": int,
    "recipe": dict,  # the flags
}


def load_backbone(path: Path, arch: str) -> dict[str, Tensor]:
    """The state dict of a backbone from any file of this architecture, whatever head it has. Raises UserError."""
    return validate_state_dict(load_state(path)[0], path, arch, head=False)[1]


def load_checkpoint(path: Path, arch: str | None = None) -> tuple[nn.Module, dict]:
    """A network in inference mode and what is known of it: at least its `arch`, and its `classes`, a list of names.

    arch: what it must be; None: what its weights show. Raises UserError as `load_state` and `validate_state_dict` do,
    and where the file has no head.
    """
    state, metadata = load_state(path)
    claimed = metadata.get("arch") if type(metadata) is dict else None
    arch, state = validate_state_dict(state, path, arch, hint=claimed if is_arch(claimed) else None)
    head = f"{head_prefix(arch)}weight"
    if head not in state:
        raise UserError(f"{printable(path)}: has no head ({head}); give the best.pth that train.py saved")
    classes, known = len(state[head]), is_valid_metadata(metadata, len(state[head]))
    if known and (size := metadata.get("size")):
        known = takes_images(arch, size)
    if classes == 1 and not known:
        one = "has one output, for one class or a sigmoid, where each class needs its own"
        raise UserError(f"{printable(path)}: {one}; train it with two outputs, or start from it by --weights")
    model = meta_network(arch, classes)
    state = {key: value.float() if value.is_floating_point() else value for key, value in state.items()}
    model.load_state_dict(versioned(state, model), assign=True)
    if metadata is not None and not known:
        warn(f"{printable(path)}: its class names and history are malformed; going on with class numbers")
        metadata = None
    # Its weights show what it is, whatever the metadata say.
    return model.eval(), (metadata or {"classes": [str(label) for label in range(classes)]}) | {"arch": arch}


def describe_existing(path: Path) -> str | None:
    """What a run that saves here replaces and what becomes of that, in words; None where there is nothing.

    Raises UserError where that takes the place of a file that no run wrote.
    """
    if not path.exists():
        return None
    name, metadata, previous = printable(path), read_metadata(path), backup_path(path)
    if is_own(metadata or {}, run_id()):
        return f"{name} of this run before it was restarted; {printable(previous)} stays"
    if previous.exists() and not read_metadata(previous):
        foreign = f"{printable(previous)} is there already, and is no checkpoint of ours"
        raise UserError(f"--out {name}: {foreign}; move it, or name another file")
    if metadata is None:
        return f"{name} (no checkpoint of ours); kept as {printable(previous)}"
    scored = " (of unknown accuracy)"
    if {"accuracy", "chosen_on", "date"} <= metadata.keys():
        scored = f", {metadata['accuracy']:.2%} on {printable(metadata['chosen_on'])}, {printable(metadata['date'])}"
    return f"{name}{scored}; kept as {printable(previous)}"


def read_metadata(path: Path) -> dict | None:
    """What a checkpoint of ours says of itself; {} of another's, None where there is none."""
    try:
        state, metadata = load_state(path)
    except UserError:
        return None
    matrices = [value for value in state.values() if is_plain(value) and value.dim() == 2]  # the head is the last
    return metadata if is_valid_metadata(metadata, len(matrices[-1]) if matrices else 0) else {}


def is_own(metadata: dict, run: str) -> bool:
    """Whether an attempt of this run saved a checkpoint: one that the same torchrun started; or, where another machine
    took over, one of the same id that never came to its end, which gives a temperature.
    """
    saved = metadata.get("run", "")
    launch = run.rpartition("/")[0]
    cut_short = saved.rpartition("/")[0] == launch != "none" and "temperature" not in metadata
    return saved == run or cut_short


def is_valid_metadata(metadata: object, classes: int) -> bool:
    """Whether a checkpoint's own account has the form that `serialize` gives it."""
    # Exact types: a subclass from a hostile file may carry anything under dict's method names.
    if type(metadata) is not dict or any(
        type(metadata[key]) is not METADATA_TYPES[key] for key in metadata if key in METADATA_TYPES
    ):
        return False
    flags, names, lists = metadata.get("recipe", {}), metadata.get("classes", []), metadata.get("trained_lists", [])
    if any(type(flag) is not str or type(value) not in (int, float, str, bool) for flag, value in flags.items()):
        return False  # lists in lists without end could not even be printed
    folders = metadata.get("folders", names)
    if any(type(text) is not str for text in (*names, *folders, *lists)):
        return False
    fits = metadata.get("format") == FORMAT and SIZES[0] <= metadata.get("size", IMAGE_SIZE) <= SIZES[-1]
    mean, std = (metadata.get(key, usual) for key, usual in (("mean", NORMALIZE.mean), ("std", NORMALIZE.std)))
    fits = fits and ("mean" in metadata) == ("std" in metadata) and len(mean) == len(std) == 3
    fits = fits and all(type(value) is float and abs(value) < 10 for value in (*mean, *std)) and min(std) > 0.01
    fits = fits and 0 < metadata.get("grey_bits", GREY_BITS) <= GREY_BITS
    return fits and len(names) == len(folders) == classes


def serialize(model: nn.Module, metadata: dict) -> memoryview:
    """A plain torchvision state dict, as a file's bytes; only this project looks where it carries the metadata."""
    state = model.state_dict()
    for key, value in state.items():
        state[key] = value.detach().cpu().contiguous()
    state._metadata[METADATA_KEY] = {"format": FORMAT} | metadata
    return serialized(state)


class Checkpointer:
    """Saves a run's best epoch so far, and loads it again.

    The first save keeps what lay there before, and writes the lists that go with the checkpoint: paths and contents;
    None for one that went with an earlier checkpoint, and goes with that to where it is kept.
    """

    def __init__(
        self,
        path: Path,
        model: nn.Module,
        metadata: dict,
        start_time: float,
        *,
        lists: Sequence[tuple[Path, bytes | None]] = (),
    ):
        self.path, self.model, self.start_time, self.lists = path, model, start_time, lists
        self.metadata = metadata | {"run": run_id()}
        self.content, self.stamp = None, None  # what was saved last, and `file_stamp` of it

    def save(self, epoch: int, metrics: Metrics, about_head: dict | None = None) -> None:
        """Rank 0 alone writes; about_head: metadata that only the end of a run knows. Raises UserError (status 1) where
        the disk is full or fails.
        """
        if not is_main_process():
            return
        about_epoch = {"epoch": epoch, "accuracy": metrics.accuracy, "recall": metrics.macro_recall}
        about_epoch["seconds"] = round(time.perf_counter() - self.start_time, 3)
        content = serialize(self.model, self.metadata | about_epoch | (about_head or {}))
        if self.content is None:
            own = self.path.exists() and is_own(read_metadata(self.path) or {}, self.metadata["run"])
            self.save_with_lists(content, [] if own else [self.path, history_path(self.path)])
        elif file_stamp(self.path) == self.stamp:
            save_atomically(self.path, content)
        else:
            if self.path.exists():
                other = f"another run has saved there too; its checkpoint is now {printable(backup_path(self.path))}"
                warn(f"{printable(self.path)}: {other}; give each run an --out of its own")
            self.save_with_lists(content, [self.path])
        self.content, self.stamp = content, file_stamp(self.path)

    def save_with_lists(self, content: memoryview, replaced: Sequence[Path]) -> None:
        """Save with the lists; these files, with the lists beside them, are kept, where any are named."""
        lists = [(path, text) for path, text in self.lists if text is not None]
        backups = [*replaced, *(path for path, _ in self.lists)] if replaced else []
        save_together([(self.path, content), *lists], backups)
        for path in (path for path, text in self.lists if text is None):
            path.unlink(missing_ok=True)

    def restore(self) -> None:
        """Give the model the weights that were saved last, on all ranks: this run's, whatever lies there by now."""
        state = torch.load(io.BytesIO(self.content), weights_only=True) if is_main_process() else None
        self.model.load_state_dict(broadcast(state))
