"""The Mixtral block in both forms: the text is the printer's to the byte, it verifies, and both forms compute alike."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from moec.ir.core import Graph, Value
from moec.ir.opdef import op_def
from moec.ir.parser import parse_graph
from moec.ir.printer import print_graph
from moec.ir.verifier import verify

GOLDEN = sorted((Path(__file__).parent / "golden").glob("*.moe"))
FP32_TOLERANCE = 1e-5


@pytest.mark.parametrize("path", GOLDEN, ids=[p.stem for p in GOLDEN])
def test_golden(path: Path) -> None:
    text = path.read_text()
    graph = parse_graph(text, path.name)
    verify(graph)
    assert print_graph(graph) == text


def run(graph: Graph, inputs: Sequence[Any]) -> list[Any]:
    env: dict[Value, Any] = dict(zip(graph.args, inputs, strict=True))
    for op in graph.ops:
        values = op_def(op.name).evaluate(op, [env[v] for v in op.operands], run)
        if op.name == "return":
            return values
        env.update(zip(op.results, values, strict=True))
    raise AssertionError("no return")


def small(name: str) -> Graph:
    """The golden graph in fp32 and with small widths."""
    text = (Path(__file__).parent / "golden" / name).read_text()
    for old, new in (("bf16", "f32"), ("28672", "6"), ("14336", "3"), ("4096", "5")):
        text = text.replace(old, new)
    graph = parse_graph(text)
    verify(graph)
    return graph


@pytest.mark.parametrize("tokens", [0, 1, 7])
def test_both_forms_compute_what_a_loop_over_experts_does(tokens: int) -> None:
    gen = torch.Generator().manual_seed(tokens)
    x, gate, w13, w2 = (torch.randn(s, generator=gen) for s in ((tokens, 5), (8, 5), (8, 6, 5), (8, 5, 3)))
    weights, ids = torch.topk(torch.softmax(x @ gate.t(), -1), 2)
    weights = weights / weights.sum(-1, keepdim=True)
    want = torch.zeros(tokens, 5)
    for t in range(tokens):
        for w, e in zip(weights[t], ids[t], strict=True):
            g, u = (w13[e] @ x[t]).chunk(2)
            want[t] += w * (w2[e] @ (torch.nn.functional.silu(g) * u))
    for name in ("mixtral_raised.moe", "mixtral_fused.moe"):
        (got,) = run(small(name), [x, gate, w13, w2])
        torch.testing.assert_close(got, want, rtol=FP32_TOLERANCE, atol=FP32_TOLERANCE)
