"""Experts whose weights are not alike: widths of their own, or rows that lie apart differently."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from moec.backends.cpu.operands import Pointers


def row_bytes(tensors: Sequence[Tensor], experts: int, row_dim: int) -> list[int] | None:
    """Bytes between the rows of every expert's weight; None where those of its gate and of its up differ.

    Args:
        tensors: One of each expert, gates before ups where they are apart; stacked ones count as one expert.
        experts: How many there are.
        row_dim: Dimension whose stride is meant.
    """
    found = [t.stride(row_dim) * t.element_size() for t in tensors]
    return found[:experts] if found[:experts] * (len(found) // experts) == found else None


def table_of(rows: Sequence[int], keep: Pointers) -> int:
    """Address of a table of numbers, or 0 where they are all equal."""
    return keep.numbers(rows) if len(set(rows)) > 1 else 0


def later(tensors: Sequence[Tensor], skips: Sequence[int], first: list[int], keep: Pointers) -> list[int]:
    """Fields of what begins ``skips`` bytes into every expert's tensor; ``first`` are those of the tensors' begin."""
    return [keep.numbers([t.data_ptr() + skip for t, skip in zip(tensors, skips, strict=True)]), *first[1:]]


def alike(vectors: list[Tensor]) -> list[Tensor]:
    """Biases whose elements lie equally far apart."""
    return vectors if len({v.stride(-1) for v in vectors}) < 2 else [v.contiguous() for v in vectors]
