"""The GPU that is here: a known architecture with this device's own sizes, so that no device lacks a description."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch

from moec.backends.triton.launches.device import Device, device_of, gpu_targets, is_gpu
from moec.backends.triton.launches.tuned import fingerprint
from moec.backends.triton.module import present, triton
from moec.targets import TargetError, described_as, known_targets


@dataclass(frozen=True)
class Properties:
    """What a device says of itself; 0 where it does not.

    Attributes:
        units: Multiprocessors or compute units.
        clock: Hz.
        memory_bandwidth: Bytes a second.
        memory: Bytes.
        cache: Bytes of the cache that all units share.
        shared, shared_block: Bytes of shared memory of a unit and of a block.
    """

    units: int
    clock: float = 0.0
    memory_bandwidth: float = 0.0
    memory: float = 0.0
    cache: int = 0
    shared: int = 0
    shared_block: int = 0


def known_kind(target: str) -> str:
    """The known architecture that a target's units are most like.

    Raises:
        TargetError: It is no GPU's text.
    """
    if is_gpu(target) and target in known_targets():
        return described_as(target)
    kind, _, arch = target.partition(":")
    if kind == "hip":
        return "hip:gfx942"
    if kind != "cuda" or not arch.startswith("sm") or not arch[2:].isdigit():
        raise TargetError(f"{target!r} is no GPU", hint="targets: " + ", ".join(gpu_targets()))
    capability = int(arch[2:])
    if 80 < capability < 90 or capability >= 120:
        return "cuda:sm89"
    return f"cuda:sm{max((n for n in (80, 90, 100) if n <= capability), default=80)}"


def described(target: str, seen: Properties | None, known_as: str = "") -> Device:
    """The description of a target, with what a device has been seen to have in the place of what its kind has.

    Peaks scale with units and clock. ``known_as`` is its fingerprint: what was measured on it goes before the model.
    """
    known = device_of(target if target in known_targets() else known_kind(target))
    if seen is None:
        return known
    clock = seen.clock or known.clock
    scale = seen.units * clock / (known.units * known.clock)
    flops = tuple((dtype, rate * scale) for dtype, rate in known.target.flops)
    bandwidth = seen.memory_bandwidth or known.target.memory_bandwidth
    machine = replace(
        known.target, cores=seen.units, flops=flops, memory_bandwidth=bandwidth,
        memory=seen.memory or known.target.memory,
    )  # fmt: skip
    return replace(
        known, fingerprint=known_as, target=machine, clock=clock, cache=seen.cache or known.cache,
        shared=seen.shared or known.shared, shared_block=seen.shared_block or known.shared_block,
    )  # fmt: skip


@lru_cache(maxsize=16)
def device_for(target: str) -> Device:
    """The GPU that kernels for ``target`` run on: the current one where it is of that kind, else what the kind has."""
    from moec.backends.triton.launcher import target_of

    if torch.cuda.is_available() and target_of(torch.device("cuda", torch.cuda.current_device())) == target:
        told = torch.cuda.get_device_properties(torch.cuda.current_device())
        seen = read_properties(told)
        versions = f"{torch.__version__} {triton().__version__ if present() else ''}"
        return described(target, seen, fingerprint(told.name, target, seen.units, seen.memory, versions))
    return described(target, None)


def read_properties(told: Any) -> Properties:
    """What torch says of a device; its names differ between versions."""

    def number(name: str) -> float:
        return float(getattr(told, name, 0) or 0)

    # Rates are in kHz, a bus in bits; memory transfers twice a cycle.
    bandwidth = 2 * number("memory_clock_rate") * 1e3 * number("memory_bus_width") / 8
    return Properties(
        units=int(number("multi_processor_count")),
        clock=number("clock_rate") * 1e3,
        memory_bandwidth=bandwidth,
        memory=number("total_memory"),
        cache=int(number("L2_cache_size")),
        shared=int(number("shared_memory_per_multiprocessor")),
        shared_block=int(number("shared_memory_per_block_optin")),
    )
