"""One torch op for every embedded program. Ahead of time nobody calls it: Inductor writes a call of its C function."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from moec.backends.cpu.aot import Embedded
from moec.ir.core import Op
from moec.ir.opdef import op_def, torch_dtype
from moec.ir.ops.moe_regroup import Regroup
from moec.ir.types import TensorType

NAMESPACE = "moec_aot"
_LIB = torch.library.Library(NAMESPACE, "DEF")
_TAGS = (torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides)
_DEFINED: dict[str, torch._ops.OpOverload] = {}


def torch_op(embedded: Embedded, op: Op) -> torch._ops.OpOverload:
    """The op of an embedded program."""
    fakes = {"moe.experts": _experts_fake, "moe.route": _route_fake, "moe.regroup": _regroup_fake}
    return define(embedded.name, embedded.schema, fakes[op.name](op))


def define(name: str, schema: str, fake: Callable[..., Any]) -> torch._ops.OpOverload:
    """The op ``moec_aot::<name>``; it is defined when it is first asked for.

    Args:
        name: It stands for the op's meaning: what was defined under it stays.
        schema: Arguments and results as torch writes them.
        fake: Makes empty results.
    """
    found = _DEFINED.get(name)
    if found is None:
        _LIB.define(name + schema, tags=_TAGS)
        torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=_LIB)
        found = _DEFINED[name] = getattr(getattr(torch.ops, NAMESPACE), name).default
    return found


def _dtype(op: Op, index: int) -> torch.dtype:
    type = op.results[index].type
    assert isinstance(type, TensorType)
    return torch_dtype(type.dtype.name)


def _experts_fake(op: Op) -> Callable[..., Tensor]:
    type = op.result.type
    assert isinstance(type, TensorType)
    width, dtype = int(type.shape[1]), _dtype(op, 0)

    def fake(x: Tensor, ids: Tensor, weights: Tensor, params: list[Tensor]) -> Tensor:
        return x.new_empty((x.shape[0], width), dtype=dtype)

    return fake


def _route_fake(op: Op) -> Callable[..., tuple[Tensor, Tensor]]:
    k, dtypes = op_def(op.name).attr(op, "k"), (_dtype(op, 0), _dtype(op, 1))

    def fake(logits: Tensor, *bias: Any) -> tuple[Tensor, Tensor]:
        shape = (logits.shape[0], k)
        return logits.new_empty(shape, dtype=dtypes[0]), logits.new_empty(shape, dtype=dtypes[1])

    return fake


def _regroup_fake(op: Op) -> Callable[..., tuple[Tensor, ...]]:
    definition = op_def(op.name)
    assert isinstance(definition, Regroup)
    parts, part_sizes = definition.attr(op, "parts"), definition.part_sizes

    def fake(*ids: Tensor) -> tuple[Tensor, ...]:
        given = [t.shape[0] for t in ids]
        there = part_sizes(given[0], parts) if parts else given
        return tuple(ids[0].new_empty((size,), dtype=torch.int64) for size in (*there, *given))

    return fake
