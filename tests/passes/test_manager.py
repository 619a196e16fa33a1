"""The manager: order, verification, crashes that can be replayed, fuel, and the instruments."""

from __future__ import annotations

import io
import os
from dataclasses import dataclass
from pathlib import Path

import pytest

from moec.ir.core import Graph, Location, Op
from moec.ir.errors import MoecError, VerifyError
from moec.ir.parser import parse_graph
from moec.passes import Pass, PassClass, PassContext, PassError, PassManager, PassResult, all_passes, parse_pipeline
from moec.passes import registry as registry_module
from moec.passes.instruments import DumpDir, PrintAfterAll, Stats, Timing, write_whole
from moec.passes.registry import register_pass

TEXT = """graph @g(%x: f32[T, 4]) -> f32[T, 4] {
  %a = torch.call @aten.alias.default(%x) : f32[T, 4]
  %b = torch.call @aten.alias.default(%a) : f32[T, 4]
  %c = torch.call @aten.neg.default(%b) : f32[T, 4]
  %d = torch.call @aten.relu.default(%x) : f32[T, 4]
  return %c
}
"""


@dataclass(frozen=True)
class Crash(Pass):
    """Does half of something and raises."""

    name = "crash"
    pass_class = PassClass.BITWISE

    how: str = "plain"

    def run(self, graph: Graph, ctx: PassContext) -> PassResult:
        graph.ops[3].erase()
        ctx.remark("applied", self.name, "half", graph.ops[0])
        if self.how == "moec":
            raise MoecError("no such thing", op="the op", source="model.py:3: x", hint="try another")
        raise ZeroDivisionError("by zero")


@dataclass(frozen=True)
class Break(Pass):
    """Leaves a use before the definition."""

    name = "break"
    pass_class = PassClass.BITWISE

    def run(self, graph: Graph, ctx: PassContext) -> PassResult:
        graph.ops[0], graph.ops[1] = graph.ops[1], graph.ops[0]
        return PassResult(True)


@dataclass(frozen=True)
class Silent(Pass):
    """Returns nothing."""

    name = "silent"
    pass_class = PassClass.BITWISE

    def run(self, graph: Graph, ctx: PassContext) -> PassResult:
        return None  # type: ignore[return-value]


@pytest.fixture(autouse=True)
def more_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    all_passes()  # fill the registry before it is copied
    monkeypatch.setattr(registry_module, "_PASSES", dict(registry_module._PASSES))
    for cls in (Crash, Break, Silent):
        register_pass(cls)


def test_runs_in_place_and_in_order() -> None:
    graph = parse_graph(TEXT)
    assert PassManager("canonicalize,dce").run(graph) is graph
    assert [op.attrs.get("target", op.name) for op in graph.ops] == ["aten.neg.default", "return"]


def test_an_empty_pipeline_changes_nothing() -> None:
    assert str(PassManager([]).run(parse_graph(TEXT))) == str(parse_graph(TEXT))


@pytest.mark.parametrize(
    ("before", "rest", "message"),
    [
        ("", "crash,cse", "pass 'crash' failed: ZeroDivisionError: by zero"),
        ("cse", "break,cse", "pass 'break' broke the IR: "),
        ("dce", "silent", "pass 'silent' failed: run() returned NoneType, not a PassResult"),
    ],
)
def test_a_failing_pass_is_named_and_can_be_replayed(tmp_path: Path, before: str, rest: str, message: str) -> None:
    graph, ctx, repro = parse_graph(TEXT), PassContext(), tmp_path / "repro.moe"
    with pytest.raises(PassError) as info:
        PassManager(",".join(filter(None, (before, rest))), repro=repro).run(graph, ctx)
    assert message in str(info.value)
    assert info.value.pass_name == rest.split(",")[0]
    command = f"moec opt repro.moe -p '{rest}'"
    assert command in str(info.value)
    first, _, text = repro.read_text().partition("\n")
    assert first == f"// {command}"
    untouched = str(PassManager(before).run(parse_graph(TEXT)))
    assert str(graph) == untouched == str(parse_graph(text)), "the graph is as it was before the failing pass"
    assert ctx.remarks == [], "what the failing pass said no longer holds"
    assert os.listdir(tmp_path) == ["repro.moe"]
    with pytest.raises(PassError):  # the replay
        PassManager(rest, repro=None).run(parse_graph(repro.read_text()))


def test_the_restored_graph_is_whole() -> None:
    graph = parse_graph(TEXT)
    with pytest.raises(PassError):
        PassManager("crash", repro=None).run(graph)
    assert all(op.parent is graph for op in graph.ops)
    PassManager("cleanup").run(graph)  # verifies, and rewrites
    assert len(graph.ops) == 2


def test_the_verifiers_excerpt_is_shown() -> None:
    with pytest.raises(PassError) as info:
        PassManager("break", repro=None).run(parse_graph(TEXT))
    assert "torch.call @aten.alias.default" in str(info.value)
    assert isinstance(info.value.__cause__, VerifyError)


def test_without_verification_nothing_is_found() -> None:
    PassManager("break", verify=False, repro=None).run(parse_graph(TEXT))


def test_a_moec_error_keeps_its_op_source_and_hint() -> None:
    with pytest.raises(PassError) as info:
        PassManager("crash{how=moec}", repro=None).run(parse_graph(TEXT))
    assert (info.value.op, info.value.source) == ("the op", "model.py:3: x")
    assert str(info.value).startswith("pass 'crash' failed: no such thing")
    assert "try another" in str(info.value)


def test_an_invalid_input_is_not_blamed_on_a_pass() -> None:
    graph = parse_graph(TEXT)
    graph.ops[0], graph.ops[1] = graph.ops[1], graph.ops[0]
    with pytest.raises(VerifyError):
        PassManager("dce", repro=None).run(graph)


def test_a_reproducer_that_cannot_be_written_is_told(tmp_path: Path) -> None:
    with pytest.raises(PassError, match="could not be written to"):
        PassManager("crash", repro=tmp_path / "missing" / "repro.moe").run(parse_graph(TEXT))


def test_quotes_in_the_replayed_pipeline(tmp_path: Path) -> None:
    with pytest.raises(PassError):
        PassManager([Crash(how="it's")], repro=tmp_path / "r.moe").run(parse_graph(TEXT))
    assert (tmp_path / "r.moe").read_text().startswith("// moec opt r.moe -p 'crash{how=\"it'\\''s\"}'\n")


@pytest.mark.parametrize(("fuel", "left"), [(0, 5), (1, 4), (2, 3), (3, 2), (4, 2), (None, 2)])
def test_fuel_counts_over_the_whole_pipeline(fuel: int | None, left: int) -> None:
    ctx = PassContext()
    graph = PassManager("canonicalize,cse,dce", fuel=fuel).run(parse_graph(TEXT), ctx)
    assert len(graph.ops) == left
    assert ctx.fuel.spent == min(3, fuel if fuel is not None else 3)


def test_fuel_starts_anew_with_every_run() -> None:
    manager, ctx = PassManager("dce", fuel=1), PassContext()
    for _ in range(2):
        assert len(manager.run(parse_graph(TEXT), ctx).ops) == 4


def test_remarks_carry_op_and_source() -> None:
    graph, ctx = parse_graph(TEXT), PassContext()
    graph.ops[0].loc = Location("model.layers.0.mlp", "model.py:7: x.alias()")
    PassManager("canonicalize").run(graph, ctx)
    first = ctx.remarks[0]
    assert (first.kind, first.module, first.source) == ("applied", "model.layers.0.mlp", "model.py:7: x.alias()")
    assert "@aten.alias.default(%x)" in first.op_text
    assert str(first) == "applied: canonicalize: drop-alias [model.py:7: x.alias()]"
    with pytest.raises(ValueError, match="a remark is one of"):
        ctx.remark("maybe", "canonicalize", "x")


def test_printing_goes_to_stderr_and_tells_what_changed(capsys: pytest.CaptureFixture[str]) -> None:
    PassManager("cse,canonicalize", instruments=[PrintAfterAll()]).run(parse_graph(TEXT))
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("graph @g") == 3
    PassManager("cse,canonicalize", instruments=[PrintAfterAll(only_changed=True)]).run(parse_graph(TEXT))
    err = capsys.readouterr().err
    assert err.count("graph @g") == 2
    assert "after cse: unchanged" in err


def test_timing_and_stats_on_a_stream_of_their_own() -> None:
    timing, stats = Timing(io.StringIO()), Stats(io.StringIO())
    PassManager("canonicalize,dce", instruments=[timing, stats]).run(parse_graph(TEXT))
    assert set(timing.seconds) == {"canonicalize", "dce"}
    assert stats.counts == {"canonicalize": {"drop-alias": 2}, "dce": {"removed": 1}}
    assert "ms" in timing.report()
    assert "dce: removed" in stats.stream.getvalue()  # type: ignore[union-attr]


def test_dumps_are_numbered_and_can_be_read(tmp_path: Path) -> None:
    dump = DumpDir(tmp_path / "deep" / "dump")
    for _ in range(2):
        PassManager("canonicalize,dce", instruments=[dump]).run(parse_graph(TEXT))
    names = sorted(os.listdir(tmp_path / "deep" / "dump"))
    assert names == [f"{i:03d}_{n}.moe" for i, n in enumerate(["input", "canonicalize", "dce"] * 2)]
    assert len(parse_graph((dump.path / names[2]).read_text()).ops) == 2


def test_a_failure_leaves_the_dumps_so_far(tmp_path: Path) -> None:
    timing = Timing(io.StringIO())
    with pytest.raises(PassError):
        PassManager("cse,crash", instruments=[DumpDir(tmp_path), timing], repro=None).run(parse_graph(TEXT))
    assert sorted(os.listdir(tmp_path)) == ["000_input.moe", "001_cse.moe"]
    assert timing.stream.getvalue(), "what was measured is told even then"  # type: ignore[union-attr]


def test_a_file_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "x.moe"
    write_whole(path, "old")
    with pytest.raises(UnicodeEncodeError):
        write_whole(path, "new \ud800")
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["x.moe"]


def test_the_passes_given_are_not_touched() -> None:
    passes = parse_pipeline("dce")
    manager = PassManager(passes)
    passes.clear()
    assert len(manager.passes) == 1


def test_nested_ops_keep_their_parents_after_a_restore() -> None:
    graph = parse_graph("""graph @r(%x: f32[T, 4], %y: f32[T, 4]) -> f32[T, 4] {
      %a = moe.activation [%x] {layout = "single"} {
        (%h: f32[R, 4]) -> f32[R, 4] {
          %v = torch.call @aten.relu.default(%h) : f32[R, 4]
          return %v
        }
      } : f32[T, 4]
      %b = torch.call @aten.neg.default(%a) : f32[T, 4]
      %c = torch.call @aten.neg.default(%b) : f32[T, 4]
      %d = torch.call @aten.neg.default(%x) : f32[T, 4]
      return %c
    }""")
    with pytest.raises(PassError):
        PassManager("crash", repro=None).run(graph)
    region = graph.ops[0].regions[0]
    owners: list[Op | None] = [region.parent_op]
    assert owners == [graph.ops[0]]
