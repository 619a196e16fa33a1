"""The example: a step with overlap and regrouped tokens has the bits of the step without, and touches fewer experts."""

from __future__ import annotations

import os
import traceback
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from moec.backends.cpu.build import compiler

if not (dist.is_available() and dist.is_gloo_available()):
    pytest.skip("this build of torch has no gloo", allow_module_level=True)

from examples import micro_batches
from tests.support.processes import run_processes

pytestmark = [
    pytest.mark.slow,  # two processes start, and compile four models
    pytest.mark.skipif(compiler() is None, reason="the cpu backend needs a C++ compiler"),
]

RANKS = 2
DEADLINE = 400.0


def main(rank: int, folder: str) -> None:
    store = dist.FileStore(f"{folder}/store", RANKS)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=RANKS, timeout=timedelta(seconds=200))
    try:
        found = micro_batches.main(inner="eager")
    except Exception:  # noqa: BLE001  (the failure is the result: the test shows it)
        found = {"error": {"text": traceback.format_exc()}}
    torch.save(found, Path(folder) / f"{rank}.pt")
    os._exit(0)


def test_the_bits_of_a_step_without(tmp_path: Path) -> None:
    for found in run_processes(main, RANKS, tmp_path, DEADLINE):
        assert "error" not in found, found["error"]["text"]
        assert found.keys() == {"mixtral", "deepseek_v3"}
        for result in found.values():
            assert all(result[what] for what in ("logits", "loss", "gradients", "step"))
            without, with_ = result["experts"]
            assert with_ < 0.85 * without
