"""How every parameter lies on the mesh, and what its gradient is summed over."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from torch import nn
from torch.distributed.tensor import Partial, Placement, Replicate, Shard

from moec.parallel.attention import Attention
from moec.parallel.classes import Role
from moec.parallel.plan import Layout


def roles_of(
    model: nn.Module, layout: Layout, experts: Mapping[str, int], attention: Attention | None
) -> dict[str, Role]:
    """The role of every parameter.

    Ranks of one ``tp`` group have the same tokens. A parameter that each of them uses for all tokens has the same
    gradient on all; one inside attention or experts, which each uses for its heads or its part of the tokens, has the
    sum of theirs. Over other ranks gradients are means or sums.

    Args:
        model: The model.
        layout: How it is laid out.
        experts: Stacked experts' parameters, and how many experts each holds.
        attention: How heads are split; None where they are not.
    """
    mean, everywhere = layout.mean, range(layout.mesh.ndim)
    how = Partial("avg" if mean else "sum")
    dims = {} if attention is None else attention.dims
    inside = set() if attention is None else set(attention.inside)
    owners = {n.rpartition(".")[0] for n in experts}

    def grads(lies: tuple[Placement, ...], in_tp: Placement) -> tuple[Placement, ...]:
        return tuple(lies[i] if lies[i].is_shard() else (in_tp if i in layout.tp_axes else how) for i in everywhere)

    def placed(axes: Iterable[int], dim: int) -> tuple[Placement, ...]:
        return tuple(Shard(dim) if i in axes else Replicate() for i in everywhere)

    found = {}
    for name, _ in model.named_parameters(remove_duplicate=False):
        if name in experts and layout.ep_axes:
            lies = placed(layout.ep_axes, 0)
            # ranks of a tp group have parts of the same tokens, so a mean is one over groups
            scale = min(1.0, layout.plan.tp / layout.plan.ep) if mean else 1.0
            found[name] = Role(lies, grads(lies, Partial("sum")), layout.sizes(experts[name]), layout.group, scale)
            continue
        lies = placed(layout.tp_axes, dims[name]) if name in dims else placed((), 0)
        parts = name in inside or name in experts or name.rpartition(".")[0] in owners
        found[name] = Role(lies, grads(lies, Partial("sum") if parts else Replicate()))
    return found
