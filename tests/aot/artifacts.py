"""Artifacts for tests: real ones of small models, and made-up ones whose code is never run."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from moec.aot.build import AotOptions, Built, build
from moec.aot.source import Source, Tokens, for_experts
from moec.artifact import manifest as m
from moec.artifact.archive import MANIFEST, aligned_member
from moec.cache import cache_dir
from moec.options import CompileOptions
from tests.support import models

RANGES = {"batch": (1, 8), "seq": (1, 64)}
SHAPES = ((1, 1), (2, 12), (3, 40))
TOLERANCE = 5e-6  # fp32: re-association inside GEMMs, over two layers
PACKAGE = "cpu/model.pt2"


def compiled(name: str, to: Path, layers: int = 2) -> tuple[torch.nn.Module, Built]:
    """A small model of a family in eager form, and its artifact at ``to``."""
    model = Tokens(for_experts(models.build(name, layers=layers))).eval()
    source = Source(name, model, (models.inputs(name, 2, 12)["input_ids"],))
    with (cache_dir() / f"{name}.lock").open("w") as lock:  # whoever comes second finds the code in the cache
        fcntl.flock(lock, fcntl.LOCK_EX)
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
import numpy as np, torch
model = torch._inductor.aoti_load_package(sys.argv[1])
for path in sys.argv[2:]:
    np.save(path + ".out.npy", model(torch.from_numpy(np.load(path))).numpy())
assert not {"moec", "transformers", "safetensors"} & set(sys.modules), "more than torch was imported"
"""


def run_alone(package: Path, inputs: list[torch.Tensor], folder: Path, **env: str) -> list[torch.Tensor]:
    """Outputs of a package in a process that imports torch and nothing of moec or transformers."""
    paths = [folder / f"{i}.npy" for i in range(len(inputs))]
    for path, value in zip(paths, inputs, strict=True):
        np.save(path, value.numpy())
    clean = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "MOEC_CACHE_DIR")}
    command = [sys.executable, "-c", _ALONE, str(package), *map(str, paths)]
    made = subprocess.run(
        command, cwd=folder, env={**clean, "OMP_NUM_THREADS": "1", **env}, capture_output=True, text=True
    )
    assert made.returncode == 0, made.stderr
    return [torch.from_numpy(np.load(f"{path}.out.npy")) for path in paths]


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
