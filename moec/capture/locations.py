"""Where a node came from: the module that ran it and the line of the user's model."""

from __future__ import annotations

import os
import re
from typing import Any

import torch

from moec.ir.core import Location

_FRAME = re.compile(r'^\s*File "(?P<file>[^"]+)", line (?P<line>\d+), in .*$')
_TORCH = os.path.dirname(os.path.abspath(torch.__file__)) + os.sep
_ROOTS = re.compile(r"^(L\[['\"]\w+['\"]\]|L__\w+?__|self)\.?")
_INDEXED = re.compile(r"(?:\._modules)?\[['\"]?(\w+)['\"]?\]")


def module_path(stack: Any) -> str:
    """The dotted path of the innermost module in ``nn_module_stack`` (``model.layers.0.mlp``), or "".

    Dynamo writes ``L['self'].model.layers.0`` or ``L['self']._modules['model']``, export ``model.layers.0``.
    """
    entry = _innermost(stack)
    if not entry or str(entry[0]).startswith("_empty_nn_module_stack"):  # export's mark for code outside any module
        return ""
    # A layer that runs as a compiled region is called through its bound method.
    path = _ROOTS.sub("", str(entry[0]), count=1).replace(".forward.__self__", "")
    return _INDEXED.sub(r".\1", path).replace("__dict__._modules.", "").strip(".")


def innermost_frame(trace: str, prefer: str = "") -> str:
    """``file:line: text`` of the last frame in a file that ends in ``prefer``, else outside torch, or ""."""
    lines = trace.splitlines()
    outside = preferred = ""
    for i, line in enumerate(lines):
        match = _FRAME.match(line)
        if match and not match["file"].startswith(_TORCH):
            text = lines[i + 1].strip() if i + 1 < len(lines) and not _FRAME.match(lines[i + 1]) else ""
            outside = f"{match['file']}:{match['line']}: {text}"
            if prefer and match["file"].endswith(prefer):
                preferred = outside
    return preferred or outside


def location_of(meta: dict[str, Any]) -> Location:
    """The location that a node's ``meta`` tells.

    The source line is the last one in the file that defines the node's module: model code rather than the helper
    libraries that it calls.
    """
    trace = meta.get("stack_trace") or ""
    stack = meta.get("nn_module_stack")
    return Location(module_path(stack), innermost_frame(trace, _defining_file(stack)), trace)


def _innermost(stack: Any) -> tuple[Any, ...]:
    entry = list(stack.values())[-1] if stack else ()
    return tuple(entry) if isinstance(entry, (tuple, list)) else (entry,)


def _defining_file(stack: Any) -> str:
    """The end of the path of the file that defines the innermost module's class, or ""."""
    entry = _innermost(stack)
    if len(entry) < 2:
        return ""
    cls = entry[1]
    module = cls.__module__ if isinstance(cls, type) else str(cls).rpartition(".")[0]
    return "" if not module or module.startswith("torch.") else os.sep + module.replace(".", os.sep) + ".py"
