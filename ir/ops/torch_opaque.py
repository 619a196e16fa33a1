"""``torch.opaque``: a node of an fx graph that the IR carries without understanding it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from moec.ir.core import Graph, Op
from moec.ir.errors import IRError
from moec.ir.opdef import AttrDef, OpDef, OperandDef, RegionDef, register_op
from moec.ir.torch_bridge import to_python


@register_op
class TorchOpaque(OpDef):
    """A call whose target is no registered torch operation: a Python function, a tensor method or a module.

    Text: ``%y = torch.opaque [%x] {kind = "call_method", target = "relu", args = (..)} : f32[T, 8]``. It keeps its
    place and is never merged or removed. It has exactly one result, whatever the call returns; the parts of a tuple are
    taken by ``py._operator.getitem``. The function or module called is in ``Op.meta["callee"]``, which text does not
    hold: such a graph can be read, checked and printed, but not executed.
    """

    name = "torch.opaque"
    operands = (OperandDef("operands", "many", "the values used, in the order of the template"),)
    attrs = (
        AttrDef("kind", "str", "what the node does", choices=("call_function", "call_method", "call_module")),
        AttrDef("target", "str", "name of what is called, for the reader"),
        AttrDef("args", "any", "positional argument template", default=()),
        AttrDef("kwargs", "any", "keyword argument template", default={}),
    )
    regions = (RegionDef("bodies", "nested graphs handed to the call", optional=True),)
    pure = False

    def evaluate(self, op: Op, inputs: Sequence[Any], run: Callable[[Graph, Sequence[Any]], list[Any]]) -> list[Any]:
        if op.regions:
            raise IRError(f"{op.attrs['target']} has nested graphs; executing it needs the fx door", op=repr(op))
        args = to_python(op.attrs.get("args", ()), inputs)
        kwargs = to_python(op.attrs.get("kwargs", {}), inputs)
        if op.attrs["kind"] == "call_method":
            return [getattr(args[0], op.attrs["target"])(*args[1:], **kwargs)]
        if "callee" not in op.meta:
            raise IRError(f"{op.attrs['target']} was read from text, which does not hold its code", op=repr(op))
        return [op.meta["callee"](*args, **kwargs)]
