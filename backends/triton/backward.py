"""The backward of ``moe.experts`` on rows sorted as in the forward: everything has a size that no count decides.

The formula is that of :mod:`moec.backends.aten.backward`. GEMMs are Triton's; what lies between them is torch's, on all
rows that there can be. Rows of no slot are given ones where a region computes, and a gradient of 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from moec.backends.aten.backward import Region
from moec.backends.aten.spec import Params
from moec.backends.aten.spec import Spec as AtenSpec
from moec.backends.triton.kernels.gradients import write_gradients
from moec.backends.triton.launcher import Launcher
from moec.backends.triton.module import interpreted
from moec.backends.triton.run import Values

TILE = {"BLOCK_N": 64, "BLOCK_K": 32}
"""Of both kernels; rows of a block are the sort's."""
SUMS = 64
"""Outputs of a tile of ``rows_sums``."""


@lru_cache(maxsize=16)
def _launcher(dtype: str, stacked: bool, interpreted: bool, aligned: bool) -> Launcher:
    return Launcher(write_gradients(dtype, stacked, interpreted, aligned))


@dataclass(frozen=True)
class Rows:
    """Sorted rows, dead ones among them.

    Attributes:
        placed: What ``sort`` made.
        block_m: Rows of a block.
        slot: i64[P] slot of each row; T*k for a dead one.
        live: bool[P, 1].
        safe: i64[P] the same slot, some slot for a dead row.
        expert: i64[P] expert of each row, some expert for a dead row.
    """

    placed: Values
    block_m: int
    slot: Tensor
    live: Tensor
    safe: Tensor
    expert: Tensor

    @staticmethod
    def of(placed: Values, block_m: int, slots: int, experts: int) -> Rows:
        """Read what ``sort`` made; nothing is known of what lies past the last block in use."""
        rows, blocks = placed["rows"], placed["experts"]
        within = torch.arange(len(rows), device=rows.device) < placed["used"][0] * block_m
        live = within & (rows >= 0)
        slot = torch.where(live, rows, slots).to(torch.int64)
        expert = torch.where(within, blocks[:, None].expand(-1, block_m).reshape(-1), 0).to(torch.int64)
        return Rows(placed, block_m, slot, live[:, None], slot.clamp(max=slots - 1), expert.clamp(0, experts - 1))


class Backward:
    """The gradients of one call.

    Args:
        spec: The layer as aten reads it.
        dtype: Element type of rows and weights, in the IR's words.
        rows: Its rows, as the forward sorts them.
        tables: Addresses of up and of down weights that lie apart, on the device; None where they are stacked.
        aligned: The addresses are multiples of 16.
        only: i64 experts whose gradients of stacked weights are wanted, on the device, in this order; None for all.
    """

    def __init__(
        self,
        spec: AtenSpec,
        dtype: str,
        rows: Rows,
        tables: Sequence[Tensor | None],
        aligned: bool = True,
        only: Tensor | None = None,
    ) -> None:
        self.spec, self.rows, self.only = spec, rows, only
        self.up_table, self.down_table = tables
        self.launch = _launcher(dtype, spec.stacked, interpreted(), aligned)
        ends = spec.bounds
        self.up, self.down, self.up_bias, self.down_bias = (range(ends[i - 1], ends[i]) for i in range(3, 7))
        self.captures, self.post_captures = slice(ends[6], ends[7]), slice(ends[7], ends[8])
        self.found: list[Tensor | None] = []
        self.needs: Sequence[bool] = ()
        self.x_rows = rows.slot

    def gradients(self, grad: Tensor, inputs: list[Tensor], needs: Sequence[bool]) -> list[Tensor | None]:
        """Gradients of the flat operands; None where not needed."""
        spec, rows = self.spec, self.rows
        x, ids, weights = inputs[:3]
        p = spec.params(inputs)
        first = spec.bounds[6]
        self.needs = needs
        self.found = [
            torch.zeros_like(t) if need and i >= first else None
            for i, (t, need) in enumerate(zip(inputs, needs, strict=True))
        ]
        token = rows.safe // ids.shape[1]
        x_rows = x.index_select(0, token)
        need_h = needs[0] or any(needs[i] for i in (*self.up, *self.up_bias))
        h = [self._product(x_rows, p.up, part, self.up_table, spec.up_nk) for part in range(spec.parts)]
        if p.up_bias:
            h = [t + self._bias(p.up_bias, part) for part, t in enumerate(h)]
        leaves = spec.split([torch.where(rows.live, t, 1.0) for t in h])
        act = Region(spec.activation, leaves, p.captures, [need_h] * len(leaves), self.found[self.captures])
        a = act.output.detach()
        w = torch.where(rows.live, weights.reshape(-1, 1).index_select(0, rows.safe), 0.0)
        d_o, d_a, dot = self._down(grad.index_select(0, token), a, w, p)
        if needs[2]:
            flat = dot.new_zeros(weights.numel() + 1).index_copy_(0, rows.slot, dot)
            self.found[2] = flat[:-1].view(weights.shape).to(weights.dtype)
        self._weight(self.down, 0, d_o, a, spec.down_nk)
        self._weight(self.down_bias, 0, d_o, None, True)
        d_leaves = act.gradients(d_a, self.found[self.captures])
        if need_h:
            self._up([t for t in d_leaves if t is not None], x_rows, p)
            if needs[0]:
                slots = x.new_zeros((weights.numel() + 1, x.shape[1])).index_copy_(0, rows.slot, self.x_rows)
                self.found[0] = slots[:-1].view(x.shape[0], -1, x.shape[1]).sum(dim=1)
        return self.found

    def _down(self, dy: Tensor, a: Tensor, w: Tensor, p: Params) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of the down GEMM's output, of the activation, and of each row's router weight."""
        spec = self.spec
        wide = torch.promote_types(a.dtype, w.dtype)
        if spec.post is None:
            back = self._product(dy.to(a.dtype), p.down, 0, self.down_table, not spec.down_nk)
            dot = (back.float() * a).sum(1)
            if p.down_bias:
                dot = dot + (dy.float() * self._bias(p.down_bias, 0)).sum(1)
            return (dy.to(wide) * w).to(a.dtype), (back * w).to(a.dtype), dot
        o = self._product(a, p.down, 0, self.down_table, spec.down_nk)
        o = torch.where(self.rows.live, o + self._bias(p.down_bias, 0) if p.down_bias else o, 1.0)
        wants = self.found[self.post_captures]
        post = Region(spec.post, [o], p.post_captures, [True], wants)
        dot = (dy.to(wide) * post.output.detach()).sum(1)
        (d_o,) = post.gradients((dy.to(wide) * w).to(post.output.dtype), wants)
        assert d_o is not None
        return d_o, self._product(d_o, p.down, 0, self.down_table, not spec.down_nk), dot

    def _up(self, parts: list[Tensor], x_rows: Tensor, p: Params) -> None:
        """Up weights, biases and rows of x from the gradients of the activation's row inputs."""
        spec = self.spec
        if spec.layout == "concat":
            parts = [torch.cat(parts, dim=1)]
        elif spec.layout == "interleaved":
            parts = [torch.stack(parts, dim=-1).flatten(1)]
        for part, d in enumerate(parts):
            self._weight(self.up, part, d, x_rows, spec.up_nk)
            self._weight(self.up_bias, part, d, None, True)
            if self.needs[0]:
                share = self._product(d, p.up, part, self.up_table, not spec.up_nk)
                self.x_rows = share if part == 0 else self.x_rows + share

    def _product(self, a: Tensor, weights: list[Tensor], part: int, table: Tensor | None, nk: bool) -> Tensor:
        """Each live row times its expert's matrix: [P, outputs]; ``nk`` says which side of a matrix is its outputs."""
        spec, rows = self.spec, self.rows
        w = weights[part if spec.stacked else part * spec.experts]
        outputs, inputs = (w.shape[-2], w.shape[-1]) if nk else (w.shape[-1], w.shape[-2])
        out = a.new_zeros((a.shape[0], outputs))
        address = w if table is None else table[part * spec.experts :]
        values = {
            "a": a.contiguous(), "w": address, "w_se": w.stride(0), "w_sn": w.stride(-2 if nk else -1),
            "w_sk": w.stride(-1 if nk else -2), "o": out, "inputs": inputs, "outputs": outputs, **rows.placed,
        }  # fmt: skip
        constants = {"BLOCK_M": rows.block_m, **TILE, "BLOCKS": len(rows.placed["experts"]), "OUTPUTS": outputs}
        self.launch("rows_product", 0, values, constants)
        return out

    def _sums(self, d: Tensor, r: Tensor, out: Tensor, nk: bool) -> Tensor:
        """For each expert that is wanted the sum over its rows of d[row, n] * r[row, k]: [E, n, k], else [E, k, n]."""
        rows, experts = self.rows, self.spec.experts
        blocks = rows.placed["experts"]
        used = torch.arange(len(blocks), device=blocks.device) < rows.placed["used"][0]
        own = (blocks == torch.arange(experts, device=blocks.device)[:, None]) & used
        lasts = (own.sum(1).cumsum(0) * rows.block_m).to(torch.int32)
        firsts = lasts - (own.sum(1) * rows.block_m).to(torch.int32)
        if self.only is not None:
            firsts, lasts = (ends.index_select(0, self.only) for ends in (firsts, lasts))
            experts = len(self.only)
        outputs, inputs = d.shape[1], r.shape[1]
        values = {
            "d": d, "r": r, "rows": rows.placed["rows"], "firsts": firsts, "lasts": lasts, "o": out,
            "o_sn": inputs if nk else 1, "o_sk": 1 if nk else outputs, "inputs": inputs, "outputs": outputs,
        }  # fmt: skip
        constants = {"BLOCK_M": SUMS, **TILE, "EXPERTS": experts, "OUTPUTS": outputs, "INPUTS": inputs}
        self.launch("rows_sums", 0, values, constants)
        return out

    def _bias(self, biases: list[Tensor], part: int) -> Tensor:
        """The bias of each row's expert."""
        spec = self.spec
        stack = biases[part] if spec.stacked else torch.stack(biases[part * spec.experts : (part + 1) * spec.experts])
        return stack.index_select(0, self.rows.expert)

    def _weight(self, group: range, part: int, d: Tensor, r: Tensor | None, nk: bool) -> None:
        """The gradient of one of the operands ``group``; a bias, without ``r``, is a weight of one input that is 1."""
        experts = self.spec.experts
        own = group[part : part + 1] if self.spec.stacked else group[part * experts : (part + 1) * experts]
        if not any(self.needs[i] for i in own):
            return
        rows = d.new_ones((len(d), 1)) if r is None else r.contiguous()
        shape = (d.shape[1], rows.shape[1]) if nk else (rows.shape[1], d.shape[1])
        wanted = experts if self.only is None else len(self.only)
        made = self._sums(d.contiguous(), rows, d.new_empty((wanted, *shape)), nk)
        made = made[:, :, 0] if r is None else made
        for i, found in zip(own, [made] if self.spec.stacked else made.unbind(0), strict=True):
            self.found[i] = found if self.needs[i] else None
