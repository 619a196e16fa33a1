"""The kernel of one ``moe.experts`` program: pointers and strides of this call's tensors, and the compiled code."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from moec.backends.aten import ExpertsKernel as AtenExperts
from moec.backends.base import Kernel
from moec.backends.cpu import team, workspace
from moec.backends.cpu.backward import CpuBackward
from moec.backends.cpu.build import build
from moec.backends.cpu.isa import Isa
from moec.backends.cpu.load import Library
from moec.backends.cpu.source import Shape, write_source
from moec.ir.core import Op

_ALIGN = 64


class Pointers:
    """Tables of addresses that must live until the call is over."""

    def __init__(self) -> None:
        self.kept: list[object] = []

    def table(self, tensors: Sequence[Tensor]) -> int:
        """Address of an array of the tensors' addresses."""
        array = (ctypes.c_int64 * len(tensors))(*[t.data_ptr() for t in tensors])
        self.kept += [array, tensors]
        return ctypes.addressof(array)


class Code:
    """The functions of a compiled layer, and what working memory it wants (bytes)."""

    def __init__(self, library: Library) -> None:
        self.run = library.entry("moec_experts")
        self.a_row, self.o_row = library.number("moec_a_row"), library.number("moec_o_row")
        self.room = partial(library.number, "moec_room")


class CpuExperts(Kernel):
    """Forward and backward in generated C++; gradients that it does not have (see ``backward.py``) are aten's.

    Attributes:
        threads: Of a call; 0 for as many as torch is set to.
    """

    def __init__(self, op: Op, shape: Shape, isa: Isa, threads: int = 0) -> None:
        self.shape, self.isa, self.threads = shape, isa, threads
        self.aten = AtenExperts(op)
        self.spec = self.aten.spec
        self.gradients = CpuBackward(op, shape, self.spec, isa)
        self.codes: dict[tuple[bool, bool], Code] = {}
        self.lock = threading.Lock()
        self.code(self.spec.up_nk, self.spec.down_nk)

    def code(self, up_nk: bool, down_nk: bool) -> Code:
        """The compiled code for weights that lie so. Another than the program's own form is built when it is met."""
        found = self.codes.get((up_nk, down_nk))
        if found is None:
            with self.lock:
                found = Code(Library(build(write_source(self.shape, up_nk, down_nk), self.isa)))
                self.codes[up_nk, down_nk] = found
        return found

    def forward(self, inputs: list[Tensor]) -> list[Tensor]:
        x, ids, weights = inputs[:3]
        shape, spec = self.shape, self.spec
        tokens, top_k = ids.shape
        out = torch.empty((tokens, shape.width), dtype=spec.out_dtype)
        if not tokens:
            return [out]
        p = spec.params(inputs)
        up_nk, down_nk = _rows_are_outputs(p.up, spec.up_nk), _rows_are_outputs(p.down, spec.down_nk)
        if up_nk is None or down_nk is None:
            return self.aten.forward(inputs)  # no side of the matrix is contiguous
        if x.stride(1) != 1:
            x = x.contiguous()
        ids = ids.to(torch.int64).contiguous()
        weights = weights.contiguous()
        item, slots = x.element_size(), tokens * top_k
        code = self.code(up_nk, down_nk)
        room = _aligned(code.room(slots))
        a_bytes, o_bytes, ints = (
            _aligned(slots * code.a_row),
            _aligned(slots * code.o_row),
            _aligned(4 * (shape.experts + 1 + slots)),
        )
        keep = Pointers()
        gate, up = self._up(p.up, up_nk, keep)
        bias_gate, bias_up = self._up_bias(p.up_bias, keep)
        captures, post_captures = ([c.contiguous() for c in group] for group in (p.captures, p.post_captures))
        with team.SHARED.borrow(self.threads or torch.get_num_threads()) as threads:
            work = workspace.SHARED.take(a_bytes + o_bytes + ints + threads * room + _ALIGN)
            base = _aligned(work.data_ptr())
            code.run(
                [
                    x.data_ptr(), x.stride(0) * item, ids.data_ptr(), weights.data_ptr(), out.data_ptr(),
                    tokens, top_k, threads, room,
                    base, base + a_bytes, base + a_bytes + o_bytes + ints, base + a_bytes + o_bytes,
                    *gate, *up, *self._matrix(p.down, 0, down_nk, spec.down_nk, keep),
                    *bias_gate, *bias_up, *self._vector(p.down_bias, 0, keep),
                    keep.table(captures), keep.table(post_captures),
                ]
            )  # fmt: skip
            workspace.SHARED.give_back(work)
        return [out]

    def backward(
        self, grads: Sequence[Tensor | None], inputs: list[Tensor], needs: Sequence[bool]
    ) -> list[Tensor | None]:
        (grad,) = grads
        found = None if grad is None else self.gradients(grad, inputs, needs, self.threads or torch.get_num_threads())
        return self.aten.backward(grads, inputs, needs) if found is None else found

    def _up(self, tensors: list[Tensor], nk: bool, keep: Pointers) -> tuple[list[int], list[int]]:
        """``Matrix`` of gate and of up; interleaved rows are read as one matrix, single ones have no gate."""
        gate = self._matrix(tensors, 0, nk, self.spec.up_nk, keep)
        if self.shape.layout == "separate":
            return gate, self._matrix(tensors, 1, nk, self.spec.up_nk, keep)
        skip = 0
        if self.shape.layout == "concat":
            skip = self.shape.inner * (gate[3] if nk else tensors[0].element_size())
        return gate, [gate[0], gate[1] + skip, *gate[2:]]

    def _up_bias(self, tensors: list[Tensor], keep: Pointers) -> tuple[list[int], list[int]]:
        if not tensors:
            return [0] * 4, [0] * 4
        gate = self._vector(tensors, 0, keep)
        if self.shape.layout == "separate":
            return gate, self._vector(tensors, 1, keep)
        if self.shape.layout == "interleaved":
            return [*gate[:3], 2 * gate[3]], [gate[0], gate[1] + gate[3], gate[2], 2 * gate[3]]
        skip = self.shape.inner * gate[3] if self.shape.layout == "concat" else 0
        return gate, [gate[0], gate[1] + skip, *gate[2:]]

    def _matrix(self, tensors: list[Tensor], part: int, nk: bool, form_nk: bool, keep: Pointers) -> list[int]:
        """The fields of ``Matrix``: table, base, bytes between experts, bytes between rows."""
        return self._fields(tensors, part, -2 if nk == form_nk else -1, keep)

    def _vector(self, tensors: list[Tensor], part: int, keep: Pointers) -> list[int]:
        return self._fields(tensors, part, -1, keep) if tensors else [0] * 4

    def _fields(self, tensors: list[Tensor], part: int, row_dim: int, keep: Pointers) -> list[int]:
        if self.spec.stacked:
            t = tensors[part]
            return [0, t.data_ptr(), t.stride(0) * t.element_size(), t.stride(row_dim) * t.element_size()]
        each = tensors[part * self.shape.experts : (part + 1) * self.shape.experts]
        return [keep.table(each), 0, 0, each[0].stride(row_dim) * each[0].element_size()]


def _aligned(size: int) -> int:
    return -(-size // _ALIGN) * _ALIGN


def _rows_are_outputs(tensors: list[Tensor], form_nk: bool) -> bool | None:
    """Whether a weight's rows in memory are outputs: True or False, or None where the kernels cannot read it.

    What the op calls ``nk`` may be a transposed view. Weights of one kind have one set of strides.
    """
    first = tensors[0].stride()[-2:]
    if any(t.stride()[-2:] != first for t in tensors):
        return None
    height, width = tensors[0].shape[-2:]
    if first[1] == 1 or width == 1:
        return form_nk
    if first[0] == 1 or height == 1:
        return not form_nk
    return None
