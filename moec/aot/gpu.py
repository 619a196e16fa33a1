"""Ahead of time for a GPU that need not be here: kernels of MoE layers as binaries, the rest of the model as IR.

What is not MoE runs with PyTorch's operations on the device, one after the other as the IR says; AOTInductor would need
the device to compile for it. No code of the model and no pickle is in the artifact.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind, OutputKind

from moec.aot.build import AotOptions, Built, Stages, Told, exported_programs
from moec.aot.errors import AotError, NoBlockError
from moec.aot.gpu_write import GpuParts, write_gpu_artifact
from moec.aot.optimize import check_left, check_ops
from moec.aot.source import Source, Tokens
from moec.aot.state import state_of
from moec.backends.cpu.operands import form_of
from moec.backends.partition import claim
from moec.backends.triton.compiled.built import BuiltProgram, PlannedProgram, plan_experts, plan_route, spec_of
from moec.backends.triton.compiled.built import build as build_programs
from moec.backends.triton.compiled.cross import CrossError, refusal
from moec.backends.triton.compiled.plan import MOST_TOKENS
from moec.backends.triton.launches.device import Device, device_of
from moec.backends.triton.launches.here import described, device_for
from moec.backends.triton.launches.launch import rounded_up, tune
from moec.backends.triton.spec import Spec
from moec.capture import from_exported
from moec.emit import to_exported
from moec.exported import report_of
from moec.ir.core import Graph, Op
from moec.ir.opdef import op_def
from moec.lowering import lowering
from moec.options import CompileOptions
from moec.pipeline import run_pipeline
from moec.report import Report
from moec.runtime.programs import program_graph
from moec.selfcheck import timer
from moec.session import publish


@dataclass
class GpuEntry:
    """One entry: its program, IR before and after the passes, and which kernels its ops run.

    Attributes:
        programs: For every op of the moe dialect, in order: the name of its program; empty where PyTorch runs it.
    """

    program: ExportedProgram
    before: str
    after: str
    programs: tuple[str, ...] = ()


@dataclass
class Kernels:
    """The programs of an artifact; equal ones are compiled once.

    Args:
        target: Of the compile.
        least, most: Tokens of the smallest and of the largest call.
        tune: Launches are measured on the GPU that is here.

    Attributes:
        built: The programs by name, once :meth:`build` has compiled them.
        texts, forms: Their IR, and how their weights lie.
    """

    target: str
    least: int
    most: int
    tune: bool = False
    built: dict[str, BuiltProgram] = field(default_factory=dict)
    planned: dict[str, PlannedProgram] = field(default_factory=dict)
    texts: dict[str, str] = field(default_factory=dict)
    forms: dict[str, tuple[bool, bool]] = field(default_factory=dict)
    known: dict[tuple[str, bool, bool], str] = field(default_factory=dict)

    def enter(self, op: Op, args: list[Any], stages: Stages) -> str:
        """The program of an op; equal ones are one.

        Args:
            op: The op.
            args: Its operands as nodes with fake tensors: how weights lie is read from them.
            stages: Hear what is measured.
        """
        graph = program_graph(op)
        text = str(graph)
        forms = weight_forms(op, args) if op.name == "moe.experts" else (True, True)
        if (text, *forms) in self.known:
            return self.known[text, *forms]
        device = device_for(self.target) if self.tune else described(self.target, None)
        inner = next(o for o in graph.ops if o.name == op.name)

        if op.name == "moe.experts":
            if self.tune:
                self._tune(inner, spec_of(inner, *forms), device, stages)
            planned = plan_experts(spec_of(inner, *forms), device, self.least, self.most)
        else:
            planned = plan_route(inner, device, self.most)
        self.planned[planned.name], self.texts[planned.name], self.forms[planned.name] = planned, text, forms
        self.known[text, *forms] = planned.name
        return planned.name

    def build(self, processes: int, stages: Stages) -> None:
        """Compile what was entered."""
        self.built = {p.name: p for p in build_programs(list(self.planned.values()), processes, stages.progress)}

    def _tune(self, op: Op, spec: Spec, device: Device, stages: Stages) -> None:
        """Measure a layer's launches for every doubling of tokens."""
        here = torch.device("cuda", torch.cuda.current_device())
        tokens = rounded_up(self.least)
        while tokens <= rounded_up(self.most):
            stages.detail(f"measuring {tokens} tokens")
            tune(spec, tokens, device, timer(op, tokens, here))
            tokens *= 2


def weight_forms(op: Op, args: list[Any]) -> tuple[bool, bool]:
    """Whether rows of the up and of the down weights in memory are outputs.

    Raises:
        AotError: A weight has no contiguous side.
    """
    found = []
    for group, at in (("up", 3), ("down", 4)):
        start = sum(op.groups[:at])
        values = [a.meta["val"] for a in args[start : start + op.groups[at]]]
        form = form_of(values, op_def(op.name).attr(op, f"{group}_form") == "nk")
        if form is None:
            raise AotError(f"the {group} weights of {op.loc.module or 'a layer'} have no contiguous side")
        found.append(form)
    return found[0], found[1]


def build_gpu(source: Source, output: Path, options: AotOptions, told: Told) -> Built:
    """Compile ``source`` for a GPU.

    Raises:
        MoecError: The model cannot be exported or compiled, or the file cannot be written.
    """
    target = options.compile.target_description.name
    device_of(target)
    if why := refusal():
        raise CrossError(f"kernels for {target} cannot be compiled here: {why}", hint="moec doctor says more")
    if options.weights == "beside":
        raise AotError("--weights beside is for CPU targets", hint="use --weights inside")
    if options.tune and not device_for(target).fingerprint:
        raise AotError(
            f"--tune measures on a GPU of the target {target}, and there is none here",
            hint="leave it out: the model of times chooses",
        )
    stages = Stages(told)
    stages.begin("export")
    programs, facts = exported_programs(source, options)
    report = Report()
    kernels = Kernels(target, *_token_range(programs), options.tune)
    entries = {name: _entry(p, options.compile, kernels, report, stages) for name, p in programs.items()}
    if isinstance(source.module, Tokens):
        for block in report.layers:
            block.name = block.name.removeprefix("model.")
    publish(report)
    if not report.layers:
        hint = "moec explain says what it looked at"
        raise NoBlockError(f"{source.text} has no MoE block that moec finds", hint=hint)
    stages.begin("kernels")
    kernels.build(options.processes, stages)
    places: Mapping[str, Any] = source.checkpoint.places if source.checkpoint is not None else {}
    state = None
    if options.weights != "none":
        stages.begin("weights")
        state = state_of(source, places, [e.program for e in entries.values()])
    parts = GpuParts(source, options.compile, entries, kernels, state, tuple(options.dynamic), facts, places)
    stages.begin("archive")
    size = write_gpu_artifact(output, parts, stages.detail)
    stages.end()
    return Built(output, size, stages.seconds, False, report, sum(len(p.kernels) for p in kernels.built.values()))


def _entry(
    program: ExportedProgram, options: CompileOptions, kernels: Kernels, report: Report, stages: Stages
) -> GpuEntry:
    stages.begin("passes")
    check_ops(program)
    _check_signature(program)
    graph = from_exported(program)
    before = str(graph)
    ctx, raised = run_pipeline(graph, options)
    # No kernel on a device plans batches: where tokens would be regrouped, they stay, and a remark says so.
    plans = frozenset(("reschedule-tokens", op.loc) for op in _moe_ops(graph) if op.name == "moe.regroup")
    if plans:
        graph = from_exported(program)
        ctx, raised = run_pipeline(graph, options, left=plans)
    claims = claim(graph, ("triton", "aten"), options.target)
    made = report_of(graph, claims, ctx, raised)
    report.layers += made.layers
    report.remarks += made.remarks
    report.graphs += 1
    left = [op for op in _moe_ops(graph) if op not in claims]
    refused = [f"{op.loc.module or op.name}: {'; '.join(claims.reasons(op))}" for op in left]
    if refused:
        report.remarks += [f"{text}; the model runs as PyTorch would run it" for text in refused]
        for block in report.layers:
            block.fused, block.reason = False, refused[0]
        check_left(from_exported(program), refused)
        return GpuEntry(program, before, before)
    report.remarks += [
        f"{op.loc.module or op.name}: PyTorch's operations run {op.name} on the device: {'; '.join(claims.reasons(op))}"
        for op in _moe_ops(graph)
        if claims[op].name != "triton"
    ]
    check_left(graph)
    after = str(graph)
    names: dict[Op, str] = {}
    lower = lowering(claims, options)

    def noted(op: Op, fx: torch.fx.Graph, args: list[Any]) -> Sequence[Any] | None:
        if op.name in ("moe.experts", "moe.route"):
            names[op] = kernels.enter(op, args, stages) if claims[op].name == "triton" else ""
        return lower(op, fx, args)

    emitted = to_exported(graph, program, lower_op=noted)
    return GpuEntry(emitted, before, after, tuple(names[op] for op in _moe_ops(graph)))


def _moe_ops(graph: Graph) -> list[Op]:
    return [op for op in graph.ops if op.dialect == "moe"]


def _check_signature(program: ExportedProgram) -> None:
    """Refuse programs that give more than their results.

    Raises:
        AotError: A buffer is changed by returning its new value.
    """
    kinds = {s.kind for s in program.graph_signature.output_specs}
    if other := kinds - {OutputKind.USER_OUTPUT}:
        what = next(iter(other)).name.lower()
        raise AotError(f"the program gives {what} besides its results", hint="export it without")


def _token_range(programs: Mapping[str, ExportedProgram]) -> tuple[int, int]:
    """The least and the largest number of tokens of a call that kernels are compiled for.

    It is the product of the first input's sizes: of all where it holds token numbers, else of all but the last.
    """
    least, most = MOST_TOKENS, 1
    for program in programs.values():
        nodes = {n.name: n for n in program.graph.nodes}
        first = next(s for s in program.graph_signature.input_specs if s.kind is InputKind.USER_INPUT)
        value = nodes[first.arg.name].meta["val"]
        low = high = 1
        for size in value.shape if not value.is_floating_point() else value.shape[:-1]:
            bounds = (size, size) if isinstance(size, int) else _bounds(size, program)
            low, high = low * bounds[0], high * bounds[1]
        least, most = min(least, low), max(most, min(high, MOST_TOKENS))
    return max(1, min(least, most)), most


def _bounds(size: torch.SymInt, program: ExportedProgram) -> tuple[int, int]:
    span = program.range_constraints.get(size.node.expr)
    if span is None:
        return 1, MOST_TOKENS
    return max(1, int(span.lower)), int(min(span.upper, MOST_TOKENS))
