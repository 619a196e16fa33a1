"""The steps of a loop over experts: the calls that add an expert's rows to a running sum, and the chains they make."""

from __future__ import annotations

from dataclasses import dataclass, field

from moec.ir.core import Graph, Op, Value
from moec.passes.matching import CASTS, arg, function, maker, peel, rank, single_index, tensor
from moec.passes.raise_moe.refusal import Refusal


@dataclass(frozen=True)
class Step:
    """One call that puts rows into a running sum.

    Attributes:
        op: The call; its result is the new sum.
        before: The sum before it.
        index: Which rows, as ``int[u]`` or as a mask ``i1[T]``.
        added: ``[u, H]``.
        mode: ``add``; ``add-once``, where a row that occurs twice is added once; ``write``, which overwrites;
            ``dense``, which adds to all rows.
        own: Further calls that only serve the addition.
    """

    op: Op
    before: Value
    index: Value
    added: Value
    mode: str
    own: tuple[Op, ...] = ()


@dataclass
class Chain:
    """Steps on one running sum, in order.

    Attributes:
        start: The sum before the first step; None if there is none.
        steps: The steps.
    """

    start: Value | None
    steps: list[Step] = field(default_factory=list)

    @property
    def out(self) -> Value:
        """The sum after the last step."""
        return self.steps[-1].op.results[0]

    def check(self) -> None:
        """Refuse a chain whose sums are seen between its steps.

        Raises:
            Refusal: With the place.
        """
        for step, after in zip(self.steps, self.steps[1:], strict=False):
            total = step.op.results[0]
            if function(after.op).endswith("_"):
                raise Refusal("the loop adds into memory that others may see", after.op)
            if after.before is not total or any(u not in (after.op, *after.own) for u in total.users):
                raise Refusal("the running sum of the loop is also used inside it", step.op)
        first = self.steps[0]
        if function(first.op).endswith("_"):
            raise Refusal("the loop adds into memory that others may see", first.op)


def _index_add(op: Op) -> Step | None:
    dim, index, added = arg(op, 1, "dim"), arg(op, 2, "index"), arg(op, 3, "source")
    if rank(op.results[0]) != 2 or dim not in (0, -2) or arg(op, 4, "alpha", 1) != 1:
        return None
    return Step(op, arg(op, 0, "self"), index, added, "add")


def _scatter_add(op: Op) -> Step | None:
    """``scatter_add(out, 0, token[:, None].expand(u, H), rows)``."""
    index, added = arg(op, 2, "index"), arg(op, 3, "src")
    wide = maker(index, "expand", "expand_as", "repeat")
    narrow = tensor(arg(wide, 0, "self")) if wide is not None else None
    if rank(op.results[0]) != 2 or arg(op, 1, "dim") not in (0, -2) or wide is None or narrow is None:
        return None
    own = [wide]
    while maker(arg(own[-1], 0, "self"), "unsqueeze", "view", "reshape") is not None:
        own.append(arg(own[-1], 0, "self").op)
    token = arg(own[-1], 0, "self")
    column = narrow.rank == 2 and narrow.shape[1] == 1 and rank(token) == 1
    if not column or tensor(index) is None or tensor(index).shape != tensor(added).shape:  # type: ignore[union-attr]
        return None
    return Step(op, arg(op, 0, "self"), token, added, "add", tuple(own))


def _index_put(op: Op) -> Step | None:
    before, indices, values = arg(op, 0, "self"), arg(op, 1, "indices"), arg(op, 2, "values")
    if rank(before) != 2 or len(indices) != 1 or not isinstance(indices[0], Value) or rank(indices[0]) != 1:
        return None
    index = indices[0]
    if arg(op, 3, "accumulate", False) is True:
        return Step(op, before, index, values, "add")
    total = maker(peel(values, CASTS), "add")
    if total is not None and arg(total, 2, "alpha", 1) == 1:
        pair = arg(total, 0, "self"), arg(total, 1, "other")
        for old, added in (pair, pair[::-1]):
            picked = single_index(old)
            if picked is not None and picked[0] is before and picked[1] is index:
                assert isinstance(old, Value)
                assert old.op is not None
                own = [total, old.op]
                if isinstance(values, Value) and values.op is not None and values.op is not total:
                    own.append(values.op)
                return Step(op, before, index, added, "add-once", tuple(own))
    return Step(op, before, index, values, "write")


_READERS = {
    **dict.fromkeys(("index_add", "index_add_"), _index_add),
    **dict.fromkeys(("scatter_add", "scatter_add_"), _scatter_add),
    **dict.fromkeys(("index_put", "index_put_"), _index_put),
}


def find_chains(graph: Graph) -> list[Chain]:
    """The running sums of ``graph`` with two or more steps, in order."""
    head: dict[Value, Value] = {}
    chains: dict[Value, Chain] = {}
    for op in graph.ops:
        read = _READERS.get(function(op))
        step = read(op) if read is not None else None
        if step is None or tensor(step.added) is None or tensor(step.added).rank != 2:  # type: ignore[union-attr]
            continue
        start = head.get(step.before, step.before)
        head[op.results[0]] = start
        chains.setdefault(start, Chain(start)).steps.append(step)
    return [c for c in chains.values() if len(c.steps) > 1]
