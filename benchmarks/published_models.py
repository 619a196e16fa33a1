"""Whole models by their sizes: what attention, experts and collectives of a layer take."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from moec.cost.attention import Attention, core_seconds
from moec.cost.products import Product
from moec.cost.products import product_seconds as seconds_of
from moec.simulate import Topology
from moec.targets import Target
from published_layers import experts_seconds
from published_parts import rows


@dataclass(frozen=True)
class Model:
    """Sizes of a model.

    Attributes:
        attention: Of every layer.
        experts, top_k, inner, shared: Of a layer; widths of an expert and of the shared one.
        layers: With experts.
        dense, dense_inner: Layers without experts, and their width.
        vocabulary: Outputs of the last product.
        item: Bytes of an element of what products read.
    """

    attention: Attention
    experts: int
    top_k: int
    inner: int
    shared: int
    layers: int
    dense: int
    dense_inner: int
    vocabulary: int
    item: int

    @property
    def hidden(self) -> int:
        return self.attention.hidden


MODELS = {
    "deepseek-v3": Model(
        Attention(7168, 128, 128, 192, 128, query_latent=1536, latent=512, rotated=64), experts=256, top_k=8,
        inner=2048, shared=2048, layers=58, dense=3, dense_inner=18432, vocabulary=129280, item=1,
    ),
    "qwen3-30b-a3b": Model(
        Attention(2048, 32, 4, 128, 128), experts=128, top_k=8, inner=768, shared=0, layers=48, dense=0, dense_inner=0,
        vocabulary=151936, item=2,
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Parts:
    """Seconds of a layer's parts on a rank, with all units and beside a collective; and of its collectives.

    Attributes:
        attention, shared, experts: Computed; (alone, beside).
        there, back: Of rows to their experts and home.
        gradients: Of weight gradients that are added to sums in f32, which are read and written.
    """

    attention: tuple[float, float]
    shared: tuple[float, float]
    experts: tuple[float, float]
    there: float
    back: float
    gradients: float


def rate_of(p: dict[str, Any], model: Model, target: Target, whole: Target) -> float:
    """Peak of the products: a row's own number, or the target's."""
    left = target.flops_per_s("bf16") / whole.flops_per_s("bf16")
    return p["flops"] * left if "flops" in p else target.flops_per_s("f8e4m3fn" if model.item == 1 else "bf16")


def attention_seconds(topology: Topology, p: dict[str, Any], model: Model, tokens: float, target: Target) -> float:
    """Products, core and norms of one layer's attention, forward."""
    a, device = model.attention, topology.device
    generates = "context" in p
    found = 0.0
    for product in a.products(tokens, generates, model.item):
        rate = target.flops_per_s("bf16") if product.item == 2 else rate_of(p, model, target, device.target)
        found += device.launch_s + seconds_of(product, target, rate)
    if generates:
        flops = a.generated_flops(tokens, p["context"])
        bytes = a.cache_bytes(tokens / p.get("predicted", 1), p["context"])
    else:
        flops, bytes = a.prompt_flops(tokens, p["length"]), 2 * tokens * a.heads * (a.key + a.value) * 2
    found += device.launch_s + core_seconds(flops, bytes, target)
    return found + _moving(topology, tokens * attention_bytes(model), 6)


def attention_bytes(model: Model) -> float:
    """Bytes a token that norms, residual sums, rotations and casts around attention read and write."""
    a, item = model.attention, model.item
    norms = 2 * model.hidden * (3 * 2 + item) + (a.query_latent + a.latent) * (2 + item)
    rotated = 2 * 2 * (a.heads + a.kv_heads) * a.key
    return norms + rotated + (a.heads * a.value * (2 + item) if item == 1 else 0)


def experts_part(topology: Topology, p: dict[str, Any], model: Model, tokens: float, target: Target) -> float:
    """A rank's experts, forward; of prompts also sorting rows before and adding them up behind."""
    slots = tokens * model.top_k
    found = experts_seconds(topology, _sizes(p, model, p["ranks"], p.get("held", model.experts)), slots, target)
    if "context" in p:
        return found  # rows come and go in place
    moved = slots * model.hidden * (2 * model.item + 2) + 4 * tokens * model.hidden * 2
    return found + _moving(topology, moved, 3)


def _sizes(p: dict[str, Any], model: Model, ranks: int, experts: int) -> dict[str, Any]:
    found = {"ranks": ranks, "experts": experts, "hidden": model.hidden, "inner": model.inner, "item": model.item}
    given = {"flops": p["flops"]} if "flops" in p else {"dtype": "f8e4m3fn" if model.item == 1 else "bf16"}
    return {**found, **given}


def _moving(topology: Topology, bytes: float, kernels: int) -> float:
    return kernels * topology.device.launch_s + bytes / topology.device.target.memory_bandwidth


def parts_of(topology: Topology, p: dict[str, Any], tokens: int) -> Parts:
    """Of one layer on ``tokens`` tokens of every rank."""
    model, device = MODELS[p["model"]], topology.device
    targets = (device.target, device.beside_collective if p.get("units", True) else device.target)
    dense = {**_sizes(p, model, 1, 1), "inner": model.shared}
    sent = {"ranks": p["ranks"], "tokens": tokens, "top_k": model.top_k, "experts": p.get("held", model.experts)}
    sent |= {k: p[k] for k in ("send", "own", "groups", "top_groups") if k in p}

    def both(part: Callable[[Target], float]) -> tuple[float, float]:
        return part(targets[0]), part(targets[1])

    return Parts(
        both(lambda t: attention_seconds(topology, p, model, tokens, t)),
        both(lambda t: experts_seconds(topology, dense, tokens, t) if model.shared else 0.0),
        both(lambda t: experts_part(topology, p, model, tokens, t)),
        rows(topology, {**sent, "row": p["row"]})[0],
        rows(topology, {**sent, "row": p["row_back"]})[0],
        8 * weights_held(p, model) / device.target.memory_bandwidth,
    )


def weights_held(p: dict[str, Any], model: Model) -> float:
    """Weight elements of a layer on a rank."""
    own = p.get("held", model.experts) / p["ranks"]
    products = model.attention.products(1)
    return sum(x.inputs * x.outputs for x in products) + 3 * model.hidden * (own * model.inner + model.shared)


def around_seconds(topology: Topology, p: dict[str, Any], tokens: float) -> float:
    """What a forward takes outside of layers with experts: layers without, and the last product."""
    model, device = MODELS[p["model"]], topology.device
    dense = {**_sizes(p, model, 1, 1), "inner": model.dense_inner}
    found = 0.0
    if model.dense:
        each = attention_seconds(topology, p, model, tokens, device.target) + experts_seconds(topology, dense, tokens)
        found = model.dense * each
    asked = tokens / p["length"] if "length" in p and not p.get("training") else tokens
    head = Product(asked, model.hidden, model.vocabulary)
    return found + device.launch_s + seconds_of(head, device.target, device.target.flops_per_s("bf16"))
