"""IR to FX: an IR graph as an fx graph again. The inverse of ``moec.capture``."""

from __future__ import annotations

from moec.emit.emitter import LowerOp
from moec.emit.errors import EmitError
from moec.emit.exported import to_exported
from moec.emit.fx import emit_into, graph_to_fx

__all__ = ["EmitError", "LowerOp", "emit_into", "graph_to_fx", "to_exported"]
