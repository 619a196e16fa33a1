"""Grad mode changes inside a router or inside the experts: the first is left outside the block, the second refused."""

from __future__ import annotations

import pytest
import torch

import moec
from tests.compile.blocks import TOP_K, Block, tokens
from tests.compile.watch import moec_compile


class ChoiceWithoutGradients(Block):
    """Chooses under ``no_grad`` and takes the scores of the chosen outside of it, as many routers do."""

    def forward(self, x: torch.Tensor, ids: torch.Tensor | None = None) -> torch.Tensor:
        scores = torch.softmax(torch.nn.functional.linear(x, self.router), dim=-1)
        with torch.no_grad():
            ids = torch.topk(scores * 2, TOP_K, dim=-1)[1]
        return self.experts(x, ids, scores.gather(1, ids))


class NoGradientsForDown(Block):
    """Runs its last GEMM under ``no_grad``: one op cannot do that."""

    def experts(self, x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        flat = ids.reshape(-1)
        rows = x.repeat_interleave(TOP_K, dim=0)
        h = torch.bmm(self.gate_up[flat], rows.unsqueeze(-1)).squeeze(-1)
        gate, up = h.chunk(2, dim=-1)
        with torch.no_grad():
            out = torch.bmm(self.down[flat], (torch.nn.functional.silu(gate) * up).unsqueeze(-1)).squeeze(-1)
        return (out * weights.reshape(-1, 1)).view(-1, TOP_K, x.shape[-1]).sum(dim=1)


@pytest.mark.parametrize(("kind", "fused"), [(ChoiceWithoutGradients, True), (NoGradientsForDown, False)])
@pytest.mark.filterwarnings("ignore::moec.MoecWarning")
def test_the_block_begins_behind_the_last_change(kind: type[Block], fused: bool) -> None:
    block = kind()
    found = []
    with moec.recording() as report:
        for run in (block, moec_compile(block)):
            x = tokens().requires_grad_()
            y = run(x)
            found.append((y, *torch.autograd.grad(y.sum(), [x, *block.parameters()], allow_unused=True)))
    assert [b.fused for b in report.layers] == [fused]
    assert fused or "different modes" in str(report.layers[0].reason)
    for want, got in zip(*found, strict=True):
        torch.testing.assert_close(got, want)
