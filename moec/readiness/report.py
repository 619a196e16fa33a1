"""What ``moec.prepare`` did to a model, what it left alone and why."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table
from rich.text import Text

from moec.sizes import size_text

_TEXT_WIDTH = 140  # of a report turned into text where there is no terminal to ask


@dataclass(frozen=True)
class ExpertsSite:
    """One experts module that asks transformers' experts interface how to run.

    Attributes:
        name: Dotted path in the model.
        kind: Its class.
        before: Implementation that it would have used.
        after: Implementation that it uses now.
        reason: Why ``after`` isn't the one asked for; None where it is.
    """

    name: str
    kind: str
    before: str | None
    after: str | None
    reason: str | None = None


@dataclass(frozen=True)
class RewrittenSite:
    """One module whose own way to run experts was replaced by one that can be captured.

    Attributes:
        name: Dotted path in the model.
        kind: Its class.
        how: How it runs its experts now.
        note: What to know about it, such as a mode in which its own forward still runs; or "".
        freed: Bytes of weights that were never read and are given back.
        runs_experts: False for what stands around or beside a router or experts, which are counted themselves.
    """

    name: str
    kind: str
    how: str
    note: str = ""
    freed: int = 0
    runs_experts: bool = True


@dataclass(frozen=True)
class LeftOut:
    """A module that was left as it was, and why."""

    name: str
    kind: str
    reason: str


@dataclass(frozen=True)
class RegionGroup:
    """Layers that are alike, so that one compiled region serves them all.

    Attributes:
        kind: Class of the layers.
        layers: Dotted paths of the layers.
        blocks: Dotted paths of their MoE blocks, which are regions of their own where the whole layer cannot be one.
    """

    kind: str
    layers: tuple[str, ...]
    blocks: tuple[str, ...] = ()


@dataclass
class PrepareReport:
    """The whole answer of ``moec.prepare``. Printing it with rich shows tables; ``str`` gives the same as text.

    Attributes:
        model: Class of the model.
        implementation: The experts implementation asked for; None where none was to be set.
        experts: Modules that follow the experts interface.
        rewritten: Modules that do not follow it and got a forward that can be captured.
        ignored: Modules that look like experts, do not follow it and are as they were.
        loops: Those of them whose loop over experts, written in Python, may be traced as one graph.
        regions: Groups of layers that share a compiled region.
        left_out: Layers that are compiled one by one, and modules beside experts that are not rewritten.
        notes: What concerns the whole model.
    """

    model: str
    implementation: str | None
    experts: list[ExpertsSite] = field(default_factory=list)
    rewritten: list[RewrittenSite] = field(default_factory=list)
    ignored: list[LeftOut] = field(default_factory=list)
    loops: list[str] = field(default_factory=list)
    regions: list[RegionGroup] = field(default_factory=list)
    left_out: list[LeftOut] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    _undo: Callable[[], None] | None = field(default=None, repr=False, compare=False)

    @property
    def found(self) -> int:
        """How many modules run experts, whether they follow the interface or not."""
        return len(self.experts) + sum(site.runs_experts for site in self.rewritten) + len(self.ignored)

    @property
    def will_use(self) -> int:
        """How many of them use the implementation that was asked for; all that follow, if none was."""
        return sum(self.implementation in (None, site.after) for site in self.experts)

    def undo(self) -> None:
        """Put the model back as it was before it was first prepared. Calling it twice does nothing more."""
        if self._undo is not None:
            self._undo()
            self._undo = None

    def to_dict(self) -> dict[str, Any]:
        """The report as JSON types, with the counts."""
        names = ("experts", "rewritten", "ignored", "regions", "left_out")
        return {
            "model": self.model,
            "implementation": self.implementation,
            "found": self.found,
            "will_use": self.will_use,
            **{name: [asdict(item) for item in getattr(self, name)] for name in names},
            "loops": list(self.loops),
            "notes": list(self.notes),
        }

    def to_json(self, indent: int | None = 2) -> str:
        """The report as JSON text."""
        return json.dumps(self.to_dict(), indent=indent)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        used = self.implementation or "what they had"
        own = sum(site.runs_experts for site in self.rewritten)
        beside = len(self.rewritten) - own
        also = (f", {own} are rewritten" if own else "") + (f"; {beside} beside them are rewritten" if beside else "")
        yield Text(f"{self.model}: {self.will_use} of {self.found} experts modules use {used}{also}")
        if self.rewritten:
            rewritten = (LeftOut(s.name, s.kind, _what(s)) for s in self.rewritten)
            yield _table("rewritten", ("module", "kind", "how it runs now"), _merged(rewritten))
        if self.regions:
            yield _table("one compiled region each", ("layers", "count", "kind"), self._region_rows())
        left = [*_unfollowed(self.experts), *self.ignored, *self.left_out]
        if left:
            yield _table("left as they are", ("module", "kind", "why"), _merged(left))
        for note in self.notes:
            yield Text(f"note: {note}")

    def __str__(self) -> str:
        console = Console(file=io.StringIO(), width=_TEXT_WIDTH, force_terminal=False)
        with console.capture() as captured:
            console.print(self)
        return captured.get().rstrip()

    def _region_rows(self) -> Iterator[tuple[str, ...]]:
        for group in self.regions:
            yield f"{group.layers[0]} … {group.layers[-1]}", str(len(group.layers)), group.kind


def _what(site: RewrittenSite) -> str:
    freed = f"; {size_text(site.freed)} of unread weights are freed" if site.freed else ""
    return site.how + freed + (f"; {site.note}" if site.note else "")


def _unfollowed(sites: Iterable[ExpertsSite]) -> Iterator[LeftOut]:
    for site in sites:
        if site.reason:
            yield LeftOut(site.name, site.kind, site.reason)


def _merged(items: Iterable[LeftOut]) -> Iterator[tuple[str, ...]]:
    """One row for all modules of one kind with one reason: 48 equal lines hide the odd one."""
    rows: dict[tuple[str, str], list[str]] = {}
    for item in items:
        rows.setdefault((item.kind, item.reason), []).append(item.name)
    for (kind, reason), names in rows.items():
        yield names[0] if len(names) == 1 else f"{names[0]} … {names[-1]} ({len(names)})", kind, reason


def _table(title: str, columns: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", box=None, pad_edge=False)
    for column in columns:
        table.add_column(column, overflow="fold")
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))
    return table
