"""The numeric harness: a graph computes the same before and after a pipeline, as exactly as its passes promise."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import sympy
import torch

from moec.backends.reference.interpreter import run_graph
from moec.backends.reference.world import run_ranks
from moec.ir.core import Graph
from moec.ir.parser import parse_graph
from moec.ir.torch_dtypes import TO_TORCH
from moec.ir.types import SymType, TensorType
from moec.passes import Pass, PassClass, PassContext, PassManager, parse_pipeline

DEFAULT_DIMS = "*=5|*=1"
"""Sizes of symbolic dimensions where a test names none: some tokens, and one."""
WHOLE = "whole "
"""What stands before the sizes where floats are whole numbers."""


def parse_dims(text: str) -> list[dict[str, int]]:
    """``"T=5,S=2|T=1"`` as two assignments; ``*`` stands for every symbol that is not named."""
    out = []
    for part in text.split("|"):
        pairs = (item.split("=") for item in part.split(","))
        out.append({k.strip(): int(v) for k, v in pairs})
    return out


def sizes(graph: Graph, dims: Mapping[str, int]) -> dict[sympy.Symbol, int]:
    """A number for every symbol in the types of the graph's arguments."""
    free: set[Any] = set()
    for a in graph.args:
        if isinstance(a.type, TensorType):
            free |= {s for d in a.type.shape for s in d.free_symbols}
        elif isinstance(a.type, SymType):
            free |= a.type.expr.free_symbols
    return {s: dims.get(str(s), dims.get("*", 5)) for s in free}


def random_inputs(graph: Graph, seed: int, dims: Mapping[str, int]) -> list[Any]:
    """Random values for the arguments: normal floats, integers that are valid indices of every dimension."""
    gen = torch.Generator().manual_seed(seed)
    env = sizes(graph, dims)
    shapes = [[int(d.subs(env)) for d in a.type.shape] for a in graph.args if isinstance(a.type, TensorType)]
    top = min((d for shape in shapes for d in shape if d > 0), default=1)
    out: list[Any] = []
    for a in graph.args:
        if isinstance(a.type, SymType):
            value = a.type.expr.subs(env)
            out.append(bool(value) if a.type.kind == "bool" else int(value) if a.type.kind == "int" else float(value))
            continue
        assert isinstance(a.type, TensorType), f"no random value for an argument of type {a.type}"
        shape, dtype = [int(d.subs(env)) for d in a.type.shape], TO_TORCH[a.type.dtype.name]
        if a.type.dtype.kind == "bool":
            out.append(torch.rand(shape, generator=gen) < 0.5)
        elif a.type.dtype.kind in ("int", "uint"):
            out.append(torch.randint(0, top, shape, generator=gen).to(dtype))
        else:
            out.append(torch.randn(shape, generator=gen).to(dtype))
    return out


def compute(graph: Graph, inputs: Sequence[Any]) -> tuple[list[Any], list[Any]]:
    """(outputs, arguments as they are afterwards) of running ``graph`` on copies of ``inputs``."""
    copies = [x.clone() if isinstance(x, torch.Tensor) else x for x in inputs]
    torch.manual_seed(0)  # ops that draw random numbers draw the same ones in both runs
    with torch.no_grad():
        outputs = run_graph(graph, copies)
    return outputs, copies


def ranks_of(graph: Graph) -> dict[str, int]:
    """The groups that the graph's collectives go over, and their sizes."""
    starts = [op for op in graph.walk() if op.name.startswith("comm.") and op.name.endswith(".start")]
    return {op.attrs["group"]: op.attrs["ranks"] for op in starts}


def in_whole_numbers(inputs: Sequence[Any]) -> list[Any]:
    """Floats as small whole numbers: sums of products have the same bits then, whatever rows a product holds."""
    return [_whole(t) if isinstance(t, torch.Tensor) and torch.is_floating_point(t) else t for t in inputs]


def _whole(t: torch.Tensor) -> torch.Tensor:
    wide = t.float() if t.element_size() == 1 else t  # torch computes nothing in fp8
    return (3 * wide).round().to(t.dtype)


def compute_world(graph: Graph, seed: int, dims: Mapping[str, int], groups: Mapping[str, int]) -> list[Any]:
    """Outputs of all ranks, each with inputs of its own, one after the other.

    Floats are whole numbers, since rows meet other rows in a product when they travel.
    """
    size = max(groups.values())
    assert set(groups.values()) == {size}, "the harness knows groups of all ranks alone"
    whole = [in_whole_numbers(random_inputs(graph, seed + 100 * rank, dims)) for rank in range(size)]
    with torch.no_grad():
        outputs = run_ranks([graph] * size, whole, {name: [list(range(size))] for name in groups})
    return [t for each in outputs for t in each]


def assert_close(got: Any, want: Any, tolerance: float, what: str) -> None:
    """Bits equal for tolerance 0; else the largest error relative to the largest value."""
    if not isinstance(want, torch.Tensor):
        assert got == want, f"{what}: {got} is not {want}"
        return
    assert got.dtype == want.dtype, f"{what}: {got.dtype} is not {want.dtype}"
    assert got.shape == want.shape, f"{what}: {list(got.shape)} is not {list(want.shape)}"
    assert got.isnan().equal(want.isnan()), f"{what}: other NaNs"
    got, want = got.nan_to_num(), want.nan_to_num()
    if tolerance == 0:
        assert torch.equal(got, want), f"{what}: not bitwise equal, off by {(got - want).abs().max()}"
    elif want.numel():
        error = (got.double() - want.double()).abs().max() / want.double().abs().max().clamp_min(1e-30)
        assert error <= tolerance, f"{what}: relative error {error:.3g} is above {tolerance:.3g}"


def assert_preserves(
    graph: Graph | str,
    pipeline: str | Sequence[Pass],
    *,
    dims: str | None = None,
    seeds: Sequence[int] = (0, 1),
    tolerance: float | None = None,
) -> Graph:
    """Run ``pipeline`` on a copy of ``graph`` and compare outputs and written arguments on random inputs.

    Args:
        graph: The graph, or its text. It is not changed.
        pipeline: What to run.
        dims: Sizes of symbolic dimensions (see :func:`parse_dims`), by default :data:`DEFAULT_DIMS`; behind
            :data:`WHOLE` where rows meet other rows in a product, so that random floats would have other last bits.
        seeds: One comparison for each.
        tolerance: Instead of what the passes declare: the sum of their tolerances, 0 for bitwise ones.

    Returns:
        The rewritten graph.
    """
    before = parse_graph(graph) if isinstance(graph, str) else graph
    passes = parse_pipeline(pipeline) if isinstance(pipeline, str) else list(pipeline)
    if tolerance is None:
        tolerance = sum(p.tolerance for p in passes if p.pass_class is not PassClass.BITWISE)
    after = PassManager(passes, repro=None).run(before.clone(), PassContext())
    whole = dims is not None and dims.startswith(WHOLE)
    for assignment in parse_dims((dims or "").removeprefix(WHOLE) or DEFAULT_DIMS):
        for seed in seeds:
            if groups := ranks_of(before):
                pairs = zip(
                    compute_world(after, seed, assignment, groups),
                    compute_world(before, seed, assignment, groups),
                    strict=True,
                )
                for i, (g, w) in enumerate(pairs):
                    assert_close(g, w, tolerance, f"@{before.name} with {assignment}, seed {seed}, output {i} of all")
                continue
            inputs = random_inputs(before, seed, assignment)
            inputs = in_whole_numbers(inputs) if whole else inputs
            want, want_args = compute(before, inputs)
            got, got_args = compute(after, inputs)
            assert len(got) == len(want)
            what = f"@{before.name} with {assignment}, seed {seed}"
            for i, (g, w) in enumerate(zip(got, want, strict=True)):
                assert_close(g, w, tolerance, f"{what}, output {i}")
            for i, (g, w) in enumerate(zip(got_args, want_args, strict=True)):
                assert_close(g, w, tolerance, f"{what}, argument {i} afterwards")
    return after
