"""``torch.call``: a PyTorch operation that the IR carries by name."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from moec.ir.core import Graph, Op
from moec.ir.opdef import AttrDef, OpDef, OperandDef, RegionDef, check_template, register_op
from moec.ir.torch_bridge import call_target, is_pure_call


@register_op
class TorchCall(OpDef):
    """A call of an ``OpOverload``, a Python number function or a higher-order op.

    Text: ``%v, %i = torch.call @aten.topk.default(%p, 2) : f32[T, 2], i64[T, 2]``. ``target`` is
    ``namespace.op.overload`` (``aten.index.Tensor``), ``py.module.name`` for functions on SymInts
    (``py._operator.mul``), or ``hop.name`` for a higher-order op, whose bodies are the op's regions. ``args`` and
    ``kwargs`` are the argument template; ``Operand(i)`` marks where the i-th operand goes, and ``Region(i)`` the i-th
    nested graph. A call that returns a tuple or list has one result per element.
    """

    name = "torch.call"
    operands = (OperandDef("operands", "many", "the values used, in the order of the template"),)
    attrs = (
        AttrDef("target", "str", "what is called"),
        AttrDef("args", "any", "positional argument template", default=()),
        AttrDef("kwargs", "any", "keyword argument template", default={}),
    )
    regions = (RegionDef("bodies", "bodies of a higher-order op", optional=True),)
    results = ("results",)
    variadic_results = True

    def verify(self, op: Op) -> None:
        args, kwargs = self.attr(op, "args"), self.attr(op, "kwargs")
        if not isinstance(args, tuple) or not isinstance(kwargs, dict):
            self.fail(op, "args must be a tuple and kwargs a dictionary")
        check_template(self, op, (args, kwargs))
        if not op.attrs["target"]:
            self.fail(op, "the target is empty")

    def is_pure(self, op: Op) -> bool:
        return is_pure_call(op)

    def evaluate(self, op: Op, inputs: Sequence[Any], run: Callable[[Graph, Sequence[Any]], list[Any]]) -> list[Any]:
        return call_target(op, inputs, run)
