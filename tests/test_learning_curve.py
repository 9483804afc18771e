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


def test_where_images_are_few_there_is_no_curve():
    images = CrossValidation(torch.randn(12, 2, 8), torch.arange(12) % 4, 0)
    assert learning_curve(images, 4, [0.005], 64) is None
