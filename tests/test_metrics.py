"""Metrics: figures worked out by hand and by scikit-learn."""

import math
import re
import time

import pytest
import torch
from conftest import growth
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import confusion_matrix, precision_recall_fscore_support, top_k_accuracy_score
from torch import nn
from torch.nn import functional as F

from transfer.metrics import (
    ClassificationScores,
    MetricMeter,
    ScoredImage,
    ScoredImages,
    class_weights,
    classification_report,
    likeliest,
    wilson_interval,
)
from transfer.system.console import letters

# Four classes by hand: apple 2 of 3 right, bean 1 of 2, corn 0 of 1 and never predicted, dill without images.
LABELS = [0, 0, 0, 1, 1, 2]
PREDICTED = [0, 0, 1, 1, 0, 0]
NAMES = ["apple", "bean", "corn", "dill"]


def scores_of(labels, predicted, classes=4):
    scores = ClassificationScores(classes)
    for label, guess in zip(labels, predicted, strict=True):
        scores.update(label, F.one_hot(torch.tensor(guess), classes).float())
    return scores


def confusion(scores):
    """Rows of true classes, columns of predicted ones."""
    counts = scores.hits.diag()
    for (label, guess), count in scores.confusions.items():
        counts[label, guess] = count
    return counts.tolist()


def test_figures_are_those_worked_out_by_hand():
    scores = scores_of(LABELS, PREDICTED)
    assert confusion(scores) == [[2, 1, 0, 0], [1, 1, 0, 0], [1, 0, 0, 0], [0, 0, 0, 0]]
    assert (scores.count, scores.right, scores.accuracy) == (6, 3, 0.5)
    nan = math.nan
    assert scores.images.tolist() == [3, 2, 1, 0]
    assert scores.precision.tolist() == pytest.approx([2 / 4, 1 / 2, nan, nan], nan_ok=True)
    assert scores.recall.tolist() == pytest.approx([2 / 3, 1 / 2, 0, nan], nan_ok=True)
    assert scores.f1.tolist() == pytest.approx([4 / 7, 1 / 2, 0, nan], nan_ok=True)
    assert scores.taken_for() == {0: (1, 1), 1: (0, 1), 2: (0, 1)}


def test_the_table_puts_the_worst_recall_first_and_macro_averages_last():
    lines = classification_report(scores_of(LABELS, PREDICTED), NAMES).splitlines()
    # Wilson of 3 of 6: 0.5 plus or minus 1.96 sqrt(0.25 / 6 + 0.98^2 / 6^2) / (1 + 3.8415 / 6). Top 3 holds ties.
    assert lines[0] == "accuracy   50.00%  3 of 6, 95% interval 18.8% to 81.2%"
    assert lines[1].startswith("top-3    ") and lines[2] == ""
    assert [line.split() for line in lines[3:]] == [
        "class images precision recall F1 most often taken for".split(),
        "corn 1 – 0.0% 0.0% apple (1)".split(),
        "bean 2 50.0% 50.0% 50.0% apple (1)".split(),
        "apple 3 50.0% 66.7% 57.1% bean (1)".split(),
        "dill 0 – – –".split(),
        # Means of the three classes that occur: 1/3, 7/18 and 5/14.
        "macro average 6 33.3% 38.9% 35.7%".split(),
    ]


def test_top_3_counts_images_whose_class_is_among_the_three_likeliest():
    scores = ClassificationScores(5)
    probs = torch.tensor([0.3, 0.25, 0.2, 0.15, 0.1])
    for label in range(5):
        scores.update(label, probs)
    assert (scores.right, scores.in_top3, scores.top3) == (1, 3, 0.6)
    two = ClassificationScores(2)
    two.update(1, torch.tensor([0.9, 0.1]))
    assert (two.accuracy, two.top3) == (0, 1)


@pytest.mark.parametrize(
    ("right", "count", "low", "high"),
    [
        # Newcombe (1998), Statistics in Medicine 17, table I, method 3.
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0000, 0.1611),
        (1, 29, 0.0061, 0.1718),
        (8, 10, 0.4902, 0.9433),
        (10, 10, 0.7225, 1.0),  # 1 / (1 + 1.96^2 / 10)
    ],
)
def test_intervals_are_wilsons(right, count, low, high):
    assert wilson_interval(right, count) == pytest.approx((low, high), abs=5e-5)
    mirrored = wilson_interval(count - right, count)
    assert mirrored == pytest.approx((1 - high, 1 - low), abs=5e-5)
    assert all(0 <= end <= 1 for end in mirrored)


def test_scores_and_table_of_ten_thousand_classes_take_megabytes_and_a_moment():
    generator = torch.Generator().manual_seed(0)
    labels, guesses = torch.randint(0, 10_000, (2, 2000), generator=generator).tolist()

    def work():
        scores, probs = ClassificationScores(10_000), torch.zeros(10_000)
        for label, guess in zip(labels, guesses, strict=True):
            probs[guess] = 1
            scores.update(label, probs)
            probs[guess] = 0
        began = time.process_time()
        lines = classification_report(scores, [str(n) for n in range(10_000)]).splitlines()
        assert len(lines) == 4 + 10_000 + 1 and time.process_time() - began < 1

    assert growth(work) < 50 << 20  # a matrix of all pairs would be 800 MB


def test_an_epochs_metrics_are_means_over_samples_however_batches_divide_them():
    meter = MetricMeter(nn.Linear(4, 3))
    for loss, guesses, labels in ((3.0, [0, 1, 2], [0, 1, 1]), (1.5, [2], [0])):
        meter.update(loss, F.one_hot(torch.tensor(guesses), 3).float(), torch.tensor(labels))
    # Of class 0 one of two is right, of class 1 one of two; class 2 has no image.
    assert meter.compute() == (pytest.approx(4.5 / 4), 0.5, 0.5, 4)


def test_of_two_classes_as_often_mistaken_for_the_first_is_named_and_long_names_are_cut():
    scores = scores_of([0, 0, 0, 1], [2, 1, 0, 1], 3)
    assert scores.taken_for() == {0: (1, 1)}
    lines = classification_report(scores, ["a" * 24, "b" * 25, "c"]).splitlines()
    assert [line.split("  ")[0] for line in lines[4:7]] == ["a" * 24, "b" * 23 + "…", "c"]
    wide = classification_report(scores, ["日本語" * 9, "e\u0301", "c"]).splitlines()
    assert wide[4].startswith("日本語" * 3 + "日本…  ")
    assert {letters(line.partition("%")[0]) for line in wide[4:7]} == {letters(wide[3].partition("precision")[0]) + 8}
    assert likeliest(torch.tensor([0.2, 0.5, 0.3]), ["a", "b", "c"], 2) == [("b", 0.5), ("c", pytest.approx(0.3))]
    assert len(likeliest(torch.tensor([0.2, 0.8]), ["a", "b"], 9)) == 2


def test_the_macro_recall_of_training_and_of_the_table_are_one_figure():
    # 36.1% over the three classes with images. Dill is only guessed: it has no recall, and counts nowhere.
    labels, predicted = [0, 0, 0, 1, 1, 2], [0, 3, 1, 3, 1, 0]
    meter = MetricMeter(nn.Linear(4, 4))
    meter.update(0.0, F.one_hot(torch.tensor(predicted), 4).float(), torch.tensor(labels))
    scores = scores_of(labels, predicted)
    recall = (1 / 3 + 1 / 2 + 0) / 3
    assert meter.compute().macro_recall == pytest.approx(recall) == scores.macro_average()[1]
    assert f"{recall:.1%}" in classification_report(scores, NAMES).splitlines()[-1]


@settings(max_examples=60, deadline=None)
@given(st.integers(2, 6), st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), min_size=1, max_size=40))
def test_figures_are_scikit_learns(classes, pairs):
    pairs = [(label % classes, guess % classes) for label, guess in pairs]
    labels, predicted = zip(*pairs, strict=True)
    scores = scores_of(labels, predicted, classes)
    everyone = list(range(classes))
    assert confusion(scores) == confusion_matrix(labels, predicted, labels=everyone).tolist()
    assert scores.accuracy == sum(a == b for a, b in pairs) / len(pairs)
    *columns, images = precision_recall_fscore_support(labels, predicted, labels=everyone, zero_division=0)
    ours = (scores.precision, scores.recall, scores.f1, scores.images)
    for found, expected in zip(ours, (*columns, images), strict=True):
        assert found.nan_to_num(0).tolist() == pytest.approx(expected.tolist(), abs=1e-6)
    there = sorted(set(labels))
    macro = precision_recall_fscore_support(labels, predicted, labels=there, average="macro", zero_division=0)[:3]
    lines = classification_report(scores, [f"c{n}" for n in everyone]).splitlines()
    assert lines[-1].startswith("macro average")
    printed = [float(part) for part in re.findall(r"([\d.]+)%", lines[-1])]
    assert printed == pytest.approx([100 * value for value in macro], abs=0.0501)
    assert {line.split()[0] for line in lines[4:-1]} == {f"c{n}" for n in everyone}
    recalls = [float(line.split()[3].rstrip("%")) for line in lines[4:-1] if line.split()[3] != "–"]
    assert recalls == sorted(recalls)


def test_top_3_is_scikit_learns():
    generator = torch.Generator().manual_seed(0)
    probs = torch.rand(50, 7, generator=generator).softmax(1)
    labels = torch.randint(0, 7, (50,), generator=generator).tolist()
    scores = ClassificationScores(7)
    for label, each in zip(labels, probs, strict=True):
        scores.update(label, each)
    assert scores.top3 == top_k_accuracy_score(labels, probs.numpy(), k=3, labels=range(7))


def test_weights_make_classes_count_alike_and_images_one_on_average():
    labels = torch.tensor([0] * 30 + [1] * 10 + [3] * 5)
    weights = class_weights(labels, 4)
    sums = [float(weights[label] * (labels == label).sum()) for label in (0, 1, 3)]
    assert sums == pytest.approx([45 / 3] * 3) and weights[[0, 1, 3]].tolist() == pytest.approx([0.5, 1.5, 3])
    assert float(weights[labels].mean()) == pytest.approx(1)
    assert class_weights(torch.tensor([0, 0, 0, 1]), 2).tolist() == pytest.approx([2 / 3, 2])  # also of a single image


def test_of_many_images_the_most_confident_mistakes_and_the_least_confident_hits_are_kept_alone():
    generator, images, kept = torch.Generator().manual_seed(0), [], ScoredImages()
    for number in range(500):
        probs = (3 * torch.randn(3, generator=generator)).round().softmax(0)  # some of equal confidence
        images.append(ScoredImage.of(b"%d" % number, number % 3, probs))
        kept.add(images[-1])
    by_confidence = sorted(images, key=lambda image: image.confidence)
    assert kept.mistakes() == [image for image in reversed(by_confidence) if not image.right][:24]
    assert kept.hits() == [image for image in by_confidence if image.right][:24]
    assert kept.right.tolist() == [image.right for image in images] and len(kept) == 500
    assert torch.allclose(kept.confidence, torch.tensor([image.confidence for image in images]))
