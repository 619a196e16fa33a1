"""The search's benchmark, on few of its cases: every one within the page's promises."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def numbers() -> dict[str, Any]:
    sys.path.insert(0, str(FOLDER))
    try:
        import overlap_search  # type: ignore[import-not-found]
    finally:
        sys.path.remove(str(FOLDER))
    found: dict[str, Any] = overlap_search.summary(overlap_search.compare(range(15)))
    return found


def test_the_choice_is_the_best_of_all(numbers: dict[str, Any]) -> None:
    mine = numbers["policies"]["auto"]
    assert mine["mean"] < 0.01
    assert mine["worst"] < 0.05


def test_it_beats_every_rule(numbers: dict[str, Any]) -> None:
    for policy in ("none", "two", "tutel", "fsmoe"):
        assert numbers["policies"][policy]["mean"] > numbers["policies"]["auto"]["mean"] + 0.01
    assert numbers["auto_over_best_other"] <= 1.01
