"""Routing profiles as versioned JSON."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from moec.cache import write_atomic
from moec.ir.errors import MoecError
from moec.routing.profile import Clusters, LayerRouting, RoutingProfile, Trial

FORMAT = "moec-routing"
VERSION = 1
"""Of the file. A file of another version is not read."""


class RoutingError(MoecError):
    """A routing profile that cannot be made or read."""

    code = "routing"


def to_json(profile: RoutingProfile) -> str:
    """The profile as text; ``from_json`` gives an equal one back."""
    return json.dumps({"format": FORMAT, "version": VERSION, **asdict(profile)}) + "\n"


def from_json(text: str) -> RoutingProfile:
    """The profile in ``text``.

    Raises:
        RoutingError: It is no profile, one of another version, or holds what cannot be.
    """
    try:
        data = json.loads(text)
    except ValueError as e:
        raise RoutingError(f"it is not JSON: {e}") from e
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        raise RoutingError(f"it is no {FORMAT}")
    if data.get("version") != VERSION:
        raise RoutingError(f"it has version {data.get('version')!r}, and version {VERSION} is read")
    try:
        return RoutingProfile(
            str(data["model"]),
            int(data["tokens"]),
            int(data["sequences"]),
            int(data["calls"]),
            tuple(_layer(layer) for layer in data["layers"]),
            tuple(tuple((int(e), int(f), int(n)) for e, f, n in pairs) for pairs in data["transitions"]),
        )
    except KeyError as e:
        raise RoutingError(f"it lacks {e}") from e
    except (TypeError, ValueError, AttributeError) as e:
        raise RoutingError(f"it holds a value that cannot be: {e}") from e


def _layer(data: Mapping[str, Any]) -> LayerRouting:
    loads = tuple(int(n) for n in data["loads"])
    if len(loads) != int(data["experts"]):
        raise ValueError(f"{len(loads)} loads of {data['experts']} experts")
    return LayerRouting(
        str(data["name"]),
        int(data["experts"]),
        int(data["top_k"]),
        loads,
        tuple((int(m), float(value), float(size)) for m, value, size in data["srp"]),
        tuple((int(m), tuple(float(rate) for rate in rates)) for m, rates in data["sch"]),
        tuple(
            Clusters(int(c["batches"]), int(c["ranks"]), tuple(_trial(t) for t in c["trials"]))
            for c in data["clusters"]
        ),
    )


def _trial(data: Mapping[str, Any]) -> Trial:
    numbers = (float(data[name]) for name in ("saved", "chance", "gain_spread", "chance_spread"))
    return Trial(int(data["tokens"]), int(data["windows"]), *numbers)


def save_routing(profile: RoutingProfile, path: Path) -> Path:
    """Write the profile, whole or not at all, and return where.

    Raises:
        RoutingError: It cannot be written there.
    """
    try:
        write_atomic(path, to_json(profile))
    except OSError as e:
        raise RoutingError(f"the routing profile cannot be written to {path}: {e.strerror or e}") from e
    return path


def load_routing(path: Path) -> RoutingProfile:
    """The profile in a file.

    Raises:
        RoutingError: There is none that can be used.
    """
    try:
        return from_json(path.read_text(encoding="utf-8"))
    except FileNotFoundError as e:
        raise RoutingError(
            f"there is no routing profile {path}", hint="`moec profile --routing MODEL` writes one"
        ) from e
    except (OSError, UnicodeDecodeError, RoutingError) as e:
        reason = e.message if isinstance(e, RoutingError) else str(e)
        raise RoutingError(f"the routing profile {path} cannot be used: {reason}", hint="make it again") from e
