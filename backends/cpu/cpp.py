"""Types and literals in C++, as all generated sources write them."""

from __future__ import annotations

import math

C_TYPES = {"f32": "float", "bf16": "bf16", "f16": "f16"}
"""Element types that kernels read and write, and their names in C++."""


def boolean(value: bool) -> str:
    """``true`` or ``false``."""
    return "true" if value else "false"


def real(value: float) -> str:
    """A float, to the last bit."""
    value = float(value)
    if math.isnan(value):
        return '__builtin_nanf("")'
    if math.isinf(value):
        return f"{'-' if value < 0 else ''}__builtin_inff()"
    return f"(float){value.hex()}"
