"""Tiles of a layer: which, for how many tokens, on which GPU. A model decides, no table of devices.

Both GEMMs share the rows of a tile, because slots are sorted and padded for it once. Of all tiles that fit the hardware
those are taken that the model says finish first. Where memory decides, many do; then those that keep the units least
busy, which leaves most room for what the model does not know.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

from moec.backends.triton.launches.device import Device
from moec.backends.triton.launches.gemm_time import Gemm, Times, times, with_order
from moec.backends.triton.launches.load import Load, counted, even
from moec.backends.triton.launches.table import Tiles, tiles_for
from moec.backends.triton.launches.tiles import Tile, may_halve

SPLITS = (1, 2, 4)
"""Blocks that may share a sum of the down GEMM; the activation needs whole sums of the up GEMM."""
_EQUAL = 1 + 1e-9
_NEAR = 4
"""Tiles of each GEMM and number of rows that are worth measuring."""


@dataclass(frozen=True)
class Layer:
    """Sizes of one layer.

    Attributes:
        hidden: Width of a token.
        inner: Width of the activation.
        width: Width of the result.
        experts: Number of experts.
        top_k: Experts of a token.
        parts: 2 for gate and up, else 1.
        dtype: Of tokens and weights.
        up_bias, down_bias: There are biases, which take registers.
        apart: Experts lie apart, behind a table of addresses, which take registers.
        halves: A tile of the down GEMM has columns of both halves of the result.
    """

    hidden: int
    inner: int
    width: int
    experts: int
    top_k: int
    parts: int = 2
    dtype: str = "bf16"
    up_bias: bool = False
    down_bias: bool = False
    apart: bool = False
    halves: bool = False

    @property
    def gemms(self) -> tuple[Gemm, Gemm]:
        """Up and down."""
        up = Gemm(self.hidden, self.inner, self.parts, self.dtype, self.experts, self.top_k, self.up_bias, True)
        parts = 2 if self.halves else 1
        down = Gemm(self.inner, self.width // parts, parts, self.dtype, self.experts, 1, self.down_bias)
        return replace(up, apart=self.apart), replace(down, apart=self.apart)

    def of(self, down: Tile) -> Layer:
        """The layer as such a tile of the down GEMM has it."""
        return replace(self, halves=down.halves)

    @property
    def forms(self) -> tuple[Layer, ...]:
        """The layer with each form of its down GEMM that there are kernels for."""
        return (self, replace(self, halves=True)) if may_halve(self.dtype, self.width) else (self,)


@dataclass(frozen=True)
class Choice:
    """What is chosen, and what is expected of it.

    Attributes:
        up, down: The tiles; their ``block_m`` is the same.
        seconds: Predicted, of both GEMMs.
        limit_seconds: No kernel can be faster.
        bound: ``"memory"`` or ``"compute"``: what the limit is of.
        parts: Predicted seconds and limits of up and of down.
    """

    up: Tile
    down: Tile
    seconds: float
    limit_seconds: float
    bound: str
    parts: tuple[tuple[float, float], tuple[float, float]]


def load_of(layer: Layer, load: int | Sequence[int]) -> Load:
    """Rows of the experts, for a number of tokens that spread evenly or for a histogram."""
    return even(load, layer.top_k, layer.experts) if isinstance(load, int) else counted(load)


def pick(layer: Layer, load: int | Sequence[int], device: Device) -> Choice:
    """The tiles for a call.

    Args:
        layer: Its sizes.
        load: Tokens, spread evenly over the experts; or the rows of every expert.
        device: The architecture.
    """
    if isinstance(load, int):
        return _pick(layer, load, device)
    return _best(layer, counted(load), device)


@lru_cache(maxsize=4096)
def _pick(layer: Layer, tokens: int, device: Device) -> Choice:
    return _best(layer, even(tokens, layer.top_k, layer.experts), device)


def _best(layer: Layer, load: Load, device: Device) -> Choice:
    found = [Search(form, load, device).choices(1)[0] for form in layer.forms]
    return min(found, key=lambda choice: choice.seconds)


def ranked(layer: Layer, load: Load, device: Device) -> list[Choice]:
    """The best choice of each form for each number of rows of a tile, best first."""
    found = [choice for form in layer.forms for choice in Search(form, load, device).choices()]
    return sorted(found, key=lambda choice: choice.seconds)


def near(layer: Layer, load: Load, device: Device, most: int) -> list[Choice]:
    """Pairs of good tiles of one number of rows, best first: what the model may have ranked wrongly."""
    found = [choice for form in layer.forms for choice in Search(form, load, device).near(most)]
    return sorted(found, key=lambda choice: choice.seconds)[:most]


class Search:
    """All tiles of both GEMMs with their times, of one form of the down GEMM."""

    def __init__(self, layer: Layer, load: Load, device: Device) -> None:
        self.layer, self.gemms, self.load, self.device = layer, layer.gemms, load, device
        splits = zip(self.gemms, ((1,), (1,) if layer.halves else SPLITS), strict=True)
        self.tables = [tiles_for(device, g.parts, g.dtype, s, g.biased, g.gathered, g.apart) for g, s in splits]
        self.found = [times(g, load, device, t) for g, t in zip(self.gemms, self.tables, strict=True)]

    def choices(self, most: int | None = None) -> list[Choice]:
        """The best pair of tiles for each number of rows, best first."""
        sizes = [m for m in self.tables[0].rows if m in self.tables[1].rows]
        pairs = [[_first(t, f, m) for t, f in zip(self.tables, self.found, strict=True)] for m in sizes]
        busy = [self._sum("unit", pair) for pair in pairs]
        total = [self._sum("seconds", pair) for pair in pairs]
        least = min(total) * _EQUAL
        order = sorted(range(len(pairs)), key=lambda i: (max(total[i], least), busy[i]))
        return [self._choice(pairs[i]) for i in order[:most]]

    def near(self, most: int) -> list[Choice]:
        """Pairs of good tiles of one number of rows, best first: what the model may have ranked wrongly."""
        found: list[tuple[float, int, int]] = []
        for m in self.tables[0].rows:
            if m in self.tables[1].rows:
                ups, downs = (_nearest(t, f, m) for t, f in zip(self.tables, self.found, strict=True))
                found += [(self._sum("seconds", (u, d)), u, d) for u in ups for d in downs]
        return [self._choice((u, d)) for _, u, d in sorted(found)[:most]]

    def _sum(self, what: str, pair: Sequence[int]) -> float:
        return sum(float(getattr(f, what)[at]) for f, at in zip(self.found, pair, strict=True))

    def _choice(self, pair: Sequence[int]) -> Choice:
        limits = [g.limit(self.load, self.device) for g in self.gemms]
        memory, compute = (sum(x) for x in zip(*limits, strict=True))
        seconds = [float(f.seconds[at]) for f, at in zip(self.found, pair, strict=True)]
        least = [max(limit) for limit in limits]
        up, down = (
            with_order(t.tiles[at], g, self.device, bool(f.late[at]))
            for t, f, at, g in zip(self.tables, self.found, pair, self.gemms, strict=True)
        )
        down = replace(down, halves=self.layer.halves)
        bound = "memory" if memory >= compute else "compute"
        return Choice(up, down, sum(seconds), sum(least), bound, ((seconds[0], least[0]), (seconds[1], least[1])))


def _first(table: Tiles, found: Times, m: tuple[int, int]) -> int:
    """Of the tiles with such blocks of rows, the one that is fastest and keeps the units least busy."""
    at = table.rows[m]
    seconds = found.seconds[at]
    close = at[seconds <= seconds.min() * _EQUAL]
    return int(min(close.tolist(), key=lambda i: (found.unit[i], table.moved[:, i].max() * table.ahead[i])))


def _nearest(table: Tiles, found: Times, m: tuple[int, int]) -> list[int]:
    """The fastest tiles with such blocks of rows."""
    return sorted(table.rows[m].tolist(), key=lambda i: (float(found.seconds[i]), float(found.unit[i])))[:_NEAR]
