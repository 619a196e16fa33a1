"""Embedded code: what a target declares, what objects show, and the note that keeps lesser processors away."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from moec.aot.elf import ElfError, set_weight_bytes
from moec.backends.calls import UnsupportedError
from moec.backends.cpu.aot import archive, declared, embed_experts, embed_route, lowest
from moec.backends.cpu.aot.archive import HEADERS, HERE, TORCH_HEADERS
from moec.backends.cpu.isa import LEVELS
from moec.ir.core import Op
from moec.ir.parser import parse_graph
from moec.runtime.programs import program_graph
from moec.targets import TargetError

needs_tools = pytest.mark.skipif(not all(map(shutil.which, ("g++", "nm", "ld"))), reason="g++ or binutils are missing")

LAYER = """
graph @layer(%x: DT[T, 16], %ids: i64[T, 2], %w: DT[T, 2], %up: DT[4, 48, 16], %down: DT[4, 16, 24]) -> DT[T, 16] {
  %y = moe.experts %x, %ids, %w, [%up], [%down] {experts = 4 MORE} {
    @activation(%g: DT[R, 24], %u: DT[R, 24]) -> DT[R, 24] {
      %silu = torch.call @aten.silu.default(%g) : DT[R, 24]
      %mul = torch.call @aten.mul.Tensor(%silu, %u) : DT[R, 24]
      return %mul } } : DT[T, 16]
  return %y
}"""
ROUTER = """graph @router(%l: f32[T, 4]) -> (f32[T, 2], i64[T, 2]) {
  %w, %ids = moe.route %l {k = 2} : f32[T, 2], i64[T, 2]
  return %w, %ids
}"""


def op(text: str, dtype: str = "f32", more: str = "") -> Op:
    """The op of a graph, in its canonical program."""
    graph = parse_graph(text.replace("DT", dtype).replace(" MORE", more))
    found = next(o for o in graph.ops if o.dialect == "moe")
    return next(o for o in program_graph(found).ops if o.dialect == "moe")


def test_levels_of_a_target() -> None:
    assert [isa.name for isa in declared("cpu")] == list(LEVELS)
    assert [isa.name for isa in declared("cpu:avx512_bf16")] == ["avx512_bf16", "amx"]
    assert (lowest("cpu").march, lowest("cpu:amx").march) == ("x86-64-v3", "x86-64-v4")
    for other in ("cuda:sm90", "cpu:neon", "cpu:scalar"):
        with pytest.raises(TargetError):
            declared(other)


def test_kernels_are_made_for_the_levels_that_differ() -> None:
    assert list(embed_experts(op(LAYER), "cpu", True, True).kernels) == ["avx2", "avx512"]
    assert list(embed_experts(op(LAYER, "bf16"), "cpu", True, True).kernels) == list(LEVELS)
    assert list(embed_experts(op(LAYER), "cpu:amx", True, True).kernels) == ["amx"]


def test_names_depend_on_content_alone() -> None:
    names = [
        embed_experts(op(LAYER), "cpu", True, True).name,
        embed_experts(op(LAYER), "cpu", True, False).name,
        embed_experts(op(LAYER), "cpu:avx512", True, True).name,
        embed_experts(op(LAYER, more=", sentinels = true"), "cpu", True, True).name,
        embed_experts(op(LAYER), "cpu", True, True, addressed=True).name,
        embed_experts(op(LAYER, "bf16"), "cpu", True, True).name,
    ]
    assert len(set(names)) == len(names) and all(n.isidentifier() for n in names)
    renamed = LAYER.replace("%x", "%rows").replace("@layer", "@other")
    assert embed_experts(op(renamed), "cpu", True, True).name == names[0]


def test_interleaved_rows_have_no_addresses() -> None:
    with pytest.raises(UnsupportedError, match="expert by expert"):
        embed_experts(op(LAYER, more=', layout = "interleaved"'), "cpu", True, True, addressed=True)


@needs_tools
@pytest.mark.slow
def test_objects_show_their_entry_alone() -> None:
    """Weak symbols of two instruction sets under one name would be merged, and AVX-512 run everywhere."""
    programs = [embed_experts(op(LAYER), "cpu", True, True), embed_route(op(ROUTER), "cpu")]
    library = archive(programs, "cpu")
    shown = subprocess.run(["nm", "--defined-only", "--extern-only", str(library)], capture_output=True, text=True)
    entries = {name for p in programs for name in p.exports.values()}
    for block in shown.stdout.split("\n\n"):
        symbols = {line.split()[-1] for line in block.splitlines() if len(line.split()) == 3}
        if symbols & entries:
            assert len(symbols) == 1, symbols
    assert archive(programs, "cpu") == library


@needs_tools
@pytest.mark.parametrize(("note", "loads"), [(1, True), (lowest("cpu").note, True), (1 << 20 | 15, False)])
def test_the_loader_refuses_lesser_processors(note: int, loads: bool, tmp_path: Path) -> None:
    """A level that no processor has yet stands for one that this processor lacks."""
    made = tmp_path / "runtime.so"
    torch_lib = Path(torch.__file__).parent / "lib"
    command = [
        "g++",
        "-std=c++17",
        "-shared",
        "-fPIC",
        f"-DMOEC_ISA_NEEDED={note}",
        f"-I{TORCH_HEADERS}",
        f"-I{HEADERS}",
    ]
    command += [str(HERE / "runtime.cpp"), "-o", str(made), f"-L{torch_lib}", "-ltorch_cpu", "-lgomp"]
    subprocess.run(command, check=True)
    if loads:
        ctypes.CDLL(str(made))
        return
    with pytest.raises(OSError, match="CPU ISA level is lower than required"):
        ctypes.CDLL(str(made))


def test_a_library_without_the_number_is_refused(tmp_path: Path) -> None:
    for data in (b"", b"\x7fELF\x02\x01" + bytes(58), b"no library"):
        path = tmp_path / "library.so"
        path.write_bytes(data)
        with pytest.raises(ElfError, match="does not say where its weights are"):
            set_weight_bytes(path, 8)
