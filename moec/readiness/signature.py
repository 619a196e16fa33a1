"""When are two layers alike, so that what was compiled for one may run for the other?

Dynamo checks much of that itself when it reuses a region: module classes, shapes, types, constants that it read. It
does not check forward hooks (a hook on one layer was silently dropped when the region of another was reused), and it
finds differences only while tracing. So layers are compared here first, by everything that a forward can depend on.
"""

from __future__ import annotations

import enum
import types
from collections.abc import Iterator
from typing import Any

import torch

# torch's own bookkeeping, compared by other means or without influence on what is computed
_BOOKKEEPING = frozenset(vars(torch.nn.Module())) - {"training"}
# where the layer stands: Dynamo guards it where it is read, and caches are addressed by it outside the region
# (``target_name`` is where an adapter of peft stands)
_POSITION = frozenset({"layer_idx", "layer_id", "layer_index", "layer_number", "target_name"})
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
# transformers records router logits and hidden states with these; they are on every layer alike and trace correctly
_HARMLESS_HOOKS = "transformers.utils.output_capturing"
_REWRITERS = "moec.readiness.rewriters."
_MAX_DEPTH = 4

Signature = tuple[Any, ...]


def signature(layer: torch.nn.Module, own: frozenset[str] = frozenset()) -> Signature:
    """A value that is equal for two layers exactly where they compute the same function of inputs and weights.

    Args:
        layer: The layer, with everything below it.
        own: Names of instance attributes to leave out of the comparison.

    Returns:
        A nested tuple of plain values.
    """
    seen: dict[int, Any] = {}
    parts: list[Any] = []
    for name, module in layer.named_modules():
        state = tuple(
            (key, _describe(value, seen, _MAX_DEPTH))
            for key, value in sorted(vars(module).items())
            if key not in _BOOKKEEPING and key not in _POSITION and key not in own
        )
        parts.append((name, type(module), state))
    tensors = [*layer.named_parameters(remove_duplicate=False), *layer.named_buffers(remove_duplicate=False)]
    parts.extend((name, *_tensor(tensor)) for name, tensor in tensors)
    return tuple(parts)


def obstacle(layer: torch.nn.Module, own: frozenset[str] = frozenset()) -> str | None:
    """Why the layer cannot be a region at all, or None.

    The layer's own hooks run outside its forward and are no obstacle; hooks and replaced forwards below it are.
    """
    for name, module in layer.named_modules():
        where = name or "the layer itself"
        if "forward" in vars(module) and "forward" not in own and not _is_rewriters(vars(module)["forward"]):
            return f"the forward of {where} was replaced on the instance"
        if module is layer:
            continue
        for kind in hooks(module):
            return f"{where} has a hook ({kind})"
    return None


def _is_rewriters(method: Any) -> bool:
    """True for a method that a rewriter put there: of modules that are alike, it makes modules that are alike."""
    return isinstance(method, types.MethodType) and method.__func__.__module__.startswith(_REWRITERS)


def hooks(module: torch.nn.Module) -> Iterator[str]:
    """What kind of hook (``"forward pre hook"``) the module has, for every one that is not known to be harmless."""
    for kind in _HOOKS:
        for hook in getattr(module, kind).values():
            if getattr(hook, "__module__", None) != _HARMLESS_HOOKS:
                yield kind.strip("_").removesuffix("s").replace("_", " ")


def _tensor(tensor: torch.Tensor) -> Signature:
    return type(tensor), tuple(tensor.shape), tensor.stride(), tensor.dtype, tensor.device, tensor.requires_grad


def _describe(value: Any, seen: dict[int, Any], depth: int) -> Any:
    """A value that compares like the object does, whatever the object is; objects of no known kind by identity."""
    if value is None or isinstance(value, bool | int | float | complex | str | bytes | enum.Enum):
        return type(value).__name__, value
    if isinstance(value, torch.dtype | torch.device | torch.Size | type):
        return value
    if isinstance(value, torch.Tensor):
        return _tensor(value)
    if isinstance(value, torch.nn.Module):
        return "module", type(value)  # listed by itself where it belongs to the layer
    if isinstance(value, types.FunctionType | types.BuiltinFunctionType):
        return "function", id(value)
    if isinstance(value, types.MethodType) and isinstance(value.__self__, torch.nn.Module):
        return "method", id(value.__func__)
    if id(value) in seen:
        return seen[id(value)]
    seen[id(value)] = ("object", type(value))  # what a cycle sees
    result: Any
    if depth == 0:
        result = "object", type(value), id(value)
    elif isinstance(value, list | tuple):
        result = type(value), tuple(_describe(item, seen, depth - 1) for item in value)
    elif isinstance(value, set | frozenset):
        result = type(value), frozenset(_describe(item, seen, depth - 1) for item in value)
    elif isinstance(value, dict):
        result = (
            type(value),
            tuple((str(k), _describe(v, seen, depth - 1)) for k, v in value.items() if k not in _POSITION),
        )
    elif hasattr(value, "__dict__"):
        result = type(value), tuple((k, _describe(v, seen, depth - 1)) for k, v in sorted(vars(value).items()))
    else:
        result = "object", type(value), id(value)
    seen[id(value)] = result
    return result
