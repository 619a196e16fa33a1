"""Element types and numbers as generated Triton code writes them."""

from __future__ import annotations

import math

TL_TYPES = {"f32": "tl.float32", "bf16": "tl.bfloat16", "f16": "tl.float16"}
"""Element types that kernels read and write, and their names in Triton."""
POINTERS = {"f32": "*fp32", "bf16": "*bf16", "f16": "*fp16", "i32": "*i32", "i64": "*i64", "f8e4m3fn": "*fp8e4nv"}
"""Pointers in a kernel's signature."""


def number(value: float) -> str:
    """A number, to the last bit of a float in f32."""
    value = float(value)
    if math.isnan(value):
        return 'float("nan")'
    if math.isinf(value):
        return f'float("{"-" if value < 0 else ""}inf")'
    return repr(value)


def rounded(text: str, dtype: str) -> str:
    """``text``, an expression in f32, rounded to ``dtype`` and held in f32."""
    return text if dtype == "f32" else f"round_{dtype}({text})"
