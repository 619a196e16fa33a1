"""Every kernel that a layer launches, in every form, compiled for GPUs that are not here: nothing spills, limits hold.

GEMMs of layers in bf16 are looked at more closely, and for more numbers of tokens, in ``test_triton_compile.py``.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from functools import cache

import pytest

from moec.backends.triton.backward import SUMS, TILE
from moec.backends.triton.compiled.built import ROUTE_STAGES, ROUTE_WARPS
from moec.backends.triton.compiled.cross import Binary, CrossError, compile_kernel, refusal
from moec.backends.triton.compiled.plan import Call, calls
from moec.backends.triton.fp8 import refusal as no_fp8
from moec.backends.triton.kernel import LEAST_ROWS, MOST_ROWS
from moec.backends.triton.kernels.gradients import write_gradients
from moec.backends.triton.kernels.route import write_router
from moec.backends.triton.kernels.source import write_experts
from moec.backends.triton.kernels.text import KernelFile
from moec.backends.triton.launches.choose import load_of
from moec.backends.triton.launches.device import device_of
from moec.backends.triton.launches.launch import layer_of, plan_launch
from moec.backends.triton.launches.tiles import Launch, Tile
from moec.backends.triton.launches.vector_time import vector_time
from moec.backends.triton.module import load_module
from moec.backends.triton.route import tokens_of_a_program
from moec.backends.triton.spec import Spec
from tests.backends.triton.real_layers import SIZES, layer, router

pytestmark = pytest.mark.skipif(bool(refusal()), reason=refusal() or "")

TARGETS = ("cuda:sm80", "cuda:sm90", "cuda:sm100", "hip:gfx942")
TOKENS = (1, 16, 1024, 16384)
GEMMS = ("up", "down", "down_halves", "down_parts")
FP8 = {
    "cuda:sm89": r"mma\.sync\S*\.e4m3\.e4m3",
    "cuda:sm90": r"wgmma\.mma_async\S*\.e4m3\.e4m3",
    "cuda:sm100": r"tcgen05\.mma\S*kind::f8f6f4",
}
"""The instructions that multiply two numbers in f8e4m3fn."""
FP8_LAYERS = [name for name in SIZES if name != "gpt-oss-20b"]


@cache
def compiled(text: str, types: tuple[tuple[str, str], ...], fixed: tuple[str, ...], call: Call, target: str) -> Binary:
    """A kernel of a file; each is compiled once."""
    signature = dict(types) | dict.fromkeys(fixed, "constexpr")
    return compile_kernel(
        getattr(load_module(text), call.kernel), signature, dict(call.constants), device_of(target),
        warps=call.warps, stages=call.stages, aligned=call.aligned,
    )  # fmt: skip


def built(file: KernelFile, call: Call, target: str) -> Binary:
    """Compile a kernel, and look at what every kernel must keep to."""
    kernel, device = file.kernels[call.kernel], device_of(target)
    types = tuple((a.name, a.type) for a in kernel.arguments)
    binary = compiled(file.text, types, kernel.constants, call, target)
    taken, where = binary.resources, (target, call, binary.resources)
    assert taken.spills == 0, where
    assert taken.shared <= device.shared_block, where
    assert taken.registers <= device.thread_registers, where
    assert taken.columns <= device.tensor_columns, where
    assert binary.threads <= 1024, where
    assert taken.occupancy >= 1, where
    return binary


def launches(spec: Spec, target: str) -> Iterator[tuple[int, Launch]]:
    """What the model chooses; then the other forms: the best vectors, and sums in parts or atomic in a modest tile."""
    device = device_of(target)
    for tokens in TOKENS:
        yield tokens, plan_launch(spec, tokens, device).launch
    if not spec.fp8:
        up, down = (vector_time(g, load_of(layer_of(spec), 1), device).tile for g in layer_of(spec).gemms)
        yield 1, Launch("gemv", up, down)
    modest = Tile(64, 32, 128 if spec.fp8 else 32, num_stages=2)
    yield 16, Launch("gemm", modest, modest)
    yield 1024, Launch("gemm", modest, replace(modest, split_k=2))
    yield 1024, Launch("gemm", modest, modest, atomic=True)


def small_kernels(name: str, target: str) -> set[str]:
    """Compile all kernels of a layer in bf16 but its GEMMs; their names."""
    spec = layer(name)
    file = write_experts(spec)
    found = dict.fromkeys(c for t, launch in launches(spec, target) for c in calls(spec, launch, t, file))
    wanted = [c for c in found if c.kernel not in GEMMS]
    for call in wanted:
        built(file, call, target)
    return {c.kernel for c in wanted}


def fp8_kernels(name: str, target: str, tokens: tuple[int, ...]) -> None:
    """Compile all kernels of a layer in fp8 that others do not have."""
    spec = layer(name, "fp8")
    file = write_experts(spec)
    for count, launch in launches(spec, target):
        if count not in tokens:
            continue
        for call in calls(spec, launch, count, file):
            if call.kernel not in (*GEMMS, "down_atomic", "quantize_x", "quantize_a"):
                continue
            assembly = built(file, call, target).assembly
            if call.kernel in GEMMS and count * spec.top_k >= 64 * spec.experts:
                assert re.search(FP8[target], assembly), (target, call)


ALL = {
    "up_vector", "down_vector", "sort_few", "count", "offsets", "place", "combine", "combine_parts", "down_atomic",
}  # fmt: skip


def test_a_sample_of_kernels() -> None:
    spec, target = layer("OLMoE"), "cuda:sm90"
    file = write_experts(spec)
    for call in calls(spec, plan_launch(spec, 1, device_of(target)).launch, 1, file):
        built(file, call, target)
    fp8_kernels("Qwen3-30B-A3B", target, (16384,))
    a_router("gpt-oss-20b", "hip:gfx942")


def test_a_tile_of_32_rows_in_fp8_spills_nothing() -> None:
    """Of the down GEMM, on sm_90: masks of rows that hold no slot took 8 bytes of a thread."""
    spec, device = layer("Qwen3-30B-A3B", "fp8"), device_of("cuda:sm90")
    file, launch = write_experts(spec), plan_launch(spec, 256, device).launch
    assert (launch.down.rows, launch.down.block_n, launch.down.num_warps, launch.down.num_stages) == (32, 128, 4, 2)
    call = next(c for c in calls(spec, launch, 256, file) if c.kernel == "down_halves")
    built(file, call, "cuda:sm90")


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("name", SIZES)
def test_every_kernel_of_a_layer(name: str, target: str) -> None:
    assert small_kernels(name, target) >= ALL
    a_router(name, target)


def a_router(name: str, target: str) -> None:
    """Compile a router as the ahead-of-time compiler does."""
    read = router(name)
    file = write_router(read)
    aligned = frozenset(a.name for a in file.kernels["route"].arguments if a.type.startswith("*"))
    call = Call("route", (("BLOCK_T", tokens_of_a_program(read)),), ROUTE_WARPS, ROUTE_STAGES, aligned)
    built(file, call, target)


@pytest.mark.slow
@pytest.mark.parametrize("target", FP8)
@pytest.mark.parametrize("name", FP8_LAYERS)
def test_every_kernel_in_fp8(name: str, target: str) -> None:
    fp8_kernels(name, target, TOKENS)


def test_sm80_has_no_fp8() -> None:
    """It is refused before a kernel is written; Triton says the same of the kernel."""
    assert "sm80 has no matrix instructions for fp8" in no_fp8("cpu", "cuda:sm80")
    spec = layer("Qwen3-30B-A3B", "fp8")
    file = write_experts(spec)
    tile = Tile(16, 64, 128)
    up = next(c for c in calls(spec, Launch("gemm", tile, tile), 16, file) if c.kernel == "up")
    with pytest.raises(CrossError, match="Triton cannot compile up for cuda:sm80"):
        built(file, up, "cuda:sm80")


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
def test_functions_of_rows(target: str) -> None:
    for name in SIZES:
        spec = layer(name, "rows")
        file = write_experts(spec)
        for tokens, launch in list(launches(spec, target))[2:5]:
            for call in calls(spec, launch, tokens, file):
                if call.kernel in ("activation", "post"):
                    built(file, call, target)


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("stacked", [True, False])
def test_gradients(target: str, stacked: bool) -> None:
    """They are the same for all layers: sizes are arguments."""
    file = write_gradients("bf16", stacked)
    for name, rows in (("rows_product", (LEAST_ROWS, 32, MOST_ROWS)), ("rows_sums", (SUMS,))):
        aligned = frozenset(a.name for a in file.kernels[name].arguments if a.type != "i32")
        for block_m in rows:
            constants = tuple((c, {"BLOCK_M": block_m, **TILE}[c]) for c in file.kernels[name].constants)
            built(file, Call(name, constants, 4, 3, aligned), target)
