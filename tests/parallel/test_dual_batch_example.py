"""The example: a step whose micro-batches take turns has the bits of the step that runs them one after the other."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch.distributed as dist

if not (dist.is_available() and dist.is_gloo_available()):
    pytest.skip("this build of torch has no gloo", allow_module_level=True)

from examples import dual_batch
from tests.support.gloo import on_gloo
from tests.support.processes import run_processes

pytestmark = pytest.mark.slow  # two processes start, and compile four models

RANKS = 2
DEADLINE = 400.0
LAYERS = {"mixtral": 2, "deepseek_v3": 1}


def main(rank: int, folder: str) -> None:
    on_gloo(rank, folder, RANKS, lambda: dual_batch.main(**dual_batch.QUICK), seconds=200)


def test_the_bits_of_a_step_in_turn(tmp_path: Path) -> None:
    for found in run_processes(main, RANKS, tmp_path, DEADLINE):
        assert "error" not in found, found["error"]
        assert found.keys() == LAYERS.keys()
        for name, result in found.items():
            assert all(result[what] for what in ("logits", "loss", "gradients", "step"))
            assert result["layers in pieces"] == [2 * LAYERS[name]] * 2
