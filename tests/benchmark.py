"""Measure train.py and predict.py against the tutorial's plain loop and against the backbone's own speed.

    python tests/benchmark.py                        # all rows but the next two: about a quarter of an hour on 2 cores
    python tests/benchmark.py --only accuracy gain   # 3 seeds of 20 plain epochs each: about half an hour
    python tests/benchmark.py views                  # what the head should train on: a table of its own
    python tests/benchmark.py labels                 # how well an audit finds wrong labels: another
    python tests/benchmark.py architectures          # all of torchvision's: see benchmark_architectures.py
    python tests/benchmark.py speeds                 # the pass of seven of them
    python tests/benchmark.py real --data FOLDER     # on a real ImageNet backbone: see benchmark_real.py
    python tests/benchmark.py corrections            # what the audit's and --label-next's buttons are worth
    python tests/benchmark.py label-next --data FOLDER    # which photos to label: see benchmark_labelling.py

What is compared alternates within one run; medians are quoted. The plain loop runs --plain-epochs epochs and is
scaled to 20, since its epochs cost the same.
"""

import argparse
import contextlib
import csv
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from unittest import mock

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
WEIGHTS = ROOT / "food" / "resnet18-grocery.pth"
EPOCHS = 20
SELF = [sys.executable, str(Path(__file__).resolve())]


def plain_loop(train_list: str, test_list: str, epochs: str, seed: str, unfreeze: str = "fc") -> None:
    """The tutorial's loop: decode and augment every image anew in every epoch, BatchNorm in training mode."""
    import numpy as np
    import torch
    from PIL import Image
    from torch import nn
    from torch.utils.data import DataLoader, Dataset
    from torchvision import models
    from torchvision import transforms as T

    torch.manual_seed(int(seed))
    net = models.resnet18()
    net.load_state_dict(torch.load(WEIGHTS, weights_only=True), strict=False)
    for parameter in net.parameters():
        parameter.requires_grad = False
    net.fc = nn.Linear(net.fc.in_features, 20)
    net.get_submodule(unfreeze).requires_grad_(True)
    norm = T.Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
    random_steps = [T.Resize([300, 300]), T.RandomRotation(45), T.CenterCrop(224), T.RandomHorizontalFlip(0.5)]
    random_steps += [T.RandomVerticalFlip(0.5), T.ColorJitter(0.4, 0.4, 0.4, 0.1)]
    training_view = T.Compose([*random_steps, T.ToTensor(), norm])
    test_view = T.Compose([T.Resize([224, 224]), T.ToTensor(), norm])

    class Listed(Dataset):
        def __init__(self, path, view):
            self.rows, self.view = [line.split() for line in open(path)], view

        def __len__(self):
            return len(self.rows)

        def __getitem__(self, index):
            path, label = self.rows[index]
            return self.view(Image.open(path).convert("RGB")), torch.from_numpy(np.array(label, dtype=np.int64))

    train_loader = DataLoader(Listed(train_list, training_view), batch_size=64, shuffle=True)
    test_loader = DataLoader(Listed(test_list, test_view), batch_size=64, shuffle=True)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    net = net.to(device)
    adam = torch.optim.Adam([p for p in net.parameters() if p.requires_grad], lr=0.005)
    plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(adam, "max", patience=3, factor=0.5)
    history, seconds = [], []
    for _ in range(int(epochs)):
        began = time.perf_counter()
        net.train()
        for images, labels in train_loader:
            loss = nn.functional.cross_entropy(net(images.to(device)), labels.to(device))
            adam.zero_grad()
            loss.backward()
            adam.step()
        net.eval()
        right = 0
        with torch.no_grad():
            for images, labels in test_loader:
                right += (net(images.to(device)).argmax(1).cpu() == labels).sum().item()
        history.append(right / len(test_loader.dataset))
        if history[-1] == max(history):
            torch.save(net.state_dict(), os.devnull)
        plateau.step(history[-1])
        seconds.append(time.perf_counter() - began)
    print(json.dumps({"history": history, "epochs": seconds}))


def pass_rates(folder: str, count: str, arch: str = "resnet18", repeats: str = "3") -> None:
    """Views/s of the pass over a folder's images, and of the backbone on ready tensors: same dtype, batch, cores; and
    with one thread.
    """
    import torch

    import train
    from transfer.architectures import preprocessing
    from transfer.backbone import pass_batch
    from transfer.extraction import extract_features
    from transfer.inputs.lists import ImageList

    paths = sorted(os.fsencode(path) for path in Path(folder).rglob("*.jpg"))[: int(count)]
    image_list = ImageList("bench", paths, [0] * len(paths), range(len(paths)))
    compute, backbone = ready_backbone(arch)
    size = preprocessing(arch).size
    batch = pass_batch(compute.device, size)
    ready = torch.randn(batch, 3, size, size, device=compute.device)
    ready = ready.to(compute.dtype, memory_format=torch.channels_last)
    found, threads = {"ready": [], "one": [], "pass": [], "evaluation": []}, torch.get_num_threads()
    for _ in range(int(repeats)):
        for name, count in (("ready", threads), ("one", 1)):
            torch.set_num_threads(count)
            with torch.inference_mode():
                backbone(ready)[0, 0].item()
                rounds, began = 0, time.perf_counter()
                while time.perf_counter() - began < 4:
                    backbone(ready)[0, 0].item()
                    rounds += 1
            found[name].append(rounds * batch / (time.perf_counter() - began))
        torch.set_num_threads(threads)
        for name, views in (("pass", range(4)), ("evaluation", [0])):
            began = time.perf_counter()
            extract_features(backbone, train.ImageDataset(image_list, views, 0, size), compute=compute)
            found[name].append(len(paths) * len(views) / (time.perf_counter() - began))
    print(json.dumps({name: statistics.median(values) for name, values in found.items()}))


def ready_backbone(arch: str = "resnet18") -> tuple:
    """Where train.py would compute here, and a backbone ready for it: the bundled one, or random weights of another
    architecture.
    """
    import train
    from transfer.backbone import backbone_of, inference_copy
    from transfer.checkpoint import load_backbone
    from transfer.device import pick_compute

    compute = pick_compute("auto", "auto", None, arch=arch)
    model = train.build_model(arch, 20, load_backbone(WEIGHTS, arch) if arch == "resnet18" else None, 0)
    return compute, inference_copy(backbone_of(model), compute)


def parse_list(path: str) -> None:
    """Seconds to parse and check a list, and bytes kept a line."""
    from transfer.inputs.lists import read_list

    began = time.perf_counter()
    image_list, problems = read_list(Path(path), Path())
    seconds = time.perf_counter() - began
    kept = sum(each.nbytes for each in (image_list.text, image_list.ends, image_list.labels, image_list.lines))
    count = len(image_list)
    print(json.dumps({"seconds": seconds, "bytes": kept / count, "lines": count, "problems": len(problems)}))


def run(*command: object, cwd: Path = ROOT) -> tuple[float, str]:
    """Seconds of a whole process, and its stdout."""
    began = time.perf_counter()
    done = subprocess.run([str(part) for part in command], cwd=cwd, capture_output=True, text=True)
    seconds = time.perf_counter() - began
    if done.returncode:
        sys.exit(f"{command}\n{done.stderr}")
    return seconds, done.stdout


def run_json(*command: object, cwd: Path = ROOT) -> dict:
    return json.loads(run(*SELF, *command, cwd=cwd)[1].splitlines()[-1])


def train_command(out: Path, *more: object) -> list:
    return [sys.executable, ROOT / "train.py", "--epochs", EPOCHS, "--weights", WEIGHTS, "--out", out, *more]


def repeat_sample(folder: Path, name: str, count: int) -> Path:
    """A list of so many sample images, the sample's own repeated under distinct paths."""
    lines = (ROOT / f"{name}.txt").read_text().split("\n")[:-1]
    with open(folder / f"{name}_{count}.txt", "w") as file:
        for n in range(count):
            copy = folder / f"copy{n // len(lines)}"
            if not copy.exists():
                copy.symlink_to(ROOT / "food", target_is_directory=True)
            file.write(lines[n % len(lines)].replace("./food", copy.name) + "\n")
    return Path(file.name)


def compare_jobs(lists: tuple[Path, Path], folder: Path, repeats: int, plain_epochs: int) -> tuple[float, float]:
    """Median seconds of the plain loop, scaled to 20 epochs, and of train.py, in turn."""
    plain, ours = [], []
    for _ in range(repeats):
        ours.append(run(*train_command(folder / "o.pth", "--train", lists[0], "--test", lists[1]), cwd=folder)[0])
        seconds, out = run(*SELF, "plain", *lists, plain_epochs, 0, cwd=folder)
        epochs = json.loads(out.splitlines()[-1])["epochs"]
        plain.append(seconds - sum(epochs) + EPOCHS * statistics.mean(epochs))
    return statistics.median(plain), statistics.median(ours)


def row_main(folder: Path, args) -> tuple:
    (folder / "food").symlink_to(ROOT / "food", target_is_directory=True)
    plain, ours = compare_jobs((ROOT / "train.txt", ROOT / "test.txt"), folder, args.repeats, args.plain_epochs)
    return f"{plain:.0f} s / {ours:.1f} s", plain / ours, ">=", 20, "x"


def row_larger(folder: Path, args) -> tuple:
    lists = repeat_sample(folder, "train", 1500), repeat_sample(folder, "test", 1300)
    plain, ours = compare_jobs(lists, folder, 1, 1)
    return f"{plain:.0f} s / {ours:.1f} s", plain / ours, ">=", 25, "x"


def pass_ratio(arch: str, bound: float) -> tuple:
    found = run_json("pass", ROOT / "food", 475, arch)
    return f"{found['pass']:.1f} / {found['ready']:.1f} views/s", found["pass"] / found["ready"], ">=", bound, ""


def row_pass(folder: Path, args) -> tuple:
    return pass_ratio("resnet18", 0.80)


def row_pass50(folder: Path, args) -> tuple:
    return pass_ratio("resnet50", 0.85)


def row_phone(folder: Path, args) -> tuple:
    import numpy as np
    from PIL import Image

    (folder / "phone").mkdir()
    grain = np.random.default_rng(0)
    for number, path in enumerate(sorted((ROOT / "food").rglob("train_0[1-3].jpg"))[:60]):
        pixels = np.asarray(Image.open(path).resize((4000, 3000), Image.Resampling.BICUBIC), dtype=np.int16)
        noisy = pixels + grain.integers(-8, 9, pixels.shape, dtype=np.int16)
        Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(folder / f"phone/{number}.jpg", quality=88)
    small, large = run_json("pass", ROOT / "food", 60), run_json("pass", folder / "phone", 60)
    return f"{4 / large['pass']:.4f} / {4 / small['pass']:.4f} s", small["pass"] / large["pass"], "<=", 2.0, ""


def row_accuracy(folder: Path, args) -> tuple:
    (folder / "food").symlink_to(ROOT / "food", target_is_directory=True)
    ours, plain = [], []
    for seed in range(3):
        out = run(*train_command(folder / "o.pth", "--seed", seed))[1]
        ours.append(float(re.search(r"accuracy ([\d.]+)%", out)[1]))
        plain.append(
            100 * max(run_json("plain", ROOT / "train.txt", ROOT / "test.txt", EPOCHS, seed, cwd=folder)["history"])
        )
    each = [mean_and_spread(values) for values in (ours, plain)]
    return f"{each[0]} - {each[1]} %", statistics.mean(ours) - statistics.mean(plain), ">=", 0, "points"


def row_finetune(folder: Path, args) -> tuple:
    (folder / "food").symlink_to(ROOT / "food", target_is_directory=True)
    ours, plain = [], []
    for _ in range(args.repeats):
        short, long = (
            run(*train_command(folder / "o.pth", "--cache", folder / "c", "--finetune-epochs", n))[0] for n in (1, 4)
        )
        ours.append((long - short) / 3)
        found = run_json("plain", ROOT / "train.txt", ROOT / "test.txt", 1, 0, "layer4", cwd=folder)
        plain.append(found["epochs"][0])
    ours, plain = statistics.median(ours), statistics.median(plain)
    return f"{ours:.1f} / {plain:.1f} s", ours / plain, "<=", 0.12, ""


def row_gain(folder: Path, args) -> tuple:
    head, tuned, last = [], [], []
    for seed in range(3):
        run(*train_command(folder / "o.pth", "--seed", seed, "--finetune-epochs", 10))
        with open(folder / "o.csv", newline="") as file:
            accuracies = [100 * float(row["test_accuracy"]) for row in csv.DictReader(file)]
        head.append(max(accuracies[:EPOCHS]))
        tuned.append(max(accuracies))
        last.append(accuracies[-1])
    each = [mean_and_spread(values) for values in (tuned, last, head)]
    measured = f"{each[0]} (last epoch {each[1]}) from {each[2]} %"
    return measured, statistics.mean(tuned), ">=", 64, "%"


def calibration_error(folder: Path, *options: object) -> tuple:
    """The expected calibration error on the sample's test list, as the report says it."""
    errors = []
    for seed in range(3):
        run(*train_command(folder / "o.pth", "--seed", seed, *options))
        page = folder / "o.html"
        run(sys.executable, "predict.py", "test.txt", "--model", folder / "o.pth", "--report", page)
        errors.append(float(re.search(r'id="ece">([\d.]+)%', page.read_text())[1]))
    return ", ".join(f"{error:.1f}" for error in errors) + " %", statistics.mean(errors), "<=", 8, "%"


def row_ece(folder: Path, args) -> tuple:
    return calibration_error(folder)


def row_ece_split(folder: Path, args) -> tuple:
    return calibration_error(folder, "--val-split", 0.2)


def row_ece_tuned(folder: Path, args) -> tuple:
    return calibration_error(folder, "--finetune-epochs", 10)


class Silent:
    """In place of a `History`: nothing is best, and nothing written."""

    def score(self, val: tuple) -> float:
        return val[1]

    def is_best(self, val: tuple) -> bool:
        return False

    def add(self, *_: object) -> None:
        pass


def both_lists(views: Sequence[int]) -> dict:
    """Features of the sample's lists, and of their copies turned by up to 30 degrees and dimmed or brightened."""
    import torch
    from torchvision import transforms as T

    import train
    from transfer.extraction import extract_features
    from transfer.inputs.lists import read_list

    compute, backbone = ready_backbone()
    found = {}
    for name in ("train", "test"):
        image_list, _ = read_list(ROOT / f"{name}.txt", ROOT)
        found[name] = extract_features(backbone, train.ImageDataset(image_list, views, 0), compute=compute)
        make, upright = train.make_transforms, train.make_transforms(224)
        turned = T.Compose([upright.eval, T.RandomRotation(30), T.ColorJitter(brightness=(0.6, 1.4))])
        train.make_transforms = lambda size, upright=upright, turned=turned: upright._replace(eval=turned)
        torch.manual_seed(0)
        alone = replace(compute, workers=0)  # so that the seed draws them
        found[f"{name} turned"] = extract_features(backbone, train.ImageDataset(image_list, [0], 0), compute=alone)
        train.make_transforms = make
    return found


class Watching(Silent):
    """The same, and how often a head is right about some lists after each epoch, in percent."""

    def __init__(self, head: object, tests: Sequence):
        self.head, self.tests, self.accuracies = head, tests, []

    def add(self, *_: object) -> None:
        self.accuracies.append([share_right(self.head, test) for test in self.tests])


def train_on(features: object, tests: Sequence, epoch_views: Callable, seed: int) -> tuple:
    """A head trained by the recipe's loop; the best accuracy and the last on the first test list, at their best and
    last epoch on the others, all in percent. epoch_views: in place of the recipe's own.
    """
    from torch import nn

    import train
    from transfer.features import Split, Splits
    from transfer.system.flags import parse_train_args
    from transfer.training import Hyperparameters

    head = train.build_model("resnet18", 20, None, seed).fc
    history, criterion = Watching(head, tests), nn.CrossEntropyLoss(reduction="sum")
    train_split, test_split = Split(None, features), Split(None, tests[0])
    splits = Splits(train_split, train_split, test_split, test_split)
    hparams = replace(Hyperparameters.from_flags(vars(parse_train_args([]))), seed=seed)
    with mock.patch("transfer.training.epoch_views", epoch_views):
        train.train_head(head, criterion, splits, hparams, history=history, checkpointer=None)
    return [(max(each), each[-1]) for each in zip(*history.accuracies, strict=True)], head


def share_right(head: object, test: object, views: int = 1) -> float:
    """Percent of a list that a head is right about, from the mean of so many views."""
    import torch

    features = test.gather(test.rows, slice(views)).mean(1)
    with torch.no_grad():
        return 100 * float((head(features).argmax(1) == test.labels).double().mean())


def best_ceiling(features: object, test: object) -> tuple[float, float]:
    """scikit-learn's logistic regression on the same features, evaluation view and mirror image, at the C that is best
    out of fold: its accuracy on the test list, and the seconds of the search and the fit.
    """
    import numpy as np
    from sklearn.linear_model import LogisticRegression

    from transfer.crossval import assign_folds
    from transfer.groups import near_duplicates

    table, labels = features.gather(features.rows, slice(2)), features.labels
    fold = assign_folds(labels, near_duplicates(table, labels)).numpy()
    table, labels, began = table.numpy(), labels.numpy(), time.perf_counter()

    def fit(rows: object, c: float) -> object:
        both = np.concatenate([table[rows, 0], table[rows, 1]])
        return LogisticRegression(C=c, max_iter=3000).fit(both, np.tile(labels[rows], 2))

    def out_of_fold(c: float) -> float:
        right = [fit(fold != k, c).predict(table[fold == k, 0]) == labels[fold == k] for k in range(fold.max() + 1)]
        return float(np.concatenate(right).mean())

    chosen = max((0.003, 0.01, 0.03, 0.1, 0.3, 1.0), key=out_of_fold)
    found = fit(fold >= 0, chosen).predict(test.gather(test.rows, 0).numpy()) == test.labels.numpy()
    return 100 * float(found.mean()), time.perf_counter() - began


def mean_and_spread(values: Sequence[float]) -> str:
    return f"{statistics.mean(values):.1f} ± {statistics.stdev(values):.1f}"


def compare_views() -> None:
    """Test accuracy, mean and spread of 3 head seeds, by what the head trains on: on the sample, on its lists swapped,
    and on the sample's test list turned and dimmed.
    """
    from transfer.training import epoch_views

    lists = both_lists(range(6))
    choices = {
        "evaluation view and 3 random, one an epoch": lambda epoch, _: [[0, 2, 3, 4][(epoch - 1) % 4]],
        "4 random views, one an epoch": lambda epoch, _: [2 + (epoch - 1) % 4],
        "evaluation view (`--views 1`)": lambda epoch, _: epoch_views(epoch, 1),
        "evaluation view and mirror image, one an epoch": lambda epoch, _: [(epoch - 1) % 2],
        "both in every epoch (`--views 2`)": lambda epoch, _: epoch_views(epoch, 2),
        "and one of 2 random views by turns (the default)": lambda epoch, _: epoch_views(epoch, 4),
    }
    print("| the head trains on | sample, best / last | swapped, best / last | turned and dimmed, best / last |")
    print("|---|---|---|---|")
    for name, chosen in choices.items():
        cells, sides = [], []
        for here, there in (("train", "test"), ("test", "train")):
            runs = [train_on(lists[here], [lists[there], lists[f"{there} turned"]], chosen, seed) for seed in range(3)]
            both = list(zip(*(scores for scores, _ in runs), strict=True))
            cells.append([" / ".join(map(mean_and_spread, zip(*each, strict=True))) for each in both])
            sides.append([share_right(head, lists[there], 2) - scores[0][1] for scores, head in runs])
        print(f"| {name} | {cells[0][0]} % | {cells[1][0]} % | {cells[0][1]} % |", flush=True)
    gains = [statistics.mean(each) for each in sides]  # of the last choice, the default
    ceilings = [best_ceiling(lists["train"], lists["test"]), best_ceiling(lists["test"], lists["train"])]
    print(f"| logistic regression at its best C | {ceilings[0][0]:.1f} % | {ceilings[1][0]:.1f} % | |")
    began = time.perf_counter()
    train_on(lists["train"], [lists["test"]], chosen, 0)
    ours = time.perf_counter() - began
    print(
        f"\n{ceilings[0][1]:.1f} s for logistic regression and its C, {ours:.1f} s for ours on the sample's features."
    )
    print(f"Predicting from both sides: {gains[0]:+.1f} points on the sample, {gains[1]:+.1f} swapped (last epoch).")


def other_photos(folder: Path, count: int) -> list:
    """Lists of so many training photos and a tenth of test photos, all different: parts of the sample's, recoloured."""
    import torch
    from PIL import Image
    from torchvision import transforms as T

    torch.manual_seed(0)
    change = T.Compose([T.RandomResizedCrop((261, 348), scale=(0.3, 0.6)), T.ColorJitter(0.4, 0.4, 0.4, 0.1)])
    options = []
    for name, most in (("train", count), ("test", count // 10)):
        lines = (ROOT / f"{name}.txt").read_text().split("\n")[:-1]
        (folder / name).mkdir()
        with open(folder / f"{name}.txt", "w") as file:
            for n in range(most):
                path, label = lines[n % len(lines)].split()
                change(Image.open(ROOT / path).convert("RGB")).save(folder / name / f"{n}.jpg", quality=90)
                file.write(f"{name}/{n}.jpg {label}\n")
        options += [f"--{name}", folder / f"{name}.txt"]
    return options


def row_audit(folder: Path, args) -> tuple:
    (folder / "food").symlink_to(ROOT / "food", target_is_directory=True)
    command = train_command(folder / "o.pth", "--train", ROOT / "train.txt", "--test", ROOT / "test.txt")
    plain, added = [], []
    for _ in range(args.repeats):
        plain.append(run(*command, cwd=folder)[0])
        added.append(run(*command, "--audit", "audit.html", cwd=folder)[0] - plain[-1])
    plain, added = statistics.median(plain), statistics.median(added)
    return f"{plain:.1f} s and {added:.1f} s more", added, "<=", 5, "s"


def row_audit_larger(folder: Path, args) -> tuple:
    command = train_command(folder / "o.pth", *other_photos(folder, 5000), "--cache", folder / "kept")
    whole, again = (run(*command, cwd=folder)[0] for _ in range(2))  # the second makes no pass: what it adds is seen
    added = run(*command, "--audit", "audit.html", cwd=folder)[0] - again
    return f"{whole:.0f} s and {added:.1f} s more", 100 * added / whole, "<=", 25, "%"


def row_audit_memory(folder: Path, args) -> tuple:
    lists = other_photos(folder, 2000)
    more = peak_memory(*train_command(folder / "o.pth", *lists, "--audit", "audit.html"), cwd=folder)
    job = peak_memory(*train_command(folder / "o.pth", *lists), cwd=folder)
    return f"{more:.0f} - {job:.0f} MB, 2,200 images", more - job, "<=", 300, "MB"


def row_nearest(folder: Path, args) -> tuple:
    seconds = run_json("nearest", 20_000)["seconds"]
    return f"{seconds:.1f} s of 20,000, times 25", 25 * seconds / 60, "<=", 10, "minutes"


def find_nearest(count: str) -> None:
    """Seconds to find the 8 nearest neighbours of so many images, by evaluation view and mirror image."""
    import torch

    from transfer.neighbours import nearest

    table = torch.randn(int(count), 2, 512)
    began = time.perf_counter()
    nearest(table, table, itself=True)
    print(json.dumps({"seconds": time.perf_counter() - began}))


def time_label_next(count: str, chosen: str, width: str = "512") -> None:
    """Seconds, by the clock and of all cores, to choose so many of so many made-up photos after their pass, and the MB
    that it takes beyond their features.
    """
    import resource

    import torch

    from transfer.labelling import propose

    centres = torch.randn(int(count) // 50 + 1, int(width))
    features = centres.repeat_interleave(50, 0)[: int(count)]
    for some in features.split(10_000):
        some += torch.randn_like(some)
    probs = torch.rand(int(count), 20).softmax(1)
    peak, began, worked = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter(), time.process_time()
    places = [place for place, _ in propose(features, probs, int(chosen), lambda place: torch.rand(32, 32))]
    seconds, cores = time.perf_counter() - began, time.process_time() - worked
    more = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak) / 1024  # KB on Linux
    print(json.dumps({"seconds": seconds, "core seconds": cores, "chosen": len(places), "MB": more}))


def swapped(labels: object, share: float, seed: int, classes: int = 20) -> object:
    """The labels (N,), a share of them any other at random."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    count, changed = round(share * len(labels)), labels.clone()
    rows = torch.randperm(len(labels), generator=generator)[:count]
    changed[rows] = (labels[rows] + torch.randint(1, classes, (count,), generator=generator)) % classes
    return changed


def compare_labels() -> None:
    """How well swapped labels are found: ours against cleanlab's ranking of scikit-learn's probabilities."""
    import torch
    from cleanlab.rank import get_label_quality_scores
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import average_precision_score
    from sklearn.model_selection import cross_val_predict

    from transfer.audit.label_errors import score_labels_out_of_fold

    lists = both_lists(range(2))
    print("| swapped | suspects that are wrong | average precision | time | cleanlab on scikit-learn's | time |")
    print("|---|---|---|---|---|---|")
    for name in ("train", "test"):
        features = lists[name]
        table, labels = features.gather(features.rows, slice(2)), features.labels
        for share in (0.05, 0.1):
            found = {"ours": [], "precision": [], "theirs": [], "our time": [], "their time": []}
            for seed in range(4):
                changed = swapped(labels, share, seed)
                wrong, began = changed != labels, time.perf_counter()
                ours = score_labels_out_of_fold(
                    table, changed, torch.arange(len(labels)), num_classes=20, lrs=[0.005] * EPOCHS, batch_size=64
                )
                found["our time"].append(time.perf_counter() - began)
                found["ours"].append(average_precision_score(wrong, -ours.confidence))
                found["precision"].append(float(wrong[ours.suspects].double().mean()))
                began = time.perf_counter()
                model = LogisticRegression(max_iter=3000)
                probs = cross_val_predict(model, table[:, 0].numpy(), changed.numpy(), cv=5, method="predict_proba")
                scores = get_label_quality_scores(changed.numpy(), probs, method="self_confidence")
                found["their time"].append(time.perf_counter() - began)
                found["theirs"].append(average_precision_score(wrong, -scores))
            mean = {key: statistics.mean(values) for key, values in found.items()}
            spread = {key: statistics.stdev(values) for key, values in found.items()}
            cells = [
                f"{mean[who]:.2f} ± {spread[who]:.2f} | {mean[took]:.1f} s"
                for who, took in (("ours", "our time"), ("theirs", "their time"))
            ]
            print(f"| {share:.0%} of {name}.txt | {mean['precision']:.0%} | {' | '.join(cells)} |", flush=True)


def row_one_photo(folder: Path, args) -> tuple:
    run(*train_command(folder / "o.pth", "--epochs", 1))
    photo, torch_alone = [], []
    for _ in range(max(5, args.repeats)):
        photo.append(run(sys.executable, "predict.py", "food/banana/test_01.jpg", "--model", folder / "o.pth")[0])
        torch_alone.append(run(sys.executable, "-c", "import torch, torchvision")[0])
    ratio = statistics.median(a / b for a, b in zip(photo, torch_alone, strict=True))
    return f"{statistics.median(photo):.2f} / {statistics.median(torch_alone):.2f} s", ratio, "<=", 1.15, ""


def row_folder(folder: Path, args) -> tuple:
    run(*train_command(folder / "o.pth", "--epochs", 1))
    predict = [sys.executable, "predict.py", "--model", folder / "o.pth"]
    rates, ready = [], []
    for _ in range(args.repeats):
        one, whole = run(*predict, "food/banana/test_01.jpg")[0], run(*predict, "food")[0]
        rates.append(774 / (whole - one))
        ready.append(run_json("pass", ROOT / "food", 16)["ready"])
    rate, limit = statistics.median(rates), statistics.median(ready)
    return f"{rate:.1f} / {limit:.1f} images/s", rate / limit, ">=", 0.80, ""


def row_growth(folder: Path, args) -> tuple:
    seconds = []
    for count in (200, 800):
        lists = ["--train", repeat_sample(folder, "train", count), "--test", repeat_sample(folder, "test", count // 2)]
        runs = [run(*train_command(folder / "o.pth", *lists), cwd=folder)[1] for _ in range(args.repeats)]
        seconds.append(statistics.median(float(re.search(r"in ([\d.]+) s", out)[1]) for out in runs))
    return f"{seconds[1]:.1f} / {seconds[0]:.1f} s", seconds[1] / seconds[0], "<=", 4.1, ""


def peak_memory(*command: object, cwd: Path = ROOT) -> float:
    """MB of a process and its children at their largest together: shared pages count once (Linux's Pss)."""
    process = subprocess.Popen([str(part) for part in command], cwd=cwd, stdout=subprocess.DEVNULL)
    peak = 0
    while process.poll() is None:
        total = 0
        with contextlib.suppress(OSError):  # a process ended while it was read
            children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
            for pid in [process.pid, *children]:
                total += int(
                    re.search(r"^Pss: *(\d+)", Path(f"/proc/{pid}/smaps_rollup").read_text() + "\nPss: 0", re.M)[1]
                )
        peak = max(peak, total)
        time.sleep(0.1)
    return peak / 1024


def row_memory(folder: Path, args) -> tuple:
    base = peak_memory(sys.executable, "-c", "import torch, torchvision, time; time.sleep(1)")
    job = peak_memory(*train_command(folder / "o.pth"))
    allowed = 600 + 3 * (475 * 4 + 300) / 1024
    return f"{job:.0f} - {base:.0f} MB", job - base, "<=", round(allowed), "MB"


def make_million(folder: Path) -> Path:
    """A list of a million distinct paths that exist: a thousand links to one folder of a thousand empty files."""
    (folder / "files").mkdir(exist_ok=True)
    for n in range(1000):
        (folder / f"files/photo_{n:06d}.jpg").touch()
        (folder / f"class_{n:03d}").symlink_to("files", target_is_directory=True)
    with open(folder / "million.txt", "w") as file:
        for c in range(1000):
            file.writelines(f"class_{c:03d}/photo_{n:06d}.jpg {c}\n" for n in range(1000))
    return folder / "million.txt"


def row_list(folder: Path, args) -> tuple:
    path = make_million(folder)
    found = [run_json("list", path, cwd=folder) for _ in range(args.repeats)]
    assert all(each["lines"] == 1_000_000 and not each["problems"] for each in found)
    return (
        f"{found[0]['bytes']:.0f} B a line (at most 250)",
        statistics.median(e["seconds"] for e in found),
        "<=",
        5,
        "s",
    )


ROWS = {
    "main": ("main job, 20 epochs: plain loop / train.py", row_main),
    "larger": ("the same, 1,500 + 1,300 images", row_larger),
    "pass": ("the pass / backbone on ready tensors", row_pass),
    "pass50": ("the same with a ResNet-50", row_pass50),
    "phone": ("12-megapixel photo / 348 px image, 4 views", row_phone),
    "accuracy": ("test accuracy, ours - plain, 3 seeds", row_accuracy),
    "finetune": ("a fine-tuning epoch of layer4 / the plain loop's", row_finetune),
    "gain": ("test accuracy after 10 fine-tuning epochs, 3 seeds", row_gain),
    "ece": ("calibration error, the test list chose, 3 seeds", row_ece),
    "ece-split": ("calibration error, --val-split 0.2, 3 seeds", row_ece_split),
    "ece-tuned": ("calibration error after 10 fine-tuning epochs, 3 seeds", row_ece_tuned),
    "one": ("predict.py, one photo / importing torch", row_one_photo),
    "folder": ("predict.py, a folder / backbone", row_folder),
    "growth": ("time for 4n images / for n, after start-up", row_growth),
    "memory": ("peak memory - that of importing torch", row_memory),
    "audit": ("the main job, and what --audit adds", row_audit),
    "audit5000": ("the same, 5,000 + 500 images", row_audit_larger),
    "audit-memory": ("peak memory with --audit - without", row_audit_memory),
    "nearest": ("nearest neighbours of 100,000 images", row_nearest),
    "list": ("a list of 1,000,000 lines, parsed and checked", row_list),
}


SLOW = ("accuracy", "gain", "ece", "ece-split", "ece-tuned", "audit5000")


def describe_machine() -> str:
    import PIL
    import torch
    import torchvision

    compute, _ = ready_backbone()
    cpu = next(
        (line.split(": ")[1] for line in open("/proc/cpuinfo") if line.startswith("model name")), platform.processor()
    )
    name = torch.cuda.get_device_name() if compute.device.type == "cuda" else cpu.strip()
    return (
        f"{name}, {compute.workers} cores, {torch.get_num_threads()} threads, {compute.dtype}; "
        f"Python {platform.python_version()}, torch {torch.__version__}, "
        f"torchvision {torchvision.__version__}, Pillow {PIL.__version__}"
    )


def compare_real(*arguments: str) -> None:
    import benchmark_real  # which imports torch

    benchmark_real.main(*arguments)


def compare_labelling(*arguments: str) -> None:
    import benchmark_labelling

    benchmark_labelling.main(*arguments)


def check_architectures(*names: str) -> None:
    import benchmark_architectures

    benchmark_architectures.table(*names)


def check_architecture(arch: str) -> None:
    import benchmark_architectures

    benchmark_architectures.check(arch)


def compare_speeds(*names: str) -> None:
    import benchmark_architectures

    benchmark_architectures.speeds(*names)


def compare_corrections(*arguments: str) -> None:
    import benchmark_corrections

    benchmark_corrections.main(*arguments)


def compare_million(*arguments: str) -> None:
    import benchmark_million

    benchmark_million.main(*arguments)


def measure_million(*arguments: str) -> None:
    import benchmark_million

    benchmark_million.measure(*arguments)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=ROWS, help="these rows alone")
    parser.add_argument("--repeats", type=int, default=3, help="runs of each command whose median is taken")
    parser.add_argument(
        "--plain-epochs", type=int, default=1, help="epochs that the plain loop runs before it is scaled"
    )
    args = parser.parse_args()
    print(f"{describe_machine()}\nplain loop: {args.plain_epochs} epoch(s) run, scaled to {EPOCHS}\n")
    print("| what | measured | result | at least / at most |\n|---|---|---|---|")
    for name in args.only or [name for name in ROWS if name not in SLOW]:
        what, row = ROWS[name]
        with tempfile.TemporaryDirectory() as folder:
            measured, value, sign, bound, unit = row(Path(folder), args)
        met = value >= bound if sign == ">=" else value <= bound
        print(
            f"| {what} | {measured} | {value:.2f} {unit} | {sign} {bound} {unit}{'' if met else ' MISSED'} |",
            flush=True,
        )
    if not args.only:
        print(f"\nnot run, since they take long: {', '.join(SLOW)}; name them with --only")


if __name__ == "__main__":
    inner = {"plain": plain_loop, "pass": pass_rates, "list": parse_list, "views": compare_views}
    inner |= {"labels": compare_labels, "nearest": find_nearest, "real": compare_real}
    inner |= {"corrections": compare_corrections, "label-next": compare_labelling, "label-next-time": time_label_next}
    inner |= {"architectures": check_architectures, "architecture": check_architecture, "speeds": compare_speeds}
    inner |= {"million": compare_million, "million-row": measure_million}
    if sys.argv[1:2] and sys.argv[1] in inner:
        inner[sys.argv[1]](*sys.argv[2:])
    else:
        main()
