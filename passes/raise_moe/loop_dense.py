"""Loops that run every expert on every token: ``out = out + gates[:, e:e+1] * expert(x)``.

That is a MoE layer only where the gates are zero for all but the chosen experts: where they are zeros into which the
router's weights were scattered, and nothing else. Then the other experts need not run. What differs is what a product
with zero keeps: an infinity or NaN of an expert that the token did not choose no longer reaches it.
"""

from __future__ import annotations

from dataclasses import replace

from moec.ir.core import Graph, Op, Value
from moec.ir.types import DType
from moec.passes.matching import CASTS, arg, function, maker, peel, rank, same_dim, tensor
from moec.passes.raise_moe.loop_branches import exclusive_branches
from moec.passes.raise_moe.loop_columns import read_column, shared_factor
from moec.passes.raise_moe.loop_experts import gemm_rows
from moec.passes.raise_moe.loop_ids import choices_differ
from moec.passes.raise_moe.loop_rows import Factor, read_weighting
from moec.passes.raise_moe.loop_steps import Chain, Step
from moec.passes.raise_moe.loops import Kind, Loop, check_writes, is_zero, kinds_of, read_experts, starts_at_zero
from moec.passes.raise_moe.refusal import Refusal


def _gate(value: Value) -> tuple[Value, int] | None:
    """``(gates, e)`` if ``value`` is ``gates[:, e:e+1]`` times something."""
    op = maker(peel(value, CASTS), "mul")
    if op is None:
        return None
    for column in (arg(op, 0), arg(op, 1)):
        t = tensor(column)
        if t is not None and t.rank == 2 and t.shape[1] == 1:
            found = read_column(column)
            if found is not None and found.dim == 1:
                return found.source, found.expert
    return None


def find_dense_chains(graph: Graph) -> list[Chain]:
    """Sums of products of gate columns with matrices, of two or more terms, in order."""
    chains: dict[Value, Chain] = {}
    for op in graph.ops:
        if function(op) != "add" or rank(op.results[0]) != 2 or arg(op, 2, "alpha", 1) != 1:
            continue
        pair = arg(op, 0, "self"), arg(op, 1, "other")
        for before, added in (pair, pair[::-1]):
            gate = _gate(added) if isinstance(added, Value) else None
            if gate is None:
                continue
            assert isinstance(added, Value)
            chain = chains.pop(before, None) if isinstance(before, Value) else None
            chains[op.results[0]] = chain = chain if chain is not None else _begin(op, before)
            chain.steps.append(Step(op, op.results[0], gate[0], added, "dense"))
            break
    return [c for c in chains.values() if len(c.steps) > 1]


def _begin(op: Op, before: object) -> Chain:
    """A chain at its first addition: to a term, to a number, or to some tensor."""
    if not isinstance(before, Value):
        return Chain(None) if before == 0 else Chain(op.results[0])  # the latter is its own start: refused later
    gate = _gate(before)
    return Chain(before) if gate is None else Chain(None, [Step(op, before, gate[0], before, "dense")])


def _gates(gates: Value, place: Op) -> tuple[Value, Value, tuple[DType, ...]]:
    """``(ids, weights, casts)`` of gates that are zero outside of ``ids``.

    Raises:
        Refusal: Nothing says that they are zero there.
    """
    casts: list[DType] = []
    while (cast := maker(gates, *CASTS)) is not None and (t := tensor(gates)) is not None:
        casts.insert(0, t.dtype)
        gates = arg(cast, 0, "self")
    op = maker(gates, "scatter", "scatter_add")
    ids, weights = (arg(op, 2, "index"), arg(op, 3, "src")) if op is not None else (gates, gates)
    wide, i, w = tensor(gates), tensor(ids), tensor(weights)
    if op is None or not is_zero(arg(op, 0, "self")) or wide is None or i is None or w is None or i.shape != w.shape:
        raise Refusal("all experts run on every token, and nothing says that their gates are zero but for a few", place)
    if arg(op, 1, "dim") not in (1, -1) or arg(op, 4, "reduce") is not None or not same_dim(i.shape[0], wide.shape[0]):
        raise Refusal("the gates are not scattered by expert", op)
    if function(op) == "scatter" and not choices_differ(ids):
        raise Refusal("the gates keep one of two weights where a token's expert ids are equal", op)
    return ids, weights, tuple(casts)


def read_dense(graph: Graph, chain: Chain) -> Loop | None:
    """The loop whose sums are ``chain``, or None if its terms hold no experts.

    Raises:
        Refusal: They do, and it does not fit.
    """
    read = [_gate(step.added) for step in chain.steps]
    experts = [gate[1] for gate in read if gate is not None]
    last = chain.steps[-1].op
    branches = exclusive_branches(graph, chain.steps, experts, gemm_rows)
    if branches is None:
        return None
    if len({gate[0] for gate in read if gate is not None}) != 1 or len(set(experts)) != len(experts):
        raise Refusal("the experts of the loop have gates of different tensors, or one occurs twice", last)
    ops = {step.op for step in chain.steps}
    if chain.start is not None and chain.start.op in ops:
        raise Refusal("the sum over experts starts at a number that is not zero", last)
    for op in ops:
        if op is not last and any(u not in ops for u in op.results[0].users):
            raise Refusal("the running sum of the loop is also used inside it", op)
    kinds = []
    for group in kinds_of(branches, [None] * len(branches)):
        group = sorted(group, key=lambda b: b.expert)
        weighting = read_weighting(group[0], lambda column, group=group: shared_factor(column, group, 1))  # type: ignore[misc]
        if weighting.factor is None:
            raise Refusal("an expert of the loop is not weighted with its gate", group[0].step.op)
        ids, weights, casts = _gates(weighting.factor.weights, last)
        factor = Factor(weights, (*casts, *weighting.factor.casts), None)
        columns = [v for v in group[0].outside if (c := read_column(v)) is not None and c.source is read[0][0]]  # type: ignore[index]
        rows = group[0].root
        kinds.append(Kind(group, rows, rows, replace(weighting, factor=factor), tuple(columns)))
    kind, expert = read_experts(kinds, ids, chain)
    if len(kinds) != 1:
        raise Refusal(f"the experts of the loop run {len(kinds)} different programs", last)
    check_writes(graph, branches)
    start = None if starts_at_zero(chain) else chain.start
    return Loop(chain, ids, None, kind, expert, [], branches, start, chain.out)
