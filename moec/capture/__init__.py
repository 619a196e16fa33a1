"""FX to IR: what torch captured, as a moec graph. ``moec.emit`` is the inverse."""

from __future__ import annotations

from moec.capture.errors import CaptureError
from moec.capture.exported import from_exported
from moec.capture.fx import graph_from_fx
from moec.capture.types import type_of

__all__ = ["CaptureError", "from_exported", "graph_from_fx", "type_of"]
