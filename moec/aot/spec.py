"""What an entry takes and gives, read from its exported program."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind, OutputKind

from moec.aot.errors import AotError
from moec.artifact.manifest import Entry, TensorSpec
from moec.artifact.weights import NAMES

_NO_BOUND = 2**31 - 1


def entry_spec(program: ExportedProgram, dims: Sequence[str] = ()) -> Entry:
    """Inputs, outputs and ranges of an exported program.

    Args:
        program: Its user inputs and outputs must be tensors.
        dims: What the user calls the dimensions that vary, by position, as ``--dynamic`` names them.

    Raises:
        AotError: It takes or gives something besides tensors.
    """
    nodes = {n.name: n for n in program.graph.nodes}
    signature = program.graph_signature
    inputs = [_spec(s.arg, nodes) for s in signature.input_specs if s.kind is InputKind.USER_INPUT]
    given = [s.arg for s in signature.output_specs if s.kind is OutputKind.USER_OUTPUT]
    outputs = [_spec(arg, nodes, f"output{i}") for i, arg in enumerate(given)]
    names = _names(inputs, dims)
    ranges = {}
    for symbol, span in program.range_constraints.items():
        if any(str(symbol) in spec.shape for spec in inputs):
            ranges[names.get(str(symbol), str(symbol))] = (_bound(span.lower), _bound(span.upper))
    return Entry(
        tuple(_renamed(spec, names) for spec in inputs), tuple(_renamed(spec, names) for spec in outputs), ranges
    )


def _names(inputs: Sequence[TensorSpec], dims: Sequence[str]) -> dict[str, str]:
    """The user's names of symbols: where they stand in the first input."""
    if not inputs:
        return {}
    return {s: name for s, name in zip(inputs[0].shape, dims, strict=False) if isinstance(s, str)}


def _bound(value: object) -> int:
    text = str(value)
    return int(text) if text.isdecimal() else _NO_BOUND


def _spec(arg: object, nodes: Mapping[str, torch.fx.Node], name: str = "") -> TensorSpec:
    node = nodes.get(getattr(arg, "name", ""))
    value = node.meta.get("val") if node is not None else None
    if node is None or not isinstance(value, Tensor) or value.dtype not in NAMES:
        what = type(value).__name__ if value is not None else type(arg).__name__
        raise AotError(f"an artifact's inputs and outputs are tensors, and the program has a {what}: {arg}")
    sizes = tuple(s if isinstance(s, int) else str(s.node.expr) for s in value.shape)
    return TensorSpec(name or node.name, NAMES[value.dtype], sizes)


def _renamed(spec: TensorSpec, names: Mapping[str, str]) -> TensorSpec:
    shape = tuple(names.get(s, s) if isinstance(s, str) else s for s in spec.shape)
    return TensorSpec(spec.name, spec.dtype, shape)
