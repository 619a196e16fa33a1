"""What the processor allows at best: multiply-adds in registers, and reading memory once from end to end."""

from __future__ import annotations

import ctypes
from pathlib import Path

import torch

from moec.backends.cpu.build import build
from moec.backends.cpu.isa import Isa
from moec.backends.cpu.load import openmp_library

READ_BYTES = 512 << 20
"""Read once for each measurement; more where the last cache is large."""
_READS, _PEAKS, _REGIONS = 7, 5, 300

_SOURCE = Path(__file__).with_name("probes.cpp")


def beyond_caches(least: int) -> int:
    """Bytes that no cache holds: ``least``, or four times the last cache; 2 GB at most."""
    sizes = []
    for file in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = file.read_text().strip()  # "32768K"
        if text[:-1].isdigit() and text[-1] in "KM":
            sizes.append(int(text[:-1]) << (10 if text[-1] == "K" else 20))
    return min(max(least, 4 * max(sizes, default=0)), 2 << 30)


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
        self.data = torch.zeros(beyond_caches(READ_BYTES), dtype=torch.uint8).fill_(1)  # pages of their own

    def flops_per_s(self, dtype: str) -> float:
        """Operations a second of one thread, the best of several; f16 is widened and multiplied as f32."""
        peak = self.library.peak_bf16 if dtype == "bf16" else self.library.peak_f32
        return max(float(peak()) for _ in range(_PEAKS))

    def bytes_per_s(self, threads: int) -> float:
        """Bytes that ``threads`` threads read in a second, the best of several."""
        address, size = self.data.data_ptr(), self.data.numel()
        return size / min(float(self.library.read_seconds(address, size, threads)) for _ in range(_READS))

    def region_seconds(self, threads: int) -> float:
        """Seconds of one parallel region with three barriers, the best of several runs of many."""
        return min(float(self.library.region_seconds(threads, _REGIONS)) for _ in range(5))
