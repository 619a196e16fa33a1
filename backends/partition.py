"""Claiming: each op goes to the first backend of the user's order that supports it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from moec.backends.base import Backend
from moec.backends.registry import get_backend
from moec.ir.core import Graph, Op

CARRIED_OPS = ("moe.route", "moe.experts")
"""The ops that a runtime op can carry; all others are executed by PyTorch."""

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
        for backend in backends:
            support = backend.supports(op, target)
            if support.ok:
                claims[op] = backend
                break
            claims.refusals.append(Refusal(op, backend.name, support.reason))
    return claims
