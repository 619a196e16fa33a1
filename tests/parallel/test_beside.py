"""Shared experts inside their layers, through the compile door: the bits of a training step with them outside."""

from __future__ import annotations

import os
import traceback
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

if not (dist.is_available() and dist.is_gloo_available()):
    pytest.skip("this build of torch has no gloo", allow_module_level=True)

from torch.distributed.device_mesh import init_device_mesh
from transformers import Qwen2MoeConfig, Qwen2MoeForCausalLM

import moec
from examples.expert_parallel import MODELS, QUICK, SIZES, step
from moec.blocks import IN_BLOCK
from moec.runtime import counters
from tests.support.processes import run_processes

pytestmark = pytest.mark.slow  # two processes start, and compile four models

RANKS = 2
DEADLINE = 300.0


def qwen2_moe() -> Any:
    """Shared experts with a gate of each token's own, computed before the router."""
    config = Qwen2MoeConfig(
        **{**SIZES, "num_hidden_layers": 1}, num_key_value_heads=2, intermediate_size=96, moe_intermediate_size=48,
        num_experts=8, num_experts_per_tok=2, shared_expert_intermediate_size=64,
    )  # fmt: skip
    return Qwen2MoeForCausalLM(config)


FAMILIES = {"deepseek_v3": (MODELS["deepseek_v3"], 1), "qwen2_moe": (qwen2_moe, 1)}


def train(make: Any, plan: str, ids: torch.Tensor) -> dict[str, Any]:
    """Logits, parameters after a step, and what ran how often."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = make()
    moec.prepare(model, regions=False)
    moec.parallelize(model, init_device_mesh("cpu", (RANKS,)), plan)
    run = torch.compile(model, backend="moec", fullgraph=True, dynamic=True, options=QUICK)
    with moec.recording() as report:
        logits = run(input_ids=ids).logits.detach()
    counters.reset()
    step(model, run, ids)
    return {
        "logits": logits, "after": {n: p.to_local().detach() for n, p in model.named_parameters()},
        "ran": dict(counters.snapshot().by_name), "shared": [s.remarks for b in report.layers for s in b.shared],
    }  # fmt: skip


def main(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    store = dist.FileStore(f"{folder}/store", RANKS)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=RANKS, timeout=timedelta(seconds=90))
    ids = torch.randint(0, 256, (RANKS, 24), generator=torch.Generator().manual_seed(1))[rank : rank + 1].clone()
    found: dict[str, Any] = {}
    for name, (make, _) in FAMILIES.items():
        try:
            found[name] = [train(make, plan, ids) for plan in (f"ep={RANKS}", f"ep={RANKS},overlap=2")]
        except Exception:  # noqa: BLE001  (the failure is the result: the test shows it)
            found[name] = traceback.format_exc()
    torch.save(found, Path(folder) / f"{rank}.pt")
    os._exit(0)


def test_a_training_step_has_the_bits_of_the_step_with_shared_experts_outside(tmp_path: Path) -> None:
    for found in run_processes(main, RANKS, tmp_path, DEADLINE):
        for name, (_, layers) in FAMILIES.items():
            assert not isinstance(found[name], str), found[name]
            outside, inside = found[name]
            assert outside["ran"]["moec::experts"] == 2 * layers and "moec::experts_beside" not in outside["ran"]
            assert inside["ran"] == {
                **{k: v for k, v in outside["ran"].items() if not k.startswith("moec::experts")},
                "moec::experts_beside": layers, "moec::experts_beside_backward": layers,
            }  # fmt: skip
            assert all(IN_BLOCK in remarks for remarks in inside["shared"]) and len(inside["shared"]) == layers
            assert torch.equal(inside["logits"], outside["logits"])
            off = [n for n, p in inside["after"].items() if not torch.equal(p, outside["after"][n])]
            assert not off, f"{name}: other bits in {off}"
