"""Rows of real families, end to end, and every day a few more of them."""

from __future__ import annotations

import datetime
from functools import lru_cache

import pytest

from moec.coverage.families import Family, discover
from moec.coverage.measure import measure
from moec.coverage.row import YES, Row

A_DAY = 6  # families that a day's turn has


@lru_cache(maxsize=1)
def families() -> dict[str, Family]:
    return {f.name: f for f in discover()}


def row_of(name: str, *backends: str) -> Row:
    return list(measure(families()[name], backends))[-1]


def test_a_decorated_family() -> None:
    stages = list(measure(families()["granitemoe"], ("aten",)))
    row = stages[-1]
    assert [s.family for s in stages] == ["granitemoe"] * 4
    assert row.whole, row
    assert (row.how, row.found, row.backends) == ("interface", 2, ["aten"])
    assert row.routers == ["top-2 then softmax"]
    assert row.training == row.decode == YES
    assert not row.reasons


def test_an_undecorated_family() -> None:
    row = row_of("step3p7", "aten")
    assert row.whole, row
    assert not row.decorated
    assert row.how in ("rewritten", "as written")


def test_a_family_without_expert_gemms() -> None:
    row = row_of("doge", "aten")
    assert (row.how, row.found, row.recognised, row.fused, row.backends) == ("refused", 2, 0, 0, [])
    assert row.equal and row.no_extra_breaks
    assert row.training is row.decode is None
    assert any("no GEMM" in reason for reason in row.reasons)


def turn(day: int, slot: int) -> Family:
    """The family whose turn it is: all decorated ones in a row, ``A_DAY`` a day."""
    decorated = [f for f in families().values() if f.decorated]
    return decorated[(day * A_DAY + slot) % len(decorated)]


def test_every_family_has_its_turn() -> None:
    days = -(-len(families()) // A_DAY)
    seen = {turn(day, slot).name for day in range(days) for slot in range(A_DAY)}
    assert seen == {f.name for f in families().values() if f.decorated}


@pytest.mark.slow
@pytest.mark.parametrize("slot", range(A_DAY))
def test_families_of_the_day(slot: int) -> None:
    """Not parametrized by name: all processes of one run must list the same tests, also at midnight."""
    family = turn(datetime.date.today().toordinal(), slot)
    row = row_of(family.name, "cpu", "aten")
    assert row.all_fused, row
    assert row.no_extra_breaks, row
    assert row.equal, row
