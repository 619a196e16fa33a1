"""Times of an artifact: loading, the first call, and calls at several sizes."""

from __future__ import annotations

import statistics
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moec.artifact.errors import InputError
from moec.artifact.load import LoadedEntry, load
from moec.artifact.manifest import TensorSpec
from moec.artifact.weights import DTYPES

SIZES = (1, 16, 128, 512)
"""Of the last size that varies, where they are within its range."""


@dataclass(frozen=True)
class Row:
    """One entry at one choice of sizes: seconds of a call, and tokens in it (0 where inputs are no tokens)."""

    entry: str
    sizes: dict[str, int]
    seconds: float
    tokens: int


@dataclass(frozen=True)
class Timing:
    """What was measured, in seconds."""

    load_s: float
    first_s: float
    threads: int
    rows: tuple[Row, ...]

    def to_dict(self) -> dict[str, Any]:
        """As JSON types."""
        return asdict(self)


def time_artifact(path: Path, sizes: str | None, repeats: int) -> Timing:
    """Load an artifact and time its entries on made-up inputs.

    Args:
        path: The artifact.
        sizes: Numbers with commas between, for the last size that varies; others are at their least.
        repeats: Calls of each.

    Raises:
        MoecError: It cannot be loaded, or ``sizes`` are no numbers.
    """
    start = time.perf_counter()
    loaded = load(path)
    load_s = time.perf_counter() - start
    first_s = 0.0
    rows: list[Row] = []
    for name, entry in loaded.entries.items():
        for chosen in _choices(entry, sizes):
            inputs = [_example(s, chosen) for s in entry.spec.inputs]
            start = time.perf_counter()
            entry(*inputs)
            first_s = first_s or time.perf_counter() - start
            seconds = []
            for _ in range(repeats):
                start = time.perf_counter()
                entry.run(inputs)
                seconds.append(time.perf_counter() - start)
            first = inputs[0]
            tokens = 0 if first.is_floating_point() else first.numel()
            rows.append(Row(name, chosen, statistics.median(seconds), tokens))
    return Timing(load_s, first_s, torch.get_num_threads(), tuple(rows))


def _choices(entry: LoadedEntry, sizes: str | None) -> list[dict[str, int]]:
    dims = entry.spec.dims
    if not dims:
        return [{}]
    *others, last = dims
    low, high = dims[last]
    if sizes is None:
        wanted = [n for n in SIZES if low <= n <= high] or [low]
    else:
        words = [w.strip() for w in sizes.split(",")]
        if not all(w.isdecimal() for w in words):
            raise InputError(f"--sizes cannot be {sizes!r}", hint="write numbers: 1,16,128")
        wanted = [int(w) for w in words]
    return [{**{d: dims[d][0] for d in others}, last: n} for n in wanted]


def _example(spec: TensorSpec, sizes: dict[str, int]) -> Tensor:
    shape = [sizes.get(s, 1) if isinstance(s, str) else s for s in spec.shape]
    dtype = DTYPES[spec.dtype]
    if dtype.is_floating_point:
        return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    return torch.ones(shape, dtype=dtype)
