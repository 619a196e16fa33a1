"""Which tensors kernels may read: plain memory at an address, on a device that holds values.

A kernel takes a pointer and strides. A wrapper subclass (a DTensor's shard, a quantised weight) has no memory of its
own, or memory that means something else; a tensor of another layout has no strides; a meta tensor has no values.
"""

from __future__ import annotations

from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx import Node

from moec.slicing import nodes

_NO_DISPATCH = torch.Tensor.__torch_dispatch__
_HINTS = {
    "DTensor": "; fully_shard hands plain weights to a layer, to_local() gives this rank's part",
}


def strangeness(value: Any) -> str:
    """What a recorded tensor is, if it is not plain memory with values in it; else "". Other values are plain."""
    if not isinstance(value, torch.Tensor):
        return ""
    kind = type(value)
    if not isinstance(value, FakeTensor) and kind.__torch_dispatch__ is not _NO_DISPATCH:
        return f"is a {kind.__name__}, which is no plain tensor that kernels can read{_HINTS.get(kind.__name__, '')}"
    if value.layout is not torch.strided:
        return f"has the layout {value.layout}; kernels read strided tensors"
    if value.device.type == "meta":
        return "is on the meta device, which holds no values; load or initialise the model before compiling it"
    return ""


def strange_operand(node: Node) -> str | None:
    """Which operand of a call kernels could not read, and why (``"down_proj is a DTensor, ..."``), or None.

    The name is that of the model's own tensor, where the operand was computed from one.
    """
    for operand in node.all_input_nodes:
        if why := strangeness(nodes.value(operand)):
            origin: Node | None = operand
            while origin is not None:
                operand = origin
                origin = next((n for n in origin.all_input_nodes if strangeness(nodes.value(n)) == why), None)
            return f"{nodes.own_name(operand)} {why}"
    return None


def strange_weight(gemm: Node) -> str | None:
    """As :func:`strange_operand` for an expert GEMM, whose weight may be rows picked from another tensor."""
    for operand in gemm.all_input_nodes:
        picked = nodes.peel(operand, nodes.VIEWS | nodes.TRANSPOSES | nodes.CASTS)
        if isinstance(picked, Node) and nodes.is_gather(picked) and (why := strange_operand(picked)) is not None:
            return why
    return strange_operand(gemm)
