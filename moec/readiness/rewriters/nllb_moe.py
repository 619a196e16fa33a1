"""NLLB-MoE (transformers' ``NllbMoeSparseMLP``), as transformers runs it.

Its experts take the router's 0/1 mask of first choices ``[T, E]`` for a matrix of expert numbers: position e of a token
goes to expert 1 where the mask holds 1 and to expert 0 where it holds 0, whatever e is. So two experts run: expert 1
with the probability of a token's first choice, expert 0 with the sum of the others (the second choice: the router sets
the rest to 0). What is computed is kept, and run once per token; the positions' sum runs over probabilities.

While training, dropout draws numbers in an order that cannot be kept; the module's own forward runs then.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from moec.readiness.rewriters.canonical import experts
from moec.readiness.rewriters.known import Rewriter
from moec.readiness.rewriters.listed import DROPOUT, LINEAR, activation, drops_out, listed, projection, unlike

_USED = 2
"""The mask's values, 0 and 1, are the experts that run."""


def forward(self: Any, hidden_states: Tensor, padding_mask: Tensor | None = None) -> Tensor:
    """``[B, S, H]`` to ``[B, S, H]``; the mask is the router's affair."""
    mlps = listed(self.experts, _USED)
    dropped = self.experts.moe_token_dropout
    if self.training and (dropped > 0 or drops_out(mlps)):
        return type(self).forward(self, hidden_states, padding_mask)
    x = hidden_states.reshape(-1, hidden_states.shape[-1])
    first, probs, _ = self.router(x, padding_mask)
    chosen = first == 1
    others = torch.where(chosen, 0.0, probs).sum(dim=-1)
    weights = torch.stack([others, torch.where(chosen, probs, 0.0).sum(dim=-1)], dim=-1)
    if dropped > 0:
        weights = weights * (1 - dropped)  # what its own forward does with the experts' weighted rows
    ids = torch.arange(_USED, device=x.device).expand(x.shape[0], _USED)
    y = experts(
        x,
        ids,
        weights,
        _USED,
        [projection([e.fc1 for e in mlps])],
        activation(mlps[0], mlps[0].fc2),
        projection([e.fc2 for e in mlps]),
    )
    return y.view(hidden_states.shape)


def _cast_classifier(self: Any) -> None:
    """The router's; its own casts the classifier module anew in every call, which no exported program can hold."""
    if self.classifier.weight.dtype != self.dtype:
        type(self)._cast_classifier(self)


def _check(module: Any) -> str | None:
    if module.num_experts < _USED:
        return "it has one expert, and its own forward asks for a second one"
    return unlike(listed(module.experts, _USED), "fc1", "fc2")


def _note(module: Any) -> str:
    note = "as in transformers' own forward, experts 0 and 1 take all tokens: it reads the mask of choices as numbers"
    if module.experts.moe_token_dropout > 0 or drops_out(listed(module.experts, _USED)):
        note += "; while training, its own forward runs: dropout draws random numbers"
    return note


REWRITER = Rewriter(
    target="transformers.models.nllb_moe.modeling_nllb_moe.NllbMoeSparseMLP",
    how="grouped GEMMs on its experts' own matrices",
    methods={"forward": forward, "router._cast_classifier": _cast_classifier},
    sources={
        "NllbMoeSparseMLP.forward": "c216293d4a29f07a",
        "NllbMoeExperts.forward": "5a39df80205492c7",
        "NllbMoeDenseActDense.forward": "83f351a255121008",
        "NllbMoeTop2Router.forward": "defa837c04ee4a16",
        "NllbMoeTop2Router.route_tokens": "8d365c70901089b2",
        "NllbMoeTop2Router._cast_classifier": "f7f585070bac7498",
    },
    parts={
        "router": "NllbMoeTop2Router",
        "experts": "NllbMoeExperts",
        "experts.expert_*": "NllbMoeDenseActDense",
        "experts.expert_*.fc1": LINEAR,
        "experts.expert_*.fc2": LINEAR,
        "experts.expert_*.dropout": DROPOUT,
    },
    check=_check,
    note=_note,
)
