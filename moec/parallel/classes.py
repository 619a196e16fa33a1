"""Modules that hold shards and show whole weights.

A module whose parameters became DTensors gets a class of its own, with a property for each: reading ``self.weight``
gives a plain tensor: the local part of a parameter that is replicated or split by heads, of a share of experts
:func:`moec.runtime.unshard`. Code of the model sees what it saw before, and parameters keep their names; so do state
dicts.

Where ranks split attention's heads, classes of attention, of its output projection and of experts also have a
``forward`` of their own, around the model's: see :mod:`moec.runtime.rows`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from moec.parallel.attention import first_argument
from moec.parallel.plan import ParallelError
from moec.runtime import rows, unshard  # noqa: F401  (registers torch.ops.moec.unshard and others)


@dataclass(frozen=True)
class Role:
    """What a parameter is.

    Attributes:
        lies: Its placements on the mesh.
        grads: Those of the gradient that a rank's backward finds.
        sizes: Experts of every rank, for a share of experts; () for others.
        group: Over which its shards lie.
        scale: What the sum of a share's gradients is multiplied by.
    """

    lies: tuple[Any, ...]
    grads: tuple[Any, ...]
    sizes: tuple[int, ...] = ()
    group: str = ""
    scale: float = 1.0


@dataclass(frozen=True)
class Fold:
    """What a module does, where ranks hold the same tokens.

    Attributes:
        kind: ``heads`` for attention, ``output`` for its last projection, ``tokens`` for experts.
        group: Of these ranks.
        ranks: How many.
        rank: Which of them this is.
    """

    kind: str
    group: str
    ranks: int
    rank: int


def _reader(name: str, role: Role) -> Callable[[torch.nn.Module], Tensor]:
    lies, grads = role.lies, role.grads
    sizes, group, scale = list(role.sizes), role.group, role.scale

    def local(self: torch.nn.Module) -> Tensor:
        p: Any = self._parameters[name]
        # Nothing moves here. In the backward, what ranks hold of a replica's gradient is added up.
        found: Tensor = p.redistribute(placements=lies).to_local(grad_placements=grads)
        return found

    def whole(self: torch.nn.Module) -> Tensor:
        found: Tensor = torch.ops.moec.unshard.default(local(self), sizes, group, scale)
        return found

    return whole if sizes else local


def _heads(kind: Any, fold: Fold, first: str) -> Callable[..., Any]:
    group, ranks = fold.group, fold.ranks

    def forward(self: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
        if args:
            args = (torch.ops.moec.share_rows.default(args[0], group, ranks), *args[1:])
        else:
            kwargs = {**kwargs, first: torch.ops.moec.share_rows.default(kwargs[first], group, ranks)}
        return kind.forward(self, *args, **kwargs)

    return forward


def _output(fold: Fold) -> Callable[..., Any]:
    group, ranks = fold.group, fold.ranks

    def forward(self: Any, x: Tensor) -> Tensor:
        part = torch.nn.functional.linear(x, self.weight)
        total: Tensor = torch.ops.moec.sum_rows.default(part, group, ranks)
        return total if self.bias is None else total + self.bias

    return forward


def _tokens(kind: Any, fold: Fold) -> Callable[..., Any]:
    group, ranks, rank = fold.group, fold.ranks, fold.rank

    def own(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        if value.dim() != 2:
            raise ParallelError(
                f"tp={ranks}: {kind.__qualname__} is given a tensor of {value.dim()} dimensions",
                hint="its tokens are dealt out by the rows of matrices: x [T, H], ids and weights [T, k]",
            )
        return torch.ops.moec.own_rows.default(value, group, ranks, rank)

    def forward(self: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
        total = next(v for v in (*args, *kwargs.values()) if isinstance(v, Tensor)).shape[0]
        part = kind.forward(self, *map(own, args), **{name: own(v) for name, v in kwargs.items()})
        return torch.ops.moec.all_rows.default(part, total, group, ranks, rank)

    return forward


_CLASSES: dict[Any, type[torch.nn.Module]] = {}


def show_whole(module: torch.nn.Module, roles: dict[str, Role], fold: Fold | None = None) -> None:
    """Give ``module`` the class whose properties read its parameters by their roles, and whose forward folds."""
    kind = type(module)
    key = (kind, tuple(sorted(roles.items(), key=lambda item: item[0])), fold)
    if key not in _CLASSES:
        members: dict[str, Any] = {name: property(_reader(name, role)) for name, role in roles.items()}
        members |= {"__module__": kind.__module__, "__qualname__": kind.__qualname__, "__doc__": kind.__doc__}
        if fold is not None:
            members["forward"] = {
                "heads": lambda: _heads(kind, fold, first_argument(module)),
                "output": lambda: _output(fold),
                "tokens": lambda: _tokens(kind, fold),
            }[fold.kind]()
        _CLASSES[key] = type(kind.__name__, (kind,), members)
    module.__class__ = _CLASSES[key]
