"""A layer of any size as a rank's graph says it before ``expert-parallel``: its own experts' weights, gathered.

What is measured or tested without a model is measured and tested on it.
"""

from __future__ import annotations

from collections.abc import Sequence

from moec.ir.core import Graph
from moec.ir.parser import parse_graph

_TEXT = """
graph @layer(%x: {d}[T, {h}], %ids: i64[T, {k}], %w: f32[T, {k}], %up: {d}[{own}, {i2}, {h}], %down: {d}[{own}, {h}, {i}]) -> {d}[T, {h}] {{
  %a = comm.all_gather.start %up {{group = "{group}", ranks = {n}, sizes = {sizes}}} : !comm.token
  %ups = comm.wait %a : {d}[{e}, {i2}, {h}]
  %b = comm.all_gather.start %down {{group = "{group}", ranks = {n}, sizes = {sizes}}} : !comm.token
  %downs = comm.wait %b : {d}[{e}, {h}, {i}]
  %y = moe.experts %x, %ids, %w, [%ups], [%downs] {{experts = {e}, sentinels = {sentinels}}} {{
    @activation(%g: {d}[R, {i}], %u: {d}[R, {i}]) -> {d}[R, {i}] {{
      %s = torch.call @aten.silu.default(%g) : {d}[R, {i}]
      %m = torch.call @aten.mul.Tensor(%s, %u) : {d}[R, {i}]
      return %m
    }}
  }} : {d}[T, {h}]
  return %y
}}
"""  # noqa: E501


def sample_layer(
    sizes: Sequence[int],
    own: int,
    top_k: int,
    hidden: int,
    inner: int,
    dtype: str = "f32",
    sentinels: bool = False,
    group: str = "ep",
) -> Graph:
    """The graph of one rank.

    Args:
        sizes: Experts of every rank.
        own: Experts of this one.
        top_k: Choices of a token.
        hidden: Width of a token, H.
        inner: Width of an expert, I.
        dtype: Of tokens and weights; router weights are f32.
        sentinels: Whether ids may mean no expert.
        group: What the program calls the ranks.
    """
    shape = f"({', '.join(map(str, sizes))}{',' if len(sizes) == 1 else ''})"
    return parse_graph(
        _TEXT.format(
            d=dtype, e=sum(sizes), k=top_k, h=hidden, i=inner, i2=2 * inner, own=own, n=len(sizes), sizes=shape,
            sentinels=str(sentinels).lower(), group=group,
        )
    )  # fmt: skip
