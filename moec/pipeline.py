"""Running a pipeline of passes as the compile options say: passes, instruments, verification, fuel."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from pathlib import Path

import torch

from moec.ir.core import Graph, Location
from moec.op_costs import op_costs
from moec.options import CompileOptions
from moec.parallel.plan import passes_for
from moec.passes.base import Pass, PassContext, PassResult
from moec.passes.calls import call_args, is_call
from moec.passes.carry_shared_experts import CarrySharedExperts
from moec.passes.dce import DeadCodeElimination
from moec.passes.expert_parallel.expert_parallel import Spread
from moec.passes.expert_parallel.site import UNSHARD
from moec.passes.instruments import DumpDir, Instrument, PrintAfterAll, Stats, Timing
from moec.passes.manager import REPRO, PassManager
from moec.passes.registry import parse_pipeline
from moec.routing.store import load_routing

_RAISE = ("raise-moe", "raise-shared-experts")


class _AfterRaise(Instrument):
    """Keeps the graph's text as it is after ``raise-moe``; of a shared expert, as it is once that is raised."""

    def __init__(self) -> None:
        self.text = ""

    def after_pass(self, graph: Graph, pass_: Pass, result: PassResult, seconds: float) -> None:
        if pass_.name in _RAISE and (result.modified or not self.text):
            shown = graph.clone()
            DeadCodeElimination().run(shown, PassContext())
            self.text = str(shown)


def passes_of(options: CompileOptions, groups: Iterable[str]) -> list[Pass]:
    """The passes that the caller asked for, and what sharded experts need to run; nobody has to ask for that.

    Args:
        options: The caller's options.
        groups: Over which experts of the graph are sharded.
    """
    passes = parse_pipeline(options.passes)
    if any(isinstance(p, Spread) for p in passes):
        return passes
    return [*passes, *(p for group in dict.fromkeys(groups) for p in passes_for(group))]


def carries(options: CompileOptions, groups: Iterable[str]) -> bool:
    """Whether layers whose experts lie over ``groups`` go through ``carry-shared-experts``."""
    return any(isinstance(p, CarrySharedExperts) for p in passes_of(options, groups))


def run_pipeline(
    graph: Graph, options: CompileOptions, cut_as: str = "", left: Collection[tuple[str, Location]] = ()
) -> tuple[PassContext, str]:
    """Run ``options.passes`` on ``graph`` in place.

    Args:
        graph: The graph.
        options: The caller's options.
        cut_as, left: As in :class:`~moec.passes.base.PassContext`.

    Returns:
        The context with all remarks, and the graph's text as raised, before anything was fused.

    Raises:
        MoecError: A pass failed; the graph is as it was before that pass.
    """
    costs = op_costs(options.target)
    profile = None if options.routing is None else load_routing(options.routing)
    exact = torch.are_deterministic_algorithms_enabled() and torch.is_grad_enabled()
    ctx = PassContext(
        target=options.target_description, cost_model=costs, profile=profile, cut_as=cut_as, left=left,
        deterministic=exact,
    )  # fmt: skip
    raised = _AfterRaise()
    instruments: list[Instrument] = [raised]
    if options.print_ir_after_all:
        instruments.append(PrintAfterAll())
    if options.dump_dir is not None:
        instruments.append(DumpDir(options.dump_dir))
    if options.time_passes:
        instruments.append(Timing())
    if options.stats:
        instruments.append(Stats())
    repro = Path(options.dump_dir) / REPRO if options.dump_dir is not None else None
    passes = passes_of(options, (call_args(op)[0][2] for op in graph.ops if is_call(op, UNSHARD)))
    manager = PassManager(passes, instruments=instruments, verify=options.verify, fuel=options.fuel, repro=repro)
    manager.run(graph, ctx)
    return ctx, raised.text
