"""The nodes of a graph that autograd made, put in an order in which a rank computes while rows travel.

The contract:
1. Every layer that lies on several ranks, and every backward of one, is begun and run on by nodes of their own. The
   order is that of ``interleave-layers``; every call is made once, on the same values, so no bit changes.
2. Each of these nodes takes a result of the one before: what compiles the graph keeps their order, and so all ranks
   begin the same collectives in the same order.
3. Whatever writes to memory, draws random numbers or calls another graph keeps its place, and nothing passes it.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Graph, Node
from torch.utils import _pytree as pytree

from moec.backends.distributed.kernel import for_needs
from moec.backends.partition import SPREAD
from moec.ir.staged import stops
from moec.passes.interleave_layers.order import Kind, Task, in_order
from moec.runtime.programs import Program, lookup

_WAIT = "_c10d_functional::wait_tensor"


@dataclass(frozen=True)
class Layer:
    """A node that runs a layer, or its backward, from its first collective to its last.

    Attributes:
        node: The node.
        program: What it runs.
        inputs: The program's operands.
        grads: Gradients of its results; () for a forward.
        needs: Which operands need a gradient; () for a forward.
    """

    node: Node
    program: Program
    inputs: tuple[Any, ...]
    grads: tuple[Any, ...] = ()
    needs: tuple[bool, ...] = ()

    @property
    def backward(self) -> bool:
        return bool(self.grads)

    @property
    def stops(self) -> int:
        """How often it waits for rows."""
        regions = self.program.op.regions
        return len(stops(for_needs(regions[1], self.needs) if self.backward else regions[0]))


def layers_of(nodes: Iterable[Node]) -> list[Layer]:
    """The layers among some nodes, in their order."""
    return [found for node in nodes if (found := _layer(node)) is not None]


def _layer(node: Node) -> Layer | None:
    if not isinstance(node.target, torch._ops.OpOverload) or node.target.namespace != "moec":
        return None
    name = node.target._schema.name.removeprefix("moec::")
    if name not in ("experts", "experts_backward", "experts_beside", "experts_beside_backward"):
        return None
    names = [a.name for a in node.target._schema.arguments]
    given = {**dict(zip(names, node.args, strict=False)), **node.kwargs}
    program = lookup(str(given["program"]))
    if program.op.name != SPREAD:
        return None
    inputs = given["inputs"] if "inputs" in given else [given["x"], given["ids"], given["weights"], *given["params"]]  # type: ignore[misc]
    grads = given["grads"] if "grads" in given else [given["grad"]] if "grad" in given else []
    return Layer(node, program, tuple(inputs), tuple(grads), tuple(given.get("needs", ())))  # type: ignore[arg-type]


def interleave(graph: Graph) -> int:
    """Put a graph in order, in place; how many layers are in pieces then. One layer alone stays as it is."""
    layers = [found for found in layers_of(graph.nodes) if found.stops]
    if len(layers) < 2:
        return 0
    for node in [layer.node for layer in layers]:
        (layer,) = layers_of([node])  # it may read what another layer made, which is another node now
        _split(graph, layer)
    first = [n for n in graph.nodes if n.op in ("placeholder", "get_attr")]
    nodes = [n for n in graph.nodes if n.op not in ("placeholder", "get_attr", "output")]
    number = {node: i for i, node in enumerate(nodes)}
    tasks = [Task(tuple(number[a] for a in n.all_input_nodes if a in number), _kind(n)) for n in nodes]
    at = first[-1] if first else graph._root
    for i in in_order(tasks):
        at.append(nodes[i])
        at = nodes[i]
    _chain(graph)
    graph.lint()
    return len(layers)


def _split(graph: Graph, layer: Layer) -> None:
    """Nodes that begin a layer, run it on and end it, in the place of one."""
    old, ops = layer.node, torch.ops.moec
    seen = dict(zip(pytree.tree_leaves(old.args), pytree.tree_leaves(_eager(old)), strict=False))
    made: list[Node] = []

    def call(op: Any, *args: Any, value: Any) -> Node:
        node = graph.call_function(op, args)
        kept = ("stack_trace", "nn_module_stack", "seq_nr", "partitioner_tag", "source_fn_stack", "fwd_nn_module_stack")
        node.meta = {k: old.meta[k] for k in kept if k in old.meta} | {"val": value}
        if "eager_input_vals" in old.meta:
            node.meta["eager_input_vals"] = (_fakes(args, seen), {})
        made.append(node)
        return node

    told: tuple[Any, ...] = (list(layer.inputs), layer.program.key)
    begin, end = ops.begin_layer.default, ops.end_layer.default
    if layer.backward:
        told = (list(layer.grads), list(layer.inputs), list(layer.needs), layer.program.key)
        begin, end = ops.begin_gradients.default, ops.end_gradients.default
    number = _number(old)
    with graph.inserting_before(old):
        token = call(begin, *told, value=number)
        for _ in range(layer.stops - 1):
            token = call(ops.resume_layer.default, token, value=number)
        value = old.meta.get("val")
        several = isinstance(value, (list, tuple))
        last = call(end, token, *told, value=value if several else [value])
        if not several:
            alone = graph.call_function(operator.getitem, (last, 0))
            alone.meta = {k: v for k, v in old.meta.items() if k != "eager_input_vals"}
    old.replace_all_uses_with(last if several else alone)
    graph.erase_node(old)


def _number(node: Node) -> Any:
    """The fake of a layer's number."""
    value = next(v for v in pytree.tree_leaves(node.meta.get("val")) if isinstance(v, torch.Tensor))
    mode = getattr(value, "fake_mode", None)
    if mode is None:
        return torch.empty((), dtype=torch.int64)
    with mode:
        return torch.empty((), dtype=torch.int64)


def _eager(node: Node) -> Any:
    """What a node was given when it was traced, as far as that is known."""
    return node.meta["eager_input_vals"][0] if "eager_input_vals" in node.meta else ()


def _fakes(args: Any, seen: dict[Any, Any]) -> Any:
    def fake(a: Any) -> Any:
        return (seen[a] if a in seen else a.meta.get("val")) if isinstance(a, Node) else a

    return pytree.tree_map(fake, args)


def _kind(node: Node) -> Kind:
    target = node.target
    if not isinstance(target, torch._ops.OpOverload):
        return "fence" if isinstance(target, torch._ops.HigherOrderOperator) or node.op != "call_function" else "op"
    if target.namespace == "moec":
        name = target._schema.name.removeprefix("moec::")
        if name in ("begin_layer", "begin_gradients"):
            return "begin"
        return "resume" if name in ("resume_layer", "end_layer", "end_gradients") else "op"
    if target._schema.name == _WAIT:
        return "wait"
    return "fence" if target._schema.is_mutable or _draws(node, target) else "op"


def _draws(node: Node, target: torch._ops.OpOverload) -> bool:
    """Whether a call draws random numbers; one that drops nothing out does not."""
    if torch.Tag.nondeterministic_seeded not in target.tags:
        return False
    for i, argument in enumerate(target._schema.arguments):
        if argument.name in ("dropout_p", "p"):
            given = node.args[i] if i < len(node.args) else node.kwargs.get(argument.name, argument.default_value)
            return not (isinstance(given, (int, float)) and given == 0)
    return True


def _chain(graph: Graph) -> None:
    """Give every piece a result of the one before."""
    before: Node | None = None
    for node in list(graph.nodes):
        kind = _kind(node) if node.op == "call_function" else "op"
        if kind not in ("begin", "resume"):
            continue
        if before is not None:
            node.kwargs = {**node.kwargs, "after": before}
            if "eager_input_vals" in node.meta:
                args, _ = node.meta["eager_input_vals"]
                node.meta["eager_input_vals"] = (args, {"after": before.meta["val"]})
        before = node
        if isinstance(node.meta["val"], (list, tuple)):
            with graph.inserting_after(node):
                before = graph.call_function(operator.getitem, (node, 0))
            before.meta = {"val": node.meta["val"][0]}
