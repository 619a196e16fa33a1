"""Predicted times: worked out by hand, monotone, and the same from a histogram as from a number of tokens."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moec.cost import LayerShape, defaults_for, predict, threads_for
from moec.targets import parse_target
from tests.cost.machines import overhead, round_machine

# 64 x (2 x 100 + 50) = 16 000 elements an expert; one task in either GEMM.
SMALL = LayerShape(hidden=100, inner=64, width=50, experts=4, top_k=2)
LAYER = LayerShape(hidden=1024, inner=512, width=1024, experts=32, top_k=4)
MACHINES = [
    round_machine(overheads=(overhead(((1, 1e-7),), ((1, 1e-10),)),)),
    defaults_for(parse_target("cpu:avx512,cores=8")),
]


def test_by_hand_on_one_thread() -> None:
    time = predict(SMALL, [0, 1, 0, 3], round_machine(), 1)
    gemm = 16_000 * (2.0 + 4.0) * 1e-9
    assert time.seconds == pytest.approx(gemm + 100e-6)
    assert time.weight_bytes == 2 * 16_000 * 2
    assert time.flops == 2 * 4 * 16_000
    assert time.memory_seconds == pytest.approx(64e-6)
    assert time.compute_seconds == pytest.approx(32e-6)
    assert time.limit_seconds == time.memory_seconds
    assert time.overhead_seconds == pytest.approx(100e-6)
    assert time.bound == "overhead"


def test_every_kind_of_overhead_by_hand() -> None:
    machine = round_machine(overheads=(overhead(((1, 1e-6), (2, 3e-7)), ((1, 1e-9), (2, 0.5e-9))),))
    time = predict(SMALL, [0, 1, 0, 3], machine, 1)
    moved = (4 * (2 * 100 + 50) + 2 * 50) * 2
    tasks = 2 * (1 + 1)
    assert time.overhead_seconds == pytest.approx(100e-6 + tasks * 1e-6 + moved * 1e-9)
    two = predict(SMALL, [0, 1, 0, 3], machine, 2).overhead_seconds
    none = predict(SMALL, [0, 1, 0, 3], round_machine(), 2).overhead_seconds
    assert two - none == pytest.approx(tasks * 3e-7 + moved * 0.5e-9)


def test_two_threads_wait_for_the_longest_task() -> None:
    # One expert is one task in either GEMM: the second thread has nothing to do, and its half is waited for.
    time = predict(SMALL, [3, 0, 0, 0], round_machine(), 2)
    assert time.seconds == pytest.approx(16_000 * 4.0e-9 + 110e-6)
    # With many tasks the end is on average a quarter of a task after the mean.
    wide = LayerShape(100, 6400, 6400, 4, 2)
    many = predict(wide, [1, 1, 1, 1], round_machine(), 2)
    gemm = 4 * wide.elements * 1e-9
    tasks = 64 * (2 * 100 + 6400)
    assert many.seconds == pytest.approx(gemm + tasks * 2e-9 / 4 + 110e-6)


def test_what_binds() -> None:
    machine = round_machine(call_seconds=1e-9, barriers=((1, 0.0),))
    assert predict(LAYER, 1, machine, 1).bound == "memory"
    assert predict(LAYER, 2048, machine, 1).bound == "compute"
    assert predict(LAYER, 1, round_machine(call_seconds=1.0), 1).bound == "overhead"


def test_a_call_without_tokens_is_the_call_alone() -> None:
    for load in (0, [0] * 32):
        time = predict(LAYER, load, round_machine(), 2)
        assert (time.seconds, time.weight_bytes, time.flops) == (100e-6, 0, 0)


@pytest.mark.parametrize(
    ("load", "threads", "message"),
    [([1, 2], 1, "histogram of 32 experts"), ([-1] + [1] * 31, 1, "histogram of 32"), (4, 0, "0 threads")],
)
def test_impossible_calls(load: int | list[int], threads: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        predict(LAYER, load, round_machine(), threads)


@pytest.mark.parametrize("machine", MACHINES, ids=lambda m: m.name)
@pytest.mark.parametrize("threads", [1, 2, 5])
def test_more_tokens_never_take_less(machine: object, threads: int) -> None:
    tokens = [*range(1, 140), 255, 256, 257, 1000, 4095, 4096, 4097, 20_000]
    times = [predict(LAYER, t, machine, threads) for t in tokens]  # type: ignore[arg-type]
    for a, b in itertools.pairwise(times):
        assert a.seconds <= b.seconds * (1 + 1e-6)
        assert a.weight_bytes <= b.weight_bytes * (1 + 1e-6)
        assert a.limit_seconds <= b.limit_seconds * (1 + 1e-6)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(0, 2000), min_size=32, max_size=32), st.integers(0, 31), st.sampled_from(MACHINES))
def test_one_more_row_never_takes_less(rows: list[int], expert: int, machine: object) -> None:
    more = list(rows)
    more[expert] += 1
    before, after = (predict(LAYER, h, machine, 2) for h in (rows, more))  # type: ignore[arg-type]
    assert before.seconds <= after.seconds * (1 + 1e-12)


def test_larger_weights_take_longer() -> None:
    shapes = [LayerShape(h, i, h, 8, 2, parts, d) for h in (64, 256) for i in (64, 512) for parts in (1, 2)
              for d in ("bf16",)]  # fmt: skip
    times = [predict(s, 16, round_machine(), 2) for s in shapes]
    for (s, a), (r, b) in itertools.product(zip(shapes, times, strict=True), repeat=2):
        if s.elements < r.elements:
            assert a.weight_bytes < b.weight_bytes
            assert a.memory_seconds < b.memory_seconds


@pytest.mark.parametrize("tokens", [1, 7, 64, 1000])
def test_tokens_are_the_mean_of_drawn_histograms(tokens: int) -> None:
    generator = torch.Generator().manual_seed(0)
    machine, drawn = round_machine(), []
    for _ in range(400):
        ids = torch.rand(tokens, LAYER.experts, generator=generator).topk(LAYER.top_k).indices
        drawn.append(predict(LAYER, torch.bincount(ids.flatten(), minlength=LAYER.experts).tolist(), machine, 1))
    want = predict(LAYER, tokens, machine, 1)
    assert sum(d.seconds for d in drawn) / len(drawn) == pytest.approx(want.seconds, rel=0.01)
    assert sum(d.weight_bytes for d in drawn) / len(drawn) == pytest.approx(want.weight_bytes, rel=0.01)
    assert all(d.flops == want.flops for d in drawn)


def test_expected_experts_in_closed_form() -> None:
    for tokens in (1, 3, 50, 5000):
        touched = predict(LAYER, tokens, round_machine(), 1).weight_bytes / (LAYER.elements * 2)
        assert touched == pytest.approx(32 * (1 - (1 - 4 / 32) ** tokens), rel=1e-6)
    dense = LayerShape(64, 64, 64, experts=4, top_k=4)
    assert predict(dense, 5, round_machine(), 1) == predict(dense, [5, 5, 5, 5], round_machine(), 1)


def test_skew_costs_time_where_memory_binds_less_and_tasks_wait() -> None:
    machine = round_machine()
    even, one = [4] * 32, [128] + [0] * 31
    assert predict(LAYER, one, machine, 2).weight_bytes == predict(LAYER, even, machine, 2).weight_bytes / 32
    assert predict(LAYER, one, machine, 2).flops == predict(LAYER, even, machine, 2).flops


def test_threads_for_small_and_large_calls() -> None:
    machine = round_machine(barriers=((1, 0.0), (2, 200e-6)))
    tiny, big = LayerShape(64, 64, 64, 4, 1), LAYER
    assert threads_for(tiny, 1, machine, 2) == 1
    assert threads_for(big, 1, machine, 2) == 2
    assert threads_for(big, 512, machine, 1) == 1
    slow_team = round_machine(bandwidth=((1, 1e9), (2, 2e9), (8, 2e9)), barriers=((1, 0.0), (2, 1e-6), (8, 1.0)))
    assert threads_for(big, 1, slow_team, 8) in (2, 4)
