"""``moec::unshard``: the whole of a weight whose shards lie on the ranks of a group, as a model's graph sees it.

To the model a sharded layer's weight is all experts', gathered from the shards. The pass ``expert-parallel`` takes the
gather away. Where it does not run (eager PyTorch, a block that is not fused), the op does what it says, one layer at a
time, and its gradient goes back to the shards: right, but slow, and a layer's weights are then whole for a moment.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor

from moec.backends.distributed.world import WORLD
from moec.ir.comm_semantics import begin, running_in
from moec.runtime.checks import MoecWarning

_LIB = torch.library.Library("moec", "FRAGMENT")
_TAGS = (torch.Tag.pt2_compliant_tag,)
_LIB.define("unshard(Tensor local, int[] sizes, str group, float scale) -> Tensor", tags=_TAGS)
_LIB.define("unshard_backward(Tensor grad, int own, int[] sizes, str group, float scale) -> Tensor", tags=_TAGS)
_told: set[str] = set()


def _unshard(local: Tensor, sizes: list[int], group: str, scale: float) -> Tensor:
    if group not in _told:
        _told.add(group)
        warnings.warn(
            f"experts sharded over {group!r} are gathered layer by layer: a MoE block runs outside of moec's passes; "
            "compile with backend='moec', and see moec.explain for what is not fused",
            MoecWarning,
            stacklevel=2,
        )
    with running_in(WORLD):
        return begin("all_gather", group, len(sizes), local.contiguous(), (), sizes).wait()


def _unshard_backward(grad: Tensor, own: int, sizes: list[int], group: str, scale: float) -> Tensor:
    with running_in(WORLD):
        total = begin("reduce_scatter", group, len(sizes), grad.contiguous(), sizes, ()).wait()
    return total if scale == 1 else total * scale


def _unshard_fake(local: Tensor, sizes: list[int], group: str, scale: float) -> Tensor:
    return local.new_empty((sum(sizes), *local.shape[1:]))


def _unshard_backward_fake(grad: Tensor, own: int, sizes: list[int], group: str, scale: float) -> Tensor:
    return grad.new_empty((own, *grad.shape[1:]))


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    local, ctx.sizes, ctx.group, ctx.scale = inputs
    ctx.own = local.shape[0]


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
    found: Tensor = torch.ops.moec.unshard_backward.default(grad, ctx.own, ctx.sizes, ctx.group, ctx.scale)
    return found, None, None, None


_LIB.impl("unshard", _unshard, "CompositeExplicitAutograd")
_LIB.impl("unshard_backward", _unshard_backward, "CompositeExplicitAutograd")
torch.library.register_fake("moec::unshard", _unshard_fake, lib=_LIB)
torch.library.register_fake("moec::unshard_backward", _unshard_backward_fake, lib=_LIB)
torch.library.register_autograd("moec::unshard", _backward, setup_context=_setup, lib=_LIB)
