"""A slice of a torch-level graph, traced again as ATen calls."""

from __future__ import annotations

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx import GraphModule, Node
from torch.fx.experimental.proxy_tensor import make_fx

from moec import autocast
from moec.ir.errors import MoecError
from moec.slicing import Slice
from moec.slicing import nodes as fx_nodes


def retrace(piece: Slice) -> GraphModule:
    """The slice as a graph of ATen calls, on the fake values that Dynamo recorded.

    The calls are those before dispatch, as ``torch.export`` has them. Under autocast they are those after it: the casts
    that it inserts are part of the block.
    """
    graph = torch.fx.Graph()
    env: dict[Node, Node] = {}
    values = []
    for node in piece.inputs:
        env[node] = graph.placeholder(node.name)
        values.append(fx_nodes.value(node))
    for node in piece.nodes:
        env[node] = graph.node_copy(node, env.__getitem__)
    graph.output(tuple(env[n] for n in piece.outputs))
    owner = piece.anchor.graph.owning_module
    piece_module = GraphModule(owner if owner is not None else torch.nn.Module(), graph)
    mode = next((v.fake_mode for v in values if isinstance(v, FakeTensor)), None)
    if mode is None:
        raise MoecError("the graph has no fake values to retrace the block with", op=piece.anchor.format_node())
    values = [v.detach() if isinstance(v, torch.Tensor) else v for v in values]
    try:
        with mode, torch.no_grad(), autocast.as_at(piece.anchor):
            traced: GraphModule = make_fx(
                lambda *args: torch.fx.Interpreter(piece_module).run(*args),
                pre_dispatch=not autocast.is_on(_device(piece)),
                tracing_mode="real",
                _allow_non_fake_inputs=True,
            )(*values)
    except Exception as error:  # whatever torch cannot trace here, it can still run: the block stays as it is
        raise MoecError(f"the block could not be retraced: {type(error).__name__}: {error}") from error
    for placeholder, node in zip(traced.graph.find_nodes(op="placeholder"), piece.inputs, strict=True):
        placeholder.name = fx_nodes.own_name(node)
    _check_types(traced, piece)
    _locate(traced, piece)
    return traced


def _check_types(traced: GraphModule, piece: Slice) -> None:
    """Refuse a trace that ran in another mode than the model: its results have other types.

    Raises:
        MoecError: with both types.
    """
    for got, node in zip(traced.graph.output_node().args[0], piece.outputs, strict=True):  # type: ignore[arg-type]
        mine, recorded = fx_nodes.value(got), fx_nodes.value(node)
        if isinstance(mine, torch.Tensor) and isinstance(recorded, torch.Tensor) and mine.dtype != recorded.dtype:
            raise MoecError(
                f"{node.name} is {recorded.dtype} in the model and {mine.dtype} where the block stands alone"
            )


def _locate(traced: GraphModule, piece: Slice) -> None:
    """Give retraced nodes the module path and source of the block's anchor, for messages."""
    kept = {k: piece.anchor.meta[k] for k in ("nn_module_stack", "stack_trace") if k in piece.anchor.meta}
    for node in traced.graph.nodes:
        if node.op == "call_function":
            for key, found in kept.items():
                node.meta.setdefault(key, found)


def _device(piece: Slice) -> str:
    for node in piece.inputs:
        v = fx_nodes.value(node)
        if isinstance(v, torch.Tensor):
            return v.device.type
    return "cpu"
