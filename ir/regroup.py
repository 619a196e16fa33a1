"""Which tokens of several micro-batches should run together, so that each batch touches few experts.

Given are the experts of every token and the sizes of the batches. Wanted is a partition of the tokens into batches of
these sizes whose ``cost``, the number of distinct experts summed over the batches, is small. (ExpertFlow,
arXiv:2410.17954, section 4.3, states the problem and answers it with K-means.)

The answer for two batches: several starts are improved at once, first as K-means of equal batches does, then with the
marginal cost of a concave count ``1 - exp(-n / tau)`` of an expert's tokens in a batch in the place of distances, where
tau falls until the count is nearly the cost itself; the best of all that was seen then has pairs of tokens exchanged as
long as that lowers the cost. More batches are halves of halves, of which every two are improved once more.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, combinations
from typing import Any

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]
Indices = npt.NDArray[np.int64]


@dataclass(frozen=True)
class _Effort:
    """How long is looked for an answer.

    Attributes:
        starts: Partitions that are improved at once.
        means: Rounds of K-means.
        falls: Rounds in which tau falls.
        kept: Partitions that are then improved by exchanges.
        exchanges: Exchanges of each.
    """

    starts: int
    means: int
    falls: int
    kept: int
    exchanges: int


_FEW = 48
_SMALL = _Effort(starts=32, means=3, falls=5, kept=8, exchanges=64)
_LARGE = _Effort(starts=16, means=4, falls=6, kept=2, exchanges=40)
"""Of up to ``_FEW`` tokens, where a layer is quick, all is small; of more, it must stay a small part of a layer."""
_LAST_TAU = 0.35
_ONE_THREAD = 1 << 18
"""Multiply-adds of a product from which on OpenBLAS takes several threads."""
_CANDIDATES = 24
"""Tokens of each batch that are looked at for an exchange: those that save most alone."""


def incidence(ids: npt.NDArray[Any], experts: int) -> Floats:
    """``[T, E]``: 1 where a token (a row of ``ids``, int[T, k]) chose an expert. Ids outside 0 .. E-1 mean none."""
    found = np.zeros((len(ids), experts + 1), np.float32)
    kept = np.where((ids < 0) | (ids >= experts), experts, ids)
    found[np.arange(len(ids))[:, None], kept] = 1
    return found[:, :experts]


def cost(chosen: Floats, groups: Sequence[Indices]) -> int:
    """Distinct experts that the batches touch, summed over the batches."""
    return sum(int(np.count_nonzero(chosen[g].any(axis=0))) for g in groups)


def as_given(sizes: Sequence[int]) -> list[Indices]:
    """The tokens of every batch as they come."""
    ends = list(accumulate(sizes))
    return [np.arange(end - size, end) for size, end in zip(sizes, ends, strict=True)]


def regroup(chosen: Floats, sizes: Sequence[int], least: float = 0.0) -> list[Indices]:
    """The tokens of every batch, ascending.

    Args:
        chosen: ``[T, E]``, from :func:`incidence`.
        sizes: Tokens of every batch; they add up to T.
        least: The part of the cost that has to be saved. Where less is, tokens stay as they come.

    Returns:
        One array a batch, of its size; every token is in one of them. The cost is never above that of
        :func:`as_given`. Equal input gives equal output.
    """
    given = as_given(sizes)
    shared = chosen[:, chosen.sum(axis=0) > 1]  # an expert of one token costs 1, wherever that is
    if not shared.shape[1]:
        return given
    found = _halve(np.ascontiguousarray(shared), given)
    for a, b in combinations(range(len(sizes)), 2) if len(sizes) > 2 else ():
        found[a], found[b] = _two(shared, (found[a], found[b]))
    before, after = cost(chosen, given), cost(chosen, found)
    return found if after < before and before - after >= least * before else given


def _halve(chosen: Floats, given: list[Indices]) -> list[Indices]:
    """Halves of halves, until each is one batch."""
    if len(given) < 2:
        return [np.sort(g) for g in given]
    middle = len(given) // 2
    sides = [np.concatenate(part) for part in (given[:middle], given[middle:])]
    found = []
    for tokens, part in zip(_two(chosen, (sides[0], sides[1])), (given[:middle], given[middle:]), strict=True):
        ends = list(accumulate(len(g) for g in part))
        found += _halve(chosen, [tokens[end - len(g) : end] for g, end in zip(part, ends, strict=True)])
    return found


def _two(chosen: Floats, given: tuple[Indices, Indices]) -> tuple[Indices, Indices]:
    """Two batches of the sizes of ``given`` that touch no more experts than these; tokens ascending in each."""
    tokens, size = np.concatenate(given), len(given[0])
    if not 0 < size < len(tokens):
        return np.sort(given[0]), np.sort(given[1])
    first = two_batches(chosen[tokens], size) > 0
    if 2 * size == len(tokens) and (2 * int(np.count_nonzero(first[:size])), bool(first[0])) < (size, True):
        first = ~first  # the batch that kept most of its tokens keeps its place
    return np.sort(tokens[first]), np.sort(tokens[~first])


def two_batches(chosen: Floats, size: int) -> Floats:
    """Two batches of few experts.

    Args:
        chosen: ``[T, E]``.
        size: Tokens of the first one, which as it comes are the first ones.

    Returns:
        ``[T]``, with 1 for the tokens of the first batch as found.
    """
    start = np.zeros(len(chosen), np.float32)
    start[:size] = 1
    effort = _SMALL if len(chosen) <= _FEW else _LARGE
    return _exchange(chosen, _improve(chosen, start, effort), effort.exchanges)


def _improve(chosen: Floats, start: Floats, effort: _Effort) -> Floats:
    """Good partitions of two batches, ``[kept, T]`` with 1 for the first batch.

    Args:
        chosen: ``[T, E]``.
        start: ``[T]``, one of the partitions to begin with; the others are random.
        effort: How many, and how long.
    """
    tokens, size = len(start), int(start.sum())
    total, turned = chosen.sum(axis=0), np.ascontiguousarray(chosen.T)
    rows = np.arange(effort.starts)[:, None]

    def nearest(distance: Floats) -> Floats:
        """Of every start the tokens that are nearest to the first batch, as many as it has."""
        side = np.zeros_like(distance)
        side[rows, np.argpartition(distance, size - 1, axis=1)[:, :size]] = 1
        return side

    draw = np.random.default_rng(0)
    ends = draw.integers(0, tokens, (2, effort.starts))  # two tokens each: the batches are those nearest to them
    side = nearest(_product(chosen[ends[0]] - chosen[ends[1]], turned))
    side[0] = start
    best, kept = np.full(effort.starts, np.inf), side.copy()
    taus = np.geomspace(max(1.5, float(total.mean()) / 2), _LAST_TAU, effort.falls)
    for turn in range(effort.means + effort.falls + 1):
        one = _product(side, chosen)
        other = total - one
        touched = np.count_nonzero(one, axis=1) + np.count_nonzero(other, axis=1)
        better = touched < best
        best[better], kept[better] = touched[better], side[better]
        if turn < effort.means:
            side = nearest(_product(other / np.float32(tokens - size) - one / np.float32(size), turned))
        elif turn < effort.means + effort.falls:
            rate = np.float32(-1 / taus[turn - effort.means])
            joining = _product(np.exp(np.concatenate([one, other]) * rate), turned)
            joins_one, joins_other = joining[: effort.starts], joining[effort.starts :]
            stays = np.exp(-rate)  # a token counts among those of its own batch
            side = nearest(np.where(side > 0, stays * joins_one - joins_other, joins_one - stays * joins_other))
    order = np.argsort(best, kind="stable")
    return kept[order[: effort.kept]]


def _exchange(chosen: Floats, sides: Floats, most: int) -> Floats:
    """Exchange two tokens in each of some partitions, as long as fewer experts are touched. The best, ``[T]``.

    Args:
        chosen: ``[T, E]``.
        sides: ``[N, T]`` with 1 for the first batch; it is changed.
        most: Exchanges at most.
    """
    lines, size = np.arange(len(sides)), int(sides[0].sum())
    some = min(_CANDIDATES, size, len(chosen) - size)
    total, turned = chosen.sum(axis=0), np.ascontiguousarray(chosen.T)
    one = _product(sides, chosen)
    for _ in range(most):
        other = total - one
        alone_one, alone_other = one == 1, other == 1
        # What leaving one batch for the other saves, less what it costs there.
        signs = np.concatenate([alone_one, alone_other]).astype(np.float32)
        saves = _product(signs - np.concatenate([other == 0, one == 0]), turned)
        here = sides > 0
        saves_one = np.where(here, saves[: len(sides)], -np.inf)
        saves_other = np.where(here, -np.inf, saves[len(sides) :])
        a, b = _largest(saves_one, some), _largest(saves_other, some)
        # An expert of both tokens stays in both batches, so it saves nothing.
        alone = signs[: len(sides)] + signs[len(sides) :]
        common = (chosen[a] * alone[:, None]) @ chosen[b].transpose(0, 2, 1)
        saved = saves_one[lines[:, None], a][:, :, None] + saves_other[lines[:, None], b][:, None] - common
        at = saved.reshape(len(sides), -1).argmax(axis=1)
        moves = np.flatnonzero(saved.reshape(len(sides), -1)[lines, at] > 0)
        if not len(moves):
            break
        leaves, comes = a[moves, at[moves] // some], b[moves, at[moves] % some]
        sides[moves, leaves], sides[moves, comes] = 0, 1
        one[moves] += chosen[comes] - chosen[leaves]
    touched = np.count_nonzero(one, axis=1) + np.count_nonzero(total - one, axis=1)
    best: Floats = sides[touched.argmin()]
    return best


def _largest(values: Floats, count: int) -> Indices:
    """Where the ``count`` largest values of every row are."""
    return np.argpartition(values, values.shape[1] - count, axis=1)[:, values.shape[1] - count :]


def _product(a: Floats, b: Floats) -> Floats:
    """``a @ b`` in pieces so small that the library takes one thread: the others are the layers'."""
    rows = max(1, _ONE_THREAD // b.size)
    return a @ b if len(a) <= rows else np.concatenate([a[i : i + rows] @ b for i in range(0, len(a), rows)])
