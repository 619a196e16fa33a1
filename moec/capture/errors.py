"""Errors of the way in."""

from __future__ import annotations

from moec.ir.errors import MoecError


class CaptureError(MoecError):
    """An fx graph that cannot be turned into IR."""

    code = "capture"
