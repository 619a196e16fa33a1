"""The meaning of the comm dialect: what a rank gives to and gets from the ranks of a group.

A :class:`World` is a rank's view of its groups. The reference interpreter runs ranks as threads of one process
(``moec.backends.reference.world``), the distributed backend as processes (``moec.backends.distributed.world``). Ops
find the world they run in with :func:`current_world`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

from torch import Tensor

from moec.ir.errors import MoecError

KINDS = ("all_to_all", "all_gather", "reduce_scatter", "all_reduce")


class CommError(MoecError):
    """A collective that cannot run: no world, an unknown group, or sizes that do not fit."""

    code = "comm"


@dataclass(frozen=True)
class Call:
    """One rank's part in one collective; all sizes count along the first dimension.

    Attributes:
        kind: One of :data:`KINDS`.
        group: Logical name of the group.
        send: Rows for each rank (all_to_all, reduce_scatter), else ().
        recv: Rows from each rank (all_to_all, all_gather), else ().
    """

    kind: str
    group: str
    send: tuple[int, ...] = ()
    recv: tuple[int, ...] = ()

    def bytes_sent(self, tensor: Tensor, me: int, size: int) -> int:
        """Bytes that leave this rank for other ranks of the group.

        A part goes to each rank once (all_to_all, reduce_scatter), or the whole to each other rank (all_gather). An
        all_reduce is counted as its reduce_scatter and all_gather: ``2 (n - 1) / n`` of the tensor, rounded down.
        """
        if self.kind == "all_gather":
            return (size - 1) * tensor.numel() * tensor.element_size()
        if self.kind == "all_reduce":
            return 2 * (size - 1) * tensor.numel() * tensor.element_size() // size
        row = tensor[:1].numel() if len(tensor) else 0
        return (sum(self.send) - self.send[me]) * row * tensor.element_size()


class Pending:
    """A started collective; ``wait`` gives its result, once."""

    def __init__(self, finish: Callable[[], Tensor]) -> None:
        self._finish = finish

    def wait(self) -> Tensor:
        return self._finish()


class World:
    """A rank's groups. Subclasses carry collectives out."""

    def size(self, group: str) -> int:
        """Ranks of ``group``."""
        raise NotImplementedError

    def rank(self, group: str) -> int:
        """This rank's place in ``group``."""
        raise NotImplementedError

    def start(self, call: Call, tensor: Tensor) -> Pending:
        """Begin a collective. All ranks of the group begin the same ones in the same order."""
        raise NotImplementedError


_WORLD: ContextVar[World | None] = ContextVar("moec_world", default=None)


def current_world() -> World:
    """The world that the running graph's collectives go through.

    Raises:
        CommError: There is none.
    """
    world = _WORLD.get()
    if world is None:
        raise CommError(
            "a collective was executed outside of any group of ranks",
            hint="run the graph with moec.backends.reference.world.run_ranks, or under torch.distributed",
        )
    return world


@contextmanager
def running_in(world: World) -> Iterator[None]:
    """Make ``world`` the current one for the code inside, in this thread."""
    token = _WORLD.set(world)
    try:
        yield
    finally:
        _WORLD.reset(token)


def begin(kind: str, group: str, ranks: int, tensor: Tensor, send: Sequence[int], recv: Sequence[int]) -> Pending:
    """Check the sizes of a collective against the world's group and the tensor, and begin it.

    Raises:
        CommError: The group has another size than the graph was made for, or the parts do not add up.
    """
    world = current_world()
    if world.size(group) != ranks:
        raise CommError(
            f"{kind} over group {group!r}: the graph was made for {ranks} ranks, the group has {world.size(group)}",
            hint="compile for the mesh that runs: parallelize the model on it first",
        )
    call = Call(kind, group, tuple(map(int, send)), tuple(map(int, recv)))
    for name, sizes in (("send", call.send), ("recv", call.recv)):
        if sizes and len(sizes) != ranks:
            raise CommError(f"{kind} over group {group!r}: {len(sizes)} {name} sizes for {ranks} ranks")
    if call.send and sum(call.send) > len(tensor):
        raise CommError(f"{kind} over group {group!r}: {sum(call.send)} rows to send, there are {len(tensor)}")
    return world.start(call, tensor)
