"""Anchors: the expert GEMMs that a MoE block shows, however the rest of it is written.

Three forms are known. A grouped GEMM (``aten._grouped_mm``, transformers' fallback op for types that it lacks) has rows
sorted by expert; so has ``moec::grouped_linear``, whose weights may also be one matrix per expert, with a bias, and
``moec::scaled_linear``, whose weights are f8e4m3fn with scales. A
batched GEMM with an indexed weight (``bmm(W[ids], x)``) has rows in slot order.
"""

from __future__ import annotations

from dataclasses import dataclass

from moec.ir.core import Graph, Op, Value
from moec.passes.matching import VIEWS, arg, function, maker, peel, rank, same_dim, single_index, tensor

GROUPED = ("_grouped_mm", "grouped_mm", "grouped_mm_fallback")


@dataclass(frozen=True)
class Gemm:
    """One expert GEMM.

    Attributes:
        op: The call.
        rows: ``[R, K]`` left operand, one row per slot.
        weights: ``[E, N, K]`` (form ``nk``) or ``[E, K, N]`` (form ``kn``), as it lies; or E matrices ``[N, K]``
            (``[K, N]``).
        form: How a weight lies.
        groups: Offsets of the experts' rows (grouped) or the expert id of every row (batched).
        sorted: Rows are sorted by expert.
        out: ``[R, N]``.
        bias: ``[E, N]``, or E vectors, where the GEMM itself adds it.
        scales: Of a weight in f8e4m3fn.
    """

    op: Op
    rows: Value
    weights: tuple[Value, ...]
    form: str
    groups: Value
    sorted: bool
    out: Value
    bias: tuple[Value, ...] = ()
    scales: tuple[Value, ...] = ()

    @property
    def stacked(self) -> bool:
        """One tensor holds the weights of all experts."""
        return len(self.weights) == 1 and rank(self.weights[0]) == 3


def untranspose(value: Value) -> tuple[Value, bool]:
    """``value`` with transpositions of its last two dimensions taken off, and whether their number was odd."""
    odd = False
    while True:
        op = maker(value, "transpose", "permute", "mT", "t", "contiguous", "alias")
        if op is None:
            return value, odd
        n = rank(value)
        if function(op) == "transpose":
            dims = {arg(op, 1, "dim0") % n, arg(op, 2, "dim1") % n}
            if dims != {n - 1, n - 2}:
                return value, odd
            odd = not odd
        elif function(op) == "permute":
            order = [d % n for d in arg(op, 1, "dims")]
            if order != [*range(n - 2), n - 1, n - 2]:
                return value, odd
            odd = not odd
        elif function(op) in ("mT", "t"):
            odd = not odd
        value = arg(op, 0, "self")


def _grouped(op: Op) -> Gemm | None:
    rows, weight, offsets = arg(op, 0, "self"), arg(op, 1, "mat2"), arg(op, 2, "offs")
    if rank(rows) != 2 or rank(weight) != 3 or not isinstance(offsets, Value):
        return None
    source, odd = untranspose(weight)
    return Gemm(op, rows, (source,), "nk" if odd else "kn", offsets, True, op.results[0])


def _linear(op: Op) -> Gemm | None:
    if not op.attrs["target"].startswith("moec."):  # the bare name might be anybody's
        return None
    rows, weights, bias, offsets = (arg(op, i, n) for i, n in enumerate(("rows", "weights", "bias", "offsets")))
    ranks = {rank(w) for w in weights}
    if rank(rows) != 2 or not (ranks == {2} or (ranks == {3} and len(weights) == 1)) or not isinstance(offsets, Value):
        return None
    form = "kn" if arg(op, 4, "inputs_first") else "nk"
    return Gemm(op, rows, tuple(weights), form, offsets, True, op.results[0], tuple(bias))


def _scaled(op: Op) -> Gemm | None:
    if not op.attrs["target"].startswith("moec."):
        return None
    rows, weight, scales, offsets = (arg(op, i, n) for i, n in enumerate(("rows", "weight", "scales", "offsets")))
    if rank(rows) != 2 or rank(weight) != 3 or not isinstance(offsets, Value):
        return None
    return Gemm(op, rows, (weight,), "nk", offsets, True, op.results[0], scales=(scales,))


def _squeezed(value: Value) -> Value | None:
    """The ``[R, N]`` view that is the only use of a batched GEMM's result."""
    if len(value.users) != 1 or function(value.users[0]) not in VIEWS:
        return None
    out = value.users[0].results[0]
    whole, flat = tensor(value), tensor(out)
    if whole is None or flat is None or flat.rank != 2:
        return None
    width = whole.shape[1] * whole.shape[2]  # one of them is 1
    return out if same_dim(flat.shape[0], whole.shape[0]) and same_dim(flat.shape[1], width) else None


def _batched(op: Op) -> Gemm | None:
    for weight_at in (0, 1):
        weight, other = arg(op, weight_at, "self"), arg(op, 1 - weight_at, "mat2")
        source, odd = untranspose(weight)
        picked = single_index(source)
        if picked is None or rank(picked[0]) != 3 or rank(picked[1]) != 1:
            continue
        rows, out = peel(other, ("unsqueeze",)), _squeezed(op.results[0])
        if rank(rows) != 2 or out is None:
            continue
        # W x: rows of W are outputs; x W: rows of W are inputs. A transposition swaps them.
        form = "nk" if (weight_at == 0) != odd else "kn"
        return Gemm(op, rows, (picked[0],), form, picked[1], False, out)
    return None


_FORMS = {**dict.fromkeys(GROUPED, _grouped), "grouped_linear": _linear, "scaled_linear": _scaled, "bmm": _batched}


def find(graph: Graph) -> dict[Op, Gemm]:
    """The expert GEMMs of ``graph`` by their call, in order."""
    found: dict[Op, Gemm] = {}
    for op in graph.ops:
        read = _FORMS.get(function(op))
        gemm = read(op) if read is not None else None
        if gemm is not None:
            found[op] = gemm
    return found


GATHERS = frozenset({"index", "index_select", "repeat_interleave", "gather", "embedding", "expand", "topk", "sort"})


def feeders(gemm: Gemm, anchors: dict[Op, Gemm]) -> list[Gemm]:
    """The GEMMs whose results reach ``gemm``'s rows row by row, that is without a gather in between; in graph order."""
    found: set[Op] = set()
    seen: set[Op] = set()
    stack = [gemm.rows]
    while stack:
        op = stack.pop().op
        if op is None or op in seen:
            continue
        seen.add(op)
        if op in anchors:
            found.add(op)
        elif function(op) not in GATHERS and op.name == "torch.call":
            stack.extend(op.operands)
    return [g for op, g in anchors.items() if op in found]
