"""Rows that ranks of a group have in common: each takes its part of them, and all get the whole back.

Ranks that split attention's heads hold the same tokens. Between ``share_rows`` and ``sum_rows`` each computes with its
heads, between ``own_rows`` and ``all_rows`` with its part of the tokens. What is the same on all ranks outside of these
pairs has the same gradient on all; a parameter inside has as gradient the sum over ranks.

| op | forward | backward |
|---|---|---|
| ``share_rows`` | nothing | sums over ranks, for all |
| ``sum_rows`` | sums over ranks, for all | nothing |
| ``own_rows`` | this rank's part of the rows | the rows of all ranks |
| ``all_rows`` | the rows of all ranks | this rank's part of the rows |
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from moec.backends.distributed.world import WORLD
from moec.ir.comm_semantics import begin, running_in
from moec.ir.parallel_semantics import even_sizes

_LIB = torch.library.Library("moec", "FRAGMENT")
_TAGS = (torch.Tag.pt2_compliant_tag,)
_LIB.define("share_rows(Tensor x, str group, int ranks) -> Tensor", tags=_TAGS)
_LIB.define("sum_rows(Tensor x, str group, int ranks) -> Tensor", tags=_TAGS)
_LIB.define("own_rows(Tensor x, str group, int ranks, int rank) -> Tensor", tags=_TAGS)
_LIB.define("all_rows(Tensor own, SymInt total, str group, int ranks, int rank) -> Tensor", tags=_TAGS)


def _share_rows(x: Tensor, group: str, ranks: int) -> Tensor:
    return x.clone()  # an op's result must not be its operand


def _sum_rows(x: Tensor, group: str, ranks: int) -> Tensor:
    rows = x.reshape(-1, x.shape[-1])
    sizes = even_sizes(len(rows), ranks)
    with running_in(WORLD):
        own = begin("reduce_scatter", group, ranks, rows, sizes, ()).wait()
        return begin("all_gather", group, ranks, own, (), sizes).wait().view(x.shape)


def _own_rows(x: Tensor, group: str, ranks: int, rank: int) -> Tensor:
    return x[len(x) * rank // ranks : len(x) * (rank + 1) // ranks].clone()


def _all_rows(own: Tensor, total: int, group: str, ranks: int, rank: int) -> Tensor:
    with running_in(WORLD):
        return begin("all_gather", group, ranks, own.contiguous(), (), even_sizes(total, ranks)).wait()


def _same_fake(x: Tensor, group: str, ranks: int) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _own_fake(x: Tensor, group: str, ranks: int, rank: int) -> Tensor:
    total = x.shape[0]
    return x.new_empty((total * (rank + 1) // ranks - total * rank // ranks, *x.shape[1:]))


def _all_fake(own: Tensor, total: int, group: str, ranks: int, rank: int) -> Tensor:
    return own.new_empty((total, *own.shape[1:]))


def _keep_group(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, *ctx.group = inputs


def _keep_total(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, *ctx.group = inputs
    ctx.total = x.shape[0]


def _keep_all(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, _, *ctx.group = inputs


def _share_backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
    return torch.ops.moec.sum_rows.default(grad, *ctx.group), None, None


def _sum_backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
    return grad, None, None


def _own_backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
    return torch.ops.moec.all_rows.default(grad, ctx.total, *ctx.group), None, None, None


def _all_backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None, None]:
    return torch.ops.moec.own_rows.default(grad, *ctx.group), None, None, None, None


for _name, _run, _fake, _keep, _backward in (
    ("share_rows", _share_rows, _same_fake, _keep_group, _share_backward),
    ("sum_rows", _sum_rows, _same_fake, _keep_group, _sum_backward),
    ("own_rows", _own_rows, _own_fake, _keep_total, _own_backward),
    ("all_rows", _all_rows, _all_fake, _keep_all, _all_backward),
):
    _LIB.impl(_name, _run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"moec::{_name}", _fake, lib=_LIB)
    torch.library.register_autograd(f"moec::{_name}", _backward, setup_context=_keep, lib=_LIB)
