"""The layers and routers of ``moec selfcheck``, as IR: between them they launch every kernel that there is."""

from __future__ import annotations

from dataclasses import dataclass

from moec.ir.scaled_semantics import blocks

EXPERTS, TOP_K = 16, 4
_SWIGLU = """(%g: {d}[R, {i}], %u: {d}[R, {i}]) -> {d}[R, {i}] {{
  %s = torch.call @aten.silu.default(%g) : {d}[R, {i}]
  %m = torch.call @aten.mul.Tensor(%s, %u) : {d}[R, {i}]
  return %m }}"""
_SQUARE = """(%g: {d}[R, {i}]) -> {d}[R, {i}] {{
  %r = torch.call @aten.relu.default(%g) : {d}[R, {i}]
  %m = torch.call @aten.mul.Tensor(%r, %r) : {d}[R, {i}]
  return %m }}"""
_CLAMPED = """(%g: {d}[R, {i}], %u: {d}[R, {i}]) -> {d}[R, {i}] {{
  %c = torch.call @aten.clamp.default(%u, -7.0, 7.0) : {d}[R, {i}]
  %s = torch.call @aten.sigmoid.default(%g) : {d}[R, {i}]
  %a = torch.call @aten.mul.Tensor(%s, %g) : {d}[R, {i}]
  %m = torch.call @aten.mul.Tensor(%a, %c) : {d}[R, {i}]
  return %m }}"""
_NORM = """(%r: {d}[R, {i}]) -> {d}[R, {i}] {{
  %q = torch.call @aten.mul.Tensor(%r, %r) : {d}[R, {i}]
  %m = torch.call @aten.mean.dim(%q, [-1], true) : {d}[R, 1]
  %e = torch.call @aten.add.Tensor(%m, 0.001) : {d}[R, 1]
  %s = torch.call @aten.rsqrt.default(%e) : {d}[R, 1]
  %n = torch.call @aten.mul.Tensor(%r, %s) : {d}[R, {i}]
  return %n }}"""


@dataclass(frozen=True)
class Layer:
    """A kind of layer.

    Attributes:
        activation: Text of the region, for type ``d`` and width ``i``.
        parts: Row inputs of the activation.
        attributes: Of the op.
        biases: There are biases.
        post: Text of the region after the down GEMM; empty where there is none.
        single: Every expert's weights are tensors of their own.
        fp8: Weights are f8e4m3fn with scales.
    """

    activation: str
    parts: int
    attributes: str = ""
    biases: bool = False
    post: str = ""
    single: bool = False
    fp8: bool = False

    def text(self, dtype: str, hidden: int, inner: int) -> str:
        """A graph of one layer."""
        e, up = EXPERTS, self.parts * inner
        kn = "kn" in self.attributes
        first = f"{hidden}, {up}" if kn else f"{up}, {hidden}"
        second = f"{inner}, {hidden}" if kn else f"{hidden}, {inner}"
        if self.single:
            ups = {f"%u{i}": f"{dtype}[{first}]" for i in range(e)}
            downs = {f"%d{i}": f"{dtype}[{second}]" for i in range(e)}
        else:
            element = "f8e4m3fn" if self.fp8 else dtype
            ups, downs = {"%up": f"{element}[{e}, {first}]"}, {"%down": f"{element}[{e}, {second}]"}
        taken = ups | downs
        if self.biases:
            taken |= {"%ub": f"{dtype}[{e}, {up}]", "%db": f"{dtype}[{e}, {hidden}]"}
        more = ", [%ub], [%db]" if self.biases else ""
        if self.fp8:
            taken |= {"%us": f"f32[{e}, {blocks(up)}, {blocks(hidden)}]"}
            taken |= {"%ds": f"f32[{e}, {blocks(hidden)}, {blocks(inner)}]"}
            more = ", [], [], [], [], [%us], [%ds]"
        attributes = f"{self.attributes}{', stacked = false' if self.single else ''}"
        regions = [self.activation.format(d=dtype, i=inner)]
        regions += [self.post.format(d=dtype, i=hidden)] if self.post else []
        arguments = ", ".join(f"{name}: {type}" for name, type in taken.items())
        return (
            f"graph @layer(%x: {dtype}[T, {hidden}], %ids: i64[T, {TOP_K}], %w: f32[T, {TOP_K}], {arguments})"
            f" -> {dtype}[T, {hidden}] {{\n"
            f"  %y = moe.experts %x, %ids, %w, [{', '.join(ups)}], [{', '.join(downs)}]{more} "
            f"{{experts = {e}{attributes}}} {', '.join(f'{{ {r} }}' for r in regions)}"
            f" : {dtype}[T, {hidden}]\n  return %y\n}}"
        )


LAYERS = {
    "silu(g)*u": Layer(_SWIGLU, 2),
    "relu(g)^2": Layer(_SQUARE, 1, ', layout = "single"'),
    "clamped, interleaved, biases, transposed": Layer(
        _CLAMPED, 2, ', layout = "interleaved", up_form = "kn", down_form = "kn"', biases=True
    ),
    "norms of rows, single experts": Layer(_NORM, 1, ', layout = "rows"', post=_NORM, single=True),
    "silu(g)*u, weights in fp8": Layer(_SWIGLU, 2, fp8=True),
}
ROUTERS = {
    "softmax, renormalised": "k = 4, renormalize = true",
    "sigmoid, groups": 'k = 4, scoring = "sigmoid", groups = 4, top_groups = 2, group_score = "top2_sum", scale = 2.5',
    "top k first": 'k = 4, order = "topk_first"',
}
