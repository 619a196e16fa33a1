"""Writing an artifact for a GPU: IR, kernels with what they take, and weights."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.export.graph_signature import InputKind

from moec import __version__
from moec.aot.behind import Behind
from moec.aot.blob import ALIGN, write_blob
from moec.aot.checkpoint import Stored
from moec.aot.code import Constant
from moec.aot.errors import AotError
from moec.aot.licences import KERNELS as KERNELS_LICENCE
from moec.aot.licences import licences_of
from moec.aot.source import Source, State
from moec.aot.spec import entry_spec
from moec.aot.whole import write_whole
from moec.artifact import manifest as m
from moec.artifact.gpu import KERNELS, KIND, folder_of
from moec.artifact.packing import Pack
from moec.artifact.weights import NAMES
from moec.backends.triton.compiled.built import BuiltProgram
from moec.options import CompileOptions
from moec.passes.pipeline_text import format_pipeline
from moec.passes.registry import parse_pipeline

if TYPE_CHECKING:
    from moec.aot.gpu import GpuEntry, Kernels

WEIGHTS = "weights.bin"
Add = Callable[[str, bytes], None]


@dataclass(frozen=True)
class GpuParts:
    """Everything that goes into an artifact for a GPU; ``places`` says where weights lie that ``state`` has not.

    ``state`` is None where weights are left out.
    """

    source: Source
    options: CompileOptions
    entries: Mapping[str, GpuEntry]
    kernels: Kernels
    state: State | None
    dims: tuple[str, ...] = ()
    generate: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    places: Mapping[str, tuple[Stored, ...]] = field(default_factory=dict)


def write_gpu_artifact(path: Path, parts: GpuParts, told: Callable[[str], None] = lambda _: None) -> int:
    """Write the artifact ``path``; returns its size in bytes.

    Raises:
        AotError: The disk is full, or the folder cannot be written to. What was written is removed.
    """
    return write_whole(path, lambda pack, file: _write_members(pack, file, parts, told))


def _write_members(pack: Pack, file: Behind, parts: GpuParts, told: Callable[[str], None]) -> m.Manifest:
    members: dict[str, m.Member] = {}

    def add(name: str, data: bytes) -> None:
        pack.add(name, data)
        members[name] = m.Member(len(data), hashlib.sha256(data).hexdigest())

    for name, entry in parts.entries.items():
        add(f"ir/{name}.before.moe", entry.before.encode())
        add(f"ir/{name}.after.moe", entry.after.encode())
    licences = (KERNELS_LICENCE,) if parts.state is None else licences_of(parts.source, add, ())
    target = parts.kernels.target
    programs = [_add_program(add, parts.kernels, built) for built in parts.kernels.built.values()]
    calls = {name: list(entry.programs) for name, entry in parts.entries.items()}
    kernels = f"{folder_of(target)}/{KERNELS}"
    add(kernels, (json.dumps({"target": target, "programs": programs, "calls": calls}, indent=1) + "\n").encode())
    weights, constants, layout = _layout(parts)
    if parts.state is not None:
        told("weights")
        with pack.member(WEIGHTS) as member, file.hashed() as digest:
            write_blob(member, layout, parts.state, parts.places)
        members[WEIGHTS] = m.Member(sum(c.size for c in layout), digest.hexdigest())
        weights.files["inside"] = m.File(WEIGHTS, "", members[WEIGHTS].size, "")
    return m.Manifest(
        moec_version=__version__,
        torch_version=torch.__version__,
        target=target,
        model=parts.source.text,
        passes=format_pipeline(parse_pipeline(parts.options.passes)),
        options={"weights": weights.where},
        entries={name: entry_spec(entry.program, parts.dims) for name, entry in parts.entries.items()},
        blobs=(m.Blob(target, KIND, kernels, constants),),
        weights=weights,
        members=members,
        licences=licences,
        generate=dict(parts.generate),
    )


def _add_program(add: Add, kernels: Kernels, built: BuiltProgram) -> dict[str, Any]:
    """The members of a program, and what the list of programs says of it."""
    folder = f"{folder_of(kernels.target)}/{built.name}"
    kind = "hsaco" if kernels.target.startswith("hip") else "cubin"
    assembly = "amdgcn" if kind == "hsaco" else "ptx"
    add(f"{folder}/program.moe", kernels.texts[built.name].encode())
    add(f"{folder}/kernels.py", built.text.encode())
    places, counts = {}, dict.fromkeys((k.call.kernel for k in built.kernels), 0)
    for i, kernel in enumerate(built.kernels):
        name = f"{folder}/{kernel.call.kernel}.{counts[kernel.call.kernel]}"
        counts[kernel.call.kernel] += 1
        places[i] = f"{name}.{kind}", f"{name}.{assembly}"
        add(places[i][0], kernel.binary.code)
        add(places[i][1], kernel.binary.assembly.encode())
        add(f"{name}.ttgir", kernel.binary.ttgir.encode())
    up_nk, down_nk = kernels.forms[built.name]
    return {
        **built.describe(places),
        "program": f"{folder}/program.moe",
        "source": f"{folder}/kernels.py",
        "up_nk": up_nk,
        "down_nk": down_nk,
    }


def _layout(parts: GpuParts) -> tuple[m.Weights, dict[str, dict[str, str]], list[Constant]]:
    """Where every weight lies, and which one an entry's argument is."""
    weights, constants = m.Weights("inside" if parts.state is not None else "none"), {}
    made: list[Constant] = []
    offset = 0
    for name, entry in parts.entries.items():
        taken: dict[str, str] = {}
        nodes = {n.name: n for n in entry.program.graph.nodes}
        for spec in entry.program.graph_signature.input_specs:
            if spec.kind is InputKind.USER_INPUT:
                continue
            value = nodes[spec.arg.name].meta.get("val")
            if spec.target is None or not isinstance(value, Tensor):
                raise AotError(f"the program takes {spec.arg.name}, which is no tensor")
            taken[spec.arg.name] = spec.target
            if spec.target in weights.tensors:
                continue
            dtype, shape, stride = NAMES[value.dtype], tuple(map(int, value.shape)), tuple(map(int, value.stride()))
            last = sum((n - 1) * s for n, s in zip(shape, stride, strict=True)) if all(shape) else -1
            size = -(-(last + 1) * value.dtype.itemsize // ALIGN) * ALIGN
            made.append(Constant(spec.target, dtype, shape, stride, offset, size))
            weights.tensors[spec.target] = m.Tensor(dtype, shape, stride, "inside", offset, size)
            offset += size
        constants[name] = taken
    return weights, constants, made
