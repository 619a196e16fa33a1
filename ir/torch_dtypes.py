"""Element types of the IR and of torch, both ways. A type that this torch lacks is left out."""

from __future__ import annotations

import torch

from moec.ir.types import DTYPES, DType

_NAMES = {
    "f64": "float64",
    "f32": "float32",
    "f16": "float16",
    "bf16": "bfloat16",
    "f8e4m3fn": "float8_e4m3fn",
    "f8e5m2": "float8_e5m2",
    "f8e4m3fnuz": "float8_e4m3fnuz",
    "f8e5m2fnuz": "float8_e5m2fnuz",
    "f8e8m0fnu": "float8_e8m0fnu",
    "f4e2m1fn_x2": "float4_e2m1fn_x2",
    "i64": "int64",
    "i32": "int32",
    "i16": "int16",
    "i8": "int8",
    "u64": "uint64",
    "u32": "uint32",
    "u16": "uint16",
    "u8": "uint8",
    "i1": "bool",
    "c32": "complex32",
    "c64": "complex64",
    "c128": "complex128",
}
TO_TORCH: dict[str, torch.dtype] = {n: getattr(torch, t) for n, t in _NAMES.items() if hasattr(torch, t)}
FROM_TORCH: dict[torch.dtype, DType] = {t: DTYPES[n] for n, t in TO_TORCH.items()}
