"""The planner in an artifact: the same plan as the cpu backend's, and results with the bits of those without it."""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import moec
from moec.aot.build import AotOptions, build
from moec.aot.source import Source
from moec.backends.cpu import aot
from moec.backends.cpu.aot import embed_regroup
from moec.backends.cpu.build import build as library
from moec.backends.cpu.build import compiler
from moec.backends.cpu.isa import LEVELS, isa_of
from moec.backends.registry import get_backend
from moec.ir.core import Op
from moec.ir.parser import parse_graph
from moec.options import CompileOptions
from tests.aot.blocks import Block, tokens
from tests.support.regroup import CALL, CUT

EXPERTS = 16
ENTRY = Path(aot.__file__).parent / "include"
PLANS = {
    "experts": CALL.format(attrs="experts = 16"),
    "ranks": CALL.format(attrs="experts = 16, sizes = (4, 8, 4)"),
    "little is saved": CALL.format(attrs="experts = 16, least = ((4, 0.0), (60, 0.1), (100, 0.9))"),
    "large experts": CALL.format(attrs="experts = 16, expert_bytes = 40000000"),
    "in parts": CUT.format(attrs="experts = 16, parts = 3"),
}

pytestmark = pytest.mark.skipif(
    compiler() is None or isinstance(isa_of("cpu"), str), reason="the cpu backend cannot run here"
)


class Arrays(ctypes.Structure):
    """``RegroupArrays`` of ``calls.h``."""

    _fields_ = [
        ("ids", ctypes.POINTER(ctypes.c_void_p)),
        ("rows", ctypes.POINTER(ctypes.c_int64)),
        ("sizes", ctypes.POINTER(ctypes.c_int64)),
        ("k", ctypes.c_int64),
        ("there", ctypes.POINTER(ctypes.c_void_p)),
        ("home", ctypes.POINTER(ctypes.c_void_p)),
    ]


def chosen(*sizes: int) -> list[Tensor]:
    """Experts of tokens of two kinds, in random order."""
    draw = torch.Generator().manual_seed(sum(sizes))
    kinds = torch.randint(0, 2, (sum(sizes), 1), generator=draw)
    first = torch.randint(0, 8, (sum(sizes), 1), generator=draw)
    return list((torch.cat([first, (first + 1) % 8], 1) + 8 * kinds).split(sizes))


def addresses(tensors: list[Tensor]) -> Any:
    """A C array of the tensors' addresses."""
    return (ctypes.c_void_p * len(tensors))(*(t.data_ptr() for t in tensors))


def numbers(values: list[int]) -> Any:
    """A C array of i64."""
    return (ctypes.c_int64 * len(values))(*values)


def planner(op: Op) -> Any:
    """The embedded kernel of an op, in a library of its own."""
    code = embed_regroup(op, "cpu")
    ((level, text),) = code.kernels.items()
    for header in ("regroup_entry.h", "calls.h"):
        inside = (ENTRY / header).read_text(encoding="utf-8").replace("#pragma once", "")
        text = text.replace(f'#include "{header}"', inside)
    text = text.replace('extern "C" void', 'extern "C" __attribute__((visibility("default"))) void')
    run = getattr(ctypes.CDLL(str(library(text, LEVELS[level]))), code.exports[level])
    run.argtypes = [ctypes.POINTER(Arrays)]
    return run


@pytest.mark.parametrize("name", PLANS)
def test_it_plans_as_the_cpu_backend(name: str) -> None:
    graph, cpu = parse_graph(PLANS[name]), get_backend("cpu")
    kernel, run = cpu.load(cpu.lower(graph, "cpu")), planner(graph.ops[0])
    moved = 0
    for sizes in ((40, 31), (6, 5), (0, 1), (90, 90)) if name != "in parts" else ((50,), (2,), (0,)):
        ids = chosen(*sizes)
        want = kernel.forward(ids)
        got = [torch.full_like(t, -1) for t in want]
        rows = [len(t) for t in want[len(want) - len(ids) :]]
        batches = [len(t) for t in want[: len(want) - len(ids)]]

        there, home = got[: len(batches)], got[len(batches) :]
        run(Arrays(addresses(ids), numbers(rows), numbers(batches), 2, addresses(there), addresses(home)))
        assert all(torch.equal(g, w) for g, w in zip(got, want, strict=True))
        moved += int((torch.cat(there) != torch.arange(sum(sizes))).sum())
    assert moved > 0


class Twice(nn.Module):
    """A block on two micro-batches."""

    def __init__(self) -> None:
        super().__init__()
        self.block = Block(experts=EXPERTS)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.block(x) * 2, self.block(x.flip(1)) + x


@pytest.mark.slow
def test_an_artifact_that_regroups_has_the_bits_of_one_that_does_not_and_of_the_door(tmp_path: Path) -> None:
    model, passes = Twice().eval(), "default,reschedule-tokens{always=true}"
    loaded = []
    for name, text in (("plain", "default"), ("regrouped", passes)):
        options = AotOptions(CompileOptions(passes=text, checks="off"), {"tokens": (1, 64)})
        built = build(Source(name, model, (tokens(6),)), tmp_path / f"{name}.moec", options)
        assert not built.report.remarks and built.kernels == 2 + (name == "regrouped")
        loaded.append(moec.load(tmp_path / f"{name}.moec"))
    door = torch.compile(model, backend="moec", fullgraph=True, options={"inner": "eager", "passes": passes})
    for count in (1, 2, 7, 64):
        x = tokens(count)
        with torch.no_grad():
            ways = [*(run(x) for run in loaded), door(x)]
        assert all(torch.equal(part, first) for way in ways[1:] for part, first in zip(way, ways[0], strict=True))
