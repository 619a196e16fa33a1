"""What can be watched while a pipeline runs: printing, dumps, times, counts. All of it goes to stderr or to files."""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TextIO

from moec.ir.core import Graph
from moec.passes.base import Pass, PassResult


class Instrument:
    """Base of instruments. All hooks are optional; none may change the graph."""

    def before_pipeline(self, graph: Graph, passes: Sequence[Pass]) -> None:
        """Called once, before the first pass."""

    def before_pass(self, graph: Graph, pass_: Pass) -> None:
        """Called before every pass."""

    def after_pass(self, graph: Graph, pass_: Pass, result: PassResult, seconds: float) -> None:
        """Called after every pass that went well, once the graph is verified."""

    def after_pipeline(self, graph: Graph) -> None:
        """Called once, after the last pass, and also when a pass failed."""


def _stream(stream: TextIO | None) -> TextIO:
    """The given stream, or stderr as it is now (tests and notebooks exchange it)."""
    return stream if stream is not None else sys.stderr


@dataclass
class PrintAfterAll(Instrument):
    """Prints the graph after every pass; with ``only_changed``, only where its text differs from the last one."""

    only_changed: bool = False
    stream: TextIO | None = None
    _last: str = field(default="", init=False)

    def before_pipeline(self, graph: Graph, passes: Sequence[Pass]) -> None:
        self._last = str(graph)
        print(f"// ----- @{graph.name}: input\n{self._last}", file=_stream(self.stream))

    def after_pass(self, graph: Graph, pass_: Pass, result: PassResult, seconds: float) -> None:
        text = str(graph)
        if self.only_changed and text == self._last:
            print(f"// ----- @{graph.name}: after {pass_.name}: unchanged", file=_stream(self.stream))
            return
        self._last = text
        print(f"// ----- @{graph.name}: after {pass_.name}\n{text}", file=_stream(self.stream))


@dataclass
class DumpDir(Instrument):
    """Writes ``NNN_pass.moe`` into a folder after every pass, and the input as ``NNN_input.moe``.

    The numbers run on over several graphs, so nothing overwrites anything.
    """

    path: Path
    _next: int = field(default=0, init=False)

    def before_pipeline(self, graph: Graph, passes: Sequence[Pass]) -> None:
        Path(self.path).mkdir(parents=True, exist_ok=True)
        self._write(graph, "input")

    def after_pass(self, graph: Graph, pass_: Pass, result: PassResult, seconds: float) -> None:
        self._write(graph, pass_.name)

    def _write(self, graph: Graph, name: str) -> None:
        safe = re.sub(r"[^A-Za-z0-9_-]", "_", name)
        write_whole(Path(self.path) / f"{self._next:03d}_{safe}.moe", str(graph).rstrip("\n") + "\n")
        self._next += 1


@dataclass
class Timing(Instrument):
    """Adds up the seconds of every pass; ``report()`` gives the table, and it is printed after every pipeline."""

    stream: TextIO | None = None
    quiet: bool = False
    seconds: dict[str, float] = field(default_factory=dict, init=False)

    def after_pass(self, graph: Graph, pass_: Pass, result: PassResult, seconds: float) -> None:
        self.seconds[pass_.name] = self.seconds.get(pass_.name, 0.0) + seconds

    def after_pipeline(self, graph: Graph) -> None:
        if not self.quiet:
            print(self.report(), file=_stream(self.stream))

    def report(self) -> str:
        """One line per pass: milliseconds, share, name."""
        total = sum(self.seconds.values())
        lines = [f"// pass times, {total * 1e3:.2f} ms in all"]
        for name, s in sorted(self.seconds.items(), key=lambda item: -item[1]):
            lines.append(f"// {s * 1e3:10.2f} ms {s / total if total else 0:6.1%}  {name}")
        return "\n".join(lines)


@dataclass
class Stats(Instrument):
    """Adds up the counts that the passes report; printed after every pipeline."""

    stream: TextIO | None = None
    quiet: bool = False
    counts: dict[str, dict[str, int]] = field(default_factory=dict, init=False)

    def after_pass(self, graph: Graph, pass_: Pass, result: PassResult, seconds: float) -> None:
        mine = self.counts.setdefault(pass_.name, {})
        for key, n in result.stats.items():
            mine[key] = mine.get(key, 0) + n

    def after_pipeline(self, graph: Graph) -> None:
        if not self.quiet:
            print(self.report(), file=_stream(self.stream))

    def report(self) -> str:
        """One line per pass and count."""
        lines = ["// pass statistics"]
        for name, counts in self.counts.items():
            lines += [f"// {n:8d}  {name}: {key}" for key, n in sorted(counts.items())]
        return "\n".join(lines)


def write_whole(path: Path, text: str) -> None:
    """Write a file so that it is either all there or not there: first beside it, then moved onto its name."""
    part = path.with_name(path.name + ".part")
    try:
        part.write_text(text, encoding="utf-8")
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
