"""What a plan says (``"ep=4"``), and which ranks of a mesh it puts together.

Attention keeps its own mapping: every rank of the mesh has tokens of its own (data parallel). The experts' mapping is
folded over the same ranks (MoE Parallel Folding, arXiv:2504.14960): groups of ``ep`` neighbouring ranks share a layer's
experts, and where the mesh has more ranks than that, the groups are replicas of each other.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any

import torch
import torch.distributed as dist

from moec.ir.errors import MoecError, nearest
from moec.ir.parallel_semantics import chunk_sizes


class ParallelError(MoecError):
    """A plan, mesh or model that cannot be parallelized, or ranks that do not agree about it."""

    code = "parallel"


FORMS = ("flat", "hierarchical", "gather")


@dataclass(frozen=True)
class Plan:
    """How experts lie on ranks and how tokens reach them.

    Attributes:
        ep: Ranks that share the experts of a layer.
        nodes: Nodes that these ranks are on, as many of them on each, neighbours together.
        form: How tokens travel: ``flat``, ``hierarchical`` (once to each node) or ``gather`` (all to all ranks).
    """

    ep: int = 1
    nodes: int = 1
    form: str = "flat"

    @staticmethod
    def parse(text: str) -> Plan:
        """A plan from its text: ``key=value`` pairs with commas between, such as ``"ep=8,nodes=2,form=hierarchical"``.

        Raises:
            ParallelError: An unknown key or value; the message names the nearest.
        """
        plan = Plan()
        known = [f.name for f in fields(Plan)]
        for part in filter(None, (p.strip() for p in text.split(","))):
            key, equals, value = (p.strip() for p in part.partition("="))
            if key not in known or not equals:
                raise ParallelError(
                    f"plan {text!r}: {part!r} is no setting; {nearest(key, known)}", hint="as in 'ep=4'"
                )
            if key == "form":
                if value not in FORMS:
                    raise ParallelError(f"plan {text!r}: form cannot be {value!r}; {nearest(value, FORMS)}")
                plan = replace(plan, form=value)
            elif value.isascii() and value.isdigit() and int(value) > 0:
                number = int(value)
                plan = replace(plan, ep=number) if key == "ep" else replace(plan, nodes=number)
            else:
                raise ParallelError(f"plan {text!r}: {key} must be a number from 1 up, not {value!r}")
        if plan.ep % plan.nodes:
            raise ParallelError(f"plan {text!r}: {plan.ep} ranks are not spread evenly over {plan.nodes} nodes")
        if plan.form == "hierarchical" and not 1 < plan.nodes < plan.ep:
            raise ParallelError(
                f"plan {text!r}: the hierarchical form needs several nodes with several ranks each",
                hint="as in 'ep=8,nodes=2,form=hierarchical'",
            )
        return plan


@dataclass(frozen=True)
class Layout:
    """A plan on a mesh, as one rank sees it.

    Attributes:
        plan: The plan.
        mesh: Of shape [ep], or [replicas, ep] where more ranks are there: every row holds all experts.
        group: Name of the rows' group, which programs use.
        mean: Gradients are means over all ranks, as with DistributedDataParallel, rather than sums.
    """

    plan: Plan
    mesh: Any
    group: str
    mean: bool

    @property
    def replicas(self) -> int:
        return int(self.mesh.size()) // self.plan.ep

    @property
    def rank(self) -> int:
        """This rank's place among those that share the experts."""
        return int(self.mesh.get_local_rank(AXES[1]))

    def sizes(self, experts: int) -> tuple[int, ...]:
        """Experts of every rank, as DTensor's ``Shard(0)`` deals them out."""
        return chunk_sizes(experts, self.plan.ep)

    def experts_of(self, experts: int) -> tuple[int, int]:
        """First and past-last expert of this rank."""
        sizes = self.sizes(experts)
        start = sum(sizes[: self.rank])
        return start, start + sizes[self.rank]


AXES = ("replica", "ep")


def check_mesh(plan: Plan, mesh: Any) -> torch.Tensor:
    """The ranks of ``mesh`` as [replicas, ep].

    Raises:
        ParallelError: The mesh does not hold this rank, or a number of ranks that ``ep`` does not divide.
    """
    ranks = mesh.mesh.flatten()
    if len(ranks) % plan.ep:
        raise ParallelError(
            f"ep={plan.ep} does not divide the mesh's {len(ranks)} ranks",
            hint=f"choose ep among {[d for d in range(1, len(ranks) + 1) if len(ranks) % d == 0]}",
        )
    if dist.get_rank() not in ranks.tolist():
        raise ParallelError(f"rank {dist.get_rank()} is not in the mesh of the ranks {ranks.tolist()}")
    return ranks.view(-1, plan.ep)


def fold(plan: Plan, mesh: Any) -> Any:
    """The DeviceMesh of a :class:`Layout` over the ranks of ``mesh``. All ranks call this together."""
    from torch.distributed.device_mesh import DeviceMesh

    ranks = check_mesh(plan, mesh)
    if len(ranks) == 1:
        return DeviceMesh(mesh.device_type, ranks[0], mesh_dim_names=AXES[1:])
    folded = DeviceMesh(mesh.device_type, ranks, mesh_dim_names=AXES)
    folded._flatten("all")  # sums over both axes are then one collective
    return folded
