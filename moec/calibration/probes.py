"""What the processor allows at best: multiply-adds in registers, and reading memory once from end to end."""

from __future__ import annotations

import ctypes
import statistics
from pathlib import Path

import torch

from moec.backends.cpu.build import build
from moec.backends.cpu.isa import Isa
from moec.backends.cpu.load import openmp_library

READ_BYTES = 512 << 20
"""Read once for each measurement; several times the last cache of common servers' share of cores."""
_READS, _PEAKS, _REGIONS = 7, 5, 300

_SOURCE = Path(__file__).with_name("probes.cpp")


class Probes:
    """The compiled probes for one instruction set.

    Raises:
        BuildError: There is no C++ compiler.
    """

    def __init__(self, isa: Isa) -> None:
        openmp_library()
        self.library = ctypes.CDLL(str(build(_SOURCE.read_text(encoding="utf-8"), isa)))
        for name in ("peak_f32", "peak_bf16", "read_seconds", "region_seconds"):
            getattr(self.library, name).restype = ctypes.c_double
        self.library.read_seconds.argtypes = [ctypes.c_void_p, ctypes.c_int64, ctypes.c_int]
        self.data = torch.zeros(READ_BYTES, dtype=torch.uint8).fill_(1)  # zeros alone may be one page of zeros

    def flops_per_s(self, dtype: str) -> float:
        """Operations a second of one thread, the best of several; f16 is widened and multiplied as f32."""
        peak = self.library.peak_bf16 if dtype == "bf16" else self.library.peak_f32
        return max(float(peak()) for _ in range(_PEAKS))

    def bytes_per_s(self, threads: int) -> float:
        """Bytes that ``threads`` threads read in a second, median."""
        address = self.data.data_ptr()
        times = [float(self.library.read_seconds(address, READ_BYTES, threads)) for _ in range(_READS)]
        return READ_BYTES / statistics.median(times)

    def region_seconds(self, threads: int) -> float:
        """Seconds of one parallel region with three barriers, median of several runs of many."""
        return statistics.median(float(self.library.region_seconds(threads, _REGIONS)) for _ in range(5))
