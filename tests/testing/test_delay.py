"""The delaying process group: what it brings is right, when it brings it is what the links say, and others compute."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

if not (dist.is_available() and dist.is_gloo_available()):
    pytest.skip("this build of torch has no gloo", allow_module_level=True)

from moec.backends.base import program_op
from moec.backends.distributed import groups
from moec.cost.curve import LayerCurve
from moec.cost.links import Link
from moec.op_costs import op_costs
from moec.parallel.costs import LARGE, SMALL, agree, costs_of, fit, processor_seconds
from moec.runtime.programs import program_graph
from moec.testing import SleepingLayer, delayed_group
from tests.parallel.layers import Layer
from tests.support.processes import run_processes

RANKS = 2
DEADLINE = 120.0
LINK = Link(alpha_s=0.02, bytes_per_s=1e6)
QUICK = Link(alpha_s=0.01, bytes_per_s=2e8)
CURVE = LayerCurve(0.01, ((1.0, 0.02), (100.0, 0.02)))


def transfers(pg: Any, rank: int) -> dict[str, Any]:
    """Two all-to-alls at once, of which the first is the larger, beside work that needs no links."""
    big = torch.arange(20_000.0).view(-1, 4) + rank  # 80 000 bytes, half of them for the other rank
    small = torch.full((2, 1), float(rank), dtype=torch.float64)
    got_big, got_small = torch.empty_like(big), torch.empty_like(small)
    dist.barrier()
    start = time.monotonic()
    first = dist.all_to_all_single(got_big, big, group=pg, async_op=True)
    second = dist.all_to_all_single(got_small, small, group=pg, async_op=True)
    started = time.monotonic() - start
    first.wait()
    one = time.monotonic() - start
    second.wait()
    both = time.monotonic() - start
    halves = [torch.arange(20_000.0).view(2, -1, 4)[rank] + r for r in range(RANKS)]
    right = torch.equal(got_big, torch.cat(halves)) and got_small.flatten().tolist() == [0.0, 1.0]
    return {"started": started, "one": one, "both": both, "right": right, "log": list(pg.log)}


def layer(pg: Any, rank: int) -> dict[str, Any]:
    """A layer of two chunks on sleeping experts, beside the same layer whole."""
    groups.bind("ep", pg)
    made = Layer(ranks=RANKS, experts=4)
    tokens = made.tokens("spread")
    inputs = [*tokens[rank], *made.share(rank, made.weights())]
    found: dict[str, Any] = {}
    for name, pipeline in (("whole", "expert-parallel"), ("cut", "expert-parallel,overlap{chunks=2}")):
        op = made.spread(rank, pipeline).ops[0]
        op.attrs["backend"] = "aten"
        kernel = SleepingLayer(program_op(program_graph(op)), "cpu", CURVE)
        dist.barrier()
        start = time.monotonic()
        (out,) = kernel.forward(inputs)
        found[name] = {"out": out, "seconds": time.monotonic() - start, "computed": kernel.computed}
        grads = kernel.backward([made.gradients(tokens)[rank]], inputs, [True, False, True, True, True])
        found[name]["grads"] = [g for g in grads if g is not None]
    return found


def costs(pg: Any, rank: int) -> dict[str, Any]:
    """Links that are measured together; a cost model of the first rank."""
    own = op_costs("cpu:avx2")
    assert own is not None
    quick = delayed_group(QUICK)
    agreed = agree("ep", quick, "cpu", lambda: (own.machine, own.isa))
    nobody = agree("none", quick, "cpu", lambda: None)
    assert agreed is not None and costs_of("ep") is agreed
    facts = {"link": agreed.link, "isa": agreed.isa, "threads": agreed.threads, "chunks": agreed.chunks}
    return {**facts, "nobody": nobody}


def main(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.FileStore(f"{folder}/store", RANKS), rank=rank, world_size=RANKS)
    pg = delayed_group(LINK)
    memory = delayed_group(LINK, carrier="memory")
    found = {f.__name__: f(pg, rank) for f in (transfers, layer, costs)} | {"by memory": transfers(memory, rank)}
    torch.save(found, Path(folder) / f"{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return run_processes(main, RANKS, tmp_path_factory.mktemp("delay"), DEADLINE)


@pytest.mark.slow
@pytest.mark.parametrize("run", ["transfers", "by memory"])
def test_rows_come_as_the_links_say_one_collective_after_the_other(ranks: list[dict[str, Any]], run: str) -> None:
    for found in (r[run] for r in ranks):
        assert found["right"]
        assert found["started"] < 0.02, "starting does not wait"
        assert found["one"] >= LINK.seconds(40_000)
        assert found["both"] >= LINK.seconds(40_000) + LINK.seconds(8)
        first, second = found["log"]
        assert (first.bytes, second.bytes) == (40_000, 8)
        assert second.end - first.end == pytest.approx(LINK.seconds(8), abs=1e-9), "one link, one at a time"
    ends = [[a.end for a in r[run]["log"]] for r in ranks]
    assert ends[0] == ends[1], "they end on all ranks together"


@pytest.mark.slow
def test_chunks_end_sooner_with_the_same_bits(ranks: list[dict[str, Any]]) -> None:
    for found in (r["layer"] for r in ranks):
        whole, cut = found["whole"], found["cut"]
        assert torch.equal(whole["out"], cut["out"])
        assert all(torch.equal(a, b) for a, b in zip(whole["grads"], cut["grads"], strict=True))
        assert whole["computed"] >= CURVE.seconds([1, 1])
        assert cut["computed"] >= 2 * CURVE.seconds([1])


@pytest.mark.slow
def test_ranks_plan_with_the_same_numbers(ranks: list[dict[str, Any]]) -> None:
    first, second = (r["costs"] for r in ranks)
    assert first == second
    assert first["isa"] == "avx2" and first["nobody"] is None
    for size in (SMALL, LARGE):  # the processor's part is no part of the latency
        assert first["link"].seconds(size) >= QUICK.seconds(size) * 0.9
    assert first["link"].alpha_s <= QUICK.alpha_s * 2
    chunks = first["chunks"]
    assert 0 < chunks.forward.all < QUICK.alpha_s, "processor time, and no time on the links"
    assert chunks.forward.all < chunks.tokens.all, "a chunk of tokens is the whole program once more"
    for calls in (chunks.forward, chunks.tokens, chunks.backward):
        assert 0 <= calls.front <= calls.all


def test_two_times_make_a_link() -> None:
    link = Link(1e-4, 1e9)
    small, large = (link.seconds(3 * size) for size in (SMALL, LARGE))
    found = fit(small, large, 4)
    assert found.alpha_s == pytest.approx(1e-4) and found.bytes_per_s == pytest.approx(1e9)
    assert fit(1e-3, 1e-3, 2).alpha_s <= 1e-3, "times that do not grow are no error"


def test_of_the_calling_thread_what_it_does_once_rows_are_under_way_counts() -> None:
    def work(seconds: float) -> None:
        end = time.thread_time() + seconds
        while time.thread_time() < end:
            pass

    def begin() -> threading.Thread:
        work(0.05)
        thread = threading.Thread(target=work, args=(0.06,))
        thread.start()
        return thread

    def end(thread: threading.Thread) -> None:
        work(0.02)
        thread.join()

    own, others = processor_seconds(begin, end)
    assert 0.02 <= own < 0.04 and 0.06 <= others < 0.08
