"""Running an artifact on a GPU: its IR op by op with PyTorch's operations, its MoE layers by the kernels it holds.

Without a GPU, and with ``TRITON_INTERPRET=1``, the Python file of the kernels runs in Triton's interpreter instead.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from moec.artifact.archive import Archive
from moec.artifact.errors import ArtifactError
from moec.artifact.manifest import Blob
from moec.backends.base import Kernel, program_op
from moec.backends.reference import run_graph
from moec.backends.registry import get_backend
from moec.backends.triton.compiled.driver import driver
from moec.backends.triton.compiled.prebuilt import (
    Launches,
    Prebuilt,
    PrebuiltExperts,
    PrebuiltRoute,
    read_kernel,
    read_launch,
)
from moec.backends.triton.launcher import on_device_of, target_of
from moec.backends.triton.module import interpreted
from moec.backends.triton.spec import read_spec
from moec.ir.attributes import ListAttr, Literal
from moec.ir.core import Graph, Op
from moec.ir.parser import parse_graph
from moec.runtime.programs import program_graph

KIND = "triton"
"""Of a blob."""
KERNELS = "kernels.json"
"""The member that lists programs and kernels, in the folder of the target."""


def folder_of(target: str) -> str:
    """Where the members of a target lie: ``cuda-sm90``."""
    return target.replace(":", "-")


def read_kernels(archive: Archive, blob: Blob) -> dict[str, Any]:
    """What an artifact says of its kernels.

    Raises:
        ArtifactError: The list cannot be read, or names a member that is missing.
    """
    try:
        told: dict[str, Any] = json.loads(archive.read(blob.member))
        for program in told["programs"]:
            named = [program["program"], program["source"]]
            for name in [*named, *(k[part] for k in program["kernels"] for part in ("code", "assembly"))]:
                if name not in archive.manifest.members:
                    raise ArtifactError(f"{archive.path} lacks {name}, which its list of kernels names", hint=_AGAIN)
    except (ValueError, KeyError, TypeError) as error:
        raise ArtifactError(f"{archive.path}: the list of kernels is damaged: {error!r}", hint=_AGAIN) from error
    return told


def device_for(blob: Blob, path: object) -> torch.device:
    """Where the code of a blob runs.

    Raises:
        ArtifactError: No such device is here.
    """
    if torch.cuda.is_available():
        device = torch.device("cuda", torch.cuda.current_device())
        if (here := target_of(device)) != blob.target:
            raise ArtifactError(
                f"{path} holds kernels for {blob.target}, and this GPU is {here}",
                hint=f"compile the model again with --target {here}",
            )
        return device
    if interpreted():
        return torch.device("cpu")
    raise ArtifactError(
        f"{path} holds kernels for {blob.target}, and this machine has no GPU that PyTorch can use",
        hint="TRITON_INTERPRET=1 runs them on the CPU, slowly, in Triton's interpreter",
    )


class GpuEntryRunner:
    """An entry of an artifact.

    Args:
        graph: Its IR.
        constants: Which weight an argument is.
        weights: By name, on the device.
        kernels: Of the moe dialect's ops, in order; None for one that PyTorch's operations run.
        device: Where it runs.
    """

    def __init__(
        self, graph: Graph, constants: Mapping[str, str], weights: Mapping[str, Tensor],
        kernels: Sequence[Kernel | None], device: torch.device,
    ) -> None:  # fmt: skip
        self.graph, self.device = graph, device
        self._given = [weights[constants[a.name]] if a.name in constants else None for a in graph.args]
        ops = [op for op in graph.ops if op.dialect == "moe"]
        self._kernels = {op: kernel or _by_torch(op) for op, kernel in zip(ops, kernels, strict=True)}
        for op in graph.walk():
            op.attrs = _on_device(op.attrs, str(device))

    def boxed_run(self, inputs: list[Tensor]) -> list[Tensor]:
        """Run it; inputs are brought to the device, results stay there."""
        given = iter(inputs)
        values = [w if w is not None else next(given).to(self.device) for w in self._given]
        with torch.no_grad():
            return run_graph(self.graph, values, self._execute)

    def _execute(self, op: Op, values: Sequence[Any]) -> list[Any] | None:
        kernel = self._kernels.get(op)
        return None if kernel is None else kernel.forward(list(values))


def load_runners(archive: Archive, blob: Blob, weights: Mapping[str, Tensor]) -> dict[str, GpuEntryRunner]:
    """The entries of a blob, ready to run.

    Raises:
        MoecError: No such device is here, or the artifact is damaged.
    """
    device = device_for(blob, archive.path)
    told = read_kernels(archive, blob)
    launches = driver(blob.target.partition(":")[0]) if device.type == "cuda" else None
    programs = {p["name"]: _kernel(archive, p, launches) for p in told["programs"]}
    moved = {name: weight.to(device) for name, weight in weights.items()}
    runners = {}
    for name, constants in blob.entries.items():
        graph = parse_graph(archive.read(f"ir/{name}.after.moe").decode())
        with on_device_of(next(iter(moved.values()), torch.empty(0))):
            kernels = [programs[p] if p else None for p in told["calls"][name]]
            runners[name] = GpuEntryRunner(graph, constants, moved, kernels, device)
    return runners


def _by_torch(op: Op) -> Kernel:
    """An op that there is no kernel for, by PyTorch's operations."""
    backend = get_backend("aten")
    return backend.load(backend.lower(program_graph(op), "cpu"))


def _kernel(archive: Archive, told: Mapping[str, Any], launches: Launches | None) -> Kernel:
    """A program's kernel: binaries where there is a driver, else its Python file in the interpreter."""
    graph = parse_graph(archive.read(told["program"]).decode())
    op = program_op(graph)
    if launches is None:
        backend = get_backend("triton")
        return backend.load(backend.lower(graph, "cpu"))
    kernels = [_prebuilt(archive, k) for k in told["kernels"]]
    if op.name == "moe.route":
        return PrebuiltRoute(graph, op, kernels, launches)
    lying = read_spec(op).lying(told["up_nk"], told["down_nk"])
    return PrebuiltExperts(op, lying, [read_launch(p) for p in told["launches"]], kernels, launches)


def _prebuilt(archive: Archive, told: Mapping[str, Any]) -> Prebuilt:
    code = archive.read(told["code"])
    return read_kernel(told, lambda: code)


def _on_device(tree: Any, device: str) -> Any:
    """Attributes with every device replaced by ``device``."""
    if isinstance(tree, Literal) and tree.kind == "device":
        return Literal("device", device)
    if isinstance(tree, ListAttr):
        return ListAttr(tuple(_on_device(v, device) for v in tree.items))
    if isinstance(tree, dict):
        return {k: _on_device(v, device) for k, v in tree.items()}
    if isinstance(tree, tuple):
        return tuple(_on_device(v, device) for v in tree)
    return tree


_AGAIN = "the file is damaged or was edited: copy it again, or compile the model again"
