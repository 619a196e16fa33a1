"""What programs fetch to the cache: the first weights and rows of the tile so many places later, and nothing else."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from numpy.typing import NDArray

from moec.backends.triton.kernels.warm import HELPER_INTERPRETED
from moec.backends.triton.launches.tiles import Launch, Tile
from tests.backends.cases import ExpertsCase
from tests.backends.triton.layers import run
from tests.backends.triton.test_triton_sort import places

pytestmark = pytest.mark.usefixtures("interpreter")
SEEN: list[NDArray[np.uint64]] = []
"""Addresses of every fetch."""
NOTED = (
    HELPER_INTERPRETED
    + "    from tests.backends.triton.test_triton_warm import SEEN\n    SEEN.append(at.handle.data)\n"
)
HIDDEN, INNER, EXPERTS, ITEM = 48, 32, 5, 4
UP, DOWN = Tile(16, 32, 32, 2, units=2, ahead=3, tma=True), Tile(16, 16, 32, 2, units=2, ahead=4, late=2, tma=True)


def fetched(launch: Launch, nk: bool) -> tuple[set[int], set[int], list[NDArray[np.uint64]], list[int]]:
    """Addresses of up weights and of down weights that were fetched, from their first; others; rows of the experts."""
    form = "nk" if nk else "kn"
    case = ExpertsCase("concat", form, form, hidden=HIDDEN, inner=INNER, experts=EXPERTS, top_k=2)
    inputs = case.inputs(60)
    SEEN.clear()

    def change(text: str) -> str:
        assert HELPER_INTERPRETED in text
        return text.replace(HELPER_INTERPRETED, NOTED)

    run(case, launch, inputs, change)
    up, down = (next(t for t in inputs if tuple(t.shape[1:]) == s) for s in _shapes(nk))
    within = [{int(a) - t.data_ptr() for s in SEEN for a in s.flatten() if 0 <= int(a) - t.data_ptr() < 4 * t.numel()}
              for t in (up, down)]  # fmt: skip
    known = [(t.data_ptr(), t.data_ptr() + 4 * t.numel()) for t in (up, down)]
    others = [s for s in SEEN if not any(first <= int(s.flat[0]) < end for first, end in known)]
    return within[0], within[1], others, np.bincount(inputs[1].flatten().numpy(), minlength=EXPERTS).tolist()


def _shapes(nk: bool) -> list[tuple[int, int]]:
    shapes = [(2 * INNER, HIDDEN), (HIDDEN, INNER)]
    return shapes if nk else [(b, a) for a, b in shapes]


def expected(tile: Tile, rows: list[int], outputs: int, inputs: int, parts: int, nk: bool) -> set[int]:
    """Of a stacked weight, from its first byte: a line of each output (or of each input) of a tile's first step."""
    columns, wide = -(-outputs // tile.block_n), outputs * parts
    owners = [e for e, n in enumerate(rows) for _ in range(-(-n // tile.block_m))]
    late = EXPERTS - tile.late
    found = set()
    for _, e, c, _ in places(owners, tile.units, columns, tile.group_m, late)[tile.ahead :]:
        for first in range(0, wide, outputs):
            own = range(first + c * tile.block_n, first + (c + 1) * tile.block_n)
            if nk:
                found |= {((e * wide + n) * inputs) * ITEM for n in own}
            else:
                found |= {((e * inputs + k) * wide + own[0]) * ITEM for k in range(tile.block_k)}
    return found


@pytest.mark.parametrize("nk", [True, False])
def test_the_first_step_of_a_later_tile_is_fetched(nk: bool) -> None:
    up, down, others, rows = fetched(Launch("gemm", UP, DOWN), nk)
    assert up == expected(UP, rows, INNER, HIDDEN, 2, nk)
    assert down == expected(DOWN, rows, HIDDEN, INNER, 1, nk)
    # Rows of the down GEMM: those of one tile lie next to each other, and the last stands for those that it lacks.
    assert others
    for at in others:
        steps = np.diff(at.flatten().astype(np.int64))
        assert set(steps.tolist()) <= {0, INNER * ITEM}
        assert len(np.unique(at)) in (UP.block_m, 2 * UP.block_m)


def test_nothing_is_fetched_for_no_tile() -> None:
    launch = Launch("gemm", replace(UP, ahead=0), replace(DOWN, ahead=1000))
    up, down, others, _ = fetched(launch, True)
    assert not (up or down or others)
