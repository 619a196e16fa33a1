"""How the rows of a model's layers would travel between ranks, in each form: predicted times and bytes as a table."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from rich.table import Table

from moec.sizes import size_text

if TYPE_CHECKING:
    import torch

    from moec.simulate.forms import FormTime


def model_forms(model: torch.nn.Module, ranks: int, topology: str, tokens: int) -> list[FormTime]:
    """Every form's times for a layer of the model, ``tokens`` tokens of each rank that choose experts evenly.

    Beside them stands what the pass ``overlap`` would make of it.

    Raises:
        MoecError: No such machine, ranks that do not fit it or hold no expert, or a model without stacked experts.
    """
    from moec.parallel.planner import ModelFacts
    from moec.simulate.chosen import chosen_chunks
    from moec.simulate.forms import form_times
    from moec.simulate.layer import shares
    from moec.simulate.routing import Routing
    from moec.simulate.topology import load_topology

    machine = load_topology(topology).first(ranks)
    m = ModelFacts.of(model)
    routing = Routing("drawn")
    ids = [routing.ids(r, tokens, m.top_k, m.experts) for r in range(ranks)]
    found = form_times(machine, ids, shares(m, ranks), m.hidden * m.element)
    return [replace(f, overlap=chosen_chunks(machine, m, f.form, tokens, routing)) for f in found]


def micro_batches(model: torch.nn.Module, ranks: int, topology: str, tokens: int) -> str:
    """What two micro-batches, which share a rank's tokens, do for each other; "" where a config says no heads.

    Raises:
        MoecError: As :func:`model_forms`.
    """
    from moec.parallel.planner import ModelFacts
    from moec.simulate.attention import attention_of
    from moec.simulate.errors import SimulationError
    from moec.simulate.micro_batches import dual_batch
    from moec.simulate.routing import Routing
    from moec.simulate.topology import load_topology

    each = tokens // 2
    if ranks < 2 or not each:
        return ""
    try:
        attention = attention_of(getattr(model, "config", None))
    except SimulationError:
        return ""
    return dual_batch(ModelFacts.of(model), attention, load_topology(topology).first(ranks), each, Routing("drawn"))


def form_table(found: Sequence[FormTime], title: str) -> Table:
    """One row for each form, the fastest first."""
    table = Table(title=title, title_justify="left", title_style="bold")
    for name in ("form", "there, us", "back, us", "both, us", "between nodes", "inside", "overlap, forward"):
        table.add_column(name, justify="left" if name in ("form", "overlap, forward") else "right")
    for f in sorted(found, key=lambda f: f.seconds):
        table.add_row(
            f.form, f"{f.there_s * 1e6:.0f}", f"{f.back_s * 1e6:.0f}", f"{f.seconds * 1e6:.0f}",
            size_text(round(f.between)), size_text(round(f.inside)), f.overlap,
        )  # fmt: skip
    return table
