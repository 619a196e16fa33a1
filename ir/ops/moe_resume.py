"""``moe.resume``: a layer that was begun, run on to its next wait for rows, or to its end."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from moec.ir.core import Graph, Op
from moec.ir.errors import MoecError
from moec.ir.opdef import OpDef, OperandDef, register_op
from moec.ir.staged import stops
from moec.ir.types import TensorType, TokenType


def begun_by(op: Op) -> tuple[Op | None, int]:
    """The ``moe.begin`` that an op of a layer in pieces belongs to, and how many of its waits lie before the op."""
    place = 0
    while op.name == "moe.resume":
        maker, place = op.operands[0].op, place + 1
        if maker is None:
            return None, place
        op = maker
    return (op if op.name == "moe.begin" else None), place


@register_op
class Resume(OpDef):
    """Runs a layer on: a token where there are further waits for rows, its results where there are none.

    ``%u = moe.resume %t : !comm.token`` and in the end ``%y = moe.resume %u : bf16[T, 4096]``
    A token is used once.
    """

    name = "moe.resume"
    operands = (OperandDef("token", doc="of moe.begin or moe.resume"),)
    variadic_results = True

    def verify(self, op: Op) -> None:
        token = op.operands[0]
        if not isinstance(token.type, TokenType) or len(token.uses) > 1:
            self.fail(op, "it takes a !comm.token that nobody else takes")
        begin, place = begun_by(op)
        if begin is None:
            self.fail(op, "the token is of no moe.begin")
            return
        left = len(stops(begin.regions[0])) - place
        if left > 0 and [type(r.type) for r in op.results] != [TokenType]:
            self.fail(op, "there are further waits for rows, so it gives a token")
        ends = left == 0 and all(isinstance(r.type, TensorType) for r in op.results)
        if left <= 0 and not (ends and len(op.results) == len(begin.regions[0].outputs)):
            self.fail(op, "the layer ends here, so it gives the layer's results")

    def evaluate(self, op: Op, inputs: Sequence[Any], run: Callable[[Graph, Sequence[Any]], list[Any]]) -> list[Any]:
        results = inputs[0].go_on()
        if isinstance(op.results[0].type, TokenType):
            return [inputs[0]]
        if results is None:
            raise MoecError("a layer in pieces is not at its end where its results are asked for", op=repr(op))
        return list(results)
