"""A training step whose rows travel while experts compute, on several processes; the bits of the step without.

torchrun --standalone --nproc-per-node 2 -m examples.overlap

Two plans for the same model and tokens: without overlap, and with every layer in two chunks of experts, forwards and
backwards. With ``overlap=auto`` the cost model would choose, and leave layers as small as these whole.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

import moec
from examples.expert_parallel import MODELS, QUICK, step
from moec.backends.distributed import traffic

PLANS = {"without": "ep={n}", "with": "ep={n},overlap=2"}


def train(name: str, plan: str, ids: torch.Tensor, options: dict[str, Any]) -> dict[str, Any]:
    """Logits, this rank's parameters after a step, and the all-to-alls of the step, under a plan."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = MODELS[name]()
    moec.prepare(model, regions=False)
    moec.parallelize(model, init_device_mesh("cpu", (dist.get_world_size(),)), plan)
    run = torch.compile(model, backend="moec", fullgraph=True, dynamic=True, options=options)
    traffic.reset()
    logits = run(input_ids=ids).logits.detach()
    step(model, run, ids)
    sends = sum(count for (kind, _), count in traffic.calls().items() if kind == "all_to_all")
    return {"logits": logits, "sends": sends, "after": {n: p.to_local() for n, p in model.named_parameters()}}


def main(**options: Any) -> dict[str, dict[str, Any]]:
    """Train every model under both plans as this rank; ``options`` are those of the compile."""
    torch.set_num_threads(1)
    if not dist.is_initialized():
        dist.init_process_group("gloo")
    rank, ranks = dist.get_rank(), dist.get_world_size()
    ids = torch.randint(0, 256, (ranks, 24), generator=torch.Generator().manual_seed(1))[rank : rank + 1].clone()
    found = {}
    for name in MODELS:
        without, with_ = (train(name, plan.format(n=ranks), ids, options) for plan in PLANS.values())
        found[name] = {
            "logits": torch.equal(with_["logits"], without["logits"]),
            "step": all(torch.equal(p, without["after"][n]) for n, p in with_["after"].items()),
            "sends": (without["sends"], with_["sends"]),
        }
        print(f"{name}, rank {rank} of {ranks}: {found[name]}")
    return found


if __name__ == "__main__":
    main(**QUICK)
    dist.destroy_process_group()
