"""Kernels compiled for GPUs that are not here: matrix instructions, registers and memory, read from the code."""

from __future__ import annotations

import re
from dataclasses import replace
from functools import lru_cache

import pytest

from moec.backends.base import program_op
from moec.backends.triton.compiled.built import BuiltProgram, build, plan_experts, plan_route
from moec.backends.triton.compiled.cross import CrossError, compile_kernel, refusal
from moec.backends.triton.compiled.plan import calls
from moec.backends.triton.kernels.source import write_experts
from moec.backends.triton.launches.device import device_of
from moec.backends.triton.launches.launch import plan_launch
from moec.backends.triton.launches.tiles import Launch, Tile
from moec.backends.triton.launches.usage import usage
from moec.backends.triton.module import load_module
from moec.backends.triton.spec import Spec, read_spec
from moec.ir.parser import parse_graph
from tests.backends.triton.real_layers import layer as checkpoint_layer

pytestmark = pytest.mark.skipif(bool(refusal()), reason=refusal() or "")

SIZES = {
    "OLMoE": (2048, 1024, 64, 8), "Qwen3-30B-A3B": (2048, 768, 128, 8), "gpt-oss-20b": (2880, 2880, 32, 4),
    "Mixtral-8x7B": (4096, 14336, 8, 2), "DeepSeek-V3": (7168, 2048, 256, 8),
}  # fmt: skip
OWN = "gpt-oss-20b as its checkpoint lies"
"""Gate and up interleaved, both weights transposed, biases."""
APART = ", apart"
"""Every expert's matrices are tensors of their own."""
MMA = {"cuda:sm80": "mma.sync", "cuda:sm90": "wgmma.mma_async", "cuda:sm100": "tcgen05.mma", "hip:gfx942": "v_mfma"}
LAYER = """
graph @layer(%x: bf16[T, {h}], %ids: i64[T, {k}], %w: f32[T, {k}], %up: bf16[{e}, {ii}, {h}],
             %down: bf16[{e}, {h}, {i}]) -> bf16[T, {h}] {{
  %y = moe.experts %x, %ids, %w, [%up], [%down] {{experts = {e}}} {{
    (%g: bf16[R, {i}], %u: bf16[R, {i}]) -> bf16[R, {i}] {{
      %s = torch.call @aten.silu.default(%g) : bf16[R, {i}]
      %m = torch.call @aten.mul.Tensor(%s, %u) : bf16[R, {i}]
      return %m
    }}
  }} : bf16[T, {h}]
  return %y
}}
"""
SHARED = """
graph @shared(%x: bf16[T, 7168], %ids: i64[T, 1], %w: bf16[T, 1], %gate: bf16[2048, 7168], %up: bf16[2048, 7168],
              %down: bf16[7168, 2048]) -> bf16[T, 7168] {
  %y = moe.experts %x, %ids, %w, [%gate, %up], [%down] {experts = 1, layout = "separate", stacked = false} {
    (%g: bf16[R, 2048], %u: bf16[R, 2048]) -> bf16[R, 2048] {
      %s = torch.call @aten.silu.default(%g) : bf16[R, 2048]
      %m = torch.call @aten.mul.Tensor(%s, %u) : bf16[R, 2048]
      return %m
    }
  } : bf16[T, 7168]
  return %y
}
"""
"""DeepSeek-V3's shared expert, whose matrices are modules of their own."""
ROUTER = """
graph @route(%logits: f32[T, 64]) -> (f32[T, 8], i64[T, 8]) {
  %w, %ids = moe.route %logits {k = 8, renormalize = true} : f32[T, 8], i64[T, 8]
  return %w, %ids
}
"""
NEAR = 0.35
"""Of registers that the model expects: the compiler takes so much more at most."""


@lru_cache(maxsize=8)
def spec(name: str) -> Spec:
    if name == OWN:
        return checkpoint_layer("gpt-oss-20b")
    if name.endswith(APART):
        own = spec(name.removesuffix(APART))
        return replace(own, stacked=False, layout="separate" if own.layout == "concat" else own.layout)
    if name == "shared":
        return read_spec(program_op(parse_graph(SHARED)))
    h, i, e, k = SIZES[name]
    return read_spec(program_op(parse_graph(LAYER.format(h=h, i=i, ii=2 * i, e=e, k=k))))


def gemms(name: str, target: str, tokens: int) -> None:
    """Compile what the model chooses, and look at it."""
    layer, device = spec(name), device_of(target)
    launch = plan_launch(layer, tokens, device).launch
    file = write_experts(layer)
    module = load_module(file.text)
    for call in calls(layer, launch, tokens, file):
        if call.kernel not in ("up", "down", "down_parts"):
            continue
        kernel = file.kernels[call.kernel]
        signature = {a.name: a.type for a in kernel.arguments} | dict.fromkeys(kernel.constants, "constexpr")
        function = getattr(module, call.kernel)
        binary = compile_kernel(
            function,
            signature,
            dict(call.constants),
            device,
            warps=call.warps,
            stages=call.stages,
            aligned=call.aligned,
        )
        up = call.kernel == "up"
        tile, parts, biased = (launch.up, 2, layer.up_bias) if up else (launch.down, 1, layer.down_bias)
        taken, expected = binary.resources, usage(device, tile, parts, "bf16", biased, up, not layer.stacked)
        where = (name, target, tokens, call)
        assert taken.spills == 0, where
        assert taken.shared <= device.shared_block, where
        if device.arch != "gfx942" and not biased:
            assert not re.search(r"ld\.global\S*\.[bu]16 ", binary.assembly), where  # an element at a time
        assert taken.occupancy >= 1, where
        if tokens * layer.top_k >= 64 * layer.experts:
            assert MMA[target] in taken.mma, where
        assert taken.columns == expected.columns, where
        assert taken.shared <= expected.shared, where
        if tokens > 1:  # small tiles are far from any limit
            assert taken.registers <= (1 + NEAR) * expected.registers, where


@pytest.mark.parametrize("target", MMA)
def test_the_models_tiles_use_matrix_units_and_spill_nothing(target: str) -> None:
    gemms("OLMoE", target, 1024)


def test_sums_of_64_rows_that_blocks_share_spill_nothing() -> None:
    """They lie in half of the lanes of tensor memory. 128 of a thread, halved, took 255 registers and 80 bytes."""
    launch = plan_launch(spec("shared"), 128, device_of("cuda:sm100")).launch
    assert (launch.down.rows, launch.down.split_k) == (64, 2)
    gemms("shared", "cuda:sm100", 128)


def test_an_only_expert_is_read_through_descriptors() -> None:
    """As stacked weights are; addresses for a tile of such sizes do not fit a thread's registers."""
    gemms("shared", "cuda:sm90", 512)
    layer = spec("shared")
    launch = plan_launch(layer, 512, device_of("cuda:sm90")).launch
    made = calls(layer, launch, 512, write_experts(layer))
    assert {dict(c.constants)["TMA"] for c in made if c.kernel in ("up", "down", "down_parts")} == {1}


def test_experts_that_lie_apart_spill_nothing() -> None:
    """No descriptor holds their addresses. Those of the tile that stacked ones get took 255 registers and 16 bytes."""
    gemms(f"OLMoE{APART}", "cuda:sm90", 4096)
    stacked, apart = (plan_launch(spec(f"OLMoE{n}"), 4096, device_of("cuda:sm90")).launch for n in ("", APART))
    assert (stacked.up.tma, apart.up.tma) == (True, False)
    assert stacked.up.block_k == 2 * apart.up.block_k


def test_addresses_that_are_no_multiples_of_sixteen_are_not_taken_for_such() -> None:
    """Elements then come one at a time, which is right and slow."""
    file = write_experts(replace(spec(f"OLMoE{APART}"), aligned=False))
    assert "multiple_of" not in file.text
    assert "multiple_of" not in write_experts(spec("OLMoE")).text
    assert write_experts(spec(f"OLMoE{APART}")).text.count("multiple_of") >= 5  # gate, up and down, both forms


@pytest.mark.slow
@pytest.mark.parametrize("target", MMA)
@pytest.mark.parametrize("name", [*SIZES, OWN, *(f"{name}{APART}" for name in (*SIZES, OWN))])
def test_at_the_real_layers(name: str, target: str) -> None:
    for tokens in (1, 1024, 4096, 16384):
        gemms(name, target, tokens)


def test_transposed_weights_are_loaded_sixteen_bytes_at_a_time() -> None:
    """Though the last tile goes past the end: 5760 outputs are no multiple of its 256."""
    layer, device = spec(OWN), device_of("cuda:sm80")
    tile = Tile(64, 128, 32, num_warps=8)
    file = write_experts(layer)
    call = next(c for c in calls(layer, Launch("gemm", tile, tile), 1024, file) if c.kernel == "up")
    kernel = file.kernels["up"]
    signature = {a.name: a.type for a in kernel.arguments} | dict.fromkeys(kernel.constants, "constexpr")
    function = load_module(file.text).up
    assembly = compile_kernel(
        function, signature, dict(call.constants), device, warps=call.warps, stages=call.stages, aligned=call.aligned
    ).assembly
    copies = re.findall(r"cp\.async\.c[ag]\.shared\.global.*", assembly)
    step = (64 + 2 * 128) * 32 * 2 // 16 // (8 * 32)  # copies of a thread for rows and weights
    assert len(copies) >= 2 * step
    assert all(" 0x10" in copy for copy in copies)


@pytest.mark.parametrize(
    ("target", "kernel", "tile"),
    [
        ("cuda:sm90", "down", Tile(64, 256, 64, num_warps=8, num_stages=2, units=3)),
        ("cuda:sm100", "down_parts", Tile(64, 256, 64, num_warps=8, units=4, split_k=2)),
        pytest.param("cuda:sm100", "up", Tile(64, 128, 64, num_warps=8, units=4), marks=pytest.mark.slow),
    ],
)
def test_tall_tiles_hold_their_sums(target: str, kernel: str, tile: Tile) -> None:
    """A loop over tiles would keep registers for the next one, and spill; whole rows in f32 at once as well."""
    layer, device = spec("OLMoE"), device_of(target)
    file, tile = write_experts(layer), replace(tile, tma=True, ahead=device.units)
    call = next(c for c in calls(layer, Launch("gemm", tile, tile), 4096, file) if c.kernel == kernel)
    own = file.kernels[kernel]
    signature = {a.name: a.type for a in own.arguments} | dict.fromkeys(own.constants, "constexpr")
    function = getattr(load_module(file.text), kernel)
    binary = compile_kernel(
        function, signature, dict(call.constants), device, warps=call.warps, stages=call.stages, aligned=call.aligned
    )
    assert binary.resources.spills == 0
    assert binary.resources.registers <= device.thread_registers
    waits_once(binary.assembly, gathered=kernel == "up")


def waits_once(assembly: str, gathered: bool) -> None:
    """Places are on their way while a descriptor is written; then what a later tile reads is fetched, and first loads
    of this one wait for nothing but slots, where rows are gathered."""
    place, later = re.finditer(r"ld\.global\.b64 \{ (%rd\d+) \}", assembly[: assembly.index("tensormap.replace")])
    written = assembly.index("fence.proxy.tensormap")
    for found in (place, later):
        assert found.end() < written < assembly.index(f"{found[1]},", found.end())
    first = min(assembly.index(f"{load} ", written) for load in _loads(assembly))
    fetches = [m.start() for m in re.finditer(r"prefetch\.global\.L2", assembly)]
    assert len(fetches) == 2  # gate and up; or weights and rows
    assert all(written < at < first for at in fetches)
    slots = re.findall(r"ld\.global\.\S+", assembly[written:first])
    assert set(slots) == ({"ld.global.b32"} if gathered else set())


def _loads(assembly: str) -> list[str]:
    """Instructions that bring operands: of weights through descriptors, of rows."""
    return [re.search(p, assembly)[0] for p in (r"cp\.async\.bulk\.tensor\S+", r"cp\.async\.cg\S+")]  # type: ignore[index]


def small() -> Spec:
    return read_spec(program_op(parse_graph(LAYER.format(h=64, i=128, ii=256, e=4, k=2))))


def test_a_program_is_compiled_for_every_number_of_tokens() -> None:
    (built,) = build([plan_experts(small(), device_of("cuda:sm90"), 30, 150)])
    most = [p.tokens for p in built.launches]
    assert most == sorted(most)
    assert most[-1] == 256
    have = {(k.call.kernel, k.call.constants) for k in built.kernels}
    file = write_experts(small())
    for tokens in (30, 33, 63, 64, 65, 129, 150):
        launch = next(p.launch for p in built.launches if tokens <= p.tokens)
        assert {(c.kernel, c.constants) for c in calls(small(), launch, tokens, file)} <= have, tokens
    check(built, b"\x7fELF", ".visible .entry")


def test_a_router_is_one_kernel() -> None:
    op = program_op(parse_graph(ROUTER))
    for target, begin in (("cuda:sm80", ".visible .entry"), ("hip:gfx942", ".amdgcn_target")):
        (built,) = build([plan_route(op, device_of(target), 64)])
        assert len(built.kernels) == 1
        assert not built.launches
        check(built, b"\x7fELF", begin)


def check(built: BuiltProgram, magic: bytes, begin: str) -> None:
    for kernel in built.kernels:
        assert kernel.binary.code.startswith(magic)
        assert begin in kernel.binary.assembly
        assert kernel.binary.resources.spills == 0
        if ".param" in kernel.binary.assembly:  # run-time arguments, and the two pointers that Triton adds
            found = re.findall(rf"\.param \.\S+ .*{kernel.binary.name}_param_\d+", kernel.binary.assembly)
            assert len(found) == len(kernel.types) + 2


def test_a_kernel_that_triton_refuses_is_one_error() -> None:
    file = write_experts(small())
    kernel = file.kernels["up"]
    signature = {a.name: a.type for a in kernel.arguments} | dict.fromkeys(kernel.constants, "constexpr")
    constants = {"BLOCK_M": 24, "BLOCK_N": 64, "BLOCK_K": 64, "GROUP_M": 1, "TMA": 0}  # 24 is no power of two
    function = load_module(file.text).up
    with pytest.raises(CrossError, match="Triton cannot compile up for cuda:sm90"):
        compile_kernel(function, signature, constants, device_of("cuda:sm90"), warps=4, stages=2)


def test_too_many_registers_are_seen_as_spills() -> None:
    file, layer, device = write_experts(small()), small(), device_of("cuda:sm80")
    launch = plan_launch(layer, 4096, device).launch
    call = next(c for c in calls(layer, launch, 4096, file) if c.kernel == "up")
    kernel = file.kernels["up"]
    signature = {a.name: a.type for a in kernel.arguments} | dict.fromkeys(kernel.constants, "constexpr")
    constants = dict(call.constants) | {"BLOCK_M": 128, "BLOCK_N": 128}
    function = load_module(file.text).up
    taken = compile_kernel(function, signature, constants, device, warps=4, stages=2).resources
    assert taken.spills > 0
