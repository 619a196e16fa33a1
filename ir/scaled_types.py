"""Types of weights that have scales."""

from __future__ import annotations

from collections.abc import Sequence

from moec.ir.core import Value
from moec.ir.scaled_semantics import misfit
from moec.ir.types import TensorType

SCALED_DTYPE = "f8e4m3fn"
"""The element type of weights that have scales."""


def scales_misfit(weights: Sequence[Value], scales: Sequence[Value], form: str, stacked: bool) -> str:
    """Why ``scales`` are not those of ``weights``; empty where they are, or where there are none."""
    if not scales:
        return ""
    if not stacked or form != "nk":
        return "weights with scales are one tensor for all experts, their rows outputs (nk)"
    if len(scales) != len(weights):
        return f"{len(scales)} scales for {len(weights)} weights"
    for weight, scale in zip(weights, scales, strict=True):
        w, s = weight.type, scale.type
        if not isinstance(w, TensorType) or w.dtype.name != SCALED_DTYPE:
            return f"{weight!r} has scales and is {getattr(w, 'dtype', w)}, not {SCALED_DTYPE}"
        if not isinstance(s, TensorType) or s.dtype.name != "f32":
            return f"scales {scale!r} are {getattr(s, 'dtype', s)}, not f32"
        if reason := misfit(w.shape, s.shape):
            return reason
    return ""
