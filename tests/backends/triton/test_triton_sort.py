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
from moec.backends.triton.run import Run, Values
from moec.backends.triton.spec import read_spec
from tests.backends.cases import ExpertsCase
from tests.backends.triton.layers import GEMM, dirty_memory

pytestmark = pytest.mark.usefixtures("interpreter")


def _placed(
    ids: Tensor, experts: int, block_m: int, units: int = 1, change: Callable[[str], str] = lambda text: text
) -> Values:
    tokens, top_k = ids.shape
    spec = read_spec(program_op(ExpertsCase(experts=experts, top_k=top_k).graph()))
    file = write_experts(spec, True)
    launcher = Launcher(replace(file, text=change(file.text)))
    with dirty_memory():
        placed = Run(spec, GEMM, launcher, tokens).sort(ids, block_m, units)
    assert int(placed["used"][0]) <= most_blocks(tokens * top_k, experts, block_m)
    return placed


def _sorted(
    ids: Tensor, experts: int, block_m: int, change: Callable[[str], str] = lambda text: text
) -> tuple[list[int], list[int]]:
    """Slots of all rows, -1 for none, and the expert of every block."""
    placed = _placed(ids, experts, block_m, 1, change)
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


@pytest.mark.parametrize("units", [2, 3, 4])
@pytest.mark.parametrize("name", CASES)
def test_tiles_of_several_blocks(name: str, units: int) -> None:
    """Each tile has so many blocks of one expert, but an expert's last, which has what is left."""
    ids, experts = CASES[name]
    placed = _placed(ids, experts, 16, units)
    rows, owners = _expected(ids, experts, 16)
    assert placed["rows"][: len(rows)].tolist() == rows
    places: list[tuple[int, int]] = []
    for first, owner in enumerate(owners):
        new = not places or (sum(places[-1]) == first and (places[-1][1] == units or owners[places[-1][0]] != owner))
        places = [*places, (first, 1)] if new else [*places[:-1], (places[-1][0], places[-1][1] + 1)]
    programs = most_blocks(ids.numel(), experts, 16 * units)
    expected = [4 * first + count % 4 for first, count in places]
    assert placed["places"][:programs].tolist() == expected + [-1] * (programs - len(expected))


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
    old, new = MUTANTS[name]
    ids, experts = torch.randint(-1, 6, (150, 3), generator=torch.Generator().manual_seed(0)), 5
    following = torch.cat([ids, torch.zeros(1, 3, dtype=torch.int64)])[:150]  # what lies past the end is an expert

    def change(text: str) -> str:
        assert old in text
        return text.replace(old, new)

    try:
        got = _sorted(following, experts, 32, change)
    except AssertionError:
        return  # more blocks than there can be
    assert got != _expected(ids, experts, 32)
