"""The pass ``interleave-layers``.

Contract:
1. A layer whose experts lie on several ranks is begun and run on by ops of their own (``moe.begin``, ``moe.resume``),
   and all ops of the graph are put in an order in which ranks wait only where nothing else can run: the attention of
   one micro-batch runs while the rows of another travel.
2. Every op runs once, on the operands it had, behind all it depends on: no bit changes. The order is a function of the
   graph alone, so that all ranks begin the same collectives in the same order. Nothing passes an op with an effect.
3. A graph in which nothing large is independent of a layer, or in which the cost model does not see it pay, stays as it
   was. Where nobody knows how long things take, the pass does as it is told.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from moec.ir.core import Graph, Op, Value
from moec.ir.staged import stops
from moec.ir.types import TensorType, TokenType
from moec.passes.base import Pass, PassClass, PassContext, PassResult
from moec.passes.effects import is_pure
from moec.passes.interleave_layers.beside import InterleaveCosts, Work, work_of, work_seconds
from moec.passes.interleave_layers.order import Task, apart, in_order
from moec.passes.interleave_layers.pieces import Pieces, pieces_of, tokens_of
from moec.passes.interleave_layers.worth import Worth, worth
from moec.passes.matching import function
from moec.passes.registry import register_pass

SPREAD = "moe.parallel_experts"
_LARGE_OPS = frozenset({"moe.experts", SPREAD, "moe.grouped_gemm"})
LARGE_CALLS = frozenset({"linear", "mm", "addmm", "bmm", "baddbmm", "matmul", "einsum", "scaled_dot_product_attention"})
"""What takes long enough to be worth a layer in pieces."""


@register_pass
@dataclass(frozen=True)
class InterleaveLayers(Pass):
    """Runs the attention of one micro-batch while the rows of another's layer travel.

    For programs in which several micro-batches go through the same layers (dual batch, as DeepSeek-V3,
    arXiv:2412.19437, section 3.4, and SGLang's two-batch overlap decode). Where a program waits for rows, whatever else
    is ready runs first; of the layers that wait, the one that was left first goes on.

    Runs behind ``expert-parallel`` and ``overlap``. Of a whole program the result has no gradients. In the
    ``torch.compile`` door it is the graphs that autograd makes that are put in order, forward and backward each for
    itself.

    Attributes:
        always: Nobody asks whether it pays.
        tokens: Tokens of a rank in a call of a layer, for the cost model, where there is no routing profile.
        length: Tokens of a sequence, for what attention does with its scores, where the program does not say; 0 where
            nobody knows, and then it is not counted.
    """

    name: ClassVar[str] = "interleave-layers"
    pass_class: ClassVar[PassClass] = PassClass.BITWISE
    summary: ClassVar[str] = "other micro-batches compute while the rows of a layer travel"

    always: bool = False
    tokens: int = 0
    length: int = 0

    def __post_init__(self) -> None:
        for name in ("tokens", "length"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} is a number of tokens, or 0 where nobody knows")

    def run(self, graph: Graph, ctx: PassContext) -> PassResult:
        if ctx.cut_as:  # one block: the door interleaves what it was cut out of
            return PassResult(False)
        ops = graph.ops[:-1]
        layers = [i for i, op in enumerate(ops) if op.name == SPREAD and stops(op.regions[0])]
        if not layers:
            return PassResult(False)
        tasks = _tasks(ops)
        free, fenced = apart(tasks, layers, [i for i, op in enumerate(ops) if _large(op)])
        for i in layers:
            if i in free:
                continue
            effect = (
                next(op for op, task in zip(ops, tasks, strict=True) if task.kind == "fence") if i in fenced else None
            )
            why = NOTHING if effect is None else f"{effect.name} has an effect and must keep its place"
            ctx.remark("missed", self.name, why, effect or ops[i])
        if not free:
            return PassResult(False)
        found = None if self.always else self._worth(ops, tasks, free, ctx)
        if found is not None and not found.pays:
            ctx.remark("missed", self.name, declined("the program", found), ops[free[0]])
            return PassResult(False)
        split = 0
        for op in [ops[i] for i in free]:
            what = f"what else is ready runs where it waits, {len(stops(op.regions[0]))} times{told(found)}"
            if not ctx.take_fuel(self.name, what, op):
                break
            ctx.remark("applied", self.name, what, op)
            _split(graph, op)
            split += 1
        if split:
            graph.ops = schedule(graph)
        return PassResult(split > 0, {"interleaved": split})

    def _worth(self, ops: Sequence[Op], tasks: Sequence[Task], free: Sequence[int], ctx: PassContext) -> Worth | None:
        layers = {i: pieces_of(op, op.regions[0], 0, ctx, self.tokens) for i, op in enumerate(ops) if op.name == SPREAD}
        first = ops[free[0]]
        size = first.operands[1].type
        tokens = size.shape[0] if isinstance(size, TensorType) else None
        beside = {i: w for i, op in enumerate(ops) if i not in layers and (w := work_of(op, tokens, self.length))}
        known = tokens_of(first, ctx) or self.tokens
        return predicted(tasks, layers, beside, free, first.attrs["group"], ctx, known)


NOTHING = "nothing large could run meanwhile: all needs it or is needed by it"


def predicted(
    tasks: Sequence[Task], layers: Mapping[int, Pieces | None], beside: Mapping[int, Work], split: Sequence[int],
    group: str, ctx: PassContext, tokens: float, backward: bool = False,
) -> Worth | None:  # fmt: skip
    """What interleaving does by the cost model; None where it does not know the layers, or no number of tokens.

    Args:
        tasks: All tasks.
        layers: What happens in each layer; None for one that the cost model does not know.
        beside: What other tasks do; what is not in it takes no time.
        split: Which layers would be run in pieces.
        group: Over which they lie.
        ctx: Where the cost model is.
        tokens: Of a rank in a call.
        backward: Of which direction the tasks are.
    """
    costs = ctx.cost_model
    known = {i: p for i, p in layers.items() if p is not None}
    if len(known) < len(layers) or not tokens or not isinstance(costs, InterleaveCosts):
        return None
    each = costs.piece_seconds(group)
    if each is None:
        return None
    computing = {i: s for i, w in beside.items() if (s := work_seconds(w, group, tokens, costs, backward))}
    return worth(tasks, known, computing, split, each)


def told(found: Worth | None) -> str:
    """The times of a prediction, to be put behind what was done."""
    return "" if found is None else f": {_ms(found.interleaved)} instead of {_ms(found.in_turn)}"


def declined(what: str, found: Worth) -> str:
    """Why a graph stays in turn."""
    return f"{what} stays in turn: so it takes {_ms(found.in_turn)}, interleaved {_ms(found.interleaved)}"


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.3g} ms"


def _large(op: Op) -> bool:
    return op.name in _LARGE_OPS or function(op) in LARGE_CALLS


def _split(graph: Graph, layer: Op) -> None:
    """Put ops that begin a layer and run it on in its place."""
    region = layer.regions[0].clone()
    begin = Op(
        "moe.begin", layer.operands, [TokenType()], attrs=layer.attrs, regions=[region], groups=layer.groups,
        loc=layer.loc,
    )  # fmt: skip
    token: Value = graph.insert_before(layer, begin).result
    count = len(stops(region))
    for i in range(count):
        types = [TokenType()] if i < count - 1 else [r.type for r in layer.results]
        names = [] if i < count - 1 else [r.name for r in layer.results]
        last = graph.insert_before(layer, Op("moe.resume", [token], types, loc=layer.loc, names=names))
        token = last.results[0]
    for old, new in zip(layer.results, last.results, strict=True):
        new.meta = dict(old.meta)
        old.replace_all_uses_with(new)
    layer.erase()


def _tasks(ops: Sequence[Op]) -> list[Task]:
    place = {op: i for i, op in enumerate(ops)}
    kinds = {"moe.begin": "begin", "moe.resume": "resume"}
    return [
        Task(
            tuple({place[v.op]: None for v in op.operands if v.op is not None}),
            kinds.get(op.name, "op" if is_pure(op) else "fence"),  # type: ignore[arg-type]
        )
        for op in ops
    ]


def schedule(graph: Graph) -> list[Op]:
    """The ops in an order in which waits come as late as can be (:func:`~.order.in_order`)."""
    ops = graph.ops[:-1]
    return [*(ops[i] for i in in_order(_tasks(ops))), graph.terminator]
