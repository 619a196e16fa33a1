"""Whether the two graphs that autograd will make of one are to be interleaved.

It is decided before they are there, on the graph that Dynamo hands over, once its blocks are ops of moec. What decides
is the same on all ranks: which call needs which, the sizes of the model's own matrices, the number of tokens that the
plan names, and times that the ranks measured together. Numbers of tokens, in which ranks differ, are not looked at.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import GraphModule, Node

from moec.interleaving.graph import Layer, layers_of
from moec.ir.torch_dtypes import FROM_TORCH
from moec.op_costs import op_costs
from moec.options import CompileOptions
from moec.passes.base import PassContext, Remark
from moec.passes.interleave_layers.beside import WEIGHT_AT, Core, Dense, Moved, Work
from moec.passes.interleave_layers.interleave import (
    LARGE_CALLS,
    NOTHING,
    InterleaveLayers,
    declined,
    predicted,
    told,
)
from moec.passes.interleave_layers.order import Kind, Task, apart
from moec.passes.interleave_layers.pieces import pieces_of, tokens_of
from moec.passes.matching import ATTENTION_CORE
from moec.pipeline import passes_of
from moec.report import Report
from moec.routing.store import load_routing
from moec.slicing import nodes as fx_nodes

_HANDED = fx_nodes.PARTS | fx_nodes.VIEWS | fx_nodes.TRANSPOSES | fx_nodes.CASTS


@dataclass(frozen=True)
class Wanted:
    """Which graphs are to be put in order."""

    forward: bool = False
    backward: bool = False


@dataclass(frozen=True)
class _Direction:
    """One of the two graphs, as far as it can be foreseen.

    Attributes:
        name: ``forward`` or ``backward``.
        tasks: Its calls.
        layers: By the number of a task.
        large: Numbers of what takes long.
        beside: As :func:`~moec.passes.interleave_layers.interleave.predicted` has it.
        fence: The first call that nothing may pass, or "".
    """

    name: str
    tasks: list[Task]
    layers: dict[int, Layer]
    large: list[int]
    beside: dict[int, Work]
    fence: str = ""


def decide(gm: GraphModule, options: CompileOptions, report: Report) -> Wanted:
    """What is to be interleaved, as the passes in force say; why, or why not, goes to the report.

    Args:
        gm: A torch-level graph whose blocks have been replaced.
        options: The caller's options.
        report: Of the graph.
    """
    graphs = [m.graph for m in gm.modules() if isinstance(m, GraphModule)]
    everywhere = [found for graph in graphs for found in layers_of(graph.nodes) if found.stops]
    groups = [str(layer.program.op.attrs["group"]) for layer in everywhere]
    passes = passes_of(options, groups) if groups else []
    pass_ = next((p for p in passes if isinstance(p, InterleaveLayers)), None)
    if pass_ is None:
        return Wanted()
    layers = [layer for layer in everywhere if layer.node.graph is gm.graph]
    why = ""
    if options.inner == "eager":
        why = "inner='eager' makes no graphs of forward and backward that could be put in order; the others do"
    elif not layers:
        why = "layers lie in nested graphs, one at a time; moec.prepare(model, regions=False) makes no regions"
    if why:
        report.remarks.append(str(Remark("missed", pass_.name, why)))
        return Wanted()
    forward = _forward(gm, layers, options, pass_.length)
    backward = _backward(gm, forward) if torch.is_grad_enabled() else None
    return Wanted(
        _pays(forward, pass_, options, report), backward is not None and _pays(backward, pass_, options, report)
    )


def _pays(found: _Direction, pass_: InterleaveLayers, options: CompileOptions, report: Report) -> bool:
    def say(kind: str, why: str) -> bool:
        report.remarks.append(str(Remark(kind, pass_.name, f"{found.name}: {why}")))
        return kind == "applied"

    if len(found.layers) < 2:
        return say("missed", "there are no two layers, one of which could run while the other waits")
    free, fenced = apart(found.tasks, list(found.layers), found.large)
    if not free:
        return say("missed", f"{found.fence} has an effect and must keep its place" if fenced else NOTHING)
    worth = None
    if not pass_.always:
        profile = None if options.routing is None else load_routing(options.routing)
        ctx = PassContext(cost_model=op_costs(options.target), profile=profile)
        place = found.name == "backward"
        layers = {
            i: pieces_of(layer.program.op, layer.program.op.regions[place], place, ctx, pass_.tokens)
            for i, layer in found.layers.items()
        }
        first = found.layers[free[0]].program.op
        tokens = tokens_of(first, ctx) or pass_.tokens
        worth = predicted(
            found.tasks, layers, found.beside, list(layers), first.attrs["group"], ctx, tokens, bool(place)
        )
    if worth is not None and not worth.pays:
        return say("missed", declined("it", worth))
    return say("applied", f"{len(found.layers)} layers in pieces, and what else is ready where they wait{told(worth)}")


def _forward(gm: GraphModule, layers: Sequence[Layer], options: CompileOptions, length: int) -> _Direction:
    calls = [n for n in gm.graph.nodes if n.op not in ("placeholder", "get_attr", "output")]
    number = {node: i for i, node in enumerate(calls)}
    written: dict[int, int] = {}  # memory -> the last call that wrote to it
    tasks: list[Task] = []
    fence = ""
    for node in calls:
        read = [m for a in (node, *node.all_input_nodes) if (m := fx_nodes.memory(a)) is not None]
        needs = {number[a] for a in node.all_input_nodes if a in number} | {written[m] for m in read if m in written}
        kind: Kind = "fence" if _keeps_its_place(node, options) else "op"
        fence = fence or (fx_nodes.name(node) if kind == "fence" else "")
        tasks.append(Task(tuple(sorted(needs)), kind))
        for changed in fx_nodes.mutated(node):
            if (place := fx_nodes.memory(changed)) is not None:
                written[place] = number[node]
    found = {number[layer.node]: layer for layer in layers}
    large = [i for i, n in enumerate(calls) if i in found or fx_nodes.name(n) in LARGE_CALLS]
    beside: dict[int, Work] = {
        i: known for i, n in enumerate(calls) if (known := _dense(n) or _core(n, length)) is not None
    }
    return _Direction("forward", tasks, found, large, beside, fence)


def _keeps_its_place(node: Node, options: CompileOptions) -> bool:
    """Whether nothing may pass a call in the graph that it becomes part of. Inductor draws numbers from seeds."""
    if isinstance(node.target, torch._ops.HigherOrderOperator) or node.op == "call_module":
        return True
    name = fx_nodes.name(node)
    if options.inner == "inductor" or name.startswith(("_enter", "_exit", "_set_grad", "_assert")):
        return False
    if name == "scaled_dot_product_attention":
        return not fx_nodes.is_zero(fx_nodes.argument(node, 4, "dropout_p", 0.0))
    drops = name.endswith("dropout") and fx_nodes.is_zero(fx_nodes.argument(node, 1, "p"))
    return fx_nodes.has_effect(node) and not drops


def _dense(node: Node) -> Dense | None:
    """A product with a matrix of the model, whose sizes are the same on all ranks."""
    name, value = fx_nodes.name(node), fx_nodes.value(node)
    if name not in WEIGHT_AT or not isinstance(value, torch.Tensor) or len(node.args) <= WEIGHT_AT[name]:
        return None
    given = node.args[WEIGHT_AT[name]]
    weight, origin = fx_nodes.value(given), fx_nodes.value(fx_nodes.peel(given, _HANDED))
    if not isinstance(weight, torch.Tensor) or not isinstance(origin, torch.nn.Parameter) or weight.dim() != 2:
        return None
    outputs = int(value.shape[-1])
    return Dense(weight.numel() / outputs, outputs, FROM_TORCH[value.dtype].name)


def _core(node: Node, length: int) -> Core | None:
    """Attention on heads ``[B, h, S, d]``: of its sizes the heads are the same on all ranks, the length is told."""
    if fx_nodes.name(node) != ATTENTION_CORE or not length:
        return None
    values = [fx_nodes.value(fx_nodes.argument(node, i, name)) for i, name in enumerate(("query", "key", "value"))]
    if not all(isinstance(v, torch.Tensor) and v.dim() == 4 for v in values):
        return None
    query, key, value = values
    both = int(query.shape[3]) + int(value.shape[3])
    causal = bool(fx_nodes.argument(node, 5, "is_causal", False))
    heads, kept = int(query.shape[1]), int(key.shape[1])
    return Core(heads * both, kept * both, length, causal, FROM_TORCH[query.dtype].name, query.element_size())


def _backward(gm: GraphModule, forward: _Direction) -> _Direction:
    """The calls turned round: each has its gradient after those of its users; that of a matrix is needed by nobody.

    Nor are gradients of experts' weights, which are added up where several micro-batches read the same.
    """
    calls = [n for n in gm.graph.nodes if n.op not in ("placeholder", "get_attr", "output")]
    users: list[list[int]] = [[] for _ in calls]
    for i, task in enumerate(forward.tasks):
        for n in task.needs:
            users[n].append(i)
    recorded = _recorded(calls)
    tasks: list[Task] = []
    at: dict[int, int] = {}
    layers: dict[int, Layer] = {}
    large: list[int] = []
    beside: dict[int, Work] = {}
    summed: dict[int, int] = {}  # memory of weights -> the task that has their gradient so far
    for i in reversed(range(len(calls))):
        if not recorded[i]:
            continue
        needs = tuple(sorted({at[u] for u in users[i] if u in at}))
        at[i] = len(tasks)
        higher = isinstance(calls[i].target, torch._ops.HigherOrderOperator)
        tasks.append(Task(needs, "fence" if higher else "op"))
        if i in forward.layers:
            layers[at[i]] = forward.layers[i]
            for memory, size in _weights(forward.layers[i]).items():
                before = summed.get(memory)
                summed[memory] = at[i]
                if before is not None:
                    summed[memory] = len(tasks)
                    beside[len(tasks)] = Moved(fixed=3.0 * size)  # two are read, one is written
                    tasks.append(Task((before, at[i])))
        if i in forward.large:
            large.append(at[i])
        if (work := forward.beside.get(i)) is not None:
            beside[at[i]] = work
            if isinstance(work, Dense):
                large.append(len(tasks))
                beside[len(tasks)] = work
                tasks.append(Task(needs))
    return _Direction("backward", tasks, layers, large, beside, "a nested graph")


def _weights(layer: Layer) -> dict[int, int]:
    """Bytes of a layer's parameters, by their memory."""
    found = {}
    for given in layer.inputs[3:]:
        value, memory = fx_nodes.value(given), fx_nodes.memory(given)
        if isinstance(value, torch.Tensor) and memory is not None and value.requires_grad:
            found[memory] = int(value.numel()) * value.element_size()
    return found


def _recorded(calls: Sequence[Node]) -> list[bool]:
    """Whether autograd records each call."""
    found: list[bool] = []
    on: Any = True
    for node in calls:
        if fx_nodes.name(node).startswith("_set_grad"):
            on = node.args[0]
        found.append(bool(on))
    return found
