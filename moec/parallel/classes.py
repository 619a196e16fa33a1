"""Modules that hold shards and show whole weights.

A module whose parameters became DTensors gets a class of its own, with a property for each: reading ``self.weight``
gives a plain tensor, the local part of a replicated parameter, or :func:`moec.runtime.unshard` of a share of experts.
Code of the model sees what it saw before, and parameters keep their names; so do state dicts.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import Partial, Replicate, Shard

from moec.runtime import unshard  # noqa: F401  (registers torch.ops.moec.unshard)


@dataclass(frozen=True)
class Role:
    """What a parameter is.

    Attributes:
        sizes: Experts of every rank, for a share of experts; () for a replicated one.
        group: Over which its shards lie.
        mean: Gradients are means over ranks.
        axes: Of the mesh: 1, or 2 where shares have replicas.
    """

    sizes: tuple[int, ...]
    group: str
    mean: bool
    axes: int = 1


def placements(role: Role) -> list[Any]:
    """How the parameter lies on a mesh [ep] or [replicas, ep]."""
    return [Replicate()] * (role.axes - 1) + [Shard(0) if role.sizes else Replicate()]


def _reader(name: str, role: Role) -> Callable[[torch.nn.Module], Tensor]:
    how = "avg" if role.mean else "sum"
    sizes, group, mean = list(role.sizes), role.group, role.mean
    lies = tuple(placements(role))
    grads = tuple(p if p.is_shard() else Partial(how) for p in lies)

    def local(self: torch.nn.Module) -> Tensor:
        p: Any = self._parameters[name]
        # Nothing moves here. In the backward, what ranks hold of a replica's gradient is added up.
        found: Tensor = p.redistribute(placements=lies).to_local(grad_placements=grads)
        return found

    def whole(self: torch.nn.Module) -> Tensor:
        found: Tensor = torch.ops.moec.unshard.default(local(self), sizes, group, mean)
        return found

    return whole if sizes else local


_CLASSES: dict[Any, type[torch.nn.Module]] = {}


def show_whole(module: torch.nn.Module, roles: dict[str, Role]) -> None:
    """Give ``module`` the class whose properties read its parameters by their roles."""
    kind = type(module)
    key = (kind, tuple(sorted(roles.items(), key=lambda item: item[0])))
    if key not in _CLASSES:
        members: dict[str, Any] = {name: property(_reader(name, role)) for name, role in roles.items()}
        members |= {"__module__": kind.__module__, "__qualname__": kind.__qualname__, "__doc__": kind.__doc__}
        _CLASSES[key] = type(kind.__name__, (kind,), members)
    module.__class__ = _CLASSES[key]
