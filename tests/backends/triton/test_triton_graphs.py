"""What ``mode="reduce-overhead"`` asks of a compiled model: one graph for all sizes, all of it on the device.

Inductor leaves a graph out of CUDA graphs if something in it is on the CPU, depends on data, or has the tag
``cudagraph_unsafe``. Here the device is ``meta``, which is not the CPU either. Whether CUDA graphs are recorded and
replayed, only a GPU can tell.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.fx import GraphModule
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols

from moec import dynamo
from moec.slicing import plain

pytest.importorskip("transformers")
from tests.backends.triton.test_triton_door import _deepseek, _gpt_oss, _mixtral

pytestmark = pytest.mark.usefixtures("interpreter")


@pytest.mark.parametrize("make", [_mixtral, _gpt_oss, _deepseek])
def test_one_graph_on_the_device(make: Callable[[], Any], monkeypatch: pytest.MonkeyPatch) -> None:
    graphs: list[GraphModule] = []

    def inner(gm: GraphModule, *others: Any) -> Callable[..., Any]:
        graphs.append(gm)
        return gm.forward

    monkeypatch.setattr(dynamo, "_inner", inner)
    monkeypatch.setattr(plain, "strangeness", lambda value: "")  # that it has no values
    torch._dynamo.reset()
    model = make().eval().to("meta")
    with torch.no_grad():
        options = {"backends": ("triton", "aten"), "target": "cuda:sm90"}
        compiled = torch.compile(model, backend="moec", options=options, fullgraph=True)
        for tokens in (7, 12, 40, 130):
            given = torch.empty((1, tokens), dtype=torch.int64, device="meta")
            torch._dynamo.mark_dynamic(given, 1)
            logits = compiled(given).logits
            assert (logits.device.type, logits.shape[1]) == ("meta", tokens)
    (graph,) = graphs
    ops = [n for n in graph.graph.nodes if str(n.target).startswith("moec.")]
    assert {"moec.route.default", "moec.experts.default"} <= {str(n.target) for n in ops}
    assert not any(torch.Tag.cudagraph_unsafe in n.target.tags for n in ops)
    for node in graph.graph.nodes:
        value = node.meta.get("example_value")
        for t in value if isinstance(value, (list, tuple)) else [value]:
            if isinstance(t, Tensor):
                assert t.device.type == "meta", node
                assert not free_unbacked_symbols(t), node
