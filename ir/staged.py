"""A layer's program that is run piece by piece, so that other ops of a graph stand between its starts and its waits."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from typing import Any

from moec.ir.comm_semantics import World, current_world, running_in
from moec.ir.core import Graph, Op, Value
from moec.ir.errors import MoecError
from moec.ir.types import TensorType

Execute = Callable[[Op, Sequence[Any]], list[Any]]


def stops(region: Graph) -> tuple[int, ...]:
    """Where a program may be left for a while: before ops that wait for rows, by their place.

    How many rows will come is told in a message of a few bytes; nothing is to come between that and the rows.
    """
    found = []
    for i, op in enumerate(region.ops):
        follows = i > 0 and region.ops[i - 1].name == "comm.wait"
        if op.name == "comm.wait" and not follows and _brings_rows(op):
            found.append(i)
    return tuple(found)


def _brings_rows(wait: Op) -> bool:
    return isinstance(wait.result.type, TensorType) and wait.result.type.rank > 1


class Staged:
    """One run of a program, in pieces.

    Args:
        region: The program.
        inputs: Its arguments.
        places: Where it is left, as :func:`stops` has it.
        execute: Executes one op.
    """

    def __init__(self, region: Graph, inputs: Sequence[Any], places: Sequence[int], execute: Execute) -> None:
        self._world: World = current_world()
        self._pieces = _pieces(region, inputs, set(places), execute)
        self.go_on()

    def go_on(self) -> list[Any] | None:
        """Run to the next place; the results once it is done, else None."""
        with running_in(self._world):
            try:
                next(self._pieces)
            except StopIteration as end:
                return list(end.value)
        return None


def _pieces(
    region: Graph, inputs: Sequence[Any], places: set[int], execute: Execute
) -> Generator[None, None, Sequence[Any]]:
    last: dict[Value, int] = {v: i for i, op in enumerate(region.ops) for v in op.operands}
    env: dict[Value, Any] = dict(zip(region.args, inputs, strict=True))
    for i, op in enumerate(region.ops):
        if i in places:
            yield
        values = [env[v] for v in op.operands]
        if op is region.terminator:
            return values
        env.update(zip(op.results, execute(op, values), strict=True))
        for v in op.operands:
            if last[v] == i:
                env.pop(v, None)
    raise MoecError(f"graph @{region.name} does not end in return")
