"""The pass ``quantize-dispatch``.

Contract:
1. Rows of tokens on their way to experts of other ranks travel as a narrow type with one f32 scale a row, in the
   forward and where the backward sends them again. What comes back (expert rows) and gradients travel as they are.
2. A row's scale is made from its own largest element as it is sent: nothing is calibrated, no row depends on another.
3. The gradient is that of the layer without rounding, at the rounded rows (a straight-through estimate).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, Literal

from moec.ir.builder import Builder
from moec.ir.core import Graph, Op, Value
from moec.ir.types import TensorType
from moec.passes.base import Pass, PassClass, PassContext, PassResult
from moec.passes.registry import register_pass

_CARRIERS = ("moe.dispatch", "moe.live_rows", "torch.call")
_STEPS = {"i8": 254.0, "f8e4m3fn": 16.0, "f8e5m2": 8.0}
"""The largest error of an element is its row's largest element (of fp8: the element itself) over this."""


@register_pass
@dataclass(frozen=True)
class QuantizeDispatch(Pass):
    """Sends token rows to other ranks in 8 bits (CloudMatrix384's early INT8 quantisation, arXiv:2506.12708, 4.2).

    Lossy: an element loses at most 1/254 of its row's largest element (int8), or 1/16 of itself (fp8, e4m3).

    Attributes:
        to: The narrow type.
    """

    name: ClassVar[str] = "quantize-dispatch"
    pass_class: ClassVar[PassClass] = PassClass.APPROX
    tolerance: ClassVar[float] = 5e-2
    summary: ClassVar[str] = "token rows travel to experts in 8 bits"

    to: Literal["i8", "f8e4m3fn", "f8e5m2"] = "i8"

    def run(self, graph: Graph, ctx: PassContext) -> PassResult:
        changed = 0
        for op in [op for op in graph.ops if op.name == "moe.parallel_experts"]:
            ways = [(region, wait) for region in op.regions for wait in _ways(region)]
            if not ways:
                ctx.remark("missed", self.name, "its token rows travel in 8 bits already", op)
                continue
            if not ctx.take_fuel(self.name, f"rows travel as {self.to}", op):
                break
            rows = ways[0][1].result.type
            assert isinstance(rows, TensorType)
            width, bits = rows.shape[1], rows.dtype.bits
            share = f"{(int(width) + 4) / (int(width) * bits / 8):.3f}" if width.is_Integer else f"about {8 / bits:g}"
            loss = f"an element loses at most 1/{_STEPS[self.to]:g} of its row's largest"
            ctx.remark("applied", self.name, f"rows travel as {self.to}: {share} of the bytes, {loss}", op)
            for region, wait in ways:
                self._narrow(region, wait)
            changed += len(ways)
        return PassResult(changed > 0, {"narrowed": changed})

    def _narrow(self, region: Graph, wait: Op) -> None:
        start = wait.operands[0].op
        assert start is not None
        whole = wait.result.type
        assert isinstance(whole, TensorType)
        b = Builder(region, wait.loc).insert_before(start)
        narrow = b.op("quant.rows", start.operands[0], attrs={"to": self.to}).results
        came = []
        starts = [
            b.op(start.name, value, *start.operands[1:], attrs=start.attrs, groups=start.groups) for value in narrow
        ]
        b.insert_before(wait)
        for value, begun in zip(narrow, starts, strict=True):
            assert isinstance(value.type, TensorType)
            type = value.type.with_(shape=(whole.shape[0], *value.type.shape[1:]))
            came.append(b.op("comm.wait", begun.result, result_types=[type]).result)
        restored = b.op("quant.restore", *came, attrs={"to": whole.dtype}).result
        wait.result.replace_all_uses_with(restored)
        wait.erase()
        start.erase()


def _ways(region: Graph) -> Iterator[Op]:
    """The waits through which token rows come to the experts, if they come as they are."""
    at = {"moe.experts": 0, "moe.experts_backward": 1}
    for op in region.ops:
        if op.name not in at:
            continue
        value: Value = op.operands[at[op.name]]
        while (maker := value.op) is not None:
            if maker.name == "comm.wait":
                start = maker.operands[0].op
                assert start is not None
                yield maker
                value = start.operands[0]
            elif maker.name in _CARRIERS:
                value = maker.operands[0]
            else:
                break
