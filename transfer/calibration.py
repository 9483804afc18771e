"""Calibration: the one temperature by which probabilities mean what they say."""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

MAX_IMAGES = 50_000  # to fit one number on; of more every so many, since a list may be sorted by class


@torch.inference_mode()
def collect_logits(
    module: nn.Module, batches: Iterable[tuple[Tensor, Tensor]], every: int = 1
) -> tuple[Tensor, Tensor]:
    """A module's logits (N, C) for batches of (inputs, labels), and the labels (N,); of every so many images one."""
    num_classes = len([*module.parameters()][-1])  # the head's last parameter has a row per class
    logits, labels, seen = [torch.empty(0, num_classes)], [torch.empty(0, dtype=torch.int64)], 0
    for inputs, known in batches:
        some = slice(-seen % every, None, every)
        seen += len(known)
        if len(known[some]):
            logits.append(module(inputs[some]).float().cpu())
            labels.append(known[some].cpu())
    return torch.cat(logits), torch.cat(labels)


def bisect(too_low: Callable[[float], bool], low: float, high: float, geometric: bool = False) -> tuple[float, float]:
    """The bounds, 2**-40 as far apart, of the number where `too_low` becomes false."""
    for _ in range(40):
        middle = (low * high) ** 0.5 if geometric else (low + high) / 2
        low, high = (middle, high) if too_low(middle) else (low, middle)
    return low, high


def fit_temperature(logits: Tensor, labels: Tensor) -> float:
    """The T that minimises the cross-entropy of logits / T, between 1/4 and 10 (Guo et al. 2017): where all is right,
    no T would be small enough.

    logits: (N, C); labels: (N,). The loss is convex in 1 / T: bisection on the sign of its slope.
    """
    logits = logits.double()
    right = logits.gather(1, labels[:, None]).mean()

    def too_low(inverse: float) -> bool:  # the slope is below 0
        return bool(((inverse * logits).softmax(1) * logits).sum(1).mean() - right < 0)

    low, high = bisect(too_low, 1 / 10, 4.0, geometric=True)
    return 1 / (low * high) ** 0.5


def calibrate(head: nn.Linear, logits: Tensor, labels: Tensor) -> float:
    """Divide a head's weights by the temperature that fits logits (N, C) and labels (N,), and return that: no class
    changes.
    """
    temperature = fit_temperature(logits, labels)
    with torch.no_grad():
        for parameter in head.parameters():
            parameter /= temperature
    return temperature
