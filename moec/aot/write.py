"""Writing an artifact for CPUs: IR, AOTInductor's package, and weights inside it or beside the artifact."""

from __future__ import annotations

import hashlib
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor
from torch.export import ExportedProgram

from moec import __version__
from moec.aot.behind import Behind
from moec.aot.beside import FileTable, put_tensor
from moec.aot.blob import write_blob
from moec.aot.checkpoint import Stored
from moec.aot.code import Code, Constant
from moec.aot.licences import licences_of
from moec.aot.source import Source, State
from moec.aot.spec import entry_spec
from moec.aot.whole import write_whole
from moec.artifact import manifest as m
from moec.artifact.packing import Pack
from moec.options import CompileOptions
from moec.passes.pipeline_text import format_pipeline
from moec.passes.registry import parse_pipeline

PACKAGE = "cpu/model.pt2"
_ROOT = "model"


@dataclass(frozen=True)
class EntryParts:
    """One entry: its program, its code, and its IR before and after the passes."""

    program: ExportedProgram
    code: Code
    before: str
    after: str


@dataclass(frozen=True)
class Parts:
    """Everything that goes into an artifact; ``places`` says where weights lie that ``state`` does not hold."""

    source: Source
    options: CompileOptions
    weights: str
    entries: Mapping[str, EntryParts]
    state: State
    dims: tuple[str, ...] = ()
    generate: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    places: Mapping[str, tuple[Stored, ...]] = field(default_factory=dict)


def write_artifact(path: Path, parts: Parts, told: Callable[[str], None] = lambda _: None) -> int:
    """Write the artifact ``path``; returns its size in bytes.

    Raises:
        AotError: The disk is full, or the folder cannot be written to. What was written is removed.
    """
    beside = FileTable(path.parent, told)
    return write_whole(path, lambda pack, file: _write_members(pack, file, parts, beside, told))


def _write_members(
    pack: Pack, file: Behind, parts: Parts, beside: FileTable, told: Callable[[str], None]
) -> m.Manifest:
    members: dict[str, m.Member] = {}

    def add(name: str, data: bytes) -> None:
        pack.add(name, data)
        members[name] = m.Member(len(data), hashlib.sha256(data).hexdigest())

    for name, entry in parts.entries.items():
        add(f"ir/{name}.before.moe", entry.before.encode())
        add(f"ir/{name}.after.moe", entry.after.encode())
    licences = licences_of(parts.source, add)
    told("weights")
    with pack.pack(PACKAGE) as package, file.hashed() as digest:
        weights, constants = _write_package(package, parts, beside)
        package.finish()
    members[PACKAGE] = m.Member(package.size, digest.hexdigest())
    return m.Manifest(
        moec_version=__version__,
        torch_version=torch.__version__,
        target=parts.options.target,
        model=parts.source.text,
        passes=format_pipeline(parse_pipeline(parts.options.passes)),
        options={"weights": parts.weights},
        entries={name: entry_spec(entry.program, parts.dims) for name, entry in parts.entries.items()},
        blobs=(m.Blob(parts.options.target, "aotinductor", PACKAGE, constants),),
        weights=weights,
        members=members,
        licences=licences,
        generate=dict(parts.generate),
    )


def _write_package(package: Pack, parts: Parts, beside: FileTable) -> tuple[m.Weights, dict[str, dict[str, str]]]:
    """AOTInductor's package. With weights inside, that of a single entry runs with torch alone as it is."""
    weights = m.Weights(parts.weights)
    constants: dict[str, dict[str, str]] = {}
    first = next(iter(parts.entries))
    blob_name = f"{_ROOT}/data/aotinductor/{first}/{parts.entries[first].code.blob}"
    for name, entry in parts.entries.items():
        with zipfile.ZipFile(entry.code.path) as code:
            for info in code.infolist():
                kind, _, short = info.filename.partition("/")
                if kind == "frame" and name == first:
                    package.add(f"{_ROOT}/{short}", code.read(info))
                elif kind == "code":
                    package.add(f"{_ROOT}/data/aotinductor/{name}/{short}", code.read(info))
    layout = _layout(parts, weights, constants, beside)
    size = sum(c.size for c in layout)
    with package.member(blob_name) as member:
        write_blob(member, layout, _values(parts), parts.places)
    weights.files["inside"] = m.File(f"{PACKAGE}!{blob_name}", "", size, "")
    weights.files.update(beside.files)
    return weights, constants


def _key(entry: str, constant: Constant, parts: Parts) -> str:
    """The weight that a constant is: parameters and buffers are the model's, whatever entry takes them."""
    if len(parts.entries) == 1 or constant.name in parts.entries[entry].program.state_dict:
        return constant.name
    return f"{entry}/{constant.name}"


def _layout(
    parts: Parts, weights: m.Weights, constants: dict[str, dict[str, str]], beside: FileTable
) -> list[Constant]:
    """The blob: the first entry's constants as its code wants them, then what others take besides."""
    made: list[Constant] = []
    offset = 0
    for name, entry in parts.entries.items():
        constants[name] = {}
        for c in entry.code.constants:
            key = constants[name][c.name] = _key(name, c, parts)
            if key in weights.tensors or key in weights.tables:
                continue
            if key in parts.places and parts.weights == "beside":
                put_tensor(weights, key, c, parts.places[key], beside)
                continue
            made.append(Constant(key, c.dtype, c.shape, c.stride, offset, c.size))
            weights.tensors[key] = m.Tensor(c.dtype, c.shape, c.stride, "inside", offset, c.size)
            offset += c.size
    return made


def _values(parts: Parts) -> State:
    values = dict(parts.state)
    for name, entry in parts.entries.items():
        values |= {f"{name}/{k}": v for k, v in entry.program.constants.items() if isinstance(v, Tensor)}
    return values
