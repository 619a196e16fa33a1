"""Attention in the graph of a config's layers: its time by hand, what it hides, what is refused."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest

from moec.cost.attention import CORE_EFFICIENCY, Attention, core_seconds
from moec.cost.products import product_seconds
from moec.ir.verifier import verify
from moec.parallel.plan import Plan
from moec.passes import parse_pipeline
from moec.simulate.attention import Prompts, attention_of, model_graphs
from moec.simulate.errors import SimulationError
from moec.simulate.layer import layer_graphs
from moec.simulate.run import Outcome, Setting, run_graphs
from moec.simulate.topology import load_topology
from moec.targets import parse_target
from tests.parallel.test_plan import FACTS

RANKS, TOKENS, LENGTH = 4, 1024, 512
SIZES = replace(FACTS, hidden=2048, inner=1024, element=2)
GROUPED = Attention(2048, 16, 4, 128, 128)
LATENT = Attention(2048, 16, 16, 192, 128, query_latent=768, latent=512, rotated=64)
SPANS = {"aten.linear.default", "aten.scaled_dot_product_attention.default"}


def run(a: Attention, prompts: Prompts, passes: str = "") -> Outcome:
    setting = Setting(load_topology("8xh100"), Plan(ep=RANKS), tokens=TOKENS)
    return run_graphs(model_graphs(SIZES, a, prompts, RANKS), setting, lambda: parse_pipeline(passes))


@pytest.mark.parametrize("a", [GROUPED, LATENT], ids=["grouped", "latent"])
def test_its_time_is_that_of_its_products_and_core(a: Attention) -> None:
    device = load_topology("8xh100").device
    rate = device.target.flops_per_s("bf16")
    products = a.products(TOKENS)
    want = sum(product_seconds(p, device.target, rate) for p in products)
    kept = TOKENS * (a.heads * (2 * a.key + 2 * a.value) if a.latent else 2 * a.heads * a.key + 2 * a.kv_heads * a.key)
    want += core_seconds(a.prompt_flops(TOKENS, LENGTH), 2 * kept, device.target)
    found = run(a, Prompts(LENGTH)).timeline.spans
    spans = [s for s in found if s.rank == 0 and s.label in SPANS]
    assert len(spans) == len(products) + 2, "the core, and the router"
    router = TOKENS * SIZES.hidden * 2 / device.target.memory_bandwidth  # nearly: its weights are small
    took = sum(s.end - s.begin for s in spans) - len(spans) * device.launch_s
    assert took == pytest.approx(want + router, rel=0.02)


def test_the_core_by_hand() -> None:
    target = parse_target("cuda:sm90")
    flops = GROUPED.prompt_flops(TOKENS, LENGTH)
    assert flops == 2 * 2 * TOKENS * LENGTH * 16 * 128 / 2, "two products, half of all pairs"
    assert core_seconds(flops, 0, target) == flops / (target.flops_per_s("bf16") * CORE_EFFICIENCY)
    assert core_seconds(flops, 1e12, target) == 1e12 / target.memory_bandwidth
    assert core_seconds(flops, 0, target, backward=True) > 2.5 * core_seconds(flops, 0, target)


def test_a_token_that_is_generated_reads_latents_as_they_lie() -> None:
    assert LATENT.cached == 576 and GROUPED.cached == 2 * 4 * 128
    assert LATENT.cache_bytes(3, 100) == 3 * 100 * 576 * 2
    assert LATENT.generated_flops(3, 100) == 3 * 100 * 16 * 2 * (576 + 512)
    assert GROUPED.generated_flops(3, 100) == 3 * 100 * 16 * 2 * 256
    prompt, generated = LATENT.products(7), LATENT.products(7, generates=True)
    made = [p for p in prompt if p not in generated]
    assert [(p.inputs, p.outputs) for p in made] == [(512, 16 * 256)], "keys and values of the latents"
    moved = [p for p in generated if p not in prompt]
    per_token = {round(sum(p.groups * p.inputs * p.outputs for p in ps)) for ps in (made, moved)}
    assert len(per_token) == 1, "the same products, a head each, on the other side"
    assert GROUPED.products(7) == GROUPED.products(7, generates=True)


def test_another_micro_batchs_attention_hides_rows_that_travel() -> None:
    prompts = Prompts(LENGTH, layers=2, micro_batches=2)
    for graph in model_graphs(SIZES, GROUPED, prompts, RANKS):
        verify(graph)
    one, dual = run(GROUPED, prompts), run(GROUPED, prompts, "interleave-layers")
    assert dual.report.seconds < one.report.seconds and dual.report.exposed_s < 0.5 * one.report.exposed_s
    assert [r.sent for r in dual.report.ranks] == [r.sent for r in one.report.ranks]
    assert [r.rows for r in dual.report.ranks] == [r.rows for r in one.report.ranks]


def test_one_micro_batch_has_nothing_to_hide_with() -> None:
    outcome = run(GROUPED, Prompts(LENGTH, layers=2), "interleave-layers")
    assert any("nothing large could run meanwhile" in r.message for r in outcome.remarks)
    assert outcome.report.seconds == run(GROUPED, Prompts(LENGTH, layers=2)).report.seconds


def test_layers_send_what_the_expert_layer_alone_sends() -> None:
    setting = Setting(load_topology("8xh100"), Plan(ep=RANKS), tokens=TOKENS)
    alone = run_graphs(layer_graphs(SIZES, RANKS), setting).report
    whole = run(GROUPED, Prompts(LENGTH, layers=3)).report
    assert [r.sent for r in whole.ranks] == [3 * r.sent for r in alone.ranks]


def test_what_configs_say() -> None:
    grouped = SimpleNamespace(hidden_size=64, num_attention_heads=4, num_key_value_heads=2, head_dim=32)
    assert attention_of(grouped) == Attention(64, 4, 2, 32, 32)
    assert attention_of(SimpleNamespace(hidden_size=64, num_attention_heads=4)) == Attention(64, 4, 4, 16, 16)
    latent = SimpleNamespace(
        hidden_size=64, num_attention_heads=4, kv_lora_rank=16, qk_rope_head_dim=8, qk_nope_head_dim=24,
        v_head_dim=20, q_lora_rank=None,
    )  # fmt: skip
    assert attention_of(latent) == Attention(64, 4, 4, 32, 20, 0, 16, 8)
    with pytest.raises(SimulationError, match="does not say hidden_size and num_attention_heads"):
        attention_of(SimpleNamespace(hidden_size=64))


def test_what_is_refused() -> None:
    with pytest.raises(SimulationError, match="1000 tokens of a rank are not 2 micro-batches of prompts of 128") as e:
        Prompts(128, micro_batches=2).check(1000)
    assert e.value.hint == "--tokens 1024"
    with pytest.raises(SimulationError, match="are simulated with their attention"):
        Prompts(0, layers=2).check(1000)
    Prompts(0).check(1000)
    with pytest.raises(SimulationError, match="leave 8 ranks without one"):
        model_graphs(SIZES, GROUPED, Prompts(LENGTH), 16)
