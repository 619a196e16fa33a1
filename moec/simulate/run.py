"""From graphs to a report: the plan's passes and others, the trace of all ranks, the timeline, and its sums."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import sympy
from torch import Tensor

from moec.ir.core import Graph
from moec.ir.types import TensorType
from moec.parallel.plan import Plan
from moec.passes.base import Pass, PassContext, Remark
from moec.simulate.abstract import sizes_of
from moec.simulate.events import simulate
from moec.simulate.job import check_fits, chosen_experts, given_choices, group_ranks, make_job, token_symbols
from moec.simulate.planning import MachineCosts, RoutedRows
from moec.simulate.report import Report, make_report
from moec.simulate.routing import Routing
from moec.simulate.steps import Timeline
from moec.simulate.topology import Topology
from moec.simulate.trace import trace


@dataclass(frozen=True)
class Setting:
    """What a program is simulated in.

    Attributes:
        topology: The machine.
        plan: Which ranks share experts; ``ep`` of 1 is whatever the graphs say.
        routing: Which experts tokens choose.
        tokens: Of every rank.
        sizes: What further symbols of the graphs stand for.
        training: Run the layers' backward programs too.
    """

    topology: Topology
    plan: Plan = field(default_factory=Plan)
    routing: Routing = field(default_factory=Routing)
    tokens: int = 4096
    sizes: Mapping[str, int] = field(default_factory=dict)
    training: bool = False


@dataclass(frozen=True)
class Outcome:
    """What came of it: sums, every moment, and what passes said of rank 0's graph."""

    report: Report
    timeline: Timeline
    remarks: tuple[Remark, ...]


def run_graphs(graphs: Sequence[Graph], setting: Setting, passes: Callable[[], Sequence[Pass]] = tuple) -> Outcome:
    """Simulate a step of all ranks.

    Args:
        graphs: One for all ranks, or one for each; they stay as they are.
        setting: Machine, plan and routing.
        passes: Makes the passes behind the plan's; they are given the machine's costs and the routing.

    Raises:
        MoecError: A plan that does not fit, a size that is missing, a program that cannot run.
    """
    s = setting
    ranks = s.plan.ep if s.plan.ep > 1 else group_ranks(graphs[0])
    costs = MachineCosts(s.topology.first(ranks) if ranks else s.topology)
    rows = RoutedRows(s.routing, s.tokens, chosen_experts(graphs[0]))
    target = s.topology.device.target
    job = make_job(graphs, s.plan, passes, lambda: PassContext(target=target, cost_model=costs, profile=rows))
    check_fits(job, s.plan, s.topology)
    machine = s.topology.first(job.ranks)
    mine = [graphs[rank % len(graphs)] for rank in range(job.ranks)]
    sizes = [{**dict.fromkeys(token_symbols(g), s.tokens), **s.sizes} for g in mine]
    ids = [_given(graph, rank, sizes[rank], s.routing) for rank, graph in enumerate(mine)]
    found = trace(job.graphs, job.groups, machine, s.routing, sizes=sizes, ids=ids, training=s.training)
    timeline = simulate(found.programs, found.collectives, machine)
    return Outcome(make_report(found, timeline), timeline, job.remarks)


def _given(graph: Graph, rank: int, sizes: Mapping[str, int], routing: Routing) -> dict[int, Tensor]:
    """A rank's arguments that are choices, as the routing draws them: passes may stand between them and the layer."""
    symbols = {sympy.Symbol(name, integer=True): size for name, size in sizes.items()}
    found = {}
    for place, (experts, layer) in given_choices(graph).items():
        type = graph.args[place].type
        assert isinstance(type, TensorType)
        tokens, top_k = sizes_of(type, symbols, repr(graph.args[place]))
        found[place] = routing.ids(rank, tokens, top_k, experts, layer=layer)
    return found
