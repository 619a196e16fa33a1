"""Every way to fold a model over a mesh, and what each costs a rank: memory, and bytes sent.

Attention has its mapping, data parallel times tensor parallel, the experts have theirs, ``edp * ep * etp``, and both
are over the same ranks (MoE Parallel Folding, arXiv:2504.14960, section 3.1). Numbers are counts of bytes, not times:
tokens are taken to choose every expert equally often.

Notation: N ranks, T tokens of each, H width of a token, k choices, b bytes an element.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from moec.parallel.attention import owner_of
from moec.parallel.experts import expert_parameters
from moec.parallel.formula import expected_bytes
from moec.parallel.plan import ParallelError


@dataclass(frozen=True)
class ModelFacts:
    """What of a model decides a folding.

    Attributes:
        experts: E of a layer.
        top_k: k.
        layers: Layers with experts.
        hidden: H.
        inner: Width of an expert.
        heads, kv_heads: Of attention.
        attention_layers: Layers with attention.
        element: b.
        expert_bytes: All experts of all layers.
        attention_bytes: All attention weights.
        other_bytes: Everything else: embeddings, norms, routers, shared experts.
        shared: Width of the shared expert of a layer, 0 without one.
    """

    experts: int
    top_k: int
    layers: int
    hidden: int
    inner: int
    heads: int
    kv_heads: int
    attention_layers: int
    element: int
    expert_bytes: int
    attention_bytes: int
    other_bytes: int
    shared: int = 0

    @staticmethod
    def of(model: torch.nn.Module) -> ModelFacts:
        """Read a model, which may be on the meta device.

        Raises:
            ParallelError: It has no stacked experts, or no config that says its sizes.
        """
        found = expert_parameters(model)
        if not found:
            raise ParallelError("the model holds no stacked experts to deal out")
        config: Any = getattr(model, "config", None)
        config = config.get_text_config() if hasattr(config, "get_text_config") else config
        heads = getattr(config, "num_attention_heads", None)
        top_k = getattr(config, "num_experts_per_tok", None)
        hidden = getattr(config, "hidden_size", None)
        if not (isinstance(heads, int) and isinstance(top_k, int) and isinstance(hidden, int)):
            raise ParallelError(
                "the model's config does not say num_attention_heads, num_experts_per_tok and hidden_size",
                hint="make a ModelFacts by hand: moec.parallel.planner.ModelFacts(...)",
            )
        sizes = {n: p.numel() * p.element_size() for n, p in model.named_parameters()}
        of_experts = sum(sizes[n] for n in found)
        attention = {n: owner for n in sizes if (owner := owner_of(n))}
        owners = {n.rpartition(".")[0] for n in found}
        stacked = next(p for n, p in model.named_parameters() if n in found and p.dim() == 3)
        inner = min(stacked.shape[1:]) if hidden not in stacked.shape[1:] else _other(stacked, hidden)
        width = int(getattr(config, "moe_intermediate_size", None) or inner)
        return ModelFacts(
            experts=max(found.values()),
            top_k=top_k,
            layers=len(owners),
            hidden=hidden,
            inner=width,
            heads=heads,
            kv_heads=int(getattr(config, "num_key_value_heads", None) or heads),
            attention_layers=len(set(attention.values())),
            element=stacked.element_size(),
            expert_bytes=of_experts,
            attention_bytes=sum(sizes[n] for n in attention),
            other_bytes=sum(sizes.values()) - of_experts - sum(sizes[n] for n in attention),
            shared=_shared_width(config, width),
        )


def _shared_width(config: Any, inner: int) -> int:
    """Width of a layer's shared expert as transformers' configs say it: in one number, or in experts' widths."""
    told = getattr(config, "shared_expert_intermediate_size", None) or getattr(config, "n_shared_experts", 0) or 0
    return int(told) if hasattr(config, "shared_expert_intermediate_size") else int(told) * inner


def _other(stacked: torch.Tensor, hidden: int) -> int:
    """The dimension of ``[E, a, b]`` that is not the hidden one; half of it, where gate and up lie together."""
    a, b = stacked.shape[1:]
    width = a if b == hidden else b
    return int(width) // 2 if b == hidden else int(width)


@dataclass(frozen=True)
class Folding:
    """One mapping, and what it costs each rank.

    Attributes:
        dp, tp: Of attention: replicas with tokens of their own, ranks that split its heads.
        edp, ep, etp: Of experts: replicas, ranks that share them, ranks that split each.
        memory: Bytes of weights.
        form: The form of dispatch that sends the fewest bytes.
        attention_sent: Bytes sent by attention in one forward.
        expert_sent: Bytes sent for experts in one forward.
        gradient_sent: Bytes sent for gradients of replicas in one training step.
        whole_heads: Every rank of ``tp`` has key-value heads of its own.
        nodes: Nodes that the ranks of ``ep`` are on.
    """

    dp: int
    tp: int
    edp: int
    ep: int
    etp: int
    memory: int
    form: str
    attention_sent: int
    expert_sent: int
    gradient_sent: int
    whole_heads: bool = True
    nodes: int = 1

    @property
    def reason(self) -> str:
        """Why ``moec.parallelize`` does not carry it out; empty where it does."""
        if self.etp > 1:
            return "not carried out: etp"
        if not self.whole_heads:
            return "not carried out: key-value heads shared by ranks"
        return "" if self.tp % self.ep == 0 or self.ep % self.tp == 0 else "not carried out: ep and tp overlap in part"

    @property
    def runs(self) -> bool:
        """``moec.parallelize`` carries it out."""
        return not self.reason

    @property
    def plan(self) -> str:
        """What to give ``moec.parallelize``."""
        parts = [f"tp={self.tp}"] * (self.tp > 1) + [f"ep={self.ep}"]
        parts += [f"nodes={self.nodes}"] * (self.form == "hierarchical")
        return ",".join(parts + [f"form={self.form}"] * (self.form not in ("none", "flat")))

    @property
    def forward_sent(self) -> int:
        return self.attention_sent + self.expert_sent


def _divisors(n: int) -> list[int]:
    return [d for d in range(1, n + 1) if n % d == 0]


def _splits_heads(m: ModelFacts, tp: int) -> bool:
    return m.heads % tp == 0 and (m.kv_heads % tp == 0 or tp % m.kv_heads == 0)


def foldings(m: ModelFacts, ranks: int, *, tokens: int = 1024, nodes: int = 1) -> list[Folding]:
    """All legal foldings, those that send least in a forward first.

    Legal is: the sizes multiply to N on both sides, ``tp`` divides the heads (and key-value heads, or is a multiple of
    them), no rank of ``ep`` is without an expert, and ``etp`` divides an expert's width.

    Args:
        m: The model.
        ranks: N.
        tokens: T.
        nodes: Nodes that the ranks are on, as many on each.

    Raises:
        ParallelError: The ranks are not spread evenly over the nodes.
    """
    if ranks < 1 or nodes < 1 or ranks % nodes:
        raise ParallelError(f"{ranks} ranks are not spread evenly over {nodes} nodes")
    found = [
        _folding(m, ranks, tp, ep, etp, tokens, nodes)
        for tp in _divisors(ranks)
        if _splits_heads(m, tp)
        for ep in _divisors(ranks)
        if -(-m.experts // -(-m.experts // ep)) == ep
        for etp in _divisors(ranks // ep)
        if m.inner % etp == 0
    ]
    return sorted(found, key=lambda f: (f.forward_sent, f.memory, f.tp, f.etp))


def _folding(m: ModelFacts, ranks: int, tp: int, ep: int, etp: int, tokens: int, nodes: int) -> Folding:
    dp, edp = ranks // tp, ranks // (ep * etp)
    share = -(-m.experts // ep) / m.experts / etp  # of the rank that holds most
    row = m.hidden * m.element
    form, dispatched = min(_forms(m, ep, nodes, ranks, tokens, row), key=lambda pair: pair[1])
    split = 2 * (etp - 1) * tokens * m.top_k * row  # all-gather of what came, reduce-scatter of what goes
    scattered = (tp - 1) * tokens * row  # every rank of tp dispatches a part of the tokens; all get all results
    reduced = 2 * (tp - 1) * tokens * row  # an all-reduce of T * tp tokens: 2 (tp - 1) / tp of their bytes
    dense = m.other_bytes + m.attention_bytes / tp
    gradients = 2 * (dp - 1) / dp * dense + 2 * (edp - 1) / edp * m.expert_bytes * share
    return Folding(
        dp=dp, tp=tp, edp=edp, ep=ep, etp=etp,
        memory=round(dense + m.expert_bytes * share),
        form=form,
        attention_sent=round(m.attention_layers * reduced),
        expert_sent=round(m.layers * (dispatched + split + scattered)),
        gradient_sent=round(gradients),
        whole_heads=m.kv_heads % tp == 0,
        nodes=_nodes(ep, nodes, ranks),
    )  # fmt: skip


def _nodes(ep: int, nodes: int, ranks: int) -> int:
    """Nodes that ranks sharing experts are on."""
    return max(1, ep * nodes // ranks)


def _forms(m: ModelFacts, ep: int, nodes: int, ranks: int, tokens: int, row: int) -> Iterator[tuple[str, float]]:
    """Forms of dispatch, and bytes of rows that a rank sends in one."""
    if ep == 1:
        yield "none", 0.0
        return
    yield "flat", expected_bytes(tokens, m.top_k, ep, row)
    yield "gather", expected_bytes(tokens, m.top_k, ep, row, "gather")
    here = _nodes(ep, nodes, ranks)
    if 1 < here < ep:
        yield "hierarchical", expected_bytes(tokens, m.top_k, ep, row, "hierarchical", here)
