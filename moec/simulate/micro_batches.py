"""Whether one of two micro-batches should compute while rows of the other travel, on a machine that is not here.

Two layers of a model, forward, with their attention: enough for each micro-batch to find work of the other. The pass
``interleave-layers`` decides, with the costs that the simulation would find, and nothing is simulated.
"""

from __future__ import annotations

from moec.cost.attention import Attention
from moec.parallel.plan import Plan
from moec.parallel.planner import ModelFacts
from moec.passes.base import PassContext
from moec.passes.interleave_layers import InterleaveLayers
from moec.simulate.attention import Prompts, model_graphs
from moec.simulate.job import make_job
from moec.simulate.planning import MachineCosts, RoutedRows
from moec.simulate.routing import Routing
from moec.simulate.topology import Topology

LAYERS = 2


def dual_batch(m: ModelFacts, a: Attention, topology: Topology, tokens: int, routing: Routing) -> str:
    """What the pass does with two micro-batches of ``tokens`` tokens, one prompt each, and the times that it compares.

    Args:
        m: The model's sizes.
        a: Those of its attention.
        topology: Of as many ranks as share the experts.
        tokens: Of a rank in each micro-batch.
        routing: Which experts tokens choose.

    Raises:
        SimulationError: A rank would hold no expert.
    """
    graphs = model_graphs(m, a, Prompts(tokens, LAYERS, 2), topology.ranks)
    costs, rows = MachineCosts(topology), RoutedRows(routing, tokens, m.top_k)
    plan = Plan(ep=topology.ranks)

    def context() -> PassContext:
        return PassContext(target=topology.device.target, cost_model=costs, profile=rows)

    job = make_job(graphs[:1] if len(set(graphs)) == 1 else graphs, plan, lambda: [InterleaveLayers()], context)
    return next(r.message for r in job.remarks if r.pass_name == InterleaveLayers.name)
