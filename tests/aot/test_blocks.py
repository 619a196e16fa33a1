"""What has no embedded code stays as PyTorch runs it, block by block; the other blocks keep their kernels."""

from __future__ import annotations

import shutil
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from torch import nn
from torch._ops import OpOverload
from torch.export import Dim, ExportedProgram
from torch.export import export as torch_export

import moec
from moec.aot import optimize as module
from moec.aot.build import AotOptions, build
from moec.aot.lowering import Embedding
from moec.aot.optimize import Optimized, optimize
from moec.aot.source import Source
from moec.backends.cpu.route_source import MOST_EXPERTS
from moec.capture.origin import FX_META
from moec.ir.core import Graph, Location
from moec.ir.parser import parse_graph
from moec.options import CompileOptions
from moec.passes import registry
from moec.passes.base import Pass, PassClass, PassContext, PassResult
from moec.report import Report
from tests.aot.blocks import Block, Model, Odd, Ragged, Sorting, Strided, WithShared, tokens

TOLERANCE = 2e-5  # fp32: re-association inside GEMMs, over five blocks
SIN = "aten.sin.default"


@dataclass
class Found:
    """What became of a model: its program before and after, and the report."""

    exported: ExportedProgram
    made: Optimized
    report: Report

    @property
    def embedded(self) -> list[str]:
        """The kinds of embedded code that are called, in order."""
        names = [n.target.name() for n in self.made.program.graph.nodes if isinstance(n.target, OpOverload)]
        return [n.split("_")[2] for n in names if n.startswith("moec_aot::")]

    @property
    def fused(self) -> list[tuple[str, bool]]:
        """Blocks and their shared experts by name."""
        return [(b.name, b.fused) for b in self.report.entries()]

    @property
    def reasons(self) -> list[str]:
        """Of what is not fused."""
        return [b.reason or "" for b in self.report.entries() if not b.fused]


def calls(program: ExportedProgram) -> Counter[str]:
    """How often torch's ops are called."""
    return Counter(str(n.target) for n in program.graph.nodes if n.op == "call_function")


def found(*blocks: nn.Module, passes: str = "default") -> Found:
    """The model of these blocks before any code is compiled."""
    program = torch_export(
        Model(*blocks).eval(), (tokens(5),), dynamic_shapes={"x": {0: Dim("tokens", min=1, max=64)}}, strict=False
    )
    report = Report()
    made = optimize(program, Embedding("cpu"), CompileOptions(passes=passes), report, lambda text: None)
    return Found(program, made, report)


def test_a_block_without_code_stays_beside_those_that_have() -> None:
    got = found(Block(), Odd(), Ragged(), Block())
    assert got.embedded == ["route", "experts", "route", "experts"]
    assert got.fused == [("layers.0", True), ("layers.1", False), ("layers.2", False), ("layers.3", True)]
    assert "aten.sin.default" in got.reasons[0] and "4 different programs" in got.reasons[1]
    before, after = calls(got.exported), calls(got.made.program)
    assert after[SIN] == before[SIN] == 1
    assert after["aten.index_add.default"] == before["aten.index_add_.default"] == 4
    assert after["aten.bmm.default"] == 2  # of the odd one
    table = str(got.report)
    assert "layers.1" in table and "sin" in table and "4 different" in table
    assert "moe.experts" in got.made.after and SIN in got.made.after


def test_a_router_that_is_a_region_becomes_its_calls() -> None:
    got = found(Sorting(), Block())
    assert got.embedded == ["experts", "route", "experts"]
    assert got.fused == [("layers.0", True), ("layers.1", True)]
    after = calls(got.made.program)
    assert after["aten.argsort.default"] == 1 and not after["aten.bmm.default"]
    assert "custom top-2 (region)" in str(got.report)


def test_a_router_without_code_stays_and_its_experts_do_not() -> None:
    got = found(Block(experts=MOST_EXPERTS + 1, inner=1), Block())
    assert got.embedded == ["experts", "route", "experts"]
    assert got.fused == [("layers.0", True), ("layers.1", True)]
    assert calls(got.made.program)["aten.topk.default"] == 1
    routers = [b.router or "" for b in got.report.layers]
    assert "run by PyTorch" in routers[0] and "4097 experts" in routers[0] and "PyTorch" not in routers[1]


def test_a_shared_expert_without_code_stays() -> None:
    got = found(WithShared(odd=True))
    assert got.embedded == ["route", "experts"] and calls(got.made.program)[SIN] == 1
    assert got.fused == [("layers.0", True), ("layers.0.shared", False)] and "aten.sin" in got.reasons[0]


def test_a_shared_expert_stays_with_its_block() -> None:
    got = found(WithShared(odd=False))
    assert got.embedded == [] and calls(got.made.program) == calls(got.exported)
    assert got.fused == [("layers.0", False), ("layers.0.shared", False)]
    assert "aten.sin" in got.reasons[0] and "around it" in got.reasons[1]


def test_weights_that_lie_apart_have_no_code() -> None:
    got = found(Strided(), Block())
    assert got.embedded == ["route", "experts"]
    assert "no contiguous side: its strides are (512, 32, 2)" in got.reasons[0]


def test_a_block_in_parts_has_code_for_the_plan() -> None:
    cut = "reschedule-tokens{always=true,cut=true}"
    got = found(Block(), passes=f"default,{cut}")
    assert got.embedded == ["route", "regroup", "experts", "experts"] and set(got.fused) == {("layers.0", True)}
    assert "moe.regroup" in got.made.after and not got.report.remarks


def test_parts_of_a_block_without_code_are_no_parts() -> None:
    got = found(Odd(), Block(), passes="default,reschedule-tokens{always=true,cut=true}")
    assert got.embedded == ["route", "regroup", "experts", "experts"]
    assert calls(got.made.program)[SIN] == 1 and "aten.sin.default" in got.reasons[0]


def test_what_all_has_code_is_left_nowhere(monkeypatch: pytest.MonkeyPatch) -> None:
    runs: list[object] = []
    run = module.run_pipeline
    monkeypatch.setattr(module, "run_pipeline", lambda *args, **kw: (runs.append(kw), run(*args, **kw))[1])
    assert found(Block()).embedded == ["route", "experts"] and runs == [{}]


@pytest.mark.parametrize("passes", ["functionalize,canonicalize", "functionalize,canonicalize,raise-moe"])
def test_passes_that_fuse_nothing_leave_the_program(passes: str) -> None:
    got = found(Block(), Ragged(), passes=passes)
    assert got.embedded == [] and calls(got.made.program)["aten.bmm.default"] == 2
    assert not any(fused for _, fused in got.fused)


@dataclass(frozen=True)
class Forget(Pass):
    """Forgets where ops come from."""

    name: ClassVar[str] = "forget"
    pass_class: ClassVar[PassClass] = PassClass.BITWISE

    def run(self, graph: Graph, ctx: PassContext) -> PassResult:
        for op in graph.ops:
            op.loc = Location()
        return PassResult(False)


def test_what_no_pass_leaves_out_takes_the_whole_model_with_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(registry._PASSES, "forget", Forget)
    got = found(Block(), Odd(), passes="default,forget")
    assert got.embedded == [] and calls(got.made.program) == calls(got.exported)
    assert [fused for _, fused in got.fused] == [False, False]
    assert "aten.sin.default; the whole model runs as PyTorch would run it" in got.report.remarks[-1]


WEIGHTS = {
    "alike": (lambda: [torch.empty(6, 4) for _ in range(6)], ""),
    "transposed": (lambda: [torch.empty(4, 6).t(), *(torch.empty(6, 4) for _ in range(5))], "lie transposed"),
    "wider": (lambda: [torch.empty(6, 5)[:, :4], *(torch.empty(6, 4) for _ in range(5))], "different strides"),
}
LAYER = """
graph @layer(%x: f32[T, 4], %ids: i64[T, 1], %w: f32[T, 1], PARAMS) -> f32[T, 4] {
  %y = moe.experts %x, %ids, %w, [%a, %b, %c], [%d, %e, %f] {experts = 3, stacked = false, layout = "single"} {
    @activation(%h: f32[R, 6]) -> f32[R, 6] { return %h } } : f32[T, 4]
  return %y
}""".replace("PARAMS", ", ".join([f"%{n}: f32[6, 4]" for n in "abc"] + [f"%{n}: f32[4, 6]" for n in "def"]))


@pytest.mark.parametrize("name", WEIGHTS)
def test_experts_one_by_one_lie_alike_or_have_no_code(name: str) -> None:
    make, message = WEIGHTS[name]
    graph, embedding = parse_graph(LAYER), Embedding("cpu")
    ups, downs = make()[:3], [torch.empty(4, 6) for _ in range(3)]
    for value, tensor in zip(graph.args[3:], [*ups, *downs], strict=True):
        value.meta[FX_META] = {"val": tensor}
    claims = embedding.claims(graph)
    reasons = [r.reason for r in claims.refusals]
    assert (message in reasons[0]) if message else (not reasons and len(claims) == 1)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="there is no g++")
def test_a_mixed_model_equals_eager_at_all_sizes(tmp_path: Path) -> None:
    model, path = Model(Block(), Odd(), Ragged(), Sorting()).eval(), tmp_path / "mixed.moec"
    options = AotOptions(CompileOptions(checks="off"), {"tokens": (1, 64)})
    built = build(Source("mixed", model, (tokens(5),)), path, options)
    assert [b.fused for b in built.report.layers] == [True, False, False, True] and built.kernels == 2
    loaded = moec.load(path)
    for count in (1, 2, 5, 33, 64):
        x = tokens(count)
        with torch.no_grad():
            want = model(x)
        torch.testing.assert_close(loaded(x), want, rtol=TOLERANCE, atol=TOLERANCE)
