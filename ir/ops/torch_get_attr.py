"""``torch.get_attr``: a constant that a captured module holds."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from moec.ir.core import Graph, Op
from moec.ir.errors import IRError
from moec.ir.opdef import AttrDef, OpDef, register_op


@register_op
class TorchGetAttr(OpDef):
    """A tensor or other object that lives on the captured ``GraphModule`` instead of coming in as an argument.

    Text: ``%c = torch.get_attr {name = "lifted_tensor_0"} : f32[]``. The object itself is in ``Op.meta["value"]``; it
    is not printed, so a graph read from text has to be given the module that holds it.
    """

    name = "torch.get_attr"
    attrs = (AttrDef("name", "str", "dotted path of the attribute on the module"),)

    def evaluate(self, op: Op, inputs: Sequence[Any], run: Callable[[Graph, Sequence[Any]], list[Any]]) -> list[Any]:
        if "value" not in op.meta:
            raise IRError(
                f"the constant {op.attrs['name']!r} is not in this graph",
                op=repr(op),
                hint="text does not hold constants; capture the model again, or pass the value as an argument",
            )
        return [op.meta["value"]]
