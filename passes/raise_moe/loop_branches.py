"""The branches of a loop over experts: which ops compute one expert's rows, and whether two branches are alike.

Contract:
1. Everything here is linear in the number of ops: a loop over 256 experts is one graph of several thousand.
2. A branch is what depends on its expert's tokens and reaches its step. Nothing of it is seen from outside.
3. Branches with equal keys compute the same function of their tokens and of the values that they take in.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass

import sympy

from moec.ir.core import Graph, Op, Value
from moec.ir.types import SymType, TensorType, Type, as_dim
from moec.passes.effects import is_pure
from moec.passes.matching import function, tensor
from moec.passes.raise_moe.loop_steps import Step
from moec.passes.raise_moe.refusal import Refusal
from moec.passes.structure import attr_key, graph_key

_ROWS = sympy.Symbol("R", integer=True)
_MIXED = -1
_CHECKS = ("_assert_scalar", "sym_constrain_range", "sym_constrain_range_for_size", "_assert_async", "_assert_tensor")


@dataclass
class Branch:
    """What one step of a loop adds.

    Attributes:
        step: The step.
        expert: The number that its tokens' ids equal, or its place in a table of chosen tokens.
        root: The value that says which tokens: the mask, or their indices.
        ops: From the root to the added rows, in graph order.
        checks: Asserts about the number of its tokens, and the sizes that only they use.
        key: Equal for branches that compute the same function.
        outside: What it takes in, in order of first use.
    """

    step: Step
    expert: int
    root: Value
    ops: list[Op]
    checks: list[Op]
    key: Hashable
    outside: list[Value]

    @property
    def added(self) -> Value:
        return self.step.added

    @property
    def rows(self) -> sympy.Expr:
        """How many rows it adds."""
        t = tensor(self.added)
        assert t is not None
        return t.shape[0]


def read_branches(graph: Graph, steps: Sequence[Step], experts: Sequence[int], roots: Sequence[Value]) -> list[Branch]:
    """The branch of every step.

    Args:
        graph: Their graph.
        steps: The steps of one loop.
        experts: The expert of each step.
        roots: The value that says which tokens each step's expert takes.

    Raises:
        Refusal: A branch is seen from outside, or uses what another branch computes.
    """
    if len(set(roots)) != len(roots):
        raise Refusal("an expert occurs twice in the loop", steps[0].op)
    owner: dict[Value, int] = {root: i for i, root in enumerate(roots)}
    ends = {step.op for step in steps}
    serves, masks = _served(graph, {step.op: i for i, step in enumerate(steps)}), set(roots)
    by_branch: list[list[Op]] = [[] for _ in steps]
    for op in graph.ops:
        held = [v for v in op.operands if v in owner]
        if not held or op in ends or op.name == "return":
            continue
        if op not in serves and masks.issuperset(held) and _looks_at_masks(op, held):
            continue  # the router's, which compares the same ids
        of = {owner[v] for v in held}
        branch = of.pop() if len(of) == 1 else _MIXED
        if branch != _MIXED:
            by_branch[branch].append(op)
        owner.update(dict.fromkeys(op.results, branch))
    found = []
    for i, (step, expert, root) in enumerate(zip(steps, experts, roots, strict=True)):
        ops = _needed(step, by_branch[i])
        checks = _checks(by_branch[i], {*ops, *step.own})
        _check_closed(step, ops, checks)
        key, outside = _signature(step, root, ops)
        strange = next((v for v in outside if v in owner), None)
        if strange is not None:
            raise Refusal(f"an expert of the loop uses {strange!r}, which another one computes", step.op)
        found.append(Branch(step, expert, root, ops, checks, key, outside))
    return found


def exclusive_branches(
    graph: Graph, steps: Sequence[Step], experts: Sequence[int], rows_of: Callable[[Op], Value | None]
) -> list[Branch] | None:
    """The branches of a loop whose experts all take every token: what only one step uses is that step's.

    Args:
        graph: Their graph.
        steps: The steps of one loop.
        experts: The expert of each step.
        rows_of: The rows of a GEMM, None for another op.

    Returns:
        The branches, whose root is the matrix of tokens, or None if they hold no GEMM.

    Raises:
        Refusal: A branch draws numbers or writes memory.
    """
    owner = _served(graph, {s.added.op: i for i, s in enumerate(steps) if s.added.op is not None})
    by_branch: list[list[Op]] = [[] for _ in steps]
    for op in graph.ops:
        if op in owner:
            by_branch[owner[op]].append(op)
    taken = [v for op in by_branch[0] if (v := rows_of(op)) is not None and (v.op is None or v.op not in owner)]
    if not taken:
        return None
    found = []
    for i, (step, expert) in enumerate(zip(steps, experts, strict=True)):
        held, ops = {taken[0]}, list[Op]()
        for op in by_branch[i]:
            if any(v in held for v in op.operands):
                ops.append(op)
                held.update(op.results)
        _check_pure(ops)
        found.append(Branch(step, expert, taken[0], ops, [], *_signature(step, taken[0], ops)))
    return found


def _served(graph: Graph, ends: dict[Op, int]) -> dict[Op, int]:
    """The step of every op that serves one of them alone, from the ops that end the steps."""
    owner = dict(ends)
    for op in reversed(graph.ops):
        if op not in owner:
            of = {owner.get(u, _MIXED) for r in op.results for u in r.users}
            if len(of) == 1 and _MIXED not in of:
                owner[op] = of.pop()
    return owner


def _looks_at_masks(op: Op, masks: list[Value]) -> bool:
    """True for a function of ``masks`` that has their sizes alone: it picks no expert's tokens."""
    known = {s for m in masks if (t := tensor(m)) is not None for d in t.shape for s in d.free_symbols}
    found = {s for r in op.results if (t := tensor(r)) is not None for d in t.shape for s in d.free_symbols}
    return bool(op.results) and found <= known


def _needed(step: Step, ops: list[Op]) -> list[Op]:
    """The ops of a branch that the added rows are computed from, in graph order."""
    own = set(ops)
    seen: set[Op] = set()
    stack = [step.added, step.index]
    while stack:
        op = stack.pop().op
        if op in own and op not in seen:
            assert op is not None
            seen.add(op)
            stack.extend(op.operands)
    return [op for op in ops if op in seen]


def _checks(ops: list[Op], inside: set[Op]) -> list[Op]:
    """Asserts among ``ops``, and numbers that nothing but such asserts uses."""
    found: set[Op] = set()
    for op in reversed(ops):
        if op in inside:
            continue
        number = op.results and all(isinstance(r.type, SymType) for r in op.results)
        if function(op) in _CHECKS or (number and all(u in found for r in op.results for u in r.users)):
            found.add(op)
    return [op for op in ops if op in found]


def _check_closed(step: Step, ops: list[Op], checks: list[Op]) -> None:
    inside = {*ops, *step.own, *checks, step.op}
    _check_pure(ops)
    for op in ops:
        for result in op.results:
            if any(u not in inside for u in result.users):
                raise Refusal(f"{result!r}, computed inside an expert of the loop, is also used elsewhere", op)


def _check_pure(ops: list[Op]) -> None:
    for op in ops:
        if not is_pure(op):
            target = op.attrs.get("target", op.name)
            raise Refusal(f"{target} in an expert of the loop draws numbers or writes memory", op)


def _signature(step: Step, root: Value, ops: list[Op]) -> tuple[Hashable, list[Value]]:
    added = tensor(step.added)
    assert added is not None
    rows = added.shape[0]
    number: dict[Value, Hashable] = {root: "root"}
    outside: list[Value] = []

    def name(value: Value) -> Hashable:
        if value not in number:
            number[value] = ("outside", len(outside), _general(value.type, rows))
            outside.append(value)
        return number[value]

    keys: list[Hashable] = []
    for i, op in enumerate(ops):
        operands = tuple(name(v) for v in op.operands)
        types = tuple(_general(r.type, rows) for r in op.results)
        keys.append((op.name, op.groups, operands, attr_key(op.attrs), types, tuple(graph_key(r) for r in op.regions)))
        for j, result in enumerate(op.results):
            number[result] = (i, j)
    end = step.mode, name(step.added), name(step.index), _general(step.added.type, rows)
    return (_general(root.type, rows), tuple(keys), end), outside


def _general(type: Type, rows: sympy.Expr) -> Type:
    """``type`` with the branch's own number of rows called R."""
    if not isinstance(rows, sympy.Symbol):
        return type
    to = {rows: _ROWS}
    if isinstance(type, TensorType):
        return type.with_(shape=tuple(d.xreplace(to) if d.free_symbols else d for d in type.shape))
    if isinstance(type, SymType):
        return SymType(type.kind, type.expr.xreplace(to))
    return type


def with_rows(type: Type, rows: sympy.Expr, new: sympy.Expr) -> Type:
    """``type`` with ``rows`` rows as one with ``new`` rows.

    A number of rows that is no symbol stands for itself only as the first dimension.
    """
    if isinstance(rows, sympy.Symbol):
        to = {rows: as_dim(new)}
        if isinstance(type, TensorType):
            return type.with_(shape=tuple(d.xreplace(to) for d in type.shape))
        return SymType(type.kind, type.expr.xreplace(to)) if isinstance(type, SymType) else type
    if isinstance(type, TensorType) and type.rank and type.shape[0] == rows:
        return type.with_(shape=(as_dim(new), *type.shape[1:]))
    return type
