"""Instruction sets: which one a target means, what the compiler is told, and whether this machine has it."""

from __future__ import annotations

import platform
from dataclasses import dataclass

from moec.targets import cpu_flags


@dataclass(frozen=True)
class Isa:
    """One level of x86 vector instructions.

    Attributes:
        name: The level, as in target text: ``avx512`` of ``cpu:avx512``.
        needs: Flags of the processor, as the kernel names them.
        flags: What makes g++ use them, and nothing beyond.
    """

    name: str
    needs: frozenset[str]
    flags: tuple[str, ...]


_AVX2 = ("-mavx2", "-mfma", "-mf16c")
_AVX512 = (*_AVX2, "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq")
_AVX512_NEEDS = frozenset({"avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512vl", "avx512dq"})
LEVELS = {
    "avx2": Isa("avx2", frozenset({"avx2", "fma", "f16c"}), _AVX2),
    "avx512": Isa("avx512", _AVX512_NEEDS, _AVX512),
    "avx512_bf16": Isa("avx512_bf16", _AVX512_NEEDS | {"avx512_bf16"}, (*_AVX512, "-mavx512bf16")),
}
"""From the lowest to the highest."""
_BELOW = {"amx": "avx512_bf16"}  # levels of targets that run the kernels of a lower one


def isa_of(target: str) -> Isa | str:
    """The instruction set that ``target`` means, or why there is none. ``cpu`` is the highest this machine has."""
    name = target.partition(",")[0].strip()
    kind, _, level = name.partition(":")
    if kind != "cpu":
        return f"target {target!r} is no CPU"
    level = _BELOW.get(level, level)
    if level:
        return LEVELS.get(level) or f"there are no kernels for {name}; the levels are {', '.join(LEVELS)}"
    here = [isa for isa in LEVELS.values() if isa.needs <= cpu_flags()]
    if not here:
        return f"this processor ({platform.machine()}) has none of {', '.join(LEVELS)}"
    return here[-1]


def missing(isa: Isa) -> str:
    """The flags that this machine's processor lacks for ``isa``, as text; empty if it has them all."""
    return ", ".join(sorted(isa.needs - cpu_flags()))
