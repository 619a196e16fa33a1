"""Which parameters of a model's attention are split by heads, where ranks share them (``tp``).

Queries, keys and values of a rank's heads are rows of the projections that make heads; what the heads give meets
columns of the output projection. All else of an attention module is computed by every rank alike.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

from torch import nn

from moec.parallel.plan import ParallelError

TO_HEADS = ("q_proj", "k_proj", "v_proj", "q_b_proj", "kv_b_proj", "wq", "wk", "wv")
FROM_HEADS = ("o_proj", "out_proj", "dense", "wo")
SHARED = ("q_a_proj", "kv_a_proj_with_mqa", "kv_a_proj")
"""Linear layers of attention by name: those that make heads, that read them, and latents that all heads share."""

BY_HEAD = ("sinks",)
"""Parameters of an attention module itself, one number a head."""

COUNTS = ("num_heads", "num_attention_heads", "n_heads", "num_key_value_heads", "num_kv_heads", "n_kv_heads")
"""Attributes in which modules keep how many heads they have."""


@dataclass(frozen=True)
class Attention:
    """How one model's attention is split.

    Attributes:
        modules: Names of attention modules.
        outputs: Names of output projections.
        dims: The dimension in which a parameter is split, by its name.
        inside: Parameters of attention that are not split.
    """

    modules: tuple[str, ...]
    outputs: tuple[str, ...]
    dims: dict[str, int]
    inside: frozenset[str]


def owner_of(name: str) -> str:
    """The path of the attention module that a parameter or module is in, or ""."""
    parts = name.split(".")
    at = next((i for i, p in enumerate(parts) if p.endswith(("attn", "attention"))), None)
    return "" if at is None else ".".join(parts[: at + 1])


def split_heads(model: nn.Module, tp: int) -> Attention:
    """Find what ``tp`` ranks split.

    Raises:
        ParallelError: The heads cannot be dealt out evenly, or an attention module is not understood.
    """
    heads = _check_heads(model, tp)
    paths = list(dict.fromkeys(o for n, _ in model.named_parameters(remove_duplicate=False) if (o := owner_of(n))))
    if not paths:
        raise ParallelError(f"tp={tp}: the model has no attention with parameters", hint=_HINT)
    outputs: list[str] = []
    dims: dict[str, int] = {}
    inside: set[str] = set()
    for path in paths:
        module = model.get_submodule(path)
        outputs.append(_read_module(path, module, tp, heads, dims))
        inside |= {f"{path}.{n}" for n, _ in module.named_parameters(remove_duplicate=False)} - dims.keys()
    # the bias of an output is added when the heads' sum is there, so it is outside
    return Attention(tuple(paths), tuple(outputs), dims, frozenset(inside - {f"{o}.bias" for o in outputs}))


_HINT = "moec splits attention modules called '...attn' or '...attention' with q_proj, k_proj, v_proj and o_proj"


def _check_heads(model: nn.Module, tp: int) -> int:
    config: Any = getattr(model, "config", None)
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    heads = getattr(config, "num_attention_heads", None)
    if not isinstance(heads, int):
        raise ParallelError(f"tp={tp}: the model's config does not say num_attention_heads")
    keys = getattr(config, "num_key_value_heads", None) or heads
    for what, count in (("heads", heads), ("key-value heads", keys)):
        if count % tp:
            raise ParallelError(
                f"tp={tp} does not divide the {count} {what} of attention",
                hint=f"choose tp among {[d for d in range(1, keys + 1) if heads % d == 0 and keys % d == 0]}",
            )
    return heads


def _read_module(path: str, module: nn.Module, tp: int, heads: int, dims: dict[str, int]) -> str:
    """Note the split parameters of one attention module in ``dims``; the name of its output projection."""
    rows: list[int] = []
    output = ""
    for name, child in module.named_modules():
        last, full = name.rpartition(".")[2], f"{path}.{name}"
        if isinstance(child, nn.Linear):
            if last in TO_HEADS:
                rows.append(child.out_features)
                dims |= {f"{full}.{n}": 0 for n, p in child._parameters.items() if p is not None}
            elif last in FROM_HEADS and not output:
                output = name
                dims[f"{full}.weight"] = 1
            elif last not in SHARED:
                raise ParallelError(f"tp={tp}: it is not known how to split {full} of attention", hint=_HINT)
        elif name and child._parameters:
            wide = [n for n, p in child._parameters.items() if p is not None and (p.dim() != 1 or p.numel() in rows)]
            if wide and "_a_" not in last:
                raise ParallelError(f"tp={tp}: {full} sees all heads at once, so they cannot be split", hint=_HINT)
    for own, p in module._parameters.items():
        if p is not None and (own not in BY_HEAD or p.shape != (heads,)):
            raise ParallelError(f"tp={tp}: it is not known how to split {path}.{own} of attention", hint=_HINT)
        if p is not None:
            dims[f"{path}.{own}"] = 0
    if not output or not rows:
        raise ParallelError(f"tp={tp}: the projections of {path} cannot be found", hint=_HINT)
    if any(r % tp for r in rows) or module.get_submodule(output).in_features % tp:  # type: ignore[operator]
        raise ParallelError(f"tp={tp} does not divide the projections of {path}")
    given = list(inspect.signature(module.forward).parameters)
    foreign = next((n for n in given if n in ("key_value_states", "encoder_hidden_states")), None)
    if foreign is not None:
        raise ParallelError(f"tp={tp}: {path} attends to {foreign} of another sequence, which is not split")
    return f"{path}.{output}"


def count_local_heads(module: nn.Module, tp: int) -> None:
    """Let an attention module know how many heads it has here."""
    for name in COUNTS:
        count = module.__dict__.get(name)
        if isinstance(count, int) and count % tp == 0:
            module.__dict__[name] = count // tp


def first_argument(module: nn.Module) -> str:
    """What a module's forward calls its first argument."""
    return next(iter(inspect.signature(module.forward).parameters))
