"""A ``torch.fx`` graph as an IR graph.

The contract:
1. Every node keeps its order, arguments and ``meta``; ``moec.emit`` gives the same graph back.
2. A registered operation (``OpOverload``), a function on SymInts or a higher-order op becomes ``torch.call``; anything
   else that calls something becomes ``torch.opaque``.
3. A call that returns a tuple or list has one result per element, and the ``getitem`` nodes that take it apart vanish
   into those results. Where something else uses the tuple, the call is ``torch.opaque`` with the tuple as its result.
4. A ``get_attr`` of a GraphModule that is handed to a call becomes a region of that call, captured by the same rules.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from moec.capture.arguments import OPAQUE, ArgumentEncoder
from moec.capture.errors import CaptureError
from moec.capture.locations import location_of
from moec.capture.origin import FX_META, ORIGIN, Origin
from moec.capture.types import UNKNOWN, type_of
from moec.ir.attributes import Literal, Operand
from moec.ir.core import Graph, Op, Value
from moec.ir.errors import IRError
from moec.ir.torch_bridge import resolve_target
from moec.ir.types import NoneType, OpaqueType, TensorType, Type

_MISSING = object()


def graph_from_fx(
    gm: torch.fx.GraphModule,
    name: str = "main",
    *,
    values: Mapping[torch.fx.Node, Any] | Sequence[Any] | None = None,
) -> Graph:
    """Capture ``gm`` as an IR graph.

    Args:
        gm: Any GraphModule: ATen or torch-level, with or without recorded values.
        name: Name of the graph.
        values: What nodes evaluate to, where ``meta`` does not say it: a mapping by node, or one value per placeholder.

    Returns:
        The graph. Its arguments are the placeholders in order.

    Raises:
        CaptureError: A node has an opcode that no fx graph should have.
    """
    return _Capture(gm, name, values).run()


def owned(module: torch.nn.Module, target: str) -> Any:
    """The attribute at the dotted path ``target``, or a marker object if there is none."""
    found: Any = module
    for part in target.split("."):
        found = getattr(found, part, _MISSING)
        if found is _MISSING:
            return _MISSING
    return found


def target_name(fn: Any) -> str | None:
    """The ``torch.call`` target that resolves to exactly ``fn``, or None."""
    if isinstance(fn, torch._ops.OpOverload):
        name = str(fn)
    elif isinstance(fn, torch._ops.HigherOrderOperator):
        name = f"hop.{fn.name()}"
    else:
        name = f"py.{getattr(fn, '__module__', '')}.{getattr(fn, '__name__', '')}"
    try:
        return name if resolve_target(name) is fn else None
    except IRError:
        return None


class _Capture:
    def __init__(
        self, gm: torch.fx.GraphModule, name: str, values: Mapping[torch.fx.Node, Any] | Sequence[Any] | None
    ) -> None:
        self.gm = gm
        self.graph = Graph(name)
        self.graph.meta["codegen"] = gm.graph._codegen
        self.graph.meta["gm_meta"] = dict(gm.meta)
        self.graph.meta["class_name"] = type(gm).__name__
        self.graph.meta["training"] = gm.training
        self.env: dict[torch.fx.Node, Value] = {}
        self.tuples: dict[torch.fx.Node, Op] = {}  # calls whose getitem nodes are their results
        self.orders = {node: i for i, node in enumerate(gm.graph.nodes)}
        self.bodies: dict[int, Graph] = {}  # module id -> its graph, captured once
        if values is None:
            self.values: Mapping[torch.fx.Node, Any] = {}
        elif isinstance(values, Mapping):
            self.values = values
        else:
            self.values = dict(zip(gm.graph.find_nodes(op="placeholder"), values, strict=True))

    def run(self) -> Graph:
        for order, node in enumerate(self.gm.graph.nodes):
            visit: Callable[[int, torch.fx.Node], None] | None = getattr(self, f"_{node.op}", None)
            if visit is None:
                raise CaptureError(f"fx node {node.name!r} has the unknown opcode {node.op!r}", op=node.format_node())
            visit(order, node)
        return self.graph

    def _value(self, node: torch.fx.Node) -> Any:
        for key in ("val", "example_value"):
            if key in node.meta:
                return node.meta[key]
        return self.values.get(node, _MISSING)

    def _type(self, node: torch.fx.Node) -> Type:
        value = self._value(node)
        return UNKNOWN if value is _MISSING else type_of(value)

    def _placeholder(self, order: int, node: torch.fx.Node) -> None:
        arg = self.graph.add_arg(self._type(node), node.name)
        arg.meta[ORIGIN] = Origin(order, node.name, str(node.target), node.type, node.args)
        arg.meta[FX_META] = dict(node.meta)
        self.env[node] = arg

    def _get_attr(self, order: int, node: torch.fx.Node) -> None:
        if self._is_body(node):
            return
        value = owned(self.gm, str(node.target))
        type_ = self._type(node)
        if type_ is UNKNOWN and value is not _MISSING:
            type_ = type_of(value)
        op = Op(
            "torch.get_attr",
            (),
            [type_],
            attrs={"name": str(node.target)},
            loc=location_of(node.meta),
            names=[node.name],
        )
        if value is not _MISSING:
            op.meta["value"] = value
        self._enter(order, node, op)
        self.env[node] = op.result

    def _is_body(self, node: torch.fx.Node) -> bool:
        if node.op != "get_attr" or not node.users or not all(u.op == "call_function" for u in node.users):
            return False
        return isinstance(owned(self.gm, str(node.target)), torch.fx.GraphModule)

    def _body(self, node: torch.fx.Node) -> Graph | None:
        """The region for a ``get_attr`` of a nested GraphModule, a fresh copy for every use."""
        if not self._is_body(node):
            return None
        module = owned(self.gm, str(node.target))
        if id(module) not in self.bodies:
            self.bodies[id(module)] = graph_from_fx(module, str(node.target).replace(".", "_"))
        graph = self.bodies[id(module)].clone()
        graph.meta[ORIGIN] = Origin(self.orders[node], node.name, str(node.target), node.type)
        graph.meta[FX_META] = dict(node.meta)
        return graph

    def _call_function(self, order: int, node: torch.fx.Node) -> None:
        if node.target is operator.getitem and isinstance(node.args[0], torch.fx.Node) and node.args[0] in self.tuples:
            source, index = node.args
            assert isinstance(source, torch.fx.Node)
            assert isinstance(index, int)
            value = self.tuples[source].results[index]
            value.name = node.name
            value.meta[ORIGIN] = Origin(order, node.name, type_expr=node.type)
            value.meta[FX_META] = dict(node.meta)
            self.env[node] = value
            return
        encoder = ArgumentEncoder(self.env.__getitem__, self._body)
        args, kwargs = encoder.encode(tuple(node.args)), encoder.encode(dict(node.kwargs))
        target = target_name(node.target)
        is_python = target is not None and target.startswith("py.")
        if is_python and any(isinstance(v.type, TensorType) or v.type == UNKNOWN for v in encoder.operands):
            target = None  # on tensors these may write in place or alias; only their meaning on numbers is known
        results = self._results(node) if target and not is_python else ([self._type(node)], False)
        if target is None or results is None:
            self._opaque(order, node, encoder, args, kwargs)
            return
        types, is_tuple = results
        op = Op(
            "torch.call",
            encoder.operands,
            types,
            attrs={"target": target, "args": args, **({"kwargs": kwargs} if kwargs else {})},
            regions=encoder.regions,
            groups=[len(encoder.operands)],
            loc=location_of(node.meta),
            names=[] if is_tuple else [node.name],
        )
        self._enter(order, node, op, encoder.opaque, is_tuple)
        if is_tuple:
            self.tuples[node] = op
        elif types:
            self.env[node] = op.result

    def _results(self, node: torch.fx.Node) -> tuple[list[Type], bool] | None:
        """Result types and whether they came as a tuple; None if the tuple is used as a whole."""
        value = self._value(node)
        indices = [u.args[1] if u.target is operator.getitem and u.args[0] is node else None for u in node.users]
        if value is _MISSING:
            returns = getattr(getattr(node.target, "_schema", None), "returns", None)
            if returns is not None and not returns and not node.users:
                return [], False
            plain = returns is not None and len(returns) == 1 and "List" not in str(returns[0].type)
            if plain or not node.users or not all(type(i) is int for i in indices):
                return [UNKNOWN], False
            count = max(max(i for i in indices if isinstance(i, int)) + 1, len(returns) if returns else 0)
            types: list[Type] = [UNKNOWN] * count
            for user, i in zip(node.users, indices, strict=True):
                if isinstance(i, int):
                    types[i] = self._type(user)
        elif isinstance(value, (tuple, list)):
            types = [type_of(v) for v in value]
        elif value is None:
            return ([NoneType()] if node.users else []), False
        else:
            return [type_of(value)], False
        taken = all(type(i) is int and 0 <= i < len(types) for i in indices)
        return (types, True) if taken and len(set(indices)) == len(indices) else None

    def _opaque(self, order: int, node: torch.fx.Node, encoder: ArgumentEncoder, args: Any, kwargs: Any) -> None:
        callee: Any = node.target
        name = str(node.target)
        if node.op == "call_module":
            callee = owned(self.gm, name)
        elif node.op == "call_function":
            name = target_name(callee) or f"{getattr(callee, '__module__', '')}.{getattr(callee, '__name__', callee)}"
        type_ = self._type(node)
        if isinstance(self._value(node), (tuple, list)):
            type_ = OpaqueType("tuple")
        op = Op(
            "torch.opaque",
            encoder.operands,
            [type_],
            attrs={"kind": node.op, "target": name, "args": args, **({"kwargs": kwargs} if kwargs else {})},
            regions=encoder.regions,
            groups=[len(encoder.operands)],
            loc=location_of(node.meta),
            names=[node.name],
        )
        if node.op != "call_method":
            op.meta["callee"] = callee
        self._enter(order, node, op, encoder.opaque)
        self.env[node] = op.result

    def _call_method(self, order: int, node: torch.fx.Node) -> None:
        encoder = ArgumentEncoder(self.env.__getitem__, self._body)
        args, kwargs = encoder.encode(tuple(node.args)), encoder.encode(dict(node.kwargs))
        self._opaque(order, node, encoder, args, kwargs)

    _call_module = _call_method

    def _output(self, order: int, node: torch.fx.Node) -> None:
        encoder = ArgumentEncoder(self.env.__getitem__, self._body)
        template = encoder.encode(node.args[0])
        attrs: dict[str, Any] = {}
        if template is None:
            attrs["template"] = Literal("py", "None")  # an absent template means a tuple of the operands
        elif template != tuple(Operand(i) for i in range(len(encoder.operands))):
            attrs["template"] = template
        op = Op("return", encoder.operands, (), attrs=attrs, groups=[len(encoder.operands)], loc=location_of(node.meta))
        self._enter(order, node, op, encoder.opaque)

    def _enter(
        self, order: int, node: torch.fx.Node, op: Op, opaque: Sequence[Any] = (), is_tuple: bool | None = None
    ) -> None:
        op.meta[FX_META] = dict(node.meta)
        op.meta[ORIGIN] = Origin(order, node.name, str(node.target), node.type, is_tuple=is_tuple)
        if opaque:
            op.meta[OPAQUE] = tuple(opaque)
        self.graph.append(op)
