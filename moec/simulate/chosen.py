"""What the pass ``overlap`` makes of a layer's forward on a simulated machine, without simulating it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from moec.parallel.plan import Plan
from moec.passes.base import PassContext
from moec.passes.manager import PassManager
from moec.passes.overlap import Overlap
from moec.simulate.layer import layer_graphs
from moec.simulate.planning import MachineCosts, RoutedRows
from moec.simulate.routing import Routing
from moec.simulate.topology import Topology

if TYPE_CHECKING:
    from moec.parallel.planner import ModelFacts


def chosen_chunks(machine: Topology, model: ModelFacts, form: str, tokens: int, routing: Routing) -> str:
    """The remark on the forward of a layer, as rank 0 has it.

    Args:
        machine: Cut to the ranks that share the experts.
        model: Sizes of the layer.
        form: How tokens travel.
        tokens: Of every rank.
        routing: Which experts they choose.
    """
    ranks = machine.ranks
    plan = Plan(ranks, machine.nodes if form == "hierarchical" else 1, form)
    ctx = PassContext(cost_model=MachineCosts(machine), profile=RoutedRows(routing, tokens, model.top_k))
    PassManager([*plan.passes(0), Overlap(rank=0)], repro=None).run(layer_graphs(model, ranks)[0].clone(), ctx)
    said = (r.message for r in ctx.remarks if r.pass_name == "overlap" and r.message.startswith("the forward "))
    return next(said, "").removeprefix("the forward ")
