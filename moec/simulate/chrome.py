"""A timeline as a trace for Perfetto (ui.perfetto.dev) and Chrome: the Trace Event Format, complete events in µs."""

from __future__ import annotations

import json
from typing import Any

from moec.simulate.steps import Timeline


def chrome_trace(timeline: Timeline, name: str) -> str:
    """One process a rank, one thread a stream.

    Args:
        timeline: What happened.
        name: Of the whole, shown beside every rank.
    """
    threads: dict[tuple[int, str], int] = {}
    events: list[dict[str, Any]] = []
    for span in timeline.spans:
        thread = threads.setdefault((span.rank, span.stream), sum(r == span.rank for r, _ in threads))
        events.append(
            {
                "name": f"wait: {span.label}" if span.kind == "wait" else span.label,
                "cat": span.kind,
                "ph": "X",
                "pid": span.rank,
                "tid": thread,
                "ts": span.begin * 1e6,
                "dur": (span.end - span.begin) * 1e6,
            }
        )
    names: list[dict[str, Any]] = [
        {"name": "process_name", "ph": "M", "pid": rank, "args": {"name": f"rank {rank}, {name}"}}
        for rank in sorted({r for r, _ in threads})
    ]
    for (rank, stream), thread in threads.items():
        label = stream if stream == "ops" else f"comm {stream}"
        names.append({"name": "thread_name", "ph": "M", "pid": rank, "tid": thread, "args": {"name": label}})
    return json.dumps({"displayTimeUnit": "ms", "traceEvents": [*names, *events]}) + "\n"
