"""``moec::experts_as``: rows that were computed in another way, with the gradients of ``moec::experts``.

Regrouped tokens give the same rows, but other sums in the gradients of experts' weights. Where bits are to be kept, the
backward is therefore that of the micro-batches as they came, and the forward of these is never run.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from moec.runtime import counters
from moec.runtime.ops import backward_of_experts
from moec.runtime.programs import lookup

_LIB = torch.library.Library("moec", "FRAGMENT")
_LIB.define(
    "experts_as(Tensor made, Tensor x, Tensor ids, Tensor weights, Tensor[] params, str program) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides),
)


def _experts_as(made: Tensor, x: Tensor, ids: Tensor, weights: Tensor, params: list[Tensor], program: str) -> Tensor:
    counters.count("moec::experts_as", lookup(program).label)
    return made.clone()


def _fake(made: Tensor, x: Tensor, ids: Tensor, weights: Tensor, params: list[Tensor], program: str) -> Tensor:
    return torch.empty_like(made)


class _ExpertsAs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, program: str, made: Tensor, x: Tensor, ids: Tensor, weights: Tensor, *params: Tensor
    ) -> Tensor:
        ctx.program = program
        ctx.save_for_backward(x, ids, weights, *params)
        ctx.set_materialize_grads(False)
        with torch._C._AutoDispatchBelowAutograd():
            out: Tensor = torch.ops.moec.experts_as.default(made, x, ids, weights, params, program)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, ...]:
        found = backward_of_experts(grad, ctx.saved_tensors, list(ctx.needs_input_grad[2:]), ctx.program)
        return (None, None, *found)


def _autograd(made: Tensor, x: Tensor, ids: Tensor, weights: Tensor, params: list[Tensor], program: str) -> Tensor:
    if torch.is_grad_enabled() and any(t.requires_grad for t in (x, weights, *params)):
        # detached: what made the rows need not be kept for a backward
        return _ExpertsAs.apply(program, made.detach(), x, ids, weights, *params)  # type: ignore[no-untyped-call]
    with torch._C._AutoDispatchBelowAutograd():
        return torch.ops.moec.experts_as.default(made, x, ids, weights, params, program)


_LIB.impl("experts_as", _experts_as, "CompositeExplicitAutograd")
_LIB.impl("experts_as", _autograd, "Autograd")
torch.library.register_fake("moec::experts_as", _fake, lib=_LIB)
