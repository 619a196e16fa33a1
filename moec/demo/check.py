"""The demo's numeric check, by the rule that routing must be fixed before numbers are compared.

A logit that differs in its last bit may send a token with a near-tie to another expert, and its output then differs
altogether. So one layer's experts are compared at given ids and weights with an independent loop in fp32, and the whole
model is compared over tokens, with those that are near a tie counted apart.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

#: A bf16 result against fp32 arithmetic on the same bf16 weights, as a share of the largest output.
EXPERTS_TOLERANCE = 0.02
#: Whole-model logits of tokens that are not near a tie, as a share of the largest logit.
LOGITS_TOLERANCE = 0.05
#: Two router logits are near a tie when they are closer than this many bf16 steps of the logits' root mean square:
#: about what rounding in the layers before adds up to (seen: 0.006 at a root mean square of 0.31).
NEAR_TIE_STEPS = 6
#: Tokens of the experts' check; the loop in fp32 is slow.
TOKENS = 128
_BF16_STEP = 2.0**-8


@dataclass(frozen=True)
class ExpertsCheck:
    """Largest errors of one layer's experts against the loop, as shares of its largest output."""

    compiled: float
    eager: float
    tokens: int

    @property
    def ok(self) -> bool:
        return self.compiled <= EXPERTS_TOLERANCE


@dataclass(frozen=True)
class ModelCheck:
    """Compiled against eager logits over ``tokens`` tokens; ``near_ties`` of them may be routed otherwise."""

    tokens: int
    near_ties: int
    largest: float
    same_choice: int

    @property
    def ok(self) -> bool:
        return self.largest <= LOGITS_TOLERANCE


def loop_over_experts(experts: Any, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    """The experts' layer by its definition, one expert after the other, in fp32.

    Args:
        experts: Module with ``gate_up_proj`` [E, 2I, H] (gate rows first) and ``down_proj`` [E, H, I].
        x: Tokens [T, H].
        ids: Chosen experts [T, k].
        weights: Their weights [T, k].

    Returns:
        [T, H] in fp32.
    """
    x = x.float()
    out = torch.zeros_like(x)
    for expert in ids.unique().tolist():
        token, slot = (ids == expert).nonzero(as_tuple=True)
        gate, up = F.linear(x[token], experts.gate_up_proj[expert].float()).chunk(2, dim=-1)
        y = F.linear(F.silu(gate) * up, experts.down_proj[expert].float())
        out.index_add_(0, token, y * weights[token, slot, None].float())
    return out


def check_experts(model: Any, compiled_experts: Callable[..., Tensor], input_ids: Tensor) -> ExpertsCheck:
    """Compares the first layer's experts, compiled and eager, with the loop, at the routing that eager chose."""
    experts = model.model.layers[0].mlp.experts
    seen: list[tuple[Tensor, ...]] = []
    hook = experts.register_forward_pre_hook(lambda module, args: seen.append(tuple(a.clone() for a in args)))
    try:
        model(input_ids=input_ids, use_cache=False, logits_to_keep=1)
    finally:
        hook.remove()
    x, ids, weights = seen[0]
    expected = loop_over_experts(experts, x, ids, weights)
    scale = float(expected.abs().max())

    def error(got: Tensor) -> float:
        return float((got.float() - expected).abs().max()) / scale

    return ExpertsCheck(error(compiled_experts(x, ids, weights)), error(experts(x, ids, weights)), x.shape[0])


def near_ties(router_logits: Sequence[Tensor], top_k: int) -> Tensor:
    """Which tokens are near a tie between the last chosen and the first refused expert, in any layer.

    Args:
        router_logits: One [T, E] tensor a layer.
        top_k: Experts a token goes to.

    Returns:
        Boolean [T].
    """
    near = torch.zeros(router_logits[0].shape[0], dtype=torch.bool)
    for logits in router_logits:
        logits = logits.float()
        top = logits.topk(top_k + 1, dim=-1).values
        gap = top[:, top_k - 1] - top[:, top_k]
        near |= gap <= NEAR_TIE_STEPS * _BF16_STEP * logits.square().mean(-1).sqrt()
    return near


def check_model(expected: Tensor, got: Tensor, near: Tensor) -> ModelCheck:
    """Compares logits [N, V] of the last N tokens; ``near`` [N] marks the tokens that are near a tie."""
    scale = float(expected.float().abs().max())
    error = (got.float() - expected.float()).abs().amax(-1) / scale
    firm = error[~near]
    same = int((got.argmax(-1) == expected.argmax(-1)).sum())
    return ModelCheck(expected.shape[0], int(near.sum()), float(firm.max()) if len(firm) else 0.0, same)
