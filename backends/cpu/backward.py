"""The backward of one ``moe.experts`` program: gradients' tensors, this call's pointers, and the compiled code.

A layer's library is built when its gradients are first asked for, so that inference never waits for it.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence

import torch
from torch import Tensor

from moec.backends.aten.spec import Params, Spec
from moec.backends.calls import UnsupportedError
from moec.backends.cpu import recycle, team, workspace
from moec.backends.cpu.backward_source import write_backward
from moec.backends.cpu.build import build
from moec.backends.cpu.derivative import compile_derivative
from moec.backends.cpu.isa import Isa
from moec.backends.cpu.load import Library
from moec.backends.cpu.memory import check_readable
from moec.backends.cpu.operands import ALIGN, Operands, Pointers, aligned, form_of, one_stride
from moec.backends.cpu.source import Shape
from moec.backends.cpu.uneven import alike
from moec.ir.core import Op


class CpuBackward:
    """Gradients in generated C++, where the layer has them.

    Attributes:
        reason: Why it has none, or empty.
    """

    def __init__(self, op: Op, shape: Shape, spec: Spec, isa: Isa) -> None:
        self.shape, self.spec, self.isa = shape, spec, isa
        self.operands = Operands(shape.experts, shape.inner, shape.layout, spec.stacked)
        self.lock = threading.Lock()
        self.libraries: dict[tuple[bool, bool], Library] = {}
        self.body, self.reason = "", ""
        if shape.layout == "rows":
            self.reason = "the activation is a function of whole rows"
        elif shape.ragged:
            self.reason = "experts differ in their widths"
        elif spec.post is not None:
            self.reason = "there is a region after the down GEMM"
        else:
            try:
                self.body = compile_derivative(op.regions[0], shape.parts, shape.element)
            except UnsupportedError as reason:
                self.reason = str(reason)

    def library(self, up_nk: bool, down_nk: bool) -> Library:
        """The compiled code for weights that lie so."""
        with self.lock:
            found = self.libraries.get((up_nk, down_nk))
            if found is None:
                found = Library(build(write_backward(self.shape, self.body, up_nk, down_nk), self.isa))
                self.libraries[up_nk, down_nk] = found
        return found

    def __call__(
        self,
        grad: Tensor,
        inputs: list[Tensor],
        needs: Sequence[bool],
        threads: int,
        into: Sequence[Tensor | None] | None = None,
        only: Sequence[int] | None = None,
    ) -> list[Tensor | None] | None:
        """Gradients of the flat operands, None where not needed; or None where aten has to compute them.

        Args:
            grad: [T, N] of the layer's result.
            inputs: The flat operands.
            needs: Which of them want a gradient.
            threads: The most to use.
            into: Where they are to be; None for tensors of their own, of one or of all.
            only: The experts whose places of weights are written.
        """
        spec, b, into = self.spec, self.spec.bounds, into or [None] * len(inputs)
        if self.reason or any(needs[b[6] :]):
            return None  # gradients of captured tensors are sums over all rows
        check_readable(inputs)
        p = spec.params(inputs)
        up_nk, down_nk = form_of(p.up, spec.up_nk), form_of(p.down, spec.down_nk)
        x, ids, weights = inputs[:3]
        found: list[Tensor | None] = [
            None if not need else torch.empty(t.shape, dtype=t.dtype) if place is None else place
            for t, need, place in zip(inputs[:3], needs[:3], into[:3], strict=True)
        ]
        if (d_weights := found[2]) is not None:
            d_weights.zero_()
        found += [
            None if not need else recycle.SHARED.empty_like(t) if place is None else place
            for t, need, place in zip(inputs[3:], needs[3:], into[3:], strict=True)
        ]
        d_up, d_down = found[b[2] : b[3]], found[b[3] : b[4]]
        forms = up_nk, down_nk, form_of(d_up, spec.up_nk), form_of(d_down, spec.down_nk)
        if up_nk is None or down_nk is None or None in forms:
            return None  # no side of a matrix is contiguous
        if not all(one_stride(kind) for kind in (p.up, p.down, d_up, d_down)):
            return None  # weights of a kind lie differently
        x, grad = _rows(x), _rows(grad.to(x.dtype))
        ids, weights = ids.to(torch.int64).contiguous(), weights.contiguous()
        self._run(grad, [x, ids, weights], p, found, (up_nk, down_nk, bool(forms[2]), bool(forms[3])), threads, only)
        return found

    def _run(
        self,
        grad: Tensor,
        tokens: list[Tensor],
        p: Params,
        found: list[Tensor | None],
        forms: tuple[bool, bool, bool, bool],
        threads: int,
        only: Sequence[int] | None,
    ) -> None:
        x, ids, weights = tokens
        count, top_k = ids.shape
        item, experts = x.element_size(), self.shape.experts
        library = self.library(*forms[:2])
        keep, o = Pointers(), self.operands
        up, bias = o.up(p.up, forms[0], self.spec.up_nk, keep), o.up_bias(alike(p.up_bias), keep)
        down, down_bias = o.matrix(p.down, 0, forms[1], self.spec.down_nk, keep), o.vector(alike(p.down_bias), 0, keep)
        captures = [c.contiguous() for c in p.captures]
        gradients = self._gradients(found, forms[2], forms[3], keep, only)
        ints = torch.empty(4 * experts + 8 + ids.numel(), dtype=torch.int32)
        dx, dw = (0 if t is None else t.data_ptr() for t in (found[0], found[2]))
        with team.SHARED.borrow(threads) as granted:
            rows = library.number("moec_plan", ids.data_ptr(), count, top_k, granted, ints.data_ptr())
            work = workspace.SHARED.take(library.number("moec_bytes", rows, ids.numel(), granted) + ALIGN)
            library.entry("moec_backward")(
                [
                    x.data_ptr(), x.stride(0) * item, grad.data_ptr(), grad.stride(0) * item,
                    ids.data_ptr(), weights.data_ptr(), count, top_k, granted,
                    ints.data_ptr(), aligned(work.data_ptr()), rows, dx, dw,
                    *up[0], *up[1], *down, *bias[0], *bias[1], *down_bias,
                    *gradients, keep.table(captures),
                ]
            )  # fmt: skip
            workspace.SHARED.give_back(work)

    def _gradients(
        self, found: list[Tensor | None], up_nk: bool, down_nk: bool, keep: Pointers, only: Sequence[int] | None
    ) -> list[int]:
        """The fields of every ``Gradient``; the last one says whether rows in memory are those of the left factor."""
        b, o = self.spec.bounds, self.operands.of(only)
        up, down, up_bias, down_bias = (found[b[i] : b[i + 1]] for i in range(2, 6))
        fields: list[int] = []
        for matrix in o.up(up, up_nk, self.spec.up_nk, keep):
            fields += [*matrix, int(up_nk)]
        # The left factor is the activations, inputs of the down GEMM.
        fields += [*o.matrix(down, 0, down_nk, self.spec.down_nk, keep), int(not down_nk)]
        for vector in (*o.up_bias_gradient(up_bias, keep), o.vector(down_bias, 0, keep)):
            fields += [*vector, 0]
        return fields


def _rows(t: Tensor) -> Tensor:
    return t if t.shape[1] < 2 or t.stride(1) == 1 else t.contiguous()
