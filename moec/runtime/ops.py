"""The ops that stand in a compiled graph for a lowered program, with their fakes and gradients.

1. ``moec::route`` and ``moec::experts`` carry the key of their program as a string; tensors are the program's flat
   operands. Weights come as they lie in the model: strided views are passed on, nothing is copied or repacked.
2. Autograd saves the inputs alone; ``_backward`` ops recompute what they need and give only the gradients asked for.
3. Kernels run below autograd and with autocast off: what a program casts is written in the program.
4. A fake's sizes are those of its inputs: no guard, no specialisation on the number of tokens.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from moec.ir.core import Value
from moec.ir.errors import MoecError
from moec.ir.opdef import op_def, torch_dtype
from moec.ir.types import TensorType
from moec.runtime import checks, counters, traces
from moec.runtime.programs import Program, lookup

_LIB = torch.library.Library("moec", "DEF")
_TAGS = (torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides)
_LIB.define("route(Tensor[] inputs, str program) -> (Tensor, Tensor)", tags=_TAGS)
_LIB.define("route_backward(Tensor grad, Tensor[] inputs, bool[] needs, str program) -> Tensor[]", tags=_TAGS)
_LIB.define("experts(Tensor x, Tensor ids, Tensor weights, Tensor[] params, str program) -> Tensor", tags=_TAGS)
_LIB.define(
    "experts_backward(Tensor grad, Tensor x, Tensor ids, Tensor weights, Tensor[] params, bool[] needs, str program)"
    " -> Tensor[]",
    tags=_TAGS,
)


class OpError(MoecError):
    """A runtime op was given tensors that do not fit its program, or asked for what it cannot do."""

    code = "runtime-op"


# --- execution ---------------------------------------------------------------------------------------------------


def without_autocast(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """A context without autocast on that kind of device."""
    if torch.is_autocast_enabled(device.type):
        return torch.autocast(device.type, enabled=False)
    return contextlib.nullcontext()


def _alias(a: Tensor, b: Tensor) -> bool:
    return a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr() and a.numel() > 0


def _own(out: Tensor, inputs: Sequence[Tensor]) -> Tensor:
    """``out`` contiguous and sharing no memory with ``inputs``, as the op's schema promises."""
    if not out.is_contiguous():
        return out.contiguous()
    return out.clone() if any(_alias(out, t) for t in inputs) else out


def _route(inputs: list[Tensor], program: str) -> tuple[Tensor, Tensor]:
    prog = lookup(program)
    counters.count("moec::route", prog.label)
    checks.check_logits(inputs[0], prog)
    with without_autocast(inputs[0].device):
        weights, ids = prog.kernel().forward(list(inputs))
    return _own(weights, inputs), _own(ids, inputs)


def _experts(x: Tensor, ids: Tensor, weights: Tensor, params: list[Tensor], program: str) -> Tensor:
    prog = lookup(program)
    counters.count("moec::experts", prog.label)
    traces.note(prog, ids)
    groups = prog.op.groups
    checks.check_same(x, params, 0 if prog.op.group("up_scale") else groups[3] + groups[4], prog)
    if not prog.routed and not prog.op.attrs.get("sentinels"):
        checks.check_ids(ids, prog.op.attrs["experts"], prog)
    with without_autocast(x.device):
        (out,) = prog.kernel().forward([x, ids, weights, *params])
    return out if out.is_contiguous() else out.contiguous()


def _route_backward(grad: Tensor, inputs: list[Tensor], needs: list[bool], program: str) -> list[Tensor]:
    prog = lookup(program)
    counters.count("moec::route_backward", prog.label)
    return gradients(prog, [grad, None], list(inputs), needs)


def _experts_backward(
    grad: Tensor, x: Tensor, ids: Tensor, weights: Tensor, params: list[Tensor], needs: list[bool], program: str
) -> list[Tensor]:
    prog = lookup(program)
    counters.count("moec::experts_backward", prog.label)
    return gradients(prog, [grad], [x, ids, weights, *params], needs)


def gradients(prog: Program, grads: Sequence[Tensor | None], inputs: list[Tensor], needs: list[bool]) -> list[Tensor]:
    """Those that are asked for, each lying as its input does.

    Raises:
        OpError: The kernel gave none, or one of another shape.
    """
    with torch.no_grad(), without_autocast(inputs[0].device):
        found = prog.kernel().backward(grads, inputs, needs)
    return as_inputs_lie(prog, found, inputs, needs)


def as_inputs_lie(
    prog: Program, found: Sequence[Tensor | None], inputs: Sequence[Tensor], needs: Sequence[bool]
) -> list[Tensor]:
    """The gradients that are asked for, of those that a kernel ``found``; each of its input's type and strides.

    Raises:
        OpError: There is none, or one of another shape.
    """
    out = []
    for i, (need, grad, like) in enumerate(zip(needs, found, inputs, strict=True)):
        if not need:
            continue
        if grad is None or grad.shape != like.shape:
            got = "no gradient" if grad is None else f"a gradient of shape {tuple(grad.shape)}"
            raise OpError(f"backend {prog.backend!r} gave {got} for input {i} of shape {tuple(like.shape)}")
        strides = torch.empty_like(like, device="meta").stride()  # no memory: a weight may be large
        if grad.dtype != like.dtype or grad.stride() != strides or _alias(grad, like):
            grad = gradient_like(like).copy_(grad)
        out.append(grad)
    return out


def gradient_like(t: Tensor) -> Tensor:
    """An uninitialised gradient of ``t``. It lies as ``t`` lies: then updating a transposed weight is not strided."""
    return torch.empty_like(t)


# --- fakes -------------------------------------------------------------------------------------------------------


def check_fake(program: str, inputs: Sequence[Tensor]) -> Program:
    """The program, after comparing its types with fake inputs. Symbolic sizes are not looked into: no guards."""
    prog = lookup(program)
    name, args = prog.op.name, prog.graph.args
    if len(inputs) != len(args):
        raise OpError(f"{name} of {checks.block_name(prog)} takes {len(args)} tensors, got {len(inputs)}")
    sizes: dict[Any, int] = {}
    for value, tensor in zip(args, inputs, strict=True):
        assert isinstance(value.type, TensorType)
        fits = tensor.dim() == value.type.rank and tensor.dtype == torch_dtype(value.type.dtype.name)
        for want, got in zip(value.type.shape, tensor.shape, strict=False):
            if isinstance(got, int):
                fits = fits and sizes.setdefault(want, int(want) if want.is_Integer else got) == got
        if not fits:
            want_text = f"{value.type.dtype}[{', '.join(map(str, value.type.shape))}]"
            raise OpError(
                f"{name} of {checks.block_name(prog)}: operand {value!r} must be {want_text}, "
                f"got {tensor.dtype} {list(tensor.shape)}",
                source=prog.op.loc.source or None,
                hint="the program was made for other tensors; compile the model again",
            )
    return prog


def result_dtype(prog: Program, index: int) -> torch.dtype:
    """The element type of one of a program's results."""
    type = prog.op.results[index].type
    assert isinstance(type, TensorType)
    return torch_dtype(type.dtype.name)


def rows_like(values: Sequence[Value], x: Tensor) -> list[Tensor]:
    """Fakes of a program's results, which have a row for each of ``x``."""
    found = []
    for value in values:
        assert isinstance(value.type, TensorType)
        dtype = torch_dtype(value.type.dtype.name)
        found.append(x.new_empty((x.shape[0], int(value.type.shape[1])), dtype=dtype))
    return found


def _route_fake(inputs: list[Tensor], program: str) -> tuple[Tensor, Tensor]:
    prog = check_fake(program, inputs)
    shape = (inputs[0].shape[0], op_def("moe.route").attr(prog.op, "k"))
    return (
        inputs[0].new_empty(shape, dtype=result_dtype(prog, 0)),
        inputs[0].new_empty(shape, dtype=result_dtype(prog, 1)),
    )


def _experts_fake(x: Tensor, ids: Tensor, weights: Tensor, params: list[Tensor], program: str) -> Tensor:
    prog = check_fake(program, [x, ids, weights, *params])
    result = prog.op.result.type
    assert isinstance(result, TensorType)
    width = int(result.shape[1]) if result.shape[1].is_Integer else x.shape[1]
    return x.new_empty((x.shape[0], width), dtype=result_dtype(prog, 0))


def _route_backward_fake(grad: Tensor, inputs: list[Tensor], needs: list[bool], program: str) -> list[Tensor]:
    return [gradient_like(t) for t, need in zip(inputs, needs, strict=True) if need]


def _experts_backward_fake(
    grad: Tensor, x: Tensor, ids: Tensor, weights: Tensor, params: list[Tensor], needs: list[bool], program: str
) -> list[Tensor]:
    return [gradient_like(t) for t, need in zip([x, ids, weights, *params], needs, strict=True) if need]


# --- autograd ----------------------------------------------------------------------------------------------------


def check_trainable(prog: Program) -> None:
    """Refuse a gradient of a backend that has none.

    Raises:
        OpError: It has none.
    """
    from moec.backends.registry import get_backend

    if not get_backend(prog.backend).trainable:
        raise OpError(
            f"{checks.block_name(prog)} runs on backend {prog.backend!r}, which has no gradients",
            hint="train with the backend 'aten', or run under torch.no_grad()",
        )


def spread(grads: list[Tensor], needs: Sequence[bool]) -> list[Tensor | None]:
    """Gradients at the places that need one, None elsewhere."""
    found = iter(grads)
    return [next(found) if need else None for need in needs]


def backward_of_experts(
    grad: Tensor | None, inputs: Sequence[Tensor], needs: list[bool], program: str
) -> Sequence[Tensor | None]:
    """The gradients of ``moec::experts``: of x, ids, weights and params, as far as they are needed."""
    frozen = _frozen(program)
    needs = [n and i not in frozen for i, n in enumerate(needs)]
    if grad is None or not any(needs):
        return (None,) * len(needs)
    check_trainable(lookup(program))
    x, ids, weights, *params = inputs
    return spread(torch.ops.moec.experts_backward.default(grad, x, ids, weights, params, needs, program), needs)


class _Route(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, program: str, *inputs: Tensor) -> tuple[Tensor, Tensor]:
        ctx.program = program
        ctx.save_for_backward(*inputs)
        ctx.set_materialize_grads(False)
        with torch._C._AutoDispatchBelowAutograd():
            weights, ids = torch.ops.moec.route.default(inputs, program)
        ctx.mark_non_differentiable(ids)
        return weights, ids

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, _ids: Any) -> tuple[Tensor | None, ...]:
        needs = list(ctx.needs_input_grad[1:])
        if grad is None or not any(needs):
            return (None,) * (1 + len(needs))
        check_trainable(lookup(ctx.program))
        grads = torch.ops.moec.route_backward.default(grad, ctx.saved_tensors, needs, ctx.program)
        return (None, *spread(grads, needs))


def _frozen(program: str) -> frozenset[int]:
    """The operands of a layer that have no gradient, whatever is asked: weights in fp8, and their scales."""
    op = lookup(program).op
    if not op.group("up_scale"):
        return frozenset()
    fixed = {v for name in ("up", "down", "up_scale", "down_scale") for v in op.group(name)}
    return frozenset(i for i, v in enumerate(op.operands) if v in fixed)


class _Experts(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, program: str, x: Tensor, ids: Tensor, weights: Tensor, *params: Tensor) -> Tensor:
        ctx.program = program
        ctx.save_for_backward(x, ids, weights, *params)
        ctx.set_materialize_grads(False)
        with torch._C._AutoDispatchBelowAutograd():
            out: Tensor = torch.ops.moec.experts.default(x, ids, weights, params, program)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, ...]:
        return (None, *backward_of_experts(grad, ctx.saved_tensors, list(ctx.needs_input_grad[1:]), ctx.program))


class _Once(torch.autograd.Function):
    """Runs a backward op while a graph of the gradient is being recorded; that graph ends here."""

    @staticmethod
    def forward(ctx: Any, call: Callable[[], list[Tensor]], *_tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(call())

    @staticmethod
    def backward(ctx: Any, *_grads: Any) -> Any:
        raise OpError(
            "gradients of gradients through moec's MoE ops are not available",
            hint="run the model without moec where a second derivative is needed",
        )


def recording(*tensors: Tensor) -> bool:
    """Whether autograd records what is done to these."""
    return torch.is_grad_enabled() and any(t.requires_grad for t in tensors)


def _route_autograd(inputs: list[Tensor], program: str) -> tuple[Tensor, Tensor]:
    if recording(*inputs):
        return _Route.apply(program, *inputs)  # type: ignore[no-untyped-call]
    with torch._C._AutoDispatchBelowAutograd():
        return torch.ops.moec.route.default(inputs, program)


def _experts_autograd(x: Tensor, ids: Tensor, weights: Tensor, params: list[Tensor], program: str) -> Tensor:
    if recording(x, weights, *params):
        return _Experts.apply(program, x, ids, weights, *params)  # type: ignore[no-untyped-call]
    with torch._C._AutoDispatchBelowAutograd():
        return torch.ops.moec.experts.default(x, ids, weights, params, program)


def once(op: Any, keyset: Any, args: Sequence[Any], tensors: Sequence[Tensor]) -> list[Tensor]:
    """Run a backward op below autograd; where its gradient would be recorded, the graph of that ends here."""

    def call() -> list[Tensor]:
        # The keys alone are taken away, not excluded for the thread: the kernel differentiates a region with autograd.
        return list(op.redispatch(keyset & torch._C._after_autograd_keyset, *args))

    return list(_Once.apply(call, *tensors)) if recording(*tensors) else call()  # type: ignore[no-untyped-call]


def _route_backward_autograd(
    keyset: Any, grad: Tensor, inputs: list[Tensor], needs: list[bool], program: str
) -> list[Tensor]:
    op = torch.ops.moec.route_backward.default
    return once(op, keyset, (grad, inputs, needs, program), [grad, *inputs])


def _experts_backward_autograd(
    keyset: Any,
    grad: Tensor,
    x: Tensor,
    ids: Tensor,
    weights: Tensor,
    params: list[Tensor],
    needs: list[bool],
    program: str,
) -> list[Tensor]:
    op = torch.ops.moec.experts_backward.default
    args = (grad, x, ids, weights, params, needs, program)
    return once(op, keyset, args, [grad, x, weights, *params])


for _name, _impl, _fake, _autograd, _keyset in (
    ("route", _route, _route_fake, _route_autograd, False),
    ("experts", _experts, _experts_fake, _experts_autograd, False),
    ("route_backward", _route_backward, _route_backward_fake, _route_backward_autograd, True),
    ("experts_backward", _experts_backward, _experts_backward_fake, _experts_backward_autograd, True),
):
    _LIB.impl(_name, _impl, "CompositeExplicitAutograd")
    _LIB.impl(_name, _autograd, "Autograd", with_keyset=_keyset)
    torch.library.register_fake(f"moec::{_name}", _fake, lib=_LIB)
