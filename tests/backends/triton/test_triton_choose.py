"""Launch parameters: within the hardware's limits, monotone where physics says so, near the roofline."""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest

from moec.backends.triton.launches.choose import Choice, Layer, load_of, pick, ranked
from moec.backends.triton.launches.device import Device, device_of, gpu_targets
from moec.backends.triton.launches.gemm_time import makespan, times
from moec.backends.triton.launches.load import counted
from moec.backends.triton.launches.table import tiles_for
from moec.backends.triton.launches.tiles import Tile
from moec.backends.triton.launches.usage import fits, usage
from moec.targets import TargetError

REAL = {
    "OLMoE": Layer(2048, 1024, 2048, 64, 8),
    "Qwen3-30B-A3B": Layer(2048, 768, 2048, 128, 8),
    "gpt-oss-20b": Layer(2880, 2880, 2880, 32, 4),
    "Mixtral-8x7B": Layer(4096, 14336, 4096, 8, 2),
    "DeepSeek-V3": Layer(7168, 2048, 7168, 256, 8),
}
NEAR = 1.4
"""Times the roofline, at most, from 1024 tokens on."""
SCHEDULE = 0.05
"""Of a schedule's length, that the expectation is off at most."""
LARGE = (1024, 2048, 4096, 8192, 16384)
EXACT = 1 - 1e-9


def random_layer(generator: np.random.Generator) -> tuple[Layer, int]:
    hidden, inner, width = (int(generator.integers(1, 256)) * 16 for _ in range(3))
    experts = int(generator.integers(1, 257))
    top_k = int(generator.integers(1, min(16, experts) + 1))
    dtype = str(generator.choice(["bf16", "f16", "f32", "f8e4m3fn"]))
    tokens = int(2 ** generator.uniform(0, 15))
    return Layer(hidden, inner, width, experts, top_k, int(generator.integers(1, 3)), dtype), tokens


def within(device: Device, tile: Tile, parts: int, dtype: str, gathered: bool) -> bool:
    """The limits, written out once more."""
    taken = usage(device, tile, parts, dtype, gathered=gathered)
    lanes = tile.num_warps * device.warp
    return (
        taken.shared <= device.shared_block
        and taken.resident * (taken.shared + device.shared_reserved) <= device.shared
        and taken.registers <= device.thread_registers
        and taken.resident * taken.registers * lanes <= device.registers
        and taken.resident * tile.num_warps <= device.warps
        and taken.resident * taken.columns <= device.tensor_columns
        and 1 <= taken.resident <= device.blocks
        and lanes <= 1024
        and tile.rows * tile.block_n * parts <= 1 << 20
        and tile.block_m * tile.units <= max(sum(form) for form in tile.forms())
    )


@pytest.mark.parametrize("cases", [500, pytest.param(10_000, marks=pytest.mark.slow)])
def test_no_choice_is_outside_the_hardware(cases: int) -> None:
    generator = np.random.default_rng(8)
    devices = [device_of(t) for t in gpu_targets()]
    for case in range(cases):
        layer, tokens = random_layer(generator)
        device = devices[case % len(devices)]
        launch = pick(layer, tokens, device)
        assert within(device, launch.up, layer.parts, layer.dtype, True), (layer, tokens, device.target.name)
        assert within(device, launch.down, 1, layer.dtype, False), (layer, tokens, device.target.name)
        assert (launch.up.block_m, launch.up.units) == (launch.down.block_m, launch.down.units)
        assert launch.seconds >= launch.limit_seconds > 0


def test_a_tile_too_large_does_not_fit() -> None:
    sm80 = device_of("cuda:sm80")
    assert not fits(sm80, Tile(256, 256, 128, 1, 8, 4), 2, "bf16")
    assert not fits(device_of("cuda:sm100"), Tile(256, 256, 32, 1, 8, 2), 2, "bf16")  # 1024 columns of tensor memory
    assert not fits(sm80, Tile(128, 128, 32, 1, 4, 2), 2, "bf16")  # 256 registers for sums alone
    assert fits(sm80, Tile(64, 64, 32, 1, 4, 3), 2, "bf16")


def grown(layer: Layer, what: str, to: int) -> Layer:
    return replace(layer, hidden=to, width=to) if what == "hidden" else replace(layer, inner=to)


@pytest.mark.parametrize("target", gpu_targets())
def test_more_tokens_never_take_less_time(target: str) -> None:
    device = device_of(target)
    for layer in REAL.values():
        times = [pick(layer, t, device).seconds for t in (0, 1, 2, 3, 7, 8, 60, 64, 65, 127, 128, 129, 900, 1024, 5000)]
        assert times == sorted(times)


@pytest.mark.parametrize("what", ["hidden", "inner"])
def test_a_wider_layer_never_takes_less_time(what: str) -> None:
    for target in gpu_targets():
        for tokens in (1, 48, 2000):
            layers = [grown(REAL["OLMoE"], what, to) for to in (64, 72, 80, 512, 520, 1000, 1024, 1040, 4096, 5000)]
            times = [pick(layer, tokens, device_of(target)).seconds for layer in layers]
            assert all(b >= a * EXACT for a, b in pairwise(times)), (target, tokens, times)


def test_more_bandwidth_never_takes_more_time() -> None:
    for target in gpu_targets():
        device = device_of(target)
        for layer in REAL.values():
            for tokens in (1, 100, 4000):
                times = []
                for factor in (0.5, 1.0, 1.1, 2.0, 8.0):
                    faster = replace(device.target, memory_bandwidth=device.target.memory_bandwidth * factor)
                    times.append(pick(layer, tokens, replace(device, target=faster)).seconds)
                assert times == sorted(times, reverse=True)
                assert tokens != 100 or times[0] > times[1]  # it is memory that binds there


@pytest.mark.parametrize("target", gpu_targets())
def test_weights_that_lie_apart_are_not_fetched_before_a_tile_begins(target: str) -> None:
    device, load = device_of(target), load_of(REAL["OLMoE"], 4096)
    for gemm in REAL["OLMoE"].gemms:
        table = tiles_for(device, gemm.parts, gemm.dtype, (1,), gemm.biased, gemm.gathered, apart=True)
        stacked, apart = (times(replace(gemm, apart=a), load, device, table).unit for a in (False, True))
        tall = np.array([tile.units > 1 for tile in table.tiles])
        assert (apart[~tall] == stacked[~tall]).all()
        assert (apart >= stacked * EXACT).all()
        if device.mma[0].shared:  # there are descriptors
            assert (apart[tall] > stacked[tall]).any()
        else:
            assert (apart == stacked).all()


def near(choice: Choice) -> float:
    return choice.seconds / choice.limit_seconds


@pytest.mark.parametrize("target", gpu_targets())
@pytest.mark.parametrize("name", REAL)
def test_real_layers_come_near_the_roofline(name: str, target: str) -> None:
    for tokens in LARGE:
        assert near(pick(REAL[name], tokens, device_of(target))) <= NEAR, tokens


def scheduled(lengths: Sequence[float], machines: int) -> float:
    """When all are done that are taken in order by the next machine that is free."""
    ends = [0.0] * machines
    for length in lengths:
        heapq.heappush(ends, heapq.heappop(ends) + length)
    return max(ends)


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize(("experts", "columns", "rows"), [(64, 8, 512), (32, 23, 512), (8, 32, 1024), (128, 6, 256)])
def test_tiles_of_several_heights_end_when_a_schedule_of_them_does(
    experts: int, columns: int, rows: int, late: bool
) -> None:
    """An expert's tiles have 192 rows but the last; every column has them one after another, as in the kernels. Low
    tiles of the last experts may come after all others, highest first."""
    lengths = np.array([10.0, 14.0, 17.0])
    generator = np.random.default_rng(4)
    counts = [generator.multinomial(experts * rows, [1 / experts] * experts) for _ in range(8)]
    heights = [[[3] * (-(-n // 64) // 3) + ([r] if (r := -(-n // 64) % 3) else []) for n in c] for c in counts]
    tail = min(experts, -(-132 // columns)) if late else 0

    def order(each: list[list[int]]) -> list[int]:
        last = [h for e in each[experts - tail :] for h in e if h < 3]
        early = [[h for h in e if h == 3 or at < experts - tail] for at, e in enumerate(each)]
        first = [h for e in early for _ in range(columns) for h in e]
        return first + [h for h in sorted(last, reverse=True) for _ in range(columns)]

    seen = [scheduled([lengths[h - 1] for h in order(each)], 132) for each in heights]
    blocks = sum(counted(list(c)).blocks(64, 3) for c in counts) * columns / len(counts)
    lows = blocks[:2].sum() * tail / experts
    (told,) = makespan(blocks[:, None], lengths[:, None], np.array([2]), np.array([132.0]), np.array([lows]))
    assert told == pytest.approx(np.mean(seen), rel=SCHEDULE)


def test_short_tiles_come_last_where_that_costs_no_memory() -> None:
    """All 8 experts' weights would be read twice where reading them once takes the most time."""
    device = device_of("cuda:sm90")
    assert pick(REAL["OLMoE"], 4096, device).down.late == -(-device.units // 8)
    choice = pick(REAL["Mixtral-8x7B"], 1024, device)
    assert (choice.down.late, choice.down.ahead) == (0, device.units)


def test_equal_tiles_take_whole_waves() -> None:
    for tiles, waves in ((1, 1), (132, 1), (133, 2), (264, 2)):
        one = np.array([[float(tiles)]])
        assert makespan(one, np.array([[7.0]]), np.array([0]), np.array([132.0]), np.zeros(1)) == [7.0 * waves]


def test_tiny_tiles_are_far_from_it() -> None:
    device, layer = device_of("cuda:sm90"), REAL["Mixtral-8x7B"]
    by_rows = {launch.up.rows: near(launch) for launch in ranked(layer, load_of(layer, 16384), device)}
    assert by_rows[192] < NEAR < 2 < by_rows[16]


def test_one_busy_expert_takes_longer_than_even_routing() -> None:
    device, layer = device_of("cuda:sm90"), REAL["OLMoE"]
    even, skewed = pick(layer, 4096, device), pick(layer, [4096 * 8, *[0] * 63], device)
    assert skewed.limit_seconds < even.limit_seconds  # one expert's weights are read
    assert skewed.bound == "compute"


def test_decode_is_bound_by_memory_and_prefill_by_arithmetic() -> None:
    device, layer = device_of("cuda:sm90"), REAL["OLMoE"]
    assert (pick(layer, 1, device).bound, pick(layer, 65536, device).bound) == ("memory", "compute")


def test_a_cpu_is_no_gpu() -> None:
    with pytest.raises(TargetError, match="cpu:avx2 is no GPU"):
        device_of("cpu:avx2")
