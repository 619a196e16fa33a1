"""What a compile found and did, block by block: the answer of ``moec.explain`` and the table it prints."""

from __future__ import annotations

import io
import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from moec.predicted_table import predicted_table

_TEXT_WIDTH = 140  # of a report turned into text where there is no terminal to ask
_TOLD = "applied: eliminate-zero-experts: "  # remarks about fused blocks, too: they say what is not computed


@dataclass
class BlockReport:
    """One MoE block of the model.

    Attributes:
        name: Dotted path of the module (``model.layers.0.mlp``), or a made-up name where the graph has none.
        recognised: The block was found and raised to moe ops.
        fused: Its experts became one ``moe.experts`` op that a backend runs.
        reason: Why it was not recognised, or not fused; None where all went well.
        router: Short text: ``"softmax top-2 renorm"``.
        experts: Short text: ``"8 x 14336, silu(g)*u"``.
        num_experts: Number of experts.
        top_k: Experts a token goes to.
        hidden: Width of the tokens.
        intermediate: Inner width of an expert.
        dtype: Element type of the tokens (``"bf16"``).
        backend: Name of the backend that took the experts.
        source: Line of the user's model, ``file:line: text``.
        remarks: What passes and backends had to say, one line each.
        ir_before: The raised block before fusion.
        ir_after: The block as it was handed to the backend.
        projections: GEMMs that lead to the activation: 2 for gate and up, else 1.
        predicted: Times on the cpu backend for some numbers of tokens (``moec.predicted``): seconds, limit, what binds.
        instances: How many layers this compiled block serves, where identical layers share one compiled region.
        shared: Its shared experts: dense MLPs on the same tokens, whose results are added to the block's. Each is told
            of as a block of one expert. One that is not fused is PyTorch's; the block's own ``fused`` is not about it.
    """

    name: str
    recognised: bool = False
    fused: bool = False
    reason: str | None = None
    router: str | None = None
    experts: str | None = None
    num_experts: int | None = None
    top_k: int | None = None
    hidden: int | None = None
    intermediate: int | None = None
    dtype: str | None = None
    backend: str | None = None
    source: str | None = None
    remarks: list[str] = field(default_factory=list)
    ir_before: str = ""
    ir_after: str = ""
    projections: int | None = None
    predicted: list[dict[str, Any]] = field(default_factory=list)
    instances: int = 1
    shared: list[BlockReport] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """The block as JSON types."""
        return asdict(self)


@dataclass
class Report:
    """Everything one model's compiles found.

    Attributes:
        layers: The MoE blocks, in the order of the model.
        remarks: What concerns the whole model (``"no MoE block was found"``).
        graphs: How many graphs were compiled.
    """

    layers: list[BlockReport] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)
    graphs: int = 0

    @property
    def all_fused(self) -> bool:
        """There is at least one block, and every one is fused."""
        return bool(self.layers) and all(b.fused for b in self.layers)

    def entries(self) -> Iterator[BlockReport]:
        """The blocks, each with its shared experts behind it."""
        for block in self.layers:
            yield block
            yield from block.shared

    def to_dict(self) -> dict[str, Any]:
        """The report as JSON types."""
        return {
            "layers": [b.to_dict() for b in self.layers],
            "remarks": [str(r) for r in self.remarks],
            "graphs": self.graphs,
        }

    def to_json(self, *, indent: int | None = 2) -> str:
        """The report as JSON text: ``{"layers": [...], "remarks": [...], "graphs": n}``."""
        return json.dumps(self.to_dict(), indent=indent, default=str)

    def table(self) -> Table:
        """The blocks and their shared experts as a rich table, one row each."""
        table = Table(title="MoE blocks", title_justify="left", title_style="bold", show_lines=False)
        for column in ("block", "router", "experts", "sizes", "fused", "backend"):
            table.add_column(column, overflow="fold")
        for block in self.entries():
            name = block.name if block.instances == 1 else f"{block.name} (serves {block.instances} layers)"
            table.add_row(
                Text(name),
                Text(block.router or "-"),
                Text(_experts(block)),
                Text(_sizes(block)),
                Text("yes", "green") if block.fused else Text("no", "red" if not block.recognised else "yellow"),
                Text(block.backend) if block.backend and not block.reason else _reason(block),
            )
        return table

    def lines(self) -> list[str]:
        """What the table has no room for: remarks of the model, of blocks that are not fused, and what is skipped."""
        out = [str(r) for r in self.remarks]
        if not self.layers and not out:
            out.append("no MoE block was found")
        for block in self.entries():
            if not block.fused:
                where = f" ({block.source})" if block.source else ""
                out += [f"{block.name}: {r}{where}" for r in block.remarks if r != block.reason]
        return _unique([*out, *_skipped(self.layers)])

    def __str__(self) -> str:
        stream = io.StringIO()
        console = Console(file=stream, width=_TEXT_WIDTH, color_system=None)
        if self.layers:
            console.print(self.table())
        if predicted := predicted_table([*self.entries()]):
            console.print(predicted)
        for line in self.lines():
            console.print(Text(line), soft_wrap=True)
        return stream.getvalue().rstrip("\n")


def _experts(block: BlockReport) -> str:
    if block.experts:
        return block.experts
    count = "?" if block.num_experts is None else str(block.num_experts)
    return count if block.intermediate is None else f"{count} x {block.intermediate}"


def _sizes(block: BlockReport) -> str:
    parts = [f"hidden {block.hidden}" if block.hidden is not None else "", block.dtype or ""]
    return ", ".join(p for p in parts if p) or "-"


def _reason(block: BlockReport) -> Text:
    text = block.reason or ("not fused" if block.recognised else "not recognised")
    return Text(f"PyTorch: {text}" if not block.backend else f"{block.backend}: {text}", "yellow")


def _skipped(blocks: Iterable[BlockReport]) -> list[str]:
    """One line for all fused blocks of which slots are skipped for the same reason."""
    names: dict[str, list[str]] = {}
    for block in blocks:
        for remark in block.remarks if block.fused else ():
            if remark.startswith(_TOLD):
                names.setdefault(remark.removeprefix(_TOLD).partition(" [")[0], []).append(block.name)
    return [f"{n[0]}{f' and {len(n) - 1} more' if len(n) > 1 else ''}: {text}" for text, n in names.items()]


def _unique(lines: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(lines))
