"""What a torch-level fx node does, as far as slicing must know: its name, its value, and what it mutates.

Dynamo's graphs call torch functions, tensor methods and Python operators; the same thing has several spellings. Only
names and dataflow are read here. What the calls mean is settled later, on the ATen form of the slice.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch.fx import Node

_INPLACE_OPERATORS = frozenset(
    getattr(operator, n)
    for n in (
        "iadd",
        "isub",
        "imul",
        "itruediv",
        "ifloordiv",
        "iand",
        "ior",
        "ixor",
        "ipow",
        "imod",
        "setitem",
        "imatmul",
    )
)
VIEWS = frozenset({"view", "reshape", "unsqueeze", "squeeze", "contiguous", "flatten", "_unsafe_view", "alias"})
PARTS = frozenset({"to_local", "redistribute"})
"""What gives a rank its own part of a DTensor, without a copy where it lies as it is asked for."""
CASTS = frozenset({"to", "type", "type_as", "float", "half", "bfloat16", "double"})
TRANSPOSES = frozenset({"transpose", "permute", "mT", "swapaxes", "t"})
GEMMS = frozenset({"linear", "matmul", "mm", "addmm", "bmm", "baddbmm", "einsum", "__matmul__", "embedding", "conv1d"})
GATHERS = frozenset({"index_select", "repeat_interleave", "index", "gather", "topk", "sort", "argsort", "expand"})
SUMS = frozenset({"sum", "index_add", "index_add_", "scatter_add", "scatter_add_", "scatter_reduce"})

_DRAWS = (
    frozenset(
        ("rand", "randn", "randint", "randperm", "rand_like", "randn_like", "randint_like", "bernoulli", "bernoulli_")
    )
    | frozenset(
        ("multinomial", "poisson", "normal", "normal_", "uniform_", "exponential_", "random_", "cauchy_", "geometric_")
    )
    | frozenset(("log_normal_", "rrelu", "rrelu_", "gumbel_softmax"))
)


def argument(node: Node, index: int, keyword: str, default: Any = None) -> Any:
    """Argument ``index`` of a call, which may be given by keyword."""
    return node.args[index] if index < len(node.args) else node.kwargs.get(keyword, default)


def memory(node: Any) -> int | None:
    """The memory that a node's tensor lies in, as a number that views share; None for what is no tensor."""
    return memory_of(value(node))


def memory_of(v: Any) -> int | None:
    """As :func:`memory`, of a recorded value."""
    if not isinstance(v, torch.Tensor) or v.layout is not torch.strided:
        return None
    return int(v.untyped_storage()._cdata)


def name(node: Node) -> str:
    """The bare name of what a node calls (``bmm``, ``getitem``), or "" if it calls nothing."""
    if node.op == "call_method":
        return str(node.target)
    if node.op != "call_function":
        return ""
    if isinstance(node.target, torch._ops.OpOverload):
        return node.target._schema.name.split("::")[1]
    return getattr(node.target, "__name__", str(node.target))


def own_name(node: Node) -> str:
    """The parameter's own name out of Dynamo's (``l_self_modules_..._parameters_down_proj_``)."""
    for mark in ("_parameters_", "_buffers_"):
        if mark in node.name:
            return node.name.rsplit(mark, 1)[1].strip("_") or node.name
    return node.name


def value(node: Any) -> Any:
    """The fake value of a node, or None."""
    if not isinstance(node, Node):
        return None
    return node.meta.get("example_value", node.meta.get("val"))


def dims(node: Any) -> int:
    """Number of dimensions of a node's tensor, or -1."""
    v = value(node)
    return v.dim() if isinstance(v, torch.Tensor) else -1


def is_index(node: Any) -> bool:
    """True for an integer tensor."""
    v = value(node)
    return isinstance(v, torch.Tensor) and not v.dtype.is_floating_point and v.dtype != torch.bool


def is_number(node: Node) -> bool:
    """True for a SymInt, SymFloat or SymBool, or a Python number."""
    return isinstance(value(node), (torch.SymInt, torch.SymFloat, torch.SymBool, int, float))


def is_zero(number: Any) -> bool:
    """True for the number 0, written out or recorded as a constant."""
    v = value(number) if isinstance(number, Node) else number
    constant = v.node.maybe_as_float() if isinstance(v, torch.SymFloat) else v
    return isinstance(constant, (int, float)) and constant == 0


def is_bundle(node: Any) -> bool:
    """True for a tuple or list of tensors, which cannot enter a block; its parts can."""
    return isinstance(value(node), (tuple, list))


def is_gather(node: Node) -> bool:
    """True if rows are picked: from here on backward, rows are no longer the experts' rows."""
    n = name(node)
    if n == "getitem":
        index = node.args[1]
        parts = index if isinstance(index, (tuple, list)) else (index,)
        return any(isinstance(p, Node) and is_index(p) for p in parts)
    return n in GATHERS


def mutated(node: Node) -> list[Node]:
    """The nodes whose memory this node writes."""
    if node.op == "call_method":
        called = str(node.target)
        writes = (called.endswith("_") and not called.endswith("__")) or called in ("__setitem__", "set_data")
        return [a for a in node.args[:1] if isinstance(a, Node)] if writes else []
    if node.op != "call_function":
        return []
    found = [v for k, v in node.kwargs.items() if k == "out" and isinstance(v, Node)]
    target: Any = node.target
    if isinstance(target, torch._ops.OpOverload):
        for i, a in enumerate(target._schema.arguments):
            if a.alias_info is not None and a.alias_info.is_write:
                given = node.args[i] if i < len(node.args) else node.kwargs.get(a.name)
                found += [given] if isinstance(given, Node) else []
        return found
    called = getattr(target, "__name__", "")
    inplace = target in _INPLACE_OPERATORS or (called.endswith("_") and not called.endswith("__"))
    if inplace or node.kwargs.get("inplace") is True:
        found += [a for a in node.args[:1] if isinstance(a, Node)]
    return found


def _adds_dimensions(node: Node) -> bool:
    """True for ``x[:, None, :]``: an index of whole slices and None."""
    if name(node) not in ("getitem", "__getitem__"):
        return False
    index = argument(node, 1, "key")
    parts = index if isinstance(index, (tuple, list)) else (index,)
    return all(p is None or p is Ellipsis or (isinstance(p, slice) and p == slice(None)) for p in parts)


def peel(node: Any, names: frozenset[str]) -> Any:
    """``node`` with the outermost calls of ``names`` taken off; ``x[:, None]`` counts as ``unsqueeze``."""
    while isinstance(node, Node) and (name(node) in names or ("unsqueeze" in names and _adds_dimensions(node))):
        node = argument(node, 0, "input")
    return node


def has_effect(node: Node) -> bool:
    """True for calls that change the program's state rather than a tensor (grad mode, autocast, random numbers)."""
    n = name(node)
    if isinstance(node.target, torch._ops.HigherOrderOperator):
        return True
    if n.endswith("dropout"):
        return argument(node, 2, "training", True) is not False
    return n.startswith(("_enter", "_exit", "_set_grad", "set_", "manual_seed", "_assert")) or n in _DRAWS
