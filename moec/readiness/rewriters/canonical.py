"""The one form in which every rewritten module runs its experts: sorted slots, grouped GEMMs, a weighted sum per token.

It is the form that ``moec.slicing`` and the pass ``raise-moe`` read, and it is right by itself where nothing reads it.
There is no Python that depends on data, so it traces into one graph for any number of tokens, 0 included.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from moec.runtime.grouped_linear import grouped_linear

_NO_INTEGER_HISTOGRAM = ("cpu", "mps")
"""Devices on which ``torch.histc`` counts floats alone. f32 holds ids exactly up to 2**24."""


class Projection(NamedTuple):
    """One linear layer of every expert, as the model holds it (see :func:`moec.runtime.grouped_linear`).

    Attributes:
        weights: One tensor ``[E, N, K]``, or E matrices ``[N, K]``.
        bias: One tensor ``[E, N]``, or E vectors, as the weights lie; or none.
        inputs_first: Weights are ``[E, K, N]`` or ``[K, N]``.
    """

    weights: Sequence[Tensor]
    bias: Sequence[Tensor] = ()
    inputs_first: bool = False

    def apply(self, rows: Tensor, offsets: Tensor) -> Tensor:
        """``[R, K] -> [R, N]``; rows sorted by expert."""
        return grouped_linear(rows, self.weights, offsets, bias=self.bias, inputs_first=self.inputs_first)


def sort_slots(ids: Tensor, experts: int) -> tuple[Tensor, Tensor]:
    """The order that sorts slots by expert, and where each expert's slots end.

    Args:
        ids: int ``[S]``, in ``0 .. experts-1``.
        experts: E.

    Returns:
        i64 ``[S]``: slot number of every sorted row, of one expert in the order of their numbers; i32 ``[E]``.
    """
    sorted_ids, order = torch.sort(ids, stable=True)
    countable = sorted_ids.float() if ids.device.type in _NO_INTEGER_HISTOGRAM else sorted_ids.int()
    counts = torch.histc(countable, bins=experts, min=0, max=experts - 1)
    return order, torch.cumsum(counts, dim=0, dtype=torch.int32)


def inverse(order: Tensor) -> Tensor:
    """The permutation that undoes ``order``."""
    return torch.zeros_like(order).scatter(0, order, torch.arange(order.shape[0], device=order.device))


def experts(
    x: Tensor,
    ids: Tensor,
    weights: Tensor,
    count: int,
    up: Sequence[Projection],
    activation: Callable[..., Tensor],
    down: Projection,
) -> Tensor:
    """``y[t] = Σ_j weights[t, j] · expert ids[t, j] (x[t])``.

    The product is taken in the promoted type of rows and weights and the sum in that type (torch accumulates narrow
    floats in f32); the result has the type of ``x``.

    Args:
        x: ``[T, H]``.
        ids: int ``[T, k]``.
        weights: ``[T, k]``.
        count: Number of experts E.
        up: The projections that feed the activation: one, or gate and up apart.
        activation: From the rows of each of ``up`` to the rows of ``down``; it must treat every row by itself.
        down: The last projection.

    Returns:
        ``[T, N]``.
    """
    tokens, top_k = ids.shape
    order, offsets = sort_slots(ids.reshape(-1), count)
    rows = _as_autocast_would(x)[order // top_k]
    rows = down.apply(activation(*[projection.apply(rows, offsets) for projection in up]), offsets)
    weighted = rows * weights.reshape(-1)[order].unsqueeze(-1)
    return weighted[inverse(order)].view(tokens, top_k, rows.shape[-1]).sum(dim=1).to(x.dtype)


def _as_autocast_would(x: Tensor) -> Tensor:
    """``x`` in the type in which autocast runs GEMMs: cast here, a token is cast once and not once a slot."""
    device = x.device.type
    known = torch.amp.is_autocast_available(device)
    if known and torch.is_autocast_enabled(device) and x.dtype != torch.float64:
        return x.to(torch.get_autocast_dtype(device))
    return x


def without(slots: Tensor, ids: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """``(ids, weights)`` with some slots put out of action: expert 0 with weight 0, which adds nothing.

    A graph needs a shape that does not depend on data, so the slots stay; ``eliminate-zero-experts`` takes them out.

    Args:
        slots: bool ``[T, k]``: the slots that no expert is to run.
        ids: int ``[T, k]``.
        weights: ``[T, k]``.
    """
    return torch.where(slots, 0, ids), torch.where(slots, 0.0, weights)
