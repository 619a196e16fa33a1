"""Runs a pipeline of passes over a graph: verification, instruments, fuel, and a crash that can be replayed.

Contract:
1. The graph is verified before the first pass and after each one; an error names the pass that broke it.
2. A pass that fails leaves the graph as it was before that pass, and nothing half-written on disk.
3. A failure is one :class:`~moec.passes.base.PassError`; ``repro.moe`` holds the graph before the pass, and its first
   line the command that replays it.
4. Instruments see the graph and never change it.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

from moec.ir.core import Graph
from moec.ir.errors import MoecError, VerifyError
from moec.ir.verifier import verify as verify_graph
from moec.passes.base import Fuel, Pass, PassContext, PassError, PassResult
from moec.passes.instruments import Instrument, write_whole
from moec.passes.pipeline_text import format_pipeline, parse_pipeline

REPRO = "repro.moe"


class PassManager:
    """A pipeline ready to run.

    Args:
        passes: Passes in order, or a pipeline text.
        instruments: Watchers, called in order.
        verify: Check the graph before and after every pass.
        fuel: Only so many rewrites over the whole pipeline; None for any number. The budget starts anew with every
            ``run``. Passes that do not ask for fuel are not stopped by it.
        repro: Where a crash is written; None to write nothing.
    """

    def __init__(
        self,
        passes: Sequence[Pass] | str,
        *,
        instruments: Sequence[Instrument] = (),
        verify: bool = True,
        fuel: int | None = None,
        repro: str | Path | None = REPRO,
    ) -> None:
        self.passes = parse_pipeline(passes) if isinstance(passes, str) else list(passes)
        self.instruments = list(instruments)
        self.verify = verify
        self.fuel = fuel
        self.repro = Path(repro) if repro is not None else None

    def run(self, graph: Graph, ctx: PassContext | None = None) -> Graph:
        """Run the pipeline on ``graph`` in place, and return it.

        Raises:
            VerifyError: The input itself is invalid.
            PassError: A pass raised, or left an invalid graph. The graph is as it was before that pass.
        """
        ctx = ctx if ctx is not None else PassContext()
        ctx.fuel = Fuel(self.fuel)
        if self.verify:
            verify_graph(graph)
        for instrument in self.instruments:
            instrument.before_pipeline(graph, self.passes)
        try:
            for i, pass_ in enumerate(self.passes):
                self._run_one(graph, ctx, i, pass_)
        finally:
            for instrument in self.instruments:
                instrument.after_pipeline(graph)
        return graph

    def _run_one(self, graph: Graph, ctx: PassContext, index: int, pass_: Pass) -> None:
        for instrument in self.instruments:
            instrument.before_pass(graph, pass_)
        before = graph.clone()
        remarks = len(ctx.remarks)
        start = time.perf_counter()
        try:
            result = pass_.run(graph, ctx)
            if not isinstance(result, PassResult):
                raise MoecError(f"run() returned {type(result).__name__}, not a PassResult")
        except Exception as error:
            del ctx.remarks[remarks:]
            raise self._failure(graph, before, index, f"pass {pass_.name!r} failed", error) from error
        seconds = time.perf_counter() - start
        if self.verify:
            try:
                verify_graph(graph)
            except VerifyError as error:
                del ctx.remarks[remarks:]
                raise self._failure(graph, before, index, f"pass {pass_.name!r} broke the IR", error) from error
        for instrument in self.instruments:
            instrument.after_pass(graph, pass_, result, seconds)

    def _failure(self, graph: Graph, before: Graph, index: int, what: str, error: Exception) -> PassError:
        """Put the graph back, write the reproducer, and say both in one error."""
        restore(graph, before)
        hint = self._write_repro(graph, index)
        op = source = None
        message = f"{what}: {type(error).__name__}: {error}"
        if isinstance(error, MoecError):
            op, source, message = error.op, error.source, f"{what}: {error.message}"
            hint = f"{error.hint}; {hint}" if error.hint and hint else error.hint or hint
        failure = PassError(message, pass_name=self.passes[index].name, op=op, source=source, hint=hint or None)
        if isinstance(error, VerifyError):
            failure.excerpt = error.excerpt
        return failure

    def _write_repro(self, graph: Graph, index: int) -> str:
        if self.repro is None:
            return ""
        pipeline = format_pipeline(self.passes[index:])
        command = f"moec opt {self.repro.name} -p {_shell_quote(pipeline)}"
        try:
            write_whole(self.repro, f"// {command}\n{str(graph).rstrip()}\n")
        except OSError as error:
            return f"the graph could not be written to {self.repro} ({error.strerror or error})"
        return f"replay it with `{command}` ({self.repro})"


def _shell_quote(text: str) -> str:
    return "'" + text.replace("'", "'\\''") + "'"


def restore(graph: Graph, saved: Graph) -> None:
    """Make ``graph`` what ``saved`` is; ``saved`` is used up. References into the old content go stale."""
    graph.name, graph.attrs, graph.meta = saved.name, saved.attrs, saved.meta
    graph.args, graph.ops = saved.args, saved.ops
    for value in graph.args:
        value.owner = graph
    for op in graph.ops:
        op.parent = graph
