"""What a plan says (``"ep=4"``), and which ranks of a mesh it puts together.

Attention keeps its own mapping: groups of ``tp`` neighbouring ranks split its heads and have the same tokens, and the
groups have tokens of their own (data parallel). The experts' mapping is folded over the same ranks (MoE Parallel
Folding, arXiv:2504.14960): groups of ``ep`` neighbouring ranks share a layer's experts, and where the mesh has more
ranks than that, the groups are replicas of each other. Ranks of one ``tp`` group send a part of its tokens each.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any

import torch
import torch.distributed as dist

from moec.ir.errors import MoecError, nearest
from moec.ir.parallel_semantics import chunk_sizes
from moec.passes.base import Pass


class ParallelError(MoecError):
    """A plan, mesh or model that cannot be parallelized, or ranks that do not agree about it."""

    code = "parallel"


CHOICES = {
    "form": ("flat", "hierarchical", "gather", "auto"),
    "sums": ("home", "way"),
    "payload": ("whole", "int8", "fp8"),
    "tokens": ("any", "equal"),
    "overlap": ("none", "auto", "two", "tutel", "fsmoe", "2", "3", "4", "5", "6", "7", "8"),
    "reschedule": ("none", "experts", "ranks"),
    "interleave": ("none", "auto", "always"),
}
"""Settings that are words, and the words."""


@dataclass(frozen=True)
class Plan:
    """How experts lie on ranks and how tokens reach them.

    Attributes:
        ep: Ranks that share the experts of a layer.
        nodes: Nodes that these ranks are on, as many of them on each, neighbours together.
        form: How tokens travel, as the pass ``expert-parallel`` has it.
        sums: ``home`` combines at home, in the order of one process; ``way`` adds rows up on their way home
            (``expert-parallel-sums``), for ``gather`` and ``hierarchical``.
        payload: ``int8`` and ``fp8`` send token rows in 8 bits (``quantize-dispatch``); lossy.
        tokens: ``equal`` promises that all ranks have equally many tokens in every step, so that a router with groups
            of equal load needs no counts exchanged.
        tp: Ranks that split attention's heads; they have the same tokens.
        overlap: Who chooses the chunks in which rows travel while experts compute (the pass ``overlap``), or how many
            equal chunks of experts there are.
        step: Tokens of a rank in a step, which that choice is made for; 0 where a routing profile says it.
        length: Tokens of a sequence, for what attention does with its scores; 0 where nobody knows: not counted then.
        reschedule: What the tokens of two micro-batches in a step are regrouped for, where the compile's routing
            profile shows that it pays (the pass ``reschedule-tokens``): few experts a batch, or few ranks.
        interleave: Whether one micro-batch of a step computes while the rows of another travel (the pass
            ``interleave-layers``): where the cost model sees it pay, or ``always``.
    """

    ep: int = 1
    nodes: int = 1
    form: str = "flat"
    sums: str = "home"
    payload: str = "whole"
    tokens: str = "any"
    tp: int = 1
    overlap: str = "none"
    step: int = 0
    length: int = 0
    reschedule: str = "none"
    interleave: str = "none"

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
            if key == "etp":
                raise ParallelError(
                    f"plan {text!r}: moec does not carry out etp, which splits each expert over ranks",
                    hint="leave etp out, and give ep more ranks: up to as many as there are experts",
                )
            if key not in known or not equals:
                near = nearest(key, known)
                raise ParallelError(f"plan {text!r}: {part!r} is no setting; {near}", hint="as in 'ep=4'")
            words: dict[str, Any] = {key: value}
            if key in CHOICES:
                if value not in CHOICES[key]:
                    raise ParallelError(f"plan {text!r}: {key} cannot be {value!r}; {nearest(value, CHOICES[key])}")
            elif value.isascii() and value.isdigit() and int(value) > 0:
                words[key] = int(value)
            else:
                raise ParallelError(f"plan {text!r}: {key} must be a number from 1 up, not {value!r}")
            plan = replace(plan, **words)
        plan.check(text)
        return plan

    def check(self, text: str) -> None:
        """Refuse settings that do not go together.

        Raises:
            ParallelError: with the plan as the caller wrote it.
        """
        if self.ep % self.tp and self.tp % self.ep:
            raise ParallelError(
                f"plan {text!r}: of tp={self.tp} and ep={self.ep} one must be a multiple of the other",
                hint="groups of ranks must lie inside each other: as in 'tp=2,ep=4'",
            )
        if self.tp > 1 and self.tokens == "equal":
            raise ParallelError(
                f"plan {text!r}: ranks that split heads share out their tokens, not always equally many to each",
                hint="leave tokens=equal out where tp is above 1",
            )
        if self.ep % self.nodes:
            raise ParallelError(f"plan {text!r}: {self.ep} ranks are not spread evenly over {self.nodes} nodes")
        if self.form == "hierarchical" and not 1 < self.nodes < self.ep:
            raise ParallelError(
                f"plan {text!r}: the hierarchical form needs several nodes with several ranks each",
                hint="as in 'ep=8,nodes=2,form=hierarchical'",
            )
        if self.sums == "way" and self.form not in ("gather", "hierarchical"):
            raise ParallelError(
                f"plan {text!r}: the form {self.form!r} has no ranks on the way that could add rows up",
                hint="add form=gather or form=hierarchical",
            )

    @property
    def plans_overlap(self) -> bool:
        """Whether something is chosen by times, on which all ranks must agree."""
        return (self.overlap != "none" and not self.overlap.isdigit()) or self.interleave == "auto"

    def passes(self, rank: int) -> list[Pass]:
        """The passes that carry the plan out, for the ``rank``-th of the ranks that share experts."""
        from moec.passes.carry_shared_experts import CarrySharedExperts
        from moec.passes.expert_parallel import ExpertParallel, ExpertParallelSums
        from moec.passes.interleave_layers import InterleaveLayers
        from moec.passes.overlap import Overlap
        from moec.passes.quantize_dispatch import QuantizeDispatch
        from moec.passes.reschedule_tokens import RescheduleTokens

        made: list[Pass] = []
        if self.reschedule != "none":
            objective: Any = self.reschedule
            made.append(RescheduleTokens(objective=objective))
        if self.sums == "way":
            form: Any = self.form
            made.append(ExpertParallelSums(self.ep, form, self.nodes, rank))
        else:
            shape: Any = self.form
            made.append(ExpertParallel(self.ep, shape, self.nodes, rank, self.tokens == "equal"))
        if self.payload != "whole":
            made.append(QuantizeDispatch("i8" if self.payload == "int8" else "f8e4m3fn"))
        if self.overlap != "none":
            policy: Any = self.overlap
            told = policy.isdigit()
            made.append(CarrySharedExperts())
            made.append(Overlap(chunks=int(policy)) if told else Overlap(policy, tokens=self.step, rank=rank))
        if self.interleave != "none":
            made.append(InterleaveLayers(self.interleave == "always", self.step, self.length))
        return made


_IN_FORCE: dict[str, tuple[Plan, int]] = {}


def put_in_force(group: str, plan: Plan, rank: int) -> None:
    """Say which plan the experts that lie over ``group`` follow, and which of its ranks this is."""
    _IN_FORCE[group] = plan, rank


def follow_another(plan: Plan) -> set[str]:
    """Groups over which experts lie that follow another plan."""
    return {group for group, (other, _) in _IN_FORCE.items() if other != plan}


def passes_for(group: str) -> list[Pass]:
    """The passes for layers whose experts lie over ``group``; the flat form where nobody said anything."""
    plan, rank = _IN_FORCE.get(group, (Plan(ep=0), -1))
    return plan.passes(rank)


@dataclass(frozen=True)
class Layout:
    """A plan on a mesh, as one rank sees it.

    Attributes:
        plan: The plan.
        mesh: Of shape [ep], or [replicas, ep] where more ranks are there: every row holds all experts. With ``tp`` it
            is [max(ep, tp) groups, groups of the smaller in the larger, the smaller], without axes of one rank.
        group: Name of the rows' group, which programs use.
        mean: Gradients are means over all tokens' ranks, as with DistributedDataParallel, rather than sums.
        ep_axes, tp_axes: Axes of the mesh that make up a group that shares experts, and one that splits heads.
        ep_group, tp_group: torch's handles of this rank's.
        tp_name: Name of the latter, which programs use.
    """

    plan: Plan
    mesh: Any
    group: str
    mean: bool
    ep_axes: tuple[int, ...]
    tp_axes: tuple[int, ...]
    ep_group: Any
    tp_group: Any
    tp_name: str

    @property
    def replicas(self) -> int:
        return int(self.mesh.size()) // self.plan.ep

    @property
    def rank(self) -> int:
        """This rank's place among those that share the experts."""
        return int(dist.get_rank(self.ep_group))

    @property
    def tp_rank(self) -> int:
        """This rank's place among those that split the heads."""
        return 0 if self.plan.tp == 1 else int(dist.get_rank(self.tp_group))

    def sizes(self, experts: int) -> tuple[int, ...]:
        """Experts of every rank, as DTensor's ``Shard(0)`` deals them out along one axis after the other."""
        sizes: tuple[int, ...] = (experts,)
        for axis in self.ep_axes:
            sizes = tuple(part for size in sizes for part in chunk_sizes(size, self.mesh.size(axis)))
        return sizes

    def experts_of(self, experts: int) -> tuple[int, int]:
        """First and past-last expert of this rank."""
        sizes = self.sizes(experts)
        start = sum(sizes[: self.rank])
        return start, start + sizes[self.rank]


AXES = ("replica", "ep")


def check_mesh(plan: Plan, mesh: Any) -> torch.Tensor:
    """The ranks of ``mesh`` as [replicas, ep].

    Raises:
        ParallelError: The mesh does not hold this rank, or a number of ranks that ``ep`` or ``tp`` does not divide.
    """
    ranks = mesh.mesh.flatten()
    for name, wanted in (("ep", plan.ep), ("tp", plan.tp)):
        if len(ranks) % wanted:
            raise ParallelError(
                f"{name}={wanted} does not divide the mesh's {len(ranks)} ranks",
                hint=f"choose {name} among {[d for d in range(1, len(ranks) + 1) if len(ranks) % d == 0]}",
            )
    if dist.get_rank() not in ranks.tolist():
        raise ParallelError(f"rank {dist.get_rank()} is not in the mesh of the ranks {ranks.tolist()}")
    return ranks.view(-1, plan.ep)


def fold(plan: Plan, mesh: Any, group: str, mean: bool, tp_name: str) -> Layout:
    """The :class:`Layout` over the ranks of ``mesh``, on that itself where it has one axis of ``ep`` ranks.

    Else groups are made, and then all ranks of torch.distributed call this together, as they do to make a mesh.
    """
    from torch.distributed.device_mesh import DeviceMesh

    ranks = check_mesh(plan, mesh)
    if plan.tp > 1:
        return _fold_both(plan, mesh, group, mean, tp_name)
    if len(ranks) == 1:
        folded = mesh if mesh.ndim == 1 else DeviceMesh(mesh.device_type, ranks[0], mesh_dim_names=AXES[1:])
        return Layout(plan, folded, group, mean, (0,), (), folded.get_group(0), None, tp_name)
    folded = DeviceMesh(mesh.device_type, ranks, mesh_dim_names=AXES)
    folded._flatten("all")  # sums over both axes are then one collective
    return Layout(plan, folded, group, mean, (1,), (), folded.get_group(1), None, tp_name)


def _fold_both(plan: Plan, mesh: Any, group: str, mean: bool, tp_name: str) -> Layout:
    from torch.distributed.device_mesh import DeviceMesh

    ranks, small, large = mesh.mesh.flatten(), min(plan.ep, plan.tp), max(plan.ep, plan.tp)
    sizes = {"outer": len(ranks) // large, "middle": large // small, "inner": small}
    kept = {name: size for name, size in sizes.items() if size > 1}
    names = tuple(kept)
    if len(kept) == mesh.ndim == 1:
        folded = mesh
    else:
        folded = DeviceMesh(mesh.device_type, ranks.view(*kept.values()), mesh_dim_names=names)

    def axes(width: int) -> tuple[int, ...]:
        parts = (("inner",) if width == small else ("middle", "inner")) if width > 1 else ()
        return tuple(names.index(n) for n in parts if n in names)

    def handle(at: tuple[int, ...]) -> Any:
        if len(at) < 2:
            return folded.get_group(at[0]) if at else None
        return folded[tuple(names[i] for i in at)]._flatten("whole").get_group()

    ep_axes, tp_axes = axes(plan.ep), axes(plan.tp)
    return Layout(plan, folded, group, mean, ep_axes, tp_axes, handle(ep_axes), handle(tp_axes), tp_name)
