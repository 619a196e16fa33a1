"""``moec::scaled_linear``: a linear layer per expert on rows sorted by expert, weights in f8e4m3fn with scales.

1. It is what transformers' ``FP8Experts`` computes with kernels that are downloaded, written so that it runs anywhere:
   the meaning is :func:`moec.ir.scaled_semantics.scaled_gemm`, one expert at a time.
2. Where moec raises it, it becomes ``moe.grouped_gemm`` and nothing of this file runs.
3. Weights are frozen: the gradient is that of the rows.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from moec.ir.scaled_semantics import misfit, scaled_gemm, scaled_gradient
from moec.runtime.ops import OpError

NAME = "moec::scaled_linear"


def _check(rows: Tensor, weight: Tensor, scales: Tensor, offsets: Tensor) -> None:
    """Refuse what does not fit together.

    Raises:
        OpError: Shapes or types disagree.
    """
    if rows.dim() != 2 or weight.dim() != 3 or offsets.dim() != 1 or offsets.is_floating_point():
        raise OpError(f"{NAME} takes rows [R, K], a weight [E, N, K] and integer offsets [E]")
    if weight.dtype != torch.float8_e4m3fn or scales.dtype != torch.float32:
        raise OpError(f"{NAME} takes a weight in float8_e4m3fn with float32 scales, not {weight.dtype}, {scales.dtype}")
    if weight.shape[2] != rows.shape[1] or weight.shape[0] != offsets.shape[0]:
        raise OpError(f"{NAME}: a weight {list(weight.shape)} does not fit rows {list(rows.shape)} or offsets")
    if reason := misfit(tuple(weight.shape), tuple(scales.shape)):
        raise OpError(f"{NAME}: {reason}")


def _by_expert(
    rows: Tensor, width: int, weight: Tensor, scales: Tensor, offsets: Tensor, gemm: Callable[..., Tensor]
) -> Tensor:
    """``gemm`` of every expert's rows, in [R, width]; rows of no expert are 0."""
    out = rows.new_zeros((rows.shape[0], width))
    start = 0
    for expert, stop in enumerate(offsets.tolist()):
        if stop > start:
            out[start:stop] = gemm(rows[start:stop], weight[expert], scales[expert])
        start = max(start, stop)
    return out


def _forward(rows: Tensor, weight: Tensor, scales: Tensor, offsets: Tensor) -> Tensor:
    _check(rows, weight, scales, offsets)
    return _by_expert(rows, weight.shape[1], weight, scales, offsets, scaled_gemm)


def _forward_fake(rows: Tensor, weight: Tensor, scales: Tensor, offsets: Tensor) -> Tensor:
    _check(rows, weight, scales, offsets)
    return rows.new_empty((rows.shape[0], weight.shape[1]))


def _backward(grad: Tensor, weight: Tensor, scales: Tensor, offsets: Tensor) -> Tensor:
    return _by_expert(grad, weight.shape[2], weight, scales, offsets, scaled_gradient)


def _backward_fake(grad: Tensor, weight: Tensor, scales: Tensor, offsets: Tensor) -> Tensor:
    return grad.new_empty((grad.shape[0], weight.shape[2]))


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, weight, scales, offsets = inputs
    ctx.save_for_backward(weight, scales, offsets)


def _differentiate(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    return torch.ops.moec.scaled_linear_backward.default(grad, *ctx.saved_tensors), None, None, None


torch.library.custom_op(
    NAME, _forward, mutates_args=(), schema="(Tensor rows, Tensor weight, Tensor scales, Tensor offsets) -> Tensor"
)
torch.library.register_fake(NAME, _forward_fake)
torch.library.register_autograd(NAME, _differentiate, setup_context=_save)
torch.library.custom_op(
    f"{NAME}_backward",
    _backward,
    mutates_args=(),
    schema="(Tensor grad, Tensor weight, Tensor scales, Tensor offsets) -> Tensor",
)
torch.library.register_fake(f"{NAME}_backward", _backward_fake)


def scaled_linear(rows: Tensor, weight: Tensor, scales: Tensor, offsets: Tensor) -> Tensor:
    """``rows[r] @ W[e]ᵀ`` with e the expert of row r, both sides in f8e4m3fn.

    Args:
        rows: ``[R, K]``, sorted by expert.
        weight: f8e4m3fn ``[E, N, K]``.
        scales: f32 ``[E, ceil(N / 128), ceil(K / 128)]``.
        offsets: int ``[E]``: where each expert's rows end. Rows past the last one belong to no expert and give 0.

    Returns:
        ``[R, N]``.

    Raises:
        OpError: Shapes or types disagree.
    """
    out: Tensor = torch.ops.moec.scaled_linear.default(rows, weight, scales, offsets)
    return out
