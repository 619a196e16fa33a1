"""The example: a step with overlap and regrouped tokens has the bits of the step without, and touches fewer experts."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch.distributed as dist

from moec.backends.cpu.build import compiler

if not (dist.is_available() and dist.is_gloo_available()):
    pytest.skip("this build of torch has no gloo", allow_module_level=True)

from examples import micro_batches
from tests.support.gloo import on_gloo
from tests.support.processes import run_processes

pytestmark = [
    pytest.mark.slow,  # two processes start, and compile four models
    pytest.mark.skipif(compiler() is None, reason="the cpu backend needs a C++ compiler"),
]

RANKS = 2
DEADLINE = 400.0


def main(rank: int, folder: str) -> None:
    on_gloo(rank, folder, RANKS, lambda: micro_batches.main(inner="eager"), seconds=200)


def test_the_bits_of_a_step_without(tmp_path: Path) -> None:
    for found in run_processes(main, RANKS, tmp_path, DEADLINE):
        assert "error" not in found, found["error"]
        assert found.keys() == {"mixtral", "deepseek_v3"}
        for result in found.values():
            assert all(result[what] for what in ("logits", "loss", "gradients", "step"))
            without, with_ = result["experts"]
            assert with_ < 0.85 * without
