"""Nothing waits for the device, and no grid depends on data: layers run on fake tensors of a GPU, launches recorded.

A fake tensor has no values: whoever wants one (``item``, ``tolist``, a size that depends on data) is told that there is
none. What ops there are must stay on the GPU.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from moec.backends.aten import ExpertsKernel as AtenExperts
from moec.backends.base import Kernel, program_op
from moec.backends.triton import backward as backward_module
from moec.backends.triton import kernel as kernel_module
from moec.backends.triton import launcher as launcher_module
from moec.backends.triton.kernel import TritonExperts
from moec.backends.triton.kernels.route import read_router
from moec.backends.triton.route import TritonRoute
from moec.backends.triton.spec import read_spec
from tests.backends.cases import ExpertsCase, route_graph
from tests.backends.triton.layers import LAUNCHES

pytestmark = pytest.mark.usefixtures("interpreter")
Launches = list[tuple[str, tuple[int, ...]]]


class OnDevice(TorchDispatchMode):
    """Refuses values of tensors, and results on another device."""

    def __init__(self, device: str = "cuda") -> None:
        super().__init__()
        self.device = device

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func is not torch.ops.aten._local_scalar_dense.default, "a value is read"
        out = func(*args, **(kwargs or {}))
        for t in out if isinstance(out, (list, tuple)) else [out]:
            assert not isinstance(t, Tensor) or t.device.type == self.device, f"{func} gives a tensor on {t.device}"
        return out


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> Iterator[Launches]:
    """Names and grids of the kernels that would be launched."""
    found: Launches = []

    class Recorder:
        def __init__(self, name: str) -> None:
            self.name = name

        def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
            return lambda *a, **k: found.append((self.name, grid))

    class Module:
        def __getattr__(self, name: str) -> Recorder:
            return Recorder(name)

    monkeypatch.setattr(launcher_module, "load_module", lambda text: Module())
    monkeypatch.setattr(kernel_module, "target_of", lambda device: "cuda:sm90")
    caches = (kernel_module.launcher, backward_module._launcher)
    for cache in caches:
        cache.cache_clear()
    yield found
    for cache in caches:
        cache.cache_clear()


def _run(kernel: Kernel, inputs: list[Tensor]) -> list[Tensor]:
    with FakeTensorMode():
        fakes = [torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device="cuda") for t in inputs]
        with OnDevice():
            return kernel.forward(fakes)


CASES = [
    ExpertsCase("interleaved", bias=True, sentinels=True, dtype="bf16"),
    ExpertsCase("rows", "kn", "kn", captures=True, post=True),
]


@pytest.mark.parametrize("launch", LAUNCHES)
@pytest.mark.parametrize("tokens", [1, 33, 1000])
def test_a_layer_does_not_wait(launch: str, tokens: int, launches: Launches, monkeypatch: pytest.MonkeyPatch) -> None:
    if launch == "descriptors":
        pytest.skip("an address is asked for, and fake tensors have none")
    monkeypatch.setattr(kernel_module, "choose", lambda *a: LAUNCHES[launch])
    for case in (*CASES, ExpertsCase(dtype="bf16", fp8=True)):
        op = program_op(case.graph())
        (out,) = _run(TritonExperts(op, read_spec(op), "cuda:sm90"), case.inputs(tokens))
        assert out.shape == (tokens, case.hidden)
    assert launches
    assert all(isinstance(n, int) and n > 0 for _, grid in launches for n in grid)


@pytest.mark.parametrize("case", CASES, ids=["interleaved", "rows"])
def test_gradients_do_not_wait(case: ExpertsCase, launches: Launches) -> None:
    """On fake tensors of the CPU: a slice asks for a guard of the device, which a PyTorch without CUDA lacks."""
    op = program_op(case.graph())
    kernel, inputs = TritonExperts(op, read_spec(op), "cuda:sm90"), case.inputs(33)
    needs = [t.is_floating_point() for t in inputs]
    with FakeTensorMode():
        fakes = [torch.empty_strided(t.shape, t.stride(), dtype=t.dtype) for t in inputs]
        with OnDevice("cpu"), torch.no_grad():
            found = kernel.backward([torch.empty_like(fakes[0])], fakes, needs)
    assert [g is not None for g in found] == needs
    assert {"rows_product", "rows_sums"} <= {name for name, _ in launches}


def test_aten_waits() -> None:
    """The same test tells what waits."""
    case = CASES[0]
    with pytest.raises(Exception, match=r"data|dynamic|fake|meta|value"):
        _run(AtenExperts(program_op(case.graph())), case.inputs(33))


def test_a_router_does_not_wait(launches: Launches) -> None:
    graph = route_graph(
        8, bias=True, k=2, scoring="sigmoid", groups=4, top_groups=2, group_score="top2_sum", group_fill=0.0,
        renormalize=True,
    )  # fmt: skip
    kernel = TritonRoute(graph, read_router(program_op(graph)))
    weights, ids = _run(kernel, [torch.randn(33, 8), torch.randn(8)])
    assert (weights.shape, ids.shape) == ((33, 2), (33, 2))
    assert launches == [("route", (3,))]
