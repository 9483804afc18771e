"""What comes after the pass, of a million images: neighbours, groups, an audit, an epoch, lists, answers, ranks.

    python tests/benchmark.py million [--count 1000000] [--only neighbours audit ...]

Features are made up, in chunks on disk as the cache has them: 512 numbers in 3 views (6 GB), of 1,000 classes and
20,000 scenes, with a copy of 20 images among the rest. Each row is a process of its own; memory is what it holds
beyond the features, which are mapped (Linux's RssAnon, at its largest), and beyond what torch took before.
"""

import argparse
import contextlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from benchmark import (
    EPOCHS,
    both_lists,
    describe_machine,
    make_million,
    ready_backbone,
    repeat_sample,
    run,
    run_json,
    train_command,
)
from torch import Tensor, nn

import train
from transfer.audit.audit import audit_splits
from transfer.audit.copies import candidates
from transfer.cache import FeatureCache, image_keys
from transfer.crossval import group_split
from transfer.device import pick_compute
from transfer.extraction import extract_features
from transfer.features import Features, Split, Splits, moments
from transfer.inputs.lists import ImageList, read_list
from transfer.neighbours import nearest, squared_distances
from transfer.pages.report import save_report
from transfer.rows import Answer, print_rows, row_printer
from transfer.training import FeatureLoader, Hyperparameters

WIDTH, VIEWS, CLASSES, SCENES, COPIES, STEP = 512, 3, 1000, 20_000, 20, 1024
ASKED = 2000  # queries that recall is measured on
HPARAMS = Hyperparameters(EPOCHS, 0.005, 64, 0, 0, 1e-4, "layer4", False, VIEWS, 0, 224, None)


# Made-up features


def make_chunks(folder: Path, count: int) -> None:
    """So many images in the cache's files: a class's centre, a scene's, and what is the image's own and its view's."""
    generator = torch.Generator().manual_seed(0)
    classes, scenes = (torch.randn(number, WIDTH, generator=generator) for number in (CLASSES, SCENES))
    cache = FeatureCache(folder, bytes(16), (VIEWS, WIDTH))
    for start in range(0, count, STEP):
        rows = torch.arange(start, min(start + STEP, count))
        own = (classes[rows % CLASSES] + scenes[rows * 7919 % SCENES])[:, None]
        features = own + 0.7 * torch.randn(len(rows), 1, WIDTH, generator=generator)
        features = features + 0.3 * torch.randn(len(rows), VIEWS, WIDTH, generator=generator)
        if start == 0:
            firsts = features[:COPIES].clone()
        if start + STEP >= count:  # the last images are the first ones again, a little changed
            features[-COPIES:] = firsts + 0.05 * torch.randn(firsts.shape, generator=generator)
        cache.save(torch.stack([rows + 1, rows + 1], 1), features, {})


def load_chunks(folder: Path, count: int, classes: int = CLASSES, cold: bool = False) -> Features:
    """Features that are mapped from the files; the labels of so many classes. cold: from a disk that the system has
    read nothing of.
    """
    rows, cache = torch.arange(count), FeatureCache(folder, bytes(16), (VIEWS, WIDTH))
    paths, found, places = cache.find(torch.stack([rows + 1, rows + 1], 1))
    chunks = [chunk for chunk, _ in found]
    if cold:
        del found, chunks  # the system forgets no page that a process has mapped
        for path in paths:
            with open(path, "rb") as file:
                os.fsync(file.fileno())
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        chunks = [cache.load(path, check=False)["features"] for path in paths]
    labels = rows % CLASSES % classes
    labels[-COPIES:] = labels[:COPIES]
    return Features(chunks, STEP, labels, places=places[:, 0] * STEP + places[:, 1])


@dataclass(frozen=True)
class MadeUpPhotos(train.ImageDataset):
    """Photos of coarse random patches, so that those of two numbers differ; the last are copies of the first."""

    def __getitem__(self, index: int) -> tuple[int, Tensor]:
        copied = index - (len(self) - COPIES)
        generator = torch.Generator().manual_seed(copied if copied >= 0 else index)
        patches = torch.randint(256, (1, 3, 8, 8), dtype=torch.uint8, generator=generator)
        photo = nn.functional.interpolate(patches.float(), self.size, mode="bilinear").to(torch.uint8)
        return index, photo.permute(0, 2, 3, 1).contiguous()


def made_up_split(features: Features, name: str) -> Split:
    count = len(features)
    paths = [b"photos/%07d.jpg" % number for number in range(count)]
    image_list = ImageList(name, paths, features.labels.tolist(), range(1, count + 1))
    return Split(MadeUpPhotos(image_list, [0], 0, 64), features)


# Measuring


def held() -> float:
    """GB that this process holds, without the files that it has mapped."""
    return int(re.search(r"^RssAnon:\s*(\d+)", Path("/proc/self/status").read_text(), re.M)[1]) / 2**20


@contextlib.contextmanager
def measured(result: dict, name: str) -> Iterator[None]:
    """Adds the seconds that a block takes, and the GB that it holds at its largest, to the result."""
    before, peak, over = held(), [held()], threading.Event()

    def watch() -> None:
        while not over.wait(0.2):
            peak.append(held())

    thread, began = threading.Thread(target=watch), time.perf_counter()
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
        result[name] = time.perf_counter() - began
        result[f"{name} GB"] = max(peak) - before


def recall(queries: Tensor, keys: Tensor | Features, rows: Tensor, found: Tensor) -> float:
    """The share of the exact 8 nearest of some rows that are among those found for them, (n, 8)."""
    distances = torch.cat([squared_distances(queries, keys[some]) for some in torch.arange(len(keys)).split(8192)], 1)
    distances[torch.arange(len(rows)), rows] = torch.inf
    exact = distances.topk(found.shape[1], largest=False).indices
    return float((found[:, :, None] == exact[:, None]).any(1).double().mean())


def measure_neighbours(folder: Path, count: int) -> dict:
    """The 8 nearest of all images, in two views; recall of the exact ones; of 20 copies those that are candidates."""
    features, result = load_chunks(folder, count).subset(torch.arange(count), num_views=2), {}
    with measured(result, "neighbours"):
        _, near = nearest(features, features, True)
    drawn = torch.randperm(count, generator=torch.Generator().manual_seed(1))[:ASKED]
    result["recall"] = recall(features[drawn, 0], features, drawn, near[drawn])
    with measured(result, "candidates"):
        pairs = candidates(features, features, near, itself=True, scale=moments(features))
    wanted = {(count - COPIES + number, number) for number in range(COPIES)}
    result["copies"] = len(wanted & set(map(tuple, pairs.tolist())))
    return result


def measure_real_neighbours(folder: Path, count: int) -> dict:
    """Recall on the bundled backbone's features of the sample, repeated with noise of half their deviation."""
    table = torch.cat([part.gather(part.rows, slice(1)) for part in both_lists(range(1)).values()])
    generator = torch.Generator().manual_seed(0)
    rows = torch.arange(count) % len(table)
    noise = 0.5 * (table[:, 0] - table[:, 0].mean(0)).std(0)
    many = table[rows] + noise * torch.randn(count, 1, table.shape[2], generator=generator)
    drawn = torch.randperm(count, generator=generator)[:ASKED]
    result = {}
    with measured(result, "neighbours"):
        _, near = nearest(many, many, True)
    return result | {"recall": recall(many[drawn, 0], many, drawn, near[drawn])}


def measure_groups(folder: Path, count: int) -> dict:
    """A fifth of a million photos in two classes held out."""
    result = {}
    split = made_up_split(load_chunks(folder, count, classes=2), "photos")
    with measured(result, "groups"):
        _, test = group_split(split, 0.2, 0, "none to spare")
    return result | {"held out": len(test.features.rows)}


def measure_audit(folder: Path, count: int) -> dict:
    """An audit of 1,000 classes, a tenth of the images as test list."""
    whole, result = load_chunks(folder, count), {}
    first, last = (
        COPIES,
        COPIES + count // 10,
    )  # the test images, so that the training list begins and ends as the whole
    train_split = made_up_split(whole.subset(torch.cat([torch.arange(first), torch.arange(last, count)])), "train.txt")
    test_split = made_up_split(whole.subset(torch.arange(first, last)), "test.txt")
    splits = Splits(train_split, train_split, test_split, test_split)
    generator = torch.Generator().manual_seed(2)
    logits = torch.randn(last - first, CLASSES, generator=generator)
    logits[torch.arange(last - first), test_split.features.labels] += 12
    with measured(result, "audit"):
        found = audit_splits(splits, logits, HPARAMS, pick_compute("cpu", "auto", None))
    result["trained on"], result["findings"] = found.trained_on, len(found.findings)
    result["copies"] = len(found.of_kind("duplicate"))
    return result


def measure_epoch(folder: Path, count: int) -> dict:
    """An epoch of the recipe on mapped features, none in memory at first, then as a cache leaves them; and in memory."""
    result = {}
    head, criterion = nn.Linear(WIDTH, CLASSES), nn.CrossEntropyLoss(reduction="sum")
    optimizer = torch.optim.Adam(head.parameters(), lr=HPARAMS.lr)

    def epoch(features: Features, name: str) -> None:
        loader = FeatureLoader(features, HPARAMS.batch_size, shuffle_seed=0)
        with measured(result, name):
            train.train_one_epoch(head, criterion, optimizer, loader, epoch=1)

    for name, cold in (("mapped, cold", True), ("mapped", False)):
        mapped = load_chunks(folder, count, cold=cold)
        epoch(mapped, name)
    table = torch.empty(count, VIEWS, WIDTH)
    for rows in torch.arange(count).split(8192):
        table[rows] = mapped[rows]
    epoch(Features([table], count, mapped.labels), "in memory")
    return result


def measure_answers(folder: Path, count: int) -> dict:
    """predict.py's rows, as CSV, and its report, from probabilities that are made up."""
    generator, result = torch.Generator().manual_seed(3), {}
    labels, classes = torch.arange(count) % CLASSES, [f"class {number}" for number in range(CLASSES)]

    def answers() -> Iterator[Answer]:
        for rows in torch.arange(count).split(STEP):
            logits = torch.randn(len(rows), CLASSES, generator=generator)
            logits[torch.arange(len(rows)), labels[rows]] += 4
            for row, probs in zip(rows.tolist(), logits.softmax(1)):
                yield Answer(b"photos/%07d.jpg" % row, probs, int(labels[row]))

    with measured(result, "made up alone"):
        for _ in answers():
            pass
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere), measured(result, "rows"):
        print_row = row_printer("csv", classes, 3, 0)
        scores, shown, _ = print_rows(answers(), CLASSES, print_row, keep=True, progress=None)
    with tempfile.TemporaryDirectory() as pages, measured(result, "report"):
        page = Path(pages) / "report.html"
        save_report(page, {"classes": classes}, scores, shown, model=Path("best.pth"), lists=["test.txt"])
    return result


def measure_list(folder: Path, count: int) -> dict:
    """A list of a million paths, read and checked, and the keys by which a cache knows its images."""
    result = {}
    with tempfile.TemporaryDirectory() as files:
        path = make_million(Path(files))
        with measured(result, "list"):
            image_list, problems = read_list(path, Path(files))
        assert len(image_list) == 1_000_000 and not problems
        with measured(result, "keys"):
            image_keys(image_list, range(len(image_list)))
    return result


def measure_pass(folder: Path, count: int) -> dict:
    """Views a second of a pass over 2,000 of the sample's photos."""
    compute, backbone = ready_backbone()
    with tempfile.TemporaryDirectory() as files:
        image_list, _ = read_list(repeat_sample(Path(files), "train", 2000), Path(files))
        began = time.perf_counter()
        extract_features(backbone, train.ImageDataset(image_list, range(4), 0), compute=compute)
    return {"photos per second": 2000 / (time.perf_counter() - began)}


# Ranks that are killed


def processes_of(out: Path) -> list[tuple[int, bool]]:
    """The processes that were started to write a checkpoint, and whether each is a rank."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it ended
            line = (folder / "cmdline").read_bytes()
            if os.fsencode(out) in line:
                found.append((int(folder.name), b"torch.distributed.run" not in line))
    return found


def kill_and_repeat(command: list, out: Path, seconds: float, whole: bool) -> None:
    """A run of 4 ranks whose machine dies after so many seconds, and is started again; or one rank of it, which
    torchrun starts again.
    """
    started = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    time.sleep(seconds)
    found = processes_of(out)
    ranks = [pid for pid, is_rank in found if is_rank]
    for pid in [pid for pid, _ in found] if whole else ranks[:1]:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    started.wait()
    if started.returncode:
        run(*command)


def measure_ranks(folder: Path, count: int) -> dict:
    """Twenty runs of 4 ranks with a cache, each killed at a random moment: is every best.pth that of a run in peace?"""
    rng, same = random.Random(0), 0
    with tempfile.TemporaryDirectory() as work:
        out = Path(work) / "best.pth"
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", 4, "--max-restarts", 1]
        command = [*torchrun, *train_command(out, "--cache", Path(work) / "kept", "--views", 1)[1:]]
        command = [str(part) for part in command]
        seconds = run(*command)[0]
        expected = torch.load(out, weights_only=True)
        for number in range(20):
            for path in Path(work).glob("*"):
                shutil.rmtree(path) if path.is_dir() else path.unlink()
            kill_and_repeat(command, out, rng.uniform(0, seconds), whole=bool(number % 2))
            found = torch.load(out, weights_only=True)
            same += found.keys() == expected.keys() and all(torch.equal(found[key], expected[key]) for key in found)
    return {"seconds in peace": seconds, "same": same}


PARTS = {
    "neighbours": measure_neighbours,
    "real": measure_real_neighbours,
    "groups": measure_groups,
    "audit": measure_audit,
    "epoch": measure_epoch,
    "list": measure_list,
    "answers": measure_answers,
    "pass": measure_pass,
    "ranks": measure_ranks,
}


def measure(name: str, folder: str, count: str) -> None:
    """One part, in this process."""
    print(json.dumps(PARTS[name](Path(folder), int(count))))


def main(*arguments: str) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=1_000_000, help="images")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=[*PARTS], help="these rows alone")
    args = parser.parse_args(arguments)
    print(f"{describe_machine()}\n{args.count:,} images\n\n| what | measured |\n|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        if set(args.only) - {"real", "list", "answers", "pass", "ranks"}:
            make_chunks(Path(folder), args.count)
        for name in args.only:
            found = run_json("million-row", name, folder, args.count // 10 if name == "real" else args.count)
            cells = [
                f"{key} {value:,}" if isinstance(value, int) else f"{key} {value:,.2f}" for key, value in found.items()
            ]
            print(f"| {PARTS[name].__doc__.splitlines()[0]} | {', '.join(cells)} |", flush=True)
