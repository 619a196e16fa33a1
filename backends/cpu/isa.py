"""Instruction sets: which one a target means, what the compiler is told, and whether this machine has it."""

from __future__ import annotations

import ctypes
import os
import platform
from dataclasses import dataclass
from functools import lru_cache

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
_BF16 = (*_AVX512, "-mavx512bf16")
_BF16_NEEDS = _AVX512_NEEDS | {"avx512_bf16"}
LEVELS = {
    "avx2": Isa("avx2", frozenset({"avx2", "fma", "f16c"}), _AVX2),
    "avx512": Isa("avx512", _AVX512_NEEDS, _AVX512),
    "avx512_bf16": Isa("avx512_bf16", _BF16_NEEDS, _BF16),
    "amx": Isa("amx", _BF16_NEEDS | {"amx_tile", "amx_bf16"}, (*_BF16, "-mamx-tile", "-mamx-bf16")),
}
"""From the lowest to the highest."""
EMULATED_AMX = Isa("amx_emulated", _BF16_NEEDS, (*_BF16, "-DMOEC_EMULATE_AMX"))
"""The kernels of ``amx`` with its tile instructions in plain C++: for tests where the processor lacks them."""


def isa_of(target: str) -> Isa | str:
    """The instruction set that ``target`` means, or why there is none. ``cpu`` is the highest this machine has."""
    name = target.partition(",")[0].strip()
    kind, _, level = name.partition(":")
    if kind != "cpu":
        return f"target {target!r} is no CPU"
    if level == EMULATED_AMX.name:
        return EMULATED_AMX
    if level:
        return LEVELS.get(level) or f"there are no kernels for {name}; the levels are {', '.join(LEVELS)}"
    here = [isa for isa in LEVELS.values() if not missing(isa) and not refusal(isa)]
    if not here:
        return f"this processor ({platform.machine()}) has none of {', '.join(LEVELS)}"
    return here[-1]


def missing(isa: Isa) -> str:
    """Flags of the processor that this machine lacks for ``isa``; empty if none."""
    return ", ".join(sorted(isa.needs - cpu_flags()))


_ARCH_PRCTL, _ARCH_REQ_XCOMP_PERM, _XTILEDATA = 158, 0x1023, 18  # x86-64 Linux: the call, its code, the state's number


@lru_cache(maxsize=1)
def _ask_for_tiles() -> str:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.syscall(ctypes.c_long(_ARCH_PRCTL), ctypes.c_long(_ARCH_REQ_XCOMP_PERM), ctypes.c_long(_XTILEDATA)) == 0:
        return ""
    return os.strerror(ctypes.get_errno())


def refusal(isa: Isa) -> str:
    """Why the operating system does not let this process use the registers of ``isa``; empty if it does.

    The tiles of AMX are 8 KB that Linux saves for every thread, so a process has to ask once before it uses them; the
    answer holds for all its threads. The processor must have ``isa``.
    """
    return _ask_for_tiles() if "amx_tile" in isa.needs else ""
