"""Values ``[..., N]`` read as rows ``[R, N]``: a model computes on batches of sequences, an expert on rows."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from moec.ir.core import Graph, Op, Value, clone_op
from moec.ir.types import TensorType, as_dim
from moec.passes.calls import call_op
from moec.passes.matching import VIEWS, arg, function, last_dim, rank, tensor
from moec.passes.raise_moe.activation import RowProgram, is_elementwise, read_rows
from moec.passes.raise_moe.refusal import Refusal

_CUTS = {"chunk": 2, "split": 2, "split_with_sizes": 2, "slice": 1}
"""Calls that cut along a dimension, and which argument says along which."""


def flat(type: TensorType) -> TensorType:
    """``[..., N]`` as ``[R, N]``."""
    return type.with_(shape=(as_dim("R"), type.shape[-1]))


def flat_rows(ops: Sequence[Op], sources: Sequence[Value], target: Value) -> RowProgram | None:
    """As ``read_rows`` for values with any number of leading dimensions.

    Args:
        ops: What lies between ``sources`` and ``target``, in order.
        sources: ``[..., N]``.
        target: ``[..., M]``.

    Raises:
        Refusal: A call does more than treat every element by itself or cut rows in halves.
    """
    rows = Graph("rows")
    env = {s: rows.add_arg(flat(_type(s)), s.name) for s in sources}
    held = set(sources)
    outside: dict[Value, Value] = {}  # arguments of the copy by what they stand for

    def lookup(value: Value) -> Value:
        if value not in env:
            if rank(value) not in (0, 1):
                raise Refusal(f"{value!r}, besides the rows, is used between the GEMMs of a shared expert", value.op)
            env[value] = rows.add_arg(value.type, value.name)
            outside[env[value]] = value
        return env[value]

    for op in ops:
        mine = [v for v in op.operands if v in held]
        if function(op) in VIEWS and _type(op.results[0]).shape[-1] == _type(mine[0]).shape[-1]:
            env[op.results[0]] = env[mine[0]]
        else:
            _copy(op, mine, rows, lookup, env)
        held.update(op.results)
    program = read_rows("activation", [env[s] for s in sources], env[target], ())
    return program and RowProgram(program.layout, program.region, [outside[c] for c in program.captures])


def _type(value: Value) -> TensorType:
    type = tensor(value)
    if type is None or not type.rank:
        raise Refusal(f"{value!r} between the GEMMs of a shared expert is no tensor of rows", value.op)
    return type


def _copy(
    op: Op, mine: Sequence[Value], rows: Graph, lookup: Callable[[Value], Value], env: dict[Value, Value]
) -> None:
    """Add ``op`` to ``rows``, on rows.

    Raises:
        Refusal: It does something else to rows than to the batch they lie in.
    """
    where = _CUTS.get(function(op))
    if where is not None and last_dim(mine[0], arg(op, where, "dim", 0)):
        args = [arg(op, i, n) for i, n in enumerate(_names(op))]
        args[where] = -1
        copy = call_op(op.attrs["target"], [env[mine[0]], *args[1:]], {}, [r.type for r in op.results])
        env.update(zip(op.results, copy.results, strict=True))
    elif is_elementwise(op) and len({_type(v).shape[:-1] for v in (*mine, *op.results)}) == 1:
        copy = clone_op(op, lookup, env)
    else:
        raise Refusal(f"{op.attrs.get('target', op.name)} between the GEMMs of a shared expert may mix rows", op)
    copy.meta = {}
    for old, new in zip(op.results, copy.results, strict=True):
        new.name, new.type, new.meta = old.name, flat(_type(old)), {}
    rows.append(copy)


def _names(op: Op) -> tuple[str, ...]:
    """The arguments of a call that cuts."""
    return {
        "chunk": ("self", "chunks", "dim"),
        "split": ("self", "split_size", "dim"),
        "split_with_sizes": ("self", "split_sizes", "dim"),
        "slice": ("self", "dim", "start", "end", "step"),
    }[function(op)]
