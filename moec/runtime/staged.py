"""Layers in pieces: ops that begin a layer or its gradients, run it on, and give its results.

What a layer has under way (rows that travel, plans) is no tensor. It is kept here under a number, and that number is
what the ops hand on: so the ops of one layer stay in their order, whatever compiles the graph. ``after`` is a result of
the op before in the order that was chosen: with it those of all layers do. The end takes what the layer was begun with
once more, so that no compiler gives that memory to others before.

None of the ops has gradients. Where a graph is trained they stand in the two graphs that autograd made of it.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from moec.backends.distributed.kernel import ParallelKernel
from moec.ir.staged import Staged
from moec.runtime import checks, counters, ops, traces
from moec.runtime.programs import Program, lookup

_LIB = torch.library.Library("moec", "FRAGMENT")
_TAGS = (torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides)
_LIB.define("begin_layer(Tensor[] inputs, str program, Tensor? after=None) -> Tensor", tags=_TAGS)
_LIB.define(
    "begin_gradients(Tensor[] grads, Tensor[] inputs, bool[] needs, str program, Tensor? after=None) -> Tensor",
    tags=_TAGS,
)
_LIB.define("resume_layer(Tensor layer, Tensor? after=None) -> Tensor", tags=_TAGS)
_LIB.define("end_layer(Tensor layer, Tensor[] inputs, str program, Tensor? after=None) -> Tensor[]", tags=_TAGS)
_LIB.define(
    "end_gradients(Tensor layer, Tensor[] grads, Tensor[] inputs, bool[] needs, str program, Tensor? after=None)"
    " -> Tensor[]",
    tags=_TAGS,
)


@dataclass(frozen=True)
class _UnderWay:
    """A layer that was begun.

    Attributes:
        run: Its run, as far as it has come.
        device: Of its tensors.
        lies: Where what it was begun with lies in memory.
    """

    run: Staged
    device: torch.device
    lies: tuple[int, ...]


_LOCK = threading.Lock()
_NUMBERS = itertools.count()
_UNDER_WAY: dict[int, _UnderWay] = {}


def under_way() -> int:
    """Layers that were begun and are not at their end."""
    return len(_UNDER_WAY)


def keep(run: Staged, given: Sequence[Tensor]) -> Tensor:
    """The number of a layer that was begun with these tensors."""
    return _number(_UnderWay(run, given[0].device, _lie(given)))


def _lie(given: Sequence[Tensor]) -> tuple[int, ...]:
    return tuple(t.data_ptr() for t in given)


def _number(layer: _UnderWay) -> Tensor:
    with _LOCK:
        number = next(_NUMBERS)
        _UNDER_WAY[number] = layer
    return torch.tensor(number, dtype=torch.int64)


def _run_on(layer: Tensor, given: Sequence[Tensor] | None = None) -> tuple[_UnderWay, list[Any] | None]:
    """Run a layer to its next wait; its results if it has come to its end.

    Raises:
        OpError: It is not under way, or what it was begun with may have been written over.
    """
    with _LOCK:
        found = _UNDER_WAY.pop(int(layer), None)
    if found is None:
        raise ops.OpError(
            f"layer {int(layer)} is not under way",
            hint="what a layer in pieces hands on is used once; run the graph as it was compiled",
        )
    if given is not None and _lie(given) != found.lies:
        raise ops.OpError(
            "the memory that a layer in pieces was begun with was given away before its end",
            hint="the compiler around it copied an operand; leave interleave out of the plan",
        )
    with torch.no_grad(), ops.without_autocast(found.device):
        return found, found.run.go_on()


def _kernel(prog: Program) -> ParallelKernel:
    kernel = prog.kernel()
    assert isinstance(kernel, ParallelKernel)
    return kernel


def _begin(inputs: list[Tensor], program: str, after: Tensor | None = None) -> Tensor:
    prog = lookup(program)
    counters.count("moec::begin_layer", prog.label)
    x, ids, groups = inputs[0], inputs[1], prog.op.groups
    traces.note(prog, ids)
    checks.check_same(x, inputs[3:], groups[3] + groups[4], prog)
    if not prog.op.attrs.get("sentinels"):
        checks.check_ids(ids, prog.op.attrs["experts"], prog)
    with torch.no_grad(), ops.without_autocast(x.device):
        return keep(_kernel(prog).begin(list(inputs)), inputs)


def _begin_gradients(
    grads: list[Tensor], inputs: list[Tensor], needs: list[bool], program: str, after: Tensor | None = None
) -> Tensor:
    prog = lookup(program)
    counters.count("moec::begin_gradients", prog.label)
    with torch.no_grad(), ops.without_autocast(inputs[0].device):
        return keep(_kernel(prog).begin_backward(list(grads), list(inputs), needs), [*inputs, *grads])


def _resume(layer: Tensor, after: Tensor | None = None) -> Tensor:
    found, results = _run_on(layer)
    if results is not None:
        raise ops.OpError("the layer is at its end, and its results are not asked for here")
    return _number(found)


def _results(layer: Tensor, given: Sequence[Tensor]) -> list[Tensor]:
    _, results = _run_on(layer, given)
    if results is None:
        raise ops.OpError("the layer has rows under way still, and its results are asked for")
    return results


def _end(layer: Tensor, inputs: list[Tensor], program: str, after: Tensor | None = None) -> list[Tensor]:
    return [t.contiguous() for t in _results(layer, inputs)]


def _end_gradients(
    layer: Tensor, grads: list[Tensor], inputs: list[Tensor], needs: list[bool], program: str,
    after: Tensor | None = None,
) -> list[Tensor]:  # fmt: skip
    found = _results(layer, [*inputs, *grads])
    return ops.as_inputs_lie(lookup(program), ops.spread(found, needs), inputs, needs)


def _number_fake(*_args: Any, **_kwargs: Any) -> Tensor:
    return torch.empty((), dtype=torch.int64)


def _end_fake(layer: Tensor, inputs: list[Tensor], program: str, after: Tensor | None = None) -> list[Tensor]:
    return ops.rows_like(ops.check_fake(program, inputs).op.regions[0].outputs, inputs[0])


def _end_gradients_fake(
    layer: Tensor, grads: list[Tensor], inputs: list[Tensor], needs: list[bool], program: str,
    after: Tensor | None = None,
) -> list[Tensor]:  # fmt: skip
    return [ops.gradient_like(t) for t, need in zip(inputs, needs, strict=True) if need]


def _begin_autograd(inputs: list[Tensor], program: str, after: Tensor | None = None) -> Tensor:
    if ops.recording(*inputs) and not any(isinstance(t, FakeTensor) for t in inputs):  # where it runs, not where made
        raise ops.OpError(
            "a layer in pieces has no gradients",
            hint="run it under torch.no_grad(), or leave interleave-layers out of the passes",
        )
    with torch._C._AutoDispatchBelowAutograd():
        found: Tensor = torch.ops.moec.begin_layer.default(inputs, program, after)
        return found


_OPS: tuple[tuple[str, Callable[..., Any], Callable[..., Any]], ...] = (
    ("begin_layer", _begin, _number_fake),
    ("begin_gradients", _begin_gradients, _number_fake),
    ("resume_layer", _resume, _number_fake),
    ("end_layer", _end, _end_fake),
    ("end_gradients", _end_gradients, _end_gradients_fake),
)
for _name, _impl, _fake in _OPS:
    _LIB.impl(_name, _impl, "CompositeExplicitAutograd")
    torch.library.register_fake(f"moec::{_name}", _fake, lib=_LIB)
_LIB.impl("begin_layer", _begin_autograd, "Autograd")
