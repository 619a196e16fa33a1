"""LongCat-Flash (transformers' ``LongcatFlashExperts``): beside the real experts, identity experts that cost nothing.

Ids from E on name identity experts: their result is the token itself, times the slot's weight. Such slots take no part
in the experts' computation, and their weights are added up and multiplied with the token once (LongCat-Flash technical
report, arXiv:2509.01322, section 2.1.1, where they are called zero-computation experts).

The module allocates gate and up weights for them all the same and never reads them. They can be given back: its own
forward never reads them either, so it runs as before on the shorter parameter. That changes the shape in a saved
``state_dict``; one with the full shape still loads.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from moec.readiness.rewriters.canonical import Projection, experts, without
from moec.readiness.rewriters.known import Rewriter

_WEIGHT = "gate_up_proj"


def forward(self: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """x ``[T, H]``, ids and weights ``[T, k]`` to ``[T, H]``."""
    count = self.num_routed_experts

    def activation(h: Tensor) -> Tensor:
        gate, up = h.chunk(2, dim=-1)
        return self.act_fn(gate) * up

    identity = top_k_index >= count
    ids, weights = without(identity, top_k_index, top_k_weights)
    up = Projection([self.gate_up_proj[:count]])
    y = experts(hidden_states, ids, weights, count, [up], activation, Projection([self.down_proj]))
    share = torch.where(identity, top_k_weights, 0.0).sum(dim=-1, keepdim=True)
    return y + (hidden_states * share).to(hidden_states.dtype)


def _check(module: Any) -> str | None:
    return "it has no experts but identity experts" if module.gate_up_proj is None else None


def _unused_bytes(module: Any) -> int:
    weight = module.gate_up_proj
    return (weight.shape[0] - module.num_routed_experts) * weight[0].numel() * weight.element_size()


def _free(module: Any) -> None:
    """Shorten the parameter itself, so that an optimizer that holds it goes on with the right one."""
    weight, count = module.gate_up_proj, module.num_routed_experts
    grad = weight.grad
    weight.grad = None
    weight.data = weight.data[:count].clone()
    if grad is not None:
        weight.grad = grad[:count].clone()
    module.register_load_state_dict_pre_hook(shorten)


def shorten(module: Any, state_dict: dict[str, Any], prefix: str, local_metadata: dict[str, Any], *rest: Any) -> None:
    """Hook: a checkpoint with weights for the identity experts loads without them."""
    given = state_dict.get(prefix + _WEIGHT)
    if given is not None and given.shape[:1] == (module.total_experts,):
        kept = given[: module.num_routed_experts]
        # assigned as it is, a piece would keep the memory of the whole
        state_dict[prefix + _WEIGHT] = kept.clone() if local_metadata.get("assign_to_params_buffers") else kept


REWRITER = Rewriter(
    target="transformers.models.longcat_flash.modeling_longcat_flash.LongcatFlashExperts",
    how="identity experts run no GEMM: the token itself, times the sum of their weights",
    methods={"forward": forward},
    sources={"LongcatFlashExperts.forward": "754ee2b5bb3b2d99"},
    parts={"identity_expert": "torch.nn.modules.linear.Identity"},
    check=_check,
    unused_bytes=_unused_bytes,
    free=_free,
)
