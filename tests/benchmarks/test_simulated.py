"""The simulator beside the clock: what is predicted for a layer without overlap can be added up by hand."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType

import pytest
import torch

from moec.cost.links import Link, busiest
from moec.passes import PassContext, PassManager

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks"
BESIDE = 0.02  # of the step at most: ops that are neither experts nor communication


@pytest.fixture
def simulated(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(FOLDER))
    return importlib.import_module("simulated")


@pytest.mark.parametrize("zipf", [False, True])
def test_a_layer_without_overlap(zipf: bool, simulated: ModuleType) -> None:
    link, sizes = Link(1e-3, 1e7), simulated.SIZES
    ids = simulated.routes(sizes, zipf)
    spread = sizes.graph()
    PassManager("expert-parallel", repro=None).run(spread, PassContext())
    seconds = simulated.predicted([spread, spread], simulated.machine(link), ids, False)
    rows = torch.stack([torch.bincount(i.flatten(), minlength=sizes.experts) for i in ids]).view(2, 2, -1)
    there = link.seconds(busiest(rows.sum(2).tolist()) * sizes.hidden * 4)
    counts = link.seconds(8 * sizes.experts / 2)
    curve, _ = simulated.asleep()
    experts = max(curve.seconds(rows[:, r].sum(0).tolist()) for r in range(2))
    assert 0 <= seconds / (counts + 2 * there + experts) - 1 < BESIDE
