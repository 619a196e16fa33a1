"""Recorded values of emitted nodes: what a node evaluates to under its graph's fake mode."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch._dispatch.python import enable_python_dispatcher
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from moec.emit.errors import EmitError

VALUE_KEYS = ("val", "example_value")
"""ATen graphs record a node's value as ``val``, Dynamo's as ``example_value``."""
_UNKNOWN = object()
_NUMBERS = (int, float, bool, torch.SymInt, torch.SymFloat, torch.SymBool)


def _fake_mode(tree: Any) -> FakeTensorMode | None:
    """The mode of the first fake tensor in ``tree``.

    ``detect_fake_mode`` is no help here: during a backend's call Dynamo announces another mode than the one that the
    graph's values were made under.
    """
    leaves = torch.utils._pytree.tree_leaves(tree)
    return next((v.fake_mode for v in leaves if isinstance(v, FakeTensor)), None)


def mode_of(inputs: Iterable[Any]) -> FakeTensorMode | None:
    """The fake mode under which the values of some nodes were recorded, if there is one."""
    return _fake_mode([[n.meta.get(k) for k in VALUE_KEYS] for n in inputs if isinstance(n, torch.fx.Node)])


def carry_value(node: torch.fx.Node, value_key: str) -> None:
    """Record under ``value_key`` what ``node`` has under the other key, if it has it."""
    for key in VALUE_KEYS:
        if key in node.meta:
            node.meta.setdefault(value_key, node.meta[key])


def record_value(node: torch.fx.Node, value_key: str, mode: FakeTensorMode | None = None) -> None:
    """Give ``node`` (and, first, the nodes it uses) ``meta[value_key]`` where it is missing.

    A value under the other key is taken over; otherwise the call is run on its arguments' fake tensors. Nothing is
    recorded where an argument's value is not known, or for calls with nested graphs. ``mode`` is the fake mode to use
    where the arguments hold no fake tensor (``arange``).

    Raises:
        EmitError: The call fails on its arguments' fake tensors; a pass made an ill-typed op.
    """
    pending, seen = [node], set()
    while pending:
        current = pending[-1]
        carry_value(current, value_key)
        if value_key not in current.meta and current not in seen:
            seen.add(current)
            pending.extend(n for n in current.all_input_nodes if n not in seen)
            continue
        pending.pop()
        if value_key not in current.meta:
            value = _value(current, value_key, mode)
            if value is not _UNKNOWN:
                current.meta[value_key] = value


def _value(node: torch.fx.Node, value_key: str, mode: FakeTensorMode | None) -> Any:
    if node.op != "call_function" or isinstance(node.target, torch._ops.HigherOrderOperator):
        return _UNKNOWN
    if any(value_key not in n.meta for n in node.all_input_nodes):
        return _UNKNOWN
    args, kwargs = torch.fx.node.map_arg((node.args, dict(node.kwargs)), lambda n: n.meta[value_key])
    mode = _fake_mode((args, kwargs)) or mode
    assert callable(node.target)
    if mode is None:
        known = all(isinstance(n.meta[value_key], _NUMBERS) for n in node.all_input_nodes)
        return node.target(*args, **kwargs) if known and node.all_input_nodes else _UNKNOWN
    try:
        with mode, enable_python_dispatcher():  # some C++ kernels take no SymInt; their Python decompositions do
            return node.target(*args, **kwargs)
    except Exception as error:
        raise EmitError(
            f"the emitted call {node.format_node()} does not fit its arguments: {error}",
            hint="a pass made an ill-typed op; verify the graph after every pass",
        ) from error
