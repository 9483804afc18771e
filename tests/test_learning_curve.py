"""The learning curve: a power of the number of images goes on as one, and where images are few there is none."""

import pytest
import torch

from transfer.audit.learning_curve import Curve, learning_curve
from transfer.crossval import CrossValidation


def test_a_curve_that_is_a_power_of_the_images_goes_on_as_one():
    sizes = [50, 100, 200, 400]
    accuracy = torch.tensor([[1 - 3 * size**-0.4 + shift for shift in (0, 0.001, -0.001)] for size in sizes])
    curve = Curve(sizes, accuracy, torch.tensor([200, 200]), torch.tensor([[0.5, 0.2]] * 3 + [[0.5, 0.6]]))
    for expected in curve.doubled():
        assert expected == pytest.approx(1 - 3 * 800**-0.4, abs=0.01)
    assert curve.growing() == [(1, pytest.approx(0.4))]


def test_a_curve_that_is_flat_promises_nothing():
    curve = Curve([50, 100], torch.full((2, 3), 0.8), torch.tensor([50, 50]), torch.full((2, 2), 0.8))
    assert curve.doubled() == pytest.approx([0.8] * 3) and curve.growing() == []


def test_no_class_gains_by_chance():
    recall = torch.tensor([[2 / 3, 0.0, 0.2], [1.0, 1.0, 0.8]])
    curve = Curve([50, 100], torch.full((2, 3), 0.8), torch.tensor([3, 2, 30]), recall)
    assert [label for label, _ in curve.growing()] == [2]


@pytest.mark.parametrize(
    ("means", "unclear"),
    [([0.5, 0.6, 0.52], True), ([0.5, 0.6, 0.58, 0.7], False), ([0.9, 0.905, 0.9], False), ([0.6, 0.5, 0.4], True)],
)
def test_a_curve_is_unclear_where_it_zigzags_more_than_it_rises(means, unclear):
    accuracy = torch.tensor(means)[:, None].expand(-1, 3)
    assert Curve([0] * len(means), accuracy, torch.tensor([9]), torch.zeros(len(means), 1)).unclear == unclear


def test_where_images_are_few_there_is_no_curve():
    images = CrossValidation(torch.randn(12, 2, 8), torch.arange(12) % 4, 0)
    assert learning_curve(images, 4, [0.005], 64) is None


def test_no_curve_promises_more_than_half_the_errors_or_fewer_hits_than_now():
    steep, falling = torch.tensor([[0.2], [0.8], [0.95]]), torch.tensor([[0.9], [0.85], [0.8]])
    for accuracy, expected in ((steep, 0.975), (falling, 0.8)):
        curve = Curve([100, 200, 400], accuracy, torch.tensor([9]), torch.full((3, 1), 0.5))
        assert curve.doubled() == [pytest.approx(expected)]


def test_a_class_grows_where_its_gain_is_more_than_chance_gives_any_of_three_classes():
    # 15 points from a half: 2.39 * sqrt((0.25 + 0.2275) / n) is 15.2 points of 118 images and two more, 14.8 of 126.
    recall = torch.tensor([[0.5, 0.5, torch.nan], [0.65, 0.65, torch.nan]])
    curve = Curve([50, 100], torch.full((2, 3), 0.6), torch.tensor([116, 126, 0]), recall)
    assert curve.growing() == [(1, pytest.approx(0.15))]


@pytest.mark.parametrize(("per_class", "sizes"), [(4, [8, 16]), (8, [8, 16, 32]), (40, [20, 40, 80, 160])])
def test_a_curve_has_a_point_for_each_share_that_leaves_two_images_a_class(per_class, sizes):
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(4).repeat_interleave(per_class)
    features = 3 * torch.eye(4, 16)[labels] + torch.randn(4 * per_class, 16, generator=generator)
    images = CrossValidation(features[:, None], labels, 0)
    images.groups = torch.arange(len(labels))
    curve = learning_curve(images, 4, [0.05] * 10, 64)
    assert curve.sizes == sizes and curve.accuracy.shape == (len(sizes), 3) and curve.images.tolist() == [per_class] * 4
    # Of classes of one size the mean recall is the accuracy.
    assert torch.allclose(curve.recall.mean(1), curve.accuracy.mean(1), atol=1e-5)
    if per_class == 40:
        assert curve.accuracy.mean(1)[-1] > 0.85 and curve.accuracy.mean(1)[0] < curve.accuracy.mean(1)[-1]
