"""How transformers' names of a checkpoint become those of its model: which tensors on disk a parameter is made of."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from moec.aot.checkpoint import Checkpoint, Stored, read_headers
from moec.artifact.weights import NAMES

QUANTIZER = "hf_quantizer"
"""The attribute of a transformers model that says how its weights are quantized."""
_NUMBER = re.compile(r"(\d+)")
_MERGES = (["MergeModulelist"], ["MergeModulelist", "Concatenate"])
"""What may be done to experts on disk so that their addresses, in order, are the stacked weight."""


def checkpoint_of(folder: Path, model: torch.nn.Module, prefix: str) -> Checkpoint:
    """The places of a model's weights in a folder of safetensors.

    Args:
        folder: Written by ``save_pretrained``, or downloaded.
        model: Of transformers; its weights' values do not matter.
        prefix: Before every name of the result.
    """
    stored = read_headers(sorted(folder.glob("*.safetensors")))
    sources: dict[str, dict[int, list[Stored]]] = defaultdict(lambda: defaultdict(list))
    converted: dict[str, str] = {}
    renames, merges = _conversions(model)
    base = getattr(model, "base_model_prefix", "")
    for key in sorted(stored, key=_natural):
        target, part, why = _target(key, renames, merges)
        if why:
            converted[target] = why
        sources[target][part].append(stored[key])
    places: dict[str, tuple[Stored, ...]] = {}
    other: dict[str, tuple[Stored, ...]] = {}
    missing: dict[str, str] = {}
    state = model.state_dict()
    for name, value in state.items():
        names = [name, *_same(name, value, state), name.removeprefix(f"{base}.")]
        found = next((n for n in names if n in sources), None)
        if found is None:
            missing[prefix + name] = "the checkpoint has no tensor of that name"
        elif found in converted:
            missing[prefix + name] = f"transformers makes it of several tensors by {converted[found]}"
        else:
            parts = sources[found]
            made = tuple(t for part in sorted(parts) for t in parts[part])
            why = _misfit(made, value, len(parts))
            if why:
                missing[prefix + name] = why
            elif made[0].dtype != (dtype := NAMES.get(value.dtype)):
                missing[prefix + name] = f"it is {made[0].dtype} on disk, and the model is compiled for {dtype}"
                other[prefix + name] = made
            else:
                places[prefix + name] = made
    return Checkpoint(places, missing, other)


def _conversions(model: torch.nn.Module) -> tuple[list[Any], list[Any]]:
    from transformers import conversion_mapping

    find: Any = conversion_mapping.get_model_conversion_mapping  # it wants transformers' own base class
    found = find(model)
    quantizer = getattr(model, QUANTIZER, None)
    if quantizer is not None:
        found = quantizer.update_weight_conversions(found, model)
    merges = [c for c in found if getattr(c, "operations", None)]
    return [c for c in found if c not in merges], merges


def _target(key: str, renames: list[Any], merges: list[Any]) -> tuple[str, int, str]:
    """The parameter that a tensor on disk is part of, which part, and why it cannot stay as it lies (or "")."""
    for rename in renames:
        key, _ = rename.rename_source_key(key)
    for merge in merges:
        target, pattern = merge.rename_source_key(key)
        if pattern is None:
            continue
        operations = [type(o).__name__ for o in merge.operations]
        why = (
            ""
            if operations in _MERGES and all(o.dim == i for i, o in enumerate(merge.operations))
            else ", ".join(operations)
        )
        return target, merge.source_patterns.index(pattern), why
    return key, 0, ""


def _misfit(made: tuple[Stored, ...], value: torch.Tensor, parts: int) -> str:
    """Why the tensors cannot stand for ``value``; empty if they can."""
    if not value.is_contiguous():
        return "the model does not hold it row by row"
    if len({t.dtype for t in made}) > 1:
        return "the checkpoint has parts of it in several types"
    if len(made) == 1:
        return "" if made[0].shape == tuple(value.shape) else f"it is {list(made[0].shape)} on disk"
    experts = len(made) // parts
    if value.dim() != 3 or value.shape[0] != experts or len(made) != experts * parts:
        return f"the checkpoint has {len(made)} tensors of it"
    wanted = (value.shape[1] // parts, value.shape[2])
    return "" if all(t.shape == wanted for t in made) else "its experts have other shapes on disk"


def _same(name: str, value: torch.Tensor, state: Mapping[str, torch.Tensor]) -> list[str]:
    """Other names of the same memory: tied weights are stored once."""
    return [n for n, v in state.items() if n != name and v.data_ptr() == value.data_ptr() and v.shape == value.shape]


def _natural(text: str) -> list[tuple[int, str]]:
    """Sorts expert 10 after expert 9."""
    return [(int(p), "") if p.isdecimal() else (-1, p) for p in _NUMBER.split(text)]
