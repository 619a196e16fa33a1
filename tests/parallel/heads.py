"""A small model with attention, and what ranks that split its heads do with it. Imported by spawned processes."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors.torch import save_file
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.nn import functional

import moec
from moec.backends.distributed import traffic
from tests.compile.blocks import HIDDEN, Block, tokens

HEADS, KEYS, WIDTH = 4, 2, 4
LAYERS = 2
TP = 2
SEQUENCES = (7, 3)  # tokens of each group of ranks that split heads


class Attention(nn.Module):
    """Grouped queries, a norm of each head, biases; it counts its heads itself, as many models do."""

    def __init__(self, heads: int = HEADS, keys: int = KEYS) -> None:
        super().__init__()
        self.num_heads, self.num_key_value_heads, self.groups = heads, keys, heads // keys
        self.q_proj = nn.Linear(HIDDEN, heads * WIDTH)
        self.k_proj = nn.Linear(HIDDEN, keys * WIDTH, bias=False)
        self.v_proj = nn.Linear(HIDDEN, keys * WIDTH, bias=False)
        self.q_norm = nn.RMSNorm(WIDTH)
        self.o_proj = nn.Linear(heads * WIDTH, HIDDEN)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        rows = len(hidden_states)
        q = self.q_norm(self.q_proj(hidden_states).view(rows, self.num_heads, WIDTH)).transpose(0, 1)
        k = self.k_proj(hidden_states).view(rows, self.num_key_value_heads, WIDTH).transpose(0, 1)
        v = self.v_proj(hidden_states).view(rows, self.num_key_value_heads, WIDTH).transpose(0, 1)
        k, v = k.repeat_interleave(self.groups, dim=0), v.repeat_interleave(self.groups, dim=0)
        mixed = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        out: torch.Tensor = self.o_proj(mixed.transpose(0, 1).reshape(rows, -1))
        return out


class Decoder(nn.Module):
    """Layers of attention and experts, one sequence at a time: [T, H] to [T, H]."""

    def __init__(self, heads: int = HEADS, keys: int = KEYS, layers: int = LAYERS) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.config = SimpleNamespace(num_attention_heads=heads, num_key_value_heads=keys)
        self.layers = nn.ModuleList(
            nn.ModuleDict({"norm": nn.RMSNorm(HIDDEN), "self_attn": Attention(heads, keys), "mlp": Block(seed=i)})
            for i in range(layers)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = x + layer["self_attn"](hidden_states=layer["norm"](x))  # type: ignore[index]
            x = x + layer["mlp"](x)  # type: ignore[index]
        return x


def sequence(group: int, seed: int = 1) -> torch.Tensor:
    """The tokens of one group of ranks."""
    return tokens(SEQUENCES[group], seed + 10 * group)


def _compile(m: nn.Module) -> Any:
    return torch.compile(
        m, backend="moec", fullgraph=True, options={"inner": "eager", "backends": ["aten"], "checks": "strict"}
    )


def _whole(m: nn.Module, gradients: bool = False) -> dict[str, torch.Tensor]:
    held: dict[str, Any] = {n: p.grad if gradients else p for n, p in m.named_parameters()}
    return {n: p.full_tensor().detach().clone() for n, p in held.items()}


def trained(rank: int, folder: Path) -> dict[str, Any]:
    """A training step on four ranks, bytes counted; saved, and loaded on two."""
    m = moec.parallelize(Decoder(), None, "tp=2,ep=4")
    x = sequence(rank // TP)
    with moec.recording() as report:
        run = _compile(m)
        traffic.reset()
        out = run(x)
        sent = dict(traffic.sent())
        out.square().sum().backward()
    both = dict(traffic.sent())
    found: dict[str, Any] = {
        "out": out.detach(), "grads": _whole(m, gradients=True), "sent": sent, "both": both,
        "fused": [b.fused for b in report.layers],
        "norm": nn.utils.clip_grad_norm_(m.parameters(), 1.0).full_tensor(),  # type: ignore[attr-defined]
        "shares": {n: p.to_local().numel() / p.numel() for n, p in m.named_parameters()},  # type: ignore[attr-defined]
    }  # fmt: skip
    torch.optim.SGD(m.parameters(), lr=0.1).step()
    with torch.no_grad():
        found["more"] = run(sequence(rank // TP, 2))
    dcp.save({"model": m.state_dict()}, checkpoint_id=folder / "heads")
    found["saved"] = _whole(m)
    pair = DeviceMesh("cpu", [0, 1])
    if rank < 2:
        with torch.device("meta"):
            small = Decoder()
        moec.parallelize(small, pair, "tp=2,ep=2")
        state = {"model": small.state_dict()}
        dcp.load(state, checkpoint_id=folder / "heads", process_group=pair.get_group())
        found["loaded"] = _whole(small)
    return found


def folded(rank: int, folder: Path) -> dict[str, Any]:
    """More ranks to the heads than to the experts, read from safetensors; gradients are sums; no compiler."""
    file = folder / "decoder.safetensors"
    if rank == 0:
        save_file(Decoder(4, 4).state_dict(), file)
    dist.barrier()
    with torch.device("meta"):
        m = Decoder(4, 4)
    moec.parallelize(m, None, "tp=4,ep=2", weights=file, mean=False)
    out = m(sequence(0))
    out.square().sum().backward()
    return {"out": out.detach(), "grads": _whole(m, gradients=True)}
