"""Layers of a program that are alike become calls of one op, so that their code is made once, whatever the depth.

A layer is what lies between the first and the last node of a numbered module, such as ``model.layers.7``. What it takes
from outside (its input, its weights, masks) are the op's arguments; of what it writes into, such as a cache, it may be
the only user. Two layers share an op if their nodes, their results, and the sizes and strides of their arguments are
the same.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
import torch._inductor.inductor_prims  # defines what fixes strides
from torch import Tensor
from torch._prims_common import is_contiguous_or_false
from torch.export import ExportedProgram
from torch.utils._sympy.interp import sympy_interp
from torch.utils._sympy.reference import PythonReferenceAnalysis

from moec.aot.memory import acts_outside, origin, shares, written
from moec.aot.ops import define
from moec.backends.cpu.aot import content_name

Node = torch.fx.Node
FEWEST = 3
"""Layers that are worth an op: its code is made apart from the program's, which has a price of its own."""


@dataclass(frozen=True)
class Region:
    """What equal layers share.

    Attributes:
        name: Of the op and of its C function; it depends on the content alone.
        module: One of the layers: its placeholders are the op's arguments, and it returns a tuple.
    """

    name: str
    module: torch.fx.GraphModule

    @property
    def arguments(self) -> list[Node]:
        """The nodes that stand for them."""
        return list(self.module.graph.find_nodes(op="placeholder"))

    @property
    def results(self) -> list[Node]:
        """The nodes that are returned."""
        return list(self.module.graph.output_node().args[0])  # type: ignore[arg-type]

    @property
    def schema(self) -> str:
        """As torch writes it, after the name."""
        changed = {origin(w) for n in self.module.graph.nodes for w in written(n)}
        types = (f"Tensor(a{i}!)" if a in changed else "Tensor" for i, a in enumerate(self.arguments))
        given = ", ".join(f"{type} a{i}" for i, type in enumerate(types))
        made = ", ".join("Tensor" for _ in self.results)
        return f"({given}) -> {made if len(self.results) == 1 else f'({made})'}"

    @property
    def declaration(self) -> str:
        """Of the C function."""
        given = [f"AtenTensorHandle a{i}" for i in range(len(self.arguments))]
        made = [f"AtenTensorHandle* r{i}" for i in range(len(self.results))]
        return f"AOTITorchError aoti_torch_cpu_{self.name}({', '.join([*given, *made])})"

    def fake(self, *given: Tensor) -> Tensor | tuple[Tensor, ...]:
        """The results as empty tensors; their sizes follow from those of the arguments."""
        known: dict[Any, Any] = {}
        for node, tensor in zip(self.arguments, given, strict=True):
            known |= {_expr(s): have for s, have in zip(node.meta["val"].shape, tensor.shape, strict=True)}
        values = [r.meta["val"] for r in self.results]
        made = [given[0].new_empty([_size(s, known) for s in v.shape], dtype=v.dtype) for v in values]
        return made[0] if len(made) == 1 else tuple(made)


def _expr(size: int | torch.SymInt) -> Any:
    return size.node.expr if isinstance(size, torch.SymInt) else size


def _size(size: int | torch.SymInt, known: Mapping[Any, Any]) -> Any:
    if isinstance(size, int):
        return size
    expr = size.node.expr
    return known[expr] if expr in known else sympy_interp(PythonReferenceAnalysis, dict(known), expr)


def share_layers(program: ExportedProgram) -> list[tuple[Region, torch._ops.OpOverload]]:
    """Put calls in the places of layers that are alike.

    Args:
        program: It is changed.

    Returns:
        The regions, each with its op.
    """
    groups: dict[str, list[_Layer]] = {}
    _share_masks(program.graph)
    found, lent = _layers(program.graph), program.graph_signature.user_inputs
    _hoist(found, lent)
    for nodes in found:
        layer = _read(nodes, lent)
        if layer is not None:
            groups.setdefault(layer.text, []).append(layer)
    made = []
    new: dict[Node, Node] = {}
    for text, layers in groups.items():
        if len(layers) < FEWEST:
            continue
        region = Region(content_name("layer", torch.__version__, text), layers[0].module)
        op = define(region.name, region.schema, region.fake)
        for layer in layers:
            _call(program.graph, layer, op, new)
        made.append((region, op))
    _make_once(program.graph, {op for _, op in made})
    program.graph.lint()
    program.graph_module.recompile()
    return made


def _share_masks(graph: torch.fx.Graph) -> None:
    """Make of a mask of booleans what attention adds once for all layers; Inductor would do so in each of them."""
    sdpa = torch.ops.aten.scaled_dot_product_attention.default
    made: dict[tuple[Node, torch.dtype], Node] = {}
    for node in graph.find_nodes(op="call_function", target=sdpa):
        mask = node.args[3] if len(node.args) > 3 else None
        if not isinstance(mask, Node) or mask.op != "call_function" or mask.meta["val"].dtype != torch.bool:
            continue
        dtype = node.args[0].meta["val"].dtype
        if (mask, dtype) not in made:
            with graph.inserting_after(mask):
                added = graph.call_function(torch.ops.aten.where.Scalar, (mask, 0.0, -math.inf))
            added.meta["val"] = torch.where(mask.meta["val"], 0.0, -math.inf)
            with graph.inserting_after(added):
                cast = graph.call_function(torch.ops.aten.to.dtype, (added, dtype))
            cast.meta["val"] = added.meta["val"].to(dtype)
            made[mask, dtype] = cast
        node.update_arg(3, made[mask, dtype])


def _make_once(graph: torch.fx.Graph, ops: Collection[torch._ops.OpOverload]) -> None:
    """Fix the strides of what several calls take, such as a mask: Inductor would copy it for each."""
    force = torch.ops.prims.inductor_force_stride_order.default
    for node in [n for n in graph.nodes if n.op == "call_function"]:
        calls = [u for u in node.users if u.target in ops]
        value = node.meta.get("val")
        if len(calls) < 2 or not (isinstance(value, Tensor) and is_contiguous_or_false(value)):
            continue
        with graph.inserting_before(node.next):
            strides: list[Any] = list(value.stride())
            for dim, stride in enumerate(value.stride()):
                if isinstance(stride, torch.SymInt):
                    strides[dim] = graph.call_function(torch.ops.aten.sym_stride.int, (node, dim))
                    strides[dim].meta["val"] = stride
            kept = graph.call_function(force, (node, strides))
        kept.meta["val"] = value
        for call in calls:
            call.replace_input_with(node, kept)


def _layers(graph: torch.fx.Graph) -> list[list[Node]]:
    """The nodes of every layer; whatever stands between them is its own."""
    nodes = [n for n in graph.nodes if n.op not in ("placeholder", "output")]
    ends: dict[str, list[int]] = {}
    for at, node in enumerate(nodes):
        name = _layer_name(node)
        if name is not None:
            ends.setdefault(name, [at, at])[1] = at
    spans = [*sorted(ends.values()), [len(nodes), len(nodes)]]
    # Of layers whose nodes are mixed, those that end before the next one begins: no node is in two of them.
    return [nodes[first : last + 1] for (first, last), (after, _) in pairwise(spans) if last < after]


def _layer_name(node: Node) -> str | None:
    """The outermost module around a node whose name ends in a number."""
    for path, _ in (node.meta.get("nn_module_stack") or {}).values():
        if str(path).rpartition(".")[2].isdecimal():
            return str(path)
    return None


def _hoist(layers: list[list[Node]], lent: Collection[str]) -> None:
    """Move out what one layer makes for several others, such as a form of the rotary embedding's cosines."""
    owner = {node: i for i, nodes in enumerate(layers) for node in nodes}
    for i, nodes in enumerate(layers):
        wanted = [n for n in nodes if len({owner.get(u) for u in n.users} - {i, None}) > 1]
        moved: set[Node] = set()
        while wanted:
            node = wanted.pop()
            if node not in moved:
                moved.add(node)
                wanted += [n for n in node.all_input_nodes if owner.get(n) == i]
        inside = set(nodes)
        changed = {origin(w) for n in nodes for w in written(n)}
        read = {origin(given) for n in moved for given in (n, *n.all_input_nodes)}
        if not moved or moved == inside or read & changed or any(acts_outside(n, inside, lent) for n in nodes):
            continue
        rest = [n for n in nodes if n not in moved]
        for node in nodes:
            if node in moved:
                rest[0].prepend(node)
        nodes[:] = rest


@dataclass
class _Layer:
    """One layer: its nodes, what crosses its border, and itself as a module; ``text`` is equal for equal layers."""

    nodes: list[Node]
    inputs: list[Node]
    outputs: list[Node]
    module: torch.fx.GraphModule
    text: str


class _Copy:
    """A layer's nodes in a graph of their own, where names depend on positions alone."""

    def __init__(self, nodes: Iterable[Node]) -> None:
        self.graph = torch.fx.Graph()
        self.inputs: list[Node] = []
        self.env: dict[Node, Node] = {}
        self._inside = set(nodes)
        self._sizes: dict[Any, Node] = {}

    def tensors(self, nodes: Iterable[Node]) -> None:
        """Make a placeholder for every tensor from outside, in the order of their use."""
        for node in nodes:
            for given in node.all_input_nodes:
                if given not in self._inside and given not in self.env and isinstance(given.meta.get("val"), Tensor):
                    self.env[given] = self._add("placeholder", f"a{len(self.inputs)}", given)
                    self.inputs.append(given)

    def add(self, node: Node) -> None:
        """Copy a node."""
        self.env[node] = self._add("call_function", node.target, node)

    def _add(self, op: str, target: Any, node: Node) -> Node:
        args = torch.fx.map_arg(node.args, self._get) if op != "placeholder" else ()
        kwargs = torch.fx.map_arg(node.kwargs, self._get) if op != "placeholder" else {}
        name = target if op == "placeholder" else f"n{len(self.env)}"
        made = self.graph.create_node(op, target, args, kwargs, name)
        made.meta["val"] = node.meta["val"]
        return made

    def _get(self, node: Node) -> Node:
        """The copy of a node; a size from outside is asked of a tensor that comes in."""
        if node not in self.env:
            self.env[node] = self._size(node)
        return self.env[node]

    def _size(self, node: Node) -> Node:
        expr = _expr(node.meta["val"])
        for given in self.inputs:
            for dim, size in enumerate(given.meta["val"].shape):
                if _expr(size) == expr:
                    name = f"n{len(self.env)}"
                    target = torch.ops.aten.sym_size.int
                    made = self.graph.create_node("call_function", target, (self.env[given], dim), {}, name)
                    made.meta["val"] = node.meta["val"]
                    return made
        return self._add("call_function", node.target, node)


def _read(nodes: list[Node], lent: Collection[str]) -> _Layer | None:
    """The layer of these nodes; None where it cannot be an op."""
    inside = set(nodes)
    outputs = [n for n in nodes if not inside.issuperset(n.users)]
    if any(acts_outside(n, inside, lent) for n in nodes) or not all(map(_own, outputs)):
        return None
    copy = _Copy(nodes)
    copy.tensors(nodes)
    symbols = {_expr(s) for n in copy.inputs for s in n.meta["val"].shape}
    if not all(symbols.issuperset(_symbols(n)) for n in (*nodes, *copy.inputs)):
        return None
    for node in nodes:
        copy.add(node)
    copy.graph.output(tuple(copy.env[n] for n in outputs))
    module = torch.fx.GraphModule(torch.nn.Module(), copy.graph)
    text = [str(copy.graph)]
    for node in copy.inputs:
        value = node.meta["val"]
        text.append(f"{value.dtype} {tuple(value.shape)} {tuple(value.stride())}")
    return _Layer(nodes, copy.inputs, outputs, module, "\n".join(text))


def _own(node: Node) -> bool:
    """Whether a result is a tensor of its own memory, row by row: an op's results may be nothing else here."""
    value = node.meta.get("val")
    if not isinstance(value, Tensor) or not is_contiguous_or_false(value):
        return False
    return not shares(node)


def _symbols(node: Node) -> set[Any]:
    value = node.meta.get("val")
    found: set[Any] = set()
    for one in value if isinstance(value, tuple | list) else (value,):
        sizes = (*one.shape, *one.stride()) if isinstance(one, Tensor) else (one,)
        for size in sizes:
            if isinstance(size, torch.SymInt):
                found |= size.node.expr.free_symbols
    return found


def _call(graph: torch.fx.Graph, layer: _Layer, op: torch._ops.OpOverload, new: dict[Node, Node]) -> None:
    """Put a call in the place of a layer; ``new`` knows what stands for other layers' results, and learns of these."""
    values = [n.meta["val"] for n in layer.outputs]
    with graph.inserting_before(layer.nodes[0]):
        call = graph.call_function(op, tuple(new.get(n, n) for n in layer.inputs))
        made = [call]
        if len(values) > 1:
            made = [graph.call_function(operator.getitem, (call, i)) for i in range(len(values))]
    call.meta["val"] = tuple(values)
    for old, node, value in zip(layer.outputs, made, values, strict=True):
        node.meta["val"] = value
        old.replace_all_uses_with(node)
        new[old] = node
    for node in reversed(layer.nodes):
        graph.erase_node(node)
