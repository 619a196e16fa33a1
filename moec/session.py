"""Who is told what a compile found: reports go to every open recording of this process.

``moec.explain`` opens one around the compile it makes; ``moec.recording()`` lets anyone do the same around code that
compiles by ``torch.compile(backend="moec")``.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator

from moec.report import Report

_LOCK = threading.Lock()
_OPEN: list[Report] = []


@contextlib.contextmanager
def recording() -> Iterator[Report]:
    """A report that collects all blocks compiled while it is open, in any thread.

    Example:
        with moec.recording() as report:
            compiled(tokens)
        print(report)
    """
    report = Report()
    with _LOCK:
        _OPEN.append(report)
    try:
        yield report
    finally:
        with _LOCK:
            _OPEN.remove(report)


def publish(compiled: Report) -> None:
    """Add what one compiled graph told to every open recording."""
    with _LOCK:
        for report in _OPEN:
            report.layers.extend(compiled.layers)
            report.remarks.extend(r for r in compiled.remarks if r not in report.remarks)
            report.graphs += compiled.graphs
