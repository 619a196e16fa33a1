"""The example: Mixtral and DeepSeek-V3 on four ranks equal one process, and what they save loads on two."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch.distributed as dist

if not (dist.is_available() and dist.is_gloo_available()):
    pytest.skip("this build of torch has no gloo", allow_module_level=True)

from tests.parallel.example_ranks import four, two
from tests.support.processes import run_processes

pytestmark = pytest.mark.slow  # six processes start

SAME = 1e-5  # fp32, sums in another order
DEADLINE = 240.0


def test_four_ranks_then_two(tmp_path: Path) -> None:
    for found in run_processes(four, 4, tmp_path, DEADLINE):
        assert "error" not in found, found["error"]["text"]
        assert found.keys() == {"mixtral", "deepseek_v3"}
        for result in found.values():
            assert result["logits"] < SAME
            assert result["tokens"]
            assert result["step"] < SAME
        assert found["mixtral"]["share"] < 0.5 and found["deepseek_v3"]["share"] < 0.7
    for found in run_processes(two, 2, tmp_path, DEADLINE):
        assert "error" not in found, found["error"]["text"]
        for result in found.values():
            assert result["step"] < SAME
            assert result["logits"] < SAME
