"""Nested graphs as Python functions: the interpreter's loop unrolled once, at load time.

A region runs for every group of experts, so looking ops up and filling templates each time would cost more than the
GEMMs of a small layer. The generated function calls the torch ops directly and drops each value after its last use.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from moec.backends.reference.interpreter import run_graph
from moec.ir.attributes import ListAttr, Operand
from moec.ir.core import Graph, Op, Value
from moec.ir.opdef import op_def
from moec.ir.torch_bridge import resolve_target, to_python

RegionFn = Callable[..., list[Tensor]]


def compile_region(graph: Graph) -> RegionFn:
    """A function of the graph's arguments that returns the list of its outputs."""
    space: dict[str, Any] = {"run_graph": run_graph}
    names: dict[Value, str] = {}
    last_use: dict[Value, int] = {}
    for position, op in enumerate(graph.ops):
        for value in op.operands:
            last_use[value] = position

    def name(value: Value) -> str:
        return names.setdefault(value, f"v{len(names)}")

    def constant(value: Any) -> str:
        if value is None or isinstance(value, (bool, int)):
            return repr(value)
        key = f"c{len(space)}"
        space[key] = value
        return key

    lines = [f"def region({', '.join(name(a) for a in graph.args)}):"]
    for position, op in enumerate(graph.ops):
        operands = [name(v) for v in op.operands]
        if op is graph.terminator:
            lines.append(f"    return [{', '.join(operands)}]")
            break
        if op.name == "torch.call" and not op.regions:
            call = _call(op, operands, constant)
            single = len(op.results) == 1 and _returns_one(op)
        else:
            evaluate, this = constant(op_def(op.name).evaluate), constant(op)
            call, single = f"{evaluate}({this}, [{', '.join(operands)}], run_graph)", False
        results = ", ".join(name(r) for r in op.results)
        lines.append(f"    {call}" if not results else f"    {results if single else f'[{results}]'} = {call}")
        gone = {v for v in op.operands if last_use[v] == position} | {r for r in op.results if r not in last_use}
        if gone:
            lines.append(f"    del {', '.join(sorted(name(v) for v in gone))}")
    exec("\n".join(lines), space)  # the text holds generated names and numbers alone
    fn: RegionFn = space["region"]
    return fn


def _returns_one(op: Op) -> bool:
    schema = getattr(resolve_target(op.attrs["target"]), "_schema", None)
    if schema is None:
        return True
    return len(schema.returns) == 1 and not isinstance(schema.returns[0].type, torch.ListType)


def _call(op: Op, operands: list[str], constant: Callable[[Any], str]) -> str:
    def text(tree: Any) -> str:
        if isinstance(tree, Operand):
            return operands[tree.index]
        if isinstance(tree, ListAttr):
            return f"[{', '.join(map(text, tree.items))}]"
        if isinstance(tree, tuple):
            return f"({''.join(text(v) + ', ' for v in tree)})"
        return constant(to_python(tree, ()))

    parts = [text(a) for a in op.attrs.get("args", ())]
    parts += [f"{key}={text(value)}" for key, value in op.attrs.get("kwargs", {}).items()]
    return f"{constant(resolve_target(op.attrs['target']))}({', '.join(parts)})"
