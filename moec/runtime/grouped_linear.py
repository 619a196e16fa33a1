"""``moec::grouped_linear``: a linear layer per expert on rows sorted by expert, with weights as the model holds them.

1. Weights are one stacked tensor or one matrix per expert; either is read where it lies, whatever its type.
2. It stands alone: eager PyTorch runs it with one GEMM per expert that has rows, forward and backward. Where moec
   raises it, it becomes ``moe.grouped_gemm`` and nothing of this file runs.
3. Gradients of all wanted weights are dense; an expert without rows has a gradient of zeros.
4. Under autocast rows, weights and biases are cast, as autocast casts those of ``linear``.

torch's own ``_grouped_mm`` knows stacked weights alone, and under ``torch.compile`` bfloat16 alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from moec.runtime.ops import OpError

NAME = "moec::grouped_linear"


def _stacked(weights: Sequence[Tensor]) -> bool:
    return len(weights) == 1 and weights[0].dim() == 3


def _segments(offsets: Tensor) -> Iterator[tuple[int, int, int]]:
    """``(expert, first row, past last row)`` of every expert with rows. One synchronisation with the device."""
    start = 0
    for expert, stop in enumerate(offsets.tolist()):
        if stop > start:
            yield expert, start, stop
            start = stop


def _matrix(weights: Sequence[Tensor], expert: int, inputs_first: bool) -> Tensor:
    """``[K, N]`` of one expert."""
    w = weights[0][expert] if _stacked(weights) else weights[expert]
    return w if inputs_first else w.t()


def _vector(bias: Sequence[Tensor], expert: int) -> Tensor:
    return bias[0][expert] if len(bias) == 1 and bias[0].dim() == 2 else bias[expert]


def _width(weights: Sequence[Tensor], inputs_first: bool) -> int:
    return weights[0].shape[-1 if inputs_first else -2]


def _check(
    rows: Tensor, weights: Sequence[Tensor], bias: Sequence[Tensor], offsets: Tensor, inputs_first: bool
) -> None:
    """Refuse what does not fit together.

    Raises:
        OpError: Shapes, types or counts disagree.
    """
    if rows.dim() != 2 or offsets.dim() != 1 or offsets.is_floating_point() or not weights:
        raise OpError(f"{NAME} takes rows [R, K], weights and integer offsets [E]")
    experts = weights[0].shape[0] if _stacked(weights) else len(weights)
    dims = 3 if _stacked(weights) else 2
    at = -2 if inputs_first else -1
    for w in weights:
        if (
            w.dim() != dims
            or w.shape[at] != rows.shape[1]
            or _width([w], inputs_first) != _width(weights, inputs_first)
        ):
            raise OpError(f"{NAME}: a weight {list(w.shape)} does not fit rows {list(rows.shape)} or the other weights")
    if offsets.shape[0] != experts:
        raise OpError(f"{NAME}: {offsets.shape[0]} offsets for {experts} experts")
    if bias and (len(bias) != len(weights) or any(b.dim() != dims - 1 for b in bias)):
        raise OpError(f"{NAME}: {len(bias)} biases do not lie as {len(weights)} weights do")
    types = {t.dtype for t in (rows, *weights, *bias)}
    if len(types) > 1:
        names = ", ".join(sorted(str(t).removeprefix("torch.") for t in types))
        raise OpError(f"{NAME}: rows, weights and biases have the types {names}", hint="use one type, or autocast")


def _forward(
    rows: Tensor, weights: Sequence[Tensor], bias: Sequence[Tensor], offsets: Tensor, inputs_first: bool
) -> Tensor:
    _check(rows, weights, bias, offsets, inputs_first)
    out = rows.new_empty((rows.shape[0], _width(weights, inputs_first)))
    end = 0
    for expert, start, stop in _segments(offsets):
        matrix = _matrix(weights, expert, inputs_first)
        if bias:
            torch.addmm(_vector(bias, expert), rows[start:stop], matrix, out=out[start:stop])
        else:
            torch.mm(rows[start:stop], matrix, out=out[start:stop])
        end = stop
    out[end:].zero_()  # rows of no expert
    return out


def _forward_fake(
    rows: Tensor, weights: Sequence[Tensor], bias: Sequence[Tensor], offsets: Tensor, inputs_first: bool
) -> Tensor:
    _check(rows, weights, bias, offsets, inputs_first)
    return rows.new_empty((rows.shape[0], _width(weights, inputs_first)))


def _backward(
    grad: Tensor,
    rows: Tensor,
    weights: Sequence[Tensor],
    offsets: Tensor,
    inputs_first: bool,
    needs: Sequence[bool],
) -> list[Tensor]:
    """Gradients of rows, weights and biases in this order, those asked for in ``needs``."""
    need_rows, need_weights, need_bias = needs
    d_rows = rows.new_zeros(rows.shape) if need_rows else None
    d_weights = [torch.zeros_like(w) for w in weights] if need_weights else []
    d_bias = _like_bias(weights, inputs_first) if need_bias else []
    for expert, start, stop in _segments(offsets):
        g, r = grad[start:stop], rows[start:stop]
        if d_rows is not None:
            torch.mm(g, _matrix(weights, expert, inputs_first).t(), out=d_rows[start:stop])
        if need_weights:
            left, right = (r, g) if inputs_first else (g, r)
            torch.mm(left.t(), right, out=d_weights[0][expert] if _stacked(d_weights) else d_weights[expert])
        if need_bias:
            _vector(d_bias, expert).copy_(g.sum(0))
    return [*([] if d_rows is None else [d_rows]), *d_weights, *d_bias]


def _like_bias(weights: Sequence[Tensor], inputs_first: bool) -> list[Tensor]:
    """Zeros that lie as the biases of ``weights`` do."""
    width = _width(weights, inputs_first)
    if _stacked(weights):
        return [weights[0].new_zeros((weights[0].shape[0], width))]
    return [w.new_zeros(width) for w in weights]


def _backward_fake(
    grad: Tensor,
    rows: Tensor,
    weights: Sequence[Tensor],
    offsets: Tensor,
    inputs_first: bool,
    needs: Sequence[bool],
) -> list[Tensor]:
    need_rows, need_weights, need_bias = needs
    return [
        *([rows.new_empty(rows.shape)] if need_rows else []),
        *([torch.empty_like(w) for w in weights] if need_weights else []),
        *(_like_bias(weights, inputs_first) if need_bias else []),
    ]


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    rows, weights, bias, offsets, inputs_first = inputs
    ctx.inputs_first, ctx.experts, ctx.biases = inputs_first, len(weights), len(bias)
    ctx.save_for_backward(rows, offsets, *weights)


def _differentiate(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    rows, offsets, *weights = ctx.saved_tensors
    needs = [any(n) if isinstance(n, list | tuple) else n for n in ctx.needs_input_grad[:3]]
    call = torch.ops.moec.grouped_linear_backward.default
    found = iter(call(grad.contiguous(), rows, weights, offsets, ctx.inputs_first, needs))
    d_rows = next(found) if needs[0] else None
    d_weights = [next(found) if needs[1] else None for _ in range(ctx.experts)]
    d_bias = [next(found) if needs[2] else None for _ in range(ctx.biases)]
    return d_rows, d_weights, d_bias, None, None


def _refuse_second_derivative(ctx: Any, *grads: Any) -> Any:
    raise OpError(
        f"gradients of gradients through {NAME} are not available",
        hint="undo moec.prepare (report.undo()) where a second derivative is needed",
    )


torch.library.custom_op(
    NAME,
    _forward,
    mutates_args=(),
    schema="(Tensor rows, Tensor[] weights, Tensor[] bias, Tensor offsets, bool inputs_first) -> Tensor",
)
torch.library.register_fake(NAME, _forward_fake)
torch.library.register_autograd(NAME, _differentiate, setup_context=_save)
torch.library.custom_op(
    f"{NAME}_backward",
    _backward,
    mutates_args=(),
    schema="(Tensor grad, Tensor rows, Tensor[] weights, Tensor offsets, bool inputs_first, bool[] needs) -> Tensor[]",
)
torch.library.register_fake(f"{NAME}_backward", _backward_fake)
torch.library.register_autograd(f"{NAME}_backward", _refuse_second_derivative)


def _autocast(key: str) -> Any:
    """The kernel for one device's autocast: casts, then calls the op below autocast (as torch's own kernels do)."""
    below = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, key))
    device = key.removeprefix("Autocast").lower()

    def kernel(rows: Tensor, weights: list[Tensor], bias: list[Tensor], offsets: Tensor, inputs_first: bool) -> Tensor:
        dtype = torch.get_autocast_dtype(device)

        def cast(t: Tensor) -> Tensor:
            return t.to(dtype) if t.is_floating_point() and t.dtype != torch.float64 else t

        with torch._C._ExcludeDispatchKeyGuard(below):
            call = torch.ops.moec.grouped_linear.default
            return call(cast(rows), [cast(w) for w in weights], [cast(b) for b in bias], offsets, inputs_first)

    return kernel


_LIB = torch.library.Library("moec", "FRAGMENT")
for _key in ("AutocastCPU", "AutocastCUDA"):
    _LIB.impl("grouped_linear", _autocast(_key), _key)


def grouped_linear(
    rows: Tensor,
    weights: Sequence[Tensor],
    offsets: Tensor,
    *,
    bias: Sequence[Tensor] = (),
    inputs_first: bool = False,
) -> Tensor:
    """``rows[r] @ W[e]ᵀ (+ b[e])`` with e the expert of row r.

    Args:
        rows: ``[R, K]``, sorted by expert.
        weights: One tensor ``[E, N, K]``, or E matrices ``[N, K]``; all of the rows' type.
        offsets: int ``[E]``: where each expert's rows end. Rows past the last one belong to no expert and give 0.
        bias: One tensor ``[E, N]`` or E vectors ``[N]``, as the weights lie; or none.
        inputs_first: Weights are ``[E, K, N]`` or ``[K, N]``: ``rows[r] @ W[e]``.

    Returns:
        ``[R, N]``.

    Raises:
        OpError: Shapes, types or counts disagree.
    """
    out: Tensor = torch.ops.moec.grouped_linear.default(rows, list(weights), list(bias), offsets, inputs_first)
    return out
