"""Functional twins of in-place ATen calls: same numbers, same strides, same gradients, new memory."""

from __future__ import annotations

import sys
from functools import cache
from typing import Any

import sympy
import torch
from torch.utils._python_dispatch import _disable_current_modes

from moec.ir.core import Op, Value
from moec.ir.torch_bridge import resolve_target, to_python
from moec.ir.torch_dtypes import FROM_TORCH, TO_TORCH
from moec.ir.types import DType, SymType, TensorType
from moec.passes.calls import bound_args, call_op, is_call

_TRIAL_STEP = 8
"""Symbolic dimensions stand for multiples of this where a call is tried on tensors without data."""


@cache
def functional_twin(target: str) -> str | None:
    """``aten.div.Tensor`` for ``aten.div_.Tensor``; None where no op does the same without writing.

    The twin has the same overload name and the same arguments (names, types, kinds), aliases nothing, and is
    deterministic.
    """
    namespace, name, overload = target.split(".")
    if not name.endswith("_") or name.endswith("__"):
        return None
    packet = getattr(getattr(torch.ops, namespace), name[:-1], None)
    twin = getattr(packet, overload, None) if packet is not None else None
    mine = resolve_target(target)
    if twin is None or torch.Tag.nondeterministic_seeded in twin.tags or torch.Tag.inplace_view in mine.tags:
        return None
    same = [(a.name, str(a.type), a.kwarg_only) for a in mine._schema.arguments] == [
        (a.name, str(a.type), a.kwarg_only) for a in twin._schema.arguments
    ]
    plain = all(a.alias_info is None for a in (*twin._schema.arguments, *twin._schema.returns))
    one_tensor = len(twin._schema.returns) == 1 and str(twin._schema.returns[0].type) == "Tensor"
    return f"{namespace}.{name[:-1]}.{overload}" if same and plain and one_tensor else None


def functional_ops(op: Op) -> list[Op] | str:
    """The ops that stand for the in-place call ``op``, the last one giving the new value, or the reason for none.

    They are in no graph yet. A result that type promotion widens is cast back, as the in-place call does.
    """
    base = op.operands[0].type
    if not isinstance(base, TensorType):
        return f"{op.operands[0]!r} is no tensor"
    if is_call(op, "aten.copy_.default"):
        return _copy(op, base)
    twin = functional_twin(op.attrs["target"])
    if twin is None:
        return "it has no functional twin"
    found = result_dtype(twin, op)
    if isinstance(found, str):
        return found
    kwargs = op.attrs.get("kwargs", {})
    attrs = {"target": twin, "args": op.attrs["args"], **({"kwargs": kwargs} if kwargs else {})}
    made = Op("torch.call", op.operands, [base.with_(dtype=found)], attrs=attrs, groups=op.groups, loc=op.loc)
    if found == base.dtype:
        return [made]
    return [made, call_op("aten.to.dtype", (made.result, base.dtype), {}, [base], loc=op.loc)]


def _copy(op: Op, base: TensorType) -> list[Op] | str:
    """``copy_`` as a cast, an expand and a ``slice_scatter`` over everything.

    ``aten.copy`` has no derivative; ``slice_scatter`` has one, and keeps the strides of what is written to.
    """
    given = bound_args(op)
    source, value = given["src"], given["self"]
    if not isinstance(source, Value) or not isinstance(source.type, TensorType) or source.type.device != base.device:
        return "it copies between devices"
    made: list[Op] = []
    if source.type.dtype != base.dtype:
        types = [source.type.with_(dtype=base.dtype)]
        made.append(call_op("aten.to.dtype", (source, base.dtype), {}, types, loc=op.loc))
        source = made[-1].result
    if not base.rank:
        made.append(call_op("aten.clone.default", (source,), {}, [base], loc=op.loc))
        return made
    if source.type != base:
        made.append(call_op("aten.expand_as.default", (source, value), {}, [base], loc=op.loc))
        source = made[-1].result
    args = (value, source, 0, 0, sys.maxsize)
    return [*made, call_op("aten.slice_scatter.default", args, {}, [base], loc=op.loc)]


def result_dtype(target: str, op: Op) -> DType | str:
    """The element type that ``target`` gives on the arguments of ``op``, by trying it on tensors without data.

    Returns:
        The type, or as text the reason why it is not known or will not do (a functional op without a derivative
        would break training where the in-place one does not).
    """
    sizes: dict[sympy.Basic, int] = {}

    def number(expr: Any) -> Any:
        free = sorted(expr.free_symbols, key=str)
        for s in free:
            sizes.setdefault(s, _TRIAL_STEP * (len(sizes) + 1))
        value = expr.xreplace({s: sympy.Integer(sizes[s]) for s in free})
        return int(value) if value.is_Integer else float(value)

    values: list[Any] = []
    try:
        # A compiler may call this while torch traces, or in inference mode.
        with _disable_current_modes(), torch.inference_mode(False), torch.enable_grad():
            for v in op.operands:
                if isinstance(v.type, TensorType):
                    shape, dtype = [number(d) for d in v.type.shape], TO_TORCH[v.type.dtype.name]
                    values.append(torch.empty(shape, dtype=dtype, device="meta", requires_grad=dtype.is_floating_point))
                elif isinstance(v.type, SymType) and v.type.kind != "bool":
                    values.append(number(v.type.expr))
                else:
                    return f"operand {v!r} is neither a tensor nor a number"
            args, kwargs = to_python(op.attrs["args"], values), to_python(op.attrs.get("kwargs", {}), values)
            out = resolve_target(target)(*args, **kwargs)
    except (RuntimeError, TypeError, ValueError, IndexError) as error:
        return f"its functional twin could not be tried: {str(error).splitlines()[0]}"
    if out.grad_fn is not None and out.grad_fn.name().endswith("NotImplemented"):
        return "its functional twin has no derivative"
    found = FROM_TORCH.get(out.dtype)
    if found is None:
        return f"its functional twin gives {out.dtype}"
    if list(out.shape) != list(values[0].shape):
        return f"its functional twin gives the shape {list(out.shape)}, not {list(values[0].shape)}"
    return found
