"""Layers in pieces: ops that begin a layer, run it on, and give its result, for graphs that run without gradients.

What a layer has under way (rows that travel, plans) is no tensor. It is kept here under a number, and that number is
what the ops hand on: so they stay in their order, whatever compiles the graph.
"""

from __future__ import annotations

import itertools
import threading

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from moec.backends.distributed.kernel import ParallelKernel
from moec.ir.staged import Staged
from moec.runtime import checks, counters, ops, traces
from moec.runtime.programs import lookup

_LIB = torch.library.Library("moec", "FRAGMENT")
_TAGS = (torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides)
_LIB.define("begin_layer(Tensor[] inputs, str program) -> Tensor", tags=_TAGS)
_LIB.define("resume_layer(Tensor layer) -> Tensor", tags=_TAGS)
_LIB.define("end_layer(Tensor layer, Tensor x, int[] widths, ScalarType[] dtypes) -> Tensor[]", tags=_TAGS)

_LOCK = threading.Lock()
_NUMBERS = itertools.count()
_UNDER_WAY: dict[int, Staged] = {}


def under_way() -> int:
    """Layers that were begun and are not at their end."""
    return len(_UNDER_WAY)


def _number(staged: Staged) -> Tensor:
    with _LOCK:
        number = next(_NUMBERS)
        _UNDER_WAY[number] = staged
    return torch.tensor(number, dtype=torch.int64)


def _taken(layer: Tensor) -> Staged:
    with _LOCK:
        found = _UNDER_WAY.pop(int(layer), None)
    if found is None:
        raise ops.OpError(
            f"layer {int(layer)} is not under way",
            hint="what a layer in pieces hands on is used once; run the graph as it was compiled",
        )
    return found


def _begin(inputs: list[Tensor], program: str) -> Tensor:
    prog = lookup(program)
    counters.count("moec::begin_layer", prog.label)
    x, ids, groups = inputs[0], inputs[1], prog.op.groups
    traces.note(prog, ids)
    checks.check_same(x, inputs[3:], groups[3] + groups[4], prog)
    if not prog.op.attrs.get("sentinels"):
        checks.check_ids(ids, prog.op.attrs["experts"], prog)
    kernel = prog.kernel()
    assert isinstance(kernel, ParallelKernel)
    with torch.no_grad(), ops.without_autocast(x.device):
        return _number(kernel.begin(list(inputs)))


def _resume(layer: Tensor) -> Tensor:
    staged = _taken(layer)
    with torch.no_grad():
        if staged.go_on() is not None:
            raise ops.OpError("the layer is at its end, and its results are not asked for here")
        return _number(staged)


def _end(layer: Tensor, x: Tensor, widths: list[int], dtypes: list[torch.dtype]) -> list[Tensor]:
    staged = _taken(layer)
    with torch.no_grad(), ops.without_autocast(x.device):
        found = staged.go_on()
    if found is None:
        raise ops.OpError("the layer has rows under way still, and its results are asked for")
    return [t.contiguous() for t in found]


def _begin_fake(inputs: list[Tensor], program: str) -> Tensor:
    return torch.empty((), dtype=torch.int64)


def _resume_fake(layer: Tensor) -> Tensor:
    return torch.empty((), dtype=torch.int64)


def _end_fake(layer: Tensor, x: Tensor, widths: list[int], dtypes: list[torch.dtype]) -> list[Tensor]:
    return [x.new_empty((x.shape[0], width), dtype=dtype) for width, dtype in zip(widths, dtypes, strict=True)]


def _begin_autograd(inputs: list[Tensor], program: str) -> Tensor:
    if ops.recording(*inputs) and not any(isinstance(t, FakeTensor) for t in inputs):  # where it runs, not where made
        raise ops.OpError(
            "a layer in pieces has no gradients",
            hint="run it under torch.no_grad(), or leave interleave-layers out of the passes",
        )
    with torch._C._AutoDispatchBelowAutograd():
        found: Tensor = torch.ops.moec.begin_layer.default(inputs, program)
        return found


for _name, _impl, _fake in (
    ("begin_layer", _begin, _begin_fake),
    ("resume_layer", _resume, _resume_fake),
    ("end_layer", _end, _end_fake),
):
    _LIB.impl(_name, _impl, "CompositeExplicitAutograd")
    torch.library.register_fake(f"moec::{_name}", _fake, lib=_LIB)
_LIB.impl("begin_layer", _begin_autograd, "Autograd")
