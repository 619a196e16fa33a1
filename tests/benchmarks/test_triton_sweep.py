"""What the compiler took for grids of tiles (``benchmarks/triton_tiles.json``), against what the model expects."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from moec.backends.triton.launches.device import device_of
from moec.backends.triton.launches.table import tiles_for
from moec.backends.triton.launches.tiles import Tile
from moec.backends.triton.launches.usage import BARRIER_BYTES, usage

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks"
LOSS = 0.05
"""Of the time of the best tile of a case."""


@pytest.fixture
def sweep(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(FOLDER))
    import triton_sweep

    return triton_sweep


def admitted(sweep: Any) -> list[tuple[Any, Tile]]:
    """The notes of tiles that the model may choose."""
    found = []
    for note in sweep.read(sweep.STORED):
        splits = 2 if note.kernel == sweep.SHARED else 1
        tile, device = replace(sweep.tile_of(note.tile), split_k=splits), device_of(note.target)
        parts, element = sweep.parts_of(note.kernel), sweep.element_of(note.layer)
        if tile in tiles_for(device, parts, element, (splits,), gathered=note.kernel == "up").tiles:
            found.append((note, tile))
    return found


def test_what_the_model_admits_spills_nothing_and_is_as_resident_as_expected(sweep: Any) -> None:
    notes = admitted(sweep)
    assert len(notes) > 800
    assert {n.kernel for n, _ in notes} == {*sweep.KERNELS, sweep.SHARED, sweep.HALVES}
    for note, tile in notes:
        device = device_of(note.target)
        up = note.kernel == "up"
        expected = usage(device, tile, sweep.parts_of(note.kernel), sweep.element_of(note.layer), gathered=up)
        assert note.registers, note
        assert note.spills == 0, note
        assert note.occupancy >= expected.resident, note
        assert note.columns == expected.columns, note
        room = BARRIER_BYTES if device.mma[0].shared else 0
        # Where the result takes more than operands do, what makes it contiguous may take less than all of it.
        result = not up and expected.shared <= tile.forms()[-1][0] * tile.block_n * 2 + BARRIER_BYTES
        assert 0 <= expected.shared - note.shared <= (expected.shared // 2 if result else room), note
        assert device.mma_for(tile.block_m, tile.num_warps).name.split(".")[0] in note.mma, note


def test_the_model_refuses_what_spills_for_a_reason(sweep: Any) -> None:
    """Half of the check above is that tiles which do not work are not admitted: there are some among the notes."""
    notes = sweep.read(sweep.STORED)
    own = {(n.target, n.layer, n.kernel, n.tile) for n, _ in admitted(sweep)}
    spilled = [n for n in notes if n.spills or not n.registers]
    assert len(spilled) >= 20
    assert not any((n.target, n.layer, n.kernel, n.tile) in own for n in spilled)


def test_the_models_choice_is_near_the_best_of_the_grid_in_forty_cases(sweep: Any) -> None:
    """Of both GEMMs; and in fp8 in 16."""
    notes = sweep.read(sweep.STORED)
    cases = sweep.cases()
    assert len(cases) == 2 * (40 + 16)
    least: dict[tuple[str, str, str], int] = {}
    for case in cases:
        judged = sweep.judge(*case, notes)
        assert judged.taken.spills == 0, case
        least[judged.taken.layer, case[1], case[3]] = judged.tiles
        assert judged.loss <= LOSS, (case, judged)
    assert sum(least.values()) >= 200, least
