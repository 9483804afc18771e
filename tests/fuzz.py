"""Mutated images, lists and checkpoints, and training runs killed at random moments, for as long as asked:

    python tests/fuzz.py --minutes 10 --only images

Every input comes from a seed; `--seed S` begins with that of a finding. Exit status 1 on any finding: an exception
that is not the program's own, a crash or hang, over 1 GB of memory, weights that are not the saved ones.
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
import sys
import tempfile
import time
import traceback
import zipfile
import zlib
from collections import OrderedDict
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from PIL import Image

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parent.parent)]
import conftest  # noqa: E402

import train  # noqa: E402
import transfer.backbone  # noqa: E402
from transfer.checkpoint import (  # noqa: E402
    METADATA_KEY,
    is_valid_metadata,
    load_checkpoint,
    load_state,
    validate_state_dict,
)
from transfer.data import load_data  # noqa: E402
from transfer.inputs.images import ImageError, read_image  # noqa: E402
from transfer.inputs.lists import read_list  # noqa: E402
from transfer.metrics import Metrics  # noqa: E402
from transfer.system.console import UserError  # noqa: E402

HANG, MEMORY = 30, 1 << 30  # seconds an input, and bytes above start-up
NUMBERS = (0, 1, 0x7F7F7F7F, 0x80, 2**15, 2**31, 2**32 - 1)
EDGES = [(n % 256**size).to_bytes(size, order) for n in NUMBERS for size in (1, 2, 4) for order in ("little", "big")]
LIST_TOKENS = (
    '\n|\r\n| |\t|#|"|,|\\|\0|\ufeff|\x1b[2J|b.png|../|./| ٣| 1.0| -1| 1_0| 99999999999999999999'.encode().split(b"|")
)
LIST_TOKENS += [b"\xff\xfe", b"\xa0"]
PICKLE_TOKENS = [*(b"%c" % c for c in b"}])(.02NRbsuQ"), b"K\xff", b"J\xff\xff\xff\x7f", b"q\x01", b"h\x01", b"\x86"]
JSON_TOKENS = [*(b"%c" % c for c in b'{}[]",:-.0129eE'), b'"BF16"', b"null", b"NaN", b"[" * 3000, b"9" * 30, b"\\ud800"]


def image_files() -> list[bytes]:
    """Small files of every allowed format, over its modes, compressions and frames."""
    files, noise, exif = [], Image.effect_noise((24, 20), 60), Image.Exif()
    exif[0x0112], exif[0x010E] = 6, "words"
    colour = Image.merge("RGBA", [noise, noise.rotate(90), noise.rotate(180), noise])

    def save(format: str, modes: str, **options) -> None:
        for mode in modes.split():
            image = noise if mode == "I;16" else colour.convert("RGB") if mode == "P" else colour
            files.append(io.BytesIO())
            image.convert(mode).save(files[-1], format, exif=exif, **options)

    save("JPEG", "RGB L CMYK")
    save("JPEG", "RGB", progressive=True)
    save("PNG", "1 L LA P RGB RGBA I;16")
    save("PNG", "P", transparency=bytes(range(256)))
    save("WEBP", "RGB RGBA")
    save("WEBP", "RGBA", lossless=True)
    save("GIF", "P", transparency=3)
    save("AVIF", "L RGB RGBA")
    save("BMP", "1 L P RGB RGBA")
    save("TIFF", "1 L LA P RGB RGBA CMYK I F")
    save("PPM", "1 L RGB I;16")
    files.append(io.BytesIO(b"P2 2 2 4095 0 17 4000 4095\n"))
    files.append(io.BytesIO(b"P5 3 2 999\n" + bytes(range(12))))
    save("TIFF", "1", compression="group4")
    for compression in ("tiff_lzw", "tiff_deflate", "packbits", "jpeg"):
        save("TIFF", "RGB", compression=compression)
    for format in ("MPO", "PNG", "WEBP", "GIF", "TIFF", "AVIF"):
        save(format, "RGB", save_all=True, append_images=[colour.convert("RGB").rotate(turn) for turn in (90, 180)])
    return [file.getvalue() for file in files]


def mutate(content: bytes, rng: random.Random, tokens: Sequence[bytes] = EDGES) -> bytes:
    """One to four of: a bit flipped, bytes set, cut, doubled or put in, the end lost; PNG checksums often mended."""
    content = bytearray(content)
    for _ in range(rng.randint(1, 4)):
        at = rng.randrange(len(content) + 1)
        piece = content[at : at + rng.choice((1, 2, 4, 30))]
        flipped = bytes([piece[0] ^ 1 << rng.randrange(8)]) + piece[1:] if piece else b""
        edge, token = rng.choice(EDGES), rng.choice(tokens)
        new = rng.choice((flipped, flipped, rng.randbytes(len(piece)), edge, b"", piece * 2, token + piece))
        content[at : at + (len(edge) if new is edge else len(piece))] = new
        if rng.random() < 0.04:
            del content[at:]
    content = bytes(content)
    return with_right_checksums(content) if content[1:4] == b"PNG" and rng.random() < 0.7 else content


def with_right_checksums(png: bytes) -> bytes:
    """A PNG whose chunks have the checksums they need, so that what is inside them gets read."""
    chunks, at = [png[:8]], 8
    while at + 12 <= len(png):
        end = at + 8 + int.from_bytes(png[at : at + 4], "big")
        chunks.append(png[at:end] + zlib.crc32(png[at + 4 : end]).to_bytes(4, "big"))
        at = end + 4
    return b"".join(chunks)


# A kind of input: files to mutate, bytes to put into them, and a check that raises on a finding, in the current folder.


def images() -> tuple:
    def check(content: bytes) -> None:
        Path("photo").write_bytes(content)
        with contextlib.suppress(ImageError):
            photo = read_image("photo")
            assert photo.mode == "RGB" and len(photo.tobytes()) == 3 * photo.width * photo.height

    return image_files(), EDGES, check


def lists() -> tuple:
    lines = "a.png 0\nb.png 1\nc d.png 1\n\u00fc.png 0\n# a comment\n\n./e.png  0\n".encode()
    Path("plain.txt").write_bytes(lines)
    for name in ("a.png", "b.png", "c d.png", "\u00fc.png", "e.png"):
        Path(name).touch()

    def check(content: bytes) -> None:
        Path("list.txt").write_bytes(content)
        with contextlib.suppress(UserError), contextlib.redirect_stderr(io.StringIO()):
            photos = load_data(
                Path("list.txt"), Path("plain.txt"), Path(), None, val_split=None, out=Path("o.pth")
            ).train
            written = content.removeprefix(b"\xef\xbb\xbf").split(b"\n")
            for path, label, line in zip(photos.paths(), photos.labels.tolist(), photos.lines.tolist(), strict=True):
                listed, number = written[line - 1].rsplit(None, 1)
                assert (path, label) == (listed.strip().removeprefix(b"./"), int(number)) and os.path.isfile(path)

    return [lines], LIST_TOKENS, check


def labels() -> tuple:
    """Lists and tables whose labels are numbers or names, or that have none."""
    files = [b"a.png apple\nb c.png pear\n./d.png apple\n", b"a.png\nb c.png\n# a comment\n./d.png\n"]
    files += [b'path,label\na.png,apple\n"b, c.png",red pear\n', b"id;filename;class\r\n1;a.png;0\r\n2;b.png;7\r\n"]

    def check(content: bytes) -> None:
        for name, check_files in itertools.product(("list.txt", "list.csv"), (True, False)):
            Path(name).write_bytes(content)
            with contextlib.suppress(UserError), contextlib.redirect_stderr(io.StringIO()):
                found, problems = read_list(Path(name), Path(), check_files)
                assert all("\n" not in problem for problem in problems) and (len(found) or problems)
                assert (
                    problems
                    or not found.classes
                    or len(set(found.classes)) == len(found.classes) == int(found.labels.max()) + 1
                )
                for image in found.each_path():
                    assert image in content or b'"' in content or not image.isascii()

    return files, LIST_TOKENS, check


def checkpoints() -> tuple:
    torch.manual_seed(0)
    state = OrderedDict({f"layer.{n}": torch.randn(n + 1, 3) for n in range(4)} | {"count": torch.tensor(7)})
    state._metadata = OrderedDict({METADATA_KEY: {"format": 1, "classes": ["a", "b"], "accuracy": 0.5}})
    torch.save(state, "weights.pth")
    sound, (saved, saved_metadata) = Path("weights.pth").read_bytes(), load_state(Path("weights.pth"))
    with zipfile.ZipFile("weights.pth") as archive:
        members = {name: archive.read(name) for name in archive.namelist()}

    def check(content: bytes) -> None:
        """A damaged file is an error or holds the saved weights; one forged around a pickle is an error or loads."""
        Path("weights.pth").write_bytes(content)
        if forged := not content.startswith(b"PK"):
            with zipfile.ZipFile("weights.pth", "w") as archive:
                for name, member in members.items():
                    archive.writestr(name, content if name.endswith("data.pkl") else member)
        with contextlib.suppress(UserError):
            state, metadata = load_state(Path("weights.pth"))
            same = state.keys() == saved.keys() and all(torch.equal(state[key], saved[key]) for key in state)
            assert forged or (same and metadata == saved_metadata), "altered weights were accepted"
            is_valid_metadata(metadata, 2)
            validate_state_dict(state, Path("weights.pth"))

    return [sound, sound, sound, members["weights/data.pkl"]], PICKLE_TOKENS, check


def safetensors() -> tuple:
    header = '{"conv1.weight":{"dtype":"F32","shape":[2,3],"data_offsets":[0,24]},"n":{"dtype":"I64","shape":[],'
    header = f'{header}"data_offsets":[24,32]}}}}'.encode()

    def check(content: bytes) -> None:
        Path("weights.pth").write_bytes(content)
        with contextlib.suppress(UserError):
            validate_state_dict(load_state(Path("weights.pth"))[0], Path("weights.pth"))

    return [len(header).to_bytes(8, "little") + header + bytes(range(32))], JSON_TOKENS, check


def kills() -> tuple:
    conftest.make_photos(Path(), per_class=1)

    def check(content: bytes) -> None:
        """Start training, kill -9 it soon after its first save: the checkpoint is whole."""
        Path("best.pth").unlink(missing_ok=True)
        pid, patience = forked(save_every_epoch), time.monotonic() + HANG
        while not Path("best.pth").exists():
            assert time.monotonic() < patience, "the run saves nothing"
            time.sleep(0.01)
        time.sleep(random.Random(content).uniform(0, 0.3))
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        assert load_checkpoint(Path("best.pth"))[1]["classes"] == list(conftest.COLOURS)

    return [b"any"], EDGES, check


def signals() -> tuple:
    conftest.make_photos(Path(), per_class=40)

    def check(content: bytes) -> None:
        """Start training, send SIGTERM or SIGINT at a random moment after the header's first line: one line, within 10
        seconds, with both cores busy. Half of the moments are in the second in which the workers start.
        """
        chance = random.Random(content)
        number = chance.choice([signal.SIGTERM, signal.SIGINT])
        with open("out", "wb") as out, open("err", "wb") as err:
            pid = os.fork() or train_for_ever(out.fileno(), err.fileno())
        busy = [forked(spin) for _ in range(os.cpu_count())]
        patience = time.monotonic() + HANG
        while not os.path.getsize("out"):
            assert time.monotonic() < patience, "the run prints nothing"
            time.sleep(0.002)
        time.sleep(chance.uniform(0, chance.choice([0.5, 6])))
        os.kill(pid, number)
        patience, ended = time.monotonic() + 10, 0
        while not ended and time.monotonic() < patience:
            ended, status = os.waitpid(pid, os.WNOHANG)
            time.sleep(0.01)
        for each in [*busy, *([] if ended else [pid])]:
            os.kill(each, signal.SIGKILL)
            os.waitpid(each, 0)
        assert ended, f"{number.name} was lost"
        lines = Path("err").read_text().splitlines()
        assert os.waitstatus_to_exitcode(status) == 128 + number, lines
        by = "SIGTERM" if number == signal.SIGTERM else "Ctrl-C"
        assert lines[0] in [f"stopped by {by}; {saved}" for saved in ("what was saved is whole", "nothing was saved")]
        assert len(lines) == 1, lines

    return [b"any"], EDGES, check


def spin() -> None:
    end = time.monotonic() + 2 * HANG
    while time.monotonic() < end:
        pass


def train_for_ever(out: int, err: int) -> None:
    """In a forked process: endless epochs with two workers; exits as a script does."""
    try:
        torch.set_num_threads(1)  # a thread pool does not survive a fork
        signal.alarm(0)
        signal.signal(signal.SIGINT, signal.default_int_handler)  # in the background a shell has it ignored
        os.dup2(out, 1)
        os.dup2(err, 2)
        train.main(["--weights", "none", "--workers", "2", "--epochs", "1000000", "--precision", "float32"])
    except SystemExit as stop:
        os._exit(stop.code)
    except BaseException:
        traceback.print_exc()
    os._exit(1)


KINDS = {
    "images": images,
    "lists": lists,
    "labels": labels,
    "checkpoints": checkpoints,
    "safetensors": safetensors,
    "kills": kills,
    "signals": signals,
}


def try_seed(kind: tuple, seed: int) -> None:
    files, tokens, check = kind
    check(mutate(files[seed % len(files)], random.Random(seed), tokens))


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
    train.evaluate = lambda *_: Metrics(0.5, float(next(scores)), 0.0)
    transfer.backbone.embed = lambda module, views, compute: views.flatten(1)[:, :512].float()
    torch.nn.init.kaiming_normal_ = lambda tensor, **_: tensor
    os.fsync = lambda _: None  # it guards against a power cut; the page cache outlives the process
    train.main(["--weights", "none", "--workers", "0", "--epochs", "1000000"])


def try_seeds(kind: tuple, seeds: range, end: float, tally: Sequence[float]) -> None:
    """tally: the seed at work, findings, the slowest input's seconds and seed, peak memory above start-up."""
    started = peak()
    for tally[0] in seeds:
        signal.alarm(2 * HANG)  # which ends this process
        began = time.perf_counter()
        try:
            try_seed(kind, int(tally[0]))
            assert peak() - started < MEMORY or tally[4] >= MEMORY, "over 1 GB of memory"
        except Exception:
            tally[1] += 1
            print(f"seed {tally[0]:.0f}:\n{traceback.format_exc()}", flush=True)
        tally[2], tally[3] = max((tally[2], tally[3]), (time.perf_counter() - began, tally[0]))
        tally[4] = max(tally[4], peak() - started)
        if time.monotonic() > end:
            break


def fuzz(name: str, minutes: float, first: int, most: int) -> int:
    """Findings of one kind. The inputs run in a child, so that not even its death ends the search."""
    end, tally = time.monotonic() + 60 * minutes, multiprocessing.Array("d", [first - 1, 0, 0, 0, 0], lock=False)
    last = first + most
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        kind = KINDS[name]()
        while time.monotonic() < end and tally[0] < last - 1:
            seeds = range(int(tally[0]) + 1, last)
            _, status = os.waitpid(forked(lambda seeds=seeds: try_seeds(kind, seeds, end, tally), quiet=False), 0)
            if os.WIFSIGNALED(status):
                tally[1] += 1
                print(f"seed {tally[0]:.0f}: died of {signal.Signals(os.WTERMSIG(status)).name}", flush=True)
    slowest = f"slowest {tally[2]:.2f} s (seed {tally[3]:.0f}), peak memory {tally[4] / 2**20:.0f} MB above start-up"
    print(f"{name}: {tally[0] - first + 1:,.0f} inputs, {tally[1]:.0f} findings, {slowest}", flush=True)
    return int(tally[1])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Fuzz what reads untrusted bytes, and kill training runs.")
    parser.add_argument("--minutes", type=float, default=1, metavar="N", help="for each kind (default 1)")
    parser.add_argument("--only", choices=KINDS, help="one kind (default: all)")
    parser.add_argument("--inputs", type=int, default=10**9, metavar="N", help="of each kind, at most")
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="of the first input (default 0)")
    args = parser.parse_args()
    sys.exit(any([fuzz(name, args.minutes, args.seed, args.inputs) for name in KINDS if args.only in (None, name)]))
