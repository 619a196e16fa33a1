"""The pass ``expert-parallel``.

Contract:
1. A ``moe.experts`` whose weights are gathered from shards over one group becomes ``moe.parallel_experts`` on the
   shards: dispatch, all-to-all, this rank's experts, all-to-all back, combine, and the same for its gradients.
2. Its result has the bits that the gathered form has: rows come home as they are and are combined there in order of k.
3. Shared experts, whose weights are no shards, stay at home; slots of no expert (sentinels) are sent nowhere.
4. A group of one rank leaves the layer as it was, without the gather.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from moec.ir.core import Graph, Op
from moec.passes.base import Pass, PassClass, PassContext, PassResult
from moec.passes.dce import erase_unused
from moec.passes.expert_parallel.flat import Flat
from moec.passes.expert_parallel.regions import backward, forward
from moec.passes.expert_parallel.site import EXPERT_GROUPS, Site, Stays, read_site, shard_of
from moec.passes.registry import register_pass


@register_pass
@dataclass(frozen=True)
class ExpertParallel(Pass):
    """Sends tokens to the ranks that hold their experts, where a layer's weights would be gathered from shards.

    Attributes:
        degree: Ranks that the experts must be spread over, 0 for whatever the shards say.
    """

    name: ClassVar[str] = "expert-parallel"
    pass_class: ClassVar[PassClass] = PassClass.BITWISE
    summary: ClassVar[str] = "tokens travel to experts on other ranks, instead of weights"

    degree: int = 0

    def __post_init__(self) -> None:
        if self.degree < 0:
            raise ValueError("degree is a number of ranks, or 0 for what the shards say")

    def run(self, graph: Graph, ctx: PassContext) -> PassResult:
        spread = 0
        for op in [op for op in graph.ops if op.name == "moe.experts"]:
            try:
                site = read_site(op)
                if site is None:
                    continue
                if self.degree and site.ranks != self.degree:
                    raise Stays(f"its experts lie on {site.ranks} ranks, not on {self.degree}")
            except Stays as reason:
                ctx.remark("missed", self.name, str(reason), op)
                continue
            what = f"{site.attr('experts')} experts on {site.ranks} ranks of {site.group!r}"
            if not ctx.take_fuel(self.name, what, op):
                break
            ctx.remark("applied", self.name, what, op)
            if site.ranks == 1:
                _ungather(op)
            else:
                _spread(graph, site)
            spread += 1
        return PassResult(spread > 0, {"spread": spread})


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


def _spread(graph: Graph, site: Site) -> None:
    op = site.op
    made = Op(
        "moe.parallel_experts",
        site.operands,
        [op.result.type],
        attrs={
            "experts": site.attr("experts"),
            "sentinels": site.attr("sentinels"),
            "group": site.group,
            "sizes": site.sizes,
            "form": "flat",
        },
        regions=[forward(site, Flat, {}), backward(site, Flat, {})],
        groups=op.groups,
        loc=op.loc,
        names=[op.result.name],
    )
    made.results[0].meta = dict(op.result.meta)
    graph.insert_before(op, made)
    op.result.replace_all_uses_with(made.result)
    gathers = [v.op for name in EXPERT_GROUPS for v in op.group(name) if v.op is not None]
    op.erase()
    for gather in gathers:
        erase_unused(gather)
