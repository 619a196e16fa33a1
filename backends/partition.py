"""Claiming: each op goes to the first backend of the user's order that supports it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from moec.backends.base import Backend
from moec.backends.registry import get_backend
from moec.ir.beside import beside_experts, own_experts
from moec.ir.core import Graph, Op
from moec.ir.ops.moe_resume import begun_by

CARRIED_OPS = ("moe.route", "moe.experts", "moe.parallel_experts", "moe.begin", "moe.resume", "moe.regroup")
"""The ops that a runtime op can carry; all others are executed by PyTorch."""

BEGIN, RESUME = "moe.begin", "moe.resume"
"""A spread layer in pieces: who begins it also runs it on."""

SPREAD, SPREADS = "moe.parallel_experts", "distributed"
"""The op whose collectives one backend runs, whatever the order; those of the order run the experts inside."""

DEFAULT_ORDER = ("cpu", "aten")


@dataclass(frozen=True)
class Refusal:
    """Why a backend did not take an op."""

    op: Op
    backend: str
    reason: str


class Claims(dict[Op, Backend]):
    """The backend of every claimed op, and ``refusals``: who said no before, and why."""

    def __init__(self) -> None:
        super().__init__()
        self.refusals: list[Refusal] = []

    def reasons(self, op: Op) -> list[str]:
        """``"backend: reason"`` of everyone who refused ``op``, in the order asked."""
        return [f"{r.backend}: {r.reason}" for r in self.refusals if r.op is op]


def claim(graph: Graph, order: Sequence[str] = DEFAULT_ORDER, target: str = "cpu") -> Claims:
    """Ask the backends in ``order`` for every op of ``graph`` that a runtime op can carry (nested graphs included).

    Raises:
        BackendError: A name in ``order`` is unknown.
    """
    backends = [get_backend(name) for name in order]
    claims = Claims()
    for op in graph.walk():
        if op.name not in CARRIED_OPS:
            continue
        if op.name == "moe.experts" and not op.attrs["experts"]:
            claims[op] = backends[0]  # of a rank without experts: nobody ever runs it
            continue
        if op.name == RESUME:
            continue
        for backend in backends if op.name not in (SPREAD, BEGIN) else [get_backend(SPREADS)]:
            support = backend.supports(op, target)
            if support.ok:
                claims[op] = backend
                break
            claims.refusals.append(Refusal(op, backend.name, support.reason))
    for op in [op for op in claims if op.name in (SPREAD, BEGIN)]:
        _check_inside(op, claims)
    for op in [op for op in graph.walk() if op.name == RESUME]:
        begin, _ = begun_by(op)
        if begin is not None and begin in claims:
            claims[op] = claims[begin]
        else:
            claims.refusals.append(Refusal(op, SPREADS, "the layer that it runs on is not begun"))
    return claims


def layer_inside(op: Op) -> Op:
    """The ``moe.experts`` of one rank in a layer that is spread over ranks; of chunks that of most experts."""
    return max(own_experts(op.regions[0]), key=lambda inner: int(inner.attrs["experts"]))


def _check_inside(op: Op, claims: Claims) -> None:
    """Give a spread layer back where nobody takes the experts inside, or not the same who takes those beside."""
    layer = layer_inside(op)
    if layer not in claims:
        del claims[op]
        claims.refusals += [Refusal(op, r.backend, r.reason) for r in claims.refusals if r.op is layer]
    elif any(claims.get(inner) is not claims[layer] for inner in beside_experts(op.regions[0])):
        other = f"{claims[layer].name} takes its experts, and not those beside them"
        claims.refusals.append(Refusal(op, claims.pop(op).name, other))
