"""The example: a step whose micro-batches take turns has the bits of the step that runs them one after the other."""

from __future__ import annotations

import os
import traceback
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

if not (dist.is_available() and dist.is_gloo_available()):
    pytest.skip("this build of torch has no gloo", allow_module_level=True)

from examples import dual_batch
from tests.support.processes import run_processes

pytestmark = pytest.mark.slow  # two processes start, and compile four models

RANKS = 2
DEADLINE = 400.0
LAYERS = {"mixtral": 2, "deepseek_v3": 1}


def main(rank: int, folder: str) -> None:
    store = dist.FileStore(f"{folder}/store", RANKS)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=RANKS, timeout=timedelta(seconds=200))
    try:
        found = dual_batch.main(**dual_batch.QUICK)
    except Exception:  # noqa: BLE001  (the failure is the result: the test shows it)
        found = {"error": {"text": traceback.format_exc()}}
    torch.save(found, Path(folder) / f"{rank}.pt")
    os._exit(0)


def test_the_bits_of_a_step_in_turn(tmp_path: Path) -> None:
    for found in run_processes(main, RANKS, tmp_path, DEADLINE):
        assert "error" not in found, found["error"]["text"]
        assert found.keys() == LAYERS.keys()
        for name, result in found.items():
            assert all(result[what] for what in ("logits", "loss", "gradients", "step"))
            assert result["layers in pieces"] == [2 * LAYERS[name]] * 2
