"""The ops of a compiled graph wait for nothing: their checks, their kernels and their gradients, as a CUDA graph asks.

Fake tensors of a GPU have no values; what reads one fails (see ``test_triton_no_wait.py``, whose guards these are).
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from moec.backends.base import program_op
from moec.backends.triton.kernel import TritonExperts
from moec.backends.triton.spec import read_spec
from moec.runtime import ops
from moec.runtime.programs import Program, register
from tests.backends.cases import ExpertsCase, route_graph
from tests.backends.triton.test_triton_no_wait import Launches, OnDevice, launches

__all__ = ["launches"]
pytestmark = pytest.mark.usefixtures("interpreter")
CHECKED = {"aten::_assert_async.msg"}


class Noting(OnDevice):
    """Names of the ops that ran, too. What is asked of sizes alone may be on no device."""

    def __init__(self, device: str) -> None:
        super().__init__(device)
        self.ran: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.ran.add(func.name())
        if (kwargs or {}).get("device") == torch.device("meta"):
            return func(*args, **(kwargs or {}))
        return super().__torch_dispatch__(func, types, args, kwargs)


def _fakes(inputs: list[Tensor], device: str) -> list[Tensor]:
    return [torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device=device) for t in inputs]


def _layer(checks: str = "strict") -> tuple[Program, ExpertsCase]:
    case = ExpertsCase("interleaved", bias=True, dtype="bf16")
    return register(case.graph(), "triton", "cuda:sm90", "a.layer", checks), case


@pytest.mark.parametrize("tokens", [1, 33, 1000])
def test_an_experts_op_does_not_wait(tokens: int, launches: Launches) -> None:
    program, case = _layer()
    grids = []
    for _ in range(2):
        launches.clear()
        real = case.inputs(tokens)
        with FakeTensorMode():
            x, ids, weights, *params = _fakes(real, "cuda")
            with Noting("cuda") as mode:
                out = ops._experts(x, ids, weights, params, program.key)
        assert (out.shape, out.device.type) == ((tokens, case.hidden), "cuda")
        assert mode.ran >= CHECKED  # an id out of range is found by the device
        grids.append(list(launches))
    assert grids[0] == grids[1] != []


def test_a_route_op_does_not_wait(launches: Launches) -> None:
    program = register(route_graph(8, k=2, renormalize=True), "triton", "cuda:sm90", "a.router", "strict")
    logits = torch.randn(33, 8)
    with FakeTensorMode():
        fakes = _fakes([logits], "cpu")  # a PyTorch without CUDA has no isnan of its tensors
        with Noting("cpu") as mode:
            weights, ids = ops._route(fakes, program.key)
    assert (weights.shape, ids.shape) == ((33, 2), (33, 2))
    assert mode.ran >= CHECKED  # NaN
    assert [name for name, _ in launches] == ["route"]


def test_gradients_of_an_experts_op_do_not_wait(launches: Launches) -> None:
    """On fake tensors of the CPU, as in the test of the kernel's own gradients."""
    program, case = _layer()
    real = case.inputs(33)
    with FakeTensorMode():
        x, ids, weights, *params = given = _fakes(real, "cpu")
        needs = [t.is_floating_point() for t in given]
        with Noting("cpu"):
            found = ops._experts_backward(torch.empty_like(x), x, ids, weights, params, needs, program.key)
    assert [g.shape for g in found] == [t.shape for t, need in zip(given, needs, strict=True) if need]
    assert {"rows_product", "rows_sums"} <= {name for name, _ in launches}


def test_a_backend_that_waits_is_caught() -> None:
    case = ExpertsCase("interleaved", bias=True, dtype="bf16")
    program = register(case.graph(), "aten", "cuda:sm90", "a.layer", "strict")
    real = case.inputs(33)
    with FakeTensorMode():
        x, ids, weights, *params = _fakes(real, "cuda")
        with Noting("cuda"), pytest.raises(Exception, match=r"data|dynamic|fake|meta|value"):
            ops._experts(x, ids, weights, params, program.key)


def test_addresses_of_equal_layers_are_sent_once() -> None:
    """A copy from the host while a CUDA graph is captured would read memory that is gone when it is replayed."""
    case = ExpertsCase("separate", stacked=False)
    op = program_op(case.graph())
    kernel = TritonExperts(op, read_spec(op), "cpu")
    layers = [case.inputs(3) for _ in range(20)]
    for given in layers:
        kernel.forward(given)
    sent = dict(kernel.tables)
    assert len(sent) == 3 * len(layers)  # gate, up and down
    for given in layers:
        kernel.forward(given)
    assert all(kernel.tables[key] is table for key, table in sent.items())
