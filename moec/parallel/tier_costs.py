"""What the ranks of a plan with nodes plan with besides: links between nodes and inside them, measured apart.

All groups of a kind are measured at once, as they are used, and the slowest counts. A chunk of a layer calls more in
this form: it is sorted, and sent on, in its node.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist

from moec.backends.distributed import groups
from moec.cost.chunks import Calls
from moec.cost.links import Link
from moec.parallel.chunk_costs import (
    BY_TOKENS,
    CHUNKS,
    burden_of,
    own_seconds,
    sample_calls,
    spare_cores,
    taken,
    turns_on,
)
from moec.parallel.costs import costs_of, keep_costs, measure
from moec.parallel.plan import Plan
from moec.passes.expert_parallel.expert_parallel import Spread

PARTS = (".node", ".local")
"""Ends of names: of the group of one place on all nodes, and of that of one node."""


def agree_tiers(group: str, parts: Mapping[str, Any], process_group: Any, device: str, plan: Plan, rank: int) -> None:
    """Measure the links of both parts, and what a chunk calls; all ranks of the group call this together.

    Nothing is kept where they did not agree on a processor (:func:`moec.parallel.costs.agree`).

    Args:
        group: What programs call all ranks.
        parts: torch's handles of this rank's groups, by :data:`PARTS`.
        process_group: torch's handle of all ranks.
        device: Type of the device whose tensors travel.
        plan: Which ranks are on which node.
        rank: This rank's place among them.
    """
    shared = not spare_cores(process_group)
    found: dict[str, tuple[Link, Link | None]] = {}
    for part in PARTS:
        link, sending = measure(parts[part], device)
        alpha, slowness, least, more = _slowest(
            [link.alpha_s, 1 / link.bytes_per_s, *taken(sending, shared)], process_group, device
        )
        found[part] = Link(alpha, 1 / slowness), burden_of(sending, least, more, device)
    slowest = max((link for link, _ in found.values()), key=lambda link: link.alpha_s)
    calls = _calls(group, parts, process_group, device, plan, rank, slowest)
    known = costs_of(group)
    if known is None:
        return
    chunks = replace(known.chunks, tokens=calls)
    keep_costs(group, replace(known, chunks=chunks))
    for part, (link, burden) in found.items():
        keep_costs(group + part, replace(known, link=link, chunks=replace(chunks, burden=burden)))


def _calls(
    group: str, parts: Mapping[str, Any], process_group: Any, device: str, plan: Plan, rank: int, slowest: Link
) -> Calls:
    """What a chunk of tokens calls, forwards."""
    name = f"{group}.sample"
    handles = {name: process_group} | {name + part: parts[part] for part in PARTS}
    for each, handle in handles.items():
        groups.bind(each, handle)
    try:
        spread = next(p for p in plan.passes(rank) if isinstance(p, Spread))
        made = sample_calls(name, dist.get_world_size(process_group), device, spread, (BY_TOKENS,))
        whole, cut = (own_seconds(*forward, turns_on(slowest)) for forward, _ in made)
    finally:
        for each in handles:
            groups.unbind(each)
    every, front = _slowest([cut.all - whole.all, cut.front - whole.front], process_group, device)
    every = max(0.0, every / CHUNKS)
    return Calls(every, min(every, max(0.0, front / CHUNKS)))


def _slowest(mine: list[float], process_group: Any, device: str) -> list[float]:
    """Each number of the rank where it is largest."""
    found = torch.tensor(mine, dtype=torch.float64, device=device)
    dist.all_reduce(found, op=dist.ReduceOp.MAX, group=process_group)
    return [float(n) for n in found.tolist()]
