"""The reference page of backends, made from the registry."""

from __future__ import annotations

import inspect

from moec.backends.base import Backend
from moec.backends.partition import CARRIED_OPS, DEFAULT_ORDER
from moec.backends.registry import ENTRY_POINT_GROUP, all_backends


def reference_markdown() -> str:
    """Every registered backend with its docstring, as Markdown. What works on a machine is ``status``'s to say."""
    backends = all_backends()
    lines = ["## Backends", "", "| backend | gradients | what it is |", "|---|---|---|"]
    lines += [f"| [`{n}`](#{n}) | {'yes' if b.trainable else 'no'} | {_first_line(b)} |" for n, b in backends.items()]
    order, ops = _names(DEFAULT_ORDER), _names(CARRIED_OPS)
    lines += ["", f"Backends are asked in the order given, by default {order}, for every op of these: {ops}."]
    lines += [f"Other packages add backends through the entry point group `{ENTRY_POINT_GROUP}`."]
    for name, backend in backends.items():
        lines += ["", f"### {name}", "", inspect.getdoc(type(backend)) or ""]
    return "\n".join(lines) + "\n"


def _names(names: tuple[str, ...]) -> str:
    return ", ".join(f"`{n}`" for n in names)


def _first_line(backend: Backend) -> str:
    return (inspect.getdoc(type(backend)) or "").split("\n")[0].replace("|", "\\|")
