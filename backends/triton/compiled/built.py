"""A program compiled ahead of time: its kernels' Python file, a binary of every kernel, and what each takes.

Which kernels those are depends on the number of tokens alone, so a range of tokens has a list of launches.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from typing import Any

from moec.backends.triton.compiled.cross import Binary
from moec.backends.triton.compiled.plan import Call, calls
from moec.backends.triton.compiled.pool import Job, compile_jobs
from moec.backends.triton.kernels.route import read_router, write_router
from moec.backends.triton.kernels.source import write_experts
from moec.backends.triton.kernels.text import KernelFile
from moec.backends.triton.launches.device import Device
from moec.backends.triton.launches.gemm_time import LAUNCH_SECONDS
from moec.backends.triton.launches.launch import Planned, plan_launch, rounded_up, schedule
from moec.backends.triton.launches.usage import ITEM_BYTES
from moec.backends.triton.route import tokens_of_a_program
from moec.backends.triton.spec import Spec, read_spec
from moec.ir.core import Op

ROUTE_STAGES, ROUTE_WARPS = 3, 4


STEPS = {
    **dict.fromkeys(("sort_few", "count", "offsets", "place"), "sort"),
    **dict.fromkeys(("up", "up_vector"), "up"),
    **dict.fromkeys(("down", "down_halves", "down_parts", "down_atomic", "down_vector"), "down"),
    **dict.fromkeys(("combine", "combine_parts"), "combine"),
}
"""Which step of a plan a kernel is; those of one step share its time."""


@dataclass(frozen=True)
class Expected:
    """What the model of times expects of a kernel.

    Attributes:
        tokens: Of the largest call that the kernel is for.
        seconds, limit_seconds: Predicted, and what no kernel of its kind can beat.
    """

    tokens: int
    seconds: float
    limit_seconds: float


@dataclass(frozen=True)
class BuiltKernel:
    """A binary, the launch it is for, Triton's types of its run-time arguments, and what is expected of it."""

    call: Call
    types: tuple[tuple[str, str], ...]
    binary: Binary
    expected: Expected | None = None


@dataclass(frozen=True)
class BuiltProgram:
    """A program of one op.

    Attributes:
        name: Of its content.
        text: The kernels' Python file.
        launches: For ascending numbers of tokens; none for a router.
        kernels: Every kernel that a call may launch.
    """

    name: str
    text: str
    launches: tuple[Planned, ...]
    kernels: tuple[BuiltKernel, ...]

    def describe(self, members: Mapping[int, tuple[str, str]]) -> dict[str, Any]:
        """As JSON types.

        Args:
            members: Where the code and the assembly of each kernel lie, by its number.
        """
        return {
            "name": self.name,
            "launches": [launch_json(p) for p in self.launches],
            "kernels": [_kernel(k, *members[i]) for i, k in enumerate(self.kernels)],
        }


def launch_json(planned: Planned) -> dict[str, Any]:
    """A launch, and the steps that it is expected to take, as JSON types."""
    steps = [{"name": n, "seconds": s, "limit_seconds": limit} for n, s, limit in planned.parts]
    return {"tokens": planned.tokens, "bound": planned.bound, "steps": steps, **asdict(planned.launch)}


def _kernel(built: BuiltKernel, code: str, assembly: str) -> dict[str, Any]:
    binary, call = built.binary, built.call
    return {
        "name": call.kernel,
        "constants": dict(call.constants),
        "warps": call.warps,
        "stages": call.stages,
        "aligned": sorted(call.aligned),
        "arguments": [list(a) for a in built.types],
        "function": binary.name,
        "code": code,
        "assembly": assembly,
        "threads": binary.threads,
        "scratch": binary.scratch,
        "scratch_align": binary.scratch_align,
        "expected": None if built.expected is None else asdict(built.expected),
        **asdict(binary.resources),
    }


@dataclass(frozen=True)
class PlannedProgram:
    """A program of which nothing is compiled yet.

    Attributes:
        name: Of its content.
        file: Its kernels.
        launches: For ascending numbers of tokens; none for a router.
        wanted: Every launch of a kernel that a call may make, and what is expected of it.
        device: It is for.
    """

    name: str
    file: KernelFile
    launches: tuple[Planned, ...]
    wanted: Mapping[Call, Expected | None]
    device: Device

    def jobs(self) -> list[Job]:
        """What is to be compiled, in the order of ``wanted``."""
        made = []
        for call in self.wanted:
            kernel = self.file.kernels[call.kernel]
            signature = (*((a.name, a.type) for a in kernel.arguments), *((c, "constexpr") for c in kernel.constants))
            made.append(Job(call, self.file.text, signature, self.device))
        return made

    def built(self, binaries: Iterable[Binary]) -> BuiltProgram:
        """The program with the binaries of its jobs."""
        kernels = tuple(
            BuiltKernel(call, tuple((a.name, a.type) for a in self.file.kernels[call.kernel].arguments), binary, worth)
            for (call, worth), binary in zip(self.wanted.items(), binaries, strict=True)
        )
        return BuiltProgram(self.name, self.file.text, self.launches, kernels)


def build(
    programs: Sequence[PlannedProgram], processes: int = 1, told: Callable[[int, int], None] = lambda done, of: None
) -> list[BuiltProgram]:
    """Compile programs.

    Args:
        programs: Their kernels are compiled in one go.
        processes: Compile at once.
        told: Hears how many kernels are done, and how many there are.

    Raises:
        CrossError: Triton refuses a kernel.
    """
    jobs = [program.jobs() for program in programs]
    total = sum(map(len, jobs))
    binaries = iter(compile_jobs([job for of_one in jobs for job in of_one], processes, lambda done: told(done, total)))
    return [p.built(islice(binaries, len(of_one))) for p, of_one in zip(programs, jobs, strict=True)]


def plan_experts(spec: Spec, device: Device, low: int, high: int) -> PlannedProgram:
    """The kernels of a layer for calls of ``low`` to ``high`` tokens."""
    file = write_experts(spec)
    wanted: dict[Call, Expected | None] = {}
    tokens = rounded_up(max(1, low))
    while True:
        planned = plan_launch(spec, tokens, device)
        for count in sorted({max(1, low, tokens // 2 + 1), tokens}):  # sorting depends on the number itself
            found = calls(spec, planned.launch, count, file)
            wanted |= {call: expected(call, found, planned) for call in found}
        if tokens >= high:
            break
        tokens *= 2
    launches = tuple(schedule(spec, device, low, high))
    return PlannedProgram(_name("experts", file.text, spec), file, launches, wanted, device)


def expected(call: Call, together: Sequence[Call], planned: Planned) -> Expected | None:
    """A kernel's part of a plan; None where the plan has no such step (row functions; what was measured as a whole).

    Args:
        call: The kernel's launch.
        together: All launches of the layer.
        planned: The plan that they follow.
    """
    step = STEPS.get(call.kernel)
    sharing = sum(STEPS.get(c.kernel) == step for c in together)
    for name, seconds, limit in planned.parts:
        if name == step:
            return Expected(planned.tokens, seconds / sharing, limit / sharing)
    return None


def plan_route(op: Op, device: Device, high: int) -> PlannedProgram:
    """A router; one kernel serves all numbers of tokens, which is expected to read and write at full speed.

    Raises:
        UnsupportedError: There is no kernel for the router.
    """
    router = read_router(op)
    file = write_router(router)
    declared = file.kernels["route"].arguments
    whole = router.experts % 16 == 0
    aligned = frozenset(a.name for a in declared if a.type.startswith("*") or (a.name == "logits_s" and whole))
    call = Call("route", (("BLOCK_T", tokens_of_a_program(router)),), ROUTE_WARPS, ROUTE_STAGES, aligned)
    row = router.experts * ITEM_BYTES[router.logit] + router.k * (ITEM_BYTES[router.out] + 8)
    seconds = high * row / device.target.memory_bandwidth
    wanted = {call: Expected(high, seconds + LAUNCH_SECONDS, seconds)}
    return PlannedProgram(_name("route", file.text, router), file, (), wanted, device)


def spec_of(op: Op, up_nk: bool, down_nk: bool) -> Spec:
    """The layer of an op, with weights that lie so in memory."""
    return read_spec(op).lying(up_nk, down_nk)


def _name(kind: str, text: str, of: object) -> str:
    return f"{kind}_{hashlib.sha256(f'{text}{of!r}'.encode()).hexdigest()[:16]}"
