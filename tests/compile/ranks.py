"""What each process of ``test_sharded.py`` does: one small model, sharded in several ways, compiled by moec.

The module is imported by spawned processes, so it holds nothing but what they need.
"""

from __future__ import annotations

import traceback
import warnings
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor, init_device_mesh
from torch.nn.parallel import DistributedDataParallel

import moec
from moec.backends.cpu.build import compiler
from moec.runtime import counters
from tests.compile.blocks import Block, Layers, tokens

RANKS = 2
TOKENS = 6  # of each rank
LEARNING_RATE = 0.5
TIMEOUT = timedelta(seconds=60)


def make() -> Layers:
    """The model, the same on every rank and in every case."""
    return Layers(Block(), Block(seed=1))


def part(rank: int) -> torch.Tensor:
    """The tokens of one rank."""
    return tokens(TOKENS * RANKS)[rank * TOKENS : (rank + 1) * TOKENS]


def train(model: nn.Module, run: Any, x: torch.Tensor, steps: int = 2) -> torch.Tensor:
    """Optimizer steps on the mean of squares; the last step's output."""
    optimizer = torch.optim.SGD(model.parameters(), lr=LEARNING_RATE)
    out = x
    for _ in range(steps):
        optimizer.zero_grad()
        out = run(x)
        out.square().mean().backward()
        optimizer.step()
    return out.detach()


def whole(model: nn.Module) -> dict[str, torch.Tensor]:
    """The parameters of a model, gathered where they are sharded, under the names of the plain model."""
    found = {}
    for name, p in model.named_parameters():
        full = p.full_tensor() if isinstance(p, DTensor) else p
        found[name.removeprefix("module.").replace("_orig_mod.", "")] = full.detach().clone()
    return found


def _compile(model: Any, **options: Any) -> Any:
    return torch.compile(model, backend="moec", options={"inner": "eager", "backends": ["aten"], **options})


def _result(model: nn.Module, out: torch.Tensor, report: moec.Report, caught: Any) -> dict[str, Any]:
    return {
        "out": out,
        "parameters": whole(model),
        "fused": [b.fused for b in report.layers],
        "reasons": [b.reason for b in report.layers if b.reason],
        "told": [str(w.message) for w in caught if issubclass(w.category, moec.MoecWarning)],
        "ran": counters.snapshot().by_name,
    }


def _steps(rank: int, model: nn.Module, run: Any) -> dict[str, Any]:
    with moec.recording() as report, warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        out = train(model, run, part(rank))
    return _result(model, out, report, caught)


def ddp(rank: int) -> dict[str, Any]:
    model = DistributedDataParallel(make())
    return _steps(rank, model, _compile(model))


def ddp_in_buckets(rank: int) -> dict[str, Any]:
    """Buckets of a kilobyte: PyTorch cuts the graph between any two weights, as it does with those of a real size."""
    model = DistributedDataParallel(make(), bucket_cap_mb=0.001)
    dist._DEFAULT_FIRST_BUCKET_BYTES, kept = 128, dist._DEFAULT_FIRST_BUCKET_BYTES  # type: ignore[attr-defined]
    try:
        return _steps(rank, model, _compile(model))
    finally:
        dist._DEFAULT_FIRST_BUCKET_BYTES = kept  # type: ignore[attr-defined]


def _fsdp(model: Layers, **options: Any) -> Layers:
    for layer in model.layers:
        fully_shard(layer, **options)
    return fully_shard(model, **options)


def fsdp(rank: int) -> dict[str, Any]:
    """On generated kernels where they can be built: gathered weights lie elsewhere in every call."""
    model = _fsdp(make())
    return _steps(rank, model, _compile(model, backends=["cpu", "aten"] if compiler() else ["aten"]))


def fsdp_by_layer(rank: int) -> dict[str, Any]:
    """Each layer compiled by itself, then sharded, as PyTorch advises; through ``moec.compile``."""
    model = make()
    for i, layer in enumerate(model.layers):
        model.layers[i] = moec.compile(layer, inner="aot_eager", backends=["aten"])
    return _steps(rank, _fsdp(model), model)


def fsdp_inference(rank: int) -> dict[str, Any]:
    model = _fsdp(make(), mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16, output_dtype=torch.float32))
    compiled = _compile(model)
    with moec.recording() as report, warnings.catch_warnings(record=True) as caught, torch.no_grad():
        warnings.simplefilter("always")
        outs = [compiled(part(rank)) for _ in range(2)]
        assert torch.equal(*outs)
        return {**_result(model, outs[0], report, caught), "eager": model(part(rank))}


def _distributed(placements: list[Any]) -> Layers:
    """A model whose parameters are all DTensors; the experts' lie as ``placements`` says."""
    mesh = init_device_mesh("cpu", (RANKS,))
    model = make()
    for block in model.layers:
        for name, p in list(block.named_parameters()):
            lies = placements if p.dim() == 3 else [Replicate()]
            setattr(block, name, nn.Parameter(distribute_tensor(p.detach(), mesh, lies)))
    return model


def _dtensors(rank: int, placements: list[Any]) -> dict[str, Any]:
    model = _distributed(placements)
    mesh = model.layers[0].down.device_mesh  # type: ignore[union-attr]
    x = DTensor.from_local(tokens(TOKENS * RANKS), mesh, [Replicate()], run_check=False)
    compiled = _compile(model)
    with moec.recording() as report, warnings.catch_warnings(record=True) as caught, torch.no_grad():
        warnings.simplefilter("always")
        out = compiled(x)
    return _result(model, out.full_tensor(), report, caught)


def replicated(rank: int) -> dict[str, Any]:
    return _dtensors(rank, [Replicate()])


def sharded_by_expert(rank: int) -> dict[str, Any]:
    return _dtensors(rank, [Shard(0)])


class _Local(nn.Module):
    """Runs a block on this rank's part of its replicated parameters."""

    def __init__(self, block: Block) -> None:
        super().__init__()
        self.block = block

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        local = {name: p.to_local() for name, p in self.block.named_parameters()}
        return torch.func.functional_call(self.block, local, (x,))


def local_parts(rank: int) -> dict[str, Any]:
    replicas = _distributed([Replicate()])
    model = Layers(*(_Local(block) for block in replicas.layers))
    compiled = _compile(model)
    with moec.recording() as report, warnings.catch_warnings(record=True) as caught, torch.no_grad():
        warnings.simplefilter("always")
        out = compiled(tokens(TOKENS * RANKS))
    return _result(replicas, out, report, caught)


CASES: dict[str, Callable[[int], dict[str, Any]]] = {
    f.__name__: f
    for f in (ddp, ddp_in_buckets, fsdp, fsdp_by_layer, fsdp_inference, replicated, sharded_by_expert, local_parts)
}


def main(rank: int, folder: str) -> None:
    """Run all cases as one rank; what they give or raise goes to a file."""
    torch.set_num_threads(1)
    store = dist.FileStore(f"{folder}/store", RANKS)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=RANKS, timeout=TIMEOUT)
    results: dict[str, Any] = {}
    for name, case in CASES.items():
        torch._dynamo.reset()
        counters.reset()
        try:
            results[name] = case(rank)
        except Exception:  # noqa: BLE001  (any failure is the result: the test shows it, and the other cases still run)
            results[name] = traceback.format_exc()
        dist.barrier()
    torch.save(results, Path(folder) / f"{rank}.pt")
    dist.destroy_process_group()
