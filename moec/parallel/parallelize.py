"""``moec.parallelize``: deal a model's experts out to the ranks of a mesh, before it is compiled.

1. No rank ever holds all experts: of a model on the meta device only this rank's share is made or read.
2. All parameters become DTensors on one mesh, shares of experts ``Shard(0)``, the rest replicated. So
   ``torch.distributed.checkpoint`` saves and loads them on any number of ranks, and gradient clipping and optimizers
   see one kind of tensor.
3. The model's code is not touched. What it reads are plain tensors (:mod:`moec.parallel.classes`).
4. All ranks are held to the same mesh, plan, parameters and replicated weights.
"""

from __future__ import annotations

import os
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from moec.cost.machine import MachineProfile
from moec.parallel.plan import AXES, Layout, ParallelError, Plan, check_mesh, fold, follow_another, put_in_force

_LAYOUTS: weakref.WeakKeyDictionary[nn.Module, Layout] = weakref.WeakKeyDictionary()


def layout_of(model: nn.Module) -> Layout | None:
    """How ``parallelize`` laid the model out; None where it did not, or had nothing to do."""
    return _LAYOUTS.get(model)


def parallelize(
    model: nn.Module,
    mesh: Any = None,
    plan: str | Plan = "ep=1",
    *,
    weights: str | os.PathLike[str] | None = None,
    experts: Sequence[str] | None = None,
    mean: bool = True,
    check: bool = True,
    timeout: float | None = None,
) -> nn.Module:
    """Spread the experts of ``model`` over the ranks of ``mesh``, in place; every rank of the mesh calls this.

    Each rank then runs the model on tokens of its own and takes its optimizer steps as if it were alone. Compile the
    model afterwards, with ``backend="moec"``.

    Args:
        model: With all weights, or (wholly or partly) on the meta device.
        mesh: A ``DeviceMesh``; its ranks in order, neighbours share experts. None is every rank of torch.distributed.
        plan: As text, ``"ep=4"``, or a :class:`~moec.parallel.plan.Plan`.
        weights: A folder or file of safetensors; each rank reads its share. Without it, parameters on the meta device
            become memory whose values are still to be loaded.
        experts: Shell patterns of the names of stacked experts' parameters, where moec does not find them itself.
        mean: Gradients are means over all ranks, as DistributedDataParallel has them; else sums.
        check: Compare replicated weights across ranks by their hashes.
        timeout: Seconds after which a collective, or the comparison at the start, fails and names the ranks that are
            missing. The environment's ``MOEC_COMM_TIMEOUT``, or 300.

    Returns:
        The model. With ``ep=1`` on one rank, or without torch.distributed, its weights are loaded and nothing else
        is changed.

    Raises:
        ParallelError: The plan does not fit the mesh, the model holds no stacked experts, or the ranks differ.
    """
    plan = Plan.parse(plan) if isinstance(plan, str) else plan
    path = None if weights is None else Path(weights)
    running = dist.is_available() and dist.is_initialized()
    if not running or (dist.get_world_size() if mesh is None else mesh.size()) == 1:
        for name, wanted in (("ep", plan.ep), ("tp", plan.tp)):
            if wanted > 1:
                raise ParallelError(f"{name}={wanted} needs as many ranks, there is one", hint="start with torchrun")
        _fill_alone(model, path)
        return model
    return _spread(model, mesh, plan, path, experts, mean, check, timeout)


def _fill_alone(model: nn.Module, path: Path | None) -> None:
    if path is None:
        return
    from moec.parallel.fill import fill
    from moec.parallel.load import Reader

    reader = Reader(path, model)
    fill(
        model, lambda name, p: reader.read(name, p.shape, p.dtype), lambda name, b: reader.read(name, b.shape, b.dtype)
    )


def _spread(
    model: nn.Module,
    mesh: Any,
    plan: Plan,
    path: Path | None,
    experts: Sequence[str] | None,
    mean: bool,
    check: bool,
    timeout: float | None,
) -> nn.Module:
    # torch.distributed's tensors are imported where they are used alone: `import moec` works without them
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor

    from moec.backends.distributed import faults, groups
    from moec.parallel.attention import count_local_heads, split_heads
    from moec.parallel.classes import Fold, show_whole
    from moec.parallel.costs import agree
    from moec.parallel.experts import expert_parameters
    from moec.parallel.fill import fill
    from moec.parallel.load import Reader
    from moec.parallel.piece_costs import measure_pieces
    from moec.parallel.roles import roles_of
    from moec.parallel.start import compare, digest
    from moec.parallel.tier_costs import agree_tiers
    from moec.parallel.work_costs import measure_work

    if model in _LAYOUTS:
        raise ParallelError("the model is parallelized already", hint="build it anew for another plan")
    faults.set_limit(timeout)
    if mesh is None:
        mesh = init_device_mesh(_device_type(model), (dist.get_world_size(),))
    ranks = check_mesh(plan, mesh).flatten().tolist()
    found = expert_parameters(model, None if experts is None else tuple(experts))
    if not found:
        raise ParallelError(
            "the model holds no stacked experts to deal out",
            hint="name their parameters: experts=['*.gate_up', '*.down']",
        )
    attention = split_heads(model, plan.tp) if plan.tp > 1 else None
    mine = next(row for row in check_mesh(plan, mesh).tolist() if dist.get_rank() in row)
    same = next(
        ranks[i : i + plan.tp] for i in range(0, len(ranks), plan.tp) if dist.get_rank() in ranks[i : i + plan.tp]
    )
    seconds = faults.limit().total_seconds()
    told = {"mesh": str(mesh.mesh.tolist()), "plan": str(plan), "mean": str(mean)}
    told |= {n: f"{p.dtype} {list(p.shape)}" for n, p in model.named_parameters()}
    told |= {f"experts of {n}": str(e) for n, e in found.items()}
    # One name on all ranks, even if some of them have bound it in a mesh without the others.
    taken = {f"ep {n}" for n in groups.taken_names(mine) | follow_another(plan)}
    taken |= {f"tp {n}" for n in groups.taken_names(same)}
    taken = compare("mesh and plan", told, ranks, seconds, taken)
    group, tp_name = (groups.free_name(a, {n[3:] for n in taken if n.startswith(a)}) for a in (AXES[1], "tp"))

    layout = fold(plan, mesh, group, mean, tp_name)
    parts = _bind(layout, groups.bind)
    faults.start_heart()
    if plan.plans_overlap and plan.ep > 1:
        agree(group, layout.ep_group, mesh.device_type, own_costs)
        if parts:
            agree_tiers(group, parts, layout.ep_group, mesh.device_type, plan, layout.rank)
        if plan.interleave == "auto":
            measure_pieces(group, layout.ep_group, mesh.device_type)
            measure_work(group, layout.ep_group, mesh.device_type)
    reader = None if path is None else Reader(path, model)
    roles = roles_of(model, layout, found, attention)

    blank = {n for n, p in model.named_parameters() if p.is_meta and reader is None}

    def share(name: str, p: Tensor) -> Tensor:
        """This rank's part of a parameter: its experts, its heads, or all of a replicated one."""
        dim = 0 if roles[name].sizes else (attention.dims.get(name) if attention is not None else None)
        start, stop = 0, p.shape[dim or 0] if p.dim() else 1
        if roles[name].sizes:
            start, stop = layout.experts_of(found[name])
        elif dim is not None:
            start, stop = (stop * r // plan.tp for r in (layout.tp_rank, layout.tp_rank + 1))
        if reader is not None and not dim:
            part = reader.read(name, p.shape, p.dtype, start, stop if p.dim() else None)
        else:  # of columns, all are read and a part is kept
            all_of = p.detach() if reader is None else reader.read(name, p.shape, p.dtype)
            part = all_of if dim is None else all_of.narrow(dim, start, stop - start)
            if p.is_meta and reader is None:
                part = torch.empty(part.shape, dtype=p.dtype, device=mesh.device_type)
            elif dim is not None:
                part = part.clone(memory_format=torch.contiguous_format)
        lies = roles[name].lies
        part = part.to(mesh.device_type)
        return DTensor.from_local(part, layout.mesh, lies, run_check=False, shape=p.shape, stride=p.stride())

    blank |= {n for n, b in model.named_buffers() if b.is_meta and reader is None}
    fill(model, share, None if reader is None else lambda name, b: reader.read(name, b.shape, b.dtype))
    if check:
        heads = {} if attention is None else attention.dims
        held = {n: p for n, p in model.named_parameters() if n not in found and n not in blank}
        hashes = {n: digest(p.to_local()) for n, p in held.items()}  # type: ignore[attr-defined]
        everywhere = {n: h for n, h in hashes.items() if n not in heads}
        everywhere |= {n: digest(b) for n, b in model.named_buffers() if n not in blank}
        compare("replicated weights", everywhere, ranks, seconds)
        if heads:  # those of the same heads, in other groups
            compare(
                "replicated weights", {n: h for n, h in hashes.items() if n in heads},
                ranks[layout.tp_rank :: plan.tp], seconds,
            )  # fmt: skip
    folds: dict[str, str] = {}
    if attention is not None:
        folds = {n.rpartition(".")[0]: "tokens" for n in found}
        folds |= dict.fromkeys(attention.modules, "heads") | dict.fromkeys(attention.outputs, "output")
        for name in attention.modules:
            count_local_heads(model.get_submodule(name), plan.tp)
    for prefix, module in model.named_modules():
        own = {n: roles[f"{prefix}.{n}" if prefix else n] for n, p in module._parameters.items() if p is not None}
        how = Fold(folds[prefix], tp_name, plan.tp, layout.tp_rank) if prefix in folds else None
        if own or how is not None:
            show_whole(module, own, how)
    _LAYOUTS[model] = layout
    return model


def own_costs() -> tuple[MachineProfile, str] | None:
    """This rank's processor as the cost model knows it."""
    from moec.op_costs import op_costs

    costs = op_costs("cpu")
    return None if costs is None else (costs.machine, costs.isa)


def _device_type(model: nn.Module) -> str:
    found = {p.device.type for p in model.parameters()} - {"meta"}
    return found.pop() if len(found) == 1 else "cpu"


def _bind(layout: Layout, bind: Any) -> dict[str, Any]:
    """Bind the names that programs use to this rank's groups. All ranks make the groups of all nodes together.

    Returns:
        Handles of the groups between nodes and inside them, by how their names end, where the plan has them.
    """
    if layout.ep_group is not None:
        bind(layout.group, layout.ep_group)
    if layout.tp_group is not None:
        bind(layout.tp_name, layout.tp_group)
    nodes, each, made = layout.plan.nodes, layout.plan.ep // layout.plan.nodes, dict[str, Any]()
    if layout.plan.form == "hierarchical":
        rows = layout.mesh.mesh.reshape(-1, nodes, each)
        for name, parts in ((".node", rows.transpose(1, 2).reshape(-1, nodes)), (".local", rows.reshape(-1, each))):
            own, _ = dist.new_subgroups_by_enumeration(parts.tolist())
            bind(layout.group + name, own)
            made[name] = own
    put_in_force(layout.group, layout.plan, layout.rank)
    return made
