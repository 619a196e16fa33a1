"""Adapters: layers around other layers that add to their results or weights, as those of peft are.

What lies in an adapter is not computed from its own weights alone. Whoever reads weights past a forward, or tells why a
module cannot be captured, asks here first.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch

MERGE = "merge_and_unload() makes it part of the weights"


def is_adapter(module: torch.nn.Module) -> bool:
    """True for a layer around another one."""
    return isinstance(module._modules.get("base_layer"), torch.nn.Module)


def holds_adapter(module: torch.nn.Module) -> bool:
    """True if an adapter lies somewhere in ``module``."""
    return any(is_adapter(part) for part in module.modules())


def describe(module: torch.nn.Module) -> str:
    """``"an adapter (peft's Linear)"``."""
    kind = type(module)
    return f"an adapter ({kind.__module__.partition('.')[0]}'s {kind.__name__})"


def adapter_around(model: torch.nn.Module, name: str) -> tuple[str, torch.nn.Module] | None:
    """Path and module of the outermost adapter right around the module called ``name``, or None."""
    found = None
    while name.endswith(".base_layer"):
        name = name.removesuffix(".base_layer")
        found = name, model.get_submodule(name)
    return found


def adapter_inside(block: str, paths: Iterable[str]) -> str | None:
    """Where an adapter lies in a block, from the module paths that a graph shows: the first one's path, or None.

    Args:
        block: Path of the block's module; "" is unknown and holds nothing.
        paths: Paths of the modules that the graph's calls ran in.
    """
    for path in paths:
        head, adapter, _ = path.partition(".base_layer")
        if block and adapter and head.startswith(f"{block}."):
            return head
    return None
