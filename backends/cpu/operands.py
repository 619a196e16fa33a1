"""Weights and their gradients as kernels take them: fields of 64 bits, without a copy.

The fields of a matrix are table, base, bytes between experts, bytes between rows: a stacked tensor has a base, a list
of tensors a table of addresses to which the base is added. A tensor that is not wanted is zeros.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

from torch import Tensor

ALIGN = 64
"""Bytes: a line of the cache."""
NOTHING = [0] * 4
Tensors = Sequence[Tensor | None]


def aligned(size: int) -> int:
    """``size`` up to whole lines."""
    return -(-size // ALIGN) * ALIGN


class Pointers:
    """Tables of addresses that must live until the call is over."""

    def __init__(self) -> None:
        self.kept: list[object] = []

    def table(self, tensors: Tensors) -> int:
        """Address of an array of the tensors' addresses, 0 for None."""
        self.kept.append(tensors)
        return self.numbers([0 if t is None else t.data_ptr() for t in tensors])

    def without_tensors(self) -> Pointers:
        """The same tables; tensors are left to whoever owns them."""
        other = Pointers()
        other.kept = [k for k in self.kept if isinstance(k, ctypes.Array)]
        return other

    def numbers(self, values: Sequence[int]) -> int:
        """Address of an array of 64-bit numbers."""
        array = (ctypes.c_int64 * len(values))(*values)
        self.kept.append(array)
        return ctypes.addressof(array)


def form_of(tensors: Tensors, form_nk: bool) -> bool | None:
    """Whether the weights' rows in memory are outputs: True or False, or None where that differs or is neither.

    What the op calls ``nk`` may be a transposed view. A side of one element says nothing.
    """
    there = [t for t in tensors if t is not None]
    if all(t.stride(-1) == 1 or t.shape[-1] == 1 for t in there):
        return form_nk
    if all(t.stride(-2) == 1 or t.shape[-2] == 1 for t in there):
        return not form_nk
    return None


def one_stride(tensors: Tensors) -> bool:
    """The rows of all weights lie equally far apart."""
    return len({t.stride()[-2:] for t in tensors if t is not None}) < 2


class Operands:
    """Fields of the operands of one layer.

    Args:
        experts, inner, layout: Of the layer.
        stacked: Weights of all experts are one tensor.
        only: The experts of a stacked tensor that are meant, the others left out as None is of a list; None for all.
    """

    def __init__(self, experts: int, inner: int, layout: str, stacked: bool, only: Sequence[int] | None = None) -> None:
        self.experts, self.inner, self.layout, self.stacked, self.only = experts, inner, layout, stacked, only

    def of(self, only: Sequence[int] | None) -> Operands:
        """The same layer's, of these experts."""
        return Operands(self.experts, self.inner, self.layout, self.stacked, only)

    def up(self, tensors: Tensors, nk: bool, form_nk: bool, keep: Pointers) -> tuple[list[int], list[int]]:
        """Gate and up; interleaved rows are one matrix, a single projection has no gate."""
        gate = self.matrix(tensors, 0, nk, form_nk, keep)
        if self.layout == "separate":
            return gate, self.matrix(tensors, 1, nk, form_nk, keep)
        item = next((t.element_size() for t in tensors if t is not None), 0)
        return gate, self._second(gate, self.inner * (gate[3] if nk else item))

    def up_bias(self, tensors: Tensors, keep: Pointers) -> tuple[list[int], list[int]]:
        """Biases of gate and up; of interleaved rows, the two are every second element."""
        gate = self.vector(tensors, 0, keep)
        if self.layout == "separate":
            return gate, self.vector(tensors, 1, keep)
        if self.layout == "interleaved":
            return [*gate[:3], 2 * gate[3]], [gate[0], gate[1] + gate[3], gate[2], 2 * gate[3]]
        return gate, self._second(gate, self.inner * gate[3])

    def up_bias_gradient(self, tensors: Tensors, keep: Pointers) -> tuple[list[int], list[int]]:
        """As ``up_bias``, but interleaved rows are one vector."""
        gate = self.vector(tensors, 0, keep)
        if self.layout == "separate":
            return gate, self.vector(tensors, 1, keep)
        return gate, self._second(gate, self.inner * gate[3])

    def matrix(self, tensors: Tensors, part: int, nk: bool, form_nk: bool, keep: Pointers) -> list[int]:
        """A weight whose rows in memory are outputs (``nk``); the op calls its form ``form_nk``."""
        return self._fields(tensors, part, -2 if nk == form_nk else -1, keep)

    def vector(self, tensors: Tensors, part: int, keep: Pointers) -> list[int]:
        """A bias: "between rows" is between elements."""
        return self._fields(tensors, part, -1, keep) if tensors else NOTHING

    def _second(self, first: list[int], skip: int) -> list[int]:
        return [first[0], first[1] + skip, *first[2:]] if self.layout == "concat" and any(first) else NOTHING

    def _fields(self, tensors: Tensors, part: int, row_dim: int, keep: Pointers) -> list[int]:
        if self.stacked:
            t = tensors[part]
            if t is None:
                return NOTHING
            expert, row = t.stride(0) * t.element_size(), t.stride(row_dim) * t.element_size()
            if self.only is None:
                return [0, t.data_ptr(), expert, row]
            places = [0] * self.experts
            for e in self.only:
                places[e] = t.data_ptr() + e * expert
            return [keep.numbers(places), 0, 0, row]
        each = tensors[part * self.experts : (part + 1) * self.experts]
        like = next((t for t in each if t is not None), None)
        if like is None:
            return NOTHING
        return [keep.table(each), 0, 0, like.stride(row_dim) * like.element_size()]
