"""What code is made for: a frozen description of a machine, written as text (``cpu``, ``cuda:sm90,ranks=8``).

Numbers are vendors' dense peaks (no sparsity) or, for the CPU at hand, cores x clock x operations a cycle. They rank
choices in the cost model; no one should read them as a promise. Units: operations/s, bytes/s, bytes.
"""

from __future__ import annotations

import os
import platform
import re
from dataclasses import dataclass, replace
from functools import lru_cache

from moec.ir.errors import MoecError, nearest


class TargetError(MoecError):
    """A target that does not exist, or text that does not describe one."""

    code = "target"


@dataclass(frozen=True)
class Target:
    """One kind of machine, and how many of it.

    Attributes:
        name: The canonical text, without ranks: ``"cpu:avx512"``.
        kind: ``"cpu"``, ``"cuda"``, ``"hip"`` or ``"ascend"``.
        flops: (element type, operations/s) pairs of one device; see ``flops_per_s``.
        memory_bandwidth: Main or device memory, bytes/s.
        memory: Main or device memory, bytes.
        link_bandwidth: To another rank, bytes/s a direction; 0 where there is none.
        features: Instruction sets and abilities, lower case.
        ranks: Devices that share the model.
        cores: CPU cores, or multiprocessors of the device.
    """

    name: str
    kind: str
    flops: tuple[tuple[str, float], ...]
    memory_bandwidth: float
    memory: float
    link_bandwidth: float = 0.0
    features: frozenset[str] = frozenset()
    ranks: int = 1
    cores: int = 1

    def flops_per_s(self, dtype: str) -> float:
        """Peak operations/s of matrix products with operands of ``dtype`` (``"bf16"``); f32's where unknown."""
        table = dict(self.flops)
        return table.get(dtype, table["f32"])

    def __str__(self) -> str:
        return f"{self.name},ranks={self.ranks}" if self.ranks != 1 else self.name


def _gpu(
    name: str, bf16: float, f32: float, f8: float, bandwidth: float, memory: float, link: float, sms: int
) -> Target:
    features = {"bf16", "f16", "tma"} if name in ("sm90", "sm100") else {"bf16", "f16"}
    flops = (("bf16", bf16), ("f16", bf16), ("f32", f32)) + ((("f8e4m3fn", f8), ("f8e5m2", f8)) if f8 else ())
    features |= {"f8"} if f8 else set()
    return Target(f"cuda:{name}", "cuda", flops, bandwidth, memory, link, frozenset(features), 1, sms)


def _amd(name: str, bf16: float, f32: float, bandwidth: float, memory: float, link: float, units: int) -> Target:
    # Its 8-bit floats are not torch's f8e4m3fn (other zero, other bias): no peak is given for that type.
    flops = (("bf16", bf16), ("f16", bf16), ("f32", f32))
    return Target(f"hip:{name}", "hip", flops, bandwidth, memory, link, frozenset({"bf16", "f16"}), 1, units)


def _npu(name: str, f16: float, f32: float, bandwidth: float, memory: float, link: float, cores: int) -> Target:
    flops = (("bf16", f16), ("f16", f16), ("f32", f32))
    return Target(f"ascend:{name}", "ascend", flops, bandwidth, memory, link, frozenset({"bf16", "f16"}), 1, cores)


# Vendors' data sheets: A100 80 GB SXM, L40S, H100 SXM, B200, MI300X, Ascend 910B and 910C (one die).
_DEVICES = [
    _gpu("sm80", 312e12, 19.5e12, 0, 2.0e12, 80e9, 300e9, 108),
    _gpu("sm89", 362e12, 91.6e12, 733e12, 0.86e12, 48e9, 32e9, 142),
    _gpu("sm90", 989e12, 67e12, 1979e12, 3.35e12, 80e9, 450e9, 132),
    _gpu("sm100", 2250e12, 80e12, 4500e12, 8.0e12, 180e9, 900e9, 148),
    _amd("gfx942", 1307.4e12, 163.4e12, 5.3e12, 192e9, 448e9, 304),
    _npu("910b", 376e12, 94e12, 1.6e12, 64e9, 196e9, 24),
    _npu("910c", 376e12, 94e12, 1.6e12, 64e9, 392e9, 24),
]

_LIKE = {
    **dict.fromkeys(("cuda:sm86", "cuda:sm87", "cuda:sm120", "cuda:sm121"), "cuda:sm89"),
    "cuda:sm103": "cuda:sm100",
    **dict.fromkeys(("hip:gfx90a", "hip:gfx950"), "hip:gfx942"),
}
"""GPUs that code can be made for and that have no numbers here: those of what they are most like stand for them."""

# f32 operations a cycle and core (two FMA pipes), bf16 the same, and the flags of /proc/cpuinfo that the level needs.
_CPU_LEVELS: dict[str, tuple[int, int, frozenset[str]]] = {
    "scalar": (8, 8, frozenset()),
    "neon": (16, 16, frozenset({"asimd"})),
    "avx2": (32, 32, frozenset({"avx2", "fma"})),
    "avx512": (64, 64, frozenset({"avx512f", "avx512bw", "avx512vl", "avx512dq"})),
    "avx512_bf16": (64, 128, frozenset({"avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512_bf16"})),
    "amx": (64, 2048, frozenset({"avx512f", "avx512bw", "avx512vl", "avx512dq", "amx_tile", "amx_bf16"})),
}
_DEFAULT_HZ = 2.5e9
_BYTES_PER_S_AND_CORE = 10e9  # measured streaming bandwidth of one core on common servers
_MOST_CPU_BANDWIDTH = 300e9


@lru_cache(maxsize=1)
def cpu_flags() -> frozenset[str]:
    """Features of this machine's processor as the kernel names them; empty where that cannot be read."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as f:
            text = f.read()
    except OSError:
        return frozenset()
    match = re.search(r"^(?:flags|Features)\s*:\s*(.*)$", text, re.MULTILINE)
    return frozenset(match.group(1).split()) if match else frozenset()


def cpu_cores() -> int:
    """Cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _memory_bytes() -> float:
    try:
        return float(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    except (ValueError, OSError, AttributeError):
        return 16e9


def detect_level() -> str:
    """The highest of the CPU levels whose features this machine has."""
    flags = cpu_flags()
    best = "neon" if platform.machine() in ("aarch64", "arm64") else "scalar"
    for level, (_, _, needed) in _CPU_LEVELS.items():
        if needed and needed <= flags:
            best = level
    return best


def _cpu(level: str | None) -> Target:
    name = "cpu" if level is None else f"cpu:{level}"
    f32, bf16, needed = _CPU_LEVELS[level or detect_level()]
    cores = cpu_cores()
    rate = cores * _DEFAULT_HZ
    features = cpu_flags() if level is None else needed
    bandwidth = min(cores * _BYTES_PER_S_AND_CORE, _MOST_CPU_BANDWIDTH)
    flops = (("f32", f32 * rate), ("bf16", bf16 * rate), ("f16", f32 * rate), ("f64", f32 / 2 * rate))
    return Target(name, "cpu", flops, bandwidth, _memory_bytes(), 0.0, features, 1, cores)


def known_targets() -> list[str]:
    """The names that ``parse_target`` takes, without options."""
    return ["cpu", *(f"cpu:{level}" for level in _CPU_LEVELS), *(t.name for t in _DEVICES), *_LIKE]


def described_as(name: str) -> str:
    """The target whose numbers stand for those of ``name``: itself, where there are numbers of its own."""
    return _LIKE.get(name, name)


_NUMBERS = {"ranks", "cores"}


def parse_target(text: str) -> Target:
    """A target from its text: ``kind[:arch][,ranks=N][,cores=N]``. ``cpu`` alone is the processor at hand.

    Raises:
        TargetError: No such target or option; the message names the nearest ones.
    """
    name, *options = (part.strip() for part in text.split(","))
    target = _find(name)
    for option in options:
        key, equals, value = (p.strip() for p in option.partition("="))
        if key not in _NUMBERS:
            raise TargetError(f"unknown option {key!r} of target {text!r}; {nearest(key, _NUMBERS)}")
        if not equals or not value.isascii() or not value.isdigit() or int(value) < 1:
            raise TargetError(f"{key} of target {text!r} must be a number from 1 up, not {value!r}")
        count = int(value)
        if key == "cores" and target.kind != "cpu":
            raise TargetError(f"target {name!r} has a fixed number of cores", hint="cores= is for cpu targets")
        if key == "cores":
            scale = count / target.cores
            flops = tuple((dt, rate * scale) for dt, rate in target.flops)
            bandwidth = min(count * _BYTES_PER_S_AND_CORE, _MOST_CPU_BANDWIDTH)
            target = replace(target, cores=count, flops=flops, memory_bandwidth=bandwidth)
        else:
            target = replace(target, ranks=count)
    return target


def _find(name: str) -> Target:
    for device in _DEVICES:
        if device.name == described_as(name):
            return replace(device, name=name)
    if name == "cpu":
        return _cpu(None)
    kind, _, level = name.partition(":")
    if kind == "cpu" and level in _CPU_LEVELS:
        return _cpu(level)
    kinds = sorted({t.partition(":")[0] for t in known_targets()})
    if kind in kinds:  # a bare or misspelt architecture: name those of its kind
        archs = [t for t in known_targets() if t.startswith(kind + ":")]
        raise TargetError(f"unknown target {name!r}; {nearest(name, archs)}", hint="targets: " + ", ".join(archs))
    raise TargetError(
        f"unknown target {name!r}; {nearest(name, known_targets())}", hint="targets: " + ", ".join(known_targets())
    )
