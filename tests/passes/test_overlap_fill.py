"""What stands beside a layer goes where a rank would be idle: closed forms, and never later than outside."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moec.cost.curve import LayerCurve
from moec.cost.links import Link
from moec.passes.overlap.cuts import Layer
from moec.passes.overlap.fill import FRONT, PIECES, Beside, auto_filled, fill, timed
from moec.passes.overlap.policies import Schedule, auto, uncut
from moec.passes.overlap.timeline import Chunk, makespan


class Line:
    """``seconds`` for all of 8 tokens, in proportion."""

    def __init__(self, seconds: float) -> None:
        self.whole = seconds

    def seconds(self, loads: list[float]) -> float:
        return self.whole * sum(loads) / 8


def beside(seconds: float, ranks: int = 1, whole: bool = False) -> Beside:
    return Beside((Line(seconds),), (8.0,) * ranks, whole)


def one(there: float, compute: float, back: float) -> Schedule:
    chunk = Chunk(there, (compute,), back)
    return Schedule("experts", (1,), False, (chunk,), makespan([chunk]))


@pytest.mark.parametrize(
    ("there", "back", "extra", "seconds"),
    [(3, 1, 2, 3 + 5 + 1), (1, 3, 2, 1 + 5 + 3), (2, 2, 4, 2 + 5 + 2), (0, 0, 4, 5 + 4), (1, 1, 4, 5 + 4)],
)
def test_one_chunk(there: float, back: float, extra: float, seconds: float) -> None:
    found = fill(one(there, 5, back), beside(extra))
    assert found.schedule.seconds == pytest.approx(seconds)
    assert sum(pieces for _, pieces in found.places) == PIECES


def test_whole_it_is_on_the_longer_side() -> None:
    assert fill(one(3, 5, 1), beside(4, whole=True)).places == FRONT
    assert fill(one(1, 5, 3), beside(4, whole=True)).places == ((1, PIECES),)
    assert fill(one(1, 5, 3), beside(4, whole=True)).schedule.seconds == 1 + 5 + 4


def test_between_chunks_where_the_first_has_a_long_way_home() -> None:
    chunks = (Chunk(1, (2,), 4), Chunk(1, (2,), 1))
    found = fill(Schedule("experts", (1, 1), False, chunks, makespan(chunks)), beside(2, whole=True))
    assert found.places == ((1, PIECES),) and found.schedule.seconds == makespan(chunks) == 8


def random_layer(rng: random.Random) -> Layer:
    ranks, own = rng.randint(2, 4), rng.randint(1, 4)
    rows = [[float(rng.randint(0, 40)) for _ in range(ranks * own)] for _ in range(ranks)]
    curve = LayerCurve(rng.uniform(0, 2), ((1.0, rng.uniform(0.1, 3)), (64.0, rng.uniform(3, 9))))
    return Layer(rows, (own,) * ranks, curve, Link(rng.uniform(0, 2), rng.uniform(5, 200)), 1.0, 1.0)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**9))
def test_it_never_ends_later_than_with_that_outside_nor_sooner_than_the_work_takes(seed: int) -> None:
    rng = random.Random(seed)
    layer = random_layer(rng)
    extra = beside(rng.uniform(0, 20), len(layer.sizes), whole=rng.random() < 0.5)
    allowed = ("experts", "tokens")
    outside = auto(layer, allowed).seconds + max(extra.chunk().compute)
    found = auto_filled(layer, allowed, extra)
    assert found.schedule.seconds <= outside + 1e-9
    assert found.schedule.seconds <= fill(uncut(layer), extra).schedule.seconds + 1e-9
    busy = [sum(c) for c in zip(*(c.compute for c in timed(found.schedule.chunks, extra, found.places)), strict=True)]
    assert found.schedule.seconds >= max(busy) - 1e-9
    assert len(found.places) == 1 or not extra.whole
