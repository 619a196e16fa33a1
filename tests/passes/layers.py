"""MoE layers as a user would write them, in many forms, their capture as IR, and a plain loop as reference."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

from moec.capture import graph_from_fx
from moec.ir.core import Graph

HIDDEN = 8
INNER = 8
TRACED_TOKENS = 5

_LIBRARY = torch.library.Library("moec_tests", "DEF")
_LIBRARY.define("grouped_mm_fallback(Tensor input, Tensor weight, Tensor offs) -> Tensor")


def _fallback(rows: Tensor, weight: Tensor, offs: Tensor) -> Tensor:
    ends = [0, *offs.tolist()]
    parts = [rows[a:b] @ weight[e] for e, (a, b) in enumerate(pairwise(ends))]
    return torch.cat([*parts, rows.new_zeros(rows.shape[0] - ends[-1], weight.shape[-1])])


_LIBRARY.impl("grouped_mm_fallback", _fallback, "CPU")
_LIBRARY.impl("grouped_mm_fallback", lambda rows, weight, offs: rows.new_empty(rows.shape[0], weight.shape[-1]), "Meta")


def grouped_mm(rows: Tensor, weight: Tensor, offs: Tensor) -> Tensor:
    """torch's grouped GEMM, or for types that it cannot trace an op of the name that transformers gives its own."""
    if rows.dtype == torch.bfloat16:
        return torch._grouped_mm(rows, weight, offs=offs)
    return torch.ops.moec_tests.grouped_mm_fallback(rows, weight, offs)


Router = Callable[[Tensor, int], tuple[Tensor, Tensor]]


def capture(fn: Callable[..., Any], args: Sequence[Tensor], dynamic: Sequence[int]) -> Graph:
    """``fn`` as a graph; the first dimension of the arguments in ``dynamic`` is one symbol, all else is fixed."""
    mode = FakeTensorMode(shape_env=ShapeEnv())

    def fake(i: int, t: Tensor) -> Tensor:
        if i not in dynamic:
            return mode.from_tensor(t, static_shapes=True)
        sizes = [DimDynamic.DUCK, *[DimDynamic.STATIC] * (t.dim() - 1)]
        return mode.from_tensor(t, symbolic_context=StatelessSymbolicContext(dynamic_sizes=sizes))

    fakes = [fake(i, t) for i, t in enumerate(args)]
    with mode, torch.no_grad():
        gm = make_fx(fn, pre_dispatch=True, tracing_mode="real", _allow_non_fake_inputs=True)(*fakes)
    return graph_from_fx(gm, "layer")


@dataclass(frozen=True)
class Layer:
    """One MoE layer.

    Attributes:
        form: ``grouped`` (rows sorted by expert, grouped GEMM), ``batched`` (bmm of indexed weights, weight on the
            left) or ``batched-left`` (rows on the left).
        layout: Where gate and up lie: ``concat``, ``chunk``, ``interleaved``, ``separate``, ``single``.
        transposed: Weights lie as ``[E, in, out]``.
        bias: Both GEMMs have one.
        norm: A norm of the rows after the down GEMM.
        late: Weight the rows after they are back in slot order.
        inverse: How the inverse permutation is made: ``argsort``, ``put`` or ``scatter``.
        experts: E.
        top_k: k.
        dtype: Type of everything but ids.
        spoil: Something that makes it another layer (see :data:`SPOILS`), or "".
    """

    form: str = "grouped"
    layout: str = "concat"
    transposed: bool = False
    bias: bool = False
    norm: bool = False
    late: bool = False
    inverse: str = "argsort"
    experts: int = 4
    top_k: int = 2
    dtype: torch.dtype = torch.float32
    spoil: str = ""
    router: Router = field(default=lambda logits, k: tuple(torch.softmax(logits, -1).topk(k, -1)))  # type: ignore[assignment]

    def weights(self, seed: int) -> list[Tensor]:
        """The parameters, in the order that :meth:`forward` takes them."""
        gen = torch.Generator().manual_seed(seed)

        def make(*shape: int) -> Tensor:
            return (torch.randn(shape, generator=gen) * 0.3).to(self.dtype)

        def gemm(out: int, inner: int) -> Tensor:
            return make(self.experts, inner, out) if self.transposed else make(self.experts, out, inner)

        ups = {"separate": [INNER, INNER], "single": [INNER]}.get(self.layout, [2 * INNER])
        params = [*(gemm(n, HIDDEN) for n in ups), gemm(HIDDEN, INNER)]
        if self.bias:
            params += [*(make(self.experts, n) for n in ups), make(self.experts, HIDDEN)]
        return [*params, make(HIDDEN)] if self.norm else params

    def parts(self, params: Sequence[Tensor]) -> tuple[list[Tensor], Tensor, list[Tensor | None], Tensor | None]:
        """(up weights, down weight, up biases, down bias)."""
        n = 2 if self.layout == "separate" else 1
        biases: list[Tensor | None] = list(params[n + 1 : 2 * n + 2]) if self.bias else [None] * (n + 1)
        return list(params[:n]), params[n], biases[:n], biases[n]

    def activate(self, hidden: Sequence[Tensor]) -> Tensor:
        """The function between the GEMMs."""
        if self.layout == "single":
            return torch.relu(hidden[0]) ** 2
        if self.layout == "separate":
            gate, up = hidden
        elif self.layout == "interleaved":
            gate, up = hidden[0][..., ::2], hidden[0][..., 1::2]
        elif self.layout == "chunk":
            gate, up = hidden[0].chunk(2, dim=-1)
        else:
            gate, up = hidden[0][..., :INNER], hidden[0][..., INNER:]
        return torch.nn.functional.silu(gate) * (up.clamp(min=-2, max=2) + 1)

    def finish(self, rows: Tensor, params: Sequence[Tensor]) -> Tensor:
        """The function after the down GEMM."""
        return torch.nn.functional.rms_norm(rows, (HIDDEN,), params[-1], 1e-6) if self.norm else rows

    def forward(self, x: Tensor, logits: Tensor, *params: Tensor) -> Tensor:
        """The layer as a user writes it: ``[T, H]`` from ``x`` [T, H] and ``logits`` [T, E]."""
        weights, ids = self.router(logits, self.top_k)
        run = _grouped if self.form == "grouped" else _batched
        return run(self, x, ids, weights, params)


SPOILS: dict[str, str] = {
    "softmax over rows": "may mix rows",
    "cumsum over rows": "may mix rows",
    "flip rows": "may mix rows",
    "gate by the tokens": "computed from the tokens",
    "keep the inner rows": "also used elsewhere",
    "no weights": "not multiplied by router weights",
    "one weight": "not the router weight of the row's slot",
    "sum over columns": "not added per token",
    "mean over k": "not added per token",
    "other ids for the down GEMM": "group their rows differently",
    "descending": "descending",
    "other permutation of the weights": "not the router weight of the row's slot",
    "not brought back": "not brought back to slot order",
    "brought back downwards": "an order that is not that of the slots",
    "offsets of other ids": "counts other ids",
    "one token too far": "not by slot // k",
}
"""What makes a layer another one, and what the refusal says."""
ONLY_GROUPED = frozenset(list(SPOILS)[10:])


def _between(layer: Layer, hidden: list[Tensor], x: Tensor) -> list[Tensor]:
    h = hidden[0]
    if layer.spoil == "softmax over rows":
        h = h.softmax(0)
    elif layer.spoil == "cumsum over rows":
        h = h.cumsum(0)
    elif layer.spoil == "flip rows":
        h = h.flip(0)
    elif layer.spoil == "gate by the tokens":
        h = h * x.amax()
    return [h, *hidden[1:]]


def _combined(layer: Layer, slots: Tensor) -> Tensor:
    if layer.spoil == "sum over columns":
        return slots.sum(2).sum(1, keepdim=True) * torch.ones_like(slots[:, 0])
    return slots.mean(1) if layer.spoil == "mean over k" else slots.sum(1)


def _weighted(layer: Layer, rows: Tensor, column: Tensor) -> Tensor:
    if layer.spoil == "no weights":
        return rows + 0 * column
    if layer.spoil == "one weight":
        return rows * column.amax()
    return rows * column


def _grouped(layer: Layer, x: Tensor, ids: Tensor, weights: Tensor, params: Sequence[Tensor]) -> Tensor:
    ups, down, up_bias, down_bias = layer.parts(params)
    k, flat = layer.top_k, ids.reshape(-1)
    order = torch.argsort(flat, stable=True, descending=layer.spoil == "descending")
    owners = flat[order]
    counted = (flat + 1) % layer.experts if layer.spoil == "offsets of other ids" else owners
    offsets = torch.bincount(counted, minlength=layer.experts).cumsum(0).to(torch.int32)
    if layer.spoil == "other ids for the down GEMM":
        later = torch.bincount((owners + 1) % layer.experts, minlength=layer.experts).cumsum(0).to(torch.int32)
    else:
        later = offsets

    def gemm(rows: Tensor, w: Tensor, bias: Tensor | None, ends: Tensor) -> Tensor:
        out = grouped_mm(rows, w if layer.transposed else w.transpose(-2, -1), ends)
        return out if bias is None else out + bias[owners]

    token = (order + 1) // k % x.shape[0] if layer.spoil == "one token too far" else order // k
    rows = x[token]
    hidden = [gemm(rows, w, b, offsets) for w, b in zip(ups, up_bias, strict=True)]
    a = layer.activate(_between(layer, hidden, x))
    out = layer.finish(gemm(a, down, down_bias, later), params)
    inverse = _inverse(layer, order)
    if layer.late:
        slots = _weighted(layer, out[inverse].view(-1, k, HIDDEN), weights.unsqueeze(-1))
    else:
        by = torch.argsort(order) if layer.spoil == "other permutation of the weights" else order
        out = _weighted(layer, out, weights.reshape(-1)[by].unsqueeze(-1))
        slots = (out if layer.spoil == "not brought back" else out[inverse]).view(-1, k, HIDDEN)
    y = _combined(layer, slots).to(x.dtype)
    return y + a.sum() if layer.spoil == "keep the inner rows" else y


def _inverse(layer: Layer, order: Tensor) -> Tensor:
    if layer.inverse == "argsort" or layer.spoil == "brought back downwards":
        return torch.argsort(order, descending=layer.spoil == "brought back downwards")
    count = torch.arange(order.shape[0], device=order.device)
    inverse = torch.empty_like(order)
    if layer.inverse == "scatter":
        return inverse.scatter(0, order, count)
    inverse[order] = count
    return inverse


def _batched(layer: Layer, x: Tensor, ids: Tensor, weights: Tensor, params: Sequence[Tensor]) -> Tensor:
    ups, down, up_bias, down_bias = layer.parts(params)
    k, flat = layer.top_k, ids.reshape(-1)
    later = (flat + 1) % layer.experts if layer.spoil == "other ids for the down GEMM" else flat

    def gemm(rows: Tensor, w: Tensor, bias: Tensor | None, owners: Tensor) -> Tensor:
        picked = w[owners]
        if layer.form == "batched-left":
            out = torch.bmm(rows.unsqueeze(1), picked if layer.transposed else picked.transpose(1, 2)).squeeze(1)
        else:
            out = torch.bmm(picked.transpose(1, 2) if layer.transposed else picked, rows.unsqueeze(-1)).squeeze(-1)
        return out if bias is None else out + bias[owners]

    rows = x.repeat_interleave(k, 0) if layer.late else x.unsqueeze(1).expand(-1, k, -1).reshape(-1, HIDDEN)
    hidden = [gemm(rows, w, b, flat) for w, b in zip(ups, up_bias, strict=True)]
    a = layer.activate(_between(layer, hidden, x))
    out = layer.finish(gemm(a, down, down_bias, later), params)
    if layer.late:
        slots = _weighted(layer, out.view(-1, k, HIDDEN), weights.unsqueeze(-1))
    else:
        slots = _weighted(layer, out, weights.reshape(-1, 1)).view(-1, k, HIDDEN)
    y = _combined(layer, slots).to(x.dtype)
    return y + a.sum() if layer.spoil == "keep the inner rows" else y


def loop(layer: Layer, x: Tensor, logits: Tensor, params: Sequence[Tensor]) -> Tensor:
    """The layer, token by token and choice by choice, in f64; shares with the forms only router and activation."""
    weights, ids = layer.router(logits, layer.top_k)
    params = [p.double() for p in params]
    ups, down, up_bias, down_bias = layer.parts(params)
    y = torch.zeros(x.shape, dtype=torch.float64)
    for t in range(x.shape[0]):
        for j in range(layer.top_k):
            e = int(ids[t, j])

            def gemm(row: Tensor, w: Tensor, bias: Tensor | None, e: int = e) -> Tensor:
                out = row @ w[e] if layer.transposed else w[e] @ row
                return out if bias is None else out + bias[e]

            hidden = [gemm(x[t].double(), w, b) for w, b in zip(ups, up_bias, strict=True)]
            row = gemm(layer.activate(hidden), down, down_bias)
            y[t] += layer.finish(row, params) * weights[t, j].double()
    return y
