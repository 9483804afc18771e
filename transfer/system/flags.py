"""Flags: the arguments of both commands. Without torch, so that --help and typing errors are answered at once."""

import argparse
import contextlib
import difflib
import importlib.util
import os
import re
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

DEFAULT_ARCH = "resnet18"  # the recipe's
STAGES = ("layer4", "layer3", "all")  # what --unfreeze may name
DEFAULT_LR = 0.005  # of the head
PRECISIONS = ("auto", "float32", "bfloat16")
CORRECTIONS = "labels to change: path and class (or -) per line"
IMAGE_SIZE = 224  # the recipe's
SIZES = range(64, 1025, 2)  # that --size may name


class Help(argparse.ArgumentDefaultsHelpFormatter):
    """Shows defaults, but not that of a flag whose default is to be off."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        off = action.default is None or action.default is False or action.default == []
        return action.help if off else super()._get_help_string(action)


class Parser(argparse.ArgumentParser):
    """Ends a wrong command line in one line, which names the nearest flag or path where there is one."""

    def __init__(self, usage: str, description: str, epilog: str):
        # No abbreviations: a slip of the pen would be taken for another flag.
        super().__init__(usage=usage, description=description, epilog=epilog, formatter_class=Help, allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        if message.startswith("the following arguments are required: IMAGE"):
            message = f"name photos, folders or lists; {self.epilog}"
        elif match := re.fullmatch("argument (--.*): expected one argument", message):
            flag = match[1]
            value = self._option_string_actions[flag].metavar
            dash = "; a path that begins with - is written ./-..." if value == "PATH" else ""
            message = f"{flag} needs a value: {flag} {value}{dash}"
        self.exit(2, f"error: {message}\n")

    def parse(self, argv: Sequence[str] | None, path_flag: str | None = None) -> argparse.Namespace:
        """The arguments; path_flag: what a path that stands alone was probably meant for."""
        args, rest = self.parse_known_args(argv)
        args.argv = sys.argv[1:] if argv is None else [*argv]
        for text in rest:
            if text.startswith("-"):
                name = text.split("=")[0]
                near = difflib.get_close_matches(name, self._option_string_actions, 1)
                self.exit(2, f"error: there is no flag {name}{f'; did you mean {near[0]}?' if near else ''}\n")
            self.exit(2, f"error: {self.explain_path(args, text, path_flag)}\n")
        if importlib.util.find_spec("torch") is None:
            self.exit(2, f"error: torch is not installed here; {torch_fix()}\n")
        return args

    def explain_path(self, args: argparse.Namespace, text: str, path_flag: str | None) -> str:
        """What to do about an argument that belongs to no flag."""
        for name, value in vars(args).items():
            if isinstance(value, str | Path) and os.path.exists(whole := f"{value} {text}"):
                return f"a path with spaces needs quotes: --{name.replace('_', '-')} {shlex.quote(whole)}"
        named = getattr(args, path_flag[2:]) if path_flag else None
        if named and Path(named).is_dir() and Path(text).is_dir() and Path(text).parent == Path(named).parent:
            return f"name the folder that the class folders are in: {path_flag} {shlex.quote(str(Path(text).parent))}"
        if path_flag and os.path.exists(text):
            return f"did you mean {path_flag} {shlex.quote(text)}?"
        return f"'{text}' belongs to no flag; a path with spaces needs quotes"


def torch_fix() -> str:
    """What to do where torch is missing: most often the environment was not activated in a new terminal."""
    venv = Path(__file__).resolve().parents[2] / ".venv"
    if not venv.is_dir() or Path(sys.prefix).resolve() == venv:
        return "pip install -r requirements.txt"
    script = venv / ("Scripts/Activate.ps1" if os.name == "nt" else "bin/activate")
    shown = script.relative_to(Path.cwd()) if script.is_relative_to(Path.cwd()) else script
    return f"activate the environment: {'' if os.name == 'nt' else '. '}{shlex.quote(str(shown))}"


def int_at_least(least: int) -> Callable[[str], int]:
    """An argparse type: a whole number, at least so large."""

    def parse(text: str) -> int:
        if not (text.isascii() and text.isdigit() and least <= int(text) < 2**31):
            raise argparse.ArgumentTypeError(f"'{text}' is not a whole number from {least}")
        return int(text)

    return parse


def image_size(text: str) -> int:
    """An argparse type: an even number of pixels, one of SIZES."""
    if text.isascii() and text.isdigit() and int(text[:9]) in SIZES:
        return int(text)
    raise argparse.ArgumentTypeError(f"'{text}' is not an even number from {SIZES[0]} to {SIZES[-1]}")


def float_below(limit: str) -> Callable[[str], float]:
    """An argparse type: a number above 0 and below this."""

    def parse(text: str) -> float:
        with contextlib.suppress(ValueError):
            if 0 < float(text) < float(limit):
                return float(text)
        raise argparse.ArgumentTypeError(f"'{text}' is not a number above 0 and below {limit}")

    return parse


learning_rate = float_below("1e37")  # whose tenfold (Adam's first step) float32 can hold
share = float_below("1")


class NoAugment(argparse.Action):
    """Ends a command line with the flag that went, in one line."""

    def __call__(self, parser: argparse.ArgumentParser, *_) -> None:
        parser.error("--augment is gone: --views 4, the default, trains on random views too; --views 2 on none")


def parse_train_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The arguments of train.py. Ends the process (status 2) with one line where they are wrong."""
    parser = Parser(
        usage="%(prog)s [--train PATH] [--test PATH] [option ...]",
        description="Train a classifier of photos in folders or lists: a frozen backbone, a new head.",
        epilog="example: python train.py --train photos && python predict.py photo.jpg",
    )
    add = parser.add_argument_group("data").add_argument
    add("--train", type=Path, metavar="PATH", help="a list, or a folder of class folders (train.txt)")
    add("--test", type=Path, metavar="PATH", help="likewise (test.txt beside it, or held out)")
    add("--root", type=Path, default=".", metavar="DIR", help="where the paths in lists begin")
    add("--classes", type=Path, metavar="FILE", help="class names, one per line (folder names)")
    add("--corrections", type=Path, action="append", default=[], metavar="FILE", help=CORRECTIONS)
    add("--val-split", type=share, metavar="SHARE", help="choose the epoch on this share of --train")
    add = parser.add_argument_group("output").add_argument
    add("--out", type=Path, default="best.pth", metavar="FILE", help="checkpoint, and a .csv beside it")
    add("--audit", type=Path, metavar="FILE", help="wrong labels, copies, strange photos: page and .csv")
    add = parser.add_argument_group("model").add_argument
    add("--arch", default=DEFAULT_ARCH, metavar="NAME", help="of torchvision's; list: show them")
    add("--weights", metavar="NAME", help="imagenet (default), none, or a FILE that fits --arch")
    add = parser.add_argument_group("optimisation").add_argument
    add("--size", type=image_size, metavar="N", help="pixels of an image's side (default: by --arch)")
    add("--epochs", type=int_at_least(1), default=20, metavar="N", help="epochs of the head")
    add("--finetune-epochs", type=int_at_least(0), default=0, metavar="N", help="then of the last stages too")
    add("--unfreeze", choices=STAGES, default=STAGES[0], metavar="STAGE", help="layer4, layer3 or all")
    add("--batch-size", type=int_at_least(1), default=64, metavar="N", help="images per training step")
    add("--lr", type=learning_rate, default=DEFAULT_LR, metavar="RATE", help="learning rate of the head")
    add("--finetune-lr", type=learning_rate, default=2e-4, metavar="RATE", help="the stages' highest rate")
    add("--balance", action="store_true", help="for classes of very unequal size")
    add("--views", type=int_at_least(1), default=4, metavar="V", help="1: plain, 2: mirrored too, more: random")
    add("--seed", type=int_at_least(0), default=0, metavar="N", help="random seed: views, head, shuffling")
    add("--view-seed", type=int_at_least(0), metavar="N", help="views and splits alone (default: --seed)")
    add("--augment", action=NoAugment, help=argparse.SUPPRESS)
    add = parser.add_argument_group("running").add_argument
    add("--cache", type=Path, metavar="DIR", help="keep features: 2 to 16 KB per image and view")
    add("--device", default="auto", metavar="NAME", help="auto, cpu, cuda, cuda:N or mps")
    add("--precision", choices=PRECISIONS, default="auto", metavar="NAME", help="auto, float32 or bfloat16")
    add("--workers", type=int_at_least(0), metavar="N", help="decoding processes (default: one per core)")
    return parser.parse(argv, path_flag="--train")


def parse_predict_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The arguments of predict.py. Ends the process (status 2) with one line where they are wrong."""
    parser = Parser(
        usage="%(prog)s IMAGE [IMAGE ...] [option ...]",
        description="Name what is in images; where labels are known, score the answers.",
        epilog="examples: python predict.py photo.jpg; python predict.py test.txt --report report.html",
    )
    what = "images, folders, lists ending in .txt, or - for paths on standard input"
    parser.add_argument("images", nargs="+", metavar="IMAGE", help=what)
    parser.add_argument("--labelled", action="store_true", help="folders hold class folders: score them")
    parser.add_argument("--labeled", dest="labelled", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--model", type=Path, default="best.pth", metavar="FILE", help="what train.py saved")
    parser.add_argument("--arch", metavar="NAME", help="of a --model whose weights do not show it")
    parser.add_argument("--root", type=Path, default=".", metavar="DIR", help="where the paths in lists begin")
    parser.add_argument("--corrections", type=Path, action="append", default=[], metavar="FILE", help=CORRECTIONS)
    add = parser.add_argument_group("a pile without labels").add_argument
    add("--label-next", type=int_at_least(1), metavar="N", help="name the N photos whose labels help most")
    what = "leave out a list's or folder's photos; repeatable"
    add("--except", dest="leave_out", action="append", metavar="PATH", help=what)
    add = parser.add_argument_group("output").add_argument
    add("--top-k", type=int_at_least(1), default=3, metavar="K", help="classes named for each image")
    add("--min-prob", type=share, metavar="P", help="below this an image is named unknown")
    what = "text, csv, json, paths, or table: no rows"
    add("--format", choices=("text", "csv", "json", "table", "paths"), metavar="NAME", help=what)
    add("--report", type=Path, metavar="FILE", help="page of mistakes, or of photos to label next")
    add = parser.add_argument_group("running").add_argument
    add("--mirror", action="store_true", help="also look at the mirrored photo, in twice the time")
    add("--device", default="auto", metavar="NAME", help="auto, cpu, cuda, cuda:N or mps")
    add("--batch-size", type=int_at_least(1), metavar="N", help="images at a time (default: by device)")
    add("--workers", type=int_at_least(0), metavar="N", help="decoding processes (default: one per core)")
    args = parser.parse(argv)
    args.leave_out = args.leave_out or []
    if "-" in args.images and len(args.images) > 1:
        parser.error("- stands alone: other images can come on standard input too")
    if args.label_next and (args.labelled or args.corrections or args.format == "table"):
        parser.error("--label-next prints photos without labels: leave out --labelled, --corrections, --format table")
    if not args.label_next and (args.leave_out or args.format == "paths"):
        parser.error(f"{'--except' if args.leave_out else '--format paths'} needs --label-next N")
    return args
