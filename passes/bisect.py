"""Finds the pass, and the rewrite, that makes something go wrong.

The pipeline is run on fresh copies of the graph with ever closer bounds: first over how many passes run, at most
``ceil(log2 N) + 1`` runs for N passes; then, for a pass that counts its rewrites, over the fuel, at most
``ceil(log2 R)`` further runs for its R rewrites.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from moec.ir.core import Graph
from moec.ir.errors import MoecError
from moec.passes.base import Pass, PassContext
from moec.passes.manager import PassManager


@dataclass(frozen=True)
class Culprit:
    """What bisecting found.

    Attributes:
        pass_: The first pass after which the graph is bad.
        index: Its place in the pipeline, from 0.
        rewrite: Name of its first harmful rewrite, or "" if the pass does not count rewrites.
        op: The op which that rewrite was applied to, as text, or "".
        fuel: ``fuel=N`` whose N-th rewrite is the harmful one, or None.
        runs: Pipelines run until the pass was known.
        fuel_runs: Further runs until the rewrite was known.
    """

    pass_: Pass
    index: int
    rewrite: str
    op: str
    fuel: int | None
    runs: int
    fuel_runs: int

    def __str__(self) -> str:
        text = f"pass {self.index + 1}, {self.pass_.name!r}, makes it fail ({self.runs} runs)"
        if self.fuel is not None:
            text += f"\nits rewrite {self.rewrite!r}, number {self.fuel} of the pipeline ({self.fuel_runs} more runs)"
            text += f"\n  op: {self.op}" if self.op else ""
        return text


@dataclass(frozen=True)
class _Outcome:
    good: bool
    spent: int
    last: tuple[str, str, str] | None


def bisect_pipeline(
    graph: Graph,
    passes: Sequence[Pass],
    is_good: Callable[[Graph], bool],
    *,
    make_context: Callable[[], PassContext] = PassContext,
    verify: bool = True,
) -> Culprit:
    """Find the first pass of ``passes`` that turns ``graph`` bad.

    Args:
        graph: The input; it is not changed.
        passes: The pipeline.
        is_good: Called with a graph that some of the pipeline ran on. A pipeline that raises a MoecError is bad.
        make_context: Gives every run a context of its own.
        verify: Verify between passes.

    Raises:
        MoecError: The input is bad already, or the whole pipeline is good.
    """
    runs = 0

    def outcome(count: int, fuel: int | None = None) -> _Outcome:
        nonlocal runs
        runs += 1
        copy, ctx = graph.clone(), make_context()
        try:
            PassManager(passes[:count], verify=verify, fuel=fuel, repro=None).run(copy, ctx)
            good = is_good(copy)
        except MoecError:
            good = False
        return _Outcome(good, ctx.fuel.spent, ctx.fuel.last)

    if not is_good(graph.clone()):
        raise MoecError("the graph is bad before any pass has run", hint="bisect needs an input that is good")
    low, high = 0, len(passes)
    good, bad = _Outcome(True, 0, None), outcome(high)
    if bad.good:
        raise MoecError("the whole pipeline gives a good graph: there is nothing to find")
    while high - low > 1:  # `low` passes are good, `high` passes are bad
        middle = (low + high) // 2
        tried = outcome(middle)
        if tried.good:
            low, good = middle, tried
        else:
            high, bad = middle, tried
    pass_runs = runs
    found, last = _bisect_fuel(good.spent, bad, lambda fuel: outcome(high, fuel))
    return Culprit(
        passes[high - 1],
        high - 1,
        last[1] if last else "",
        last[2] if last else "",
        found,
        pass_runs,
        runs - pass_runs,
    )


def _bisect_fuel(
    low: int, bad: _Outcome, run: Callable[[int], _Outcome]
) -> tuple[int | None, tuple[str, str, str] | None]:
    """The first fuel in ``(low, bad.spent]`` that is bad, and what was done with its last drop."""
    high = bad.spent
    if high == low:
        return None, None
    at_high: _Outcome | None = None
    while high - low > 1:
        middle = (low + high) // 2
        tried = run(middle)
        if tried.good:
            low = middle
        else:
            high, at_high = middle, tried
    at_high = at_high or run(high)
    return high, at_high.last
