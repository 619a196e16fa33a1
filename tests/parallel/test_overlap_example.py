"""The example: a step with overlap has the bits of the step without, and sends in more pieces."""

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

from examples import overlap
from examples.expert_parallel import QUICK
from tests.support.processes import run_processes

pytestmark = pytest.mark.slow  # two processes start, and compile four models

RANKS = 2
DEADLINE = 240.0
WHOLE = 2 * 3 + 6  # all-to-alls of a layer in two forwards and a backward: counts, there and back
CUT = 2 * (1 + 2 * 2) + (1 + 2 * 5)  # the same in two chunks; counts travel once


def main(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    store = dist.FileStore(f"{folder}/store", RANKS)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=RANKS, timeout=timedelta(seconds=90))
    try:
        found = overlap.main(**QUICK)
    except Exception:  # noqa: BLE001  (the failure is the result: the test shows it)
        found = {"error": {"text": traceback.format_exc()}}
    torch.save(found, Path(folder) / f"{rank}.pt")
    os._exit(0)


def test_the_bits_of_a_step_without(tmp_path: Path) -> None:
    layers = {"mixtral": 2, "deepseek_v3": 1}
    for found in run_processes(main, RANKS, tmp_path, DEADLINE):
        assert "error" not in found, found["error"]["text"]
        assert found.keys() == layers.keys()
        for name, result in found.items():
            assert result["logits"] and result["step"]
            without, with_ = result["sends"]
            assert with_ - without == layers[name] * (CUT - WHOLE)
