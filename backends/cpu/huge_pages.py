"""Memory on huge pages (2 MB), so that the processor translates addresses five hundred times less often.

A kernel that reads weights where they lie walks many rows at once, each on other pages of 4 KB. Where translating is
dear, on virtual machines above all, where every step of a walk is a walk itself, that and not bandwidth is its limit.
"""

from __future__ import annotations

import ctypes
import errno
import os
import sys
from collections.abc import Iterator, Sequence
from functools import lru_cache

import torch
from torch import Tensor

HUGE = 2 << 20
"""Bytes of a huge page of x86."""
STRIDE = 32 * HUGE
"""Bytes that are moved at a time."""

_HUGEPAGE, _COLLAPSE = 14, 25  # of Linux' madvise; the second since 6.1


@lru_cache(maxsize=1)
def _libc() -> ctypes.CDLL:
    libc = ctypes.CDLL(None, use_errno=True)
    libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    return libc


def _advise(address: int, size: int, advice: int) -> int:
    """The error number, 0 if there was none."""
    return ctypes.get_errno() if _libc().madvise(address, size, advice) else 0


def inside(address: int, size: int) -> tuple[int, int]:
    """The whole huge pages within ``size`` bytes at ``address``: where they begin, and their bytes."""
    start = -(-address // HUGE) * HUGE
    return start, max(0, (address + size) // HUGE * HUGE - start)


def ask(address: int, size: int) -> None:
    """Memory that nobody has touched yet shall come as huge pages. A wish: what the system makes of it is not told."""
    start, length = inside(address, size)
    if length and sys.platform == "linux":
        _advise(start, length, _HUGEPAGE)


def empty(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """As ``torch.empty``, on huge pages where the system has them."""
    fresh = torch.empty(shape, dtype=dtype)
    ask(fresh.data_ptr(), fresh.numel() * fresh.element_size())
    return fresh


def move(address: int, size: int) -> Iterator[tuple[int, str]]:
    """Moves touched memory to huge pages; its addresses and contents stay.

    Yields:
        Bytes done, and why they could not be moved, or nothing if they were. All yields add up to ``size``.
    """
    start, length = inside(address, size)
    if size > length:
        yield size - length, "no whole huge page"
    if not length:
        return
    if sys.platform != "linux":
        yield length, "only Linux moves memory to huge pages"
        return
    _advise(start, length, _HUGEPAGE)
    for at in range(start, start + length, STRIDE):
        some = min(STRIDE, start + length - at)
        failed = _advise(at, some, _COLLAPSE)
        if failed == errno.EAGAIN:  # somebody held a page; the next time is mostly good
            failed = _advise(at, some, _COLLAPSE)
        yield some, _reason(failed) if failed else ""


def _reason(number: int) -> str:
    if number == errno.EINVAL:
        return "memory that is mapped from a file, or a Linux older than 6.1"
    if number in (errno.ENOMEM, errno.EAGAIN):
        return "no huge page was free"
    return os.strerror(number)
