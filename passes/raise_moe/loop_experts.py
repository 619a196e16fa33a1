"""Reading the program of one expert of a loop: up and down GEMM, activation, and what follows.

One expert stands for all of its kind, which have equal keys (:mod:`moec.passes.raise_moe.loop_branches`); what differs
between them must be the weights and biases of its GEMMs.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

from moec.ir.core import Op, Value
from moec.ir.types import DType
from moec.passes.matching import CASTS, arg, function, maker, peel, rank, same_dim, tensor
from moec.passes.raise_moe.activation import RowProgram, read_rows
from moec.passes.raise_moe.anchors import untranspose
from moec.passes.raise_moe.block import Projection
from moec.passes.raise_moe.loop_branches import Branch
from moec.passes.raise_moe.refusal import Refusal

GEMMS = ("linear", "mm", "matmul", "addmm")
_TRANSPOSED = ("t", "numpy_T", "mT")
_ADDED_DIMENSIONS = ("unsqueeze", "view", "reshape")


@dataclass(frozen=True)
class LoopGemm:
    """A GEMM of an expert's rows with a matrix from outside.

    Attributes:
        op: The call.
        rows: Its rows.
        operand: The matrix as the call has it.
        bias: The vector that it adds, if any.
        out: Its result, the bias included.
    """

    op: Op
    rows: Value
    operand: Value
    bias: Value | None
    out: Value


@dataclass(frozen=True)
class Expert:
    """An expert's program.

    Attributes:
        casts: Types that its token rows are cast to first, one after the other.
        ups: One or two GEMMs of the token rows.
        down: The GEMM of the activation.
        activation: Between them; None if there is nothing.
        post: After the down GEMM; None if there is nothing.
        finished: Its rows, before they are weighted.
    """

    casts: tuple[DType, ...]
    ups: list[LoopGemm]
    down: LoopGemm
    activation: RowProgram | None
    post: RowProgram | None
    finished: Value


def gemm_of(op: Op, inside: Collection[Value]) -> LoopGemm | None:
    """``op`` as a GEMM of rows from ``inside`` with a matrix from outside."""
    name = function(op)
    rows: Any
    matrix: Any
    bias: Any = None
    if name == "linear":
        rows, matrix, bias = arg(op, 0, "input"), arg(op, 1, "weight"), arg(op, 2, "bias")
    elif name in ("mm", "matmul"):
        rows, matrix = arg(op, 0, "self"), arg(op, 1, "mat2" if name == "mm" else "other")
    elif name == "addmm" and arg(op, 3, "beta", 1) == 1 and arg(op, 4, "alpha", 1) == 1:
        bias, rows, matrix = arg(op, 0, "self"), arg(op, 1, "mat1"), arg(op, 2, "mat2")
    else:
        return None
    if rank(rows) != 2 or rank(matrix) != 2 or rows not in inside or matrix in inside:
        return None
    if bias is not None and (rank(bias) != 1 or bias in inside):
        return None
    return LoopGemm(op, rows, matrix, bias, op.results[0])


def gemm_rows(op: Op) -> Value | None:
    """What a GEMM takes for rows."""
    at = {"linear": 0, "mm": 0, "matmul": 0, "addmm": 1}.get(function(op))
    rows = arg(op, at) if at is not None else None
    return rows if isinstance(rows, Value) and rank(rows) == 2 else None


def find_gemms(branch: Branch, rows: Value) -> list[LoopGemm]:
    """The GEMMs of ``rows`` and of what is computed from them, in order."""
    inside = {rows, *(r for op in branch.ops for r in op.results)}
    return [g for op in branch.ops if (g := gemm_of(op, inside)) is not None]


def is_expert(gemms: Sequence[LoopGemm], rows: Value) -> bool:
    """True for one or two GEMMs of the token rows, then one of what they give."""
    ups = [g for g in gemms if peel(g.rows, CASTS) is rows]
    return len(ups) in (1, 2) and len(gemms) == len(ups) + 1 and gemms[-1] not in ups


def _with_bias(gemm: LoopGemm, differing: Collection[Value]) -> LoopGemm:
    """``gemm`` with the expert's own vector that is added to its result right after it."""
    users = gemm.out.users
    if gemm.bias is not None or len(users) != 1 or function(users[0]) != "add" or arg(users[0], 2, "alpha", 1) != 1:
        return gemm
    op = users[0]
    vector = arg(op, 1, "other") if arg(op, 0, "self") is gemm.out else arg(op, 0, "self")
    flat, width = tensor(peel(vector, _ADDED_DIMENSIONS)), tensor(gemm.out)
    if vector not in differing or flat is None or width is None or flat.rank != 1:
        return gemm
    if not same_dim(flat.shape[0], width.shape[1]) or tensor(op.results[0]) != width:
        return gemm
    return LoopGemm(gemm.op, gemm.rows, gemm.operand, vector, op.results[0])


def read_expert(
    branch: Branch, rows: Value, finished: Value, per_token: Collection[Value], differing: Collection[Value]
) -> Expert:
    """The program of ``branch``.

    Args:
        branch: The expert that stands for its kind.
        rows: Its token rows.
        finished: Its result, before weighting.
        per_token: Values that differ between tokens.
        differing: What it takes in that other experts of its kind have otherwise.

    Raises:
        Refusal: It is no up and down GEMM with a function of rows between, or has other things of its own.
    """
    gemms = find_gemms(branch, rows)
    assert is_expert(gemms, rows)
    *ups, down = [_with_bias(g, differing) for g in gemms]
    inputs = {g.rows for g in ups}
    if len(inputs) != 1:
        raise Refusal("gate and up read the tokens in different types", ups[0].op)
    casts: list[DType] = []
    value = next(iter(inputs))
    while value is not rows:
        op = maker(value, *CASTS)
        t = tensor(value)
        assert op is not None
        assert t is not None
        casts.insert(0, t.dtype)
        value = arg(op, 0, "self")
    known = {v for g in (*ups, down) for v in (g.operand, g.bias) if v is not None}
    strange = next((v for v in differing if v not in known), None)
    if strange is not None:
        raise Refusal(f"each expert has its own {strange!r} besides the weights and biases of its GEMMs", strange.op)
    activation = read_rows("activation", [g.out for g in ups], down.rows, per_token)
    post = read_rows("post", [down.out], finished, per_token, split=False)
    return Expert(tuple(casts), ups, down, activation, post, finished)


def _lies(operand: Value, linear: bool) -> tuple[Value, str]:
    """``(matrix as it lies, form)`` of a GEMM's right operand."""
    odd = False
    while True:
        base, turned = untranspose(operand)
        odd ^= turned
        op = maker(base, *_TRANSPOSED)
        if op is None:
            return base, "nk" if odd != linear else "kn"
        odd, operand = not odd, arg(op, 0, "self")


def _stack(parts: Sequence[Value]) -> Value | None:
    """The tensor of which ``parts`` are all the slices along its first dimension, in order."""
    source: Value | None = None
    for i, part in enumerate(parts):
        op = maker(part, "select", "unbind")
        if op is None or arg(op, 1, "dim", 0) != 0:
            return None
        index = part.index if function(op) == "unbind" else arg(op, 2, "index")
        if index != i or (source is not None and arg(op, 0, "self") is not source):
            return None
        source = arg(op, 0, "self")
    t = tensor(source)
    return source if t is not None and t.shape[0] == len(parts) else None


def collect(expert: Expert, mine: Sequence[Value], all_outside: Sequence[Sequence[Value]]) -> list[Projection]:
    """The up GEMMs and the down GEMM with the weights and biases of all experts.

    Args:
        expert: The program that stands for all.
        mine: What its expert takes in.
        all_outside: What each expert takes in, in order of expert.

    Raises:
        Refusal: The weights lie in different ways.
    """
    place = {value: i for i, value in enumerate(mine)}

    def of_all(value: Value) -> list[Value]:
        return [outside[place[value]] for outside in all_outside]

    read: list[tuple[LoopGemm, list[Value], list[Value], str]] = []
    for gemm in (*expert.ups, expert.down):
        lying = [_lies(w, function(gemm.op) == "linear") for w in of_all(gemm.operand)]
        if len({form for _, form in lying}) != 1:
            raise Refusal("some experts' weights lie transposed, others do not", gemm.op)
        biases = [peel(b, _ADDED_DIMENSIONS) for b in of_all(gemm.bias)] if gemm.bias is not None else []
        read.append((gemm, [w for w, _ in lying], biases, lying[0][1]))
    lists = [parts for _, weights, biases, _ in read for parts in (weights, biases) if parts]
    stacks = [_stack(parts) for parts in lists]
    if all(stack is not None for stack in stacks):  # an op has all its weights stacked, or none
        whole = iter([[stack] for stack in stacks if stack is not None])
        read = [(g, next(whole), next(whole) if biases else [], form) for g, _, biases, form in read]
    return [Projection(tuple(weights), form, g.op.results[0], tuple(biases)) for g, weights, biases, form in read]
