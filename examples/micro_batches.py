"""A training step on two micro-batches, with rows that travel while experts compute and tokens that are regrouped.

torchrun --standalone --nproc-per-node 2 -m examples.micro_batches

Both micro-batches are in one graph, so each layer sees the tokens of both and deals them out anew: tokens with the same
experts meet in one batch. For that a routing profile has to show that tokens have experts in common; here they are of
two kinds, which the embedding tells apart. Under deterministic algorithms nothing of the step changes by a bit.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

import moec
from examples.expert_parallel import MODELS
from moec.routing.store import save_routing
from moec.runtime import traces
from moec.runtime.programs import Program

WITHOUT, WITH = "ep={n}", "ep={n},overlap=2,reschedule=experts"
TOKENS = 32
"""Of a micro-batch."""


def model_of_two_kinds(name: str) -> Any:
    """A model whose tokens are of two kinds: even numbers lie near one embedding, odd ones near another."""
    torch.manual_seed(0)
    model = MODELS[name]()
    embedding = model.get_input_embeddings().weight
    with torch.no_grad():
        near = torch.randn(2, embedding.shape[1])
        embedding.mul_(10).add_(near[torch.arange(len(embedding)) % 2])
    return model


def tokens(rank: int, number: int) -> torch.Tensor:
    """int[1, TOKENS]: a micro-batch of a rank."""
    return torch.randint(0, 256, (1, TOKENS), generator=torch.Generator().manual_seed(100 * rank + number))


def profile(name: str, file: Path, backends: list[str]) -> None:
    """What the model's routers do on some tokens, as a file."""
    calls = [{"input_ids": tokens(99, i)} for i in range(16)]
    save_routing(moec.profile_routing(model_of_two_kinds(name), calls, sizes=(32, 64), backends=backends), file)


def finish(model: Any, logits: Sequence[torch.Tensor], ids: Sequence[torch.Tensor]) -> dict[str, Any]:
    """The rest of a step: logits, loss, gradients, and the parameters behind it."""
    flat = torch.cat([x[0, :-1] for x in logits]), torch.cat([x[0, 1:] for x in ids])
    loss = torch.nn.functional.cross_entropy(*flat)
    loss.backward()
    grads = {n: p.grad.to_local().clone() for n, p in model.named_parameters()}
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    torch.optim.SGD(model.parameters(), lr=0.5).step()
    return {
        "logits": {str(i): x.detach() for i, x in enumerate(logits)},
        "loss": {"": loss.detach()},
        "gradients": grads,
        "step": {n: p.to_local() for n, p in model.named_parameters()},
    }


def equal(a: dict[str, Any], b: dict[str, Any]) -> dict[str, Any]:
    """Of two steps: which of what :func:`finish` gives have the same bits."""
    return {
        what: all(torch.equal(tensor, b[what][n]) for n, tensor in a[what].items())
        for what in ("logits", "loss", "gradients", "step")
    }


def train(name: str, plan: str, options: dict[str, Any]) -> dict[str, Any]:
    """What a step finds under a plan, and the distinct experts that this rank's batches of tokens go to."""
    torch._dynamo.reset()
    model = model_of_two_kinds(name)
    moec.prepare(model, regions=False)
    moec.parallelize(model, init_device_mesh("cpu", (dist.get_world_size(),)), plan.format(n=dist.get_world_size()))
    ids = [tokens(dist.get_rank(), number) for number in range(2)]

    def both(a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return model(input_ids=a).logits, model(input_ids=b).logits

    run = torch.compile(both, backend="moec", fullgraph=True, dynamic=True, options=options)
    touched: list[int] = []

    def see(program: Program, chosen: torch.Tensor) -> None:
        if program.op.attrs["experts"] > 1:  # not of a shared expert
            touched.append(len(chosen.unique()))

    with traces.watching(see):
        logits = run(*ids)
    return {**finish(model, logits, ids), "experts": sum(touched)}


def main(**options: Any) -> dict[str, dict[str, Any]]:
    """Train every model without and with, as this rank; ``options`` are those of the compile."""
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    if not dist.is_initialized():
        dist.init_process_group("gloo")
    rank, ranks = dist.get_rank(), dist.get_world_size()
    folder = [tempfile.mkdtemp() if rank == 0 else ""]
    dist.broadcast_object_list(folder)
    found = {}
    for name in MODELS:
        file = Path(folder[0]) / f"{name}.json"
        if rank == 0:
            profile(name, file, options.get("backends", ["cpu", "aten"]))
        dist.barrier()
        without = train(name, WITHOUT, options)
        with_ = train(name, WITH, {**options, "routing": file})
        found[name] = equal(without, with_)
        found[name]["experts"] = (without["experts"], with_["experts"])
        print(f"{name}, rank {rank} of {ranks}: {found[name]}")
    return found


if __name__ == "__main__":
    main(inner="eager")
    dist.destroy_process_group()
