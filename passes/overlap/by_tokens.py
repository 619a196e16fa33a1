"""A program of a layer cut along its tokens: the whole program for some of them, then for the next.

Any form of travelling can be cut so, as nothing of it has to be understood; forwards alone, since gradients of weights
would be added up in another order. A token's result depends on no other token, so it has the same bits.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, pairwise

import sympy

from moec.ir.beside import makers
from moec.ir.builder import Builder
from moec.ir.core import Graph, Op, Value, clone_op
from moec.ir.types import TensorType, Type


def cut_by_tokens(region: Graph, shares: Sequence[int]) -> Graph:
    """The same forward in chunks of tokens.

    What is computed beside the layer stays whole.

    Args:
        region: The forward of a ``moe.parallel_experts``: tokens, ids and weights are its first arguments.
        shares: How much of the tokens every chunk has.
    """
    graph = Graph(region.name, attrs=dict(region.attrs), meta=dict(region.meta))
    args = [graph.add_arg(a.type, a.name) for a in region.args]
    b, of = Builder(graph, region.terminator.loc), sum(shares)
    made: list[Value] = []
    apart: dict[Value, Value] = dict(zip(region.args, args, strict=True))
    once = {o for v in region.outputs[1:] if v.op is not None for o in (v.op, *makers(v.op))}
    for op in [op for op in region.ops if op in once]:
        b.insert(clone_op(op, apart.__getitem__, apart))
    for chunk, (first, last) in enumerate(pairwise([0, *accumulate(shares)])):
        attrs = {"first": first, "last": last, "of": of}
        some = [b.op("moe.token_part", a, attrs=attrs, result_types=[_some(a.type, chunk)]).result for a in args[:3]]
        env: dict[Value, Value] = dict(zip(region.args, [*some, *args[3:]], strict=True))
        for op in [op for op in region.ops[:-1] if op not in once]:
            copy = b.insert(clone_op(op, env.__getitem__, env))
            for result in copy.results:
                result.type, result.name = _inside(result.type, chunk), ""
        made.append(env[region.outputs[0]])
    whole = b.call("aten.cat.default", [made], result_types=[region.outputs[0].type]).result
    outs = [whole, *(apart[v] for v in region.outputs[1:])]
    graph.append(Op("return", outs, groups=(len(outs),), loc=region.terminator.loc))
    return graph


def _some(type: Type, chunk: int) -> Type:
    """Of a chunk's tokens: their number is a symbol of its own."""
    assert isinstance(type, TensorType)
    rows = str(type.shape[0]) if type.shape[0].is_Symbol else "T"
    return type.with_(shape=(sympy.Symbol(f"{rows}{chunk}", integer=True), *type.shape[1:]))


def _inside(type: Type, chunk: int) -> Type:
    """Of a value made of a chunk's tokens: every number that is not known is the chunk's own."""
    if not isinstance(type, TensorType):
        return type
    own = {s: sympy.Symbol(f"{s}{chunk}", integer=True) for d in type.shape for s in d.free_symbols}
    return type.with_(shape=tuple(d.subs(own) for d in type.shape))
