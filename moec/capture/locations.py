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
    if not stack:
        return ""
    entry = list(stack.values())[-1]
    path = entry[0] if isinstance(entry, (tuple, list)) else str(entry)
    path = _ROOTS.sub("", str(path), count=1)
    return _INDEXED.sub(r".\1", path).strip(".")


def innermost_frame(trace: str) -> str:
    """``file:line: text`` of the last frame of ``trace`` outside torch itself, or ""."""
    lines = trace.splitlines()
    found = ""
    for i, line in enumerate(lines):
        match = _FRAME.match(line)
        if match and not match["file"].startswith(_TORCH):
            text = lines[i + 1].strip() if i + 1 < len(lines) and not _FRAME.match(lines[i + 1]) else ""
            found = f"{match['file']}:{match['line']}: {text}"
    return found


def location_of(meta: dict[str, Any]) -> Location:
    """The location that a node's ``meta`` tells."""
    trace = meta.get("stack_trace") or ""
    return Location(module_path(meta.get("nn_module_stack")), innermost_frame(trace), trace)
