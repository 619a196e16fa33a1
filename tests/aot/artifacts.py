"""Artifacts for tests: real ones of small models, and made-up ones whose code is never run."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import subprocess
import venv
import zipfile
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from moec.aot.build import AotOptions, Built, build
from moec.aot.source import Source, Tokens, for_experts
from moec.artifact import manifest as m
from moec.artifact.archive import MANIFEST, aligned_member
from moec.cache import cache_dir
from moec.options import CompileOptions
from tests.support import models

ROOT = Path(__file__).resolve().parents[2]
RANGES = {"batch": (1, 8), "seq": (1, 64)}
SHAPES = ((1, 1), (2, 12), (3, 40))
TOLERANCE = 5e-6  # fp32: re-association inside GEMMs, over two layers
PACKAGE = "cpu/model.pt2"


def compiled(name: str, to: Path, layers: int = 2) -> tuple[torch.nn.Module, Built]:
    """A small model of a family in eager form, and its artifact at ``to``."""
    model = Tokens(for_experts(models.build(name, layers=layers))).eval()
    source = Source(name, model, (models.inputs(name, 2, 12)["input_ids"],))
    return model, build(source, to, AotOptions(CompileOptions(checks="off"), RANGES))


def expected(name: str, model: torch.nn.Module) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Tokens and eager logits at several batch sizes and lengths."""
    found = []
    for batch, seq in SHAPES:
        tokens = models.inputs(name, batch, seq, seed=batch)["input_ids"]
        with torch.no_grad():
            found.append((tokens, model(tokens)))
    return found


_ALONE = """
import sys
import torch
model = torch._inductor.aoti_load_package(sys.argv[1])
for path in sys.argv[2:]:
    torch.save(model(torch.load(path)), path + ".out")
for name in ("moec", "transformers", "safetensors", "numpy"):
    try:
        __import__(name)
    except ImportError:
        continue
    sys.exit(name + " is there: this environment holds more than torch")
"""


def torch_alone(folder: Path) -> Path:
    """The Python of a new environment that holds torch and what torch requires, and nothing else."""
    venv.create(folder, symlinks=True, with_pip=False)
    (packages,) = folder.glob("lib/python*/site-packages")
    wanted, seen = ["torch"], set()
    while wanted:
        name = canonicalize_name(wanted.pop())
        if name in seen:
            continue
        seen.add(name)
        found = metadata.distribution(name)
        for top in {Path(f).parts[0] for f in found.files or () if not str(f).startswith("..")} - {"__pycache__"}:
            (packages / top).symlink_to(found.locate_file(top))
        for text in found.requires or ():
            needed = Requirement(text)
            if needed.marker is None or needed.marker.evaluate({"extra": ""}):
                wanted.append(needed.name)
    return folder / "bin" / "python"


def run_alone(python: Path, package: Path, inputs: list[torch.Tensor], folder: Path, **env: str) -> list[torch.Tensor]:
    """Outputs of a package in a process of ``python``, an environment that holds torch alone."""
    paths = [folder / f"{i}.pt" for i in range(len(inputs))]
    for path, value in zip(paths, inputs, strict=True):
        torch.save(value, path)
    clean = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "MOEC_CACHE_DIR")}
    command = [str(python), "-c", _ALONE, str(package), *map(str, paths)]
    made = subprocess.run(
        command, cwd=folder, env={**clean, "OMP_NUM_THREADS": "1", **env}, capture_output=True, text=True
    )
    assert made.returncode == 0, made.stderr
    return [torch.load(f"{path}.out") for path in paths]


def cpp_example() -> Path:
    """The C++ example as docs/aot.md says how to build it; the first worker that asks builds it."""
    made = cache_dir() / "run_artifact"
    with (cache_dir() / "run_artifact.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not made.exists():
            here = Path(torch.__file__).parent
            flags = [f"-I{here}/include", f"-I{here}/include/torch/csrc/api/include", f"-L{here}/lib"]
            flags += [f"-Wl,-rpath,{here}/lib", "-Wl,--no-as-needed", "-ltorch", "-ltorch_cpu", "-lc10"]
            source = ROOT / "examples" / "cpp" / "run_artifact.cpp"
            command = ["g++", "-std=c++20", "-O0", str(source), "-o", str(made), *flags]
            done = subprocess.run(command, capture_output=True, text=True)
            assert done.returncode == 0, done.stderr
    return made


def run_cpp(program: Path, package: Path, tokens: torch.Tensor, folder: Path) -> tuple[list[int], torch.Tensor]:
    """What the C++ example prints, the likeliest next tokens, and the logits that it writes, flat."""
    rows = [",".join(map(str, row)) for row in tokens.tolist()]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "MOEC_OUTPUT": str(folder / "logits")}
    made = subprocess.run([str(program), str(package), *rows], env=env, capture_output=True, text=True)
    assert made.returncode == 0, made.stderr
    return [int(line) for line in made.stdout.split()], torch.from_numpy(np.fromfile(folder / "logits", np.float32))


def forged(path: Path, change: Any = None, extra: dict[str, bytes] | None = None, version: int = 1) -> Path:
    """An artifact whose parts are in order but whose code is no code; ``change`` edits the manifest's JSON."""
    code = b"no code"
    manifest = m.Manifest(
        moec_version="0.1.0",
        torch_version="2.13.0",
        target="cpu",
        model="made up",
        passes="default",
        options={},
        entries={"model": m.Entry((m.TensorSpec("x", "f32", ("batch", 4)),), (), {"batch": (1, 8)})},
        blobs=(m.Blob("cpu", "aotinductor", PACKAGE, {"model": {}}),),
        weights=m.Weights("inside"),
        members={PACKAGE: m.Member(len(code), hashlib.sha256(code).hexdigest())},
    )
    tree = json.loads(manifest.to_json()) | {"format_version": version}
    if change is not None:
        change(tree)
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in {PACKAGE: code, **(extra or {})}.items():
            with aligned_member(archive, name) as member:
                member.write(data)
        archive.writestr(MANIFEST, json.dumps(tree))
    return path
