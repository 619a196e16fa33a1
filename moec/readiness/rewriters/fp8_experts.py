"""Experts in fp8 (transformers' ``FP8Experts``): DeepSeek-V3, Qwen3-FP8 and every checkpoint quantized in that form.

Their own forward loops over the experts hit, or calls kernels that are downloaded for one kind of GPU.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor

from moec.ir.scaled_semantics import SCALED, misfit
from moec.readiness.rewriters.canonical import inverse, sort_slots
from moec.readiness.rewriters.known import Rewriter, fingerprint
from moec.runtime.scaled_linear import scaled_linear

_FORWARD = "6ea25f32bd9d9c14"
"""Fingerprint of the class's own forward, below the decorators that look an implementation up."""


def forward(self: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """x ``[T, H]``, ids and weights ``[T, k]`` to ``[T, H]``."""
    tokens, top_k = top_k_index.shape
    order, offsets = sort_slots(top_k_index.reshape(-1), self.num_experts)
    up, down = _weights(self)
    rows = scaled_linear(hidden_states[order // top_k], *up, offsets)
    rows = self._apply_gate(rows) if self.has_gate else self.act_fn(rows)
    rows = scaled_linear(rows, *down, offsets)
    weighted = rows * top_k_weights.to(rows.dtype).reshape(-1)[order].unsqueeze(-1)
    return weighted[inverse(order)].view(tokens, top_k, rows.shape[-1]).sum(dim=1).to(hidden_states.dtype)


def _weights(module: Any) -> list[tuple[Tensor, Tensor]]:
    """``(values, scales)`` of up and down. Scales that are powers of two are one byte each, and widened here."""
    names = ("gate_up_proj" if module.has_gate else "up_proj", "down_proj")
    return [(getattr(module, name), getattr(module, f"{name}_scale_inv").float()) for name in names]


def _check(module: Any) -> str | None:
    own = inspect.unwrap(type(module).forward)
    if fingerprint(own) != _FORWARD:
        return "FP8Experts.forward is not written as moec knows it: another release of transformers, or a patch"
    if module.activation_scheme != "dynamic":
        return f"rows are quantized with scales of the checkpoint (activation_scheme={module.activation_scheme!r})"
    if module.block_size is None or tuple(module.block_size) != (SCALED, SCALED):
        return f"weights have a scale for a block of {module.block_size}, kernels take blocks of {SCALED} x {SCALED}"
    if getattr(module, "_is_expert_parallel", False):
        return "transformers has spread its experts over ranks"
    for values, scales in _weights(module):
        if values.dtype != torch.float8_e4m3fn:
            return f"weights are {str(values.dtype).removeprefix('torch.')}, kernels take float8_e4m3fn"
        if reason := misfit(tuple(values.shape), tuple(scales.shape)):
            return reason
    return None


REWRITER = Rewriter(
    target="transformers.integrations.finegrained_fp8.FP8Experts",
    how="grouped GEMMs in fp8 on its stacked weights",
    methods={"forward": forward},
    sources={"FP8Experts._apply_gate": "5d29617e6adbed20"},
    check=_check,
)
