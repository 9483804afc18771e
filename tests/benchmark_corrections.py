"""What corrections are worth: the audit's suspects and the photos of --label-next, decided as a user who knows decides.

    python tests/benchmark.py corrections [--draws 4]

The sample by the bundled backbone, through train.py and predict.py as they are run. First a share of the training
labels is swapped at random, and the label findings of --audit go through the page's choices: the suggestion or keep,
one click, where that is right; another class of the list, two; and one to save. Then 3 photos a class have labels, and
40 more of the others get theirs, by --label-next or at random: one click for one of the three likeliest classes, two
for another, and one to save. Test accuracies, in percent, are what train.py says of its best epoch.
"""

import argparse
import contextlib
import csv
import io
import os
import re
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from benchmark import ROOT, WEIGHTS, mean_and_spread, swapped

import predict
import train
from transfer.inputs.lists import read_list

SHARES = (0.05, 0.1)
FIRST, NEXT = 3, 40  # photos a class with labels, and how many more get them
SAVE = 1  # click


def output(main: Callable, *args: object) -> str:
    """The stdout of a run in this process."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        main([str(arg) for arg in args])
    return out.getvalue()


def accuracy(*args: object) -> float:
    """Test accuracy of train.py, in percent. A seed concerns the head alone: features are kept."""
    # Where labels and folders disagree, the folders give no names.
    common = ("--test", "test.txt", "--classes", "names.txt", "--weights", WEIGHTS, "--view-seed", 0, "--cache", "kept")
    return float(re.search(r"^best +test accuracy ([\d.]+)%", output(train.main, *args, *common), re.M)[1])


def write_list(path: str, lines: dict[str, object]) -> None:
    Path(path).write_text("".join(f"{image} {label}\n" for image, label in lines.items()))


def decide_suspects(truth: dict[str, str]) -> tuple[dict[str, str], int]:
    """What a user makes of an audit's label findings: the corrections, and the clicks. truth: classes by path."""
    corrections, clicks = {}, SAVE
    with open("audit.csv", newline="") as file:
        for row in csv.DictReader(file):
            right = truth[row["path"]]
            if row["kind"] == "label":
                clicks += 1 if right in (row["label"], row["suggestion"]) else 2
                if right != row["label"]:
                    corrections[row["path"]] = right
    return corrections, clicks


def choose_next(pile: list[str], truth: dict[str, str]) -> tuple[dict[str, str], int]:
    """The labels that a user gives to the photos that --label-next names, and the clicks."""
    write_list("pile.txt", dict.fromkeys(pile, ""))
    rows = csv.DictReader(io.StringIO(output(predict.main, "pile.txt", "--label-next", NEXT, "--format", "csv")))
    corrections, clicks = {}, SAVE
    for row in rows:
        right = truth[row["path"]]
        corrections[row["path"]] = right
        clicks += 1 if right in (row["class1"], row["class2"], row["class3"]) else 2
    return corrections, clicks


def compare_swapped(share: float, draws: int, labels: dict[str, int], truth: dict[str, str]) -> None:
    """A row: accuracies with labels swapped, after corrections and clean; what came back of what the swaps cost."""
    found = {"before": [], "after": [], "clean": [], "right": [], "clicks": []}
    for draw in range(draws):
        changed = swapped(torch.tensor([*labels.values()]), share, draw).tolist()
        write_list("swapped.txt", dict(zip(labels, changed, strict=True)))
        run = ("--train", "swapped.txt", "--seed", draw)
        found["before"].append(accuracy(*run, "--audit", "audit.html"))
        corrections, clicks = decide_suspects(truth)
        write_list("corrections.txt", corrections)
        found["after"].append(accuracy(*run, "--corrections", "corrections.txt"))
        found["clean"].append(accuracy("--train", "train.txt", "--seed", draw))
        wrong = {path for path, was, now in zip(labels, labels.values(), changed, strict=True) if was != now}
        found["right"].append(100 * len(wrong & corrections.keys()) / len(wrong))
        found["clicks"].append(clicks)
    before, after, clean = (statistics.mean(found[key]) for key in ("before", "after", "clean"))
    cells = [mean_and_spread(found[key]) for key in ("before", "after", "clean")]
    back = f"{(after - before) / (clean - before):.0%}" if clean > before else "nothing lost"
    clicks = f"{statistics.mean(found['clicks']):.0f}"
    print(
        f"| {share:.0%} | {' | '.join(cells)} | {back} | {statistics.mean(found['right']):.0f}% | {clicks} |",
        flush=True,
    )


def compare_next(draws: int, labels: dict[str, int], truth: dict[str, str]) -> None:
    """A row: accuracies with few labels, with 40 more by --label-next, and with 40 more at random; and the clicks."""
    found = {"before": [], "after": [], "random": [], "clicks": []}
    for draw in range(draws):
        generator = torch.Generator().manual_seed(draw)
        paths = [[*labels][place] for place in torch.randperm(len(labels), generator=generator).tolist()]
        few = [
            path for label in {*labels.values()} for path in [each for each in paths if labels[each] == label][:FIRST]
        ]
        write_list("few.txt", {path: labels[path] for path in few})
        run = ("--train", "few.txt", "--seed", draw)
        found["before"].append(accuracy(*run))
        pile = [path for path in paths if path not in {*few}]
        corrections, clicks = choose_next(pile, truth)
        for name, some in (("random", {path: truth[path] for path in pile[:NEXT]}), ("after", corrections)):
            write_list("corrections.txt", some)
            found[name].append(accuracy(*run, "--corrections", "corrections.txt"))
        found["clicks"].append(clicks)
    cells = [mean_and_spread(found[key]) for key in ("before", "after", "random")]
    print(f"| {' | '.join(cells)} | {statistics.mean(found['clicks']):.0f} |", flush=True)


def main(*argv: str) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--draws", type=int, default=4, metavar="N")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder), contextlib.redirect_stderr(io.StringIO()):
        for name in ("food", "train.txt", "test.txt"):
            os.symlink(ROOT / name, name)
        labels, truth = {}, {}
        for name in ("train.txt", "test.txt"):
            image_list, _ = read_list(Path(name), Path())
            found = dict(zip(map(os.fsdecode, image_list.paths()), image_list.labels.tolist(), strict=True))
            labels = labels or found
            truth |= {path: Path(path).parent.name for path in found}
        names = {label: truth[path] for path, label in labels.items()}
        Path("names.txt").write_text("".join(f"{names[label]}\n" for label in sorted(names)))
        print("| swapped | before | corrected | clean | comes back | swapped labels corrected | clicks |")
        print("|---|---|---|---|---|---|---|")
        for share in SHARES:
            compare_swapped(share, args.draws, labels, truth)
        print(f"\n| {FIRST} labels a class | {NEXT} more by --label-next | {NEXT} more at random | clicks |")
        print("|---|---|---|---|")
        compare_next(args.draws, labels, truth)
