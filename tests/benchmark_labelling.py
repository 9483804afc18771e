"""What labels are worth by which photos get them: at random, by the smallest margin, and by --label-next's rule.

    python tests/benchmark.py label-next --data FOLDER [--draws 10] [--sets sample flowers]

FOLDER is that of benchmark_real.py; features of the bundled backbone are made here. Each draw labels 3 training photos
a class at random; then three times 2 a class, chosen by a rule among all others, and the recipe trains a new head each
time. Accuracies are those of the last epoch on the test list, which, as in the recipe, also lowers the learning rate;
probabilities are calibrated out of fold. Figures are means over the draws, gains ± their spread.
"""

import argparse
import contextlib
import statistics
from collections.abc import Callable
from pathlib import Path

import torch
from benchmark_real import HPARAMS, SETS, load, table, train_head
from torch import Tensor

from transfer.calibration import calibrate
from transfer.crossval import cross_val_logits
from transfer.features import Split, Splits
from transfer.labelling import most_worthy, typicality, uncertainty, unit_vectors

FIRST, STEP, ROUNDS = 3, 2, 3  # labels a class at first, and in each of the rounds


def at_random(features: Tensor, probs: Tensor, count: int, generator: torch.Generator) -> Tensor:
    return torch.randperm(len(features), generator=generator)[:count]


def smallest_margin(features: Tensor, probs: Tensor, count: int, generator: torch.Generator) -> Tensor:
    return uncertainty(probs).topk(count).indices


def by_worth(features: Tensor, probs: Tensor, count: int, generator: torch.Generator) -> Tensor:
    units = unit_vectors(features)
    found = most_worthy(units, typicality(units), uncertainty(probs), count, is_copy=lambda place, taken: False)
    return torch.tensor([place for place, _ in found])


RULES = {"at random": at_random, "smallest margin": smallest_margin, "`--label-next`": by_worth}


def label_rounds(train: Split, test: Split, rule: Callable[..., Tensor], draw: int) -> list[float]:
    """Test accuracy in percent before the first round and after each."""
    labels, generator = train.features.labels, torch.Generator().manual_seed(draw)
    order = torch.randperm(len(labels), generator=generator)
    labelled = torch.zeros(len(labels), dtype=torch.bool)
    for label in labels.unique():
        labelled[order[labels[order] == label][:FIRST]] = True
    accuracies = []
    while True:
        part = Split(None, train.features.only(labelled.nonzero().flatten()))
        head, history = train_head(Splits(part, part, test, test), draw)
        accuracies.append(history.accuracies[-1])
        if len(accuracies) > ROUNDS:
            return accuracies
        with contextlib.redirect_stdout(None):
            calibrate(head, *cross_val_logits(part.features, [HPARAMS.lr] * HPARAMS.epochs, HPARAMS))
        pile = (~labelled).nonzero().flatten()
        features = train.features.gather(pile, 0).clone()
        probs = head(features).softmax(1).detach()
        count = min(STEP * head.out_features, len(pile))
        labelled[pile[rule(features, probs, count, generator)]] = True


def bundled_sample() -> list[Split]:
    """The sample's lists by the bundled backbone."""
    from benchmark import both_lists

    lists = both_lists(range(HPARAMS.views))
    return [Split(None, lists[name]) for name in ("train", "test")]


def labels_to_reach(accuracies: list[float], wanted: float) -> str:
    """Labels a class at which a curve reaches an accuracy, between its points in a straight line."""
    counts = [FIRST + STEP * number for number in range(len(accuracies))]
    for number in range(1, len(counts)):
        before, after = accuracies[number - 1 : number + 1]
        if after >= wanted:
            return f"{counts[number - 1] + STEP * max(0.0, wanted - before) / max(after - before, 1e-9):.1f}"
    return f"over {counts[-1]}"


def compare_rules(name: str, splits: list[Split], draws: int) -> list[tuple]:
    """A row for each rule: accuracy at each number of labels, gains over chance, labels to reach its last accuracy."""
    runs = {rule: [label_rounds(*splits, pick, draw) for draw in range(draws)] for rule, pick in RULES.items()}
    means = {rule: [statistics.mean(column) for column in zip(*each, strict=True)] for rule, each in runs.items()}
    rows, chance = [], runs["at random"]
    for rule, each in runs.items():
        gains = []
        for number in range(1, ROUNDS + 1):
            both = [mine[number] - other[number] for mine, other in zip(each, chance, strict=True)]
            gains.append(f"{statistics.mean(both):+.1f} ± {statistics.stdev(both):.1f}" if each is not chance else "")
        reached = labels_to_reach(means[rule], means["at random"][-1])
        rows.append((name, rule, ", ".join(f"{mean:.1f}" for mean in means[rule]), *gains, reached))
    return rows


def main(*argv: str) -> None:
    names = [*SETS, "bundled"]  # the last: the sample by the bundled backbone
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, metavar="FOLDER")
    parser.add_argument("--draws", type=int, default=10, metavar="N")
    parser.add_argument("--sets", nargs="+", choices=names, default=names, help="these alone")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)  # heads are so small that a second one would only wait
    counts = [FIRST + STEP * number for number in range(ROUNDS + 1)]
    heads = ["set", "rule", f"accuracy at {', '.join(map(str, counts))}", *(f"gain at {n}" for n in counts[1:])]
    table("Labels", [*heads, f"labels to reach chance's at {counts[-1]}"], [])
    parts = (("train", HPARAMS.views), ("test", 1))
    for name in args.sets:
        splits = [load(args.data, name, part, 224, views) for part, views in parts] if name in SETS else None
        for row in compare_rules(name, splits or bundled_sample(), args.draws):
            print(f"| {' | '.join(row)} |", flush=True)
