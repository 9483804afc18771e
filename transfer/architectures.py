"""Architectures: torchvision's image classifiers by name, their heads, what their weights expect, and their costs."""

import difflib
import functools
import re
import sys
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import torch
import torchvision
from torch import Tensor, nn
from torch.overrides import BaseTorchFunctionMode
from torchvision import transforms as T
from torchvision.models import get_model, get_model_builder, get_model_weights, list_models

from transfer.system.console import UserError, printable
from transfer.system.flags import DEFAULT_ARCH

NORMALIZE = T.Normalize(mean=[0.485, 0.456, 0.406], std=[0.229, 0.224, 0.225])  # ImageNet's
AUXILIARY = {"googlenet": ("aux1.", "aux2."), "inception_v3": ("AuxLogits.",)}  # heads for training them from nothing
# One name in the state dict of every network, which no other of its names ends in: what stands before it is a prefix.
STEMS = (
    *("layer1.0.conv1.weight", "features.0.0.weight", "features.0.weight", "features.conv0.weight", "conv_proj.weight"),
    *("stem.0.weight", "stem.0.0.weight", "layers.8.0.layers.0.weight", "stage2.0.branch1.0.weight"),
    *("inception3a.branch1.conv.weight", "Conv2d_1a_3x3.conv.weight"),
)
# Names in files of ImageNet weights that torchvision's own loading changes: DenseNet's and the vision transformers'.
OLD_NAMES = (
    (re.compile(r"(denselayer\d+\.(?:norm|conv))\.(?=[12]\.)"), r"\1"),
    (re.compile(r"(encoder_layer_\d+\.mlp)\.linear_1\."), r"\1.0."),
    (re.compile(r"(encoder_layer_\d+\.mlp)\.linear_2\."), r"\1.3."),
)
Shapes = dict[str, tuple[int, ...]]


class Preprocessing(NamedTuple):
    """What an architecture's ImageNet weights were trained on: square images of so many pixels a side, normalised."""

    size: int
    normalize: T.Normalize


def arch_title(arch: str) -> str:
    """Its name for people: ResNet-18; of others as torchvision has it."""
    return re.sub(r"^resnet", "ResNet-", arch)


def is_arch(arch: object) -> bool:
    """Whether a backbone can have it: torchvision has it, and its classes are a linear layer's."""
    return type(arch) is str and arch in list_models(module=torchvision.models) and has_head(arch)


def new_network(arch: str, classes: int = 1000) -> nn.Module:
    """Images (N, 3, H, W) to logits (N, classes), by random weights."""
    # As torchvision builds them for their ImageNet weights.
    if arch in AUXILIARY:
        return get_model(arch, num_classes=classes, aux_logits=False, transform_input=True, init_weights=False)
    if arch.startswith("vit_"):
        return get_model(arch, num_classes=classes, image_size=preprocessing(arch).size)
    return get_model(arch, num_classes=classes)


class KnownNumbers(BaseTorchFunctionMode):
    """Lets what has its numbers from Python keep them on the meta device: RegNets compute their widths with tensors."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func in (torch.arange, torch.tensor):
            kwargs = (kwargs or {}) | {"device": "cpu"}
        return super().__torch_function__(func, types, args, kwargs)


def meta_network(arch: str, classes: int = 1000) -> nn.Module:
    """The network without numbers: its weights are on the meta device."""
    with torch.device("meta"), KnownNumbers():
        return new_network(arch, classes)


@functools.cache  # who loads one file may load more
def skeleton(arch: str) -> nn.Module:
    """The same, to look at alone."""
    return meta_network(arch).eval()


def meta_state_dict(arch: str, classes: int = 1000) -> dict[str, Tensor]:
    """Its state dict as names, shapes and dtypes: tensors on the meta device, but for indices, which are constant."""
    return meta_network(arch, classes).state_dict()


def versioned(state: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """A state dict with the versions of a model's modules, without which some of torchvision's don't load it; what is
    missing from it stays as the model has it.
    """
    filled = model.state_dict()
    filled.update(state)
    return filled


def load_network(arch: str, state_dict: dict[str, Tensor] | None) -> nn.Module:
    """The network with the weights of a state dict that lacks at most the head's, or with random ones."""
    if state_dict is None:
        return new_network(arch)
    model = meta_network(arch).to_empty(device="cpu")  # random ones would take seconds
    model.load_state_dict(versioned(state_dict, model))
    return model


def checkpoint_bytes(arch: str, classes: int) -> int:
    """What its state dict takes on a disk, to within three percent: of a small network in many pieces it is more."""
    return sum(value.nbytes for value in meta_state_dict(arch, classes).values())


# The head


def has_head(arch: str) -> bool:
    """Whether its last layer is linear, unlike SqueezeNet's, a convolution."""
    return any(isinstance(module, nn.Linear) for module in skeleton(arch).modules())


def head_name(model: nn.Module) -> str:
    """Of the layer that gives the classes: the last linear one (fc, classifier.3, heads.head, ...)."""
    return [name for name, module in model.named_modules() if isinstance(module, nn.Linear)][-1]


def head_of(model: nn.Module) -> nn.Linear:
    """The layer that gives the classes."""
    return model.get_submodule(head_name(model))


def replace_head(model: nn.Module, num_classes: int) -> None:
    """Give a network a new head, by random weights."""
    head = head_of(model)
    new = nn.Linear(head.in_features, num_classes, bias=head.bias is not None)
    model.set_submodule(head_name(model), new)


def head_prefix(arch: str) -> str:
    """What the names of its head's weights begin with."""
    return f"{head_name(skeleton(arch))}."


# What the weights expect


def preprocessing(arch: str) -> Preprocessing:
    """What its ImageNet weights' own transforms say."""
    transforms = get_model_weights(arch).DEFAULT.transforms()
    return Preprocessing(transforms.crop_size[0], T.Normalize(list(transforms.mean), list(transforms.std)))


def check_arch(arch: str, size: int | None) -> int:
    """The side of its images in pixels: what is asked for, by default what its ImageNet weights expect.

    `list` shows all architectures, and ends the process. Raises UserError where torchvision has no such classifier, or
    one whose classes are no linear layer's, or it takes no images of that size.
    """
    names = list_models(module=torchvision.models)
    if arch == "list":
        print(arch_table(), flush=True)
        sys.exit()
    if arch not in names:
        near = difflib.get_close_matches(arch, names, 1)
        fix = f"did you mean {near[0]}?" if near else "--arch list shows the names"
        raise UserError(f"--arch {printable(arch)}: torchvision has no classifier of that name; {fix}")
    if not has_head(arch):
        raise UserError(f"--arch {arch}: its last layer is no linear one, so it has no head to train; pick another")
    own = preprocessing(arch).size
    if size and not takes_images(arch, size):
        fix = f"leave --size out for its own, {own}"
        raise UserError(f"--size {size}: {arch_title(arch)} takes no images of that size; {fix}")
    return size or own


@torch.no_grad()
def takes_images(arch: str, size: int) -> bool:
    """Whether its layers fit together for images of so many pixels a side: a vision transformer's know one size."""
    if size == preprocessing(arch).size:
        return True
    try:
        meta_network(arch).eval().to("meta")(torch.empty(1, 3, size, size, device="meta"))
    except (AssertionError, RuntimeError, ValueError):
        return False
    return True


def arch_table() -> str:
    """All architectures with what their ImageNet weights are, by torchvision's own figures, the cheapest first."""
    rows = []
    for arch in (arch for family in families() for arch in family):
        meta = get_model_weights(arch).DEFAULT.meta
        accuracy = meta["_metrics"]["ImageNet-1K"]["acc@1"]
        rows.append((meta["_ops"], arch, accuracy, meta["_file_size"], preprocessing(arch).size))
    lines = [f"{'name':<20}{'ImageNet accuracy':>18}{'GFLOPs':>10}{'download':>12}{'size':>6}"]
    for ops, arch, accuracy, megabytes, size in sorted(rows):
        lines.append(f"{arch:<20}{accuracy:>17.1f}%{ops:>10.2f}{megabytes:>9,.0f} MB{size:>6}")
    return "\n".join(lines)


# Recognised by their weights


def plain_names(state: dict[str, object]) -> dict[str, object]:
    """A state dict under the names of today's torchvision, without auxiliary heads."""
    auxiliary = tuple(prefix for prefixes in AUXILIARY.values() for prefix in prefixes)
    renamed = {}
    for name, value in state.items():
        for pattern, replacement in OLD_NAMES:
            name = pattern.sub(replacement, name)
        if not name.startswith(auxiliary):
            renamed[name] = value
    return renamed


def is_tensor(value: object) -> bool:
    """Whether a value from an untrusted file is a tensor with a shape: of nested ones torch 2.14 raises for it."""
    return type(value) in (Tensor, nn.Parameter) and not value.is_nested


def shapes_among(state: dict[str, object]) -> Shapes:
    """The shapes of a state dict's weights by name; () of what is no tensor."""
    weights = ((name, value) for name, value in state.items() if name.endswith(".weight"))
    return {name: tuple(value.shape) if is_tensor(value) else () for name, value in weights}


@functools.cache
def backbone_shapes(arch: str) -> Shapes:
    """The shapes of its weights by name, without the head's."""
    head, shapes = head_prefix(arch), shapes_among(skeleton(arch).state_dict())
    return {name: shape for name, shape in shapes.items() if not name.startswith(head)}


def strangeness(arch: str, given: Shapes) -> tuple[int, int]:
    """How many weights an architecture lacks or has more than some given, its head apart; how many of other shapes."""
    own, head = backbone_shapes(arch), head_prefix(arch)
    theirs = {name for name in given if not name.startswith(head)}
    return len(own.keys() ^ theirs), sum(own[name] != given[name] for name in own.keys() & theirs)


def families() -> Iterator[list[str]]:
    """The architectures by the module that builds them, the default's first; in each the smallest first."""
    found = {get_model_builder(DEFAULT_ARCH).__module__: []}
    for arch in list_models(module=torchvision.models):
        found.setdefault(get_model_builder(arch).__module__, []).append(arch)

    def megabytes(arch: str) -> float:
        return get_model_weights(arch).DEFAULT.meta["_file_size"]

    for family in found.values():
        if has_head(family[0]):  # which takes a while: so one after the other
            yield sorted(family, key=megabytes)


def infer_arch(state: dict[str, object], asked: str | None = None, hint: str | None = None) -> str:
    """The architecture that has exactly the weights of a state dict, by name and shape; else the one asked for, else
    that with the fewest others. The head is no part of it, nor are counts, which not every file has.

    hint: what is probably right, tried first. Of other families than ResNets' only that with the most of the names is
    looked at, since all take seconds to build.
    """
    given = shapes_among(state)

    def likeliest() -> Iterator[str]:
        yield from filter(None, (asked, hint))
        yield from next(families())
        yield from max(families(), key=lambda family: share_among(backbone_shapes(family[0]), given))

    strange = {}
    for arch in likeliest():
        strange[arch] = strangeness(arch, given)
        if strange[arch] == (0, 0):
            return arch
    return asked or min(strange, key=strange.get)


def share_among(names: Iterable[str], given: Iterable[str]) -> float:
    """How many of some names are among those given, from 0 to 1."""
    names = set(names)
    return len(names & set(given)) / len(names)
