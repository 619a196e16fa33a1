"""Weights of an exported program in whose place it takes tables of addresses."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch._guards import detect_fake_mode
from torch.export import ExportedProgram


def with_addresses(program: ExportedProgram, addressed: Mapping[str, int]) -> ExportedProgram:
    """Make every weight in ``addressed`` a table i64 of so many addresses.

    Args:
        program: Its nodes take the tables already; it is changed.
        addressed: Names of parameters, and how many addresses stand for each.
    """
    nodes = {n.name: n for n in program.graph.find_nodes(op="placeholder")}
    for spec in program.graph_signature.input_specs:
        if spec.target is None or spec.target not in addressed:
            continue
        table = torch.nn.Parameter(torch.zeros(addressed[spec.target], dtype=torch.int64), requires_grad=False)
        program.state_dict[spec.target] = table
        node = nodes[spec.arg.name]
        mode = detect_fake_mode([node.meta["val"]])
        node.meta["val"] = mode.from_tensor(table, static_shapes=True) if mode is not None else table
    return program
