"""Layers of a program that are alike become calls of one op, so that their code is made once, whatever the depth.

A layer is what lies between the first and the last node of a numbered module, such as ``model.layers.7``. What it takes
from outside (its input, its weights, masks) are the op's arguments; of what it writes into, such as a cache, it may be
the only user. Two layers share an op if their nodes, their results, and the sizes and strides of their arguments are
the same.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Collection
from typing import Any

import torch
import torch._inductor.inductor_prims  # defines what fixes strides
from torch import Tensor
from torch._prims_common import is_contiguous_or_false
from torch.export import ExportedProgram

from moec.aot.find_layers import find_layers, hoist
from moec.aot.ops import define
from moec.aot.read_layer import Layer, read_layer
from moec.aot.region import Region
from moec.backends.cpu.aot import content_name

Node = torch.fx.Node
FEWEST = 3
"""Layers that are worth an op: its code is made apart from the program's, which has a price of its own."""


def share_layers(program: ExportedProgram) -> list[tuple[Region, torch._ops.OpOverload]]:
    """Put calls in the places of layers that are alike.

    Args:
        program: It is changed.

    Returns:
        The regions, each with its op.
    """
    groups: dict[str, list[Layer]] = {}
    _share_masks(program.graph)
    found, lent = find_layers(program.graph), program.graph_signature.user_inputs
    hoist(found, lent)
    for nodes in found:
        layer = read_layer(nodes, lent)
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


def _call(graph: torch.fx.Graph, layer: Layer, op: torch._ops.OpOverload, new: dict[Node, Node]) -> None:
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
