"""Exported programs, there and back: real model families, mutation, dynamic sizes, files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.export import Dim, ExportedProgram, export

from moec.capture import from_exported, graph_from_fx
from moec.emit import EmitError, graph_to_fx, to_exported
from moec.ir.attributes import Operand
from moec.ir.core import Op, Value
from moec.ir.parser import parse_graph
from moec.ir.printer import print_graph
from moec.ir.types import TensorType
from tests.capture.same import assert_same
from tests.support.models import build, inputs

STATIC = ["mixtral", "deepseek_v3", "gpt_oss", "granitemoe"]
FAMILIES = [*STATIC, "glm4_moe", "olmoe", "qwen3_moe", "qwen3_next"]


def captured(family: str, dynamic: bool, layers: int = 1) -> tuple[ExportedProgram, dict[str, torch.Tensor]]:
    model = build(family, layers=layers)
    args = inputs(family, 2, 12)
    shapes = {"input_ids": {0: Dim.AUTO, 1: Dim.AUTO}}
    with torch.no_grad():
        return export(model, (), args, dynamic_shapes=shapes if dynamic else None, strict=False), args


def check(program: ExportedProgram, args: dict[str, torch.Tensor]) -> None:
    """The program's graph survives the IR and its text, and the program built from the IR computes the same bits."""
    graph = from_exported(program)
    assert_same(program.graph_module, graph_to_fx(graph))
    text = print_graph(graph)
    assert print_graph(parse_graph(text)) == text
    back = to_exported(graph, program)
    assert back.graph_signature == program.graph_signature
    assert back.range_constraints == program.range_constraints
    read = to_exported(parse_graph(text), program)  # text alone, without anything remembered of the nodes
    with torch.no_grad():
        want = program.module()(**args).logits
        assert torch.equal(back.module()(**args).logits, want)
        assert torch.equal(read.module()(**args).logits, want)


@pytest.mark.parametrize("family", STATIC)
def test_static(family: str) -> None:
    check(*captured(family, dynamic=False))


def test_dynamic() -> None:
    program, _ = captured("mixtral", dynamic=True)
    check(program, inputs("mixtral", 3, 7))
    ids = from_exported(program).args[-1].type
    assert isinstance(ids, TensorType)
    assert all(d.is_Symbol for d in ids.shape)


def test_decomposed() -> None:
    program, args = captured("deepseek_v3", dynamic=False)
    check(program.run_decompositions(), args)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "dynamic"),
    [(f, d) for f in FAMILIES for d in (False, True) if (f, d) != ("qwen3_next", True)],  # passes, in minutes
)
def test_every_family(family: str, dynamic: bool) -> None:
    program, args = captured(family, dynamic, layers=2)
    check(program, args)
    check(program.run_decompositions(), args)


class Counter(torch.nn.Module):
    """Writes to a buffer and to an input, holds a constant, has a dynamic size and an unused parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(4, 4)
        self.unused = torch.nn.Parameter(torch.ones(1))
        self.register_buffer("count", torch.zeros(()))
        self.register_buffer("scratch", torch.zeros(2), persistent=False)
        self.table = torch.arange(4.0)

    def forward(self, x: torch.Tensor, state: torch.Tensor, flag: bool = True) -> dict[str, Any]:
        self.count.add_(1)
        state.mul_(2)
        parts = self.linear(x).relu().chunk(2, -1)
        with torch.no_grad():
            offset = self.table.sum() + torch.tensor(0.5)
        return {"out": parts[0] * offset + x.shape[0], "count": self.count.clone(), "none": None, "flag": flag}


def counter_program() -> ExportedProgram:
    shapes = {"x": {0: Dim("n", min=2, max=64)}, "state": None}
    torch.manual_seed(0)
    return export(Counter(), (torch.ones(3, 4), torch.ones(2)), dynamic_shapes=shapes, strict=False)


def run_twice(program: ExportedProgram) -> list[torch.Tensor]:
    module, state = program.module(), torch.ones(2)
    x = torch.arange(20.0).view(5, 4)
    outs = [module(x, state) for _ in range(2)]
    return [*(o["out"].detach() for o in outs), *(o["count"] for o in outs), state]


@pytest.mark.parametrize("decomposed", [False, True])
@pytest.mark.parametrize("way", ["direct", "file"])
def test_mutation_constants_and_files(decomposed: bool, way: str, tmp_path: Path) -> None:
    program = counter_program()
    if decomposed:
        program = program.run_decompositions()
    graph = from_exported(program)
    assert "hop.wrap_with_set_grad_enabled" in {op.attrs.get("target") for op in graph.ops} or decomposed
    assert_same(program.graph_module, graph_to_fx(graph))
    back = to_exported(graph, program)
    assert back.graph_signature == program.graph_signature
    if way == "file":
        torch.export.save(back, tmp_path / "back.pt2")
        back = torch.export.load(tmp_path / "back.pt2")
    with pytest.raises(AssertionError, match="Guard failed"):
        back.module()(torch.ones(65, 4), torch.ones(2))
    want = run_twice(counter_program())
    assert want[3] == 2
    assert torch.equal(want[4], torch.full((2,), 4.0))
    for a, b in zip(run_twice(back), want, strict=True):
        assert torch.equal(a, b)


def test_text_with_nested_graphs_cannot_become_a_program() -> None:
    program = counter_program()
    with pytest.raises(EmitError, match="is not known"):
        to_exported(parse_graph(print_graph(from_exported(program))), program)


def call(target: str, *operands: Value) -> Op:
    args = tuple(Operand(i) for i in range(len(operands)))
    attrs = {"target": target, "args": args}
    return Op("torch.call", operands, [operands[0].type], attrs=attrs, groups=[len(operands)])


def test_names_follow_a_rewrite() -> None:
    program = counter_program()
    graph = from_exported(program)
    lifted = {arg.meta["target"] for arg in graph.args if "target" in arg.meta}
    assert {"linear.weight", "unused", "count", "scratch", "table"} <= lifted
    relu = next(op for op in graph.ops if op.attrs.get("target") == "aten.relu.default")
    new = call("aten.silu.default", relu.operands[0])
    graph.insert_before(relu, new)
    relu.result.replace_all_uses_with(new.result)
    relu.erase()
    constant = Op("torch.get_attr", (), [TensorType.of("f32")], attrs={"name": "moec_scale"})
    constant.meta["value"] = torch.tensor(3.0)
    graph.insert(0, constant)
    scaled = call("aten.mul.Tensor", new.result, constant.result)
    graph.insert_after(new, scaled)
    for user, i in list(new.result.uses):
        if user is not scaled:
            user.set_operand(i, scaled.result)
    for arg in graph.args:
        arg.name = f"renamed_{arg.name}"
    program_out = to_exported(graph, program)
    assert len(program_out.constants) == len(program.constants) + 1
    module = Counter()
    module.load_state_dict(program.state_dict)
    x = torch.arange(20.0).view(5, 4)
    want = (torch.nn.functional.silu(module.linear(x)) * 3.0).chunk(2, -1)[0] * 6.5 + 5
    state = torch.ones(2)
    out = program_out.module()(x, state)
    assert torch.allclose(out["out"], want, rtol=1e-6)
    assert torch.equal(state, torch.full((2,), 2.0))


@pytest.mark.parametrize("what", ["inputs", "outputs"])
def test_form_may_not_change(what: str) -> None:
    program = counter_program()
    graph = from_exported(program)
    if what == "inputs":
        graph.add_arg(TensorType.of("f32", "n"))
    else:
        graph.terminator.drop_operands()
        graph.terminator.attrs.clear()
    with pytest.raises(EmitError, match=f"{what}, the graph now has"):
        to_exported(graph, program)


def test_capture_does_not_touch_the_program() -> None:
    program = counter_program()
    before = program.graph_module.code
    graph_from_fx(program.graph_module).args[0].name = "other"
    assert program.graph_module.code == before
