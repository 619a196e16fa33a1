"""Micro-batches that share their tokens and take turns: experts on two real ranks, the bits of the program without."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import moec
from moec.backends.cpu.build import compiler
from moec.runtime import unshard  # noqa: F401  (registers torch.ops.moec.unshard)
from tests.support.gloo import on_gloo
from tests.support.processes import run_processes

RANKS, EXPERTS, HIDDEN, INNER, TOKENS, TOP_K = 2, 8, 16, 32, 24, 2
DEADLINE = 200.0
WHOLE = "default,expert-parallel"
ORDERS = {
    "before": "default,reschedule-tokens{always=true},expert-parallel,overlap{chunks=2},interleave-layers",
    "after": f"{WHOLE},reschedule-tokens{{always=true}},overlap{{chunks=2}},interleave-layers",
    "by ranks": f"{WHOLE},reschedule-tokens{{always=true,objective=ranks}},overlap{{chunks=2}},interleave-layers",
}


class Step(nn.Module):
    """Two micro-batches, one after the other through two layers of attention and experts on two ranks."""

    def __init__(self, rank: int) -> None:
        super().__init__()
        gen = torch.Generator().manual_seed(0)
        mine = slice(rank * EXPERTS // RANKS, (rank + 1) * EXPERTS // RANKS)
        made = [torch.randn(EXPERTS, *shape, generator=gen) * 0.3 for shape in ((INNER, HIDDEN), (HIDDEN, INNER)) * 2]
        self.experts = nn.ParameterList([w[mine].clone() for w in made])
        self.routers = nn.ParameterList([torch.randn(EXPERTS, HIDDEN, generator=gen) for _ in range(2)])

    def layer(self, x: Tensor, number: int) -> Tensor:
        x = x + torch.softmax(x @ x.T, -1) @ x
        weights, ids = (x @ self.routers[number].T).softmax(-1).topk(TOP_K, -1)
        halves = [EXPERTS // RANKS] * RANKS
        own = self.experts[2 * number : 2 * number + 2]
        up, down = (torch.ops.moec.unshard.default(w, halves, "ep", 1.0) for w in own)
        rows, flat = x.repeat_interleave(TOP_K, dim=0), ids.reshape(-1)
        inner = torch.relu(torch.bmm(up[flat], rows.unsqueeze(-1)).squeeze(-1))
        out = torch.bmm(down[flat], inner.unsqueeze(-1)).squeeze(-1)
        return x + (out * weights.reshape(-1, 1)).view(-1, TOP_K, HIDDEN).sum(dim=1)

    def forward(self, first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
        for number in range(2):
            first, second = self.layer(first, number), self.layer(second, number)
        return first, second


def main(rank: int, folder: str) -> None:
    on_gloo(rank, folder, RANKS, lambda: programs(rank))


def programs(rank: int) -> dict[str, Any]:
    from moec.backends.distributed import groups
    from moec.runtime import counters, staged

    groups.bind("ep", dist.new_group(list(range(RANKS))))
    found: dict[str, Any] = {}
    batches = torch.randn(TOKENS, HIDDEN, generator=torch.Generator().manual_seed(rank)).split(TOKENS // 2)
    program = torch.export.export(Step(rank), tuple(batches), strict=False)
    for name, passes in (("whole", WHOLE), *ORDERS.items()):
        made = moec.optimize(program, passes=passes)
        counters.reset()
        with torch.no_grad():
            found[name] = torch.cat(made.module()(*batches))
        found[f"{name} ran"] = counters.snapshot().by_name
    return {**found, "left": staged.under_way()}


@pytest.mark.skipif(not (dist.is_available() and dist.is_gloo_available()), reason="this build of torch has no gloo")
@pytest.mark.skipif(compiler() is None, reason="the cpu backend needs a C++ compiler")
def test_regrouped_layers_take_turns_with_the_bits_of_one_after_the_other(tmp_path: Path) -> None:
    for found in run_processes(main, RANKS, tmp_path, DEADLINE):
        assert "error" not in found, found["error"]
        assert found["whole ran"]["moec::experts"] == 4
        for name in ORDERS:
            assert torch.equal(found[name], found["whole"]), name
            ran = found[f"{name} ran"]
            assert ran["moec::regroup"] == 2 and ran["moec::begin_layer"] >= 2, (
                "one batch runs while the other's rows travel"
            )
        assert found["left"] == 0, "every layer that was begun is at its end"
