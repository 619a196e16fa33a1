"""``torch.opaque``: a node of an fx graph that the IR carries without understanding it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from moec.ir.core import Graph, Op
from moec.ir.errors import IRError
from moec.ir.opdef import AttrDef, OpDef, OperandDef, RegionDef, register_op
from moec.ir.torch_bridge import to_python

KNOWN: dict[str, Callable[..., Any]] = {
    "torch._C._set_grad_enabled": torch._C._set_grad_enabled,
    "torch.amp.autocast_mode._enter_autocast": torch.amp.autocast_mode._enter_autocast,
    "torch.amp.autocast_mode._exit_autocast": torch.amp.autocast_mode._exit_autocast,
}
"""Functions that change torch's state and stand in pre-dispatch graphs, by name. Text may call these and no others."""


def callee_of(op: Op) -> Any:
    """The function or module that a ``torch.opaque`` calls (of a method, its name).

    Raises:
        IRError: The op was read from text, and its callee is not one of :data:`KNOWN`.
    """
    target = op.attrs["target"]
    if op.attrs["kind"] == "call_method":
        return target
    if "callee" in op.meta:
        return op.meta["callee"]
    if op.attrs["kind"] == "call_function" and target in KNOWN:
        return KNOWN[target]
    raise IRError(
        f"{target} was read from text, which does not hold its code",
        op=repr(op),
        source=op.loc.source or None,
        hint="use the graph in the process that captured it",
    )


@register_op
class TorchOpaque(OpDef):
    """A call whose target is no registered torch operation: a Python function, a tensor method or a module.

    Text: ``%y = torch.opaque [%x] {kind = "call_method", target = "relu", args = (..)} : f32[T, 8]``. It keeps its
    place and is never merged or removed. It has exactly one result, whatever the call returns; the parts of a tuple are
    taken by ``py._operator.getitem``. The function or module called is in ``Op.meta["callee"]``, which text does not
    hold: but for the few functions of ``KNOWN``, such a graph can be read, checked and printed, not executed.
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
        return [callee_of(op)(*args, **kwargs)]
