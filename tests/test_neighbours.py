"""Neighbours: the nearest by features, tile by tile, are those that all distances give."""

import pytest
import torch
from conftest import growth
from hypothesis import given, settings
from hypothesis import strategies as st

from transfer import neighbours
from transfer.neighbours import nearest


@settings(deadline=None)
@given(st.integers(1, 40), st.integers(1, 40), st.integers(1, 3), st.booleans(), st.integers(0, 99))
def test_the_nearest_are_those_that_all_distances_give(queries, keys, views, itself, seed):
    generator = torch.Generator().manual_seed(seed)
    keys = torch.randn(keys, views, 6, generator=generator)
    queries = keys[:, 0] if itself else torch.randn(queries, 6, generator=generator)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(neighbours, "TILE", 7)
        distances, rows = nearest(queries, keys, itself)
    expected = torch.cdist(queries.double(), keys.double().transpose(0, 1)).amin(0)
    if itself:
        expected.fill_diagonal_(torch.inf)
    wanted = expected.sort(1).values[:, : min(8, len(keys) - itself)]
    assert torch.allclose(distances.double(), wanted, atol=1e-3)
    assert torch.allclose(expected.gather(1, rows), wanted, atol=1e-3)


def test_the_memory_of_the_search_does_not_grow_with_the_keys():
    queries = torch.randn(8, 512)
    few, many = (torch.randn(count, 2, 512) for count in (4096, 40_960))  # 17 and 168 MB
    assert growth(lambda: nearest(queries, many)) - growth(lambda: nearest(queries, few)) < 40 << 20
