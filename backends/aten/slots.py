"""Slots (token, k-th choice) sorted by expert, and cut into groups whose rows fit the cache."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

Group = list[tuple[int, int, int]]
"""Segments of slots: expert, first row, past last row."""
GROUP_BYTES = 2 << 20
"""Working rows of one group of experts. Larger groups call fewer ops, smaller ones keep their rows in the cache."""


@dataclass(frozen=True)
class Slots:
    """The slots that go to an expert, in the order of their experts (stable in token and k).

    Attributes:
        order: i64[R] slot numbers ``token * k + j``.
        tokens: i64[R] token of each.
        segments: ``(expert, first row, past last row)`` of every expert that has rows.
        total: T * k; more than R where there are sentinels.
    """

    order: Tensor
    tokens: Tensor
    segments: list[tuple[int, int, int]]
    total: int

    @property
    def live(self) -> int:
        """R, the number of slots that go to an expert."""
        return self.segments[-1][2] if self.segments else 0

    def groups(self, row_bytes: int) -> Iterator[list[tuple[int, int, int]]]:
        """Neighbouring segments together, as many as ``GROUP_BYTES`` allows, at least one."""
        limit = max(1, GROUP_BYTES // max(1, row_bytes))
        group: list[tuple[int, int, int]] = []
        for segment in self.segments:
            if group and segment[2] - group[0][1] > limit:
                yield group
                group = []
            group.append(segment)
        if group:
            yield group

    def inverse(self) -> Tensor:
        """i64[T*k]: the row of every slot; 0 for a slot without an expert."""
        rows = torch.arange(self.live, device=self.order.device)
        make = self.order.new_empty if self.live == self.total else self.order.new_zeros
        return make((self.total,)).index_copy_(0, self.order, rows)

    def dead(self) -> Tensor | None:
        """bool[T*k]: slots without an expert, or None if there are none."""
        if self.live == self.total:
            return None
        dead = torch.ones(self.total, dtype=torch.bool, device=self.order.device)
        return dead.index_fill_(0, self.order, False)


def sort_slots(ids: Tensor, experts: int) -> Slots:
    """Sort the slots of ``ids`` (int[T, k]); ids outside ``0 .. experts-1`` go nowhere."""
    top_k = ids.shape[1]
    values, order = torch.sort(ids.reshape(-1), stable=True)
    edges = torch.searchsorted(values, torch.arange(experts + 1, dtype=values.dtype, device=values.device)).tolist()
    first, last = edges[0], edges[-1]
    if first or last < order.shape[0]:
        order = order[first:last]
    segments = [(e, a - first, b - first) for e, (a, b) in enumerate(pairwise(edges)) if b > a]
    return Slots(order, torch.div(order, top_k, rounding_mode="floor"), segments, ids.numel())
