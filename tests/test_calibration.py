"""Calibration: one temperature, found where calculus says, that changes no class and brings the error down."""

import re

import pytest
import torch
from conftest import go, weights_of
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

import train
from transfer.calibration import bisect, calibrate, collect_logits, fit_temperature
from transfer.checkpoint import load_checkpoint
from transfer.features import Features, Split
from transfer.metrics import calibration_bins


def overconfident(temperature, count=4000, classes=5):
    """Logits that are so many times too large, and labels drawn as they should be."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(count, classes, generator=generator) * 2
    labels = torch.multinomial(logits.softmax(1), 1, generator=generator).flatten()
    return temperature * logits, labels


@pytest.mark.parametrize("temperature", [0.5, 1, 3])
def test_the_temperature_is_found_again(temperature):
    assert fit_temperature(*overconfident(temperature)) == pytest.approx(temperature, rel=0.05)


@given(st.floats(0.3, 5), st.integers(0, 99))
def test_no_other_temperature_has_a_smaller_loss(scale, seed):
    generator = torch.Generator().manual_seed(seed)
    logits, labels = scale * torch.randn(50, 4, generator=generator), torch.randint(0, 4, (50,), generator=generator)
    found = fit_temperature(logits, labels)
    assert 1 / 4 <= found <= 10
    loss = lambda each: F.cross_entropy(logits / each, labels).item()  # noqa: E731
    for other in (found * 1.02, found / 1.02):
        assert loss(found) <= loss(min(10, max(1 / 4, other))) + 1e-6


def test_bisection_ends_a_trillionth_of_the_bounds_from_the_number():
    for number in (0.3, 2.5):
        low, high = bisect(lambda middle, number=number: middle < number, 0.0, 4.0)
        assert low <= number <= high and high - low == 4 / 2**40
        low, high = bisect(lambda middle, number=number: middle < number, 1e-6, 1e6, geometric=True)
        assert low <= number <= high < low * (1 + 1e-10)  # as exact, however small the number


def test_where_all_is_right_the_temperature_stays_within_reason():
    assert fit_temperature(torch.eye(3), torch.arange(3)) == pytest.approx(1 / 4)


def test_calibrating_a_head_changes_its_confidence_and_no_class():
    torch.manual_seed(0)
    head, features = nn.Linear(8, 5), 3 * torch.randn(2000, 8)
    with torch.no_grad():
        labels = torch.multinomial(head(features).softmax(1), 1).flatten()
        head.weight *= 4
        head.bias *= 4
        before = head(features)
        batches = [(features[:1500], labels[:1500]), (features[1500:], labels[1500:])]
        found = calibrate(head, *collect_logits(head, batches))
        after = head(features)
    assert found == pytest.approx(4, rel=0.1) and torch.equal(before.argmax(1), after.argmax(1))
    assert torch.allclose(after, before / found, atol=1e-5)
    probs = [logits.softmax(1) for logits in (before, after)]
    errors = [calibration_bins(each.amax(1), each.argmax(1) == labels)[-1] for each in probs]
    assert errors[1] < 0.04 < errors[0]


def test_of_a_long_list_sorted_by_class_every_so_many_images_are_fitted_on(monkeypatch):
    features = torch.randn(100, 1, 8, generator=torch.Generator().manual_seed(0))
    labels, head = torch.arange(100) // 10, nn.Linear(8, 10)
    logits, known = collect_logits(head, [(features[:35, 0], labels[:35]), (features[35:, 0], labels[35:])], every=3)
    assert known.tolist() == labels[::3].tolist() and torch.allclose(logits, head(features[::3, 0]))
    model, split = nn.Module(), Split(None, Features([features], 100, labels))
    model.fc = head
    monkeypatch.setattr(train, "MAX_IMAGES", 20)
    assert train.best_val_logits(model, None, split)[1].bincount().tolist() == [2] * 10
    assert [len(each) for each in collect_logits(head, [])] == [0, 0]  # a rank may have none


def test_a_head_without_a_bias_is_calibrated_too():
    head = nn.Linear(4, 3, bias=False)
    weight = head.weight.detach().clone()
    temperature = calibrate(head, torch.randn(30, 3), torch.arange(30) % 3)
    assert torch.allclose(head.weight * temperature, weight)


def test_best_pth_records_its_temperature_and_the_accuracy_that_training_printed(colours, quick):
    out = go("--epochs", 2, "--lr", 1e-3)
    model, metadata = load_checkpoint(colours / "best.pth")
    assert metadata["temperature"] > 0 and f"accuracy {metadata['accuracy']:.0%} of 12 photos (" in out
    assert model.fc.weight.abs().max() * metadata["temperature"] < 10
    assert weights_of()["fc.weight"].shape == (3, 512)


def test_on_the_sample_confidence_and_share_right_lie_close_together(sample_answers):
    # Before there was a temperature it was 21%; of 300 images with perfect confidence it would be 4%.
    assert float(re.search(r'id="ece">([\d.]+)%', sample_answers[1].read_text())[1]) < 8
