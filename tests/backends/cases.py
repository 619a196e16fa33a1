"""Programs and inputs for tests of backends: every shape a ``moe.experts`` or ``moe.route`` op can take, tiny."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from moec.ir.attributes import Operand
from moec.ir.core import Graph, Op, Value
from moec.ir.torch_dtypes import TO_TORCH
from moec.ir.types import TensorType
from tests.backends.fp8 import fp8_weight

TOLERANCE = {"f64": 1e-12, "f32": 2e-5, "f16": 1e-2, "bf16": 6e-2}
"""Largest |difference| / max |expected| of two computations in that type."""

SKEWS = ("uniform", "one_expert", "half_empty")


def call(graph: Graph, target: str, *args: object, width: object = None) -> Value:
    """Append a ``torch.call`` of one result; its type is that of the first value, with another last dim if given."""
    operands: list[Value] = []
    template: list[object] = []
    for a in args:
        if isinstance(a, Value):
            template.append(Operand(len(operands)))
            operands.append(a)
        else:
            template.append(a)
    type = operands[0].type
    assert isinstance(type, TensorType)
    if width is not None:
        type = type.with_(shape=(*type.shape[:-1], width))  # type: ignore[arg-type]
    op = Op("torch.call", operands, [type], attrs={"target": f"aten.{target}", "args": tuple(template)})
    return graph.append(op).result


def close(graph: Graph, *values: Value) -> Graph:
    graph.append(Op("return", values, groups=(len(values),)))
    return graph


def _rms(graph: Graph, rows: Value) -> Value:
    square = call(graph, "mul.Tensor", rows, rows)
    mean = call(graph, "mean.dim", square, [-1], True, width=TensorType.of("f32", 1).shape[0])
    return call(graph, "mul.Tensor", rows, call(graph, "rsqrt.default", call(graph, "add.Tensor", mean, 1e-3)))


@dataclass(frozen=True)
class ExpertsCase:
    """One ``moe.experts`` program and how to make inputs for it. The activation is silu(g)·u, relu² or a row norm."""

    layout: str = "concat"
    up_form: str = "nk"
    down_form: str = "nk"
    stacked: bool = True
    bias: bool = False
    captures: bool = False
    post: bool = False
    sentinels: bool = False
    dtype: str = "f32"
    weight_dtype: str = ""
    experts: int = 5
    top_k: int = 3
    hidden: int = 12
    inner: int = 8
    widths: tuple[int, ...] = ()  # of each expert, where they differ; then not stacked
    fp8: bool = False  # weights in f8e4m3fn with scales; stacked, nk

    @property
    def parts(self) -> int:
        return 2 if self.layout == "separate" else 1

    def up_width(self, inner: int) -> int:
        return 2 * inner if self.layout in ("concat", "interleaved") else inner

    def width_of(self, expert: int) -> int:
        return self.widths[expert] if self.widths else self.inner

    def activation(self) -> Graph:
        g = Graph("activation")
        gated = self.layout in ("concat", "interleaved", "separate")
        width = "I" if self.widths else self.inner
        rows = [g.add_arg(TensorType.of(self.dtype, "R", width)) for _ in range(2 if gated else 1)]
        capture = g.add_arg(TensorType.of(self.dtype, self.inner)) if self.captures else None
        if gated:
            a = call(g, "mul.Tensor", call(g, "silu.default", rows[0]), rows[1])
        elif self.layout == "rows":
            a = _rms(g, rows[0])
        else:
            r = call(g, "relu.default", rows[0])
            a = call(g, "mul.Tensor", r, r)
        return close(g, a if capture is None else call(g, "mul.Tensor", a, capture))

    def post_region(self) -> Graph:
        g = Graph("post")
        o = g.add_arg(TensorType.of(self.dtype, "R", self.hidden))
        scale = g.add_arg(TensorType.of(self.dtype, self.hidden))
        return close(g, call(g, "mul.Tensor", _rms(g, o), scale))

    def shapes(self) -> dict[str, list[tuple[int, ...]]]:
        """Shapes of the parameter groups in the op's order."""
        e, h, i = self.experts, self.hidden, self.inner
        each = [(self.up_width(w), w) for w in map(self.width_of, range(e))]
        ups = [(n, h) if self.up_form == "nk" else (h, n) for n, _ in each]
        downs = [(h, w) if self.down_form == "nk" else (w, h) for _, w in each]
        one = [(e, *ups[0])] * self.parts if self.stacked else ups * self.parts
        two = [(e, *downs[0])] if self.stacked else downs
        up_bias = [(e, each[0][0])] * self.parts if self.stacked else [(n,) for n, _ in each] * self.parts
        down_bias = [(e, h)] if self.stacked else [(h,)] * e
        return {
            "up": one,
            "down": two,
            "up_bias": up_bias if self.bias else [],
            "down_bias": down_bias if self.bias else [],
            "captures": [(i,)] if self.captures else [],
            "post_captures": [(h,)] if self.post else [],
        }

    def graph(self) -> Graph:
        g = Graph("case")
        dt, w = self.dtype, self.weight_dtype or self.dtype
        args = [
            g.add_arg(TensorType.of(dt, "T", self.hidden)),
            g.add_arg(TensorType.of("i64", "T", self.top_k)),
            g.add_arg(TensorType.of(w, "T", self.top_k)),
        ]
        groups = [1, 1, 1]
        for name, shapes in self.shapes().items():
            element = "f8e4m3fn" if self.fp8 and name in ("up", "down") else dt
            args += [g.add_arg(TensorType.of(element, *shape)) for shape in shapes]
            groups.append(len(shapes))
        for name in ("up", "down"):
            shapes = self.shapes()[name] if self.fp8 else []
            args += [g.add_arg(TensorType.of("f32", e, -(-n // 128), -(-k // 128))) for e, n, k in shapes]
            groups.append(len(shapes))
        op = Op(
            "moe.experts",
            args,
            [args[0].type],
            attrs={
                "experts": self.experts,
                "layout": self.layout,
                "up_form": self.up_form,
                "down_form": self.down_form,
                "stacked": self.stacked,
                "sentinels": self.sentinels,
            },
            regions=[self.activation(), *([self.post_region()] if self.post else [])],
            groups=groups,
        )
        g.append(op)
        return close(g, op.result)

    def ids(self, tokens: int, skew: str = "uniform") -> Tensor:
        """int[T, k] different experts per token; ``one_expert`` sends every token to the last expert."""
        score = torch.rand(tokens, self.experts)
        if skew == "one_expert":
            score[:, -1] = 2.0
        if skew == "half_empty":
            score[:, self.top_k :] = -1.0
        ids = score.argsort(dim=1, descending=True)[:, : self.top_k].contiguous()
        if self.sentinels and tokens:
            ids[torch.rand(ids.shape) < 0.4] = self.experts
            ids[0, 0] = -1
        return ids

    def inputs(self, tokens: int, skew: str = "uniform", seed: int = 0) -> list[Tensor]:
        torch.manual_seed(seed)
        dt, wdt = TO_TORCH[self.dtype], TO_TORCH[self.weight_dtype or self.dtype]
        out = [torch.randn(tokens, self.hidden).to(dt), self.ids(tokens, skew), torch.rand(tokens, self.top_k).to(wdt)]
        for name, shapes in self.shapes().items():
            for shape in shapes:
                matrix = name in ("up", "down")
                out.append((torch.randn(shape) / (shape[-1] ** 0.5 if matrix else 1.0)).to(dt))
        return self._in_fp8(out) if self.fp8 else out

    def _in_fp8(self, inputs: list[Tensor]) -> list[Tensor]:
        last = 3 + self.parts + 1
        pairs = [fp8_weight(w.float()) for w in inputs[3:last]]
        return [*inputs[:3], *(values for values, _ in pairs), *inputs[last:], *(scales for _, scales in pairs)]


def loop_experts(case: ExpertsCase, inputs: list[Tensor]) -> Tensor:
    """The same layer as a plain loop over tokens and choices in f64; shares no code with moec."""
    x, ids, weights, *rest = (t.double() if t.is_floating_point() else t for t in inputs)
    groups = []
    for shapes in case.shapes().values():
        groups.append(rest[: len(shapes)])
        rest = rest[len(shapes) :]
    up, down, up_bias, down_bias, captures, post_captures = groups
    e = case.experts

    def pick(tensors: list[Tensor], expert: int, part: int) -> Tensor:
        return tensors[part][expert] if case.stacked else tensors[part * e + expert]

    def norm(v: Tensor) -> Tensor:
        return v * (v.square().mean() + 1e-3).rsqrt()

    out = torch.zeros(x.shape[0], case.hidden, dtype=torch.float64)
    for t in range(x.shape[0]):
        for j in range(case.top_k):
            expert = int(ids[t, j])
            if not 0 <= expert < e:
                continue
            hs = []
            for part in range(case.parts):
                w = pick(up, expert, part)
                h = (w if case.up_form == "nk" else w.T) @ x[t]
                hs.append(h + pick(up_bias, expert, part) if up_bias else h)
            if case.layout == "separate":
                gate, value = hs
            elif case.layout == "concat":
                gate, value = hs[0][: case.width_of(expert)], hs[0][case.width_of(expert) :]
            elif case.layout == "interleaved":
                gate, value = hs[0][0::2], hs[0][1::2]
            else:
                gate = value = hs[0]
            if case.layout == "rows":
                a = norm(gate)
            elif case.layout == "single":
                a = gate.clamp(min=0) ** 2
            else:
                a = gate / (1 + torch.exp(-gate)) * value
            if captures:
                a = a * captures[0]
            w = pick(down, expert, 0)
            o = (w if case.down_form == "nk" else w.T) @ a
            if down_bias:
                o = o + pick(down_bias, expert, 0)
            if case.post:
                o = norm(o) * post_captures[0]
            out[t] += weights[t, j] * o
    return out


def route_graph(
    experts: int,
    tokens_dtype: str = "f32",
    bias: bool = False,
    result: str = "f32",
    region: Graph | None = None,
    **attrs: object,
) -> Graph:
    """A ``moe.route`` program."""
    g = Graph("case")
    args = [g.add_arg(TensorType.of(tokens_dtype, "T", experts))]
    if bias:
        args.append(g.add_arg(TensorType.of("f32", experts)))
    k = attrs["k"]
    assert isinstance(k, int)
    op = Op(
        "moe.route",
        args,
        [TensorType.of(result, "T", k), TensorType.of("i64", "T", k)],
        attrs=dict(attrs),
        regions=[] if region is None else [region],
        groups=(1, int(bias), 0),
    )
    g.append(op)
    return close(g, *op.results)


def relative_error(got: Tensor, want: Tensor) -> float:
    """max |got - want| / max |want|, 0 for empty tensors; shapes must agree."""
    assert got.shape == want.shape, f"{got.shape} against {want.shape}"
    if not want.numel():
        return 0.0
    got, want = got.detach().double(), want.detach().double()
    return float((got - want).abs().max() / want.abs().max().clamp(min=1e-6))


def case_id(case: ExpertsCase) -> str:
    """Test id: what differs from the default case."""
    plain = ExpertsCase()
    names = [n for n in case.__dataclass_fields__ if getattr(case, n) != getattr(plain, n)]
    return "-".join(f"{n}={getattr(case, n)}" for n in names) or "plain"
