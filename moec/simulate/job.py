"""What is simulated: a graph for every rank after a plan's passes and others, and the groups that they talk in."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import sympy

from moec.ir.core import Graph, Value
from moec.ir.opdef import op_def
from moec.ir.types import TensorType
from moec.parallel.plan import Plan
from moec.passes.base import Pass, PassContext, Remark
from moec.passes.calls import call_args, is_call
from moec.passes.expert_parallel.expert_parallel import Spread
from moec.passes.manager import PassManager
from moec.simulate.errors import SimulationError
from moec.simulate.exchange import Groups
from moec.simulate.topology import Topology

_UNSHARD = "moec.unshard.default"
_LAYERS = ("moe.parallel_experts", "moe.begin", "moe.experts")


@dataclass(frozen=True)
class Job:
    """Graphs to be traced.

    Attributes:
        graphs: One a rank; the same object where ranks do the same.
        groups: Names of groups, and the ranks of each instance.
        remarks: What passes said of rank 0's graph.
    """

    graphs: tuple[Graph, ...]
    groups: Groups
    remarks: tuple[Remark, ...] = ()

    @property
    def ranks(self) -> int:
        return len(self.graphs)


def make_job(
    graphs: Sequence[Graph],
    plan: Plan,
    passes: Callable[[], Sequence[Pass]],
    context: Callable[[], PassContext],
) -> Job:
    """Run the passes of the plan, then others, on the graphs of all ranks.

    Where the others spread experts themselves, the plan's are left out, so that something may come before.

    Args:
        graphs: One a rank, or one for all; they stay as they are.
        plan: Which ranks share experts, and how tokens travel. ``ep`` of 1 is whatever the graphs say.
        passes: Makes the others.
        context: Makes what passes are given.

    Raises:
        SimulationError: The plan does not fit the graphs, or is not for experts alone, or nothing communicates.
    """
    if plan.tp > 1:
        raise SimulationError(
            f"tp={plan.tp} is not simulated: attention's heads are split in the model, not in the graph of a layer",
            hint="leave tp out",
        )
    ranks = group_ranks(graphs[0])
    if len(graphs) > 1 and ranks and len(graphs) != ranks:
        raise SimulationError(
            f"{len(graphs)} graphs for {ranks} ranks", hint="give one graph for all ranks, or one each"
        )
    if plan.ep > 1 and ranks and plan.ep != ranks:
        raise SimulationError(f"the graph is for {ranks} ranks, the plan says ep={plan.ep}", hint=f"--plan ep={ranks}")
    if len(graphs) == 1 and any(len(set(sizes)) > 1 for sizes in _shares(graphs[0])):
        raise SimulationError(
            "ranks hold different numbers of experts, and there is one graph",
            hint="give a file with a graph for every rank, or the model's config.json",
        )
    distinct = list(dict.fromkeys(graphs))
    remarks: tuple[Remark, ...] = ()
    one_for_all = len(distinct) == 1
    chosen: list[Graph] = []
    for rank, graph in enumerate(graphs):
        if one_for_all and rank:
            chosen.append(chosen[0])
            continue
        mine = graph.clone()
        ctx = context()
        further = passes()
        spreads = plan.ep > 1 and not any(isinstance(p, Spread) for p in further)
        planned = plan.passes(-1 if one_for_all else rank) if spreads else []
        PassManager([*planned, *further], repro=None).run(mine, ctx)
        remarks = remarks or tuple(ctx.remarks)
        chosen.append(mine)
    count = group_ranks(chosen[0])
    if not count:
        missed = [str(r) for r in remarks if r.kind == "missed"]
        raise SimulationError(
            "the graph has no communication" + (f": {missed[0]}" if missed else ""),
            hint="its expert weights must be gathered from shards (comm.all_gather), or moe.parallel_experts be there; "
            "for a model give its config.json and --plan ep=8",
        )
    if len(chosen) == 1:
        chosen *= count
    return Job(tuple(chosen), groups_of(count, plan.nodes, {base for base, _ in _bases(chosen[0])}), remarks)


def groups_of(ranks: int, nodes: int, bases: set[str]) -> Groups:
    """Each axis of all ranks, and its parts: ``<axis>.node`` joins places of nodes, ``<axis>.local`` is a node."""
    each = ranks // nodes
    groups: dict[str, list[list[int]]] = {}
    for base in sorted(bases):
        groups[base] = [list(range(ranks))]
        groups[f"{base}.node"] = [[n * each + p for n in range(nodes)] for p in range(each)]
        groups[f"{base}.local"] = [[n * each + p for p in range(each)] for n in range(nodes)]
    return groups


def group_ranks(graph: Graph) -> int:
    """Ranks that a graph was made for: those of its axis, or 0 where it does not communicate."""
    found: dict[str, int] = {}
    for base, count in _bases(graph):
        found[base] = max(found.get(base, 0), count)
    return max(found.values(), default=0)


def _bases(graph: Graph) -> list[tuple[str, int]]:
    """(axis, ranks) of everything in a graph that communicates; an axis' part says nothing of its ranks."""
    found = []
    for op in graph.walk():
        if op.name in ("moe.parallel_experts", "moe.begin"):
            found.append((op.attrs["group"], len(op.attrs["sizes"])))
        elif op.name.startswith("comm.") and op.name.endswith(".start"):
            base, dot, _ = op.attrs["group"].partition(".")
            found.append((base, 1 if dot else op.attrs["ranks"]))
        elif is_call(op, _UNSHARD):
            _, sizes, group, _ = call_args(op)[0]
            found.append((group, len(list(getattr(sizes, "items", sizes)))))
    return found


def _shares(graph: Graph) -> list[tuple[int, ...]]:
    """Experts of every rank, of all layers that say so."""
    sizes = [op.attrs["sizes"] for op in graph.walk() if op.name == "moe.parallel_experts"]
    return sizes + [op.attrs["sizes"] for op in graph.walk() if op.name.startswith("comm.") and op.attrs.get("sizes")]


def token_symbols(graph: Graph) -> list[str]:
    """Symbols that stand for a rank's tokens: the number of rows of what a layer's router chose."""
    rows = [type.shape[0] for type in _chosen(graph)]
    return list(dict.fromkeys(row.name for row in rows if isinstance(row, sympy.Symbol)))


def chosen_experts(graph: Graph) -> int:
    """Experts of a token, k, in the first layer; 1 where there is none."""
    return next((int(type.shape[1]) for type in _chosen(graph) if type.shape[1].is_Integer), 1)


def given_choices(graph: Graph) -> dict[int, tuple[int, int]]:
    """Arguments that are a layer's ids, by their place: the layer's experts, and which layer it is.

    Ops on the same weights are one layer, on other tokens.
    """
    found: dict[int, tuple[int, int]] = {}
    layers: dict[tuple[Value, ...], int] = {}
    for op in graph.ops:
        if op.name in _LAYERS:
            layer = layers.setdefault(op.operands[3:], len(layers))
            if op.operands[1].op is None:
                found[op.operands[1].index] = op_def(op.name).attr(op, "experts"), layer
    return found


def _chosen(graph: Graph) -> list[TensorType]:
    """Types of the ids of all layers."""
    layers = [op for op in graph.ops if op.name in _LAYERS]
    chosen = [op for op in layers if op_def(op.name).attr(op, "experts") > 1]  # of a shared expert nothing is
    types = [op.operands[1].type for op in chosen or layers]
    return [type for type in types if isinstance(type, TensorType) and type.rank == 2]


def check_fits(job: Job, plan: Plan, topology: Topology) -> None:
    """Refuse a plan whose nodes are not the topology's.

    Raises:
        SimulationError: More ranks than the topology has, or nodes of other sizes.
    """
    cut = topology.first(job.ranks)
    if plan.nodes > 1 and plan.nodes != cut.nodes:
        raise SimulationError(
            f"the plan says {plan.nodes} nodes, {job.ranks} ranks are on {cut.nodes} of topology {topology.name!r}",
            hint=f"--plan ep={job.ranks},nodes={cut.nodes}",
        )
