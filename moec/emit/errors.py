"""Errors of the way out."""

from __future__ import annotations

from moec.ir.errors import MoecError


class EmitError(MoecError):
    """An IR graph that cannot be turned into an fx graph."""

    code = "emit"
