"""``generate()``: eager PyTorch's tokens, one graph for decoding, and a cache that is written where it lies."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from torch._inductor.utils import run_and_get_code
from transformers import StaticCache

import moec
from moec.runtime import counters
from tests.compile.watch import Watch, moec_compile
from tests.support.models import build, inputs

NEW_TOKENS = 6
PROMPT = 5
CACHE_LENGTH = 37  # no other size of the model
LAYERS = 1
BATCH = 2
WHOLE_CACHE_WRITES = ("aten::copy_", "aten::clone", "aten::index_copy", "aten::index_put", "aten::slice_scatter")


class CacheWatch(Watch):
    """Counts, besides, ops that write as many elements as a whole cache tensor has."""

    def __init__(self, model: torch.nn.Module, size: int) -> None:
        super().__init__(model)
        self.size = size
        self.cache_copies: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = super().__torch_dispatch__(func, types, args, kwargs)
        if func._schema.name in WHOLE_CACHE_WRITES and isinstance(out, torch.Tensor) and out.numel() == self.size:
            self.cache_copies.append(func._schema.name)
        return out


def generate(model: transformers.PreTrainedModel, prompt: torch.Tensor, **kwargs: Any) -> list[list[int]]:
    """Greedy tokens. ``disable_compile``: transformers would compile the decode step itself, without us."""
    return model.generate(
        input_ids=prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=NEW_TOKENS,
        min_new_tokens=NEW_TOKENS,
        do_sample=False,
        use_cache=True,
        disable_compile=True,
        **kwargs,
    ).tolist()


def static_cache(model: transformers.PreTrainedModel) -> StaticCache:
    """A cache that is there before the first step, so that its tensors can be followed."""
    cache = StaticCache(config=model.config, max_cache_len=CACHE_LENGTH)
    config = model.config
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    cache.early_initialization(BATCH, config.num_key_value_heads, head, torch.float32, torch.device("cpu"))
    return cache


def cache_tensors(cache: StaticCache) -> list[torch.Tensor]:
    return [t for layer in cache.layers for t in (layer.keys, layer.values)]


@pytest.mark.parametrize("inner", ["eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_static_cache(inner: str) -> None:
    model = build("mixtral", layers=LAYERS)
    prompt = inputs("mixtral", BATCH, PROMPT)["input_ids"]
    want = generate(model, prompt, past_key_values=static_cache(model))
    cache = static_cache(model)
    before = cache_tensors(cache)
    places = [t.data_ptr() for t in before]
    watch = CacheWatch(model, before[0].numel())
    compiled = moec_compile(model.forward, inner=inner, watch=watch)
    model.forward = compiled
    with moec.recording() as report:
        got, code = run_and_get_code(generate, model, prompt, past_key_values=cache)

    assert got == want
    assert report.graphs == 2, "one graph for the prompt, one for all decode steps"
    assert len(report.layers) == 2 * LAYERS
    assert report.all_fused
    assert not watch.cache_copies
    assert not watch.expert_reads
    assert len(code) == (2 if inner == "inductor" else 0)
    shape = tuple(before[0].shape)
    assert not [text for text in code if f"empty_strided_cpu({shape}" in text], "Inductor makes a second cache"
    assert all(a is b for a, b in zip(cache_tensors(cache), before, strict=True)), "the cache was replaced"
    assert [t.data_ptr() for t in cache_tensors(cache)] == places
    written = PROMPT + NEW_TOKENS - 1
    assert all(t[:, :, :written].abs().sum(dim=(1, 3)).all() and not t[:, :, written:].any() for t in before)
    assert counters.snapshot().by_name["moec::experts"] == NEW_TOKENS * LAYERS


def test_the_watch_sees_a_copied_cache() -> None:
    watch = CacheWatch(torch.nn.Module(), 24)
    with watch:
        torch.zeros(2, 3, 4).index_copy(2, torch.tensor([1]), torch.ones(2, 3, 1))
        torch.zeros(2, 3, 4).index_copy_(2, torch.tensor([1]), torch.ones(2, 3, 1))
    assert watch.cache_copies == ["aten::index_copy"]


def test_dynamic_cache() -> None:
    model = build("deepseek_v3", layers=LAYERS)
    prompt = inputs("deepseek_v3", BATCH, PROMPT)["input_ids"]
    want = generate(model, prompt)
    model.forward = moec_compile(model.forward, fullgraph=False)
    with moec.recording() as report:
        got = generate(model, prompt)
    assert got == want
    assert report.all_fused
    assert (
        counters.snapshot().by_name["moec::experts"] == NEW_TOKENS * LAYERS * 2
    )  # the routed experts and the shared one


def test_generate_compiles_by_itself_when_asked() -> None:
    """transformers' own way: ``CompileConfig(backend="moec")``."""
    model = build("mixtral", layers=LAYERS)
    prompt = inputs("mixtral", BATCH, PROMPT)["input_ids"]
    want = generate(model, prompt, cache_implementation="static")
    config = transformers.CompileConfig(backend="moec", mode=None, options={"inner": "eager"}, fullgraph=False)
    config._compile_all_devices = True
    with moec.recording() as report:
        got = model.generate(
            input_ids=prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=NEW_TOKENS,
            min_new_tokens=NEW_TOKENS,
            do_sample=False,
            use_cache=True,
            cache_implementation="static",
            compile_config=config,
        ).tolist()
    assert got == want
    assert report.graphs == 1, "it compiles the decode step only"
    assert report.all_fused
