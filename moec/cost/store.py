"""Profiles as versioned JSON, one file in the cache directory for each kind of processor.

The file's name is a fingerprint of the processor's model, features and cores, so that a cache directory that several
machines share holds a profile for each.
"""

from __future__ import annotations

import hashlib
import json
import math
import platform
import re
import warnings
from collections.abc import Mapping
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Any

from moec.cache import cache_dir, write_atomic
from moec.cost.links import Link
from moec.cost.machine import ITEM_BYTES, GemmCurve, MachineProfile, Overhead, Points, defaults_for
from moec.ir.errors import MoecError
from moec.targets import Target, cpu_cores, cpu_flags

FORMAT = "moec-profile"
VERSION = 2
"""Of the file. A file of another version is not read: a profile is measured again in a minute. One without links, as
they came later, says that they were not measured."""

_told: set[tuple[Path, str]] = set()


class ProfileError(MoecError):
    """A profile that cannot be read, or nothing to measure one on."""

    code = "profile"


class ProfileWarning(UserWarning):
    """A stored profile is ignored."""


@lru_cache(maxsize=1)
def processor_name() -> str:
    """The processor's own name, such as ``"AMD EPYC 9755"``; the architecture where it has none."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        text = ""
    found = re.search(r"^model name\s*:\s*(.*\S)", text, re.MULTILINE)
    return found.group(1) if found else platform.machine() or "unknown"


def fingerprint() -> str:
    """Sixteen hexadecimal digits for this processor's model, features and usable cores."""
    parts = (processor_name(), " ".join(sorted(cpu_flags())), str(cpu_cores()))
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]


def profile_path() -> Path:
    """Where this machine's profile lies, if there is one."""
    return cache_dir() / "profile" / f"{fingerprint()}.json"


def to_json(machine: MachineProfile) -> str:
    """The profile as text; ``from_json`` gives the same numbers back."""
    numbers = {
        "name": machine.name,
        "fingerprint": machine.fingerprint,
        "measured": machine.measured,
        "cores": machine.cores,
        "isa": machine.isa,
        "calibrated": machine.calibrated,
        "bandwidth_bytes_per_s_by_threads": machine.bandwidth,
        "flops_per_s_of_one_thread": machine.flops,
        "call_seconds": machine.call_seconds,
        "barrier_seconds_by_threads": machine.barriers,
        "overheads_by_threads": [
            {"dtype": o.dtype, "task_seconds": o.tasks, "row_byte_seconds": o.rows} for o in machine.overheads
        ],
        "interrupted_part_of_calls": machine.interrupted,
        "gemm_ns_per_weight_element_by_rows": [
            {"dtype": c.dtype, "isa": c.isa, "threads": c.threads, "points": c.points} for c in machine.curves
        ],
        "links_between_processes": [
            {"processes": n, "alpha_seconds": link.alpha_s, "bytes_per_s": link.bytes_per_s}
            for n, link in machine.links
        ],
    }
    return json.dumps({"format": FORMAT, "version": VERSION, "machine": numbers}, indent=1) + "\n"


def from_json(text: str) -> MachineProfile:
    """The profile in ``text``.

    Raises:
        ProfileError: It is no profile, one of another version, or holds numbers that cannot be.
    """
    try:
        data = json.loads(text)
    except ValueError as e:
        raise ProfileError(f"it is not JSON: {e}") from e
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        raise ProfileError(f"it is no {FORMAT}")
    if data.get("version") != VERSION:
        raise ProfileError(f"it has version {data.get('version')!r}, and version {VERSION} is read")
    try:
        return _machine(data["machine"])
    except KeyError as e:
        raise ProfileError(f"it lacks {e}") from e
    except (TypeError, ValueError, AttributeError) as e:
        raise ProfileError(f"it holds a value that cannot be: {e}") from e


def _machine(m: Mapping[str, Any]) -> MachineProfile:
    return MachineProfile(
        name=str(m["name"]),
        fingerprint=str(m["fingerprint"]),
        measured=str(m["measured"]),
        cores=int(_number(m["cores"])),
        isa=str(m["isa"]),
        calibrated=bool(m["calibrated"]),
        bandwidth=_points(m["bandwidth_bytes_per_s_by_threads"]),
        flops=tuple((_dtype(d), str(isa), _number(rate)) for d, isa, rate in m["flops_per_s_of_one_thread"]),
        curves=tuple(
            GemmCurve(_dtype(c["dtype"]), str(c["isa"]), int(_number(c["threads"])), _points(c["points"], rising=True))
            for c in m["gemm_ns_per_weight_element_by_rows"]
        ),
        call_seconds=_number(m["call_seconds"], least=0.0),
        barriers=_points(m["barrier_seconds_by_threads"], least=0.0),
        overheads=tuple(
            Overhead(
                _dtype(o["dtype"]), _points(o["task_seconds"], least=0.0), _points(o["row_byte_seconds"], least=0.0)
            )
            for o in _some(m["overheads_by_threads"])
        ),
        interrupted=_number(m["interrupted_part_of_calls"], least=0.0),
        links=tuple(
            (int(_number(n["processes"], least=2)), Link(_number(n["alpha_seconds"], 0.0), _number(n["bytes_per_s"])))
            for n in m.get("links_between_processes", [])
        ),
    )


def _some(given: Any) -> Any:
    if not given:
        raise ValueError(f"{given!r} where something belongs")
    return given


def _number(value: Any, least: float = 1e-30) -> float:
    number = float(value)
    if not math.isfinite(number) or number < least:
        raise ValueError(f"{value!r} where a number from {least:g} up belongs")
    return number


def _points(pairs: Any, least: float = 1e-30, rising: bool = False) -> Points:
    points = tuple((int(_number(x)), _number(y, least)) for x, y in pairs)
    if not points or any(a[0] >= b[0] or (rising and a[1] > b[1]) for a, b in pairwise(points)):
        raise ValueError(f"{pairs!r} is no curve")
    return points


def _dtype(name: Any) -> str:
    if name not in ITEM_BYTES:
        raise ValueError(f"element type {name!r}")
    return str(name)


def save_profile(machine: MachineProfile, path: Path | None = None) -> Path:
    """Write the profile, whole or not at all, and return where: ``path``, or its place in the cache directory.

    Raises:
        ProfileError: It cannot be written there.
    """
    path = profile_path() if path is None else path
    try:
        write_atomic(path, to_json(machine))
    except OSError as e:
        raise ProfileError(f"the profile cannot be written to {path}: {e.strerror or e}", hint="give --out FILE") from e
    return path


def load_profile(path: Path | None = None) -> MachineProfile | None:
    """This machine's profile, or None where it was never measured.

    A file that cannot be used is told of once, as a ``ProfileWarning``, and ignored. With ``path`` it is an error.

    Raises:
        ProfileError: ``path`` was given and holds no usable profile.
    """
    given, path = path, profile_path() if path is None else path
    try:
        text = path.read_text(encoding="utf-8")
        machine = from_json(text)
        if given is None and machine.fingerprint != fingerprint():
            raise ProfileError("it was measured on another processor")
    except FileNotFoundError as e:
        if given is None:
            return None
        raise ProfileError(f"there is no profile {path}", hint="`moec profile --out FILE` writes one") from e
    except (OSError, UnicodeDecodeError, ProfileError) as e:
        reason = e.message if isinstance(e, ProfileError) else str(e)
        if given is not None:
            raise ProfileError(f"the profile {path} cannot be used: {reason}", hint="run `moec profile` again") from e
        if (path, reason) not in _told:
            _told.add((path, reason))
            warnings.warn(
                f"the machine profile {path} is ignored: {reason}; run `moec profile` to measure again",
                ProfileWarning,
                stacklevel=2,
            )
        return None
    return machine


def machine_for(target: Target) -> MachineProfile:
    """This machine's profile where ``target`` can mean this machine, else the target's assumed numbers.

    ``cpu`` and any CPU target whose instructions this processor has mean this machine; a number of cores of their own
    does not.
    """
    here = target.name == "cpu" or target.features <= cpu_flags()
    found = load_profile() if here and target.kind == "cpu" and target.cores == cpu_cores() else None
    return found or defaults_for(target)
