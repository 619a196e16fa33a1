"""Recording what routers do: the model runs on moec's ops, and every layer shows what its tokens chose."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from moec.backends.partition import DEFAULT_ORDER
from moec.readiness import prepare
from moec.routing.consistency import Ids, best_performance, hit_rates
from moec.routing.profile import LayerRouting, RoutingProfile
from moec.routing.store import RoutingError
from moec.routing.trials import TOKENS, try_regrouping
from moec.runtime import traces
from moec.runtime.programs import Program

SEGMENTS = (2, 4, 8, 16, 32, 64)
"""Lengths m of SRP."""
AHEAD = (1, 4, 16, 0)
"""Lengths m of SCH; 0 for all tokens that follow."""

Batch = Tensor | Sequence[Any] | Mapping[str, Any]


def profile_routing(
    model: torch.nn.Module,
    batches: Iterable[Batch],
    *,
    batch_counts: Sequence[int] = (2,),
    ranks: Sequence[int] = (),
    sizes: Sequence[int] = TOKENS,
    backends: Sequence[str] = DEFAULT_ORDER,
) -> RoutingProfile:
    """Run a model on some tokens and measure what its routers do.

    Args:
        model: Any module that ``torch.compile(model, backend="moec")`` takes. It is run without gradients, as it is.
        batches: Inputs of single calls: a tensor, positional arguments, or keyword arguments. The first tensor with
            two or more dimensions says how many sequences of how many tokens a call has; all calls have equally long
            ones.
        batch_counts: Numbers of micro-batches that regrouping is tried with.
        ranks: Numbers of ranks that it is tried with besides.
        sizes: Numbers of tokens that it is tried with.
        backends: Who runs MoE ops meanwhile, as in the compile options.

    Raises:
        RoutingError: No layer ran, or sequences are of several lengths.
    """
    recorded = _Recorded()
    ready = prepare(model, regions=False)
    torch._dynamo.reset()
    try:
        options: dict[str, Any] = {"inner": "eager", "checks": "off", "backends": tuple(backends)}
        compiled = torch.compile(model, backend="moec", options=options)
        with traces.watching(recorded.see), torch.no_grad(), warnings.catch_warnings():
            warnings.filterwarnings("ignore", module=r"torch\..*")
            for batch in batches:
                args, kwargs = _call(batch)
                recorded.shapes.append(_shape([*args, *kwargs.values()]))
                compiled(*args, **kwargs)
    finally:
        torch._dynamo.reset()
        ready.undo()
    return profile_of(recorded, type(model).__name__, batch_counts, ranks, sizes)


class _Recorded:
    """Calls of layers, by the name of their block.

    Attributes:
        shapes: Sequences and tokens a sequence of every call of the model.
        experts: E of every layer.
        ids: int[T, k] of every call of a layer.
    """

    def __init__(self) -> None:
        self.shapes: list[tuple[int, int]] = []
        self.experts: dict[str, int] = {}
        self.ids: dict[str, list[Ids]] = {}

    def see(self, program: Program, ids: Tensor) -> None:
        if program.op.attrs["experts"] > 1:  # a shared expert is chosen by all
            self.experts[program.label] = program.op.attrs["experts"]
            self.ids.setdefault(program.label, []).append(ids.detach().cpu().numpy().astype(np.int64))

    def in_sequences(self, name: str) -> Ids:
        """int[sequences, tokens, k] of one layer.

        Raises:
            RoutingError: Its calls do not fit the model's inputs.
        """
        lengths = {length for _, length in self.shapes}
        whole = np.concatenate(self.ids[name])
        if len(lengths) != 1:
            raise RoutingError(f"sequences have {len(lengths)} lengths", hint="give batches of one length")
        (length,) = lengths
        if len(whole) != length * sum(count for count, _ in self.shapes):
            raise RoutingError(
                f"layer {name!r} was given {len(whole)} tokens, the inputs hold {sum(a * b for a, b in self.shapes)}",
                hint="give inputs [sequences, tokens] that all go through every layer",
            )
        return whole.reshape(-1, length, whole.shape[1])


def profile_of(
    recorded: _Recorded, model: str, batch_counts: Sequence[int], ranks: Sequence[int], sizes: Sequence[int]
) -> RoutingProfile:
    """The profile of what was recorded.

    Raises:
        RoutingError: Nothing was.
    """
    if not recorded.ids:
        raise RoutingError("no MoE layer ran", hint="moec.explain says what became of the model's blocks")
    traced = {name: recorded.in_sequences(name) for name in recorded.ids}
    ways = [(count, n) for count in batch_counts for n in (0, *ranks)]
    layers = [_layer(name, ids, recorded.experts[name], ways, sizes) for name, ids in traced.items()]
    names = list(traced)
    between = [transitions(traced[a], traced[b], recorded.experts[a], recorded.experts[b]) for a, b in pairwise(names)]
    sequences, tokens, _ = traced[names[0]].shape
    return RoutingProfile(model, sequences * tokens, sequences, len(recorded.shapes), tuple(layers), tuple(between))


def transitions(before: Ids, after: Ids, experts: int, experts_after: int) -> tuple[tuple[int, int, int], ...]:
    """``(e, e', n)`` for n tokens that chose e in one layer and e' in the next; ids are int[..., k] of both."""
    a, b = before.reshape(-1, before.shape[-1]), after.reshape(-1, after.shape[-1])
    pairs = a[:, :, None] * experts_after + b[:, None, :]
    inside = ((a >= 0) & (a < experts))[:, :, None] & ((b >= 0) & (b < experts_after))[:, None, :]
    found, counts = np.unique(pairs[inside], return_counts=True)
    return tuple((int(p) // experts_after, int(p) % experts_after, int(n)) for p, n in zip(found, counts, strict=True))


def _layer(name: str, ids: Ids, experts: int, ways: Sequence[tuple[int, int]], sizes: Sequence[int]) -> LayerRouting:
    tokens, top_k = ids.shape[1:]
    flat = ids.reshape(-1, top_k)
    live = flat[(flat >= 0) & (flat < experts)]
    whole = len(live) == flat.size  # slots of no expert have no place in a segment's group or in a cache
    return LayerRouting(
        name,
        experts,
        top_k,
        tuple(np.bincount(live, minlength=experts).tolist()),
        tuple((m, *best_performance(ids, experts, m)) for m in SEGMENTS if m <= tokens and whole),
        tuple((m, tuple(hit_rates(ids, experts, m or None).tolist())) for m in AHEAD if whole),
        tuple(try_regrouping(flat, experts, count, n, sizes) for count, n in ways),
    )


def _call(batch: Batch) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if isinstance(batch, Tensor):
        return (batch,), {}
    return ((), dict(batch)) if isinstance(batch, Mapping) else (tuple(batch), {})


def _shape(values: Sequence[Any]) -> tuple[int, int]:
    found = next((v for v in values if isinstance(v, Tensor) and v.dim() > 1), None)
    if found is None:
        raise RoutingError("no input says what a sequence is", hint="give a tensor [sequences, tokens, ...]")
    return found.shape[0], found.shape[1]
