"""An ``ExportedProgram`` as an IR graph."""

from __future__ import annotations

from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind

from moec.capture.fx import graph_from_fx
from moec.ir.core import Graph


def from_exported(program: ExportedProgram, name: str = "main") -> Graph:
    """Capture the graph of an exported program.

    Arguments and outputs are those of its graph, lifted parameters, buffers and constants first, as its
    ``graph_signature`` lists them; ``Value.meta["target"]`` of a lifted argument is its name in the state dict, and
    ``meta["value"]`` of a constant the tensor that it is.
    ``moec.emit.to_exported`` needs the program again for everything else (state, signature, ranges).

    Args:
        program: A training-IR program or one with decompositions run.
        name: Name of the graph.
    """
    graph = graph_from_fx(program.graph_module, name)
    for arg, spec in zip(graph.args, program.graph_signature.input_specs, strict=True):
        if spec.target is not None:
            arg.meta["target"] = spec.target
            if spec.kind is InputKind.CONSTANT_TENSOR:
                arg.meta["value"] = program.constants[spec.target]
    return graph
