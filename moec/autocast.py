"""The autocast that a call of a torch-level graph runs under: that of the caller, and those that the graph enters."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch.fx import Node

from moec.slicing import nodes


def entered_at(node: Node) -> tuple[tuple[Any, ...], ...]:
    """The arguments of every ``autocast`` that the graph has entered before ``node`` and not left, outermost first."""
    found: dict[Node, tuple[Any, ...]] = {}
    for other in node.graph.nodes:
        if other is node:
            break
        if nodes.name(other) == "_enter_autocast":
            found[other] = other.args
        elif nodes.name(other) == "_exit_autocast" and isinstance(other.args[0], Node):
            found.pop(other.args[0], None)
    return tuple(found.values())


@contextlib.contextmanager
def as_at(node: Node) -> Any:
    """Autocast as it is where ``node`` runs."""
    with contextlib.ExitStack() as stack:
        for arguments in entered_at(node):
            stack.enter_context(torch.autocast(*arguments))
        yield


def is_on(device: str) -> bool:
    """True under autocast for that type of device."""
    return torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
