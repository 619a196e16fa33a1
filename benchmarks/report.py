"""What was measured, as tables and as JSON."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from machine import Machine
from shapes import DTYPES
from timing import Cell

OURS, REFERENCE = "cpu", "aten"
SMALL, LARGE = 64, 256
"""Where weight bytes decide (T up to), and where arithmetic does (T from)."""


def cell_json(cell: Cell, machine: Machine) -> dict[str, Any]:
    """Everything that is known of one cell; seconds, operations and bytes."""
    flops = cell.shape.flops(cell.tokens)
    weight_bytes = cell.shape.weight_bytes(DTYPES[machine.dtype], cell.touched)
    return {
        "shape": cell.shape.name,
        "sizes": [cell.shape.hidden, cell.shape.inner, cell.shape.experts, cell.shape.top_k],
        "tokens": cell.tokens,
        "touched": cell.touched,
        "flops": flops,
        "bytes": weight_bytes,
        "limit": machine.limit(flops, weight_bytes),
        "limited_by": "GEMM" if flops / machine.flops > weight_bytes / machine.bandwidth else "memory",
        "limit_registers": max(flops / machine.registers, weight_bytes / machine.bandwidth),
        "median": cell.medians,
        "best": {name: min(t) for name, t in cell.seconds.items()},
        "rounds": len(next(iter(cell.seconds.values()))),
        "errors": cell.errors,
    }


def machine_json(machine: Machine) -> dict[str, Any]:
    """The rates, each by name and the one that the limit uses."""
    return {
        "dtype": machine.dtype,
        "threads": machine.threads,
        "processor": machine.processor,
        "registers": machine.registers,
        "gemms": machine.gemms,
        "reads": machine.reads,
        "flops": machine.flops,
        "bandwidth": machine.bandwidth,
    }


def print_machine(machine: Machine, console: Console) -> None:
    """The rates behind the limit."""
    console.print(f"{machine.processor}, {machine.threads} threads, {machine.dtype}, torch {torch.__version__}")
    rates = [f"{name} {rate / 1e9:.0f}" for name, rate in machine.gemms.items()]
    console.print(f"GFLOP/s: on registers {machine.registers / 1e9:.0f}, " + ", ".join(rates))
    console.print("GB/s: " + ", ".join(f"{name} {rate / 1e9:.1f}" for name, rate in machine.reads.items()))
    console.print(f"the limit takes {machine.flops / 1e9:.0f} GFLOP/s and {machine.bandwidth / 1e9:.1f} GB/s\n")


def print_cells(cells: Sequence[dict[str, Any]], console: Console) -> None:
    """Milliseconds, times the limit, and every other implementation's time over ours."""
    names = list(dict.fromkeys(n for c in cells for n in c["median"] if n != OURS))
    table = Table(title=f"one MoE layer, ms (in brackets: over {OURS}'s, above 1 {OURS} is faster)")
    for column in ("shape", "T", "limit", "by", OURS, "/ limit", *names, "error"):
        table.add_column(column, justify="left" if column in ("shape", "by") else "right", no_wrap=True)
    for c in cells:
        ours = c["median"][OURS]
        others = [
            f"{c['median'][n] * 1e3:.2f} ({c['median'][n] / ours:.2f})" if n in c["median"] else "-" for n in names
        ]
        table.add_row(
            c["shape"], str(c["tokens"]), f"{c['limit'] * 1e3:.2f}", c["limited_by"], f"{ours * 1e3:.2f}",
            f"{ours / c['limit']:.2f}", *others, f"{c['errors'][OURS]:.0e}",
        )  # fmt: skip
    console.print(table)


def summary(cells: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Geometric means and worst cells: of every peer's time over ours, and of ours over the limit."""
    names = list(dict.fromkeys(n for c in cells for n in c["median"] if n != OURS))
    peers = {name: _ratios(cells, partial(_median, name)) for name in names}

    def best(c: dict[str, Any]) -> float | None:
        return min((t for n, t in c["median"].items() if n not in (OURS, REFERENCE)), default=None)

    if any(best(c) for c in cells):
        peers["best peer"] = _ratios(cells, best)
    small = [c["median"][OURS] / c["limit"] for c in cells if c["tokens"] <= SMALL]
    large = [c["median"][OURS] / c["limit"] for c in cells if c["tokens"] >= LARGE]
    return {
        "peers": peers,
        "limit": {
            "small_mean": _mean(small),
            "small_worst": max(small, default=None),
            "large_mean": _mean(large),
            "large_worst": max(large, default=None),
        },
    }


def _ratios(cells: Sequence[dict[str, Any]], time_of: Callable[[dict[str, Any]], float | None]) -> dict[str, Any]:
    found = [(t / c["median"][OURS], c) for c in cells if (t := time_of(c)) is not None]
    worst, at = min(found, key=lambda f: f[0])
    return {
        "cells": len(found),
        "mean": _mean(r for r, _ in found),
        "large_mean": _mean(r for r, c in found if c["tokens"] >= LARGE),
        "worst": worst,
        "worst_at": [at["shape"], at["tokens"]],
    }


def _median(name: str, cell: dict[str, Any]) -> float | None:
    found: float | None = cell["median"].get(name)
    return found


def _mean(values: Iterable[float]) -> float | None:
    kept = list(values)
    return statistics.geometric_mean(kept) if kept else None


def print_summary(found: dict[str, Any], console: Console) -> None:
    """The geometric means in two small tables."""
    table = Table(title=f"their time over {OURS}'s, geometric means")
    for column in ("", "cells", "all", f"T >= {LARGE}", "worst", "at"):
        table.add_column(column, justify="left" if column in ("", "at") else "right")
    for name, p in found["peers"].items():
        at = f"{p['worst_at'][0]}, T = {p['worst_at'][1]}"
        table.add_row(name, str(p["cells"]), _show(p["mean"]), _show(p["large_mean"]), _show(p["worst"]), at)
    if found["peers"]:
        console.print(table)
    limit = found["limit"]
    table = Table(title=f"{OURS}'s time over the limit")
    for column in ("", "geometric mean", "worst"):
        table.add_column(column, justify="left" if not column else "right")
    table.add_row(f"T <= {SMALL}", _show(limit["small_mean"]), _show(limit["small_worst"]))
    table.add_row(f"T >= {LARGE}", _show(limit["large_mean"]), _show(limit["large_worst"]))
    console.print(table)


def _show(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def print_skew(rows: Sequence[dict[str, Any]], console: Console) -> None:
    """Zipf's histogram over the even one, for each implementation."""
    names = list(dict.fromkeys(n for r in rows for n in r["even"]))
    table = Table(title="ms with even rows -> with skewed rows of the same experts (ratio)")
    for column in ("shape", "T", "experts", "busiest", *names):
        table.add_column(column, justify="left" if column == "shape" else "right", no_wrap=True)
    for r in rows:
        cells = [
            f"{r['even'][n] * 1e3:.2f} -> {r['skewed'][n] * 1e3:.2f} ({r['ratio'][n]:.2f})" if n in r["even"] else "-"
            for n in names
        ]
        table.add_row(r["shape"], str(r["tokens"]), f"{r['touched']:.0f}", f"{r['busiest']:.0%}", *cells)
    console.print(table)
