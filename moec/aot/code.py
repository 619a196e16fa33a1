"""What AOTInductor makes of a program, without weights: its files, and where each constant belongs in a blob.

The code does not depend on the weights' values, so it is kept in the cache directory under a hash of the program:
compiling again with other weights takes it from there.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import tempfile
import zipfile
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch.export import ExportedProgram

from moec import __version__
from moec.aot.elf import set_weight_bytes
from moec.aot.inductor import compile_package, settings
from moec.aot.lowering import Embedding
from moec.cache import cache_dir

_FIELD = re.compile(r"^\s*constants_info_\[(\d+)\]\.(\w+) = (.*);$", re.MULTILINE)
_DTYPES = {
    "float64": "f64", "float32": "f32", "float16": "f16", "bfloat16": "bf16", "int64": "i64", "int32": "i32",
    "int16": "i16", "int8": "i8", "uint8": "u8", "bool": "bool", "float8_e4m3fn": "f8e4m3fn", "float8_e5m2": "f8e5m2",
}  # fmt: skip
_LAYOUT = "layout.json"


@dataclass(frozen=True)
class Constant:
    """A tensor that the code takes besides its inputs.

    Attributes:
        name: Of the parameter, buffer or constant in the exported program.
        offset, size: Bytes in the blob of weights.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int
    size: int


@dataclass(frozen=True)
class Code:
    """Compiled code of one entry.

    Attributes:
        path: A zip: under ``code/`` AOTInductor's files by their names below ``data/aotinductor/<entry>/``, under
            ``frame/`` what a package has besides.
        constants: In the order of the blob.
        blob: The name that the blob of weights must have among the files.
    """

    path: Path
    constants: tuple[Constant, ...]
    blob: str

    @property
    def bytes(self) -> int:
        """Of the blob of weights."""
        last = self.constants[-1] if self.constants else None
        return 0 if last is None else last.offset + last.size


def compile_code(program: ExportedProgram, embedding: Embedding, library: Path | None) -> tuple[Code, bool]:
    """The code of ``program``, from the cache where it is there.

    Returns:
        The code, and whether it was in the cache.

    Raises:
        InductorError: AOTInductor fails.
    """
    key = _key(program, embedding, library)
    path = cache_dir() / "aot" / f"{key}.zip"
    if path.exists():
        return _stored(path), True
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".build-") as folder:
        package, made = Path(folder) / "code.pt2", Path(folder) / "code.zip"
        compile_package(program, embedding, library, package)
        _strip(package, made, Path(folder))
        os.replace(made, path)
    return _stored(path), False


def _stored(path: Path) -> Code:
    with zipfile.ZipFile(path) as z:
        tree = json.loads(z.read(_LAYOUT))
    constants = tuple(
        Constant(**{**c, "shape": tuple(c["shape"]), "stride": tuple(c["stride"])}) for c in tree["constants"]
    )
    return Code(path, constants, tree["blob"])


def _strip(package: Path, to: Path, folder: Path) -> None:
    """Keep the library and its description; note the constants; tell the library how many bytes they have."""
    with zipfile.ZipFile(package) as z:
        names = {n.rpartition("/")[2]: n for n in z.namelist() if "/data/aotinductor/" in n}
        source = next(z.read(n).decode() for n in names.values() if n.endswith(".wrapper.cpp"))
        library = next(n for n in names if n.endswith(".so"))
        constants = _constants(source)
        code = folder / "library.so"
        code.write_bytes(z.read(names[library]))
        if constants:
            set_weight_bytes(code, constants[-1].offset + constants[-1].size)
        blob = library.removesuffix(".so") + "_weights.blob"
        with zipfile.ZipFile(to, "w") as out:
            for name in z.namelist():
                if "/data/" not in name:  # what makes a zip a package of torch's
                    out.writestr(f"frame/{name.partition('/')[2]}", z.read(name))
            out.writestr(f"code/{library}", code.read_bytes())
            for short, name in names.items():
                if short.endswith("_metadata.json"):
                    # The processor that compiled says nothing about those that may run: torch would warn on others.
                    kept = {k: v for k, v in json.loads(z.read(name)).items() if k != "AOTI_CPU_ISA"}
                    out.writestr(f"code/{short}", json.dumps(kept))
                elif short.endswith(".json"):
                    out.writestr(f"code/{short}", z.read(name))
            layout = {"constants": [asdict(c) for c in constants], "blob": blob}
            out.writestr(_LAYOUT, json.dumps(layout))


def _constants(source: str) -> list[Constant]:
    """The constants that generated C++ lists."""
    found: dict[int, dict[str, str]] = {}
    for number, name, value in _FIELD.findall(source):
        found.setdefault(int(number), {})[name] = value
    made: list[Constant] = []
    offset = 0
    for number in sorted(found):
        fields = found[number]
        size = int(fields["data_size"])
        made.append(
            Constant(
                name=json.loads(fields["original_fqn"]),
                dtype=_DTYPES[fields["dtype"].removeprefix("cached_torch_dtype_")],
                shape=_numbers(fields["shape"]),
                stride=_numbers(fields["stride"]),
                offset=offset,
                size=size,
            )
        )
        offset += size
    return made


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(n.strip().removesuffix("L")) for n in text.strip("{}").split(",") if n.strip())


def _key(program: ExportedProgram, embedding: Embedding, library: Path | None) -> str:
    """A hash over everything that the code depends on. Single numbers among the constants may be written into it."""
    digest = hashlib.sha256()

    def add(text: str) -> None:
        digest.update(len(text.encode()).to_bytes(8, "little") + text.encode())

    add(f"{__version__} {torch.__version__} {embedding.target}")
    add(library.name if library is not None else "")
    options = settings(embedding, library)
    options["aot_inductor.custom_ops_to_c_shims"] = sorted({*embedding.programs, *embedding.regions})
    add(str(sorted(options.items(), key=lambda item: item[0])))
    for module in program.graph_module.modules():
        if isinstance(module, torch.fx.GraphModule):
            add(str(module.graph))
            for node in module.graph.find_nodes(op="placeholder"):
                add(_described(node.meta.get("val")))
    add(str(program.graph_signature))
    add(str(sorted((str(k), str(v)) for k, v in program.range_constraints.items())))
    add(str(program.call_spec))
    for name, value in sorted({**program.state_dict, **program.constants}.items()):
        if isinstance(value, torch.Tensor):
            add(f"{name} {_described(value)} {value.tolist() if value.numel() == 1 else ''}")
    return digest.hexdigest()[:40]


def _described(value: object) -> str:
    if isinstance(value, torch.Tensor):
        return f"{value.dtype} {tuple(value.shape)} {tuple(value.stride())}"
    return str(value)
