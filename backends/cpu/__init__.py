"""The cpu backend: a generated C++ kernel for every layer, compiled where it runs."""

from __future__ import annotations

from moec.backends.base import Artifact, Backend, Kernel, StatusLine, Support, program_op
from moec.backends.calls import UnsupportedError
from moec.backends.cpu.build import compiler, compiler_text, warn_of_no_compiler
from moec.backends.cpu.isa import isa_of, missing, refusal
from moec.backends.cpu.kernel import CpuExperts
from moec.backends.cpu.load import LoadError
from moec.backends.cpu.memory import elsewhere
from moec.backends.cpu.regroup import CpuRegroup
from moec.backends.cpu.route import NO_FUNCTIONS, CpuRoute, functions
from moec.backends.cpu.route_source import read_router, write_router
from moec.backends.cpu.source import read_shape, write_source
from moec.backends.cpu.team import threads_of
from moec.backends.registry import register_backend
from moec.ir.core import Graph, Op
from moec.ir.opdef import op_def

__all__ = ["CpuBackend"]


@register_backend
class CpuBackend(Backend):
    """Generates C++ for one layer's sizes, types and activation, for x86 processors with AVX2 or AVX-512.

    ``moe.experts`` becomes one parallel region: gathered rows, up GEMM with the activation, down GEMM, weighting and
    combine. Weights are read in place through pointers and strides; sums are kept in f32. Work is handed out in blocks
    of weights and rows, so that one busy expert keeps every thread busy. A token's result has the same bits whatever
    the other tokens and the number of threads. ``moe.route`` is computed token by token, from logits to ids and
    weights, unless the router is a region; it chooses the experts that PyTorch chooses, where scores are equal too.
    Compiled kernels are kept in the cache directory; a compiler (``g++``) must be there. Gradients
    are generated code as well, built when they are first asked for; ``aten`` gives those of captured tensors, of
    experts that differ in their widths, and where an activation takes whole rows or a region follows the down GEMM.
    Targets ``cpu:avx2``, ``cpu:avx512``, ``cpu:avx512_bf16`` and ``cpu:amx`` choose the instructions (AMX's
    tiles for bf16, in the forward); ``cpu`` takes the best that the processor has.
    """

    name = "cpu"

    def supports(self, op: Op, target: str) -> Support:
        if op.name not in ("moe.experts", "moe.route", "moe.regroup"):
            return Support.no(f"there is no kernel for {op.name}")
        isa = isa_of(target)
        if isinstance(isa, str):
            return Support.no(isa)
        if (device := elsewhere(op)) is not None:
            return Support.no(f"its operands are on {device}")
        if compiler() is None:
            warn_of_no_compiler()
            return Support.no("there is no C++ compiler; install g++")
        try:
            if op.name == "moe.experts":
                read_shape(op)
            elif op.name == "moe.route" and functions(read_router(op).scoring, isa) is None:
                return Support.no(NO_FUNCTIONS)
        except UnsupportedError as reason:
            return Support.no(str(reason))
        return Support.yes()

    def lower(self, graph: Graph, target: str) -> Artifact:
        op = program_op(graph)
        if op.name == "moe.regroup":
            return Artifact(self.name, target, graph)
        if op.name == "moe.route":
            return Artifact(self.name, target, graph, {"kernel.cpp": write_router(read_router(op)).encode()})
        get = op_def(op.name).attr
        source = write_source(read_shape(op), get(op, "up_form") == "nk", get(op, "down_form") == "nk")
        return Artifact(self.name, target, graph, {"kernel.cpp": source.encode()})

    def load(self, artifact: Artifact) -> Kernel:
        isa = isa_of(artifact.target)
        if isinstance(isa, str):
            raise LoadError(f"the cpu backend cannot run {artifact.target!r}: {isa}")
        if lacks := missing(isa):
            raise LoadError(
                f"this processor cannot run kernels for cpu:{isa.name}: it lacks {lacks}", hint="use the target 'cpu'"
            )
        if why := refusal(isa):
            raise LoadError(
                f"the operating system lets this process use no AMX tiles: {why}",
                hint="use the target 'cpu:avx512_bf16'",
            )
        op = program_op(artifact.graph)
        if op.name == "moe.regroup":
            return CpuRegroup(op, isa)
        if op.name == "moe.route":
            router = read_router(op)
            found = functions(router.scoring, isa)
            if found is None:
                raise LoadError(NO_FUNCTIONS, hint="use the backend 'aten'")
            return CpuRoute(artifact.graph, router, isa, found, threads_of(artifact.target))
        return CpuExperts(op, read_shape(op), isa, threads_of(artifact.target))

    def status(self) -> list[StatusLine]:
        isa = isa_of("cpu")
        found = compiler_text()
        runs = not isinstance(isa, str)
        return [
            StatusLine("emit", True, "C++17"),
            StatusLine("build", compiler() is not None, found or "no C++ compiler: install g++, or set CXX"),
            StatusLine("run", runs, isa if isinstance(isa, str) else f"{isa.name} instructions"),
        ]
