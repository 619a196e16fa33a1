"""What the surroundings want left stays as it is, with a remark; whatever is elsewhere, or another pass's, does not."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from moec.ir.core import Graph, Location
from moec.passes import PassContext, PassManager
from tests.passes.layers import Layer, capture
from tests.passes.test_raise_loops import inputs, loop
from tests.passes.test_raise_moe import make

CLEAN = "functionalize,canonicalize,cse"


def batched() -> Graph:
    layer = Layer()
    return capture(layer.forward, make(layer, 5, 0, False), (0, 1))


def looped() -> Graph:
    return capture(loop(lambda e: e, half=False, keep=False), inputs(5, 2, 2, torch.float32, "distinct"), range(3))


def with_shared() -> Graph:
    layer = Layer()
    up, down = torch.ones(6, 8), torch.ones(8, 6)

    def run(x: Tensor, logits: Tensor, up: Tensor, down: Tensor, *params: Tensor) -> Tensor:
        dense = functional.linear(functional.silu(functional.linear(x, up)), down)
        return layer.forward(x, logits, *params) + dense

    x, logits, *params = make(layer, 5, 0, False)
    return capture(run, [x, logits, up, down, *params], (0, 1))


CASES = {
    "raise-moe": (batched, CLEAN, "moe.combine"),
    "raise-moe, loops": (looped, CLEAN, "moe.combine"),
    "raise-shared-experts": (with_shared, f"{CLEAN},raise-moe", "moe.combine"),
    "fuse-routing": (batched, f"{CLEAN},raise-moe", "moe.route"),
    "reschedule-tokens{cut=true,always=true}": (batched, "default", "moe.regroup"),
}


@pytest.mark.parametrize("case", CASES)
def test_what_is_wanted_left_stays(case: str) -> None:
    make_graph, before, op = CASES[case]
    pass_text = case.partition(", ")[0]
    name = pass_text.partition("{")[0]
    graph = PassManager(before, repro=None).run(make_graph(), PassContext())
    text = str(graph)

    def run(*left: tuple[str, Location]) -> tuple[Graph, PassContext]:
        ctx = PassContext(left=frozenset(left))
        return PassManager(pass_text, repro=None).run(graph.clone(), ctx), ctx

    changed, _ = run()
    made = [o for o in changed.ops if o.name == op]
    assert str(changed) != text
    where = made[-1].loc
    stays, ctx = run((name, where))
    assert str(stays) == text
    assert any(r.pass_name == name and "stays as it is" in r.message for r in ctx.remarks)
    for left in ((name, Location("elsewhere", where.source, where.stack)), ("another", where)):
        same, ctx = run(left)
        assert str(same) == str(changed) and not any("stays as it is" in r.message for r in ctx.remarks)
