"""The passes ``expert-parallel`` and ``expert-parallel-sums``.

Contract:
1. A ``moe.experts`` whose weights are gathered from shards over one group becomes ``moe.parallel_experts`` on the
   shards: dispatch, all-to-all, this rank's experts, all-to-all back, combine, and the same for its gradients.
2. ``expert-parallel`` gives the bits that one process with all experts and all tokens has: rows come home as they are
   and are combined there in order of k. ``expert-parallel-sums`` adds rows up on their way home.
3. Shared experts, whose weights are no shards, stay at home; slots of no expert (sentinels) are sent nowhere.
4. A group of one rank leaves the layer as it was, without the gather.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar, Literal

from moec.ir.core import Graph, Op
from moec.passes.base import Pass, PassClass, PassContext, PassResult
from moec.passes.dce import DeadCodeElimination, erase_unused
from moec.passes.expert_parallel.fixed import Fixed, has_equal_loads
from moec.passes.expert_parallel.flat import Flat
from moec.passes.expert_parallel.gather import Gather
from moec.passes.expert_parallel.hierarchical import Hierarchical
from moec.passes.expert_parallel.regions import backward, forward
from moec.passes.expert_parallel.route import Route, tensor_type
from moec.passes.expert_parallel.site import EXPERT_GROUPS, Site, Stays, hoist_casts, read_site, shard_of
from moec.passes.expert_parallel.sums import GatherSums, HierarchicalSums
from moec.passes.registry import register_pass

Form = tuple[str, type[Route], dict[str, int]]
"""A form for one layer: its name, its route, and what that has to know."""


@dataclass(frozen=True)
class Spread(Pass, ABC):
    """What the two passes have in common."""

    degree: int = 0

    def __post_init__(self) -> None:
        if self.degree < 0:
            raise ValueError("degree is a number of ranks, or 0 for what the shards say")

    @abstractmethod
    def form_of(self, site: Site) -> Form:
        """The form for one layer.

        Raises:
            Stays: The form does not fit the layer's ranks.
        """

    def run(self, graph: Graph, ctx: PassContext) -> PassResult:
        spread, hoisted = 0, False
        for op in [op for op in graph.ops if op.name == "moe.experts"]:
            try:
                hoisted |= hoist_casts(op)
                site = read_site(op)
                if site is None:
                    continue
                if self.degree and site.ranks != self.degree:
                    raise Stays(f"its experts lie on {site.ranks} ranks, not on {self.degree}")
                form = self.form_of(site) if site.ranks > 1 else None
            except Stays as reason:
                ctx.remark("missed", self.name, str(reason), op)
                continue
            how = form[0] if form is not None else "which hold all of them"
            what = f"{site.attr('experts')} experts on {site.ranks} ranks of {site.group!r}, {how}"
            if not ctx.take_fuel(self.name, what, op):
                break
            ctx.remark("applied", self.name, what, op)
            if form is None:
                _ungather(op)
            else:
                _spread(graph, site, form)
            spread += 1
        return PassResult(spread > 0 or hoisted, {"spread": spread})


@register_pass
@dataclass(frozen=True)
class ExpertParallel(Spread):
    """Sends tokens to the ranks that hold their experts, where a layer's weights would be gathered from shards.

    The result has the bits of one process that holds all experts and all ranks' tokens, if a GEMM gives a row the same
    bits whatever its place among the rows.

    Attributes:
        degree: Ranks that the experts must be spread over, 0 for whatever the shards say.
        form: How tokens travel. ``flat``: a row for every slot, by all-to-all. ``hierarchical``: to every node once,
            then inside the node. ``gather``: all tokens to all ranks. ``auto`` is ``gather`` where tokens have more
            experts than there are ranks, so that it sends fewer bytes there, else ``flat``.
        nodes: Nodes of the group's ranks, for ``hierarchical``.
        rank: The rank that the graph is for; needed by ``hierarchical`` where nodes hold different numbers of experts.
        equal_tokens: All ranks have equally many tokens in every step. Where the router also gives every rank equally
            many slots (``equal_load_groups``), splits are fixed and no counts are exchanged.
    """

    name: ClassVar[str] = "expert-parallel"
    pass_class: ClassVar[PassClass] = PassClass.BITWISE
    summary: ClassVar[str] = "tokens travel to experts on other ranks, instead of weights"

    form: Literal["flat", "hierarchical", "gather", "auto"] = "flat"
    nodes: int = 1
    rank: int = -1
    equal_tokens: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_nodes(self.form, self.nodes)

    def form_of(self, site: Site) -> Form:
        top_k = tensor_type(site.op.operands[1]).shape[1]
        if self.form == "hierarchical":
            return "hierarchical", Hierarchical, by_node(site, self.nodes, self.rank)
        if self.form == "gather" or (self.form == "auto" and bool(top_k > site.ranks)):
            return "gather", Gather, {}
        return ("fixed", Fixed, {}) if self.equal_tokens and has_equal_loads(site) else ("flat", Flat, {})


@register_pass
@dataclass(frozen=True)
class ExpertParallelSums(Spread):
    """As ``expert-parallel``, but a token's rows are added up where they were made, and one row comes home.

    Sums run in another order, and partial sums are rounded to the type of the layer's result. ``gather`` is an
    all-gather and a reduce-scatter; ``hierarchical`` brings one row from each node home instead of one for each slot.

    Attributes:
        degree: Ranks that the experts must be spread over, 0 for whatever the shards say.
        form: How tokens travel.
        nodes: Nodes of the group's ranks, for ``hierarchical``.
        rank: The rank that the graph is for; needed by ``hierarchical`` where nodes hold different numbers of experts.
    """

    name: ClassVar[str] = "expert-parallel-sums"
    pass_class: ClassVar[PassClass] = PassClass.REORDERS
    tolerance: ClassVar[float] = 1e-2  # partial sums in bf16; in f32 it is 1e-6
    summary: ClassVar[str] = "tokens travel to experts on other ranks, and sums of rows come home"

    form: Literal["gather", "hierarchical"] = "gather"
    nodes: int = 1
    rank: int = -1

    def __post_init__(self) -> None:
        super().__post_init__()
        check_nodes(self.form, self.nodes)

    def form_of(self, site: Site) -> Form:
        if self.form == "hierarchical":
            return "hierarchical", HierarchicalSums, by_node(site, self.nodes, self.rank)
        return "gather", GatherSums, {}


def check_nodes(form: str, nodes: int) -> None:
    """Refuse options that say nothing.

    Raises:
        ValueError: The number of nodes does not fit the form.
    """
    if nodes < 1 or (form == "hierarchical" and nodes == 1):
        raise ValueError("the hierarchical form needs the number of nodes, 2 or more")


def by_node(site: Site, nodes: int, rank: int) -> dict[str, int]:
    """What the hierarchical form has to know.

    Raises:
        Stays: The ranks are not spread over that many nodes, or nobody says which rank this is.
    """
    if site.ranks % nodes or site.ranks == nodes:
        raise Stays(f"{site.ranks} ranks are not several on each of {nodes} nodes")
    if rank < 0 and len(set(site.sizes)) > 1:
        raise Stays("nodes hold different numbers of experts: the option rank must say which rank this is")
    return {"nodes": nodes, "rank": rank}


def _ungather(op: Op) -> None:
    """Weights gathered from one rank are that rank's."""
    makers = []
    for value in [v for name in EXPERT_GROUPS for v in op.group(name)]:
        shard = shard_of(value)
        assert shard is not None and value.op is not None
        makers.append(value.op)
        value.replace_all_uses_with(shard.value)
    for maker in makers:
        erase_unused(maker)


def _spread(graph: Graph, site: Site, form: Form) -> None:
    op, (name, route, options) = site.op, form
    regions = [forward(site, route, options), backward(site, route, options)]
    for region in regions:
        DeadCodeElimination().run(region, PassContext())  # what a route is ready to do and was not asked for
    made = Op(
        "moe.parallel_experts",
        site.operands,
        [op.result.type],
        attrs={
            "experts": site.attr("experts"),
            "sentinels": site.attr("sentinels"),
            "group": site.group,
            "sizes": site.sizes,
            "form": name,
        },
        regions=regions,
        groups=(*op.groups, 0),
        loc=op.loc,
        names=[op.result.name],
    )
    made.results[0].meta = dict(op.result.meta)
    graph.insert_before(op, made)
    op.result.replace_all_uses_with(made.result)
    gathers = [v.op for kind in EXPERT_GROUPS for v in op.group(kind) if v.op is not None]
    op.erase()
    for gather in gathers:
        erase_unused(gather)
