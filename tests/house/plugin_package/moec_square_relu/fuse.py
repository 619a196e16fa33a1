"""The pass ``fuse-square-relu``: relu followed by a square, in one op."""

from __future__ import annotations

from dataclasses import dataclass

from moec.ir.core import Graph, Op
from moec.passes.base import Pass, PassClass, PassContext, PassResult
from moec.passes.matching import arg, function, maker
from moec.passes.registry import register_pass
from moec.passes.rewrite import Rewrite, Rewriter, apply_rewrites
from moec_square_relu.op import SquareRelu


class Fuse(Rewrite[tuple[Op, Op]]):
    """``mul(r, r)`` with ``r = relu(x)`` is the square of the same numbers, multiplied once."""

    name = "square-of-relu"

    def pattern(self, op: Op) -> tuple[Op, Op] | None:
        if function(op) != "mul" or arg(op, 0) is not arg(op, 1):
            return None
        relu = maker(arg(op, 0), "relu")
        return (op, relu) if relu is not None else None

    def check(self, match: tuple[Op, Op]) -> str | None:
        mul, relu = match
        return None if all(user is mul for user in relu.result.users) else "the relu is used elsewhere too"

    def rewrite(self, match: tuple[Op, Op], rewriter: Rewriter) -> None:
        mul, relu = match
        fused = rewriter.op(SquareRelu.name, [arg(relu, 0)])
        rewriter.replace(mul, fused.results)
        rewriter.erase_unused(relu)


@register_pass
@dataclass(frozen=True)
class FuseSquareRelu(Pass):
    """Turns relu followed by a square into one op."""

    name = "fuse-square-relu"
    pass_class = PassClass.BITWISE

    def run(self, graph: Graph, ctx: PassContext) -> PassResult:
        return apply_rewrites(graph, [Fuse()], ctx, self.name)
