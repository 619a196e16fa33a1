"""Greedy generation with an artifact that has a prefill and a decode entry."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from moec.artifact.errors import InputError
from moec.artifact.weights import DTYPES

if TYPE_CHECKING:
    from moec.artifact.load import LoadedArtifact


def generate(artifact: LoadedArtifact, tokens: Tensor, count: int) -> Tensor:
    """Add the most likely token, again and again, until there are ``count`` or the model ends.

    Args:
        artifact: Compiled with ``--generate``.
        tokens: i64 [1, prompt], at least one token.
        count: How many to add at most.

    Returns:
        i64 [1, prompt + added].

    Raises:
        InputError: The artifact was not compiled for this, or its cache is too short.
    """
    entries, facts = artifact.entries, artifact.manifest.generate
    if "prefill" not in entries or "decode" not in entries or "cache" not in facts:
        raise InputError("this artifact was not compiled for generating", hint="moec compile MODEL --generate")
    length = facts["cache"][0]
    if tokens.dim() != 2 or tokens.shape[0] != 1 or not tokens.shape[1]:
        raise InputError(f"generating takes tokens [1, prompt], not {list(tokens.shape)}")
    if tokens.shape[1] + count > length:
        raise InputError(
            f"{tokens.shape[1]} tokens and {count} more do not fit into the cache of {length}",
            hint=f"compile again with --dynamic batch=1,seq=1..{tokens.shape[1] + count}",
        )
    prefill, decode = entries["prefill"], entries["decode"]
    caches = [torch.zeros([int(n) for n in s.shape], dtype=DTYPES[s.dtype]) for s in decode.spec.inputs[2:]]
    end = set(facts.get("end", ()))
    first = prefill(tokens, torch.tensor(0), *caches)
    assert isinstance(first, Tensor)
    added = [first[:, -1].argmax(-1, keepdim=True)]
    while len(added) < count and int(added[-1]) not in end:
        position = torch.tensor(tokens.shape[1] + len(added) - 1)
        (logits,) = decode.run([added[-1], position, *caches])
        added.append(logits[:, -1].argmax(-1, keepdim=True))
    return torch.cat([tokens, *added], 1)
