"""Profiles: curves between their points, thread counts between the measured ones, and numbers without measuring."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moec.cost import GemmCurve, defaults_for
from moec.cost.machine import ITEM_BYTES, Overhead, at, rising
from moec.targets import known_targets, parse_target
from tests.cost.machines import ONE, TWO, overhead, round_machine

CPU_TARGETS = [t for t in known_targets() if t.startswith("cpu")]


def test_between_points() -> None:
    points = ((2, 10.0), (4, 30.0))
    assert [at(points, x) for x in (1, 2, 3, 3.5, 4, 9)] == [10, 10, 20, 25, 30, 30]


def test_a_curve_is_proportional_past_its_end_and_nothing_without_rows() -> None:
    assert ONE.seconds(3) == pytest.approx(4e-9)
    assert ONE.seconds(1024) == pytest.approx(2 * 513e-9)
    assert ONE.seconds(0) == 0


@given(st.lists(st.floats(0.001, 1000), min_size=1, max_size=20))
def test_rising_never_falls_and_keeps_the_sum(values: list[float]) -> None:
    got = [v for _, v in rising(list(enumerate(values)))]
    assert all(a <= b * (1 + 1e-12) for a, b in itertools.pairwise(got))
    assert sum(got) == pytest.approx(sum(values))
    if values == sorted(values):
        assert got == values


def test_measured_thread_counts_are_taken_as_they_are() -> None:
    machine = round_machine()
    assert machine.curve("bf16", "avx2", 1) is ONE
    assert machine.curve("bf16", "avx2", 2) is TWO


def test_between_thread_counts_the_ratio_to_the_limit_is_kept() -> None:
    # Both curves are at the same ratio to the limit of their threads, so any team is; bandwidth saturates at 2 GB/s.
    def curve(threads: int) -> GemmCurve:
        return GemmCurve("bf16", "avx2", threads, ((1, 1.5 * 2 / min(threads, 2)), (512, 1.5 * 256 / threads)))

    bandwidth = ((1, 1e9), (2, 2e9), (4, 2e9))
    machine = round_machine(bandwidth=bandwidth, curves=(curve(1), curve(4)))
    got = machine.curve("bf16", "avx2", 2)
    assert got.seconds(1) == pytest.approx(1.5e-9)
    assert got.seconds(512) == pytest.approx(1.5 * 128e-9)


def test_overheads_are_a_types_own_or_the_firsts() -> None:
    mine, other = overhead(((1, 1e-6),), ((1, 4e-9), (4, 1e-9))), Overhead("f32", ((1, 2e-6),), ((1, 8e-9),))
    machine = round_machine(overheads=(mine, other))
    assert [machine.row_byte_seconds("bf16", t) for t in (1, 2, 4, 8)] == pytest.approx([4e-9, 3e-9, 1e-9, 1e-9])
    assert [machine.task_seconds(d, 2) for d in ("bf16", "f32", "f16")] == [1e-6, 2e-6, 1e-6]


def test_an_unmeasured_type_gets_a_default_curve() -> None:
    machine = round_machine()
    assert machine.has_curve("bf16", "avx2")
    assert not machine.has_curve("f32", "avx2")
    assert not machine.has_curve("bf16", "avx512")
    assert machine.curve("f32", "avx2", 2).seconds(1) >= 4 / 2e9


@pytest.mark.parametrize("name", CPU_TARGETS)
@pytest.mark.parametrize("cores", [1, 2, 64])
def test_defaults_exist_for_every_cpu_target(name: str, cores: int) -> None:
    machine = defaults_for(parse_target(f"{name},cores={cores}"))
    assert not machine.calibrated
    for dtype in ITEM_BYTES:
        for threads in {1, cores}:
            curve = machine.curve(dtype, machine.isa, threads)
            assert all(
                ns * 1e-9 >= 0.999 * machine.floor(dtype, machine.isa, threads, rows) for rows, ns in curve.points
            )
        assert machine.curve(dtype, machine.isa, cores).seconds(512) <= machine.curve(dtype, machine.isa, 1).seconds(
            512
        )


def test_defaults_know_cpus_alone() -> None:
    with pytest.raises(ValueError, match="cuda:sm90 is no CPU"):
        defaults_for(parse_target("cuda:sm90"))


def test_a_profile_is_its_own_key() -> None:
    machine = round_machine()
    assert hash(machine) == hash(machine)
    assert machine != dataclasses.replace(machine)


def test_slower_memory_is_felt_by_few_rows_and_not_by_many() -> None:
    # 1e9 bytes and 1e9 operations a second and thread: one row is bound by memory, 512 by arithmetic, 2 by both.
    points = ((1, 2.0), (2, 4.0), (512, 1100.0))
    machine = round_machine(bandwidth=((1, 1e9),), curves=(GemmCurve("bf16", "avx2", 1, points),))
    peak = machine.flops_per_s("bf16", "avx2", 1)
    half = machine.with_memory(0.5)
    assert half.bytes_per_s(1) == 0.5e9
    assert half.curve("bf16", "avx2", 1).seconds(1) == pytest.approx(2e-9 * max(4e-9, 2 / peak) / max(2e-9, 2 / peak))
    assert half.curve("bf16", "avx2", 1).seconds(512) == pytest.approx(1100e-9)
    assert machine.with_memory(1.0).curve("bf16", "avx2", 1).points == points
