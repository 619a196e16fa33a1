"""How the layers of a report would be launched on a GPU, and in what time: the answer of ``moec explain --target``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from moec.backends.registry import get_backend
from moec.backends.triton.compiled.built import launch_json
from moec.backends.triton.compiled.plan import MOST_TOKENS
from moec.backends.triton.launches.device import Device, device_of
from moec.backends.triton.launches.launch import layer_of, schedule
from moec.backends.triton.launches.usage import usage
from moec.backends.triton.spec import read_spec
from moec.ir.core import Op
from moec.ir.parser import parse_graph
from moec.report import BlockReport, Report
from moec.targets import parse_target


@dataclass(frozen=True)
class GpuPlan:
    """One kind of layer.

    Attributes:
        blocks: Names of the blocks that are so.
        launches: For ascending numbers of tokens, as JSON types, with what tiles take.
        reason: Why there are none.
    """

    blocks: tuple[str, ...]
    launches: tuple[dict[str, Any], ...] = ()
    reason: str = ""


def gpu_plans(report: Report, target: str) -> list[GpuPlan]:
    """The launches of every kind of layer in a report.

    Raises:
        TargetError: ``target`` is no GPU that there are numbers for.
    """
    device = device_of(parse_target(target).name)
    groups: dict[tuple[str, str], list[str]] = {}
    found: dict[tuple[str, str], GpuPlan] = {}
    for block in report.entries():
        launches, reason = _plan(block, device, target)
        key = repr(launches), reason
        groups.setdefault(key, []).append(block.name)
        found[key] = GpuPlan((), tuple(launches), reason)
    return [GpuPlan(tuple(names), found[key].launches, key[1]) for key, names in groups.items()]


def _plan(block: BlockReport, device: Device, target: str) -> tuple[list[dict[str, Any]], str]:
    op = _experts(block)
    if op is None:
        return [], block.reason or "its experts are not fused"
    support = get_backend("triton").supports(op, target)
    if not support.ok:
        return [], support.reason
    spec = read_spec(op)
    made = []
    for planned in schedule(spec, device, 1, MOST_TOKENS):
        told = launch_json(planned)
        if planned.launch.form == "gemm":
            tiles = (("up", planned.launch.up), ("down", planned.launch.down))
            for (name, tile), gemm in zip(tiles, layer_of(spec).of(planned.launch.down).gemms, strict=True):
                taken = usage(device, tile, gemm.parts, gemm.dtype, gemm.biased, gemm.gathered, gemm.apart)
                told[name] |= {"shared": taken.shared, "registers": taken.registers, "resident": taken.resident}
        made.append(told)
    return made, ""


def _experts(block: BlockReport) -> Op | None:
    """The layer of a block, from its text."""
    if not block.fused or not block.ir_after:
        return None
    return next((op for op in parse_graph(block.ir_after).ops if op.name == "moe.experts"), None)
