"""A second process, with everything compiled lying in caches: it still explains and still runs the runtime ops."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
SECONDS = 240

SCRIPT = """
import json
import torch
from torch._dynamo.utils import counters as dynamo
torch.set_num_threads(1)
import moec
from moec.runtime import counters
from tests.compile.blocks import Block, Layers, tokens

model = Layers(Block(), Block(seed=1))
x = tokens(7)
compiled = torch.compile(model, backend="moec", fullgraph=True)
with moec.recording() as report:
    out = compiled(x)
    out.sum().backward()
explained = moec.explain(model, (x,))
print(json.dumps({
    "graphs": report.graphs,
    "fused": [b.fused for b in report.layers],
    "explained": [[b.name, b.fused, b.router] for b in explained.layers],
    "ran": counters.snapshot().by_name,
    "sum": out.sum().item(),
    "eager": model(x).sum().item(),
    "gradient": model.layers[0].down.grad.sum().item(),
    "hits": dynamo["aot_autograd"]["autograd_cache_hit"],
    "misses": dynamo["aot_autograd"]["autograd_cache_miss"],
}))
"""


def run(folder: Path) -> dict[str, Any]:
    env = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
        "TORCHINDUCTOR_CACHE_DIR": str(folder / "inductor"),
        "MOEC_CACHE_DIR": str(folder / "moec"),
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run(
        [sys.executable, "-W", "error::moec.MoecWarning", "-c", SCRIPT],
        env=env,
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=SECONDS,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
def test_second_process_with_warm_caches(tmp_path: Path) -> None:
    first, second = run(tmp_path), run(tmp_path)
    assert (first["hits"], first["misses"]) == (0, 1)
    assert (second["hits"], second["misses"]) == (1, 0)
    for told in (first, second):
        assert told["graphs"] == 1
        assert told["fused"] == [True, True]
        assert told["explained"] == [[f"layers.{i}", True, "softmax top-2"] for i in (0, 1)]
        # two blocks, run by the compiled model and once more by explain
        assert told["ran"]["moec::experts"] == told["ran"]["moec::route"] == 4
        assert told["ran"]["moec::experts_backward"] == told["ran"]["moec::route_backward"] == 2
        assert abs(told["sum"] - told["eager"]) < 1e-4
    assert second["sum"] == first["sum"]
    assert second["gradient"] == first["gradient"] != 0
