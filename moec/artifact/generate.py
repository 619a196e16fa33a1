"""Greedy generation with an artifact that has a prefill and a decode entry."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from moec.artifact.errors import InputError
from moec.artifact.manifest import Entry
from moec.artifact.weights import DTYPES

if TYPE_CHECKING:
    from moec.artifact.load import LoadedArtifact

Prompts = Tensor | Sequence[Sequence[int]]
"""i64 [batch, prompt], or rows of different lengths."""


def generate(artifact: LoadedArtifact, prompts: Prompts, count: int, mask: Tensor | None = None) -> Tensor:
    """Add the most likely token, again and again, until there are ``count`` or every row has ended.

    Args:
        artifact: Compiled with ``--generate``.
        prompts: At least one token each. Of different lengths, the shorter ones get padding before them.
        count: How many tokens to add at most.
        mask: [batch, prompt], zero where ``prompts`` is padding, as transformers' tokenizers give it with
            ``padding_side="left"``. Only of a tensor.

    Returns:
        i64 [batch, prompt + added], as transformers' ``generate`` returns it: what follows a row's end is padding.

    Raises:
        InputError: The artifact was not compiled for this, for so many rows, or for so long a text.
    """
    entries, facts = artifact.entries, artifact.manifest.generate
    if "prefill" not in entries or "decode" not in entries or "cache" not in facts:
        raise InputError("this artifact was not compiled for generating", hint="moec compile MODEL --generate")
    if isinstance(prompts, Tensor) and (prompts.dim() != 2 or not prompts.numel()):
        raise InputError(f"generating takes tokens [batch, prompt], not {list(prompts.shape)}")
    end = torch.tensor(facts.get("end", ()), dtype=torch.int64)
    pad = (*facts.get("pad", ()), *facts.get("end", ()), 0)[0]
    if isinstance(prompts, Tensor):
        tokens, padding = prompts, _padding(prompts, mask)
    else:
        tokens, padding = side_by_side(prompts, pad)
    prefill, decode = entries["prefill"], entries["decode"]
    _check(decode.spec, tokens, count, facts["cache"][0])
    inputs = {"input_ids": tokens, "position": torch.tensor(0)}
    if any(s.name == "padding" for s in decode.spec.inputs):
        inputs["padding"] = padding
    elif padding.any():
        raise InputError("this artifact takes a single prompt, without padding", hint="compile it for batch=1..2")
    for spec in decode.spec.inputs:
        if spec.name not in inputs:  # the caches
            shape = [len(tokens), *(int(n) for n in spec.shape[1:])]
            inputs[spec.name] = torch.zeros(shape, dtype=DTYPES[spec.dtype])
    first = prefill(**inputs)
    assert isinstance(first, Tensor)
    added = [first[:, -1].argmax(-1, keepdim=True)]
    ended = torch.isin(added[0], end)
    while len(added) < count and not bool(ended.all()):
        inputs["input_ids"], inputs["position"] = added[-1], torch.tensor(tokens.shape[1] + len(added) - 1)
        (logits,) = decode.run([inputs[s.name] for s in decode.spec.inputs])
        added.append(logits[:, -1].argmax(-1, keepdim=True).masked_fill(ended, pad))
        ended |= torch.isin(added[-1], end)
    return torch.cat([tokens, *added], 1)


def continued(artifact: LoadedArtifact, prompts: Sequence[Sequence[int]], count: int) -> list[list[int]]:
    """Prompts and what ``generate`` adds to each, without padding: until its first token that ends a text.

    Raises:
        InputError: As of ``generate``.
    """
    longest, end = max(map(len, prompts)), artifact.manifest.generate.get("end", ())
    found = []
    for prompt, row in zip(prompts, generate(artifact, prompts, count).tolist(), strict=True):
        added = row[longest:]
        stop = next((i + 1 for i, token in enumerate(added) if token in end), len(added))
        found.append([*prompt, *added[:stop]])
    return found


def side_by_side(prompts: Sequence[Sequence[int]], pad: int = 0) -> tuple[Tensor, Tensor]:
    """Prompts as one tensor i64 [batch, longest], padded at the front, and how many tokens of each row are padding.

    Raises:
        InputError: There is no prompt, or an empty one.
    """
    if not prompts or not all(prompts):
        raise InputError("a prompt has at least one token")
    longest = max(map(len, prompts))
    padding = [longest - len(p) for p in prompts]
    rows = [[pad] * n + list(p) for n, p in zip(padding, prompts, strict=True)]
    return torch.tensor(rows, dtype=torch.int64), torch.tensor(padding, dtype=torch.int64)


def _padding(tokens: Tensor, mask: Tensor | None) -> Tensor:
    """How many tokens each row begins with that ``mask`` does not count."""
    if mask is None:
        return torch.zeros(tokens.shape[:1], dtype=torch.int64)
    kept = mask.long()
    if mask.shape != tokens.shape:
        raise InputError(f"the mask is {list(mask.shape)}, and the tokens are {list(tokens.shape)}")
    if bool((kept.diff(dim=1) < 0).any()) or not bool(kept[:, -1].all()):
        raise InputError("padding goes before a prompt", hint='tokenizers take padding_side="left"')
    return (kept == 0).sum(1)


def _check(decode: Entry, tokens: Tensor, count: int, length: int) -> None:
    """Compare prompts with what an artifact was compiled for."""
    size = decode.inputs[0].shape[0]
    least, most = (size, size) if isinstance(size, int) else decode.dims[size]
    rows, prompt = tokens.shape
    text = f"{least}..{most}" if least < most else f"{least}"
    if not least <= rows <= most:
        wanted = f"{min(least, rows)}..{max(most, rows)}"
        raise InputError(
            f"the batch is {rows}, and the artifact was compiled for batch={text}",
            hint=f"compile again with --dynamic batch={wanted},seq=1..{length}",
        )
    if prompt + count > length:
        raise InputError(
            f"{prompt} tokens and {count} more do not fit into the cache of {length}",
            hint=f"compile again with --dynamic batch={text},seq=1..{prompt + count}",
        )
