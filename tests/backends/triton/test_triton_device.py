"""Descriptions of GPUs: occupancy by hand, unknown devices by what they say of themselves."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest

from moec.backends.triton.launches.device import KIB, device_of, gpu_targets, is_gpu
from moec.backends.triton.launches.here import Properties, described, device_for, known_kind, read_properties
from moec.targets import TargetError, described_as, known_targets


@pytest.mark.parametrize("target", gpu_targets())
def test_peaks_are_those_of_whole_instructions(target: str) -> None:
    device = device_of(target)
    a_cycle = device.unit_flops("bf16")
    power = 1 << round(a_cycle).bit_length() - 1
    nearest = min((power, 2 * power), key=lambda p: abs(p - a_cycle))
    assert a_cycle == pytest.approx(nearest, rel=0.02)  # units multiply powers of two a cycle


@pytest.mark.parametrize(
    ("target", "shared", "registers", "warps", "blocks"),
    [
        ("cuda:sm80", 0, 32, 4, 16),  # 64 warps
        ("cuda:sm80", 50 * KIB, 32, 4, 3),  # 3 x 51 KiB of 164
        ("cuda:sm80", 0, 255, 4, 2),  # 2 x 128 threads x 256 registers
        ("cuda:sm89", 0, 32, 1, 24),  # blocks
        ("cuda:sm90", 200 * KIB, 255, 8, 1),
        ("cuda:sm90", 0, 168, 8, 1),  # 65536 // (256 x 168)
        ("hip:gfx942", 33 * KIB, 64, 4, 1),
        ("hip:gfx942", 0, 512, 4, 1),
    ],
)
def test_occupancy(target: str, shared: int, registers: int, warps: int, blocks: int) -> None:
    assert device_of(target).resident(shared, registers, warps) == blocks


def test_the_instruction_goes_by_rows() -> None:
    sm90 = device_of("cuda:sm90")
    assert [sm90.mma_for(m, w).name for m, w in ((16, 4), (64, 4), (64, 2))] == [
        "mma.sync",
        "wgmma.mma_async",
        "mma.sync",
    ]
    assert device_of("cuda:sm100").mma_for(128, 4).name == "tcgen05.mma"
    assert device_of("hip:gfx942").mma_for(16, 4).name == "v_mfma"


@pytest.mark.parametrize(
    ("target", "kind"),
    [
        ("cuda:sm90", "cuda:sm90"), ("cuda:sm86", "cuda:sm89"), ("cuda:sm103", "cuda:sm100"),
        ("cuda:sm120", "cuda:sm89"), ("cuda:sm75", "cuda:sm80"), ("cuda:sm130", "cuda:sm89"),
        ("hip:gfx90a", "hip:gfx942"),
    ],
)  # fmt: skip
def test_an_unknown_device_is_like_a_known_one(target: str, kind: str) -> None:
    assert known_kind(target) == kind
    assert is_gpu(target)
    assert device_for(target).target.flops == device_of(kind).target.flops


@pytest.mark.parametrize("target", [t for t in known_targets() if is_gpu(t) and t not in gpu_targets()])
def test_a_gpu_without_numbers_is_compiled_for_itself(target: str) -> None:
    device, like = device_of(target), device_of(described_as(target))
    assert str(device.arch) == target.partition(":")[2].removeprefix("sm")
    assert device == replace(like, arch=device.arch, target=replace(like.target, name=target))
    assert described(target, None) == device


@pytest.mark.parametrize("target", ["cpu", "cuda:ampere", "ascend:910b"])
def test_what_is_no_gpu(target: str) -> None:
    with pytest.raises(TargetError, match="is no GPU"):
        known_kind(target)


def test_a_device_is_described_by_what_it_says() -> None:
    half = described("cuda:sm90", Properties(units=66, memory_bandwidth=1e12, shared_block=100 * KIB))
    whole = device_of("cuda:sm90")
    assert half.target.flops_per_s("bf16") == pytest.approx(whole.target.flops_per_s("bf16") / 2)
    assert half.unit_flops("bf16") == pytest.approx(whole.unit_flops("bf16"))
    assert (half.units, half.target.memory_bandwidth, half.shared_block) == (66, 1e12, 100 * KIB)
    assert half.cache == whole.cache


def test_what_torch_says() -> None:
    told = SimpleNamespace(
        multi_processor_count=114, clock_rate=1755000, memory_clock_rate=1593000, memory_bus_width=5120,
        total_memory=80 << 30, L2_cache_size=50 << 20,
    )  # fmt: skip
    seen = read_properties(told)
    assert seen.memory_bandwidth == pytest.approx(2.039e12, rel=1e-3)  # H100 PCIe's data sheet: 2.04 TB/s
    assert (seen.units, seen.clock, seen.shared) == (114, 1.755e9, 0)
