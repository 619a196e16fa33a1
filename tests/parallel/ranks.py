"""What each process of ``test_processes.py`` does: layers, compiled models, checkpoints and faults on four ranks.

The module is imported by spawned processes, so it holds nothing but what they need.
"""

from __future__ import annotations

import os
import signal
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors.torch import save_file
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

import moec
from moec.backends.base import Artifact, Kernel
from moec.backends.cpu.build import compiler
from moec.backends.distributed import faults, groups, traffic
from moec.backends.distributed.world import WORLD
from moec.backends.registry import get_backend
from moec.ir.comm_semantics import begin, running_in
from moec.parallel import layout_of
from moec.runtime.programs import program_graph
from tests.compile.blocks import Block, Layers, tokens
from tests.parallel.heads import Decoder, folded, trained
from tests.parallel.layers import HISTOGRAMS, Layer
from tests.parallel.test_forms import EXACT

RANKS = 4
TOKENS = (6, 3, 0, 5)  # of each rank
TIMEOUT = timedelta(seconds=90)
CPU_TARGET = "cpu:avx2"
CPU_CASES = [(Layer(4, 4, 3, nodes=2, dtype=d), h) for d in ("f32", "bf16") for h in ("spread", "one_expert")]
ATEN_CASES = [(Layer(top_k=3, nodes=2), form, h) for form in EXACT for h in HISTOGRAMS]
LIMIT = 1.5


def kernel(layer: Layer, rank: int, form: str, backend: str, target: str = "cpu") -> Kernel:
    """A rank's kernel of a layer, as the compiler loads it."""
    op = layer.spread(rank, EXACT[form]).ops[0]
    op.attrs["backend"] = backend
    return get_backend("distributed").load(Artifact("distributed", target, program_graph(op)))


def run_layer(layer: Layer, rank: int, form: str, histogram: str, backend: str, target: str = "cpu") -> dict[str, Any]:
    made, given = kernel(layer, rank, form, backend, target), layer.tokens(histogram)
    grads, inputs = layer.gradients(given)[rank], [*given[rank], *layer.share(rank, layer.weights())]
    traffic.reset()
    (out,) = made.forward(inputs)
    sent = dict(traffic.sent())
    found = made.backward([grads], inputs, [True, False, True, True, True])
    some = made.backward([grads], inputs, [False, False, True, False, True])
    assert [g is None for g in some] == [True, True, False, True, False]
    assert torch.equal(some[2], found[2]) and torch.equal(some[4], found[4])  # type: ignore[arg-type]
    return {"out": out, "sent": sent, "grads": [g for g in found if g is not None]}


def aten(rank: int, folder: Path) -> list[dict[str, Any]]:
    for name, parts in ATEN_CASES[0][0].groups.items():
        groups.bind(name, dist.new_subgroups_by_enumeration([list(p) for p in parts])[0])
    return [run_layer(layer, rank, form, h, "aten") for layer, form, h in ATEN_CASES]


def cpu(rank: int, folder: Path) -> list[dict[str, Any]]:
    if compiler() is None:
        return []
    return [run_layer(layer, rank, "flat", h, "cpu", CPU_TARGET) for layer, h in CPU_CASES]


def part(rank: int, seed: int = 1) -> torch.Tensor:
    """The tokens of one rank."""
    start = sum(TOKENS[:rank])
    return tokens(sum(TOKENS), seed)[start : start + TOKENS[rank]]


def model() -> Layers:
    return Layers(Block(), Block(seed=1))


def _compile(m: nn.Module, **options: Any) -> Any:
    return torch.compile(
        m,
        backend="moec",
        fullgraph=True,
        options={"inner": "eager", "backends": ["aten"], "checks": "strict", **options},
    )


def whole(m: nn.Module, gradients: bool = False) -> dict[str, torch.Tensor]:
    """Parameters (or their gradients) gathered to plain tensors."""
    found = {}
    for name, p in m.named_parameters():
        t: Any = p.grad if gradients else p
        found[name] = (t.full_tensor() if isinstance(t, DTensor) else t).detach().clone()
    return found


def door(rank: int, folder: Path) -> dict[str, Any]:
    """Through the compile door: a training step, then other numbers of tokens and other histograms."""
    m = moec.parallelize(model(), None, "ep=4", mean=False)
    with moec.recording() as report:
        run = _compile(m)
        out = run(part(rank))
        out.square().sum().backward()
    grads = whole(m, gradients=True)
    norm = nn.utils.clip_grad_norm_(m.parameters(), 1.0)
    torch._dynamo.utils.counters.clear()
    with torch.no_grad():
        more = [run(part(rank, seed)) for seed in (2, 3)] + [run(tokens(n)) for n in (9, 12, 5, 17)]
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    rows = sum(p.to_local().numel() for n, p in m.named_parameters() if "router" not in n)  # type: ignore[attr-defined]
    return {
        "out": out.detach(), "grads": grads, "norm": norm.full_tensor(), "more": more[:2], "graphs": graphs,
        "fused": [b.fused for b in report.layers], "numbers": rows,
    }  # fmt: skip


def replicas(rank: int, folder: Path) -> dict[str, Any]:
    """Two groups of two ranks, each with all experts; gradients are means over all four."""
    m = moec.parallelize(model(), None, "ep=2")
    out = _compile(m)(part(rank))
    out.square().sum().backward()
    return {"out": out.detach(), "grads": whole(m, gradients=True)}


def eager(rank: int, folder: Path) -> dict[str, Any]:
    """Without a compiler the layers gather their weights, and are right."""
    m = moec.parallelize(model(), None, "ep=4", mean=False)
    out = m(part(rank))
    out.square().sum().backward()
    return {"out": out.detach(), "grads": whole(m, gradients=True)}


class Casting(Block):
    """Computes in bf16 on weights that are kept in f32."""

    def experts(self, x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        up, down = self.gate_up.to(torch.bfloat16), self.down.to(torch.bfloat16)
        flat = ids.reshape(-1)
        rows = x.to(torch.bfloat16).repeat_interleave(ids.shape[1], dim=0)
        gate, value = torch.bmm(up[flat], rows.unsqueeze(-1)).squeeze(-1).chunk(2, dim=-1)
        out = torch.bmm(down[flat], (nn.functional.silu(gate) * value).unsqueeze(-1)).squeeze(-1)
        return (out * weights.reshape(-1, 1)).view(-1, ids.shape[1], x.shape[-1]).sum(dim=1)


def cast(rank: int, folder: Path) -> dict[str, Any]:
    """Weights are cast behind the gather that the model shows; shares are cast instead, and stay where they are."""
    m = moec.parallelize(Layers(Casting()), None, "ep=4", mean=False)
    traffic.reset()
    out = _compile(m)(part(rank))
    out.square().sum().backward()
    return {"out": out.detach(), "grads": whole(m, gradients=True), "kinds": {k for k, _ in traffic.sent()}}


def checkpoint(rank: int, folder: Path) -> dict[str, Any]:
    """Trained a step and saved on four ranks; loaded on two, and trained another."""
    m = moec.parallelize(model(), None, "ep=4")
    optimizer = torch.optim.AdamW(m.parameters(), lr=0.1)
    run = _compile(m)
    run(part(rank)).square().sum().backward()
    optimizer.step()
    dcp.save({"model": m.state_dict()}, checkpoint_id=folder / "saved")
    found: dict[str, Any] = {"saved": whole(m)}
    pair = DeviceMesh("cpu", [0, 1])
    if rank < 2:
        with torch.device("meta"):
            small = model()
        moec.parallelize(small, pair, "ep=2")
        state = {"model": small.state_dict()}
        dcp.load(state, checkpoint_id=folder / "saved", process_group=pair.get_group())
        found["loaded"] = whole(small)
        with torch.no_grad():
            found["out"] = _compile(small)(tokens(5))
    return found


def inductor(rank: int, folder: Path) -> dict[str, Any] | None:
    """Two of the ranks train a step with Inductor around the experts."""
    pair = DeviceMesh("cpu", [0, 1])
    if rank > 1:
        return None
    m = moec.parallelize(model(), pair, "ep=2")
    out = _compile(m, inner="inductor")(part(rank))
    out.square().sum().backward()
    return {"out": out.detach(), "grads": whole(m, gradients=True)}


def named(rank: int, folder: Path) -> dict[str, Any]:
    """Two ranks bind a name in a mesh of their own; then all have to agree on another."""
    pair = DeviceMesh("cpu", [0, 1])
    if rank < 2:
        moec.parallelize(model(), pair, "ep=2,form=gather")
    m = moec.parallelize(model(), None, "ep=4,form=gather")
    layout = layout_of(m)
    assert layout is not None
    return {"group": layout.group, "out": m(part(rank)).detach()}


class Wide(nn.Module):
    """A layer of 8 experts of 2 MB and a shared matrix of 1 MB."""

    def __init__(self) -> None:
        super().__init__()
        self.gate_up = nn.Parameter(torch.empty(8, 1024, 256))
        self.down = nn.Parameter(torch.empty(8, 256, 1024))
        self.shared = nn.Parameter(torch.empty(512, 512))


def _status(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(key)).split()[1])


def memory(rank: int, folder: Path) -> dict[str, Any]:
    """The most memory while a share is read from safetensors, beyond what was there before; bytes."""
    file = folder / "wide.safetensors"
    if rank == 0:
        gen = torch.Generator().manual_seed(0)
        save_file({n: torch.randn(p.shape, generator=gen) for n, p in Wide().named_parameters()}, file)
    dist.barrier()
    with torch.device("meta"):
        m = Wide()
    Path("/proc/self/clear_refs").write_text("5")
    before = _status("VmRSS")
    moec.parallelize(m, None, "ep=4", weights=file)
    most = _status("VmHWM") - before
    held = sum(p.to_local().untyped_storage().nbytes() for p in m.parameters())  # type: ignore[attr-defined]
    return {"most": most, "held": held, "down": m._parameters["down"].to_local()}  # type: ignore[union-attr]


def _error(call: Callable[[], Any]) -> dict[str, Any]:
    start = time.monotonic()
    try:
        call()
    except moec.MoecError as error:
        return {"kind": type(error).__name__, "text": str(error), "seconds": time.monotonic() - start}
    return {"kind": "", "text": "nothing was raised", "seconds": time.monotonic() - start}


def disagreements(rank: int, folder: Path) -> dict[str, Any]:
    """Ranks that mean different things are told so before anything hangs."""
    other = model()
    if rank == 2:
        other.layers[1].router.data[0, 0] += 1e-3  # type: ignore[union-attr]
    found = {
        "plan": _error(lambda: moec.parallelize(model(), None, "ep=2" if rank == 3 else "ep=4")),
        "weights": _error(lambda: moec.parallelize(other, None, "ep=4")),
        "divide": _error(lambda: moec.parallelize(model(), None, "ep=3")),
        "heads": _error(lambda: moec.parallelize(Decoder(6, 6), None, "tp=4,ep=4")),
        "size": _error(lambda: kernel(Layer(2, 4), 0, "flat", "aten").forward(_first(Layer(2, 4)))),
        "unbound": _error(lambda: groups.find("epp")),
    }
    absent = None if rank == 1 else _error(lambda: moec.parallelize(model(), None, "ep=4", timeout=LIMIT))
    faults.set_limit(None)
    return {**found, "absent": absent}


def _first(layer: Layer) -> list[torch.Tensor]:
    return [*layer.tokens("spread")[0], *layer.share(0, layer.weights())]


def _exchange(group: str) -> None:
    with running_in(WORLD):
        begin("all_to_all", group, RANKS, torch.zeros(RANKS, 2), (1,) * RANKS, (1,) * RANKS).wait()


def hang(rank: int, folder: Path) -> dict[str, Any] | None:
    """The last rank does not come; it lives."""
    groups.bind("slow", dist.new_group(list(range(RANKS))))
    _exchange("slow")
    faults.set_limit(LIMIT)
    if rank == RANKS - 1:
        time.sleep(LIMIT + 2 * faults.STILL)
        return None
    return _error(lambda: _exchange("slow"))


def killed(rank: int, folder: Path) -> dict[str, Any] | None:
    """The last rank is killed. This is the last case."""
    groups.bind("short", dist.new_group(list(range(RANKS))))
    _exchange("short")
    if rank == RANKS - 1:
        os.kill(os.getpid(), signal.SIGKILL)
    return _error(lambda: _exchange("short"))


CASES: tuple[Callable[[int, Path], Any], ...] = (
    aten, cpu, door, replicas, eager, cast, checkpoint, inductor, named, folded, trained, memory, disagreements, hang,
    killed,
)  # fmt: skip


def main(rank: int, folder: str) -> None:
    """Run all cases as one rank; what they give or raise goes to a file after each."""
    torch.set_num_threads(1)
    faults.BEAT, faults.STILL = 0.2, 1.0
    store = dist.FileStore(f"{folder}/store", RANKS)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=RANKS, timeout=TIMEOUT)
    faults.start_heart()
    results: dict[str, Any] = {}
    for case in CASES:
        torch._dynamo.reset()
        start = time.monotonic()
        torch.save(results, Path(folder) / f"{rank}.pt")
        try:
            results[case.__name__] = case(rank, Path(folder))
        except Exception:  # noqa: BLE001  (any failure is the result: the test shows it, and the other cases still run)
            results[case.__name__] = traceback.format_exc()
        results[f"{case.__name__} took"] = time.monotonic() - start
    torch.save(results, Path(folder) / f"{rank}.pt")
    os._exit(0)  # the groups have lost a rank: there is nobody to say goodbye to
