"""Where experts can be spread over ranks: a ``moe.experts`` whose weights are gathered from shards.

The weights are written as what they are to the model, all experts': ``comm.all_gather`` of this rank's share, or a call
of ``moec.unshard``, which says the same in a graph of PyTorch's. Moving tokens instead makes the gather vanish.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from moec.ir.attributes import ListAttr
from moec.ir.core import Op, Value
from moec.ir.opdef import op_def
from moec.ir.types import TensorType, TokenType
from moec.passes.calls import call_args, call_op, is_call
from moec.passes.dce import erase_unused
from moec.passes.matching import CASTS, arg, function

UNSHARD = "moec.unshard.default"
EXPERT_GROUPS = ("up", "down", "up_bias", "down_bias")


class Stays(Exception):
    """The experts cannot be spread; ``str`` is the reason."""


@dataclass(frozen=True)
class Shard:
    """One gathered weight.

    Attributes:
        value: This rank's share.
        group: Over which group it is gathered.
        sizes: Experts of every rank.
        scale: What the sum over ranks is multiplied by to be its gradient: 1 / ranks for a mean.
    """

    value: Value
    group: str
    sizes: tuple[int, ...]
    scale: float = 1.0


@dataclass(frozen=True)
class Site:
    """One layer to be spread.

    Attributes:
        op: The ``moe.experts``, on weights of all experts.
        shards: Each weight's share, in the order of the operands from ``up`` to ``down_bias``.
    """

    op: Op
    shards: tuple[Shard, ...]

    @property
    def group(self) -> str:
        return self.shards[0].group

    @property
    def sizes(self) -> tuple[int, ...]:
        return self.shards[0].sizes

    @property
    def ranks(self) -> int:
        return len(self.sizes)

    @property
    def own(self) -> int:
        """Experts of the rank that the graph is for."""
        t = self.shards[0].value.type
        assert isinstance(t, TensorType)
        return int(t.shape[0])

    def attr(self, name: str) -> Any:
        return op_def(self.op.name).attr(self.op, name)

    @property
    def operands(self) -> list[Value]:
        """The operands with shares in the place of whole weights."""
        o = self.op.groups
        last = sum(o[:3]) + len(self.shards)
        return [*self.op.operands[: sum(o[:3])], *(s.value for s in self.shards), *self.op.operands[last:]]


def shard_of(value: Value) -> Shard | None:
    """What ``value`` is gathered from, or None where it is not gathered along its first dimension."""
    op = value.op
    if op is not None and op.name == "comm.wait" and (start := op.operands[0].op) is not None:
        sizes = start.attrs.get("sizes", ())
        if start.name == "comm.all_gather.start" and sizes:
            return Shard(start.operands[0], start.attrs["group"], tuple(sizes))
    if is_call(op, UNSHARD):
        assert op is not None
        local, sizes, group, scale = call_args(op)[0]
        return Shard(local, group, tuple(sizes.items if isinstance(sizes, ListAttr) else sizes), float(scale))
    return None


def hoist_casts(op: Op) -> bool:
    """Cast shares instead of whole weights, where autocast or the model casts what is gathered. True if any was."""
    graph, changed = op.parent, False
    assert graph is not None
    for name in EXPERT_GROUPS:
        for value in op.group(name):
            cast = value.op
            if cast is None or function(cast) not in CASTS or (shard := shard_of(arg(cast, 0))) is None:
                continue
            assert isinstance(value.type, TensorType) and isinstance(shard.value.type, TensorType)
            mine = shard.value.type.with_(dtype=value.type.dtype)
            small = Op(cast.name, (shard.value, *cast.operands[1:]), [mine], attrs=cast.attrs, groups=cast.groups)
            graph.insert_before(op, small)
            whole = _gathered(op, small.result, shard, value.type, arg(cast, 0).op)
            for at, operand in enumerate(op.operands):
                if operand is value:
                    op.set_operand(at, whole)
            erase_unused(cast)
            changed = True
    return changed


def _gathered(before: Op, share: Value, shard: Shard, type: TensorType, like: Op) -> Value:
    """``share`` gathered as ``like`` gathers."""
    graph = before.parent
    assert graph is not None
    if is_call(like, UNSHARD):
        args = (share, list(shard.sizes), shard.group, shard.scale)
        return graph.insert_before(before, call_op(UNSHARD, args, {}, [type])).result
    old = like.operands[0].op
    assert old is not None
    start = graph.insert_before(before, Op(old.name, [share], [TokenType()], attrs=old.attrs, groups=old.groups))
    return graph.insert_before(before, Op(like.name, [start.result], [type])).result


def read_site(op: Op) -> Site | None:
    """The layer, or None where none of its weights is gathered.

    Raises:
        Stays: Some are, but it cannot be spread.
    """
    weights = [v for name in EXPERT_GROUPS for v in op.group(name)]
    found = [shard_of(v) for v in weights]
    if not any(found):
        return None
    if op.group("up_scale"):
        raise Stays("weights in fp8 with scales are not spread over ranks")
    if not op_def(op.name).attr(op, "stacked"):
        raise Stays("experts that are one tensor each are not spread; stack them first")
    missing = next((v for v, s in zip(weights, found, strict=True) if s is None), None)
    if missing is not None:
        raise Stays(f"{missing!r} is whole on every rank, other weights of the layer are shards")
    shards: Sequence[Shard] = [s for s in found if s is not None]
    if len({(s.group, s.sizes, s.scale) for s in shards}) > 1:
        raise Stays("the layer's weights are sharded over different groups or in different parts")
    experts = op_def(op.name).attr(op, "experts")
    if sum(shards[0].sizes) != experts:
        raise Stays(f"shards of {shards[0].sizes} experts do not make the layer's {experts}")
    return Site(op, tuple(shards))
