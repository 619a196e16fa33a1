"""Whether a measurement is taken again is decided by the machine, by two rules that do not look at the measurement."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture
def steady() -> Iterator[ModuleType]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(FOLDER))
        yield importlib.import_module("steady")


@pytest.mark.parametrize(
    ("taken", "own", "pace", "says"),
    [
        (20.0, 20.0, 1.0, ""),
        (20.4, 20.0, 1.0, ""),
        (20.6, 20.0, 1.0, "other programs took 6% of a core"),
        (30.0, 10.0, 1.0, "other programs took 200% of a core"),
        (None, 20.0, 1.0, ""),
        (20.0, 20.0, 1.04, ""),
        (20.0, 20.0, 1.06, "the same work took +6% afterwards"),
        (None, 20.0, 0.9, "the same work took -10% afterwards"),
    ],
)
def test_rules(steady: ModuleType, taken: float | None, own: float, pace: float, says: str) -> None:
    before = steady.Look(100.0, None if taken is None else 1000.0, 50.0)
    after = steady.Look(110.0, None if taken is None else 1000.0 + taken, 50.0 + own)
    assert steady.unsteady(before, after, {"other work": (3.0, 3.03), "the same work": (2.0, 2.0 * pace)}) == says
    assert steady.unsteady(before, after, {}) == (says if "programs" in says else "")


def test_who_worked(steady: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = steady.own()
    while steady.own() < before + 0.1:
        pass
    monkeypatch.setattr(steady, "_STAT", tmp_path / "stat")
    assert steady.taken() is None
    steady._STAT.write_text("cpu  100 20 3 9999 999 4 5 6 0 0\ncpu0 1 1 1 1 1 1 1 1 0 0\n")
    assert steady.taken() == pytest.approx(138 / steady.os.sysconf("SC_CLK_TCK"))
