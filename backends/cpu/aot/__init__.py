"""Kernels that are embedded in an artifact: without Python at run time, and with all declared instruction sets."""

from __future__ import annotations

from moec.backends.cpu.aot.archive import archive, compile_object, object_path
from moec.backends.cpu.aot.embedded import Embedded, content_name
from moec.backends.cpu.aot.experts import addressable, embed_experts
from moec.backends.cpu.aot.levels import declared, lowest
from moec.backends.cpu.aot.regroup import embed_regroup
from moec.backends.cpu.aot.route import embed_route

__all__ = [
    "Embedded",
    "addressable",
    "archive",
    "compile_object",
    "content_name",
    "declared",
    "embed_experts",
    "embed_regroup",
    "embed_route",
    "lowest",
    "object_path",
]
