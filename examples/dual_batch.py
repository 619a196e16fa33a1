"""A training step on two micro-batches, one of which computes while the rows of the other travel.

torchrun --standalone --nproc-per-node 2 -m examples.dual_batch

Attention and experts of one micro-batch hide the all-to-alls of the other, forwards and backwards: the two graphs that
autograd makes of the step are each put in an order in which a rank waits as late as it can. All calls are made on what
they would be made on in turn, so nothing of the step changes by a bit.

With --full behind it, Inductor compiles what is around the experts, and these run on generated kernels.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

import moec
from examples.expert_parallel import MODELS
from examples.micro_batches import equal, finish
from moec.runtime import counters

IN_TURN, DUAL = "ep={n},overlap=2", "ep={n},overlap=2,interleave=always"
"""With ``interleave=auto`` the cost model decides; a model as small as these here is not worth it."""
TOKENS = 24
"""Of a micro-batch."""
QUICK: dict[str, Any] = {"inner": "aot_eager", "backends": ["aten"]}


def train(name: str, plan: str, options: dict[str, Any]) -> dict[str, Any]:
    """What a step finds under a plan: logits, loss, gradients, the parameters behind it, and how layers ran."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = MODELS[name]()
    moec.prepare(
        model, regions=False
    )  # a region that is called once a layer and micro-batch shows one of them at a time
    moec.parallelize(model, init_device_mesh("cpu", (dist.get_world_size(),)), plan.format(n=dist.get_world_size()))
    gen = torch.Generator().manual_seed(dist.get_rank())
    ids = [torch.randint(0, 256, (1, TOKENS), generator=gen) for _ in range(2)]

    def both(a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return model(input_ids=a).logits, model(input_ids=b).logits

    run = torch.compile(both, backend="moec", fullgraph=True, dynamic=True, options=options)
    counters.reset()
    logits = run(*ids)
    return {**finish(model, logits, ids), "ran": dict(counters.snapshot().by_name)}


def main(**options: Any) -> dict[str, dict[str, Any]]:
    """Train every model in turn and interleaved, as this rank; ``options`` are those of the compile."""
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    if not dist.is_initialized():
        dist.init_process_group("gloo")
    found = {}
    for name in MODELS:
        in_turn, dual = train(name, IN_TURN, options), train(name, DUAL, options)
        found[name] = equal(in_turn, dual)
        found[name]["layers in pieces"] = [dual["ran"].get(f"moec::begin_{w}", 0) for w in ("layer", "gradients")]
        print(f"{name}, rank {dist.get_rank()} of {dist.get_world_size()}: {found[name]}")
    return found


if __name__ == "__main__":
    main(**({} if "--full" in sys.argv[1:] else QUICK))
    dist.destroy_process_group()
