"""Cross-validation: near-duplicates on one side, logits from heads that never saw the image."""

import signal
import time
from dataclasses import replace

import pytest
import torch
from conftest import HPARAMS
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import nn

from transfer.crossval import (
    assign_folds,
    class_in_other_folds,
    cross_val_logits,
    group_split,
    stratified_group_holdout,
    train_fold_heads,
)
from transfer.features import Features, Split
from transfer.groups import near_duplicates
from transfer.system.console import UserError


def scenes(classes=6, per_class=8, copies=3, width=64, seed=0):
    """Features (N, 1, D), labels and scenes of images that come in scenes of so many copies, nearly alike."""
    generator = torch.Generator().manual_seed(seed)
    count = classes * per_class
    centres = torch.randn(classes, width, generator=generator)
    each = centres.repeat_interleave(per_class, 0) + torch.randn(count, width, generator=generator)
    features = each.repeat_interleave(copies, 0)
    features = features + 0.1 * torch.randn(features.shape, generator=generator)
    scene = torch.arange(count).repeat_interleave(copies)
    return features[:, None], torch.arange(classes).repeat_interleave(per_class * copies), scene


def logits_of(features, labels, fold, num_classes, epochs):
    """Logits out of fold of heads trained as the recipe's is, at its first rate."""
    lrs = [0.005] * epochs
    heads = train_fold_heads(features, labels, fold, num_classes=num_classes, lrs=lrs, batch_size=64, seed=0)
    return heads[torch.arange(len(labels))]


# Near-duplicates


def test_near_duplicates_are_grouped_and_other_images_of_a_class_are_not():
    features, labels, scene = scenes()
    groups = near_duplicates(features[:, :1], labels)
    same_scene, same_group = scene[:, None] == scene, groups[:, None] == groups
    assert same_group[same_scene].float().mean() > 0.99
    assert same_group[~same_scene].float().mean() < 0.001


def test_images_without_copies_stay_apart():
    features, labels, _ = scenes(copies=1, per_class=40)
    assert near_duplicates(features[:, :1], labels).bincount().max() <= 3


def test_a_class_of_copies_alone_is_never_one_group_that_no_head_could_learn_from():
    features, labels, _ = scenes(classes=3, per_class=2, copies=20)
    features[:40] = features[0] + 0.01 * torch.randn(40, 1, 64, generator=torch.Generator().manual_seed(1))
    assert near_duplicates(features[:, :1], labels)[:40].bincount().max() <= 20


@pytest.mark.parametrize("sizes", [[1], [1, 1], [2, 1], [2, 2], [5], [3, 1, 2]])
def test_the_smallest_lists_have_groups(sizes):
    labels = torch.tensor([label for label, size in enumerate(sizes) for _ in range(size)])
    groups = near_duplicates(torch.randn(len(labels), 1, 8, generator=torch.Generator().manual_seed(0)), labels)
    assert groups.shape == labels.shape and groups.min() == 0


def test_on_the_sample_grouped_folds_give_the_accuracy_of_the_test_list_and_plain_ones_flatter(sample):
    features = sample["train"].features
    table, labels = features.gather(features.rows, slice(2)), features.labels

    def accuracy(groups):
        logits = logits_of(table, labels, assign_folds(labels, groups), num_classes=20, epochs=20)
        return (logits.argmax(1) == labels).double().mean()

    began = time.perf_counter()
    grouped = accuracy(near_duplicates(table[:, :1], labels))
    assert time.perf_counter() - began < 10  # measured: half a second on a quiet core
    # The test list gives 60%.
    assert 0.52 < grouped < 0.66 and accuracy(torch.arange(len(labels))) > grouped + 0.15


# Folds


@settings(deadline=None)
@given(st.lists(st.integers(1, 12), min_size=1, max_size=30), st.integers(0, 9))
def test_folds_keep_groups_whole_and_spread_each_class(sizes, seed):
    groups = torch.tensor([number for number, size in enumerate(sizes) for _ in range(size)])
    labels = groups % 3
    fold = assign_folds(labels, groups, k=4, seed=seed)
    assert fold.min() >= 0 and fold.max() < 4
    for number in groups.unique():
        assert len(fold[groups == number].unique()) == 1
    for label in labels.unique():
        counts = torch.bincount(fold[labels == label], minlength=4)
        assert counts.max() - counts.min() <= groups[labels == label].bincount().max()
    assert torch.equal(fold, assign_folds(labels, groups, k=4, seed=seed))
    assert assign_folds(torch.arange(8), torch.arange(8), k=4, seed=seed).bincount().tolist() == [2] * 4


@pytest.mark.parametrize("weights", [None, torch.tensor([4.0, 0.1, 1.0, 1.0, 0.5, 2.0])])
def test_a_fold_head_is_trained_as_the_recipe_trains_its_own_and_a_signal_ends_it(monkeypatch, weights):
    features, labels, _ = scenes()
    rates, fold = [0.01, 0.01, 0.005], torch.ones(len(labels), dtype=torch.int64)  # head 0 never misses an image
    options = {"num_classes": 6, "batch_size": 20, "seed": 3, "class_weights": weights}
    criterion = nn.CrossEntropyLoss(weights, reduction="sum")
    first = train_fold_heads(features, labels, fold, lrs=[0.0], **options)  # as heads are drawn
    head = nn.Linear(64, 6)
    head.load_state_dict({"weight": first.weights[:, :6].T.clone(), "bias": first.bias[:6].clone()})
    generator = torch.Generator().manual_seed(3)
    torch.empty(64, 12).uniform_(generator=generator), torch.empty(12).uniform_(generator=generator)
    optimizer = torch.optim.Adam(head.parameters())
    for rate in rates:
        optimizer.param_groups[0]["lr"] = rate
        for batch in torch.randperm(len(labels), generator=generator).split(40):  # of which each head sees a half
            optimizer.zero_grad()
            (criterion(head(features[batch, 0]), labels[batch]) / len(batch)).backward()
            optimizer.step()
    heads = train_fold_heads(features, labels, fold, lrs=rates, **options)
    assert torch.allclose(heads.weights[:, :6], head.weight.T, atol=1e-5)
    assert torch.equal(heads.weights[:, 6:], first.weights[:, 6:])  # head 1 misses all
    monkeypatch.setattr("transfer.system.signals.StopRequest.signum", signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt):
        train_fold_heads(features, labels, fold, lrs=rates, **options)


def test_an_images_logits_do_not_depend_on_its_own_label():
    features, labels, scene = scenes()
    fold = assign_folds(labels, scene)
    before = logits_of(features, labels, fold, num_classes=6, epochs=3)
    changed = labels.clone()
    held = fold == 2
    changed[held] = (labels[held] + 1) % 6
    after = logits_of(features, changed, fold, num_classes=6, epochs=3)
    assert not before.isnan().any()  # each image has some
    assert torch.equal(before[held], after[held]) and not torch.equal(before[~held], after[~held])


def test_images_whose_class_lies_in_one_fold_cannot_be_known():
    labels, fold = torch.tensor([0, 0, 0, 1, 1]), torch.tensor([0, 1, 1, 2, 2])
    assert class_in_other_folds(labels, fold).tolist() == [True, True, True, False, False]


# The validation split


@given(st.lists(st.integers(1, 40), min_size=1, max_size=6), st.floats(0.01, 0.99), st.integers(0, 2**31 - 1))
def test_of_images_without_duplicates_a_fraction_of_each_class_is_held_out(sizes, fraction, seed):
    assume(max(sizes) > 1)
    labels = torch.tensor([label for label, size in enumerate(sizes) for _ in range(size)])
    held = stratified_group_holdout(labels, torch.arange(len(labels)), fraction, seed)
    for label, size in enumerate(sizes):
        assert held[labels == label].sum() == min(max(1, round(fraction * size)), size - 1)
    assert torch.equal(held, stratified_group_holdout(labels, torch.arange(len(labels)), fraction, seed))


@given(st.lists(st.integers(1, 9), min_size=1, max_size=20), st.floats(0.05, 0.95), st.integers(0, 99))
def test_scenes_lie_on_one_side_and_each_class_on_both_where_it_can(sizes, fraction, seed):
    groups = torch.tensor([number for number, size in enumerate(sizes) for _ in range(size)])
    labels = groups % 4
    held = stratified_group_holdout(labels, groups, fraction, seed)
    for number in groups.unique():
        assert len(held[groups == number].unique()) == 1
    for label in labels.unique():
        own = labels == label
        assert held[own].any() == (len(groups[own].unique()) > 1) and not held[own].all()


def test_a_split_of_a_fifth_takes_a_fifth_of_each_class_and_another_seed_another():
    labels = torch.tensor([0] * 100 + [1] * 10 + [2] * 3 + [3])
    held, other = (stratified_group_holdout(labels, torch.arange(114), 0.2, seed) for seed in (0, 1))
    assert torch.bincount(labels[held]).tolist() == [20, 2, 1] and not torch.equal(held, other)
    pairs = stratified_group_holdout(torch.zeros(12, dtype=torch.int64), torch.arange(12) // 2, 0.25, 0)
    assert pairs.sum() == 4  # of a quarter, 3 images, the second pair exceeds it by no more than half of a pair


def test_a_split_of_the_sample_is_whole_and_has_near_duplicates_on_one_side(sample):
    features = sample["train"].features
    train, val = (split.features.rows for split in group_split(sample["train"], 0.2, 0, "none to spare"))
    assert sorted(train.tolist() + val.tolist()) == features.rows.tolist()
    groups = near_duplicates(features.gather(features.rows, slice(2)), features.labels)
    assert not set(groups[train].tolist()) & set(groups[val].tolist())
    assert len(groups.unique()) < 400 and 0.15 < len(val) / 475 < 0.25  # there are scenes, and a fifth is held out


def test_where_each_class_is_one_image_there_is_nothing_to_split():
    features = Features([torch.randn(3, 1, 8)], 3, torch.arange(3))
    with pytest.raises(UserError, match="none to spare"):
        group_split(Split(None, features), 0.2, 0, "none to spare")


# The head's own images


def test_where_classes_are_too_many_for_seconds_nothing_is_cross_validated(monkeypatch):
    features, labels, _ = scenes()
    whole = Features([features], len(labels), labels)
    monkeypatch.setattr("transfer.crossval.WORK", 6 * 144)
    logits, known = cross_val_logits(whole, [0.005], HPARAMS)
    assert logits.shape == (144, 6) and known.tolist() == labels.tolist()
    monkeypatch.setattr("transfer.crossval.WORK", 6 * 144 - 1)
    assert cross_val_logits(whole, [0.005], HPARAMS) is None


def test_images_whose_class_no_other_fold_has_are_left_out_of_what_is_cross_validated():
    labels = torch.tensor([0] * 6 + [1])
    features = Features([torch.randn(7, 2, 8, generator=torch.Generator().manual_seed(0))], 7, labels)
    logits, known = cross_val_logits(features, [0.005], HPARAMS)
    assert logits.shape == (6, 2) and known.tolist() == [0] * 6
    single = Features([torch.randn(2, 2, 8)], 2, torch.arange(2))
    assert cross_val_logits(single, [0.005], HPARAMS) is None


def test_a_photo_that_lies_in_two_classes_is_never_held_out():
    features, labels = torch.randn(60, 1, 16, generator=torch.Generator().manual_seed(0)), torch.arange(60) % 2
    features[1::4] = features[0::4]  # every other pair, of one label each
    split = Split(None, Features([features], 60, labels))
    twins = torch.arange(60) % 4 < 2
    for seed in range(10):
        train, val = (part.features.rows for part in group_split(split, 0.4, seed, "none to spare"))
        assert len(val) and not twins[val].any() and len(train) + len(val) == 60


def test_with_balance_the_heads_out_of_fold_have_the_real_heads_loss():
    features, labels, _ = scenes()
    rows = torch.cat([(labels == label).nonzero().flatten()[: 24 if label else 6] for label in range(6)])
    some = Features([features[rows]], len(rows), labels[rows])
    plain, balanced = (cross_val_logits(some, [0.005] * 5, replace(HPARAMS, balance=each)) for each in (False, True))
    rare = plain[1] == 0
    assert torch.equal(plain[1], balanced[1]) and rare.any()
    # The weights draw the head towards the rare class.
    assert (balanced[0] - plain[0]).log_softmax(1)[:, 0].mean() > (balanced[0] - plain[0]).log_softmax(1)[:, 1:].mean()
