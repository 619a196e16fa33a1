"""The layers and routers of five models at their real sizes, as their checkpoints hold them."""

from __future__ import annotations

from functools import lru_cache

from moec.backends.base import program_op
from moec.backends.triton.kernels.route import Router, read_router
from moec.backends.triton.spec import Spec, read_spec
from moec.ir.core import Op
from moec.ir.parser import parse_graph

SIZES = {
    "OLMoE": (2048, 1024, 64, 8), "Qwen3-30B-A3B": (2048, 768, 128, 8), "gpt-oss-20b": (2880, 2880, 32, 4),
    "Mixtral-8x7B": (4096, 14336, 8, 2), "DeepSeek-V3": (7168, 2048, 256, 8),
}  # fmt: skip
"""H, I, E and k."""
ROUTERS = {
    "OLMoE": "k = 8",
    "Qwen3-30B-A3B": "k = 8, renormalize = true",
    "gpt-oss-20b": 'k = 4, order = "topk_first"',
    "Mixtral-8x7B": "k = 2, renormalize = true",
    "DeepSeek-V3": (
        'k = 8, scoring = "sigmoid", groups = 8, top_groups = 4, group_score = "top2_sum", group_fill = 0.0, '
        "renormalize = true, renorm_eps = 1e-20, scale = 2.5"
    ),
}
_SWIGLU = """
      %s = torch.call @aten.silu.default(%g) : bf16[R, {i}]
      %m = torch.call @aten.mul.Tensor(%s, %u) : bf16[R, {i}]
"""
_CLAMPED = """
      %a = torch.call @aten.clamp.default(%g, None, 7.0) : bf16[R, {i}]
      %b = torch.call @aten.clamp.default(%u, -7.0, 7.0) : bf16[R, {i}]
      %c = torch.call @aten.mul.Tensor(%a, 1.702) : bf16[R, {i}]
      %d = torch.call @aten.sigmoid.default(%c) : bf16[R, {i}]
      %e = torch.call @aten.mul.Tensor(%a, %d) : bf16[R, {i}]
      %f = torch.call @aten.add.Tensor(%b, 1.0) : bf16[R, {i}]
      %m = torch.call @aten.mul.Tensor(%f, %e) : bf16[R, {i}]
"""
_NORM = """
    (%o: bf16[R, {h}]) -> bf16[R, {h}] {{
      %q = torch.call @aten.mul.Tensor(%o, %o) : bf16[R, {h}]
      %n = torch.call @aten.mean.dim(%q, [-1], true) : bf16[R, 1]
      %p = torch.call @aten.rsqrt.default(%n) : bf16[R, 1]
      %m = torch.call @aten.mul.Tensor(%o, %p) : bf16[R, {h}]
      return %m }}"""


def _text(name: str, kind: str) -> str:
    h, i, e, k = SIZES[name]
    up, down, more, given = f"bf16[{e}, {2 * i}, {h}]", f"bf16[{e}, {h}, {i}]", "", ""
    attrs, region, post = f"experts = {e}", _SWIGLU.format(i=i), ""
    if name == "gpt-oss-20b":
        up, down = f"bf16[{e}, {h}, {2 * i}]", f"bf16[{e}, {i}, {h}]"
        more, given = f", %ub: bf16[{e}, {2 * i}], %db: bf16[{e}, {h}]", ", [%ub], [%db]"
        attrs += ', layout = "interleaved", up_form = "kn", down_form = "kn"'
        region = _CLAMPED.format(i=i)
    if kind == "fp8":
        up, down = up.replace("bf16", "f8e4m3fn"), down.replace("bf16", "f8e4m3fn")
        blocks = [-(-n // 128) for n in (2 * i, h, i)]
        more = f", %us: f32[{e}, {blocks[0]}, {blocks[1]}], %ds: f32[{e}, {blocks[1]}, {blocks[2]}]"
        given = ", [], [], [], [], [%us], [%ds]"
    arguments = f"(%g: bf16[R, {i}], %u: bf16[R, {i}]) -> bf16[R, {i}]"
    if kind == "rows":  # a norm between the GEMMs and one after them
        up, attrs = f"bf16[{e}, {i}, {h}]", f'experts = {e}, layout = "rows"'
        arguments, region = (
            f"(%o: bf16[R, {i}]) -> bf16[R, {i}]",
            _NORM.format(h=i).partition("{")[2].partition("return")[0],
        )
        post = f", {{{_NORM.format(h=h)} }}"
    return f"""
graph @layer(%x: bf16[T, {h}], %ids: i64[T, {k}], %w: f32[T, {k}], %up: {up}, %down: {down}{more}) -> bf16[T, {h}] {{
  %y = moe.experts %x, %ids, %w, [%up], [%down]{given} {{{attrs}}} {{
    {arguments} {{{region}
      return %m
    }}
  }}{post} : bf16[T, {h}]
  return %y
}}
"""


@lru_cache(maxsize=16)
def layer(name: str, kind: str = "") -> Spec:
    """The layer of a model; ``kind`` is ``fp8``, ``rows`` (norms of whole rows around the down GEMM) or empty."""
    return read_spec(program_op(parse_graph(_text(name, kind))))


def layer_op(name: str, kind: str = "") -> Op:
    """The op of a layer."""
    return program_op(parse_graph(_text(name, kind)))


def router(name: str) -> Router:
    """The router of a model."""
    _, _, e, k = SIZES[name]
    bias = name == "DeepSeek-V3"
    logits = "bf16" if name == "gpt-oss-20b" else "f32"
    text = f"""
graph @route(%l: {logits}[T, {e}]{f", %b: f32[{e}]" if bias else ""}) -> ({logits}[T, {k}], i64[T, {k}]) {{
  %w, %ids = moe.route %l{", bias = %b" if bias else ""} {{{ROUTERS[name]}}} : {logits}[T, {k}], i64[T, {k}]
  return %w, %ids
}}
"""
    return read_router(program_op(parse_graph(text)))
