"""Every kernel of the triton backend on the GPU that is here, against the reference on the CPU.

Layers are small: what takes time is compiling, a minute or some. Each runs in every form that kernels are launched in,
so that no kernel is left out; one more run takes what the model of times chooses.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from moec.backends.base import Kernel, program_op
from moec.backends.reference import run_graph
from moec.backends.registry import get_backend
from moec.backends.triton.fp8 import refusal
from moec.backends.triton.kernel import TritonExperts
from moec.backends.triton.kernels.route import read_router
from moec.backends.triton.launcher import target_of
from moec.backends.triton.launches.tiles import Launch, Tile
from moec.backends.triton.module import check_interpreter, interpreted, present
from moec.backends.triton.route import TritonRoute
from moec.backends.triton.spec import Spec, read_spec
from moec.ir.core import Op
from moec.ir.errors import MoecError
from moec.ir.parser import parse_graph
from moec.ir.scaled_semantics import SCALED
from moec.ir.types import TensorType
from moec.selfcheck_layers import EXPERTS, LAYERS, ROUTERS, TOP_K

DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}
LOG = logging.getLogger("moec.triton")
LIMITS = {"f32": 1e-5, "bf16": 2e-2, "f16": 4e-3}
"""Of the largest difference over the largest result: sums in another order, and roundings of the type between GEMMs."""
BACKWARD_LIMITS = {"f32": 1e-4, "bf16": 6e-2}
"""The same of gradients: sums over the rows of an expert, of values that were rounded once more."""
REPEATS = 5


class SelfCheckError(MoecError):
    """There is nothing to check kernels on, or some are wrong."""

    code = "selfcheck"


@dataclass(frozen=True)
class Row:
    """One comparison.

    Attributes:
        what: The kernels' form.
        layer: Activation and layout of the layer.
        error: Largest difference over the largest result of the reference; infinite where a kernel failed.
        limit: What it may be.
        seconds: Of a call.
        failure: What a kernel that failed said.
        left: Why there is nothing to compare: the device has no kernels for the layer.
    """

    what: str
    layer: str
    dtype: str
    tokens: int
    error: float
    limit: float
    seconds: float
    failure: str = ""
    left: str = ""

    @property
    def ok(self) -> bool:
        """The kernels agree with the reference, or there are none."""
        return self.error <= self.limit


def selfcheck(tell: Callable[[Row], None] = lambda row: None) -> list[Row]:
    """Compare all kernels with the reference.

    Args:
        tell: Hears every row when it is there.

    Raises:
        SelfCheckError: There is no GPU, and Triton does not interpret either.
    """
    device = device_here()
    rows = []
    for check in (_routers, _layers, _gradients):
        for row in check(device):
            tell(row)
            rows.append(row)
    return rows


def device_here() -> torch.device:
    """Where kernels are checked.

    Raises:
        SelfCheckError: Nowhere.
    """
    if not present():
        raise SelfCheckError("Triton is not installed", hint="pip install 'moec[triton]'")
    if interpreted():
        check_interpreter()
        return torch.device("cpu")
    if torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    raise SelfCheckError(
        "PyTorch sees no GPU on this machine",
        hint="TRITON_INTERPRET=1 moec selfcheck --target cuda checks the kernels in Triton's interpreter, slowly",
    )


def _layers(device: torch.device) -> Iterator[Row]:
    small = device.type == "cpu"
    hidden, inner = (24, 20) if small else (256, 384)
    for number, (layer, described) in enumerate(LAYERS.items()):
        for dtype in DTYPES if number == 0 else DTYPES.keys() & {"bf16"}:  # what is compiled takes most of the time
            if described.fp8 and (why := refusal(str(device), "")):
                yield Row("none", layer, dtype, 0, 0.0, LIMITS[dtype], 0.0, left=why)
                continue
            graph = parse_graph(described.text(dtype, hidden, inner))
            op = program_op(graph)
            for tokens in (5,) if small else (1, 5, 130, 1024):
                given = made_up(op, tokens)
                (want,) = run_graph(graph, given)
                for form, launch in forms(device, described.fp8).items():
                    kernel = Forced(op, read_spec(op), target_of(device) or "cpu", launch)
                    yield _row(form, layer, dtype, tokens, kernel, given, want, device)


def _gradients(device: torch.device) -> Iterator[Row]:
    tokens, (hidden, inner) = (5, (24, 20)) if device.type == "cpu" else (130, (256, 384))
    for layer, described in LAYERS.items():
        if described.fp8:
            continue  # weights in fp8 are frozen, and what gradients there are is no kernel's
        for dtype in sorted(DTYPES.keys() & BACKWARD_LIMITS):
            graph = parse_graph(described.text(dtype, hidden, inner))
            op = program_op(graph)
            given = made_up(op, tokens)
            grad = torch.randn(tokens, hidden, generator=_generator()).to(DTYPES[dtype])
            reference = get_backend("reference")
            whole = _Gradients(reference.load(reference.lower(graph, "cpu")), grad)
            (want,) = whole.forward(given)
            kernel = _Gradients(TritonExperts(op, read_spec(op), target_of(device) or "cpu"), grad, whole.scales)
            yield _row("backward", layer, dtype, tokens, kernel, given, want, device, BACKWARD_LIMITS[dtype])


class _Gradients(Kernel):
    """All gradients of a layer in one row, each over the largest of the reference's."""

    def __init__(self, kernel: Kernel, grad: Tensor, scales: list[float] | None = None) -> None:
        self.kernel, self.grad, self.scales = kernel, grad, scales or []

    def forward(self, inputs: list[Tensor]) -> list[Tensor]:
        needs = [t.is_floating_point() for t in inputs]
        found = self.kernel.backward([self.grad.to(inputs[0].device)], inputs, needs)
        made = [g.float().flatten() for g in found if g is not None]
        self.scales = self.scales or [max(float(g.abs().max()), 1e-6) for g in made]
        return [torch.cat([g / scale for g, scale in zip(made, self.scales, strict=True)])]


def forms(device: torch.device, fp8: bool = False) -> dict[str, Launch | None]:
    """The forms that kernels are launched in; None is what the model of times chooses.

    Args:
        device: Where they run.
        fp8: Weights have scales: a tile takes the inputs that share one.
    """
    tile = Tile(16, 32, 32, 2, num_stages=2) if device.type == "cpu" else Tile(64, 64, 64, 4)
    tile = replace(tile, block_k=SCALED) if fp8 else tile
    whole = Launch("gemm", tile, tile)
    vector = replace(tile, block_m=1, block_n=16)
    described = replace(tile, tma=True)
    tall = replace(described, units=2)
    halves = {"tiles, both halves": Launch("gemm", tall, replace(tall, halves=True))}
    return {
        "chosen": None,
        "tiles": whole,
        "tiles, persistent": replace(whole, programs=3),
        "tiles, descriptors": Launch("gemm", described, described),
        "tiles, several heights": Launch("gemm", replace(tile, units=3), replace(tile, units=3)),
        "tiles, split sums": Launch("gemm", tile, replace(tile, split_k=2)),
        "tiles, atomic sums": replace(whole, atomic=True),
        "vectors": Launch("gemv", vector, vector),
        **(halves if fp8 and device.type != "cpu" else {}),  # the layers for a CPU are too narrow
    }


class Forced(TritonExperts):
    """A layer that is launched as it is told."""

    def __init__(self, op: Op, spec: Spec, target: str, forced: Launch | None) -> None:
        super().__init__(op, spec, target)
        self.forced = forced

    def launch(self, spec: Spec, tokens: int, device: torch.device) -> Launch:
        return self.forced or super().launch(spec, tokens, device)


def _routers(device: torch.device) -> Iterator[Row]:
    for name, attributes in ROUTERS.items():
        graph = parse_graph(
            f"graph @route(%logits: f32[T, {EXPERTS}]) -> (f32[T, {TOP_K}], i64[T, {TOP_K}]) {{\n"
            f"  %w, %ids = moe.route %logits {{{attributes}}} : f32[T, {TOP_K}], i64[T, {TOP_K}]\n"
            "  return %w, %ids\n}"
        )
        for tokens in (1, 130):
            given = [torch.randn(tokens, EXPERTS, generator=_generator())]
            weights, ids = run_graph(graph, given)
            want = torch.zeros(tokens, EXPERTS).scatter(1, ids, weights)
            kernel = _Dense(TritonRoute(graph, read_router(program_op(graph))))
            yield _row("router", name, "f32", tokens, kernel, given, want, device)


class _Dense(Kernel):
    """A router's weights by expert: whatever the order of its choices."""

    def __init__(self, route: TritonRoute) -> None:
        self.route = route

    def forward(self, inputs: list[Tensor]) -> list[Tensor]:
        weights, ids = self.route.forward(inputs)
        return [torch.zeros_like(inputs[0]).scatter(1, ids, weights)]


def _row(
    what: str, layer: str, dtype: str, tokens: int, kernel: Kernel, given: list[Tensor], want: Tensor,
    device: torch.device, limit: float = 0.0,
) -> Row:  # fmt: skip
    limit = limit or LIMITS[dtype]
    there = [t.to(device) for t in given]
    try:
        (got,) = kernel.forward(there)
        seconds = seconds_of(lambda: kernel.forward(there), device)
        scale = max(float(want.float().abs().max()), 1e-6)
        error = float((got.cpu().float() - want.float()).abs().max()) / scale
        error = error if error == error else float("inf")
    except Exception as failure:  # noqa: BLE001  (whatever a driver or compiler raises is told in its row)
        first = (str(failure).strip().splitlines() or [type(failure).__name__])[0]
        return Row(what, layer, dtype, tokens, float("inf"), limit, 0.0, f"{type(failure).__name__}: {first}")
    return Row(what, layer, dtype, tokens, error, limit, seconds)


def timer(op: Op, tokens: int, device: torch.device) -> Callable[[Launch], float]:
    """Seconds of a layer on made-up inputs, launched as one is told; infinite where it cannot be."""
    given = [t.to(device) for t in made_up(op, tokens)]

    def seconds(launch: Launch) -> float:
        kernel = Forced(op, read_spec(op), target_of(device) or "cpu", launch)
        try:
            kernel.forward(given)
            return seconds_of(lambda: kernel.forward(given), device)
        except Exception as refused:  # noqa: BLE001 - whatever a compiler or a driver raises: it is not the fastest
            LOG.warning("launch %s does not run: %s: %s", launch, type(refused).__name__, refused)
            return float("inf")

    return seconds


def seconds_of(call: Callable[[], object], device: torch.device) -> float:
    """Seconds of a call, the quickest of some."""
    if device.type == "cpu":
        return 0.0
    found = []
    for _ in range(REPEATS):
        torch.cuda.synchronize(device)
        start = time.perf_counter()
        call()
        torch.cuda.synchronize(device)
        found.append(time.perf_counter() - start)
    return min(found)


def _generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def made_up(op: Op, tokens: int) -> list[Tensor]:
    """Inputs of a layer: one expert gets no row, and rows are skewed towards the first ones."""
    generator = _generator()
    spec = read_spec(op)
    dtype = DTYPES[spec.dtype]
    experts = max(spec.experts - 1, spec.top_k)
    chance = torch.arange(experts, 0, -1.0).expand(tokens, experts)
    ids = torch.multinomial(chance, spec.top_k, generator=generator)
    made = [torch.randn(tokens, spec.hidden, generator=generator).to(dtype), ids]
    made.append(torch.rand(tokens, spec.top_k, generator=generator))
    for value in op.operands[3:]:
        assert isinstance(value.type, TensorType)
        shape = [int(d) for d in value.type.shape]
        if value in (*op.group("up_scale"), *op.group("down_scale")):
            made.append((torch.rand(shape, generator=generator) + 0.5) / 16)
            continue
        if value.type.dtype.name == "f8e4m3fn":
            made.append(torch.randn(shape, generator=generator).to(torch.float8_e4m3fn))
            continue
        made.append((torch.randn(shape, generator=generator) * shape[-1] ** -0.5).to(dtype))
    return made
