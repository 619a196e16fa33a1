"""Running a program that was compiled ahead of time: the same calls as ever, their kernels already binaries.

Nothing is compiled, and Triton is not needed. Launches are those of the compile, whatever the device's own sizes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from moec.backends.aten import ExpertsKernel as AtenExperts
from moec.backends.triton.compiled.driver import DriverError, Function
from moec.backends.triton.compiled.plan import MOST_TOKENS, Call, call_of
from moec.backends.triton.kernel import TritonExperts
from moec.backends.triton.kernels.route import read_router, write_router
from moec.backends.triton.kernels.source import write_experts
from moec.backends.triton.kernels.text import KernelFile
from moec.backends.triton.launcher import LaunchKernel
from moec.backends.triton.launches.tiles import Launch, Tile
from moec.backends.triton.route import TritonRoute
from moec.backends.triton.spec import ALIGNED, Spec, read_spec
from moec.ir.core import Graph, Op


class Launches(Protocol):
    """What of a driver launches take."""

    def load(self, code: bytes, name: str, threads: int, shared: int) -> Function: ...

    def launch(
        self, function: Function, grid: Sequence[int], types: Sequence[str], values: Sequence[int | float],
        stream: int = 0, scratch: int = 0,
    ) -> None: ...  # fmt: skip


@dataclass(frozen=True)
class Prebuilt:
    """One kernel of an artifact.

    Attributes:
        call: The launch that it was compiled for.
        function: Its name in the code.
        threads, shared: Of a block.
        scratch: Bytes for each block of the grid.
        code: Brings the code object.
    """

    call: Call
    function: str
    threads: int
    shared: int
    scratch: int
    code: Callable[[], bytes]


def read_kernel(told: Mapping[str, Any], code: Callable[[], bytes]) -> Prebuilt:
    """A kernel from its JSON in an artifact."""
    constants = tuple((str(n), int(v)) for n, v in told["constants"].items())
    call = Call(told["name"], constants, told["warps"], told["stages"], frozenset(told["aligned"]))
    return Prebuilt(call, told["function"], told["threads"], told["shared"], told["scratch"], code)


def read_launch(told: Mapping[str, Any]) -> tuple[int, Launch]:
    """A launch from its JSON, and the most tokens it is for."""
    up, down = Tile(**told["up"]), Tile(**told["down"])
    return told["tokens"], Launch(told["form"], up, down, told["programs"], told["atomic"])


class PrebuiltLauncher:
    """A launcher whose kernels are binaries.

    Args:
        file: The kernels' declarations.
        kernels: The binaries.
        driver: Who loads and launches.
    """

    def __init__(self, file: KernelFile, kernels: Sequence[Prebuilt], driver: Launches) -> None:
        self.file, self._driver = file, driver
        self._kernels: dict[tuple[object, ...], list[Prebuilt]] = {}
        for kernel in kernels:
            self._kernels.setdefault(_key(kernel.call), []).append(kernel)
        self._loaded: dict[Prebuilt, Function] = {}

    def __call__(
        self, name: str, tokens: int, arguments: Mapping[str, Any], constants: Mapping[str, int], *,
        num_warps: int = 4, num_stages: int = 3,
    ) -> None:  # fmt: skip
        """Launch a kernel, as ``moec.backends.triton.launcher.Launcher`` does.

        Raises:
            DriverError: The artifact holds no such kernel, or none for tensors that lie so.
        """
        declared = self.file.kernels[name]
        call = call_of(declared.arguments, declared.constants, name, arguments, constants, num_warps, num_stages)
        fitting = [k for k in self._kernels.get(_key(call), ()) if k.call.aligned <= call.aligned]
        if not fitting:
            raise DriverError(
                f"the artifact holds no kernel {name} with {dict(call.constants)} for tensors that lie so",
                hint="weights have to lie as they did when it was compiled; compile the model again",
            )
        kernel = max(fitting, key=lambda k: len(k.call.aligned))
        if kernel not in self._loaded:
            self._loaded[kernel] = self._driver.load(kernel.code(), kernel.function, kernel.threads, kernel.shared)
        grid = declared.grid(tokens, constants)
        given = [arguments[a.name] for a in declared.arguments]
        device = next(v.device for v in given if isinstance(v, Tensor))
        blocks = 1
        for size in grid:
            blocks *= size
        scratch = torch.empty(kernel.scratch * blocks, dtype=torch.uint8, device=device) if kernel.scratch else None
        self._driver.launch(
            self._loaded[kernel], grid, [a.type for a in declared.arguments],
            [v.data_ptr() if isinstance(v, Tensor) else v for v in given],
            stream=torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0,
            scratch=0 if scratch is None else scratch.data_ptr(),
        )  # fmt: skip


def _key(call: Call) -> tuple[object, ...]:
    return call.kernel, call.constants, call.warps, call.stages


class PrebuiltExperts(TritonExperts):
    """A layer whose kernels are binaries.

    Args:
        op: The program's op.
        lying: The layer, its weights as they lie.
        launches: (most tokens, launch) pairs, ascending.
        kernels: The binaries.
        driver: Who loads and launches.
    """

    def __init__(
        self, op: Op, lying: Spec, launches: Sequence[tuple[int, Launch]], kernels: Sequence[Prebuilt], driver: Launches
    ) -> None:
        self.spec, self.target, self._lying = read_spec(op), "", lying
        self.aten = AtenExperts(op)
        self.tables = {}
        self._launches = list(launches)
        self._launcher = PrebuiltLauncher(write_experts(lying), kernels, driver)

    def forward(self, inputs: list[Tensor]) -> list[Tensor]:
        return super().forward([*map(_plain, inputs[:3]), *inputs[3:]])

    def launch(self, spec: Spec, tokens: int, device: torch.device) -> Launch:
        if spec != self._lying:
            raise DriverError("the weights lie in memory otherwise than the kernels were compiled for")
        for most, launch in self._launches:
            if tokens <= most:
                return launch
        most, launch = self._launches[-1]
        if most >= MOST_TOKENS:
            return launch
        raise DriverError(
            f"a call has {tokens} tokens, and the artifact was compiled for {most} at most",
            hint="compile it again with a larger --dynamic",
        )

    def launcher(self, spec: Spec) -> LaunchKernel:
        return self._launcher


class PrebuiltRoute(TritonRoute):
    """A router whose kernel is a binary."""

    def __init__(self, graph: Graph, op: Op, kernels: Sequence[Prebuilt], driver: Launches) -> None:
        router = read_router(op)
        super().__init__(graph, router, PrebuiltLauncher(write_router(router), kernels, driver))

    def forward(self, inputs: list[Tensor]) -> list[Tensor]:
        return super().forward([_plain(inputs[0]), *inputs[1:]])


def _plain(t: Tensor) -> Tensor:
    """``t`` as binaries count on it: without gaps, from an aligned address on. A view of a wider tensor is copied."""
    return t if t.is_contiguous() and not t.data_ptr() % ALIGNED else t.clone(memory_format=torch.contiguous_format)
