"""The pass ``reschedule-tokens``.

Contract:
1. Micro-batches are ops of one layer: the same op, attributes, nested graphs and weights, on tokens of their own, none
   of which depends on another's result. In a graph where something between them has an effect they are left alone.
2. Every micro-batch keeps its number of tokens; every token gets its own result, at its own place.
3. Without a routing profile that shows clusters nothing is changed, unless the user says ``always``.
4. Ops that use a micro-batch's result and stand before the last of them are moved behind it. Nothing else moves.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Protocol, runtime_checkable

from moec.ir.beside import own_experts
from moec.ir.core import Graph, Op, Value, clone_op
from moec.ir.opdef import op_def
from moec.ir.types import TensorType
from moec.passes.base import Pass, PassClass, PassContext, PassResult
from moec.passes.calls import call_op, is_call
from moec.passes.effects import is_pure
from moec.passes.expert_parallel.site import Stays, read_site
from moec.passes.registry import register_pass
from moec.passes.structure import attr_key, graph_key

_SPREAD = "moe.parallel_experts"
_TOKENS, _IDS = 0, 1
_ROWWISE = 3
"""The operands with a row a token: tokens, ids, weights."""

Least = tuple[tuple[int, float], ...]


@runtime_checkable
class Evidence(Protocol):
    """What the pass asks of ``ctx.profile`` (:class:`moec.routing.profile.RoutingProfile`)."""

    def least_saving(self, experts: int, top_k: int, batches: int, sizes: tuple[int, ...]) -> Least | str:
        """``((tokens, part), ...)``: what has to be saved so that it is no chance; or why nothing is known to be."""
        ...


@register_pass
@dataclass(frozen=True)
class RescheduleTokens(Pass):
    """Regroups the tokens of adjacent micro-batches, so that each touches fewer experts or ranks (arXiv:2410.17954).

    A layer that several micro-batches of a program go through reads the weights of the experts that each touches. Here
    the tokens of two (or more) of them are dealt out anew, when it is known what they chose (``moe.regroup``): tokens
    with the same experts meet in one batch. Results go back to where they belong. What pays for it is a gather of the
    tokens and one of the results, and that a micro-batch cannot begin before the others' routers are done.

    Results and the gradients of tokens and router weights keep their bits, if a GEMM gives a row the same bits
    whatever its place among the rows. Gradients of experts' weights are sums over other rows: their last bits change.
    With ``exact``, and under ``torch.use_deterministic_algorithms(True)``, backwards run on the micro-batches as they
    came (``moe.backward_as``): all gradients keep their bits, and a backward touches as many experts as before.

    Attributes:
        batches: How many adjacent micro-batches share their tokens.
        objective: ``experts`` touched, or ``ranks`` that hold them, where experts are spread over ranks.
        cut: A layer that stands alone is run in ``batches`` parts. That alone never reads less than one run; it is for
            programs that need parts (less memory at a time, communication beside computation).
        always: Regroup though no profile shows clusters.
        exact: Keep the bits of all gradients.
    """

    name: ClassVar[str] = "reschedule-tokens"
    pass_class: ClassVar[PassClass] = PassClass.BITWISE
    summary: ClassVar[str] = "tokens with the same experts meet in one micro-batch"

    batches: int = 2
    objective: Literal["experts", "ranks"] = "experts"
    cut: bool = False
    always: bool = False
    exact: bool = False

    def __post_init__(self) -> None:
        if self.batches < 2:
            raise ValueError(f"batches = {self.batches}: there must be two or more")

    @property
    def micro_batches(self) -> int:
        return self.batches

    def run(self, graph: Graph, ctx: PassContext) -> PassResult:
        layers: dict[Hashable, list[Op]] = {}
        for op in graph.ops:
            if op.name in ("moe.experts", _SPREAD) and op_def(op.name).attr(op, "experts") > 1 and not _is_done(op):
                layers.setdefault(_layer_key(op), []).append(op)
        done = 0
        for ops in layers.values():
            while ops:
                together = ops[: self.batches] if len(ops) >= self.batches else ops[:1]
                reason = self._refusal(together, ctx)
                if reason is not None:
                    ctx.remark("missed", self.name, reason, ops.pop(0))
                    continue
                del ops[: len(together)]
                attrs = self._attrs(together[0], ctx)
                if isinstance(attrs, str):
                    ctx.remark("missed", self.name, attrs, together[0])
                    continue
                if ctx.leaves(self.name, together[0]):
                    continue
                what = f"{self.batches} micro-batches regrouped by {self.objective}"
                if not ctx.take_fuel(self.name, what, together[-1]):
                    return PassResult(done > 0, {"regrouped": done})
                ctx.remark("applied", self.name, what, together[-1])
                exact = self.exact or ctx.deterministic
                if len(together) == 1:
                    _cut(graph, together[0], {**attrs, "parts": self.batches}, exact)
                else:
                    _share(graph, together, attrs, exact)
                done += 1
        return PassResult(done > 0, {"regrouped": done})

    def _refusal(self, together: Sequence[Op], ctx: PassContext) -> str | None:
        """Why these are no micro-batches that may share their tokens."""
        if len(together) == 1:
            if not self.cut:
                return f"no {self.batches} micro-batches go through the layer; cut=true makes them of one"
            if together[0].name == _SPREAD:
                return "a layer that is spread over ranks is not cut any more; run this pass before expert-parallel"
            return None
        assert together[0].parent is not None
        inside = _between(together[0].parent, together)
        if _moved(inside, together) is None:
            return "one micro-batch depends on another's result: these are layers of the same weights"
        effect = next((op for op in inside if not is_pure(op)), None)
        return None if effect is None else f"{effect.name} between the micro-batches has an effect and must stay"

    def _attrs(self, op: Op, ctx: PassContext) -> dict[str, Any] | str:
        """The attributes of ``moe.regroup``, or why tokens stay as they come."""
        ids = op.operands[_IDS].type
        assert isinstance(ids, TensorType)
        experts: int = op_def(op.name).attr(op, "experts")
        sizes: tuple[int, ...] = ()
        if self.objective == "ranks":
            sizes = _rank_sizes(op)
            if not sizes:
                return "objective=ranks needs experts that are spread over ranks"
        attrs: dict[str, Any] = {"experts": experts, **({"sizes": sizes} if sizes else {})}
        if (size := _expert_bytes(op)) > 0:
            attrs["expert_bytes"] = size
        if self.always:
            return attrs
        profile = ctx.profile
        if not isinstance(profile, Evidence):
            return "there is no routing profile, so that nothing shows clusters; `moec profile --routing` makes one"
        if not ids.shape[1].is_Integer:
            return "how many experts a token has is not known before it runs"
        least = profile.least_saving(experts, int(ids.shape[1]), self.batches, sizes)
        return least if isinstance(least, str) else {**attrs, "least": least}


def _is_done(op: Op) -> bool:
    """Whether the op is there because this pass has run."""
    rows = op.operands[_TOKENS].op
    index = None if rows is None or not is_call(rows, "aten.index_select.default") else rows.operands[1].op
    given = any(user.name == "moe.backward_as" and at == 1 for user, at in op.result.uses)
    return given or (index is not None and index.name == "moe.regroup")


def _layer_key(op: Op) -> Hashable:
    """Equal for ops of the same layer on different tokens."""
    regions, attrs = op.regions, attr_key(op.attrs)
    inner: Hashable = None
    if op.name == _SPREAD:  # its programs are written for their own number of tokens; the experts' part tells
        (experts,) = own_experts(op.regions[0])
        regions, inner = experts.regions, attr_key(experts.attrs)
    rows = [v.type for v in (*op.operands[:_ROWWISE], op.result)]
    types = tuple((t.dtype, t.shape[1:], t.device) if isinstance(t, TensorType) else t for t in rows)
    return op.name, op.groups, op.operands[_ROWWISE:], attrs, inner, tuple(map(graph_key, regions)), types


def _rank_sizes(op: Op) -> tuple[int, ...]:
    """Experts of every rank; () where they are not spread over several."""
    if op.name == _SPREAD:
        sizes = tuple(op.attrs["sizes"])
    else:
        try:
            site = read_site(op)
        except Stays:
            return ()
        sizes = () if site is None else site.sizes
    return sizes if len(sizes) > 1 else ()


def _expert_bytes(op: Op) -> int:
    """Bytes of the weights of one expert, biases and scales aside; 0 where a type does not tell."""
    if op.name == _SPREAD:
        (op,) = own_experts(op.regions[0])
    total = 0
    for value in (*op.group("up"), *op.group("down")):
        if not isinstance(value.type, TensorType) or not all(n.is_Integer for n in value.type.shape):
            return 0
        total += int(math.prod(value.type.shape)) * value.type.dtype.bits // 8
    down = op.group("down")
    first = down[0].type
    assert isinstance(first, TensorType)
    return total // (int(first.shape[0]) if op_def(op.name).attr(op, "stacked") else len(down))


def _between(graph: Graph, together: Sequence[Op]) -> list[Op]:
    """The ops from the first of ``together`` to the last, without these."""
    first, last = graph.ops.index(together[0]), graph.ops.index(together[-1])
    return [op for op in graph.ops[first:last] if op not in together]


def _moved(inside: Sequence[Op], together: Sequence[Op]) -> list[Op] | None:
    """Those of ``inside`` that use what ``together`` make; None where one of ``together`` uses it, too."""
    made = {op.result for op in together}
    users = []
    for op in inside:
        if any(v in made for v in op.operands):
            users.append(op)
            made.update(op.results)
    return None if any(v in made for op in together for v in op.operands) else users


def _share(graph: Graph, together: Sequence[Op], attrs: dict[str, Any], exact: bool) -> None:
    """Deal the tokens of ``together`` out anew. All of them run where the last one stands."""
    users = _moved(_between(graph, together), together)
    assert users is not None
    last = graph.ops.index(together[-1]) + 1
    moving = {*users, *together}
    graph.ops[:last] = [op for op in graph.ops[:last] if op not in moving] + [*together, *users]
    first, behind = together[0], graph.ops[last - len(users)]
    given = [_same(op) for op in together] if exact else []
    plan = _regroup(graph, first, [op.operands[_IDS] for op in together], attrs)
    count = len(together)
    for i in range(_ROWWISE):
        rows = [op.operands[i] for op in together]
        whole = _cat(graph, first, rows)
        for op, there in zip(together, plan[:count], strict=True):
            op.set_operand(i, _rows(graph, first, whole, there))
    uses = [list(op.result.uses) for op in together]
    whole = _cat(graph, behind, [op.result for op in together])
    for i, (used, home) in enumerate(zip(uses, plan[count:], strict=True)):
        back = _rows(graph, behind, whole, home)
        if exact:
            back = _backward_as(graph, behind, back, given[i])
        for user, at in used:
            user.set_operand(at, back)


def _cut(graph: Graph, op: Op, attrs: dict[str, Any], exact: bool) -> None:
    """Run ``op`` in parts."""
    given = _same(op) if exact else None
    plan = _regroup(graph, op, [op.operands[_IDS]], attrs)
    made = []
    for there in plan[:-1]:
        rows: dict[Value, Value] = {v: _rows(graph, op, v, there) for v in op.operands[:_ROWWISE]}
        part = graph.insert_before(op, clone_op(op, lambda v, rows=rows: rows.get(v, v), {}))  # type: ignore[misc]
        part.result.type = _with_rows(op.result, there)
        made.append(part.result)
    back = _rows(graph, op, _cat(graph, op, made), plan[-1])
    op.result.replace_all_uses_with(back if given is None else _backward_as(graph, op, back, given))
    op.erase()


def _same(op: Op) -> Op:
    """A copy of ``op``, in no graph yet."""
    return clone_op(op, lambda v: v, {})


def _backward_as(graph: Graph, before: Op, made: Value, given: Op) -> Value:
    result = graph.insert_before(before, given).result
    return graph.insert_before(before, Op("moe.backward_as", [made, result], [result.type], loc=given.loc)).result


def _regroup(graph: Graph, before: Op, ids: list[Value], attrs: dict[str, Any]) -> list[Value]:
    groups = (len(ids),)
    probe = Op("moe.regroup", ids, (), attrs=attrs, groups=groups)
    types = op_def("moe.regroup").infer(probe)
    probe.drop_operands()
    assert types is not None
    made = Op("moe.regroup", ids, types, attrs=attrs, groups=groups, loc=before.loc)
    return graph.insert_before(before, made).results


def _cat(graph: Graph, before: Op, parts: list[Value]) -> Value:
    types = [p.type for p in parts if isinstance(p.type, TensorType)]
    total = sum((t.shape[0] for t in types[1:]), types[0].shape[0])
    type = types[0].with_(shape=(total, *types[0].shape[1:]))
    return graph.insert_before(before, call_op("aten.cat.default", (parts,), {}, [type], loc=before.loc)).result


def _rows(graph: Graph, before: Op, whole: Value, index: Value) -> Value:
    call = call_op("aten.index_select.default", (whole, 0, index), {}, [_with_rows(whole, index)], loc=before.loc)
    return graph.insert_before(before, call).result


def _with_rows(value: Value, index: Value) -> TensorType:
    """The type of as many rows of ``value`` as ``index`` names."""
    assert isinstance(value.type, TensorType) and isinstance(index.type, TensorType)
    return value.type.with_(shape=(index.type.shape[0], *value.type.shape[1:]))
