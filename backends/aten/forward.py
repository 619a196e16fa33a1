"""The forward of ``moe.experts`` in torch ops: sorted slots, one GEMM per touched expert and projection.

Working set beside the result: the down GEMM's rows [T*k, H] and, for one group of experts at a time, the rows of the
up GEMM and the activation. No weight is copied; GEMMs read the expert's slice where it lies and write into place.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from moec.backends.aten.slots import Group, Slots, sort_slots
from moec.backends.aten.spec import Params, Spec

COMBINE_BYTES = 2 << 20
"""Weighted rows that the combine holds at a time."""


def experts_forward(spec: Spec, inputs: list[Tensor]) -> Tensor:
    """``moe.experts`` on flat operands; the result is [T, H] of the op's result type."""
    x, ids, weights = inputs[:3]
    params = spec.params(inputs)
    if x.shape[0] == 1 and not spec.ragged:
        chosen = [(slot, e) for slot, e in enumerate(ids[0].tolist()) if 0 <= e < spec.experts]
        if chosen and len({e for _, e in chosen}) == len(chosen):
            return _one_token(spec, x, chosen, weights, params)
    if spec.experts == 1 and ids.shape[1] == 1 and not bool(ids.any()):
        return _every_token(spec, x, weights, params)
    slots = sort_slots(ids, spec.experts)
    if not slots.live:
        return x.new_zeros((x.shape[0], spec.down_width(params.down)), dtype=spec.out_dtype)
    rows = expert_rows(spec, x, slots, params)
    return combine(rows, weights, slots, spec.out_dtype)


def _one_token(spec: Spec, x: Tensor, chosen: list[tuple[int, int]], weights: Tensor, params: Params) -> Tensor:
    """T = 1 with different experts, ``(slot, expert)``: no sorting, each expert's weights are read once."""
    segments = [(e, j, j + 1) for j, (_, e) in enumerate(chosen)]
    if len(chosen) < weights.shape[1]:
        weights = weights[:, [slot for slot, _ in chosen]]
    h = up_gemms(spec, x.expand(len(chosen), -1), segments, params)
    a = spec.activation(*spec.split(h), *params.captures)[0]
    rows = down_gemm(spec, a, segments, params, None)
    if spec.post is not None:
        rows = spec.post(rows, *params.post_captures)[0]
    return (rows * weights.reshape(-1, 1)).view(1, len(chosen), -1).sum(dim=1).to(spec.out_dtype)


def _every_token(spec: Spec, x: Tensor, weights: Tensor, params: Params) -> Tensor:
    """One expert that every token goes to, as a shared one: rows stay where they are."""
    segments = [(0, 0, x.shape[0])]
    a = spec.activation(*spec.split(up_gemms(spec, x, segments, params)), *params.captures)[0]
    rows = down_gemm(spec, a, segments, params, None)
    if spec.post is not None:
        rows = spec.post(rows, *params.post_captures)[0]
    same = torch.promote_types(rows.dtype, weights.dtype) == rows.dtype and spec.post is None
    return (rows.mul_(weights) if same else rows * weights).to(spec.out_dtype)


def expert_rows(spec: Spec, x: Tensor, slots: Slots, params: Params) -> Tensor:
    """The experts' outputs [R, H] in the order of ``slots``, before weighting."""
    up, out = spec.up_width(params.up) * spec.parts, spec.down_width(params.down)
    rows = x.new_empty((slots.live, out)) if spec.post is None else None
    for group in spec.groups(slots, (x.shape[1] + 2 * up + out) * x.element_size()):
        start, stop = group[0][1], group[-1][2]
        h = up_gemms(spec, x.index_select(0, slots.tokens[start:stop]), group, params)
        a = spec.activation(*spec.split(h), *params.captures)[0]
        del h
        o = down_gemm(spec, a, group, params, None if rows is None else rows[start:stop])
        if spec.post is not None:
            o = spec.post(o, *params.post_captures)[0]
            if start == 0:
                rows = o.new_empty((slots.live, o.shape[1])) if stop < slots.live else o
            if rows is not None and rows is not o:
                rows[start:stop] = o
    assert rows is not None
    return rows


def up_gemms(spec: Spec, rows: Tensor, group: Group, params: Params) -> list[Tensor]:
    """The up GEMMs of a group: one [rows, N] tensor, or gate and up where they are separate."""
    experts, counts = [e for e, _, _ in group], [stop - start for _, start, stop in group]
    pieces = rows.split(counts)
    out = []
    for part in range(spec.parts):
        h = rows.new_empty((rows.shape[0], spec.up_width(params.up, experts[0])))
        bias = spec.vectors(params.up_bias, experts, part) if params.up_bias else []
        gemms(pieces, spec.matrices(params.up, experts, spec.up_nk, part), bias, h.split(counts))
        out.append(h)
    return out


def down_gemm(spec: Spec, a: Tensor, group: Group, params: Params, out: Tensor | None) -> Tensor:
    """The down GEMMs of a group, into ``out`` [rows, H] if given."""
    experts, counts = [e for e, _, _ in group], [stop - start for _, start, stop in group]
    if out is None:
        out = a.new_empty((a.shape[0], spec.down_width(params.down)))
    bias = spec.vectors(params.down_bias, experts) if params.down_bias else []
    gemms(a.split(counts), spec.matrices(params.down, experts, spec.down_nk), bias, out.split(counts))
    return out


def gemms(rows: Sequence[Tensor], weights: Sequence[Tensor], bias: Sequence[Tensor], out: Sequence[Tensor]) -> None:
    """``out[i] = rows[i] @ weights[i] + bias[i]``, the bias added in the output's type."""
    for r, w, o in zip(rows, weights, out, strict=True):
        torch.mm(r, w, out=o)
    for o, b in zip(out, bias, strict=False):
        o.add_(b)


def combine(rows: Tensor, weights: Tensor, slots: Slots, out_dtype: torch.dtype) -> Tensor:
    """``moe_semantics.combine``, a few tokens at a time: the same products and sums in the same order."""
    tokens, top_k = weights.shape
    wide = torch.promote_types(rows.dtype, weights.dtype)
    out = rows.new_empty((tokens, rows.shape[1]), dtype=out_dtype)
    inverse, dead = slots.inverse(), slots.dead()
    step = max(1, COMBINE_BYTES // max(1, top_k * rows.shape[1] * wide.itemsize))
    flat = weights.reshape(-1, 1)
    for start in range(0, tokens, step):
        cut = slice(start * top_k, min(start + step, tokens) * top_k)
        picked = rows.index_select(0, inverse[cut])
        weighted = picked.mul_(flat[cut]) if wide == rows.dtype else picked * flat[cut]
        if dead is not None:
            weighted.masked_fill_(dead[cut, None], 0)
        piece = weighted.view(-1, top_k, rows.shape[1])
        if wide == out_dtype:
            torch.sum(piece, dim=1, out=out[start : start + step])
        else:
            out[start : start + step] = piece.sum(dim=1)
    return out
