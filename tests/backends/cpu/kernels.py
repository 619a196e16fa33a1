"""Kernels for tests of the cpu backend: the levels that run here, and a program made callable."""

from __future__ import annotations

import pytest

from moec.backends.base import Kernel
from moec.backends.cpu import CpuBackend
from moec.backends.cpu.build import compiler
from moec.backends.cpu.isa import LEVELS, missing, refusal
from moec.ir.core import Graph

BACKEND = CpuBackend()
HERE = [name for name, isa in LEVELS.items() if not missing(isa) and not refusal(isa)]
"""From the lowest to the highest."""
TOKENS = (0, 1, 2, 31, 33, 257)
needs_kernels = pytest.mark.skipif(
    compiler() is None or not HERE, reason="no C++ compiler, or no AVX2 in this processor"
)


def load(graph: Graph, target: str = "cpu") -> Kernel:
    """The kernel of a program of one op."""
    return BACKEND.load(BACKEND.lower(graph, target))
