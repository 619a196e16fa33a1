"""Mixtral and DeepSeek-V3 (small) with their experts spread over processes; held against one process.

torchrun --standalone --nproc-per-node 4 -m examples.expert_parallel FOLDER      reads its shares, trains a step, saves
torchrun --standalone --nproc-per-node 2 -m examples.expert_parallel FOLDER      then loads on two what four have saved

With --full behind it, Inductor compiles what is around the experts, and these run on generated kernels, as is the
default elsewhere. For models this small that takes longer than it could ever save.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.device_mesh import init_device_mesh
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM, MixtralConfig, MixtralForCausalLM

import moec

SIZES = {"vocab_size": 256, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "use_cache": False}
MODELS: dict[str, Any] = {
    "mixtral": lambda: MixtralForCausalLM(
        MixtralConfig(**SIZES, num_key_value_heads=2, intermediate_size=48, num_local_experts=8)
    ),
    "deepseek_v3": lambda: DeepseekV3ForCausalLM(
        DeepseekV3Config(
            **SIZES, num_key_value_heads=4, intermediate_size=96, moe_intermediate_size=48, n_routed_experts=8,
            num_experts_per_tok=2, n_group=2, topk_group=1, first_k_dense_replace=1, q_lora_rank=32, kv_lora_rank=16,
            qk_nope_head_dim=16, qk_rope_head_dim=8, v_head_dim=16,
        )
    ),
}  # fmt: skip
RATE = 0.5


def step(model: Any, run: Any, ids: torch.Tensor) -> None:
    """One step of gradient descent on the next token's cross entropy."""
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    logits = run(input_ids=ids).logits
    torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()


def greedy(run: Any, ids: torch.Tensor, count: int = 3) -> torch.Tensor:
    """``ids`` and the ``count`` likeliest tokens after them. With gradients on, so that one graph serves all here."""
    for _ in range(count):
        ids = torch.cat([ids, run(input_ids=ids).logits[:, -1:].argmax(-1)], dim=1)
    return ids


def whole(model: Any) -> dict[str, torch.Tensor]:
    """Parameters, gathered from all ranks: for a comparison of small models alone."""
    return {name: p.full_tensor().detach() for name, p in model.named_parameters()}


def distance(got: dict[str, torch.Tensor], want: dict[str, torch.Tensor]) -> float:
    """The largest difference between two sets of parameters."""
    return max((got[name] - want[name]).abs().max().item() for name in want)


def spread(name: str, weights: Path | None, options: dict[str, Any]) -> tuple[Any, Any]:
    """The model with its experts on all ranks, and its compiled form. No rank ever holds all experts."""
    with torch.device("meta"):
        model = MODELS[name]()
    moec.prepare(model, regions=False)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    moec.parallelize(model, mesh, f"ep={dist.get_world_size()}", weights=weights)
    return model, torch.compile(model, backend="moec", fullgraph=True, dynamic=True, options=options)


def one_process(name: str, ids: torch.Tensor) -> dict[str, Any]:
    """What a process with all experts and all sequences finds, without a compiler."""
    torch.manual_seed(0)
    model = MODELS[name]()
    found: dict[str, Any] = {
        "logits": model(input_ids=ids).logits.detach(),
        "tokens": greedy(model, ids),
        "model": model,
    }
    step(model, model, ids)
    found["stepped"] = {n: p.detach() for n, p in model.named_parameters()}
    return found


def first(name: str, folder: Path, options: dict[str, Any]) -> dict[str, Any]:
    """Read shares, compare logits and tokens, train a step, compare all parameters, save."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    ids = torch.randint(0, 256, (ranks, 12), generator=torch.Generator().manual_seed(1))
    if rank == 0:
        torch.manual_seed(0)
        MODELS[name]().save_pretrained(folder / name / "weights")
    dist.barrier()
    want = one_process(name, ids)
    model, run = spread(name, folder / name / "weights", options)
    mine = slice(rank, rank + 1)
    own = ids[mine].clone()  # torch.compile would make a graph for a view, and another for what is none
    logits = run(input_ids=own).logits.detach()
    tokens = greedy(run, own)
    step(model, run, own)
    dcp.save({"model": model.state_dict()}, checkpoint_id=folder / name / "saved")
    return {
        "logits": (logits - want["logits"][mine]).abs().max().item(),
        "tokens": torch.equal(tokens, want["tokens"][mine]),
        "step": distance(whole(model), want["stepped"]),
        "share": sum(p.to_local().numel() for p in model.parameters()) / sum(p.numel() for p in model.parameters()),
    }


def again(name: str, folder: Path, options: dict[str, Any]) -> dict[str, Any]:
    """Load what other ranks have saved, and compare all parameters."""
    ids = torch.randint(0, 256, (4, 12), generator=torch.Generator().manual_seed(1))
    want = one_process(name, ids)
    model, run = spread(name, None, options)
    dcp.load({"model": model.state_dict()}, checkpoint_id=folder / name / "saved")
    logits = run(input_ids=ids[:1]).logits.detach()
    return {
        "step": distance(whole(model), want["stepped"]),
        "logits": (logits - want["model"](input_ids=ids[:1]).logits.detach()).abs().max().item(),
    }


def main(folder: Path, **options: Any) -> dict[str, dict[str, Any]]:
    """Run all models as this rank; ``options`` are those of the compile."""
    torch.set_num_threads(1)
    if not dist.is_initialized():
        dist.init_process_group("gloo")
    found = {}
    for name in MODELS:
        saved = (folder / name / "saved").exists()
        dist.barrier()
        found[name] = (again if saved else first)(name, folder, options)
        print(f"{name}, rank {dist.get_rank()} of {dist.get_world_size()}: {found[name]}")
    return found


QUICK: dict[str, Any] = {"inner": "eager", "backends": ["aten"]}

if __name__ == "__main__":
    main(Path(sys.argv[1]), **({} if "--full" in sys.argv[2:] else QUICK))
    dist.destroy_process_group()
