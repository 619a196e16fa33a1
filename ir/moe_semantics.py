"""The meaning of the moe dialect in plain torch: what every backend must compute, kept short and slow on purpose."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from moec.ir.errors import MoecError
from moec.ir.scaled_semantics import scaled_gemm


@dataclass(frozen=True)
class Plan:
    """How the slots (token, k-th choice) are grouped by expert.

    Attributes:
        order: i64[T*k]. Slot numbers sorted by expert, stable; slots that go to no expert come last.
        counts: Rows per expert, length E. Their sum is less than T*k when there are sentinels.
        tokens: T.
        top_k: k.
    """

    order: Tensor
    counts: tuple[int, ...]
    tokens: int
    top_k: int

    def segments(self) -> Iterator[tuple[int, int, int]]:
        """``(expert, first row, past last row)`` of every expert that has rows."""
        start = 0
        for expert, count in enumerate(self.counts):
            if count:
                yield expert, start, start + count
                start += count


def make_plan(ids: Tensor, experts: int, sentinels: bool = False) -> Plan:
    """Sort the slots of ``ids`` (i64[T, k]) by expert.

    Raises:
        MoecError: An id is outside ``0 .. experts-1`` and ``sentinels`` is false.
    """
    tokens, top_k = ids.shape
    flat = ids.reshape(-1).to(torch.int64)
    check_ids(flat, experts, sentinels)
    flat = torch.where((flat < 0) | (flat >= experts), experts, flat)
    order = torch.argsort(flat, stable=True)
    counts = torch.bincount(flat, minlength=experts + 1)[:experts].tolist()
    return Plan(order, tuple(counts), tokens, top_k)


def check_ids(flat: Tensor, experts: int, sentinels: bool) -> None:
    """Refuse expert ids outside the range, unless they are declared sentinels.

    Raises:
        MoecError: with the offending id.
    """
    if sentinels or flat.numel() == 0:
        return
    low, high = (int(v) for v in torch.aminmax(flat))
    if low < 0 or high >= experts:
        bad = low if low < 0 else high
        raise MoecError(
            f"expert id {bad} is out of range: the layer has {experts} experts (ids 0 to {experts - 1})",
            hint="check the router's output; ids of other ranks must be declared as sentinels",
        )


def expert_weight(weights: Sequence[Tensor], expert: int, experts: int, stacked: bool, part: int = 0) -> Tensor:
    """The 2-D weight of one expert. ``part`` picks gate (0) or up (1) where they are apart."""
    return weights[part][expert] if stacked else weights[part * experts + expert]


def expert_gemm(
    rows: Tensor,
    weights: Sequence[Tensor],
    bias: Sequence[Tensor],
    expert: int,
    experts: int,
    form: str,
    stacked: bool,
    part: int = 0,
) -> Tensor:
    """``rows @ W[expert]ᵀ + b[expert]`` for form ``nk``; untransposed for ``kn``."""
    w = expert_weight(weights, expert, experts, stacked, part)
    y = rows @ (w.t() if form == "nk" else w)
    return y + expert_weight(bias, expert, experts, stacked, part) if bias else y


def grouped_gemm(
    rows: Tensor,
    weights: Sequence[Tensor],
    bias: Sequence[Tensor],
    plan: Plan,
    form: str,
    stacked: bool,
    scales: Sequence[Tensor] = (),
) -> Tensor:
    """Every expert's rows through its weight (``expert_gemm``). Rows of no expert are 0.

    With ``scales``, weights are one stacked tensor in f8e4m3fn (``scaled_gemm``).
    """
    experts = len(plan.counts)
    width = weights[0].shape[-2 if form == "nk" else -1]  # of no expert's matrix: a rank may hold no experts
    out = rows.new_zeros((rows.shape[0], width))
    for expert, start, stop in plan.segments():
        if scales:
            product = scaled_gemm(rows[start:stop], weights[0][expert], scales[0][expert])
            out[start:stop] = product + bias[0][expert] if bias else product
        else:
            out[start:stop] = expert_gemm(rows[start:stop], weights, bias, expert, experts, form, stacked)
    return out


def combine(rows: Tensor, weights: Tensor, plan: Plan, out_dtype: torch.dtype) -> Tensor:
    """``y[t] = Σ_k w[t, k] · rows[slot(t, k)]``, multiplied in the promoted type, added in order of k, then cast.

    The rows of slots without an expert, which come last, may be left out.
    """
    live = sum(plan.counts)
    flat = weights.reshape(-1)[plan.order]
    weighted = rows[:live] * flat[:live, None]
    weighted = torch.cat([weighted, weighted.new_zeros((len(flat) - live, rows.shape[-1]))])
    slots = torch.zeros_like(weighted).index_copy(0, plan.order, weighted)
    return slots.view(plan.tokens, plan.top_k, rows.shape[-1]).sum(dim=1).to(out_dtype)


def split_gate(parts: Sequence[Tensor], layout: str) -> list[Tensor]:
    """The activation's inputs: ``(gate, up)``, or the one tensor as it is for ``single`` and ``rows``."""
    if layout == "separate":
        return list(parts)
    (h,) = parts
    if layout == "concat":
        return list(h.chunk(2, dim=-1))
    if layout == "interleaved":
        return [h[..., ::2], h[..., 1::2]]
    return [h]
