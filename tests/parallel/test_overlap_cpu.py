"""Layers in chunks on the kernels of the cpu backend: not a bit differs from the whole layer, however it is cut."""

from __future__ import annotations

import functools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from moec.backends.cpu.build import compiler
from moec.backends.distributed.kernel import ParallelKernel, for_needs
from moec.backends.distributed.together import Gradients, parts
from moec.backends.reference import run_graph
from moec.backends.reference.world import run_world
from moec.backends.registry import get_backend
from moec.ir.attributes import Operand
from moec.ir.beside import EXPERTS
from moec.ir.core import Graph, Op
from moec.ir.verifier import verify
from moec.passes.calls import is_call
from moec.passes.expert_parallel.route import tensor_type
from moec.passes.overlap.by_experts import cut_by_experts
from moec.passes.overlap.by_tokens import cut_by_tokens
from moec.passes.overlap.chunks import Chunks
from moec.passes.overlap.cuts import expert_ranges
from moec.passes.overlap.order import reorder
from tests.parallel.layers import HISTOGRAMS, Layer, one_process

if compiler() is None:
    pytest.skip("there is no C++ compiler", allow_module_level=True)

TARGET = "cpu:avx2"
NEEDS = (True, False, True, True, True)
ODD = Layer(ranks=2, experts=5, top_k=2, hidden=19, inner=13)
LAYERS = {"f32": ODD, "bf16": Layer(2, 5, 2, hidden=19, inner=13, dtype="bf16")}
DTYPES = ["f32", pytest.param("bf16", marks=pytest.mark.slow)]  # each compiles kernels for one, two and three experts
Cutter = Callable[[Graph, Layer, int], Graph]


def experts(region: Graph, layer: Layer, rank: int) -> Graph:
    return cut_by_experts(region, Chunks(layer.sizes, expert_ranges(layer.sizes, 2)))


def own_first(region: Graph, layer: Layer, rank: int) -> Graph:
    return cut_by_experts(region, Chunks(layer.sizes, expert_ranges(layer.sizes, 2), rank))


SETS = (((1,), (0, 1)), ((0, 2), ()))
"""Of both layers, whose ranks hold three and two experts."""


def mixed(region: Graph, layer: Layer, rank: int) -> Graph:
    return cut_by_experts(region, Chunks.of(layer.sizes, SETS, rank))


def mixed_own_first(region: Graph, layer: Layer, rank: int) -> Graph:
    return cut_by_experts(region, Chunks.of(layer.sizes, SETS, rank, own_first=True))


def tokens(region: Graph, layer: Layer, rank: int) -> Graph:
    return cut_by_tokens(region, (1, 3, 2))


def whole(region: Graph, layer: Layer, rank: int) -> Graph:
    return region


@functools.cache
def kernels(layer: Layer, cut: Cutter, place: int) -> list[tuple[ParallelKernel, Graph]]:
    """Every rank's kernel, and its program of one direction."""
    made = []
    for rank in range(layer.ranks):
        op = layer.spread(rank, "expert-parallel").ops[0]
        op.attrs["backend"] = "cpu"
        region = cut(op.regions[place], layer, rank)
        if region is not op.regions[place]:
            reorder(region)
            verify(region)
            assert sum(o.name in EXPERTS for o in region.ops) > 1
            op.regions[place], region.parent_op = region, op
        made.append((ParallelKernel(op, TARGET), for_needs(region, NEEDS) if place else region))
    return made


def run(layer: Layer, cut: Cutter, histogram: str, place: int, in_place: bool = False) -> list[list[Tensor]]:
    """What every rank gets: its result, or the gradients of its tokens, weights and experts.

    With ``in_place`` chunks write their parts of gradients, and nobody joins them.
    """
    given, weights = layer.tokens(histogram), layer.weights()
    inputs = [[*given[r], *layer.share(r, weights)] for r in range(layer.ranks)]
    if place:
        inputs = [[grad, *mine] for grad, mine in zip(layer.gradients(given), inputs, strict=True)]
    made = kernels(layer, cut, place)

    def rank(r: int) -> list[Tensor]:
        kernel, region = made[r]
        gradients = Gradients(parts(region)) if in_place else None
        return run_graph(region, inputs[r], functools.partial(kernel._execute, gradients=gradients))

    return run_world(layer.ranks, layer.groups, rank)[0]


@pytest.mark.parametrize("histogram", HISTOGRAMS)
@pytest.mark.parametrize("cut", [experts, mixed, own_first, mixed_own_first, tokens])
@pytest.mark.parametrize("dtype", DTYPES)
def test_results_have_the_bits_of_the_whole_layer_and_of_one_process(dtype: str, cut: Cutter, histogram: str) -> None:
    layer = LAYERS[dtype]
    got, want = run(layer, cut, histogram, 0), run(layer, whole, histogram, 0)
    for mine, theirs in zip(got, want, strict=True):
        assert torch.equal(mine[0], theirs[0])
    alone, _ = one_process(layer, get_backend("cpu"), layer.tokens(histogram), None, TARGET)
    assert torch.equal(torch.cat([mine[0] for mine in got]), alone)


@pytest.mark.parametrize("histogram", HISTOGRAMS)
@pytest.mark.parametrize("cut", [experts, mixed])
@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients_have_the_bits_of_the_whole_layer(dtype: str, cut: Cutter, histogram: str) -> None:
    want = run(LAYERS[dtype], whole, histogram, 1)
    for in_place in (False, True):
        for mine, theirs in zip(run(LAYERS[dtype], cut, histogram, 1, in_place), want, strict=True):
            assert len(mine) == len(theirs) == 4
            assert all(torch.equal(a, b) for a, b in zip(mine, theirs, strict=True))


@pytest.mark.parametrize("cut", [experts, mixed])
def test_gradients_of_weights_are_written_where_they_belong(cut: Cutter, monkeypatch: pytest.MonkeyPatch) -> None:
    joined, written, join = list[Op](), list[Op](), Gradients.joined

    def watched(self: Gradients, op: Op) -> Tensor | None:
        found = join(self, op)
        (joined if found is None else written).append(op)
        return found

    monkeypatch.setattr(Gradients, "joined", watched)
    run(ODD, cut, "spread", 1, in_place=True)
    weights = [op for op in written if tensor_type(op.result).rank == 3]
    assert len(weights) == len(written) == 2 * ODD.ranks, "of up and of down, on every rank"
    assert all(tensor_type(op.result).rank == 2 for op in joined if is_call(op, "aten.cat.default")), "rows"


def test_chunks_of_any_experts_read_all_weights_where_they_lie_by_one_kernel() -> None:
    for place in (0, 1):
        kernel, region = kernels(ODD, mixed, place)[0]
        weights = set(region.args[-2:])
        found = [op for op in region.ops if op.name in EXPERTS]
        assert len(found) == 2 and all(weights <= set(op.operands) for op in found)
        assert all(v not in weights for op in region.ops if op.name not in EXPERTS for v in op.operands)
    run(ODD, mixed, "spread", 1)
    assert len(kernel._kernels) == 1


def test_a_part_that_is_used_elsewhere_too_is_joined() -> None:
    region = kernels(ODD, experts, 1)[0][1].clone()
    found = parts(region)
    part = next(iter(found))
    again = Op("torch.call", [part], [part.type], attrs={"target": "aten.clone.default", "args": (Operand(0),)})
    region.insert_before(region.terminator, again)
    left = parts(region)
    assert part not in left and len(left) == len(found) - 2, "the other gradient's two parts stay"


def test_joined_along_another_dimension_nobody_writes_in_place() -> None:
    region = kernels(ODD, experts, 1)[0][1].clone()
    for op in {part.join for part in parts(region).values()}:
        op.attrs["args"] = (*op.attrs["args"], 1)
    assert not parts(region)
