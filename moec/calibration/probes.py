"""What the processor allows at best: multiply-adds in registers, and reading memory once from end to end."""

from __future__ import annotations

import ctypes
from pathlib import Path

import torch

from moec.backends.cpu.build import build
from moec.backends.cpu.huge_pages import empty
from moec.backends.cpu.isa import Isa
from moec.backends.cpu.load import openmp_library

READ_BYTES = 512 << 20
"""Read once for each measurement; more where the last cache is large."""
PATTERNS = {
    "one stream": (1 << 16, 4, 0),
    "four rows": (4096, 32, 0),
    "four rows, asked for ahead": (4096, 32, 16384),
    "long rows, asked for ahead": (1 << 15, 8, 2048),
}
"""Ways to read that kernels have: bytes of a row, rows of a block, bytes that lines are asked for ahead."""
_REPEATS, _REGIONS = 5, 300
_MARGIN = 1 << 18  # of the data: lines are asked for beyond a block

_SOURCE = Path(__file__).with_name("probes.cpp")


def beyond_caches(least: int) -> int:
    """Bytes that no cache holds: ``least``, or twice the last cache; 2 GB at most."""
    sizes = []
    for file in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = file.read_text().strip()  # "32768K"
        if text[:-1].isdigit() and text[-1] in "KM":
            sizes.append(int(text[:-1]) << (10 if text[-1] == "K" else 20))
    return min(max(least, 2 * max(sizes, default=0)), 2 << 30)


class Probes:
    """The compiled probes for one instruction set.

    Raises:
        BuildError: There is no C++ compiler.
    """

    def __init__(self, isa: Isa) -> None:
        openmp_library()
        self.library = ctypes.CDLL(str(build(_SOURCE.read_text(encoding="utf-8"), isa)))
        for name in ("peak_f32", "peak_bf16", "peak_f16", "bandwidth", "region_seconds"):
            getattr(self.library, name).restype = ctypes.c_double
        self.library.bandwidth.argtypes = [ctypes.c_void_p, ctypes.c_int64, ctypes.c_int, *[ctypes.c_int64] * 3]

    def flops_per_s(self, dtype: str, threads: int = 1) -> float:
        """Multiply-adds of ``threads`` threads in a second, two operations each, the best of several.

        f16 is widened and multiplied as f32.
        """
        peak = getattr(self.library, f"peak_{dtype}")
        return max(float(peak(threads)) for _ in range(_REPEATS))

    def bytes_per_s(self, threads: int) -> float:
        """Bytes that ``threads`` threads read in a second, in the best of the patterns."""
        return max(self.reads(threads).values())

    def reads(self, threads: int, size: int | None = None) -> dict[str, float]:
        """Bytes that ``threads`` threads read in a second, by pattern, the best of several.

        Args:
            threads: How many.
            size: Bytes read once; by default more than the caches hold.
        """
        data = empty([(size or beyond_caches(READ_BYTES)) + _MARGIN], torch.uint8).fill_(1)  # pages of their own
        best = dict.fromkeys(PATTERNS, 0.0)
        for _ in range(_REPEATS):
            for name, pattern in PATTERNS.items():
                rate = float(self.library.bandwidth(data.data_ptr(), data.numel() - _MARGIN, threads, *pattern))
                best[name] = max(best[name], rate)
        return best

    def region_seconds(self, threads: int) -> float:
        """Seconds of one parallel region with three barriers, the best of several runs of many."""
        return min(float(self.library.region_seconds(threads, _REGIONS)) for _ in range(_REPEATS))
