"""Weights: found or downloaded, untrusted, loaded in every usual form."""

import contextlib
import errno
import io
import json
import math
import os
import pickle
import re
import shlex
import struct
import sys
import time
import zipfile
from argparse import Namespace
from collections import OrderedDict
from pathlib import Path

import fuzz
import pytest
import torch
from conftest import BUNDLED, SmallNetwork, growth, patched, put, run_main, try_seeds
from PIL import Image
from processes import run_forked
from torch import nn
from torchvision import transforms as T
from torchvision.models import get_model, resnet18

import predict
import train
from transfer.checkpoint import METADATA_KEY, load_backbone, load_checkpoint
from transfer.system.console import UserError, printable


@pytest.mark.parametrize("form", ["another head", "best"])
def test_of_a_file_with_a_head_the_backbone_loads(tmp_path, form, small_run):
    path, expected = small_run / "best.pth", load_backbone(BUNDLED, "resnet18")
    if form == "another head":
        path = tmp_path / "weights.pth"
        torch.save(expected | {"fc.weight": torch.zeros(1000, 512), "fc.bias": torch.zeros(1000)}, path)
    state = load_backbone(path, "resnet18")
    assert state.keys() == expected.keys()
    assert all(
        torch.allclose(state[key].float(), value.float(), rtol=1e-3, atol=1e-3) for key, value in expected.items()
    )


def test_what_is_no_resnet18_gets_the_first_keys_that_do_not_fit(tmp_path):
    torch.save({"conv1.weight": torch.zeros(64, 3, 3, 3), "features.0": torch.zeros(1)}, tmp_path / "other.pth")
    with pytest.raises(UserError) as error:
        load_backbone(tmp_path / "other.pth", "resnet18")
    assert "unexpected features.0, conv1.weight is 64x3x3x3, not 64x3x7x7, no bn1.weight and" in str(error.value)


def tiny(arch, classes=3):
    """A state dict of a few kB: each tensor one number, repeated."""
    with torch.device("meta"):
        state = get_model(arch, num_classes=classes).state_dict()
    for key, value in state.items():
        state[key] = torch.tensor(7) if value.dim() == 0 else torch.full((1,) * value.dim(), 0.01).expand(value.shape)
    return state


def tiny_resnet18(classes=3, **changes):
    state = tiny("resnet18", classes)
    state.update({key.replace("__", "."): value for key, value in changes.items()})
    return state


def with_metadata(metadata, classes=3):
    state = tiny_resnet18(classes)
    state._metadata[METADATA_KEY] = metadata
    return state


class Runs:
    """What a hostile pickle holds: a call, made when it is loaded."""

    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


def claim(size, stride, storage=4):
    """A tensor that claims more numbers than its storage holds."""
    parts = (torch.zeros(storage).storage(), 0, size, stride, False, OrderedDict())
    return Runs(torch._utils._rebuild_tensor_v2, *parts)


def program():
    buffer = io.BytesIO()
    torch.jit.save(torch.jit.trace(SmallNetwork(), torch.zeros(1, 3, 64, 64)), buffer)
    return buffer.getvalue()


def bomb_in_zip():
    file = io.BytesIO()
    torch.save(tiny_resnet18(), file)
    bomb = io.BytesIO()
    with zipfile.ZipFile(file) as sound, zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in sound.namelist():
            archive.writestr(name, bytes(1 << 28) if name.endswith("/data/1") else sound.read(name))
    return bomb.getvalue()


def legacy_bomb():
    file = io.BytesIO()
    torch.save({"fc.weight": torch.zeros(77777)}, file, _use_new_zipfile_serialization=False)
    old, new = b"J" + struct.pack("<i", 77777), b"\x8a\x06" + (1 << 40).to_bytes(6, "little")
    content = file.getvalue()
    assert old in content
    return content.replace(old, new)[:2000]


def pickled(content):
    file = io.BytesIO()
    torch.save(content, file)
    return file.getvalue()


def legacy(content):
    file = io.BytesIO()
    torch.save(content, file, _use_new_zipfile_serialization=False)
    return file.getvalue()


def nested_tensor():
    return torch.nested.nested_tensor([torch.zeros(2), torch.zeros(3)])


def attributed():
    """A parameter that carries an attribute by a method's name."""
    weight = nn.Parameter(tiny_resnet18()["conv1.weight"].clone())
    weight.isfinite = 5
    return weight


def with_pickle(content):
    """A file of weights, whole but for its pickle."""
    forged = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(pickled({}))) as sound, zipfile.ZipFile(forged, "w") as archive:
        for name in sound.namelist():
            archive.writestr(name, content if name.endswith("data.pkl") else sound.read(name))
    return forged.getvalue()


def marked_as_folder():
    """One bit flipped in a zip's directory makes a member a folder, whose bytes torch leaves unread."""
    content = bytearray(pickled({"weights": torch.ones(1000)}))
    at = content.index(b"PK\x01\x02")
    while b"data/0" not in content[at : at + 90]:
        at = content.index(b"PK\x01\x02", at + 1)
    content[at + 38] ^= 0x10
    return bytes(content)


CODE = "holds more than tensors, and to load it would run code of its own; only if you trust it: python -c .*"
DAMAGED = "damaged, or not a weights file; get it again from its source"
MISFIT = r"does not fit ResNet-18: {}; give one made for resnet18(, or name its architecture by --arch, .* shows)?"


REFUSED = {
    "a pickle that runs code": (lambda: pickle.dumps(Runs(open, "pwned", "w")), DAMAGED),
    "a state dict that runs code": (lambda: pickled({"fc.weight": Runs(open, "pwned", "w")}), CODE),
    "a legacy file that runs code": (lambda: legacy({"fc.weight": Runs(os.mkdir, "pwned")}), CODE),
    "a whole model": (lambda: pickled(SmallNetwork()), CODE),
    "a TorchScript program": (program, r"is a TorchScript program; save its model.state_dict\(\) with torch.save"),
    "empty": (lambda: b"", DAMAGED),
    "HTML": (lambda: b"<!doctype html><title>Log in</title>", DAMAGED),
    "truncated": (lambda: pickled(tiny_resnet18())[:-2000], DAMAGED),
    "truncated legacy": (lambda: legacy(tiny_resnet18())[:-10], DAMAGED),
    "a flipped byte": (lambda: patched(pickled(tiny_resnet18()), 2000, b"\xff\0\xff"), DAMAGED),
    "marked as a folder": (marked_as_folder, DAMAGED),
    "a zip bomb": (bomb_in_zip, DAMAGED),
    "a legacy file that claims terabytes": (legacy_bomb, DAMAGED),
    "more numbers than are stored": (
        lambda: pickled(tiny_resnet18(conv1__weight=claim((64, 3, 7, 7), (147, 49, 7, 1)))),
        DAMAGED,
    ),
    "terabytes that are not stored": (lambda: pickled(tiny_resnet18(conv1__weight=claim((1 << 40,), (1,)))), DAMAGED),
    "a tensor": (lambda: pickled(torch.zeros(3)), r"holds no state dict; save model.state_dict\(\) with torch.save"),
    "a list": (lambda: pickled([1]), r"holds no state dict; save model.state_dict\(\) with torch.save"),
    "repeated into terabytes": (
        lambda: pickled(tiny_resnet18(fc__weight=torch.zeros(1).expand(10**9, 512))),
        MISFIT.format("fc.weight is 1000000000x512, not 1000x512, fc.bias is 3, not 1000"),
    ),
    "sparse terabytes": (
        lambda: pickled(tiny_resnet18(conv1__weight=torch.sparse_coo_tensor(size=(10**6, 10**6)))),
        MISFIT.format("conv1.weight is no plain tensor"),
    ),
    "no classifier": (
        lambda: pickled(tiny("squeezenet1_0")),
        r"does not fit [\w-]+: unexpected features\.\d.*, .* more; give one made for .*",
    ),
    "a narrower ResNet": (
        lambda: pickled(tiny_resnet18(layer4__1__conv2__weight=torch.zeros(256, 512, 3, 3))),
        MISFIT.format("layer4.1.conv2.weight is 256x512x3x3, not 512x512x3x3"),
    ),
    "another class count": (
        lambda: pickled(tiny_resnet18(fc__bias=torch.zeros(4))),
        MISFIT.format("fc.bias is 4, not 3"),
    ),
    "another width": (
        lambda: pickled(tiny_resnet18(fc__weight=torch.zeros(3, 2048))),
        MISFIT.format("fc.weight is 3x2048, not 3x512"),
    ),
    "NaN": (
        lambda: pickled(tiny_resnet18(bn1__bias=torch.full((64,), torch.nan))),
        MISFIT.format("bn1.bias has values that are not finite"),
    ),
    "infinite": (
        lambda: pickled(tiny_resnet18(layer1__0__bn1__running_var=torch.full((64,), torch.inf))),
        MISFIT.format("layer1.0.bn1.running_var has values that are not finite"),
    ),
    "integers": (
        lambda: pickled(tiny_resnet18(bn1__bias=torch.zeros(64, dtype=torch.int64))),
        MISFIT.format("bn1.bias is int64"),
    ),
    "8-bit floats": (
        lambda: pickled(tiny_resnet18(bn1__bias=torch.zeros(64).to(torch.float8_e4m3fn))),
        MISFIT.format("bn1.bias is float8_e4m3fn"),
    ),
    "a word for a tensor": (
        lambda: pickled(tiny_resnet18(bn1__bias="x")),
        MISFIT.format("bn1.bias is no plain tensor"),
    ),
    "on no device": (
        lambda: pickled(tiny_resnet18(bn1__bias=torch.zeros(64, device="meta"))),
        MISFIT.format("bn1.bias is no plain tensor"),
    ),
    # torch refuses to load these from 2.15 on, earlier ones leave it to the check of shapes: either is right.
    "a nested tensor": (
        lambda: pickled(tiny_resnet18(bn1__bias=nested_tensor())),
        f"({CODE}|{MISFIT.format('bn1.bias is no plain tensor')})",
    ),
    "a nested tensor for a head": (
        lambda: pickled(tiny_resnet18(fc__weight=nested_tensor())),
        f"({CODE}|{MISFIT.format('fc.*')})",
    ),
    "attributes for methods": (
        lambda: pickled(tiny_resnet18(conv1__weight=attributed())),
        MISFIT.format("conv1.weight is no plain tensor"),
    ),
    "a key too deep to print": (
        lambda: with_pickle(b"\x80\x02})" + b"\x85" * 3000 + b"Ns."),
        MISFIT.format("unexpected .*, no conv1.weight, no bn1.weight and .* more"),
    ),
    "keys with escapes": (
        lambda: pickled({"\x1b[2J": torch.zeros(1)}),
        MISFIT.format(r"unexpected \\x1b\[2J, no conv1.weight, .*"),
    ),
    "itself within itself": (lambda: pickled(within_itself()), MISFIT.format(r"unexpected model, no conv1.weight, .*")),
    "a directory": (None, "not a regular file; name a file of weights"),
    "a FIFO": (None, "not a regular file; name a file of weights"),
    "missing": (None, f"{os.strerror(errno.ENOENT).lower()}; name a file of weights"),
}


def within_itself():
    found = {}
    found["model"] = found
    return found


# Unsound heads, which --weights ignores.
HEADS_ALONE = "repeated into terabytes", "another class count", "another width", "a nested tensor for a head"


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", REFUSED)
def test_a_file_that_is_no_sound_resnet_is_refused_by_both_scripts(colours, kind):
    make, reason = REFUSED[kind]
    if kind == "a directory":
        os.mkdir("bad.pth")
    elif kind == "a FIFO":
        os.mkfifo("bad.pth")
    elif make:
        Path("bad.pth").write_bytes(make())
    before = sorted(os.listdir())
    began = time.perf_counter()
    scripts = [(train.main, "--weights", "bad.pth"), (predict.main, "red/test_0.png", "--model", "bad.pth")]
    for main, *args in scripts[kind in HEADS_ALONE :]:
        status, out, err = run_main(main, *args)
        assert (status, out) == (2, "")
        assert re.fullmatch(rf"error: bad\.pth: {reason}\n", err), err
        assert ("weights_only" in err) == ("trust" in err) and err.removesuffix("\n").isprintable()
    assert time.perf_counter() - began < 10
    assert sorted(os.listdir()) == before, "the code ran, or something was written"


@pytest.mark.parametrize("kind", [kind for kind in REFUSED if "bytes" in kind or "bomb" in kind])
def test_a_small_file_that_claims_much_takes_no_memory(tmp_path, kind):
    (tmp_path / "bad.pth").write_bytes(REFUSED[kind][0]())

    def load():
        with pytest.raises(UserError):
            load_checkpoint(tmp_path / "bad.pth")

    assert growth(load) < 100 << 20


def predicted(tmp_path, content):
    """What predict.py prints with a checkpoint of these bytes: its status, the class names of the line, and stderr."""
    (tmp_path / "model.pth").write_bytes(content)
    put(tmp_path / "photo.png", Image.new("RGB", (8, 8)))
    status, out, err = run_main(predict.main, tmp_path / "photo.png", "--model", tmp_path / "model.pth", "--workers", 0)
    return status, sorted(name.rsplit(" ", 1)[0] for name in out.split("  ", 1)[-1].split(", ")), err


def saved_on_cuda(monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(torch.serialization, "location_tag", lambda _: "cuda:3")
        content = pickled(tiny_resnet18())
    assert b"cuda:3" in content
    return content


@pytest.mark.parametrize(
    "form",
    ["bare", "cuda", "model", "state_dict", "nested twice", "module.", "_orig_mod.", "float16", "float64", "legacy"],
)
def test_usual_forms_of_a_checkpoint_load_in_both_scripts(tmp_path, monkeypatch, form):
    state = tiny_resnet18()
    forms = {
        "cuda": lambda: saved_on_cuda(monkeypatch),
        "model": lambda: pickled({"model": state, "epoch": 3}),
        "state_dict": lambda: pickled({"state_dict": state}),
        "nested twice": lambda: pickled({"model": {"state_dict": state}}),
        "module.": lambda: pickled({f"module.{key}": value for key, value in state.items()}),
        "_orig_mod.": lambda: pickled({f"_orig_mod.{key}": value for key, value in state.items()}),
        "float16": lambda: pickled({k: v.half() if v.is_floating_point() else v for k, v in state.items()}),
        "float64": lambda: pickled({k: v.double() if v.is_floating_point() else v for k, v in state.items()}),
        "legacy": lambda: legacy(state),
    }
    assert predicted(tmp_path, forms.get(form, lambda: pickled(state))()) == (0, ["0", "1", "2"], "")
    found = load_backbone(tmp_path / "model.pth", "resnet18")
    assert found.keys() == {key for key in state if not key.startswith("fc.")}
    assert all(torch.allclose(found[key].double(), state[key].double(), rtol=1e-3) for key in found)


def as_safetensors(state, **changes):
    """A state dict as a safetensors file; changes: of the header's entries."""
    header, data = {"__metadata__": {"format": "pt"}}, b""
    names = {torch.float32: "F32", torch.float16: "F16", torch.int64: "I64"}
    for key, value in state.items():
        raw = value.contiguous().numpy().tobytes()
        header[key] = {
            "dtype": names[value.dtype],
            "shape": list(value.shape),
            "data_offsets": [len(data), len(data) + len(raw)],
        }
        data += raw
    for key, change in changes.items():
        header[key.replace("__", ".")] |= change
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


@pytest.mark.parametrize(
    ("key", "prefix", "more"),
    [
        ("model_state_dict", "", {}),
        ("net", "model.", {"criterion.weight": torch.zeros(2)}),
        ("state_dict", "backbone.", {"projector.0.weight": torch.zeros(2, 2)}),
        ("", "module.encoder_q.", {}),
    ],
)
def test_a_state_dict_is_found_under_any_key_and_prefix(tmp_path, key, prefix, more):
    state = {f"{prefix}{name}": value for name, value in tiny_resnet18().items()} | more
    content = {key: state, "optimizer": {"state": {}, "param_groups": [{"lr": 0.1}]}, "epoch": 3} if key else state
    assert predicted(tmp_path, pickled(content)) == (0, ["0", "1", "2"], "")
    assert load_backbone(tmp_path / "model.pth", "resnet18").keys() == load_backbone(BUNDLED, "resnet18").keys()


def test_of_several_networks_the_usual_one_counts_or_the_question_is_handed_back(tmp_path):
    state, other = tiny_resnet18(), tiny_resnet18(classes=5)
    assert predicted(tmp_path, pickled({"model_ema": other, "model": state}))[:2] == (0, ["0", "1", "2"])
    for content, several in (
        ({"student": state, "teacher": other}, "student, teacher"),
        ({f"{side}.{key}": value for key, value in state.items() for side in "qk"}, r"k\., q\."),
    ):
        status, _, err = predicted(tmp_path, pickled(content))
        assert status == 2 and re.search(
            rf": holds several networks \({several}\); save the state dict of one with", err
        )


@pytest.mark.parametrize("head", ["fc.1.weight", "fc.0.bias"])
def test_whatever_head_a_backbones_file_has_is_ignored(tmp_path, head):
    state = {key: value for key, value in tiny_resnet18().items() if not key.startswith("fc.")} | {
        head: torch.zeros(3, 4)
    }
    torch.save(state, tmp_path / "weights.pth")
    assert load_backbone(tmp_path / "weights.pth", "resnet18").keys() == load_backbone(BUNDLED, "resnet18").keys()


def test_a_model_with_one_output_is_refused_but_for_training_from_it(tmp_path):
    status, _, err = predicted(tmp_path, pickled(tiny_resnet18(classes=1)))
    assert status == 2 and ": has one output, for one class or a sigmoid, where each class needs its own; " in err
    load_backbone(tmp_path / "model.pth", "resnet18")
    ours = with_metadata({"format": 1, "classes": ["apple"]}, classes=1)  # as earlier versions trained them
    assert predicted(tmp_path, pickled(ours))[:2] == (0, ["apple"])


@pytest.mark.parametrize("half", [False, True])
def test_a_safetensors_file_is_read(tmp_path, half):
    state = {
        key: value.half() if half and value.is_floating_point() else value for key, value in tiny_resnet18().items()
    }
    assert predicted(tmp_path, as_safetensors(state)) == (0, ["0", "1", "2"], "")
    found = load_backbone(tmp_path / "model.pth", "resnet18")
    assert all(torch.equal(found[key], state[key]) for key in found)


@pytest.mark.parametrize(
    "content",
    [
        as_safetensors({"a": torch.ones(3)})[:-1],
        as_safetensors({"a": torch.ones(3)}) + b"1",
        as_safetensors({"a": torch.ones(3)}, a={"shape": [4]}),
        as_safetensors({"a": torch.ones(3)}, a={"shape": [-1, -3]}),
        as_safetensors({"a": torch.ones(3)}, a={"shape": [3.0]}),
        as_safetensors({"a": torch.ones(3)}, a={"dtype": "F99"}),
        as_safetensors({"a": torch.ones(3)}, a={"shape": [1 << 40], "data_offsets": [0, 1 << 42]}),
        as_safetensors({"a": torch.ones(2), "b": torch.ones(2)}, b={"data_offsets": [4, 12]}),
        as_safetensors({"a": torch.ones(2), "b": torch.ones(2)}, b={"data_offsets": [12, 20]}),
        struct.pack("<Q", 100) + b"{" * 100,
        struct.pack("<Q", 100_000) + b'{"a":' + b"[" * 99_995,
        struct.pack("<Q", 2) + b"{}x",
        struct.pack("<Q", 8) + b'{"a": 1}',
    ],
    ids=range(13),
)
def test_a_safetensors_file_that_breaks_its_format_is_damaged(tmp_path, content):
    (tmp_path / "weights").write_bytes(content)
    with pytest.raises(UserError, match=DAMAGED):
        load_checkpoint(tmp_path / "weights")


@pytest.mark.parametrize("kind", ["a model", "with its arguments"])
def test_the_printed_command_makes_a_plain_file_of_one_that_runs_code(tmp_path, kind):
    model = get_model("resnet18", num_classes=3)
    content = model if kind == "a model" else {"model": model.state_dict(), "args": Namespace(lr=1), "net": model.fc}
    torch.save(content, tmp_path / "it's.pth")
    with pytest.raises(UserError, match=CODE) as error:
        load_checkpoint(tmp_path / "it's.pth")
    _, command = str(error.value).split("only if you trust it: python ")
    option, code = shlex.split(command)
    assert option == "-c" and run_forked(code).returncode == 0
    state = load_checkpoint(tmp_path / "it's.plain.pth")[0].state_dict()
    assert all(torch.equal(state[key], value) for key, value in model.state_dict().items())


GOOD_METADATA = {"format": 1, "classes": ["a", "b", "c"], "accuracy": 0.5}


def deeply_nested():
    """3,000 lists in each other, more than Python prints."""
    found = []
    for _ in range(3000):
        found = [found]
    return found


HOSTILE_METADATA = {
    "a word": "hello",
    "a list": [1, 2],
    "a number": 5,
    "empty": {},
    "another format": GOOD_METADATA | {"format": 2},
    "no format": {"classes": ["a", "b", "c"]},
    "no classes": {"format": 1},
    "too few names": GOOD_METADATA | {"classes": ["a", "b"]},
    "too many names": GOOD_METADATA | {"classes": list("abcd")},
    "names of another type": GOOD_METADATA | {"classes": ["a", "b", 3]},
    "names in a word": GOOD_METADATA | {"classes": "abc"},
    "names in a dict": GOOD_METADATA | {"classes": {"a": 0, "b": 1, "c": 2}},
    "a tensor for a number": GOOD_METADATA | {"accuracy": torch.zeros(3)},
    "a number in words": GOOD_METADATA | {"accuracy": "0.5"},
    "a subclass": OrderedDict(GOOD_METADATA),
    "flags in lists without end": GOOD_METADATA | {"recipe": {"lr": deeply_nested()}},
    "flags by numbers": GOOD_METADATA | {"recipe": {1: 2}},
    "a mean without its deviation": GOOD_METADATA | {"mean": [0.5, 0.5, 0.5]},
    "a deviation without its mean": GOOD_METADATA | {"std": [0.5, 0.5, 0.5]},
    "a mean that is no number": GOOD_METADATA | {"mean": [0.5, math.nan, 0.5], "std": [0.5, 0.5, 0.5]},
    "a deviation of nothing": GOOD_METADATA | {"mean": [0.5, 0.5, 0.5], "std": [0.5, 0.0, 0.5]},
}


@pytest.mark.parametrize("kind", HOSTILE_METADATA)
def test_malformed_metadata_is_ignored_with_a_warning(tmp_path, kind):
    with deep_recursion():  # to write it
        content = pickled(with_metadata(HOSTILE_METADATA[kind]))
    status, names, err = predicted(tmp_path, content)
    assert (status, names) == (0, ["0", "1", "2"])
    model = printable(tmp_path / "model.pth")
    assert err == f"warning: {model}: its class names and history are malformed; going on with class numbers\n"


@contextlib.contextmanager
def deep_recursion():
    limit = sys.getrecursionlimit()
    sys.setrecursionlimit(20_000)
    yield
    sys.setrecursionlimit(limit)


class Armed:
    """An OrderedDict whose own attributes stand before its methods once it is loaded."""

    def __init__(self, content, **attributes):
        self.content, self.attributes = content, attributes

    def __reduce__(self):
        return OrderedDict, (), self.attributes, None, iter(self.content.items())


@pytest.mark.parametrize(
    "attribute", ["_metadata", "items", "get", "keys", "values", "__len__", "__getitem__", "__class__"]
)
def test_a_hostile_ordered_dict_is_read_as_a_dict(tmp_path, attribute):
    state = Armed(tiny_resnet18(), **{attribute: 5})
    assert predicted(tmp_path, pickled(Armed({"model": state}, **{attribute: "x"}))) == (0, ["0", "1", "2"], "")


def test_a_hostile_dict_of_metadata_is_read_as_a_dict(tmp_path):
    metadata = Armed({METADATA_KEY: GOOD_METADATA}, get=5, items=5)
    assert predicted(tmp_path, pickled(Armed(tiny_resnet18(), _metadata=metadata))) == (0, ["a", "b", "c"], "")


def test_class_names_with_escapes_never_reach_the_terminal(tmp_path):
    names = ["\x1b[2J\x1b]0;owned\x07", "two\nlines", "\u202eleft\udcff"]
    status, found, err = predicted(tmp_path, pickled(with_metadata(GOOD_METADATA | {"classes": names})))
    assert (status, found, err) == (0, sorted([r"\x1b[2J\x1b]0;owned\x07", r"two\nlines", r"\u202eleft\udcff"]), "")


def test_every_flipped_byte_of_a_checkpoint_is_harmless_or_found(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (content, *_), _, check = fuzz.checkpoints()  # over 3 s: thousands of bytes, each loaded as a file of its own
    for at in range(2, len(content), 9):
        check(patched(content, at, bytes([content[at] ^ 0x10])))


@pytest.mark.filterwarnings("ignore")
def test_500_mutated_checkpoints_hold_the_saved_weights_or_are_user_errors(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    try_seeds(fuzz.checkpoints(), 500)


def test_best_pth_loads_into_plain_torchvision_which_predicts_the_same_and_exports_it(model):
    state = torch.load("best.pth", weights_only=True)
    plain = resnet18(num_classes=len(state["fc.bias"]))
    plain.load_state_dict(state)
    plain.eval()
    view = T.Compose([T.Resize((224, 224)), T.ToTensor(), T.Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])])
    images = torch.stack([view(Image.open(f"{colour}.png")) for colour in ("red", "green")])
    exported = torch.export.export(plain, (images,), dynamic_shapes=({0: torch.export.Dim("batch", min=1)},))
    torch.export.save(exported, "best.pt2")
    with torch.inference_mode():
        found = torch.export.load("best.pt2").module()(images)
        assert torch.allclose(found, plain(images), atol=1e-4)
        one = exported.module()(images[:1])  # another batch size than it was exported with
    assert torch.allclose(one, found[:1], atol=1e-4)
    ours = predict.predict(model, ["red.png", "green.png"])
    for row, named in zip(found.softmax(1).tolist(), ours, strict=True):
        assert dict(named) == pytest.approx(dict(zip(model.classes, row, strict=True)), abs=1e-4)
