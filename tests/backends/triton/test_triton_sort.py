"""Sorting and alignment on the device: every slot in its expert's rows, in order, whatever the counts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from moec.backends.base import program_op
from moec.backends.triton.kernels.sort import CHUNK, most_blocks
from moec.backends.triton.kernels.source import write_experts
from moec.backends.triton.launcher import Launcher
from moec.backends.triton.launches.tiles import Tile
from moec.backends.triton.run import Run, Values
from moec.backends.triton.spec import read_spec
from tests.backends.cases import ExpertsCase
from tests.backends.triton.layers import GEMM, dirty_memory, replaced

pytestmark = pytest.mark.usefixtures("interpreter")


def _placed(
    ids: Tensor,
    experts: int,
    block_m: int,
    tiles: tuple[Tile, Tile] | None = None,
    change: Callable[[str], str] = lambda text: text,
) -> Values:
    tokens, top_k = ids.shape
    spec = read_spec(program_op(ExpertsCase(experts=experts, top_k=top_k).graph()))
    file = write_experts(spec, True)
    launcher = Launcher(replace(file, text=change(file.text)))
    with dirty_memory():
        placed = Run(spec, GEMM, launcher, tokens).sort(ids, block_m, *([tiles] if tiles else []))
    assert int(placed["used"][0]) <= most_blocks(tokens * top_k, experts, block_m)
    return placed


def _sorted(
    ids: Tensor, experts: int, block_m: int, change: Callable[[str], str] = lambda text: text
) -> tuple[list[int], list[int]]:
    """Slots of all rows, -1 for none, and the expert of every block."""
    placed = _placed(ids, experts, block_m, change=change)
    used = int(placed["used"][0])
    return placed["rows"][: used * block_m].tolist(), placed["experts"][:used].tolist()


def _expected(ids: Tensor, experts: int, block_m: int) -> tuple[list[int], list[int]]:
    rows: list[int] = []
    blocks: list[int] = []
    flat = ids.flatten().tolist()
    for expert in range(experts):
        own = [slot for slot, e in enumerate(flat) if e == expert]
        own += [-1] * (-len(own) % block_m)
        rows += own
        blocks += [expert] * (len(own) // block_m)
    return rows, blocks


CASES = {
    "one slot": (torch.tensor([[2]]), 5),
    "nobody chooses anything": (torch.tensor([[-1, 7], [9, 5]]), 5),
    "sentinels of any size": (torch.tensor([[0, 2**40], [-(2**40), 4]]), 5),
    "one expert": (torch.zeros(50, 1, dtype=torch.int64), 1),
    "one takes all": (torch.full((130, 3), 4), 5),
    "one chunk and a slot": (torch.arange(CHUNK + 1)[:, None] % 7, 8),
    "all over": (torch.randint(-1, 6, (150, 3), generator=torch.Generator().manual_seed(0)), 5),
    "more experts than slots": (torch.randint(0, 300, (20, 4), generator=torch.Generator().manual_seed(1)), 300),
    "few slots of many blocks": (torch.arange(60)[:, None], 300),
}


@pytest.mark.parametrize("block_m", [16, 32])
@pytest.mark.parametrize("name", CASES)
def test_rows_of_slots(name: str, block_m: int) -> None:
    ids, experts = CASES[name]
    assert _sorted(ids, experts, block_m) == _expected(ids, experts, block_m)


def places(owners: list[int], units: int, columns: int, group: int, late_from: int) -> list[tuple[int, int, int, int]]:
    """First block, expert, column and blocks of every program's tile, in order."""
    tiles: list[tuple[int, int, int]] = []
    for expert in sorted(set(owners)):
        first, count = owners.index(expert), owners.count(expert)
        tiles += [(first + at, expert, min(units, count - at)) for at in range(0, count, units)]
    late = sorted((t for t in tiles if t[2] < units and t[1] >= late_from), key=lambda t: -t[2])
    early = [t for t in tiles if t not in late]
    found = []
    for begin in range(0, len(early), group):
        found += [(f, e, c, n) for c in range(columns) for f, e, n in early[begin : begin + group]]
    return found + [(f, e, c, n) for f, e, n in late for c in range(columns)]


def _tiles(units: int) -> tuple[Tile, Tile]:
    """Of the up GEMM 4 columns in groups of 3, its last 3 experts late; of the down GEMM 3 in groups of 4, none."""
    return Tile(16, 2, 16, 3, units=units, late=3), Tile(16, 5, 16, 4, units=units)


def _differs(ids: Tensor, experts: int, units: int, change: Callable[[str], str] = lambda text: text) -> bool:
    """Whether programs have other tiles than they should."""
    placed = _placed(ids, experts, 16, _tiles(units), change)
    _, owners = _expected(ids, experts, 16)
    row_tiles = most_blocks(ids.numel(), experts, 16 * units)
    wanted = {"up": (4, 3, experts - 3), "down": (3, 4, experts)}
    for gemm, (columns, group, late_from) in wanted.items():
        expected = places(owners, units, columns, group, late_from)
        got = placed[f"{gemm}_places"].tolist()
        assert len(got) == row_tiles * columns
        tiles = [(p >> 35, p >> 19 & 65535, p >> 3 & 65535, p & 7) for p in got[: len(expected)]]
        if tiles != expected or set(got[len(expected) :]) > {-1}:
            return True
    return False


@pytest.mark.parametrize("units", [2, 3, 4])
@pytest.mark.parametrize("name", CASES)
def test_tiles_of_several_blocks(name: str, units: int) -> None:
    """Each tile has so many blocks of one expert, but an expert's last, which has what is left; those may come last."""
    assert not _differs(*CASES[name], units)


PLACE_MUTANTS = {
    "low tiles of early experts": ("(rest > 0) & (expert < EARLY)", "(rest > 0) & (expert <= EARLY)"),
    "low tiles that come last": ("late = (rest > 0) & (expert >= EARLY)", "late = (rest > 0) & (expert > EARLY)"),
    "highest first": ("rest == UNITS - lower", "rest == lower"),
    "first block of a low tile": ("blocks + units - rest", "blocks + units"),
    "first block of a tile": ("earlier = (tile - tl.gather(ends - count, owner, 0)) * UNITS", "earlier = 0 * tile"),
    "columns of a group": ("column * size + tile - group", "column * GROUP + tile - group"),
    "groups": ("group = tile // GROUP * GROUP", "group = tile // GROUP"),
    "columns of low tiles": ("rank * COLUMNS + column", "rank * COLUMNS"),
    "programs without a tile": ("(tile >= grouped + lows)", "(tile > grouped + lows)"),
}


@pytest.mark.parametrize("name", PLACE_MUTANTS)
def test_a_wrong_order_of_tiles_shows(name: str) -> None:
    many = torch.randint(0, 6, (150, 3), generator=torch.Generator().manual_seed(2)) % 5
    assert _differs(many, 6, 3, replaced(*PLACE_MUTANTS[name]))


MUTANTS = {
    "rank": ("(other[None, :] < i[:, None])", "(other[None, :] <= i[:, None])"),
    "slots of a rank": ("other = begin + ", "other = "),
    "dead rows": ("row >= past[:, None]", "row > past[:, None]"),
    "expert of a block": ("found + step - 1, 0) <= x", "found + step - 1, 0) < x"),
    "bisection": ("step = step // 2", "step = step // 4"),
    "dead rows of a large block": ("block[:, None] * BLOCK_M + begin", "block[:, None] * BLOCK_M"),
    "alignment": ("ends - tl.cdiv(total, BLOCK_M) * BLOCK_M", "ends - total"),
    "slots past the end": ("mask=slot < slots_n", "mask=slot <= slots_n"),
    "slots of earlier chunks": ("before + tl.cumsum(here, 0) - here", "before + tl.cumsum(here, 0)"),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_a_wrong_index_shows(name: str) -> None:
    ids, experts = torch.randint(-1, 6, (150, 3), generator=torch.Generator().manual_seed(0)), 5
    following = torch.cat([ids, torch.zeros(1, 3, dtype=torch.int64)])[:150]  # what lies past the end is an expert

    try:
        got = _sorted(following, experts, 32, replaced(*MUTANTS[name]))
    except AssertionError:
        return  # more blocks than there can be
    assert got != _expected(ids, experts, 32)
