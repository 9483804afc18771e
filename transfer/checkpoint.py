"""Checkpoints: files of a ResNet checked, loaded and saved."""

import time
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from transfer.architectures import arch_title, infer_arch, meta_state_dict, new_network
from transfer.console import UserError, first_three, printable, warn
from transfer.distributed import broadcast, is_main_process, run_id
from transfer.files import backup_path, history_path, load_untrusted, save_atomically, save_together, serialized
from transfer.flags import IMAGE_SIZE, SIZES
from transfer.images import GREY_BITS
from transfer.labels import MAX_CLASSES
from transfer.metrics import Metrics

WEIGHT_TYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
FORMAT = 1  # of what `serialize` adds to a state dict
METADATA_KEY = "train.py"  # its key in the state dict's _metadata, which a plain load_state_dict ignores
STEM = "layer1.0.conv1.weight"  # which every ResNet has, and whose prefix is that of all its names
USUAL_KEYS = ("model", "state_dict")  # where a file holds another network too, such as an average of its weights
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
    "date": str,
    "run": str,  # `run_id`, of whose attempts each may replace what another saved
    "device": str,
    "precision": str,
    "grey_bits": int,  # of 16-bit greyscale, from black to white
    "train_images": int,
    "test_images": int,
    "recipe": dict,  # the flags
}


def load_state(path: Path) -> tuple[dict[str, Tensor], object]:
    """A state dict from an untrusted file, under torchvision's names, and the metadata that `serialize` gave it.

    It may lie under any key, up to three dicts deep, and its names may share any prefix, as DataParallel, torch.compile
    or a module around the ResNet give them: then what lacks it, but for a head named fc, is of other parts. Raises
    UserError as `load_untrusted` does, and where there is no state dict in it, or no saying which.
    """
    name, found = printable(path), load_untrusted(path)
    if not isinstance(found, dict):
        raise UserError(f"{name}: holds no state dict; save model.state_dict() with torch.save")
    resnets = find_resnets(found)
    if len(resnets) > 1:
        usual = [(key, state) for key, state in resnets if key in USUAL_KEYS]
        if len(usual) != 1:
            several = first_three([printable(key)[:60] for key, _ in resnets])
            raise UserError(f"{name}: holds several networks ({several}); save the state dict of one with torch.save")
        resnets = usual
    state = resnets[0][1] if resnets else found
    # dict's own methods here and below: a hostile OrderedDict may carry attributes by those names.
    attached = vars(state).get("_metadata") if hasattr(state, "__dict__") else None
    metadata = dict.get(attached, METADATA_KEY) if isinstance(attached, dict) else None
    state = without_wrappers(state)
    prefixes = {key.removesuffix(STEM) for key in state if key.endswith(STEM)} - {""}
    if len(prefixes) > 1:
        several = first_three([printable(prefix)[:60] for prefix in sorted(prefixes)])
        raise UserError(f"{name}: holds several networks ({several}); save the state dict of one with torch.save")
    for prefix in prefixes:
        state = {key.removeprefix(prefix): state[key] for key in state if key.startswith((prefix, "fc."))}
    return state, metadata


def without_wrappers(state: dict) -> dict[str, object]:
    """A state dict without what DataParallel and torch.compile put into its names."""
    # Only names: whatever else a key is, printing it may fail.
    items = {key if type(key) is str else type(key).__name__: value for key, value in dict.items(state)}
    return {key.replace("module.", "").replace("_orig_mod.", ""): value for key, value in items.items()}


def find_resnets(found: dict) -> list[tuple[str, dict]]:
    """The dicts that hold a ResNet's names, and the keys that they lie under."""
    resnets, seen, level = [], set(), [("", found)]
    for _ in range(4):  # a checkpoint in a checkpoint is common, deeper nesting is not
        inner = []
        for key, each in level:
            if id(each) in seen:  # also what holds itself
                continue
            seen.add(id(each))
            if any(name.endswith(STEM) for name in without_wrappers(each)):
                resnets.append((key, each))
            else:
                items = [(name if type(name) is str else "", value) for name, value in dict.items(each)]
                inner += [(name, value) for name, value in items if isinstance(value, dict)]
        level = inner
    return resnets


def is_plain(value: object) -> bool:
    """Whether a value from an untrusted file is a tensor whose methods can be called and numbers read."""
    if type(value) not in (Tensor, nn.Parameter) or vars(value):  # attributes may stand before methods
        return False
    return value.layout == torch.strided and not (value.is_meta or value.is_quantized or value.is_nested)


def validate_state_dict(
    state: dict[str, Tensor], path: Path, arch_asked: str | None = None
) -> tuple[str, dict[str, Tensor]]:
    """The architecture of a state dict, and its entries, finite and of the right shapes.

    Raises UserError with the first that don't fit, and where it has another architecture than was asked for.
    """
    arch = infer_arch(state, arch_asked)
    expected, head = meta_state_dict(arch), state.get("fc.weight")
    if is_plain(head) and head.dim() == 2 and 0 < len(head) <= MAX_CLASSES:
        expected["fc.weight"] = torch.empty(len(head), expected["fc.weight"].shape[1], device="meta")
        expected["fc.bias"] = torch.empty(len(head), device="meta")
    elif head is None:  # a backbone alone
        expected = {key: value for key, value in expected.items() if not key.startswith("fc.")}
    problems = [f"unexpected {printable(key)[:60]}" for key in state if key not in expected]
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
        misfit = f"does not fit a {arch_title(arch)}: {first_three(problems)}"
        raise UserError(f"{printable(path)}: {misfit}; give one made for {arch_asked or arch}")
    if arch_asked not in (None, arch):
        raise UserError(
            f"{printable(path)}: is a {arch_title(arch)}, not a {arch_title(arch_asked)}; add --arch {arch}"
        )
    # Where there is no count, none was tracked.
    return arch, {key: state[key] if key in state else torch.tensor(0) for key in expected}


def load_backbone(path: Path, arch: str) -> dict[str, Tensor]:
    """The state dict of a backbone from any file of this architecture, whatever head it has. Raises UserError."""
    state = {key: value for key, value in load_state(path)[0].items() if not key.startswith("fc.")}
    return validate_state_dict(state, path, arch)[1]


def load_checkpoint(path: Path) -> tuple[nn.Module, dict]:
    """A ResNet in inference mode and what is known of it: at least its `arch`, and its `classes`, a list of names.

    Raises UserError as `load_state` and `validate_state_dict` do, and where the file has no head.
    """
    state, metadata = load_state(path)
    arch, state = validate_state_dict(state, path)
    if "fc.weight" not in state:
        raise UserError(f"{printable(path)}: has no head (fc.weight); give the best.pth that train.py saved")
    classes, known = len(state["fc.weight"]), is_valid_metadata(metadata, len(state["fc.weight"]))
    if classes == 1 and not known:
        one = "has one output, for one class or a sigmoid, where each class needs its own"
        raise UserError(f"{printable(path)}: {one}; train it with two outputs, or start from it by --weights")
    with torch.device("meta"):
        model = new_network(arch, classes)
    model.load_state_dict({key: value.float() for key, value in state.items()}, assign=True)
    if metadata is not None and not known:
        warn(f"{printable(path)}: its class names and history are malformed; going on with class numbers")
        metadata = None
    # Its weights show what it is, whatever the metadata say.
    return model.eval(), (metadata or {"classes": [str(label) for label in range(classes)]}) | {"arch": arch}


def describe_existing(path: Path) -> str | None:
    """What a run that saves here replaces and what becomes of that, in words; None where there is nothing."""
    if not path.exists():
        return None
    name, metadata = printable(path), read_metadata(path)
    if metadata is None:
        return f"{name} (no checkpoint of ours); kept as {printable(backup_path(path))}"
    if is_own(metadata, run_id()):
        return f"{name} of this run before it was restarted; {printable(backup_path(path))} stays"
    scored = " (of unknown accuracy)"
    if {"accuracy", "chosen_on", "date"} <= metadata.keys():
        scored = f", {metadata['accuracy']:.2%} on {printable(metadata['chosen_on'])}, {printable(metadata['date'])}"
    return f"{name}{scored}; kept as {printable(backup_path(path))}"


def read_metadata(path: Path) -> dict | None:
    """What a checkpoint of ours says of itself; {} of another's, None where there is none."""
    try:
        state, metadata = load_state(path)
    except UserError:
        return None
    return metadata if is_valid_metadata(metadata, len(state.get("fc.bias", ()))) else {}


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
    fits = metadata.get("format") == FORMAT and metadata.get("size", IMAGE_SIZE) in SIZES
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
        self.saved = False

    def save(self, epoch: int, metrics: Metrics, temperature: float | None = None) -> None:
        """Rank 0 alone writes. Raises UserError (status 1) where the disk is full or fails."""
        if not is_main_process():
            return
        about_epoch = {"epoch": epoch, "accuracy": metrics.accuracy, "recall": metrics.macro_recall}
        about_epoch["seconds"] = round(time.perf_counter() - self.start_time, 3)
        if temperature is not None:
            about_epoch["temperature"] = temperature
        content = serialize(self.model, self.metadata | about_epoch)
        if self.saved:
            save_atomically(self.path, content)
        else:
            self.save_first(content)

    def save_first(self, content: memoryview) -> None:
        """Save with the lists, and keep what they replace, unless an attempt of this run saved it."""
        own = self.path.exists() and is_own(read_metadata(self.path) or {}, self.metadata["run"])
        replaced = [self.path, history_path(self.path), *(path for path, _ in self.lists)]
        lists = [(path, text) for path, text in self.lists if text is not None]
        save_together([(self.path, content), *lists], backups=[] if own else replaced)
        for path in (path for path, text in self.lists if text is None):
            path.unlink(missing_ok=True)
        self.saved, self.lists = True, ()

    def restore(self) -> None:
        """Give the model the weights that were saved last, on all ranks."""
        self.model.load_state_dict(broadcast(load_state(self.path)[0] if is_main_process() else None))
