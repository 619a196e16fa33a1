"""A byte-level MoE language model trained for some hundred steps on text that comes with Python.

Routers of random weights are skewed, but their choices follow from nothing that a model learned. These have learned
something: 16 experts, 2 a token, 4 layers, an auxiliary loss so that deep layers do not collapse.
"""

from __future__ import annotations

import pydoc_data.topics
import sys
import sysconfig
from pathlib import Path

import torch
import transformers
from torch import Tensor

VOCABULARY = 256
_BYTES, _SEQUENCES, _LENGTH = 600_000, 16, 128
_HELD_OUT = 0.9
"""Where the part of each text begins that is not trained on."""


def texts() -> list[Tensor]:
    """Python's help and its library's source, as byte numbers."""
    english = "\n".join(pydoc_data.topics.topics.values()).encode()
    library = Path(sysconfig.get_paths()["stdlib"])
    source = b"\n".join(path.read_bytes() for path in sorted(library.glob("*.py"))[:80])
    return [torch.tensor(list(text[:_BYTES])) for text in (english, source)]


def untrained(seed: int = 0) -> torch.nn.Module:
    """The model before training."""
    torch.manual_seed(seed)
    config = transformers.OlmoeConfig(
        vocab_size=VOCABULARY, hidden_size=96, intermediate_size=96, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=4, max_position_embeddings=256, num_experts=16, num_experts_per_tok=2,
        norm_topk_prob=True, router_aux_loss_coef=0.02, pad_token_id=0, bos_token_id=1, eos_token_id=2,
        use_cache=False, experts_implementation="grouped_mm",
    )  # fmt: skip
    return transformers.AutoModelForCausalLM.from_config(config)  # type: ignore[no-any-return]


def draw(kinds: list[Tensor], sequences: int, length: int, first: float, last: float) -> Tensor:
    """i64[sequences, length], pieces of the texts' parts from ``first`` to ``last``, each of one text."""
    rows = []
    for kind in torch.randint(len(kinds), (sequences,)).tolist():
        text = kinds[kind]
        low, high = int(first * len(text)), int(last * len(text)) - length
        start = int(torch.randint(low, high, ()))
        rows.append(text[start : start + length])
    return torch.stack(rows)


def train(model: torch.nn.Module, steps: int) -> float:
    """Train, and return the bits a byte on text that was not trained on."""
    kinds = texts()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    model.train()
    for step in range(1, steps + 1):
        for group in optimizer.param_groups:
            group["lr"] = 2e-3 * min(1, step / 20)
        x = draw(kinds, _SEQUENCES, _LENGTH, 0, _HELD_OUT)
        optimizer.zero_grad()
        model(input_ids=x, labels=x, output_router_logits=True).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % 100 == 0:
            print(f"step {step}", file=sys.stderr)
    model.eval()
    with torch.no_grad():
        x = held_out(8, _LENGTH)
        return float(model(input_ids=x, labels=x).loss) / 0.6931


def held_out(sequences: int, length: int, seed: int = 1) -> Tensor:
    """i64[sequences, length] of text that was not trained on."""
    torch.manual_seed(seed)
    return draw(texts(), sequences, length, _HELD_OUT, 1.0)
