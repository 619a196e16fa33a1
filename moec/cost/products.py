"""Time of products of matrices on a device that nobody measured.

    arithmetic = whole tiles x 2 x inputs x outputs / (peak x EFFICIENCY)
    seconds    = the longer of (arithmetic + results / bandwidth) and (all bytes / bandwidth)

Results come on top of arithmetic where one block of threads fills a multiprocessor, as Hopper's kernels do: the sums of
a tile lie in the registers of the warps that made them, and are written before these warps begin the next tile. Older
GPUs run several blocks beside each other, and Blackwell has tensor memory for two tiles; there results are written
while others are summed. So what a product loses by a short sum (few inputs) is the time of its results, and follows
from the memory's bandwidth.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from moec.targets import Target, described_as

EFFICIENCY = 0.7
"""Part of a vendor's peak that whole tiles reach while they are summed, where nothing was measured."""
TILE = {"cuda": 128, "hip": 128, "ascend": 128, "cpu": 16}
"""Rows that a kernel of this kind of target computes together; fewer cost as much."""
ONE_BLOCK = frozenset({"cuda:sm90"})
"""Targets whose kernels write a tile before they begin the next."""


@dataclass(frozen=True)
class Product:
    """Sizes of ``rows x inputs`` times ``inputs x outputs``, of several groups that have weights of their own.

    Attributes:
        rows: Of each group.
        inputs: What is summed over.
        outputs: Width of the result.
        groups: How many.
        item, weight_item, result_item: Bytes of an element of rows, weights and results.
    """

    rows: float
    inputs: float
    outputs: float
    groups: float = 1
    item: float = 2
    weight_item: float = 2
    result_item: float = 2

    @property
    def result_bytes(self) -> float:
        return self.groups * self.rows * self.outputs * self.result_item

    @property
    def bytes(self) -> float:
        """Rows and weights read, results written, once each."""
        read = self.rows * self.inputs * self.item + self.inputs * self.outputs * self.weight_item
        return self.groups * read + self.result_bytes


def whole_rows(rows: float, target: Target) -> float:
    """Rows that are computed where ``rows`` are asked for."""
    tile = TILE[target.kind]
    return math.ceil(rows / tile) * tile


def written_seconds(bytes: float, target: Target) -> float:
    """What results take beside arithmetic."""
    return bytes / target.memory_bandwidth if described_as(target.name) in ONE_BLOCK else 0.0


def product_seconds(product: Product, target: Target, rate: float) -> float:
    """Of one kernel, its start aside; nothing where there is no row.

    Args:
        product: Its sizes.
        target: Where; its memory bandwidth is what streams reach.
        rate: Peak operations a second of these types.
    """
    if product.rows <= 0:
        return 0.0
    flops = 2 * product.groups * whole_rows(product.rows, target) * product.inputs * product.outputs
    arithmetic = flops / (rate * EFFICIENCY) + written_seconds(product.result_bytes, target)
    return max(arithmetic, product.bytes / target.memory_bandwidth)
