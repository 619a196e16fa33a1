"""Switch Transformers (``SwitchTransformersSparseMLP``): one expert a token, up to a capacity per sequence.

The router decides who is dropped: a token beyond the capacity of its expert has an all-zero choice. It
becomes a slot of weight 0. While training, jitter on the router's input and dropout inside the experts draw numbers in
an order that cannot be kept; the module's own forward runs then.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from moec.readiness.rewriters import switch_router
from moec.readiness.rewriters.canonical import experts, without
from moec.readiness.rewriters.known import Rewriter
from moec.readiness.rewriters.listed import DROPOUT, LINEAR, activation, drops_out, listed, projection, unlike


def forward(self: Any, hidden_states: Tensor) -> Tensor:
    """``[B, S, H]`` to ``[B, S, H]``."""
    mlps = listed(self.experts, self.router.num_experts)
    if self.training and (self.router.jitter_noise > 0 or drops_out(mlps)):
        return type(self).forward(self, hidden_states)
    choice, probs, _ = self.router(hidden_states)
    ids, chosen = choice.argmax(dim=-1).reshape(-1, 1), choice.sum(dim=-1).reshape(-1, 1)
    ids, weights = without(chosen == 0, ids, probs.reshape(-1, 1))
    y = experts(
        hidden_states.reshape(-1, hidden_states.shape[-1]),
        ids,
        weights,
        self.router.num_experts,
        [projection([e.wi for e in mlps])],
        activation(mlps[0], mlps[0].wo),
        projection([e.wo for e in mlps]),
    )
    return y.view(hidden_states.shape)


def _check(module: Any) -> str | None:
    return unlike(listed(module.experts, module.router.num_experts), "wi", "wo")


def _note(module: Any) -> str:
    drawn = ["jitter"] if module.router.jitter_noise > 0 else []
    drawn += ["dropout"] if drops_out(listed(module.experts, module.router.num_experts)) else []
    return f"while training, its own forward runs: {' and '.join(drawn)} draw random numbers" if drawn else ""


REWRITER = Rewriter(
    target="transformers.models.switch_transformers.modeling_switch_transformers.SwitchTransformersSparseMLP",
    how="grouped GEMMs on its experts' own matrices; a token beyond an expert's capacity has weight 0",
    methods={"forward": forward, "router.forward": switch_router.forward},
    sources={
        "SwitchTransformersSparseMLP.forward": "434f91f6767bf670",
        "SwitchTransformersExperts.forward": "9f9b492cc070f002",
        "SwitchTransformersDenseActDense.forward": "2a0f704675bd862f",
        "SwitchTransformersTop1Router.forward": "6dfc1f51cc25a068",
    },
    parts={
        "router": "SwitchTransformersTop1Router",
        "experts": "SwitchTransformersExperts",
        "experts.expert_*": "SwitchTransformersDenseActDense",
        "experts.expert_*.wi": LINEAR,
        "experts.expert_*.wo": LINEAR,
        "experts.expert_*.dropout": DROPOUT,
    },
    check=_check,
    note=_note,
)
