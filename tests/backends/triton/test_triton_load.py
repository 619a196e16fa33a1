"""Rows of experts: expectations against sampled routing, histograms counted by hand."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest

from moec.backends.triton.launches.load import counted, even

SAMPLING = 0.02
"""Of 400 draws of a whole routing, the mean differs from the expectation by less."""
EXACT = 1e-9


def sampled(tokens: int, top_k: int, experts: int, draws: int = 400) -> np.ndarray:
    """[draws, experts] rows, every token choosing different experts evenly."""
    generator = np.random.default_rng(0)
    keys = generator.random((draws, tokens, experts))
    ids = np.argpartition(keys, top_k - 1, axis=-1)[..., :top_k].reshape(draws, -1)
    return np.stack([np.bincount(row, minlength=experts) for row in ids])


@pytest.mark.parametrize(("tokens", "top_k", "experts"), [(1, 2, 8), (40, 2, 8), (33, 6, 16), (7, 1, 64)])
def test_even_routing_is_what_drawing_gives(tokens: int, top_k: int, experts: int) -> None:
    load, seen = even(tokens, top_k, experts), sampled(tokens, top_k, experts)
    assert load.total == pytest.approx(tokens * top_k, rel=EXACT)
    assert load.touched == pytest.approx((seen > 0).sum(1).mean(), rel=SAMPLING)
    for rows in (1, 4, 16):
        assert load.tiles(rows) == pytest.approx(np.ceil(seen / rows).sum(1).mean(), rel=SAMPLING)


def test_touched_experts_have_a_closed_form() -> None:
    for tokens in (1, 5, 100, 3000):
        assert even(tokens, 8, 128).touched == pytest.approx(128 * (1 - (1 - 8 / 128) ** tokens), rel=EXACT)


def test_all_experts_chosen_leaves_nothing_to_chance() -> None:
    load = even(130, 8, 8)
    assert (load.total, load.touched, load.tiles(64), load.longest()) == (1040, 8, 24, 130)


@pytest.mark.parametrize("tokens", [0, -3])
def test_no_tokens(tokens: int) -> None:
    load = even(tokens, 2, 8)
    assert (load.total, load.touched, load.tiles(16), load.longest()) == (0, 0, 0, 0)


def test_many_tokens_stay_exact() -> None:
    load = even(1_000_000, 8, 256)
    assert load.total == pytest.approx(8_000_000, rel=1e-7)
    assert load.tiles(128) == pytest.approx(256 * (31250 / 128 + 0.5), rel=1e-3)


def test_a_histogram_is_counted() -> None:
    load = counted([0, 1, 16, 17, 17, 0])
    assert (load.total, load.touched, load.tiles(16), load.longest()) == (51, 4, 1 + 1 + 2 + 2, 17)


def test_tiles_of_several_blocks_are_counted() -> None:
    load = counted([0, 1, 64, 65, 192, 193, 400])
    assert load.blocks(64, 3).tolist() == [1 + 1 + 1 + 1, 1, 0 + 1 + 1 + 2]  # 400 is 3 + 3 + 1 blocks of 64
    assert load.blocks(16, 1).tolist() == [load.tiles(16)]


def test_a_negative_count_is_refused() -> None:
    with pytest.raises(ValueError, match="negative"):
        counted([1, -1])


def test_tiles_never_fall_with_more_tokens() -> None:
    tiles = [even(tokens, 8, 128).tiles(64) for tokens in range(1, 3000, 37)]
    assert all(b >= a * (1 - EXACT) for a, b in pairwise(tiles))
    assert not math.isclose(tiles[0], tiles[-1])
