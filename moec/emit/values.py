"""Recorded values of emitted nodes: what a node evaluates to under its graph's fake mode."""

from __future__ import annotations

from typing import Any

import torch
from torch._guards import detect_fake_mode

from moec.emit.errors import EmitError

VALUE_KEYS = ("val", "example_value")
"""ATen graphs record a node's value as ``val``, Dynamo's as ``example_value``."""
_UNKNOWN = object()


def record_value(node: torch.fx.Node, value_key: str) -> None:
    """Give ``node`` (and, first, the nodes it uses) ``meta[value_key]`` where it is missing.

    A value under the other key is taken over; otherwise the call is run on its arguments' fake tensors. Nothing is
    recorded where an argument's value is not known, or for calls with nested graphs.

    Raises:
        EmitError: The call fails on its arguments' fake tensors; a pass made an ill-typed op.
    """
    pending = [node]
    while pending:
        current = pending[-1]
        missing = [n for n in current.all_input_nodes if value_key not in n.meta and not n.meta.get("moec_no_value")]
        if value_key not in current.meta and missing:
            pending.extend(missing)
            continue
        pending.pop()
        if value_key not in current.meta:
            value = _value(current, value_key)
            if value is _UNKNOWN:
                current.meta["moec_no_value"] = True
            else:
                current.meta[value_key] = value
    node.meta.pop("moec_no_value", None)


def _value(node: torch.fx.Node, value_key: str) -> Any:
    for key in VALUE_KEYS:
        if key in node.meta:
            return node.meta[key]
    if node.op != "call_function" or isinstance(node.target, torch._ops.HigherOrderOperator):
        return _UNKNOWN
    if any(value_key not in n.meta for n in node.all_input_nodes):
        return _UNKNOWN
    args, kwargs = torch.fx.node.map_arg((node.args, dict(node.kwargs)), lambda n: n.meta[value_key])
    mode = detect_fake_mode([n.meta[value_key] for n in node.all_input_nodes])
    assert callable(node.target)
    if mode is None:
        numbers = (int, float, bool, torch.SymInt, torch.SymFloat, torch.SymBool)
        known = all(isinstance(n.meta[value_key], numbers) for n in node.all_input_nodes)
        return node.target(*args, **kwargs) if known and node.all_input_nodes else _UNKNOWN
    try:
        with mode:
            return node.target(*args, **kwargs)
    except Exception as error:
        raise EmitError(
            f"the emitted call {node.format_node()} does not fit its arguments: {error}",
            hint="a pass made an ill-typed op; verify the graph after every pass",
        ) from error
