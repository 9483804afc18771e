"""Mutated images, lists and checkpoints, and training runs killed at random moments, for as long as asked:

    python tests/fuzz.py --minutes 10 --only images

Every input comes from a seed; `--seed S --inputs 1` makes that of a finding again. Exit status 1 on any finding: an
exception that is not the program's own, a crash or hang, over 1 GB of memory, weights that are not the saved ones.
"""

import argparse
import contextlib
import io
import itertools
import multiprocessing
import os
import random
import resource
import signal
import struct
import sys
import tempfile
import time
import traceback
import warnings
import zipfile
import zlib
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path

import torch
from PIL import Image

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parent.parent)]
import conftest  # noqa: E402

import train  # noqa: E402

HANG, MEMORY = 30, 1 << 30  # seconds an input, and bytes above start-up
EDGES = (0, 1, 0x7F, 0x80, 0xFF, 0x7FFF, 0x8000, 0xFFFF, 0x7FFFFFFF, 0xFFFFFFFF)
LIST_TOKENS = ("\n", "\r\n", " ", "\t", "#", '"', ",", "\\", "\0", "\ufeff", "\x1b[2J", "b.png", "../", "./", " 1.0")
LIST_TOKENS = (*(t.encode() for t in (*LIST_TOKENS, " -1", " 1_0", " ٣", " 99999999999999999999")), b"\xff\xfe", b"\xa0")
PICKLE_TOKENS = (*(b"%c" % c for c in b"}])(.02NRbsuQ"), b"K\xff", b"J\xff\xff\xff\x7f", b"q\x01", b"h\x01", b"\x86")


def saved(mode: str, format: str, **options) -> bytes:
    """A small file of noise in a mode and format."""
    noise, file = Image.effect_noise((24, 20), 60), io.BytesIO()
    image = Image.merge("RGB", [noise, noise.rotate(90), noise.rotate(180)]).convert(mode.removesuffix(";16"))
    if mode in ("RGBA", "LA"):
        image.putalpha(noise)
    if options.get("save_all"):
        options["append_images"] = [image.rotate(90), image.rotate(180)]
    image.save(file, format, **options)
    return file.getvalue()


def image_files() -> list[bytes]:
    """Small files of every allowed format, over its modes, compressions and frames."""
    exif = Image.Exif()
    exif[0x0112], exif[0x010E] = 6, "words"
    tiffs, modes = ("raw", "tiff_lzw", "tiff_deflate", "packbits", "jpeg"), ("1", "L", "LA", "P", "RGB", "RGBA")
    return [
        *(saved(mode, "JPEG", exif=exif) for mode in ("RGB", "L", "CMYK")),
        *(saved(mode, "PNG", exif=exif) for mode in (*modes, "I;16")),
        *(saved(mode, "BMP") for mode in ("1", "L", "P", "RGB", "RGBA")),
        *(saved("RGB", "TIFF", compression=each) for each in tiffs),
        *(saved(mode, "TIFF") for mode in (*modes, "CMYK", "I", "F")),
        *(saved("RGB", format, save_all=True) for format in ("MPO", "PNG", "WEBP", "GIF", "TIFF")),
        *(saved("RGBA", "WEBP", lossless=each, exif=exif) for each in (True, False)),
        saved("1", "TIFF", compression="group4"),
        saved("P", "PNG", transparency=bytes(range(256))),
        saved("P", "GIF", transparency=3),
        saved("RGB", "JPEG", progressive=True),
    ]


def mutate(content: bytes, rng: random.Random, tokens: tuple[bytes, ...] = ()) -> bytes:
    """One to four of: a bit flipped, bytes set, a number's edge case, bytes cut, doubled or put in, the end lost."""
    content = bytearray(content)
    for _ in range(rng.randint(1, 4)):
        at, length = rng.randrange(len(content) + 1), min(rng.choice((1, 2, 4, 30)), len(content))
        match rng.randrange(8):
            case 0 | 1 if at < len(content):
                content[at] ^= 1 << rng.randrange(8)
            case 2:
                content[at : at + length] = rng.randbytes(length)
            case 3:
                size = rng.choice("BHI")
                edge = struct.pack(rng.choice("<>") + size, rng.choice(EDGES) % 256 ** struct.calcsize(size))
                content[at : at + len(edge)] = edge
            case 4:
                del content[at : at + length]
            case 5:
                content[at:at] = content[at : at + length]
            case 6:
                content[at:at] = rng.choice(tokens) if tokens else rng.randbytes(length)
            case 7 if rng.random() < 0.3:
                del content[at:]
    return bytes(content)


def with_right_checksums(png: bytes) -> bytes:
    """A PNG whose chunks have the checksums they need, so that what is inside them gets read."""
    chunks, at = [png[:8]], 8
    while at + 12 <= len(png):
        end = at + 8 + int.from_bytes(png[at : at + 4], "big")
        chunks.append(png[at:end] + zlib.crc32(png[at + 4 : end]).to_bytes(4, "big"))
        at = end + 4
    return b"".join(chunks)


# A kind of input: `input(seed)` makes one, `check` raises on a finding. They work in the current folder.


class Images:
    def __init__(self):
        self.files = image_files()

    def input(self, seed: int) -> bytes:
        rng = random.Random(seed)
        content = mutate(self.files[seed % len(self.files)], rng)
        return with_right_checksums(content) if content[1:4] == b"PNG" and rng.random() < 0.7 else content

    def check(self, content: bytes) -> None:
        Path("photo").write_bytes(content)
        with contextlib.suppress(train.PhotoError):
            photo = train.read_photo("photo")
            assert photo.mode == "RGB" and len(photo.tobytes()) == 3 * photo.width * photo.height


class Lists:
    def __init__(self):
        self.lines = "a.png 0\nb.png 1\nc d.png 1\n\u00fc.png 0\n# a comment\n\n./e.png  0\n".encode()
        for name in ("a.png", "b.png", "c d.png", "\u00fc.png", "e.png"):
            Path(name).touch()
        Path("plain.txt").write_bytes(self.lines)

    def input(self, seed: int) -> bytes:
        return mutate(self.lines, random.Random(seed), LIST_TOKENS)

    def check(self, content: bytes) -> None:
        Path("list.txt").write_bytes(content)
        with contextlib.suppress(train.UserError), contextlib.redirect_stderr(io.StringIO()):
            photos, _ = train.read_lists(Path("list.txt"), Path("plain.txt"), Path())
            written = content.removeprefix(b"\xef\xbb\xbf").split(b"\n")
            for path, label, line in zip(photos.paths(), photos.labels.tolist(), photos.lines.tolist(), strict=True):
                listed, number = written[line - 1].rsplit(None, 1)
                assert (path, label) == (listed.strip().removeprefix(b"./"), int(number)) and os.path.isfile(path)


class Checkpoints:
    """A damaged file is an error or holds the saved weights. A forged one, checksums right, is an error or loads."""

    def __init__(self):
        torch.manual_seed(0)
        state = OrderedDict({f"layer.{n}": torch.randn(n + 1, 3) for n in range(4)} | {"count": torch.tensor(7)})
        state._metadata = OrderedDict({train.ABOUT: {"format": 1, "classes": ["a", "b"], "accuracy": 0.5}})
        torch.save(state, "sound.pth")
        self.content = Path("sound.pth").read_bytes()
        self.state, self.about = train.load_state(Path("sound.pth"))

    def input(self, seed: int) -> bytes:
        rng, forged = random.Random(seed), io.BytesIO()
        if seed % 4:
            return mutate(self.content, rng)
        with zipfile.ZipFile("sound.pth") as sound, zipfile.ZipFile(forged, "w") as archive:
            for name in sound.namelist():
                content = sound.read(name)
                archive.writestr(name, mutate(content, rng, PICKLE_TOKENS) if name.endswith("data.pkl") else content)
        return b"forged" + forged.getvalue()

    def check(self, content: bytes) -> None:
        Path("weights.pth").write_bytes(content.removeprefix(b"forged"))
        with contextlib.suppress(train.UserError), warnings.catch_warnings(action="ignore"):
            state, about = train.load_state(Path("weights.pth"))
            if content.startswith(b"forged"):
                train.is_about(about, 2)
                train.check_resnet18(state, Path("weights.pth"))
            same = state.keys() == self.state.keys() and all(torch.equal(state[key], self.state[key]) for key in state)
            assert same and about == self.about, "altered weights were accepted"


class Kills:
    def __init__(self):
        conftest.make_photos(Path(), per_class=1)

    def input(self, seed: int) -> bytes:
        return b"%d" % seed

    def check(self, content: bytes) -> None:
        """Start training, kill -9 it soon after its first save: the checkpoint is whole."""
        out = Path("best.pth")
        before = out.stat().st_mtime_ns if out.exists() else 0
        pid, patience = forked(save_every_epoch), time.monotonic() + HANG
        while not out.exists() or out.stat().st_mtime_ns == before:
            assert time.monotonic() < patience, "the run saves nothing"
            time.sleep(0.01)
        time.sleep(random.Random(int(content)).uniform(0, 0.3))
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        assert train.load_checkpoint(out)[1]["classes"] == list(conftest.COLOURS)


KINDS = {"images": Images, "lists": Lists, "checkpoints": Checkpoints, "kills": Kills}


def forked(work: Callable[[], None], quiet: bool = True) -> int:
    """The process that does some work in a copy of this one: torch need not be imported again."""
    if pid := os.fork():
        return pid
    with contextlib.suppress(BaseException):
        torch.set_num_threads(1)  # a thread pool does not survive a fork
        for stream in (1, 2) if quiet else ():
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream)
        work()
    os._exit(0)


def peak() -> int:
    """The most memory that this process ever held, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def save_every_epoch() -> None:
    """Training that saves a whole ResNet-18 in each of endless epochs."""
    scores = itertools.count()
    train.evaluate = lambda *_, **__: (0.5, float(next(scores)))
    train.embed = lambda module, views, *_, **__: views.flatten(1)[:, :512].float()
    torch.nn.init.kaiming_normal_ = lambda tensor, **_: tensor
    os.fsync = lambda _: None  # it guards against a power cut; the page cache outlives the process
    train.main(["--weights", "none", "--workers", "0", "--epochs", "1000000"])


def try_inputs(kind: object, end: float, tally: multiprocessing.Array, inputs: float) -> None:
    """tally: the seed at work, inputs, findings, the slowest one's seconds and seed, peak memory above start-up."""
    started = peak()
    while time.monotonic() < end and tally[1] < inputs:
        signal.alarm(2 * HANG)  # which ends this process
        began, seed, tally[1] = time.perf_counter(), int(tally[0]), tally[1] + 1
        try:
            kind.check(kind.input(seed))
            assert peak() - started < MEMORY or tally[5] >= MEMORY, "over 1 GB of memory"
        except Exception:
            tally[2] += 1
            print(f"seed {seed}:\n{traceback.format_exc()}", flush=True)
        tally[3], tally[4] = max((tally[3], tally[4]), (time.perf_counter() - began, seed))
        tally[0], tally[5] = seed + 1, max(tally[5], peak() - started)


def fuzz(name: str, minutes: float, first: int, inputs: float) -> int:
    """Findings of one kind. The inputs run in a child, so that not even its death ends the search."""
    end, tally = time.monotonic() + 60 * minutes, multiprocessing.Array("d", [first, 0, 0, 0, 0, 0], lock=False)
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        kind = KINDS[name]()
        while time.monotonic() < end and tally[1] < inputs:
            _, status = os.waitpid(forked(lambda: try_inputs(kind, end, tally, inputs), quiet=False), 0)
            if os.WIFSIGNALED(status):
                print(f"seed {tally[0]:.0f}: died of {signal.Signals(os.WTERMSIG(status)).name}", flush=True)
                tally[0], tally[2] = tally[0] + 1, tally[2] + 1
    found = f"{tally[1]:,.0f} inputs, {tally[2]:.0f} findings, slowest {tally[3]:.2f} s (seed {tally[4]:.0f})"
    print(f"{name}: {found}, peak memory {tally[5] / 2**20:.0f} MB above start-up", flush=True)
    return int(tally[2])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Fuzz what reads untrusted bytes, and kill training runs.")
    parser.add_argument("--minutes", type=float, default=1, metavar="N", help="for each kind (default 1)")
    parser.add_argument("--only", choices=KINDS, help="one kind (default: all); kills are 200 at most")
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="of the first input (default 0)")
    parser.add_argument("--inputs", type=float, default=float("inf"), metavar="N", help="at most so many of each kind")
    args = parser.parse_args()
    limits = {name: min(args.inputs, 200) if name == "kills" else args.inputs for name in KINDS}
    sys.exit(any([fuzz(name, args.minutes, args.seed, limits[name]) for name in KINDS if args.only in (None, name)]))
