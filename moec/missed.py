"""MoE modules that no captured graph showed: found by looking at the model, so that nothing is missed silently."""

from __future__ import annotations

import inspect

import torch

from moec.lowering import block_name
from moec.readiness.adapters import adapter_around, describe
from moec.readiness.experts import followers, lookalikes
from moec.readiness.loops import is_marked
from moec.readiness.rewriters import is_rewritten, rewritten, verdict
from moec.report import BlockReport, Report

_LOOP = (
    "its experts implementation 'eager' loops over the experts in Python, which no graph can hold; "
    "moec.prepare(model) sets one that can be captured"
)
_UNMARKED = "moec.prepare(model) lets a loop over experts be traced as one graph"
_DATA = (
    "no captured graph shows its experts: its Python asks for data (an if on a count of tokens, .item(), .tolist()), "
    "or they are no GEMMs of token rows"
)


def add_missed(report: Report, model: torch.nn.Module) -> None:
    """Append a block to ``report`` for every experts module of ``model`` that is not in it yet.

    Args:
        report: What a compile of ``model`` found.
        model: The model that was compiled; names in the report are paths of its modules.
    """
    seen = {block.name for block in report.layers}
    relative = _relative(report, model)
    for name, reason in {**_following(model), **_rewritten(model), **_looping(model)}.items():
        block = block_name(name, 0) if name else type(model).__name__
        if any(s == block or s.startswith(f"{block}.") or not name for s in seen):
            continue
        if reason is None and any(block.endswith(f".{r}") for r in relative):
            continue
        source = _source(model.get_submodule(name))
        report.layers.append(BlockReport(block, reason=reason or _unseen(model, name), source=source))


def _relative(report: Report, model: torch.nn.Module) -> set[str]:
    """Names of blocks that are no paths in ``model``: after a graph break, a path begins where the graph does.

    Such a graph may be run for any number of layers, so nobody can tell which of them it shows.
    """
    paths = {name for name, _ in model.named_modules()}
    return {b.name for b in report.layers if b.name not in paths}


def _unseen(model: torch.nn.Module, name: str) -> str:
    """What can be said of a module that nothing is known to keep out of graphs."""
    module = model.get_submodule(name)
    how = "rewritten" if is_rewritten(module) else f"implementation {vars(module)['config']._experts_implementation!r}"
    return f"no captured graph shows its expert GEMMs ({how})"


def _following(model: torch.nn.Module) -> dict[str, str | None]:
    """Modules that follow transformers' experts interface, with what keeps them out of graphs; None for nothing."""
    found = {}
    for name, module in followers(model).items():
        eager = vars(module)["config"]._experts_implementation == "eager"
        found[name] = _LOOP if eager else _adapter(model, name)
    return found


def _adapter(model: torch.nn.Module, name: str) -> str | None:
    """Why an adapter around the module called ``name`` keeps it out of graphs, or None."""
    around = adapter_around(model, name)
    if around is None or is_rewritten(around[1]):
        return None
    known = verdict(around[1])
    way_out = known.reason if known is not None and known.reason else "moec.prepare(model) computes the weights first"
    what = f"it lies in {describe(around[1])}, which changes the module in every call"
    return f"{what}: no graph can hold that; {way_out}"


def _rewritten(model: torch.nn.Module) -> dict[str, str | None]:
    """Modules that ``moec.prepare`` rewrote; in some modes their own forward runs, and the note says so."""
    running = {name: rewriter for name, rewriter in rewritten(model).items() if rewriter.runs_experts}
    notes = {name: rewriter.note(model.get_submodule(name)) for name, rewriter in running.items()}
    return {name: f"it is rewritten; {note}" if note else None for name, note in notes.items()}


def _looping(model: torch.nn.Module) -> dict[str, str | None]:
    """Modules that run experts in their own way, with why they may be missing."""
    found: dict[str, str | None] = {}
    for left in lookalikes(model):
        module = model.get_submodule(left.name)
        known = verdict(module)
        why = _DATA if is_marked(module) else _UNMARKED
        # of a class that is known, the reason says what to do already
        found[left.name] = left.reason if known is not None else f"{left.reason}; {why}"
    return found


def _source(module: torch.nn.Module) -> str | None:
    """``file:line: class Name`` of the module's class."""
    try:
        _, line = inspect.getsourcelines(type(module))
        return f"{inspect.getsourcefile(type(module))}:{line}: class {type(module).__name__}"
    except (OSError, TypeError):
        return None
