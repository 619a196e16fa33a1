"""A program as code that is embedded in an artifact: an op of its own, its C function, and a kernel for every level."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass

DIGITS = 24
"""Of the hash in an op's name."""


@dataclass(frozen=True)
class Embedded:
    """One specialisation: programs that differ in nothing but names are one.

    The name is an identifier that depends on the content alone, because torch writes it into C++ as it is.

    Attributes:
        name: Of the op in torch's library and of its C function.
        schema: Arguments and results as torch writes them, after the name.
        declaration: Of the C function.
        dispatcher: C++ of that function, for any x86-64: checks, allocates, and calls the kernel of a level.
        kernels: C++ of the kernel by level.
        exports: The C function that each of the kernels defines, by level.
    """

    name: str
    schema: str
    declaration: str
    dispatcher: str
    kernels: Mapping[str, str]
    exports: Mapping[str, str]


def content_name(kind: str, *parts: str) -> str:
    """``moec_<kind>_<hash>``: equal for equal parts, in any process."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(len(part.encode()).to_bytes(8, "little") + part.encode())
    return f"moec_{kind}_{digest.hexdigest()[:DIGITS]}"


def kernel_table(exports: Mapping[str, str]) -> str:
    """The table of kernels by level, as ``choose`` of ``runtime.h`` takes it."""
    entries = (exports.get(level, "nullptr") for level in ("", "avx2", "avx512", "avx512_bf16", "amx"))
    return "{" + ", ".join(entries) + "}"
