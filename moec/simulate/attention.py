"""Attention of a model's layers in the graph that is simulated: prompts of one length, each attended causally.

Several micro-batches go through the same layers, so that what one computes can hide what another sends. Norms are
there for their bytes; positions are not turned (a copy of queries and keys, which real kernels fuse with others).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from moec.cost.attention import Attention
from moec.ir.builder import Builder
from moec.ir.core import Graph, Value
from moec.ir.types import TensorType
from moec.simulate.errors import SimulationError
from moec.simulate.layer import add_weights, element_type, expert_layer, shares

if TYPE_CHECKING:
    from moec.parallel.planner import ModelFacts


@dataclass(frozen=True)
class Prompts:
    """What is attended to.

    Attributes:
        length: Tokens of every prompt; a micro-batch holds whole prompts. 0 where there is no attention.
        layers: How many layers, one behind the other.
        micro_batches: How many, each of T tokens.
    """

    length: int
    layers: int = 1
    micro_batches: int = 1

    def check(self, tokens: int) -> None:
        """Refuse tokens that are no whole prompts.

        Raises:
            SimulationError: They are not, or there is no attention for several layers or micro-batches.
        """
        if not self.length and (self.layers, self.micro_batches) != (1, 1):
            raise SimulationError(
                "several layers and micro-batches are simulated with their attention", hint="--attention 4096"
            )
        whole = self.length * self.micro_batches
        if whole and tokens % whole:
            raise SimulationError(
                f"{tokens} tokens of a rank are not {self.micro_batches} micro-batches of prompts of {self.length}",
                hint=f"--tokens {-(-tokens // whole) * whole}",
            )


def attention_of(config: Any) -> Attention:
    """The attention of a model's config, as transformers' configs say it.

    Raises:
        SimulationError: The config does not say how many heads there are.
    """
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    hidden, heads = getattr(config, "hidden_size", None), getattr(config, "num_attention_heads", None)
    if not (isinstance(hidden, int) and isinstance(heads, int)):
        raise SimulationError("the model's config does not say hidden_size and num_attention_heads")
    if latent := int(getattr(config, "kv_lora_rank", None) or 0):
        rotated = int(config.qk_rope_head_dim)
        key, value = int(config.qk_nope_head_dim) + rotated, int(config.v_head_dim)
        query = int(getattr(config, "q_lora_rank", None) or 0)
        return Attention(hidden, heads, heads, key, value, query, latent, rotated)
    width = int(getattr(config, "head_dim", None) or hidden // heads)
    return Attention(hidden, heads, int(getattr(config, "num_key_value_heads", None) or heads), width, width)


def model_graphs(m: ModelFacts, a: Attention, prompts: Prompts, ranks: int, group: str = "ep") -> list[Graph]:
    """A graph for every rank: micro-batches through layers of attention and experts, residual sums around both.

    Raises:
        SimulationError: A rank would hold no expert.
    """
    sizes = shares(m, ranks)
    made = {own: _model(m, a, prompts, sizes, own, group) for own in set(sizes)}
    return [made[own] for own in sizes]


def _model(m: ModelFacts, a: Attention, prompts: Prompts, sizes: tuple[int, ...], own: int, group: str) -> Graph:
    graph, tokens = Graph("model"), TensorType.of(element_type(m), "T", m.hidden)
    b = Builder(graph)
    streams = [graph.add_arg(tokens, f"x{i}") for i in range(prompts.micro_batches)]
    for _ in range(prompts.layers):
        around = _Weights.of(graph, m, a)
        weights = add_weights(graph, m, own)
        for i, x in enumerate(streams):
            attended = _attend(b, a, around, _norm(b, x, around.norms[0]), prompts.length)
            x = b.call("aten.add.Tensor", [x, attended], result_types=[tokens]).result
            y = expert_layer(b, m, weights, sizes, _norm(b, x, around.norms[1]), group)
            streams[i] = b.call("aten.add.Tensor", [x, y], result_types=[tokens]).result
    b.ret(*streams)
    return graph


@dataclass(frozen=True)
class _Weights:
    """Of one layer's attention: each product's, by its sizes, and two norms'."""

    by_sizes: dict[tuple[int, int], Value]
    norms: tuple[Value, Value]

    @staticmethod
    def of(graph: Graph, m: ModelFacts, a: Attention) -> _Weights:
        kind = element_type(m)
        found = {}
        for product in a.products(1):
            inputs, outputs = int(product.inputs), int(product.outputs)
            found[inputs, outputs] = graph.add_arg(TensorType.of(kind, outputs, inputs), "weight")
        norms = [graph.add_arg(TensorType.of(kind, m.hidden), "norm") for _ in range(2)]
        return _Weights(found, (norms[0], norms[1]))


def _norm(b: Builder, x: Value, weight: Value) -> Value:
    assert isinstance(x.type, TensorType)
    shape = [int(x.type.shape[1])]
    return b.call("aten.rms_norm.default", [x, shape, weight, 1e-6], result_types=[x.type]).result


def _attend(b: Builder, a: Attention, weights: _Weights, x: Value, length: int) -> Value:
    """Attention of tokens ``x[T, H]``."""
    assert isinstance(x.type, TensorType)
    kind = x.type.dtype.name

    def product(value: Value, inputs: int, outputs: int) -> Value:
        type = TensorType.of(kind, "T", outputs)
        return b.call("aten.linear.default", [value, weights.by_sizes[inputs, outputs]], result_types=[type]).result

    def piece(value: Value, first: int, last: int) -> Value:
        type = TensorType.of(kind, "T", last - first)
        return b.call("aten.slice.Tensor", [value, 1, first, last], result_types=[type]).result

    def by_head(value: Value, heads: int, width: int) -> Value:
        """[T, heads * width] as [prompts, heads, length, width]."""
        apart = TensorType.of(kind, "N", length, heads, width)
        split = b.call("aten.reshape.default", [value, [-1, length, heads, width]], result_types=[apart]).result
        type = TensorType.of(kind, "N", heads, length, width)
        return b.call("aten.transpose.int", [split, 1, 2], result_types=[type]).result

    query = product(x, a.hidden, a.query_latent) if a.query_latent else x
    query = by_head(product(query, a.query_latent or a.hidden, a.heads * a.key), a.heads, a.key)
    kept = product(x, a.hidden, a.latent + a.rotated if a.latent else a.kv_heads * (a.key + a.value))
    if a.latent:
        unturned = a.heads * (a.key - a.rotated)
        made = product(piece(kept, 0, a.latent), a.latent, unturned + a.heads * a.value)
        copies = [piece(kept, a.latent, a.latent + a.rotated)] * a.heads  # every head's key has the same rotated part
        type = TensorType.of(kind, "T", a.heads * a.key)
        key = b.call("aten.cat.default", [[piece(made, 0, unturned), *copies], 1], result_types=[type]).result
        value = piece(made, unturned, unturned + a.heads * a.value)
    else:
        key = piece(kept, 0, a.kv_heads * a.key)
        value = piece(kept, a.kv_heads * a.key, a.kv_heads * (a.key + a.value))
    core = b.call(
        "aten.scaled_dot_product_attention.default",
        [query, by_head(key, a.kv_heads, a.key), by_head(value, a.kv_heads, a.value), None, 0.0, True],
        {"enable_gqa": a.kv_heads < a.heads},
        result_types=[TensorType.of(kind, "N", a.heads, length, a.value)],
    ).result
    by_token = TensorType.of(kind, "N", length, a.heads, a.value)
    back = b.call("aten.transpose.int", [core, 1, 2], result_types=[by_token]).result
    type = TensorType.of(kind, "T", a.heads * a.value)
    together = b.call("aten.reshape.default", [back, [-1, a.heads * a.value]], result_types=[type]).result
    return product(together, a.heads * a.value, a.hidden)
