"""The kernel of one ``moe.experts`` program: pointers and strides of this call's tensors, and the compiled code."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from moec.backends.aten import ExpertsKernel as AtenExperts
from moec.backends.aten.spec import Params
from moec.backends.base import PlacingKernel
from moec.backends.cpu import team, workspace
from moec.backends.cpu.backward import CpuBackward
from moec.backends.cpu.build import build
from moec.backends.cpu.isa import Isa
from moec.backends.cpu.load import Library
from moec.backends.cpu.memory import check_readable
from moec.backends.cpu.operands import ALIGN, Operands, Pointers, aligned, form_of
from moec.backends.cpu.source import Shape, write_source
from moec.backends.cpu.uneven import alike, later, row_bytes, table_of
from moec.ir.core import Op

RECENT = 16
"""Places of weights that a kernel remembers: chunks of a layer that hold equally many experts share their kernel."""


class Code:
    """The functions of a compiled layer, and what working memory it wants (bytes)."""

    def __init__(self, library: Library) -> None:
        self.run = library.entry("moec_experts")
        self.a_row, self.o_row = library.number("moec_a_row"), library.number("moec_o_row")
        self.room = lru_cache(maxsize=64)(lambda slots: aligned(library.number("moec_room", slots)))


@dataclass(frozen=True)
class Placed:
    """Where a call's weights lie.

    Attributes:
        code: The functions for weights that lie so.
        fields: The end of the table that they take, from the weights on.
        keep: The tables that ``fields`` point to.
    """

    code: Code
    fields: list[int]
    keep: Pointers


class CpuExperts(PlacingKernel):
    """Forward and backward in generated C++; gradients that it does not have (see ``backward.py``) are aten's.

    Attributes:
        threads: Of a call; 0 for as many as torch is set to, or fewer where fewer finish first.
    """

    def __init__(self, op: Op, shape: Shape, isa: Isa, threads: int = 0) -> None:
        self.shape, self.isa, self.threads = shape, isa, threads
        self.aten = AtenExperts(op)
        self.spec = self.aten.spec
        self.gradients = CpuBackward(op, shape, self.spec, isa)
        self.operands = Operands(shape.experts, shape.inner, shape.layout, self.spec.stacked)
        self.apart = 1 if self.spec.stacked else shape.experts  # weights of a kind, and of a part
        self.codes: dict[tuple[bool, bool], Code] = {}
        self.lock = threading.Lock()
        self.recent: dict[tuple[tuple[int, tuple[int, ...]], ...], Placed] = {}
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
        most = self.threads or torch.get_num_threads()
        advice = None if self.adviser is None else self.adviser(tokens, most)
        if advice is not None and advice.library:
            return self.aten.forward(inputs)
        if not (x.is_cpu and ids.is_cpu and weights.is_cpu):
            check_readable(inputs[:3])
        placed = self._placed(inputs)
        if placed is None:
            return self.aten.forward(inputs)  # no side of the matrix is contiguous, or not the same one of all
        if x.stride(1) != 1:
            x = x.contiguous()
        ids = ids.to(torch.int64).contiguous()
        weights = weights.contiguous()
        code, slots = placed.code, tokens * top_k
        a_bytes, o_bytes = aligned(slots * code.a_row), aligned(slots * code.o_row)
        ints, room = aligned(4 * (shape.experts + 1 + slots)), code.room(slots)
        threads = team.SHARED.take(most if self.threads or advice is None else advice.threads)
        try:
            work = workspace.SHARED.take(a_bytes + o_bytes + ints + threads * room + ALIGN)
            a = aligned(work.data_ptr())
            o, sorted_slots, rooms = a + a_bytes, a + a_bytes + o_bytes, a + a_bytes + o_bytes + ints
            code.run(
                [
                    x.data_ptr(), x.stride(0) * x.element_size(), ids.data_ptr(), weights.data_ptr(), out.data_ptr(),
                    tokens, top_k, threads, room, a, o, rooms, sorted_slots, *placed.fields,
                ]
            )  # fmt: skip
            workspace.SHARED.give_back(work)
        finally:
            team.SHARED.give_back(threads)
        return [out]

    def _placed(self, inputs: list[Tensor]) -> Placed | None:
        """Where this call's weights lie, mostly where those of a recent call lay; None where kernels cannot read them.

        While a model decodes, what Python does for a layer is done on caches that the weights have just swept: looking
        the fields up again costs a tenth of the layer's time.
        """
        key = tuple((t.data_ptr(), t.stride()) for t in inputs[3:])
        known = self.recent.get(key)
        if known is not None:
            return known
        check_readable(inputs[3:])
        p, spec = self.spec.params(inputs), self.spec
        up_nk, down_nk = form_of(p.up, spec.up_nk), form_of(p.down, spec.down_nk)
        up_rows = row_bytes(p.up, self.apart, -2 if up_nk == spec.up_nk else -1)
        down_rows = row_bytes(p.down, self.apart, -2 if down_nk == spec.down_nk else -1)
        if up_nk is None or down_nk is None or up_rows is None or down_rows is None:
            return None
        keep = Pointers()
        gate, up, bias_gate, bias_up = self._up(p, up_nk, up_rows, keep)
        captures, post_captures = ([c.contiguous() for c in group] for group in (p.captures, p.post_captures))
        fields = [
            *gate, *up, *self.operands.matrix(p.down, 0, down_nk, spec.down_nk, keep),
            *bias_gate, *bias_up, *self.operands.vector(alike(p.down_bias), 0, keep),
            keep.table(captures), keep.table(post_captures),
            table_of(self.shape.inners, keep), table_of(up_rows, keep), table_of(down_rows, keep),
        ]  # fmt: skip
        placed = Placed(self.code(up_nk, down_nk), fields, keep)
        small = (*p.captures, *p.post_captures, *p.up_bias, *p.down_bias)
        if all(t.is_contiguous() for t in small):  # otherwise there may be a copy among them, good for this call alone
            if len(self.recent) >= RECENT:
                self.recent = {}
            self.recent[key] = Placed(placed.code, fields, keep.without_tensors())
        return placed

    def backward_into(
        self,
        grads: Sequence[Tensor | None],
        inputs: list[Tensor],
        needs: Sequence[bool],
        into: Sequence[Tensor | None],
        only: Sequence[int] | None = None,
    ) -> list[Tensor | None]:
        (grad,) = grads
        most = self.threads or torch.get_num_threads()
        library = self.adviser is not None and self.adviser(inputs[0].shape[0], most).library
        found = None if grad is None or library else self.gradients(grad, inputs, needs, most, into, only)
        return self.aten.backward_into(grads, inputs, needs, into, only) if found is None else found

    def _up(self, p: Params, nk: bool, rows: Sequence[int], keep: Pointers) -> list[list[int]]:
        """Fields of gate, up and their biases."""
        bias = alike(p.up_bias)
        gate, up = self.operands.up(p.up, nk, self.spec.up_nk, keep)
        bias_gate, bias_up = self.operands.up_bias(bias, keep)
        if self.shape.layout == "concat" and (self.shape.ragged or len(set(rows)) > 1):
            item, inners = p.up[0].element_size(), self.shape.inners
            skips = [i * (row if nk else item) for i, row in zip(inners, rows, strict=True)]
            up = later(p.up, skips, gate, keep)
            if bias:
                bias_up = later(bias, [i * bias_gate[3] for i in inners], bias_gate, keep)
        return [gate, up, bias_gate, bias_up]
