"""The groups of ranks that programs name, by logical name: a mesh axis (``"ep"``) or a part of one (``"ep.node"``).

A program holds names alone. They are bound to process groups where the program runs, before it runs.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist

from moec.ir.comm_semantics import CommError
from moec.ir.errors import nearest


@dataclass(frozen=True)
class Group:
    """A bound group.

    Attributes:
        name: What programs call it.
        ranks: Global ranks, in the order of the group.
        process_group: torch's handle.
    """

    name: str
    ranks: tuple[int, ...]
    process_group: Any


_GROUPS: dict[str, Group] = {}
_LOCK = threading.Lock()


def bind(name: str, process_group: Any) -> Group:
    """Give ``name`` to a process group. Binding it again to the same ranks is nothing new.

    Raises:
        CommError: Another group of ranks has that name.
    """
    group = Group(name, tuple(dist.get_process_group_ranks(process_group)), process_group)
    with _LOCK:
        old = _GROUPS.get(name)
        if old is not None and old.ranks != group.ranks and _alive(old):
            raise CommError(
                f"group {name!r} is bound to the ranks {list(old.ranks)} and cannot be bound to {list(group.ranks)}",
                hint="give the second mesh axis another name",
            )
        _GROUPS[name] = group
    return group


def taken_names(ranks: Sequence[int]) -> set[str]:
    """Names that this process has bound to others than ``ranks``."""
    return {name for name, group in _GROUPS.items() if group.ranks != tuple(ranks) and _alive(group)}


def free_name(axis: str, taken: Collection[str]) -> str:
    """``axis``, or ``axis_2``, ``axis_3``, ... where that is taken."""
    names = itertools.chain([axis], (f"{axis}_{i}" for i in itertools.count(2)))
    return next(name for name in names if name not in taken)


def _alive(group: Group) -> bool:
    """False where the process group was destroyed since."""
    return dist.is_initialized() and group.process_group in dist.distributed_c10d._world.pg_map


def find(name: str) -> Group:
    """The group called ``name``.

    Raises:
        CommError: It is not bound, or its process group is gone.
    """
    group = _GROUPS.get(name)
    if group is None:
        raise CommError(
            f"no process group is bound to {name!r}; {nearest(name, _GROUPS)}",
            hint="moec.parallelize binds the groups of a plan; call it before the compiled model runs",
        )
    if not _alive(group):
        raise CommError(
            f"the process group of {name!r} was destroyed", hint="initialise torch.distributed and parallelize again"
        )
    return group


def unbind(name: str) -> None:
    """Forget the group called ``name``, if there is one."""
    with _LOCK:
        _GROUPS.pop(name, None)


def clear() -> None:
    """Forget all groups."""
    with _LOCK:
        _GROUPS.clear()
