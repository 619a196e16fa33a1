"""The backward of ``moe.experts``: the up GEMM and the activation are computed again, nothing else was saved.

With G = dY·W_down for every slot (dY not weighted), the activation's gradient is w·G and the router weight's is the
dot product of G with the activation (plus the bias's share), so the down GEMM is not repeated; only a ``post`` region
needs its output again. Regions are differentiated by torch's autograd on detached leaves; GEMMs never are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from moec.backends.aten import forward
from moec.backends.aten.forward import down_gemm, gemms, up_gemms
from moec.backends.aten.region import RegionFn
from moec.backends.aten.slots import Group, Slots, sort_slots
from moec.backends.aten.spec import Params, Spec


@dataclass
class Gradients:
    """Buffers of the wanted gradients: one entry per flat operand, None where it is not wanted."""

    all: list[Tensor | None]
    x: Tensor | None
    weights: Tensor | None
    up: list[Tensor | None]
    down: list[Tensor | None]
    up_bias: list[Tensor | None]
    down_bias: list[Tensor | None]
    captures: list[Tensor | None]
    post_captures: list[Tensor | None]


def experts_backward(
    spec: Spec,
    grad: Tensor,
    inputs: list[Tensor],
    needs: Sequence[bool],
    into: Sequence[Tensor | None],
    only: Sequence[int] | None,
) -> list[Tensor | None]:
    """Gradients of the flat operands; None where not needed. Arguments as those of the kernel's ``backward_into``."""
    x, ids, weights = inputs[:3]
    params = spec.params(inputs)
    slots = sort_slots(ids, spec.experts)
    g = _buffers(spec, inputs, needs, slots, into, only)
    if slots.live:
        x_rows = _rows_backward(spec, grad, x, weights, params, slots, g)
        if g.x is not None and x_rows is not None:
            _sum_slots(x_rows, slots, g.x)
    elif g.x is not None:
        g.x.zero_()
    return g.all


def _buffers(
    spec: Spec,
    inputs: list[Tensor],
    needs: Sequence[bool],
    slots: Slots,
    into: Sequence[Tensor | None],
    only: Sequence[int] | None,
) -> Gradients:
    """Allocate what has no place; zero what no expert will write."""
    found: list[Tensor | None] = []
    touched = {e for e, _, _ in slots.segments}
    idle = [e for e in (range(spec.experts) if only is None else only) if e not in touched]
    b = spec.bounds
    for i, (t, need, place) in enumerate(zip(inputs, needs, into, strict=True)):
        if not need or i == 1:
            found.append(None)
            continue
        buffer = torch.empty_like(t) if place is None else place
        if i == 0:
            found.append(buffer)
        elif i == 2 or i >= b[6]:
            found.append(buffer.zero_())
        elif not spec.stacked:
            group_start = max(end for end in b[2:6] if end <= i)
            used = (i - group_start) % spec.experts in touched
            found.append(buffer if used else buffer.zero_())
        else:
            for e in idle:
                buffer[e].zero_()
            found.append(buffer)
    return Gradients(found, found[0], found[2], *(found[b[i] : b[i + 1]] for i in range(2, 8)))


def _rows_backward(
    spec: Spec, grad: Tensor, x: Tensor, weights: Tensor, params: Params, slots: Slots, g: Gradients
) -> Tensor | None:
    """Everything but the sum over k: fills ``g`` and returns the rows [R, H] of x's gradient, if it is wanted."""
    x_rows = x.new_empty((slots.live, x.shape[1])) if g.x is not None else None
    flat = weights.reshape(-1)
    w_grad = None if g.weights is None else torch.zeros_like(flat)
    # One reduction over all rows for captured tensors, as autograd would do; otherwise groups that fit the cache.
    captured = any(t is not None for t in (*g.captures, *g.post_captures))
    per_row = (2 * x.shape[1] + 3 * spec.parts * spec.up_width(params.up)) * x.element_size()
    for group in spec.groups(slots, per_row, whole=captured):
        start, stop = group[0][1], group[-1][2]
        order, tokens = slots.order[start:stop], slots.tokens[start:stop]
        dy, w = grad.index_select(0, tokens), flat.index_select(0, order)[:, None]
        rows = x.index_select(0, tokens)
        leaves = [t.detach() for t in spec.split(up_gemms(spec, rows, group, params))]
        need_h = any(t is not None for t in (g.x, *g.up, *g.up_bias))
        act = Region(spec.activation, leaves, params.captures, [need_h] * len(leaves), g.captures)
        a = act.output.detach()
        wide = torch.promote_types(a.dtype, weights.dtype)
        if spec.post is None:
            d_down = (dy.to(wide) * w).to(a.dtype)
            need_w = w_grad is not None
            d_a, dot = _down_backward(spec, dy.to(a.dtype), d_down, a, w, group, params, g, act.wanted, need_w)
            if w_grad is not None and dot is not None:
                w_grad.index_copy_(0, order, dot.to(w_grad.dtype))
        else:
            o = down_gemm(spec, a, group, params, None)
            need_o = act.wanted or any(t is not None for t in (*g.down, *g.down_bias))
            post = Region(spec.post, [o], params.post_captures, [need_o], g.post_captures)
            if w_grad is not None:
                dot = (dy.to(wide) * post.output.detach()).sum(dim=1)
                w_grad.index_copy_(0, order, dot.to(w_grad.dtype))
            (d_o,) = post.gradients((dy.to(wide) * w).to(post.output.dtype), g.post_captures)
            d_a = None
            if d_o is not None:
                d_a, _ = _down_backward(spec, None, d_o, a, w, group, params, g, act.wanted, False)
        if d_a is not None:
            d_leaves = act.gradients(d_a, g.captures)
            if need_h:
                into = None if x_rows is None else x_rows[start:stop]
                _up_backward(spec, d_leaves, leaves, rows, group, params, g, into)
    if g.weights is not None and w_grad is not None:
        g.weights.copy_(w_grad.view(g.weights.shape))
    return x_rows


class Region:
    """A region run on detached leaves, ready to be differentiated."""

    def __init__(
        self,
        fn: RegionFn,
        rows: list[Tensor],
        captures: list[Tensor],
        need_rows: list[bool],
        wants: list[Tensor | None],
    ) -> None:
        self.rows = [t.detach().requires_grad_(n) for t, n in zip(rows, need_rows, strict=True)]
        self.captures = [t.detach().requires_grad_(n is not None) for t, n in zip(captures, wants, strict=True)]
        self.leaves = [t for t in (*self.rows, *self.captures) if t.requires_grad]
        self.wanted = bool(self.leaves)
        with torch.set_grad_enabled(self.wanted):
            (self.output,) = fn(*self.rows, *self.captures)

    def gradients(self, grad: Tensor, into: list[Tensor | None]) -> list[Tensor | None]:
        """Row gradients (None where not wanted); those of the captures are added into ``into``."""
        if not self.wanted or not self.output.requires_grad:
            return [torch.zeros_like(t) if t.requires_grad else None for t in self.rows]
        found = iter(torch.autograd.grad(self.output, self.leaves, grad, allow_unused=True, materialize_grads=True))
        rows = [next(found) if t.requires_grad else None for t in self.rows]
        for capture, buffer in zip(self.captures, into, strict=True):
            if capture.requires_grad and buffer is not None:
                buffer.add_(next(found))
        return rows


def _down_backward(
    spec: Spec,
    dy: Tensor | None,
    d_down: Tensor,
    a: Tensor,
    w: Tensor,
    group: Group,
    params: Params,
    g: Gradients,
    need_a: bool,
    need_w: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """Down weights, biases, the activation's gradient and, from unweighted ``dy``, the router weights' gradient.

    ``d_down`` is the gradient of the down GEMM's output. With ``dy`` None it already holds all; else d_down = w·dy.
    """
    experts, counts = [e for e, _, _ in group], [stop - start for _, start, stop in group]
    d_pieces = d_down.split(counts)
    _weight_grads(spec, g.down, experts, 0, d_pieces, a.split(counts), spec.down_nk)
    _bias_grads(spec, g.down_bias, experts, 0, d_pieces)
    wide = torch.promote_types(a.dtype, torch.float32)
    dot = a.new_zeros(a.shape[0], dtype=wide) if need_w else None
    d_a = a.new_empty(a.shape) if need_a or need_w else None
    if d_a is not None:
        source = d_pieces if dy is None or not need_w else dy.split(counts)
        gemms(source, spec.matrices(params.down, experts, not spec.down_nk), [], d_a.split(counts))
    if dot is not None and dy is not None and params.down_bias:
        biases = spec.vectors(params.down_bias, experts)
        for piece, d, bias in zip(dot.split(counts), dy.split(counts), biases, strict=True):
            torch.mv(d.to(wide), bias.to(wide), out=piece)
    if dot is not None and d_a is not None:
        dot += (d_a.to(dot.dtype) * a).sum(dim=1)
        d_a = (d_a * w).to(a.dtype)
    return d_a, dot


def _up_backward(
    spec: Spec,
    d_leaves: list[Tensor | None],
    leaves: list[Tensor],
    rows: Tensor,
    group: Group,
    params: Params,
    g: Gradients,
    into: Tensor | None,
) -> None:
    """Up weights, biases and (``into``) the rows of x's gradient from the gradients of the activation's row inputs."""
    parts = [torch.zeros_like(leaf) if d is None else d for d, leaf in zip(d_leaves, leaves, strict=True)]
    if spec.layout == "concat":
        parts = [torch.cat(parts, dim=1)]
    elif spec.layout == "interleaved":
        parts = [torch.stack(parts, dim=-1).flatten(1)]
    experts, counts = [e for e, _, _ in group], [stop - start for _, start, stop in group]
    pieces = rows.split(counts)
    for part, d_h in enumerate(parts):
        d_pieces = d_h.split(counts)
        _weight_grads(spec, g.up, experts, part, d_pieces, pieces, spec.up_nk)
        _bias_grads(spec, g.up_bias, experts, part, d_pieces)
        if into is not None:
            share = into if part == 0 else torch.empty_like(into)
            gemms(d_pieces, spec.matrices(params.up, experts, not spec.up_nk, part), [], share.split(counts))
            if share is not into:
                into.add_(share)


def _weight_grads(
    spec: Spec,
    buffers: list[Tensor | None],
    experts: list[int],
    part: int,
    d_out: Sequence[Tensor],
    rows: Sequence[Tensor],
    nk: bool,
) -> None:
    for expert, d, r in zip(experts, d_out, rows, strict=True):
        buffer = buffers[part if spec.stacked else part * spec.experts + expert]
        if buffer is not None:
            left, right = (d, r) if nk else (r, d)
            torch.mm(left.t(), right, out=buffer[expert] if spec.stacked else buffer)


def _bias_grads(
    spec: Spec, buffers: list[Tensor | None], experts: list[int], part: int, d_out: Sequence[Tensor]
) -> None:
    for expert, d in zip(experts, d_out, strict=True) if buffers else ():
        buffer = buffers[part if spec.stacked else part * spec.experts + expert]
        if buffer is not None:
            torch.sum(d, dim=0, out=buffer[expert] if spec.stacked else buffer)


def _sum_slots(rows: Tensor, slots: Slots, out: Tensor) -> None:
    """``out[t] = Σ_k rows[slot(t, k)]`` in order of k, a few tokens at a time."""
    inverse, dead = slots.inverse(), slots.dead()
    top_k = slots.total // out.shape[0]
    step = max(1, forward.COMBINE_BYTES // max(1, top_k * rows.shape[1] * rows.element_size()))
    for start in range(0, out.shape[0], step):
        cut = slice(start * top_k, (start + step) * top_k)
        picked = rows.index_select(0, inverse[cut])
        if dead is not None:
            picked.masked_fill_(dead[cut, None], 0)
        torch.sum(picked.view(-1, top_k, rows.shape[1]), dim=1, out=out[start : start + step])
