"""Rows that ranks of one machine hand to each other in memory that they share.

A link of its own brings rows without a processor. gloo over the loopback does not: its threads copy, and where no
core is to spare, the one that receives may keep asking for a lock whose owner waits for that very core, up to 4 ms at a
time.
Here a sender copies its rows once into its box, and who receives them copies them out, mostly while it would wait.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor

ROOM = 1 << 28
"""Bytes of a rank's box; of them only what was used is there."""
PATIENCE = 60.0
"""Seconds for which a sender waits for others to take what fills its box."""
_ALIGN = 64
_LOOK = 5e-5


@dataclass(frozen=True)
class _Left:
    """A message that is not known to be taken by all: its number, and where it lies."""

    number: int
    first: int
    last: int


class Boxes:
    """A box of every rank, and the numbers of the messages that each has taken.

    Args:
        store: Where ranks tell each other of the memory; they make the object together.
        rank: This one.
        size: Ranks.
        room: Bytes of a box.
    """

    def __init__(self, store: Any, rank: int, size: int, room: int = ROOM) -> None:
        self.rank, self.size, self.room = rank, size, room
        self._taken = shared(store, "taken", rank, size, torch.zeros(size, dtype=torch.float64))
        self._boxes = shared(store, "boxes", rank, size, torch.empty((size, room), dtype=torch.uint8, device="meta"))
        self._left: deque[_Left] = deque()
        self._done: set[int] = set()  # taken here, behind one that is not
        self._next = 0

    def leave(self, number: int, rows: Tensor, sizes: Sequence[int]) -> int:
        """Copy what message ``number`` sends into this rank's box.

        Args:
            number: Of the message; they count up from 0.
            rows: All rows, in order of the ranks that they are for.
            sizes: Rows for each.

        Returns:
            Where it lies, for :meth:`take`.
        """
        flat, row = _bytes(rows), _row_bytes(rows)
        header = -(-8 * self.size // _ALIGN) * _ALIGN
        edges = [n * row for n in accumulate(sizes, initial=0)]
        first = self._place(number, header + edges[-1])
        box = self._boxes[self.rank, first:]
        box[: 8 * self.size].view(torch.int64).copy_(torch.tensor(edges[:-1]))
        for other, (a, b) in enumerate(pairwise(edges)):
            if other != self.rank:
                box[header + a : header + b].copy_(flat[a:b])
        return first

    def _place(self, number: int, bytes: int) -> int:
        """Where so many bytes are free; waits until others have taken what is in the way."""
        bytes = -(-bytes // _ALIGN) * _ALIGN
        if bytes > self.room:
            raise RuntimeError(f"a message of {bytes} bytes does not fit into a box of {self.room}")
        deadline = time.monotonic() + PATIENCE
        while (first := self._free(bytes)) is None:
            if time.monotonic() > deadline:
                raise RuntimeError(f"{len(self._left)} messages fill a box of {self.room} bytes, and nobody takes them")
            time.sleep(_LOOK)
        self._left.append(_Left(number, first, first + bytes))
        return first

    def _free(self, bytes: int) -> int | None:
        taken = float(self._taken.min())
        while self._left and self._left[0].number < taken:
            self._left.popleft()
        if not self._left:
            return 0  # where the memory is warm
        oldest, last = self._left[0].first, self._left[-1].last
        if last > oldest:
            return last if last + bytes <= self.room else 0 if bytes < oldest else None
        return last if last + bytes < oldest else None

    def take(self, number: int, places: Sequence[int], out: Tensor, sizes: Sequence[int], own: Tensor) -> None:
        """Copy out what message ``number`` brings this rank.

        Args:
            number: Of the message.
            places: Where every rank left it.
            out: Where all rows go, in order of the ranks that they are from.
            sizes: Rows from each.
            own: The rows that stay here.
        """
        flat, row = _bytes(out), _row_bytes(out)
        header = -(-8 * self.size // _ALIGN) * _ALIGN
        edges = [n * row for n in accumulate(sizes, initial=0)]
        for other, (a, b) in enumerate(pairwise(edges)):
            if other == self.rank:
                flat[a:b].copy_(_bytes(own))
            else:
                box = self._boxes[other, places[other] :]
                at = header + int(box[8 * self.rank : 8 * self.rank + 8].view(torch.int64))
                flat[a:b].copy_(box[at : at + b - a])
        self._done.add(number)
        while self._next in self._done:
            self._done.remove(self._next)
            self._next += 1
        self._taken[self.rank] = float(self._next)


def _bytes(t: Tensor) -> Tensor:
    return t.detach().reshape(-1).view(torch.uint8)


def _row_bytes(t: Tensor) -> int:
    return t[:1].numel() * t.element_size() if len(t) else 0


def shared(store: Any, name: str, rank: int, size: int, like: Tensor) -> Tensor:
    """A tensor of zeros in memory of all ranks, which make it together.

    Args:
        store: Where they tell each other of it.
        name: What it is called there.
        rank: This one.
        size: Ranks.
        like: Of this shape and type.
    """
    bytes, let_go = like.numel() * like.element_size(), None
    if rank == 0:
        path, let_go = _file(bytes)
        store.set(f"moec/{name}", path)
    path = store.get(f"moec/{name}").decode()
    found = torch.from_file(path, shared=True, size=like.numel(), dtype=like.dtype)
    store.set(f"moec/{name}/{rank}", "1")
    if let_go is not None:
        store.wait([f"moec/{name}/{r}" for r in range(size)])
        let_go()  # it lives as long as somebody has it
    return found.view(like.shape)


def _file(bytes: int) -> tuple[str, Callable[[], None]]:
    """A file, on Linux in memory alone, and what to call when all have it."""
    if hasattr(os, "memfd_create"):
        handle = os.memfd_create("moec")
        os.ftruncate(handle, bytes)
        return f"/proc/{os.getpid()}/fd/{handle}", lambda: os.close(handle)
    handle, path = tempfile.mkstemp(prefix="moec_delayed_")
    os.ftruncate(handle, bytes)
    os.close(handle)
    return path, lambda: os.unlink(path)
