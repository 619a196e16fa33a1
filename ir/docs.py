"""The reference of all ops, generated from their definitions, so that it cannot drift from them."""

from __future__ import annotations

import inspect

from moec.ir.opdef import AttrDef, OpDef, all_op_defs
from moec.ir.printer import print_attr

_ARITY = {"one": "one", "optional": "at most one", "many": "any number"}


def reference_markdown() -> str:
    """A Markdown page: one chapter per dialect, one section per registered op."""
    by_dialect: dict[str, list[OpDef]] = {}
    for name, definition in all_op_defs().items():
        by_dialect.setdefault(name.partition(".")[0] if "." in name else "builtin", []).append(definition)
    parts = ["# Reference of the IR's operations", ""]
    for dialect, definitions in sorted(by_dialect.items()):
        parts += [f"## {dialect}", "", "| op | results | |", "|---|---|---|"]
        parts += [f"| [`{d.name}`](#{_anchor(d.name)}) | {_results(d)} | {_cell(_doc(d)[0])} |" for d in definitions]
        parts.append("")
        for definition in definitions:
            parts += _section(definition)
    return "\n".join(parts)


def _section(definition: OpDef) -> list[str]:
    head, body = _doc(definition)
    lines = [f"### {definition.name}", "", head, ""]
    if body:
        lines += [body, ""]
    if not definition.pure:
        lines += ["Has an effect: it keeps its place, and is neither removed nor duplicated.", ""]
    if definition.operands:
        lines += ["| operand | how many | |", "|---|---|---|"]
        lines += [f"| `{o.name}` | {_ARITY[o.arity]} | {_cell(o.doc)} |" for o in definition.operands]
        lines.append("")
    if definition.attrs:
        lines += ["| attribute | kind | default | |", "|---|---|---|---|"]
        lines += [f"| `{a.name}` | {_kind(a)} | {_default(a)} | {_cell(a.doc)} |" for a in definition.attrs]
        lines.append("")
    if definition.regions:
        lines += ["| nested graph | |", "|---|---|"]
        lines += [f"| `{r.name}`{' (optional)' if r.optional else ''} | {_cell(r.doc)} |" for r in definition.regions]
        lines.append("")
    lines += [f"Results: {_results(definition)}.", ""]
    return lines


def _doc(definition: OpDef) -> tuple[str, str]:
    """The definition's docstring, cut into its first paragraph and the rest, in Markdown."""
    text = inspect.cleandoc(type(definition).__doc__ or "").replace("``", "`")
    head, _, body = text.partition("\n\n")
    return head, body


def _kind(spec: AttrDef) -> str:
    return _cell(" or ".join(f'`"{c}"`' for c in spec.choices) if spec.choices else spec.kind)


def _default(spec: AttrDef) -> str:
    return "required" if spec.required else f"`{_cell(print_attr(spec.default))}`"


def _results(definition: OpDef) -> str:
    if definition.variadic_results:
        return "any number"
    return ", ".join(f"`{r}`" for r in definition.results) or "none"


def _cell(text: str) -> str:
    return text.replace("\n", " ").replace("|", "\\|")


def _anchor(name: str) -> str:
    return name.replace(".", "").lower()
