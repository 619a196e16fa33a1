"""``moec profile --routing MODEL``: record what a model's routers do on given tokens."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.table import Table

from moec.cli.console import emit, out
from moec.ir.errors import MoecError

if TYPE_CHECKING:
    import torch

    from moec.cli.model import LoadedModel
    from moec.routing.profile import LayerRouting, RoutingProfile

_SEQUENCES = 8
"""Sequences of one call."""
_SEGMENT = 16
"""The segment length m whose SRP is shown."""


class TokensError(MoecError):
    """A file of token numbers that cannot be used."""

    code = "tokens"


def profile_model(
    model: str, tokens: Path | None, random_weights: bool, ranks: tuple[int, ...], as_json: bool, out_file: Path | None
) -> None:
    """Record, store and show the routing of ``model``.

    Args:
        model: As in ``moec explain``.
        tokens: A line of token numbers for every sequence; None where the model's factory gives its inputs.
        random_weights: Make the weights up.
        ranks: Numbers of ranks to try regrouping for.
        as_json: Print the profile instead of tables.
        out_file: Where to store it.

    Raises:
        MoecError: There is no such model, or there are no tokens to run it on.
    """
    from moec.cli.model import load_model
    from moec.routing.record import profile_routing
    from moec.routing.store import save_routing, to_json

    loaded = load_model(model, random_weights=random_weights)
    if tokens is None and Path(model).expanduser().exists():
        raise TokensError(
            "what a router does on made-up tokens says nothing",
            hint="--tokens FILE, a line of token numbers for every sequence",
        )
    profile = profile_routing(loaded.model, _batches(loaded, tokens), ranks=ranks)
    stored = None if out_file is None else save_routing(profile, out_file)
    if as_json:
        emit(to_json(profile))
        return
    out().print(routing_table(profile))
    if stored is not None:
        out().print(f"stored in {stored}", markup=False, soft_wrap=True)


def _batches(loaded: LoadedModel, tokens: Path | None) -> Iterator[Any]:
    if tokens is None:
        yield {**loaded.kwargs} if not loaded.args else loaded.args
        return
    for part in read_tokens(tokens).split(_SEQUENCES):
        yield {**loaded.kwargs, "input_ids": part}


def read_tokens(path: Path) -> torch.Tensor:
    """i64[sequences, tokens] from a file with a line of numbers for every sequence, spaces or commas between.

    Raises:
        TokensError: It cannot be read, holds something else, or lines of several lengths.
    """
    import torch

    try:
        lines = [line.replace(",", " ").split() for line in path.read_text(encoding="utf-8").splitlines()]
        rows = [[int(word) for word in line] for line in lines if line]
    except (OSError, UnicodeDecodeError, ValueError) as e:
        raise TokensError(f"{path} cannot be read as token numbers: {e}") from e
    if len({len(row) for row in rows}) != 1:
        raise TokensError(
            f"{path} holds sequences of {len({len(row) for row in rows})} lengths", hint="give lines of one length"
        )
    return torch.tensor(rows)


def routing_table(profile: RoutingProfile) -> Table:
    """One line a layer."""
    table = Table(title=f"{profile.model}, {profile.tokens} tokens in {profile.sequences} sequences")
    table.title_justify = "left"
    table.add_column("layer")
    for name in ("experts", "busiest / mean", f"SRP({_SEGMENT})", "hits, 2k cached", "regrouping saves", "by chance"):
        table.add_column(name, justify="right")
    for layer in profile.layers:
        table.add_row(*_row(layer))
    return table


def _row(layer: LayerRouting) -> tuple[str, ...]:
    mean = sum(layer.loads) / layer.experts
    srp = next((f"{value:.2f}" for m, value, _ in layer.srp if m == _SEGMENT), "-")
    hits = next((f"{rates[min(2 * layer.top_k, layer.experts) - 1]:.2f}" for m, rates in layer.sch if m == 1), "-")
    trials = [t for c in layer.clusters if not c.ranks for t in c.trials]
    best = max(trials, key=lambda t: t.saved - t.chance, default=None)
    saves = ("-", "-") if best is None else (f"{best.saved:.1%} of {best.tokens} tokens'", f"{best.chance:.1%}")
    shape = f"{layer.top_k} of {layer.experts}"
    return layer.name, shape, f"{max(layer.loads) / mean:.2f}" if mean else "-", srp, hits, *saves
