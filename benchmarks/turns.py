"""Times of whole models under several compilers: everything warm first, then one call each in turn, medians."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from rich.console import Console
from rich.table import Table
from torch import Tensor

BASE = "eager"
FEWEST_ROUNDS = 3


@dataclass
class Task:
    """One thing to time.

    Attributes:
        tokens: That one call works on.
        calls: By variant; ``eager`` must be there.
        look: Makes of a call's result what is compared with eager's: floats of any shape.
        compare: Of eager's and a variant's; the largest relative difference.
        lead: Calls of a variant before each one that is timed, for what a call finds as its own last call left it.
    """

    name: str
    tokens: int
    calls: dict[str, Callable[[], Any]]
    look: Callable[[Any], Tensor]
    compare: Callable[[Tensor, Tensor], float]
    lead: int = 0


@dataclass
class Timed:
    """Seconds by variant: of the first call, with compiling, and of all later ones in turn."""

    name: str
    tokens: int
    first: dict[str, float] = field(default_factory=dict)
    seconds: dict[str, list[float]] = field(default_factory=dict)
    errors: dict[str, float] = field(default_factory=dict)

    @property
    def medians(self) -> dict[str, float]:
        """Of the later calls."""
        return {name: statistics.median(t) for name, t in self.seconds.items()}

    def as_json(self) -> dict[str, Any]:
        """Everything, and tokens a second."""
        medians = self.medians
        return {
            "name": self.name,
            "tokens": self.tokens,
            "first": self.first,
            "median": medians,
            "best": {name: min(t) for name, t in self.seconds.items()},
            "tokens_per_second": {name: self.tokens / t for name, t in medians.items()},
            "rounds": len(self.seconds[BASE]),
            "errors": self.errors,
        }


def largest_difference(expected: Tensor, got: Tensor) -> float:
    """Over the largest expected value."""
    return float((got.float() - expected.float()).abs().max() / expected.float().abs().max())


def take_turns(tasks: Sequence[Task], seconds: float, screen: Console) -> list[Timed]:
    """First calls of every task and variant, then rounds: at least three, until ``seconds`` a task have gone by."""
    timed = [Timed(task.name, task.tokens) for task in tasks]
    expected: dict[str, Tensor] = {}
    for name in (BASE, *(n for n in tasks[0].calls if n != BASE)):
        for task, found in zip(tasks, timed, strict=True):
            start = time.perf_counter()
            task.calls[name]()
            found.first[name] = time.perf_counter() - start
            got = task.look(task.calls[name]()).clone()
            if name == BASE:
                expected[task.name] = got
            else:
                found.errors[name] = task.compare(expected[task.name], got)
        screen.print(f"{name}: compiled and warm", highlight=False)
    for task, found in zip(tasks, timed, strict=True):
        found.seconds = {name: [] for name in task.calls}
        names = list(task.calls)
        stop, turn = time.perf_counter() + seconds, 0
        while turn < FEWEST_ROUNDS or time.perf_counter() < stop:
            for name in names[turn % len(names) :] + names[: turn % len(names)]:  # nobody always follows the same one
                for _ in range(task.lead):
                    task.calls[name]()
                start = time.perf_counter()
                task.calls[name]()
                found.seconds[name].append(time.perf_counter() - start)
            turn += 1
        screen.print(f"{task.name}: {turn} rounds", highlight=False)
    return timed


def print_tasks(timed: Sequence[Timed], title: str, base: str, console: Console) -> None:
    """A row for each task and variant; speed is that of ``base`` over the variant's time."""
    table = Table(title=title)
    columns = ("", "variant", "ms", "tokens/s", f"x {BASE}", f"x {base}", "first call, s", "difference")
    for column in dict.fromkeys(columns):
        table.add_column(column, justify="left" if column in ("", "variant") else "right", no_wrap=True)
    for t in timed:
        medians = t.medians
        for n, (name, seconds) in enumerate(medians.items()):
            ratios = [f"{medians[b] / seconds:.2f}" for b in dict.fromkeys((BASE, base))]
            error = f"{t.errors[name]:.0e}" if name in t.errors else "-"
            table.add_row(
                "" if n else t.name, name, f"{seconds * 1e3:.1f}", f"{t.tokens / seconds:.1f}", *ratios,
                f"{t.first[name]:.1f}", error, end_section=n == len(medians) - 1,
            )  # fmt: skip
    console.print(table)
