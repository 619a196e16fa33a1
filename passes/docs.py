"""The reference page of passes, made from the registry."""

from __future__ import annotations

import dataclasses
import inspect
from typing import Any, get_type_hints

from moec.passes.base import Pass, PassClass
from moec.passes.pipeline_text import format_option_default
from moec.passes.pipelines import PIPELINES
from moec.passes.registry import all_passes


def reference_markdown() -> str:
    """All pipelines and passes with their options and docstrings, as Markdown."""
    passes = all_passes()
    lines = ["## Pipelines", "", "| name | passes |", "|---|---|"]
    lines += [f"| `{name}` | `{text}` |" for name, text in PIPELINES.items()]
    lines += ["", "## Passes", "", "| pass | class | what it does |", "|---|---|---|"]
    lines += [f"| [`{n}`](#{n}) | {_class(c)} | {_cell(c.summary)} |" for n, c in passes.items()]
    for name, cls in passes.items():
        lines += ["", f"### {name}", "", inspect.getdoc(cls) or ""]
        rows = [_option(cls, f) for f in dataclasses.fields(cls)]
        if rows:
            lines += ["", "| option | type | default |", "|---|---|---|", *rows]
    return "\n".join(lines) + "\n"


def _class(cls: type[Pass]) -> str:
    words = cls.pass_class.value
    return words if cls.pass_class is PassClass.BITWISE else f"{words}, {cls.tolerance:g}"


def _option(cls: type[Pass], f: dataclasses.Field[Any]) -> str:
    hint = get_type_hints(cls)[f.name]
    type_text = hint.__name__ if isinstance(hint, type) and not hasattr(hint, "__args__") else str(hint)
    default = format_option_default(f)
    return f"| `{f.name}` | `{_cell(type_text.replace('typing.', ''))}` | {f'`{default}`' if default else 'required'} |"


def _cell(text: str) -> str:
    return text.replace("|", "\\|")
