"""Short texts about the moe ops of a block: what the columns of ``explain`` show."""

from __future__ import annotations

from typing import Any

from moec.backends.partition import BEGIN, SPREAD, layer_inside
from moec.ir.core import Graph, Op, Value
from moec.ir.opdef import op_def
from moec.ir.types import TensorType
from moec.passes.matching import VIEWS, arg, function
from moec.report import BlockReport


def _attr(op: Op, name: str) -> Any:
    return op_def(op.name).attr(op, name)


_INFIX = {"mul": "*", "add": "+", "sub": "-", "div": "/"}


def route_text(op: Op) -> str:
    """``"softmax top-8 renorm"``, ``"sigmoid+bias 4/8 groups top-8 renorm x2.5"``, or ``"custom top-2"``."""
    if op.regions:
        return f"custom top-{_attr(op, 'k')} (region)"
    score = _attr(op, "scoring") + ("+bias" if op.operand("bias") is not None else "")
    parts = [score]
    if _attr(op, "per_group"):
        parts.append(f"top-{_attr(op, 'per_group')} of each of {_attr(op, 'groups')} groups")
    else:
        if _attr(op, "groups"):
            parts.append(f"{_attr(op, 'top_groups')}/{_attr(op, 'groups')} groups")
        parts.append(f"top-{_attr(op, 'k')}")
    if _attr(op, "order") == "topk_first":
        parts = [f"top-{_attr(op, 'k')}", "then", score]
    if _attr(op, "renormalize"):
        parts.append("renorm")
    if _attr(op, "scale") != 1.0:
        parts.append(f"x{_attr(op, 'scale'):g}")
    return " ".join(parts)


def is_shared(op: Op) -> bool:
    """True for a shared expert: one expert, and ids that are zero whatever the tokens are."""
    return op.name == "moe.experts" and _attr(op, "experts") == 1 and function(op.operands[1].op) == "zeros_like"


def shared_text(op: Op) -> str:
    """What stands in a router's place for a shared expert."""
    return "every token" if function(op.operands[2].op) == "ones_like" else "every token, weighted"


def router_of(op: Op) -> Op | None:
    """The ``moe.route`` that chooses the experts of a ``moe.experts``, whatever becomes of the ids on their way."""
    seen: set[Value] = set()
    stack = [op.operands[1]]
    while stack:
        value = stack.pop()
        if value in seen or value.op is None or not isinstance(value.type, TensorType) or value.type.dtype.is_float:
            continue
        seen.add(value)
        if value.op.name == "moe.route":
            return value.op
        if value.op.dialect == "torch":
            stack += value.op.operands
    return None


def region_text(graph: Graph, names: tuple[str, ...], limit: int = 60) -> str:
    """A region as a formula over its arguments (``silu(g)*u``), cut at ``limit`` characters."""
    text: dict[object, str] = {
        a: names[i] if i < len(names) else f"c{i - len(names)}" for i, a in enumerate(graph.args)
    }
    for op in graph.ops[:-1]:
        name = function(op)
        shown = [text.get(v, "?") for v in op.operands]
        if name in ("to", "_to_copy", "alias", "contiguous", "clone"):
            formula = shown[0]
        elif name in _INFIX and len(op.attrs.get("args", ())) >= 2:
            left, right = (text.get(a, str(a)) for a in (arg(op, 0), arg(op, 1)))
            formula = f"{left}{_INFIX[name]}{right}" if name == "mul" else f"({left}{_INFIX[name]}{right})"
        else:
            formula = f"{name}({', '.join(shown)})"
        for result in op.results:
            text[result] = formula
    out = ", ".join(text.get(v, "?") for v in graph.outputs)
    return out if len(out) <= limit else out[: limit - 1] + "…"


def fill_experts(report: BlockReport, op: Op, count: int | None = None) -> None:
    """Sizes and text of a ``moe.experts`` op, and what stands between it and its router.

    Args:
        report: Of the block.
        op: The op, or a layer that is spread over ranks.
        count: Number of experts, where the op is a chunk of a layer and has fewer.
    """
    if op.name in (SPREAD, BEGIN):
        own = op.group("down")[0].type
        assert isinstance(own, TensorType)
        fill_experts(report, layer_inside(op), int(own.shape[0]))
        report.num_experts, ranks = _attr(op, "experts"), len(_attr(op, "sizes"))
        ids = op.operands[1].type
        assert isinstance(ids, TensorType)
        report.top_k = int(ids.shape[1]) if ids.shape[1].is_Integer else None
        report.experts = f"{report.num_experts} on {ranks} ranks ({_attr(op, 'group')}), here {report.experts}"
        return
    between = [v.op for v in op.operands[1:3] if v.op is not None and v.op.dialect == "torch"]
    if report.router is not None and any(function(o) not in VIEWS for o in between):
        report.router += ", then torch calls"
    x, down, ids = op.operands[0].type, op.group("down")[0].type, op.operands[1].type
    assert isinstance(x, TensorType) and isinstance(down, TensorType) and isinstance(ids, TensorType)
    report.num_experts = _attr(op, "experts") if count is None else count
    report.top_k = int(ids.shape[1]) if ids.shape[1].is_Integer else None
    report.hidden = int(x.shape[1]) if x.shape[1].is_Integer else None
    inner = down.shape[-1] if _attr(op, "down_form") == "nk" else down.shape[-2]
    report.intermediate = int(inner) if inner.is_Integer else None
    report.dtype = x.dtype.name
    up = op.group("up")[0].type
    assert isinstance(up, TensorType)
    outputs = up.shape[-2] if _attr(op, "up_form") == "nk" else up.shape[-1]
    if outputs.is_Integer and report.intermediate:
        apart = _attr(op, "layout") == "separate"
        report.projections = 2 if apart else int(outputs) // report.intermediate
    names = ("x",) if _attr(op, "layout") in ("single", "rows") else ("g", "u")
    extras = [w for w, there in (("bias", op.group("up_bias")), ("post-norm", len(op.regions) > 1)) if there]
    if _attr(op, "layout") == "interleaved":
        extras.append("interleaved")
    formula = region_text(op.regions[0], names)
    report.experts = ", ".join([f"{report.num_experts} x {report.intermediate}", formula, *extras])
