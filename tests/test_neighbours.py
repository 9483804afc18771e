"""Neighbours: the nearest by features, tile by tile, are those that all distances give."""

import signal
from types import SimpleNamespace

import pytest
import torch
from conftest import growth
from hypothesis import given, settings
from hypothesis import strategies as st

from transfer import neighbours
from transfer.features import Features
from transfer.neighbours import nearest


@settings(deadline=None)
@given(st.integers(1, 40), st.integers(1, 40), st.integers(1, 3), st.booleans(), st.integers(0, 99))
def test_the_nearest_are_those_that_all_distances_give(queries, keys, views, itself, seed):
    generator = torch.Generator().manual_seed(seed)
    keys = torch.randn(keys, views, 6, generator=generator)
    queries = keys if itself else torch.randn(queries, 1, 6, generator=generator)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(neighbours, "TILE", 7)
        distances, rows = nearest(queries, keys, itself)
    expected = torch.cdist(queries[:, 0].double(), keys.double().transpose(0, 1)).amin(0)
    if itself:
        expected.fill_diagonal_(torch.inf)
    wanted = expected.sort(1).values[:, : min(8, len(keys) - itself)]
    assert torch.allclose(distances.double(), wanted, atol=1e-3)
    assert torch.allclose(expected.gather(1, rows), wanted, atol=1e-3)


def clusters(count, width, seed=0):
    """Features of so many images in clusters of 50."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(count // 50, width, generator=generator)
    noise = torch.randn(count // 50 * 50, width, generator=generator)
    return (centres.repeat_interleave(50, 0) + 0.5 * noise)[:, None]


def test_through_cells_nearly_all_of_the_nearest_are_found(monkeypatch):
    keys = clusters(4000, 32)
    exact_distances, exact = nearest(keys, keys, True)
    assert torch.equal(exact, nearest(keys, keys, True, seed=1)[1])
    monkeypatch.setattr(neighbours, "EXACT", 1000)
    monkeypatch.setattr(neighbours, "PROBES", 3)  # of 16 cells
    distances, rows = nearest(keys, keys, True)
    found = (rows[:, :, None] == exact[:, None]).any(2).double().mean()
    assert found > 0.95 and not (rows == torch.arange(len(keys))[:, None]).any()
    assert torch.allclose(distances[rows == exact], exact_distances[rows == exact], atol=1e-3)
    assert torch.equal(rows, nearest(keys, keys, True)[1])
    assert not torch.equal(rows, nearest(keys, keys, True, seed=1)[1])  # drawn by seed


def test_the_memory_of_the_search_does_not_grow_with_the_keys():
    queries = torch.randn(8, 1, 256)
    few, many = (torch.randn(count, 2, 256) for count in (21_000, 84_000))  # 43 and 172 MB, both through cells
    assert growth(lambda: nearest(queries, many)) - growth(lambda: nearest(queries, few)) < 40 << 20


def test_features_mapped_in_chunks_have_the_neighbours_of_one_tensor(monkeypatch):
    table = clusters(300, 8)
    order = torch.randperm(300, generator=torch.Generator().manual_seed(1))
    chunks = torch.empty_like(table)
    chunks[order] = table
    mapped = Features(chunks.split(64), 64, torch.zeros(300, dtype=torch.int64), places=order)
    monkeypatch.setattr(neighbours, "EXACT", 100)
    for ours, theirs in zip(nearest(mapped, mapped, True), nearest(table, table, True), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("exact", [0, 999])
def test_progress_counts_each_query_once_and_a_signal_ends_the_search(monkeypatch, exact):
    keys, counted = clusters(300, 8), []
    monkeypatch.setattr(neighbours, "EXACT", exact)
    monkeypatch.setattr(neighbours, "TILE", 70)
    nearest(keys, keys, True, progress=SimpleNamespace(add=counted.append))
    assert sum(counted) == 300 and min(counted) >= 0
    monkeypatch.setattr("transfer.system.signals.StopRequest.signum", signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt):
        nearest(keys, keys, True)


def test_of_equal_images_empty_cells_keep_their_direction():
    keys = torch.zeros(1000, 1, 4)
    keys[:20] = torch.randn(20, 1, 4, generator=torch.Generator().manual_seed(0))
    assert neighbours.find_cells(torch.cat([keys, -keys]), 0).centres.norm(dim=1).max() > 0.99
