"""Ranks that die or hang: one clear error on all others, within a time limit.

Every rank shows a sign of life in torch.distributed's store once a second: a count, how many collectives it has begun
in each group, and the last one's name. Where a collective fails or takes longer than the limit, the others look there:
a rank whose count stands still is dead (or stopped), one that has begun fewer collectives than this rank hangs.
"""

from __future__ import annotations

import atexit
import json
import os
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from moec.backends.distributed.groups import Group
from moec.ir.errors import MoecError

LIMIT_VARIABLE = "MOEC_COMM_TIMEOUT"
DEFAULT_LIMIT = 300.0
BEAT = 1.0
"""Seconds between signs of life."""
STILL = 3.5 * BEAT
"""Seconds without one after which a rank counts as dead."""


class RankError(MoecError):
    """A collective did not complete: a rank died, hangs, or went another way.

    Attributes:
        ranks: The global ranks that did not take part, as far as they are known.
        collective: What was waited for.
    """

    code = "rank"

    def __init__(self, message: str, *, ranks: tuple[int, ...], collective: str, hint: str) -> None:
        super().__init__(message, hint=hint)
        self.ranks, self.collective = ranks, collective


@dataclass(frozen=True)
class Ticket:
    """One collective of this rank: the n-th in its group."""

    kind: str
    group: str
    number: int

    def __str__(self) -> str:
        return f"{self.kind} number {self.number} over group {self.group!r}"


_limit: float | None = None
_begun: Counter[str] = Counter()
_last = ""
_heart: _Heart | None = None
_LOCK = threading.Lock()


def limit() -> timedelta:
    """The longest that a collective may take."""
    seconds = _limit if _limit is not None else float(os.environ.get(LIMIT_VARIABLE, DEFAULT_LIMIT))
    return timedelta(seconds=seconds)


def set_limit(seconds: float | None) -> None:
    """Set the limit for this process; None for the environment's ``MOEC_COMM_TIMEOUT``, or 300 s."""
    global _limit
    if seconds is not None and not seconds > 0:
        raise MoecError(f"a collective cannot have {seconds} seconds", hint="give a number above 0")
    _limit = seconds


class _Heart:
    """Shows this rank's signs of life in a store."""

    def __init__(self, store: Any, rank: int) -> None:
        self.store, self.rank, self.beats = store, rank, 0
        self.stop = threading.Event()
        self.thread = threading.Thread(target=self._run, name="moec-heart", daemon=True)
        self.beat()
        self.thread.start()
        atexit.register(self.end)  # what comes back from the store while Python shuts down would abort the process

    def end(self) -> None:
        """Show no further sign of life."""
        self.stop.set()
        self.thread.join(STILL)

    def _run(self) -> None:
        while not self.stop.wait(BEAT):
            try:
                self.beat()
            except RuntimeError:  # the store is gone, and with it whoever could look
                return

    def beat(self) -> None:
        self.beats += 1
        self.store.set(_key(self.rank), json.dumps([self.beats, dict(_begun), _last]))

    def look(self, rank: int) -> tuple[int, dict[str, int], str] | None:
        """What ``rank`` showed last, or None where it never did."""
        if not self.store.check([_key(rank)]):
            return None
        beats, begun, last = json.loads(self.store.get(_key(rank)))
        return beats, begun, last


def _key(rank: int) -> str:
    return f"moec/heart/{rank}"


def start_heart() -> None:
    """Begin to show signs of life, where torch.distributed is initialised; once for each of its stores."""
    global _heart
    if not dist.is_initialized():
        return
    store = dist.distributed_c10d._get_default_store()
    with _LOCK:
        if _heart is not None and _heart.thread.is_alive() and _heart.store is store:
            return
        if _heart is not None:
            _heart.stop.set()
        _begun.clear()
        _heart = _Heart(store, dist.get_rank())


def enter(kind: str, group: Group) -> Ticket:
    """Note that this rank begins a collective."""
    global _last
    _begun[group.name] += 1
    ticket = Ticket(kind, group.name, _begun[group.name])
    _last = str(ticket)
    return ticket


@contextmanager
def explained(ticket: Ticket, group: Group) -> Iterator[None]:
    """Turn what torch raises inside into a :class:`RankError` that names ranks and collective."""
    try:
        yield
    except (RuntimeError, dist.DistError) as error:
        raise diagnose(ticket, group, error) from error


def diagnose(ticket: Ticket, group: Group, error: Exception) -> RankError:
    """Find out who did not take part in a failed collective. Takes :data:`STILL` seconds where all seem alive."""
    dead, behind = _missing(ticket, group)
    told = [f"rank {r} is dead or stopped (no sign of life for {STILL:g} s)" for r in dead]
    told += [f"rank {r} hangs: it is alive, and its last collective was {last or 'none'}" for r, last in behind]
    first = str(error).strip().split("\n")[0]
    who = "; ".join(told) or "every rank is alive and has begun it"
    return RankError(
        f"{ticket} did not complete on rank {dist.get_rank()}: {who} ({type(error).__name__}: {first})",
        ranks=(*dead, *(r for r, _ in behind)),
        collective=str(ticket),
        hint=f"look at the log of the rank named; the limit is {limit().total_seconds():g} s ({LIMIT_VARIABLE})",
    )


def _missing(ticket: Ticket, group: Group) -> tuple[list[int], list[tuple[int, str]]]:
    """Ranks of the group that show no life, and those that are alive but have not begun the collective."""
    heart, me = _heart, dist.get_rank()
    if heart is None:
        return [], []
    others = [r for r in group.ranks if r != me]
    try:
        heart.beat()
        before = {r: heart.look(r) for r in others}
        time.sleep(STILL)
        heart.beat()
        after = {r: heart.look(r) for r in others}
    except RuntimeError:  # the store is gone with the rank that kept it
        return [0] if me else [], []
    dead, behind = [], []
    for r in others:
        then, now = before[r], after[r]
        if now is None or (then is not None and now[0] == then[0]):
            dead.append(r)
        elif now[1].get(ticket.group, 0) < ticket.number:
            behind.append((r, now[2]))
    return dead, behind
