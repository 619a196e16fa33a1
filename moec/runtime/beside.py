"""The op that stands in a compiled graph for a layer with something computed beside it: several results, one program.

As ``moec::experts`` in all else (:mod:`moec.runtime.ops`): tensors are the program's flat operands, autograd saves the
inputs alone, and the backward op gives the gradients that are asked for.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from moec.runtime import checks, counters, ops, traces
from moec.runtime.programs import lookup

_LIB = torch.library.Library("moec", "FRAGMENT")
_TAGS = (torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides)
_LIB.define("experts_beside(Tensor[] inputs, str program) -> Tensor[]", tags=_TAGS)
_LIB.define(
    "experts_beside_backward(Tensor[] grads, Tensor[] inputs, bool[] needs, str program) -> Tensor[]", tags=_TAGS
)


def _forward(inputs: list[Tensor], program: str) -> list[Tensor]:
    prog = lookup(program)
    counters.count("moec::experts_beside", prog.label)
    x, ids, groups = inputs[0], inputs[1], prog.op.groups
    traces.note(prog, ids)
    checks.check_same(x, inputs[3:], groups[3] + groups[4], prog)
    if not prog.op.attrs.get("sentinels"):
        checks.check_ids(ids, prog.op.attrs["experts"], prog)
    with ops.without_autocast(x.device):
        return [out.contiguous() for out in prog.kernel().forward(list(inputs))]


def _backward(grads: list[Tensor], inputs: list[Tensor], needs: list[bool], program: str) -> list[Tensor]:
    prog = lookup(program)
    counters.count("moec::experts_beside_backward", prog.label)
    return ops.gradients(prog, list(grads), list(inputs), needs)


def _forward_fake(inputs: list[Tensor], program: str) -> list[Tensor]:
    return ops.rows_like(ops.check_fake(program, inputs).op.results, inputs[0])


def _backward_fake(grads: list[Tensor], inputs: list[Tensor], needs: list[bool], program: str) -> list[Tensor]:
    return [ops.gradient_like(t) for t, need in zip(inputs, needs, strict=True) if need]


class _Beside(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, program: str, *inputs: Tensor) -> tuple[Tensor, ...]:
        ctx.program = program
        ctx.save_for_backward(*inputs)
        with torch._C._AutoDispatchBelowAutograd():
            return tuple(torch.ops.moec.experts_beside.default(inputs, program))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        needs = list(ctx.needs_input_grad[1:])
        if not any(needs):
            return (None,) * (1 + len(needs))
        ops.check_trainable(lookup(ctx.program))
        whole = [g.contiguous() for g in grads]
        found = torch.ops.moec.experts_beside_backward.default(whole, ctx.saved_tensors, needs, ctx.program)
        return (None, *ops.spread(found, needs))


def _forward_autograd(inputs: list[Tensor], program: str) -> list[Tensor]:
    if ops.recording(*inputs):
        return list(_Beside.apply(program, *inputs))  # type: ignore[no-untyped-call]
    with torch._C._AutoDispatchBelowAutograd():
        return list(torch.ops.moec.experts_beside.default(inputs, program))


def _backward_autograd(
    keyset: Any, grads: list[Tensor], inputs: list[Tensor], needs: list[bool], program: str
) -> list[Tensor]:
    op = torch.ops.moec.experts_beside_backward.default
    args = (grads, inputs, needs, program)
    return ops.once(op, keyset, args, [*grads, *inputs])


for _name, _impl, _fake, _autograd, _keyset in (
    ("experts_beside", _forward, _forward_fake, _forward_autograd, False),
    ("experts_beside_backward", _backward, _backward_fake, _backward_autograd, True),
):
    _LIB.impl(_name, _impl, "CompositeExplicitAutograd")
    _LIB.impl(_name, _autograd, "Autograd", with_keyset=_keyset)
    torch.library.register_fake(f"moec::{_name}", _fake, lib=_LIB)
