"""State dicts in files of others: found under whatever keys and prefixes, and checked against torchvision's."""

from pathlib import Path

import torch
from torch import Tensor

from transfer.architectures import STEMS, arch_title, head_prefix, infer_arch, is_tensor, plain_names, skeleton
from transfer.inputs.labels import MAX_CLASSES
from transfer.system.console import UserError, first_three, printable
from transfer.system.files import load_untrusted

WEIGHT_TYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
METADATA_KEY = "train.py"  # its key in the state dict's _metadata, which a plain load_state_dict ignores
USUAL_KEYS = ("model", "state_dict")  # where a file holds another network too, such as an average of its weights
HEADS = ("fc.", "classifier.", "head.", "heads.")  # names of what may lie beside a prefixed backbone


def load_state(path: Path) -> tuple[dict[str, Tensor], object]:
    """A state dict from an untrusted file, under torchvision's names, and the metadata that `serialize` gave it.

    It may lie under any key, up to three dicts deep, and its names may share any prefix, as DataParallel, torch.compile
    or a module around the network give them: then what lacks it, but for a head, is of other parts. Raises UserError as
    `load_untrusted` does, and where there is no state dict in it, or no saying which.
    """
    name, found = printable(path), load_untrusted(path)
    if not isinstance(found, dict):
        raise UserError(f"{name}: holds no state dict; save model.state_dict() with torch.save")
    networks = find_networks(found)
    if len(networks) > 1:
        usual = [(key, state) for key, state in networks if key in USUAL_KEYS]
        if len(usual) != 1:
            several = first_three([printable(key)[:60] for key, _ in networks])
            raise UserError(f"{name}: holds several networks ({several}); save the state dict of one with torch.save")
        networks = usual
    state = networks[0][1] if networks else found
    # dict's own methods here and below: a hostile OrderedDict may carry attributes by those names.
    attached = vars(state).get("_metadata") if hasattr(state, "__dict__") else None
    metadata = dict.get(attached, METADATA_KEY) if isinstance(attached, dict) else None
    state = without_wrappers(state)
    prefixes = {key.removesuffix(stem) for stem in STEMS for key in state if key.endswith(stem)} - {""}
    if len(prefixes) > 1:
        several = first_three([printable(prefix)[:60] for prefix in sorted(prefixes)])
        raise UserError(f"{name}: holds several networks ({several}); save the state dict of one with torch.save")
    for prefix in prefixes:
        state = {key.removeprefix(prefix): state[key] for key in state if key.startswith((prefix, *HEADS))}
    return plain_names(state), metadata


def without_wrappers(state: dict) -> dict[str, object]:
    """A state dict without what DataParallel and torch.compile put into its names."""
    # Only names: whatever else a key is, printing it may fail.
    items = {key if type(key) is str else type(key).__name__: value for key, value in dict.items(state)}
    return {key.replace("module.", "").replace("_orig_mod.", ""): value for key, value in items.items()}


def find_networks(found: dict) -> list[tuple[str, dict]]:
    """The dicts that hold a network's names, and the keys that they lie under."""
    networks, seen, level = [], set(), [("", found)]
    for _ in range(4):  # a checkpoint in a checkpoint is common, deeper nesting is not
        inner = []
        for key, each in level:
            if id(each) in seen:  # also what holds itself
                continue
            seen.add(id(each))
            if any(name.endswith(STEMS) for name in without_wrappers(each)):
                networks.append((key, each))
            else:
                items = [(name if type(name) is str else "", value) for name, value in dict.items(each)]
                inner += [(name, value) for name, value in items if isinstance(value, dict)]
        level = inner
    return networks


def is_plain(value: object) -> bool:
    """Whether a value from an untrusted file is a tensor whose methods can be called and numbers read."""
    if not is_tensor(value) or vars(value):  # attributes may stand before methods
        return False
    return value.layout == torch.strided and not (value.is_meta or value.is_quantized)


def validate_state_dict(
    state: dict[str, Tensor], path: Path, arch_asked: str | None = None, *, hint: str | None = None, head: bool = True
) -> tuple[str, dict[str, Tensor]]:
    """The architecture of a state dict, and its entries, finite and of the right shapes.

    hint: what it probably is; head: whether its head, if it has one, is wanted. Raises UserError with the first entries
    that don't fit, and where it has another architecture than was asked for.
    """
    arch = infer_arch(state, arch_asked, hint)
    expected, problems = skeleton(arch).state_dict(), []
    prefix = head_prefix(arch)
    if not head:
        state = {key: state[key] for key in state if key in expected or not key.startswith(HEADS)}
        state = {key: state[key] for key in state if not key.startswith(prefix)}
    weight = state.get(f"{prefix}weight")
    for key in [key for key in expected if key.startswith(prefix)]:
        if weight is None:  # a backbone alone
            del expected[key]
        elif is_plain(weight) and weight.dim() == 2 and 0 < len(weight) <= MAX_CLASSES:
            expected[key] = torch.empty(len(weight), *expected[key].shape[1:], device="meta")
    problems += [f"unexpected {printable(key)[:60]}" for key in state if key not in expected]
    for key, value in expected.items():
        if key in state:
            problems += [f"{key} {problem}" for problem in find_problem(state[key], value)]
        elif not key.endswith("num_batches_tracked"):  # a count that nothing reads
            problems.append(f"no {key}")
    if problems:
        fix = f"give one made for {arch_asked or arch}"
        fix += "" if arch_asked else ", or name its architecture by --arch, of those that train.py --arch list shows"
        raise UserError(f"{printable(path)}: does not fit {arch_title(arch)}: {first_three(problems)}; {fix}")
    if arch_asked not in (None, arch):
        found, asked = arch_title(arch), arch_title(arch_asked)
        raise UserError(f"{printable(path)}: is {found}, not {asked}; add --arch {arch}")
    # Where there is no count, none was tracked.
    return arch, {key: state[key] if key in state else torch.tensor(0) for key in expected}


def find_problem(given: object, value: Tensor) -> list[str]:
    """What is wrong with an entry of an untrusted state dict where torchvision has a value, in words; [] if nothing."""
    if not is_plain(given):
        return ["is no plain tensor"]
    if given.shape != value.shape:
        return [f"is {'x'.join(map(str, given.shape))}, not {'x'.join(map(str, value.shape))}"]
    if given.dtype not in (WEIGHT_TYPES if value.is_floating_point() else (torch.int64,)):
        return [f"is {str(given.dtype).removeprefix('torch.')}"]
    if not given.isfinite().all():
        return ["has values that are not finite"]
    if value.dtype == torch.int64 and value.dim() and not torch.equal(given, value):
        return ["has other indices than torchvision's"]
    return []
