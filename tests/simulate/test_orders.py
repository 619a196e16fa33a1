"""Chunks of any experts, simulated: the same bytes travel, the same rows are computed, gradients are as large."""

from __future__ import annotations

import pytest
import torch

from moec.ir.core import Graph
from moec.ir.types import TensorType
from moec.passes import parse_pipeline
from moec.passes.overlap.by_experts import cut_by_experts
from moec.passes.overlap.chunks import Chunks
from moec.passes.overlap.order import reorder
from moec.simulate.abstract import execute
from moec.simulate.routing import Routing
from moec.simulate.run import Outcome, Setting, run_graphs
from moec.simulate.topology import load_topology
from tests.parallel.layers import Layer

LAYER = Layer(ranks=2, experts=7, hidden=64, inner=64, dtype="bf16")
SETS = (((0, 3), (2,)), ((), (1,)), ((1, 2), (0,)))


def graphs(chunks: bool) -> list[Graph]:
    found = [LAYER.spread(rank, "expert-parallel") for rank in range(LAYER.ranks)]
    for rank, graph in enumerate(found if chunks else ()):
        op = graph.ops[0]
        for place, whole in enumerate(op.regions):
            op.regions[place] = cut = cut_by_experts(whole, Chunks.of(LAYER.sizes, SETS, rank))
            reorder(cut)
            cut.parent_op = op
    return found


def simulated(chunks: bool, training: bool) -> Outcome:
    setting = Setting(load_topology("8xh100"), routing=Routing.parse("zipf:1.5"), tokens=256, training=training)
    return run_graphs(graphs(chunks), setting, lambda: parse_pipeline(""))


@pytest.mark.parametrize("training", [False, True])
def test_what_is_sent_and_computed_is_that_of_the_whole(training: bool) -> None:
    whole, cut = (simulated(chunks, training).report.ranks for chunks in (False, True))
    assert [r.rows for r in cut] == [r.rows for r in whole]
    assert [r.sent for r in cut] == pytest.approx([r.sent for r in whole])


def test_gradients_of_some_experts_are_as_large_as_those_experts() -> None:
    op = next(o for o in graphs(True)[0].ops[0].regions[1].ops if o.name == "moe.experts_backward")
    types = [v.type for v in op.operands]
    assert all(isinstance(t, TensorType) for t in types)
    shapes = [[int(d) if d.is_Integer else 5 for d in t.shape] for t in types if isinstance(t, TensorType)]
    made = execute(op, [torch.empty(shape, device="meta") for shape in shapes], {}, lambda *_: [])
    wanted = [shape for shape, need in zip(shapes[1:], op.attrs["needs"], strict=True) if need]
    assert len(op.attrs["only"]) == 2 < LAYER.sizes[0] and wanted[-1][0] == LAYER.sizes[0]
    assert [list(m.shape) for m in made] == [[2, *w[1:]] if w[0] == LAYER.sizes[0] else w for w in wanted]
