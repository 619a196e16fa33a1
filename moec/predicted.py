"""Predicted times of a report's blocks, as the cost model has them."""

from __future__ import annotations

from dataclasses import asdict

from moec.backends.cpu.isa import isa_of
from moec.cost import LayerShape, library_is_faster, machine_for, predict
from moec.cost.machine import ITEM_BYTES
from moec.op_costs import team_for
from moec.report import BlockReport, Report
from moec.targets import parse_target

TOKENS = (1, 16, 256, 1024, 4096)
"""Tokens of a call, from a decode step of one sequence to a long prefill."""


def add_predictions(report: Report, target: str, threads: int, fixed: bool = False) -> None:
    """Fill in ``predicted`` of every fused block and shared expert.

    Nothing is predicted unless ``target`` is a CPU that the cpu backend has kernels for. The times are those of the
    experts on the cpu backend, whichever backend took them, with tokens spread uniformly.

    Args:
        report: What is filled in.
        target: Target text.
        threads: Threads that a call may use.
        fixed: It uses them all, as the option ``threads`` asks; else as many as finish first.
    """
    isa, machine_target = isa_of(target), parse_target(target)
    if isinstance(isa, str):
        return
    machine = machine_for(machine_target)
    for block in report.entries():
        shape = _shape(block)
        if shape is None:
            continue
        block.predicted = []
        for tokens in TOKENS:
            team = threads if fixed else team_for(shape, tokens, machine, threads, isa.name)
            told = {
                "tokens": tokens,
                "threads": team,
                "isa": isa.name,
                "calibrated": machine.has_curve(shape.dtype, isa.name),
                "library": library_is_faster(shape, tokens, machine, team, isa.name),
            }
            block.predicted.append({**told, **asdict(predict(shape, tokens, machine, team, isa.name))})


def _shape(block: BlockReport) -> LayerShape | None:
    sizes = (block.hidden, block.intermediate, block.num_experts, block.top_k, block.projections)
    if not block.fused or block.dtype not in ITEM_BYTES or None in sizes:
        return None
    hidden, inner, experts, top_k, parts = (int(s) for s in sizes if s is not None)
    return LayerShape(hidden, inner, hidden, experts, top_k, parts, block.dtype)
