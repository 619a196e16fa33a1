"""Node-by-node comparison of two graph modules: what "lossless" means."""

from __future__ import annotations

import math
from typing import Any

import torch


def assert_same(a: torch.fx.GraphModule, b: torch.fx.GraphModule, path: str = "main") -> None:
    """``b`` has the nodes of ``a``: opcode, name, target, arguments, meta and held objects, nested graphs included."""
    nodes_a, nodes_b = list(a.graph.nodes), list(b.graph.nodes)
    listing = f"{path}:\n{a.graph}\n---\n{b.graph}"
    assert [n.op for n in nodes_a] == [n.op for n in nodes_b], listing
    twin = dict(zip(nodes_a, nodes_b, strict=True))
    for x, y in twin.items():
        where = f"{path}: {x.format_node()}  /  {y.format_node()}"
        assert x.name == y.name, where
        assert x.type == y.type, where
        assert_args(x.args, y.args, twin, where)
        assert_args(dict(x.kwargs), dict(y.kwargs), twin, where)
        assert x.meta.keys() == y.meta.keys(), f"{where}: {x.meta.keys() ^ y.meta.keys()}"
        for key, value in x.meta.items():
            assert y.meta[key] is value, f"{where}: meta[{key!r}]"
        if x.op in ("get_attr", "call_module"):
            held_a, held_b = _held(a, x.target), _held(b, y.target)
            if isinstance(held_a, torch.fx.GraphModule) and x.op == "get_attr":
                assert_same(held_a, held_b, f"{path}.{x.target}")
            else:
                assert held_a is held_b, where
        assert x.target == y.target, where
    assert a.graph._codegen is b.graph._codegen
    assert a.meta.keys() == b.meta.keys()
    assert a.training == b.training
    assert type(a).__name__ == type(b).__name__
    assert b.code == a.code


def assert_args(a: Any, b: Any, twin: dict[torch.fx.Node, torch.fx.Node], where: str) -> None:
    """Equal argument trees of equal types, nodes taken by ``twin``."""
    assert type(a) is type(b), f"{where}: {a!r} is {type(a)}, {b!r} is {type(b)}"
    if isinstance(a, torch.fx.Node):
        assert twin[a] is b, where
    elif isinstance(a, (tuple, list)):
        assert len(a) == len(b), where
        for i, j in zip(a, b, strict=True):
            assert_args(i, j, twin, where)
    elif isinstance(a, dict):
        assert list(a) == list(b), where
        for key in a:
            assert_args(a[key], b[key], twin, where)
    elif isinstance(a, slice):
        assert_args((a.start, a.stop, a.step), (b.start, b.stop, b.step), twin, where)
    elif isinstance(a, float) and math.isnan(a):
        assert math.isnan(b), where
    else:
        assert a == b, where


def _held(module: Any, target: Any) -> Any:
    for part in str(target).split("."):
        module = getattr(module, part)
    return module
