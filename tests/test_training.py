"""Training: which views an epoch trains on, and batches of kept features."""

from dataclasses import asdict

import pytest
import torch
from conftest import HPARAMS

from transfer.features import Features
from transfer.system.flags import parse_train_args
from transfer.training import FeatureLoader, Hyperparameters, epoch_views


@pytest.mark.parametrize(
    ("num_views", "expected"),
    [
        (1, [[0], [0], [0], [0], [0]]),
        (2, [[0, 1], [0, 1], [0, 1], [0, 1], [0, 1]]),
        (3, [[0, 1, 2], [0, 1, 2], [0, 1, 2], [0, 1, 2], [0, 1, 2]]),
        (4, [[0, 1, 2], [0, 1, 3], [0, 1, 2], [0, 1, 3], [0, 1, 2]]),
        (6, [[0, 1, 2], [0, 1, 3], [0, 1, 4], [0, 1, 5], [0, 1, 2]]),
    ],
)
def test_an_epoch_has_the_evaluation_view_the_mirror_image_and_the_random_views_by_turns(num_views, expected):
    assert [epoch_views(epoch, num_views) for epoch in range(1, 6)] == expected


def kept():
    """Features of five images in three views, of which the third is unreadable: 10 * image + view."""
    numbers = 10 * torch.arange(5)[:, None] + torch.arange(3)
    return Features([numbers[:, :, None].float()], 5, torch.arange(5) + 100, {2: "damaged"})


def test_a_loader_to_evaluate_on_gives_the_evaluation_view_in_order():
    batches = [(inputs.flatten().tolist(), labels.tolist()) for inputs, labels in FeatureLoader(kept(), 3)]
    assert batches == [([0, 10, 30], [100, 101, 103]), ([40], [104])]


def test_a_loader_to_train_on_gives_each_image_in_each_view_of_the_epoch_in_a_new_order_each_time():
    loader, again = (FeatureLoader(kept(), 5, shuffle_seed=7) for _ in range(2))
    orders = []
    for epoch in (1, 2):
        loader.set_epoch(epoch)
        again.set_epoch(epoch)
        batches = list(loader)
        assert [len(labels) for _, labels in batches] == [5, 5, 2]
        inputs, labels = (torch.cat(each) for each in zip(*batches, strict=True))
        assert sorted(inputs.flatten().tolist()) == [10 * image + view for image in (0, 1, 3, 4) for view in range(3)]
        assert torch.equal(labels, inputs.flatten().long() // 10 + 100)
        assert torch.equal(inputs, torch.cat([each for each, _ in again]))
        orders.append(inputs.flatten().tolist())
    assert orders[0] != orders[1]


def test_hyperparameters_are_those_of_the_flags_and_the_view_seed_is_the_seed_where_it_is_not_named():
    flags = vars(parse_train_args(["--seed", "3", "--size", "224", "--lr", "0.1", "--val-split", "0.2", "--balance"]))
    changed = {"seed": 3, "view_seed": 3, "lr": 0.1, "val_split": 0.2, "balance": True}
    assert asdict(Hyperparameters.from_flags(flags)) == asdict(HPARAMS) | changed
    assert Hyperparameters.from_flags(flags | {"view_seed": 5}).view_seed == 5
    assert flags["view_seed"] is None
