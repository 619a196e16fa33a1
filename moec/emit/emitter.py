"""An IR graph as nodes of a ``torch.fx`` graph.

The contract:
1. Ops come out in their order. What capture made vanish comes back where it was: ``getitem`` nodes of a tuple and
   ``get_attr`` nodes of nested graphs keep their place among the captured nodes.
2. A node that a pass did not touch has its old target, arguments and ``meta``; a node that a pass made has its value
   recorded by running it on fake tensors.
3. torch ops are emitted as they are; for every other op the caller's ``lower_op`` is asked.
4. Regions of one captured module that are still equal stay one module.
"""

from __future__ import annotations

import heapq
import operator
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from moec.capture.origin import FX_META, ORIGIN, Origin
from moec.emit.arguments import decode
from moec.emit.errors import EmitError
from moec.emit.modules import ModuleStore
from moec.emit.values import carry_value, mode_of, record_value
from moec.ir.core import Graph, Op, Value
from moec.ir.ops.torch_opaque import callee_of
from moec.ir.torch_bridge import resolve_target

LowerOp = Callable[[Op, torch.fx.Graph, list[Any]], "Sequence[Any] | None"]
"""``lower_op(op, fx_graph, args)`` emits one op at the graph's insertion point. ``args`` are the nodes (or constants)
of its flat operands. Returns one node per result, or None if it does not take the op."""


def emit_module(
    graph: Graph,
    *,
    lower_op: LowerOp | None,
    root: torch.nn.Module | None,
    value_key: str,
    values: Sequence[Any] | None = None,
) -> torch.fx.GraphModule:
    """``graph`` as a GraphModule of its own; see :func:`moec.emit.graph_to_fx`."""
    fx_graph = torch.fx.Graph()
    module = torch.nn.Module()
    store = ModuleStore(module, root)
    inputs = [_placeholder(fx_graph, a, i) for i, a in enumerate(graph.args)]
    for node, value in zip(inputs, values or (), strict=values is not None):
        node.meta.setdefault(value_key, value)
    emitter = Emitter(fx_graph, store, lower_op, value_key)
    emitter.emit(graph, inputs, terminate=True)
    if "codegen" in graph.meta:
        fx_graph.set_codegen(graph.meta["codegen"])
    module.training = graph.meta.get("training", True)
    gm = torch.fx.GraphModule(module, fx_graph, graph.meta.get("class_name", "GraphModule"))
    gm.meta.update(graph.meta.get("gm_meta", {}))
    return gm


def _placeholder(fx_graph: torch.fx.Graph, arg: Value, index: int) -> torch.fx.Node:
    origin = arg.meta.get(ORIGIN) or Origin(0, arg.name or f"arg{index}")
    name = arg.name or origin.name
    node = fx_graph.create_node("placeholder", origin.target or name, origin.default, {}, name, origin.type_expr)
    node.meta = dict(arg.meta.get(FX_META, {}))
    return node


class Emitter:
    """Emits graphs into one fx graph.

    Args:
        fx_graph: Where the nodes go, at its insertion point.
        store: Where constants and nested graphs go.
        lower_op: See :data:`LowerOp`.
        value_key: The key under which nodes record their value.
    """

    def __init__(self, fx_graph: torch.fx.Graph, store: ModuleStore, lower_op: LowerOp | None, value_key: str) -> None:
        self.fx = fx_graph
        self.store = store
        self.lower_op = lower_op
        self.value_key = value_key
        self.env: dict[Value, Any] = {}
        self.mode: FakeTensorMode | None = None
        self.tuples: dict[Op, torch.fx.Node] = {}
        self.bodies: dict[Graph, torch.fx.Node] = {}
        self.body_nodes: dict[tuple[int, str], torch.fx.Node] = {}
        # nodes that wait for their place: (order, tie break, how to make them)
        self.deferred: list[tuple[int, int, Callable[[], Any]]] = []

    def emit(self, graph: Graph, inputs: list[Any], *, terminate: bool) -> Any:
        """Emit ``graph`` with ``inputs`` for its arguments; ``terminate`` emits the output node too."""
        self.env.update(zip(graph.args, inputs, strict=True))
        self.mode = mode_of(inputs)
        for op in graph.ops:
            for region in op.regions:
                if op.dialect == "torch" and ORIGIN in region.meta:
                    self._defer(region.meta[ORIGIN].order, partial(self._body, op, region))
        for op in graph.ops:
            if ORIGIN in op.meta:
                self._flush(op.meta[ORIGIN].order)
            if op.name == "return":
                self._flush(None)
                return self._return(op, terminate)
            self._op(op)
        raise EmitError(f"graph @{graph.name} does not end in return")

    def _defer(self, order: int, make: Callable[[], Any]) -> None:
        heapq.heappush(self.deferred, (order, len(self.deferred) + len(self.env), make))

    def _flush(self, order: int | None) -> None:
        while self.deferred and (order is None or self.deferred[0][0] < order):
            heapq.heappop(self.deferred)[2]()

    def _op(self, op: Op) -> None:
        if op.name == "torch.call":
            self._call(op)
        elif op.name == "torch.get_attr":
            self._get_attr(op)
        elif op.name == "torch.opaque":
            self._opaque(op)
        else:
            self._lower(op)

    def node_of(self, value: Value) -> Any:
        """The node (or constant) of a value, made now if it waited for its place."""
        if value in self.env:
            return self.env[value]
        op = value.op
        if op is None or op not in self.tuples:
            raise EmitError(f"{value!r} is used before it is made", op=repr(op or value))
        origin: Origin | None = value.meta.get(ORIGIN)
        source = self.tuples[op]
        name = origin.name if origin else value.name or None
        type_expr = origin.type_expr if origin else None
        node = self.fx.create_node("call_function", operator.getitem, (source, value.index), {}, name, type_expr)
        node.meta = dict(value.meta.get(FX_META, {}))
        if FX_META in value.meta:
            carry_value(node, self.value_key)
        else:
            if "stack_trace" in source.meta:
                node.meta["stack_trace"] = source.meta["stack_trace"]
            record_value(node, self.value_key, self.mode)
        self.env[value] = node
        return node

    def _call(self, op: Op) -> None:
        target = resolve_target(op.attrs["target"])
        node = self._create(op, "call_function", target)
        if self._returns_tuple(op, target):
            self.tuples[op] = node
            for result in op.results:
                if ORIGIN in result.meta:
                    self._defer(result.meta[ORIGIN].order, partial(self.node_of, result))
        elif op.results:
            self.env[op.result] = node

    def _returns_tuple(self, op: Op, target: Any) -> bool:
        origin: Origin | None = op.meta.get(ORIGIN)
        if origin is not None and origin.is_tuple is not None:
            return origin.is_tuple
        if len(op.results) != 1:
            return bool(op.results)
        schema = getattr(target, "_schema", None)
        if schema is not None:
            return len(schema.returns) != 1 or "List" in str(schema.returns[0].type)
        if op.attrs["target"].startswith("hop.auto_functionalized"):
            return True
        if op.regions:
            return "template" not in op.regions[-1].terminator.attrs
        return False

    def _opaque(self, op: Op) -> None:
        kind, target, callee = op.attrs["kind"], op.attrs["target"], callee_of(op)
        if kind == "call_module":
            callee = self.store.put(target, callee)
        self.env[op.result] = self._create(op, kind, callee)

    def _get_attr(self, op: Op) -> None:
        name = op.attrs["name"]
        value = op.meta["value"] if "value" in op.meta else self.store.find(name, op)
        origin: Origin | None = op.meta.get(ORIGIN)
        node = self.fx.create_node(
            "get_attr", self.store.put(name, value), (), {}, *((origin.name, origin.type_expr) if origin else ())
        )
        node.meta = dict(op.meta.get(FX_META, {}))
        carry_value(node, self.value_key)
        recorded = node.meta.get(self.value_key)
        if FX_META not in op.meta and isinstance(value, torch.Tensor):
            node.meta[self.value_key] = value
        elif isinstance(recorded, FakeTensor) and self.mode is not None and recorded.fake_mode is not self.mode:
            # retracing a piece of a graph records constants under a fake mode of its own, and modes do not mix
            node.meta[self.value_key] = self.mode.from_tensor(value, static_shapes=True)
        self.env[op.result] = node

    def _create(self, op: Op, kind: str, target: Any) -> torch.fx.Node:
        def operand(i: int) -> Any:
            return self.node_of(op.operands[i])

        def region(i: int) -> torch.fx.Node:
            return self._body(op, op.regions[i])

        args = decode(op.attrs.get("args", ()), op, operand, region)
        if target is torch.ops.higher_order.invoke_subgraph:
            args = self._renamed_subgraph(op, args)
        kwargs = decode(op.attrs.get("kwargs", {}), op, operand, region)
        origin: Origin | None = op.meta.get(ORIGIN)
        name = origin.name if origin else (op.results[0].name or None if len(op.results) == 1 else None)
        node = self.fx.create_node(kind, target, args, kwargs, name, origin.type_expr if origin else None)
        self._describe(node, op)
        return node

    def _describe(self, node: torch.fx.Node, op: Op) -> None:
        """The ``meta`` of a node: the captured one, or location and value of a new one."""
        if FX_META in op.meta:
            node.meta = dict(op.meta[FX_META])
            carry_value(node, self.value_key)
            return
        if op.loc.stack:
            node.meta["stack_trace"] = op.loc.stack
        record_value(node, self.value_key, self.mode)

    def _body(self, op: Op, region: Graph) -> torch.fx.Node:
        """The ``get_attr`` node of a nested graph; equal bodies captured by one node share it."""
        if region in self.bodies:
            return self.bodies[region]
        origin: Origin | None = region.meta.get(ORIGIN)
        gm = emit_module(region, lower_op=self.lower_op, root=self.store.root, value_key=self.value_key)
        target = self.store.put_graph(origin.target if origin else region.name or "body", gm)
        key = (origin.order if origin else -1, target)
        if key in self.body_nodes and origin:
            node = self.body_nodes[key]
        else:
            node = self.fx.create_node(
                "get_attr", target, (), {}, *((origin.name, origin.type_expr) if origin else (None,))
            )
            node.meta = dict(region.meta.get(FX_META, {}))
            self.body_nodes[key] = node
        self.bodies[region] = node
        return node

    def _renamed_subgraph(self, op: Op, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """``invoke_subgraph`` caches by identifier: a body that got a new name needs a new identifier too."""
        origin: Origin | None = op.regions[0].meta.get(ORIGIN)
        wanted = origin.target if origin else op.regions[0].name
        suffix = str(args[0].target).removeprefix(wanted)
        return (args[0], f"{args[1]}{suffix}", *args[2:]) if suffix and isinstance(args[1], str) else args

    def _lower(self, op: Op) -> None:
        args = [self.node_of(v) for v in op.operands]
        nodes = self.lower_op(op, self.fx, args) if self.lower_op else None
        if nodes is None:
            raise EmitError(
                f"{op.name} has no form in an fx graph: a backend must claim it",
                op=repr(op),
                source=op.loc.source or None,
                hint="claim it with a backend (aten takes every moe op), or emit the graph before it is raised",
            )
        if len(nodes) != len(op.results):
            raise EmitError(f"{op.name} has {len(op.results)} results, lowering gave {len(nodes)}", op=repr(op))
        for value, node in zip(op.results, nodes, strict=True):
            self.env[value] = node
            if isinstance(node, torch.fx.Node):
                record_value(node, self.value_key, self.mode)
                if op.loc.stack:
                    node.meta.setdefault("stack_trace", op.loc.stack)

    def _return(self, op: Op, terminate: bool) -> Any:
        def no_region(i: int) -> Any:
            raise EmitError("return cannot give a nested graph", op=repr(op))

        outputs = tuple(self.node_of(v) for v in op.operands)
        out: Any = outputs
        if op.attrs.get("template") is not None:
            out = decode(op.attrs["template"], op, outputs.__getitem__, no_region)
        if terminate:
            origin: Origin | None = op.meta.get(ORIGIN)
            name, type_expr = (origin.name, origin.type_expr) if origin else ("output", None)
            node = self.fx.create_node("output", "output", (out,), {}, name, type_expr)
            node.meta = dict(op.meta.get(FX_META, {}))
        return out
