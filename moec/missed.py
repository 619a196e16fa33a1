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
_UNSEEN = "no captured graph shows its expert GEMMs"
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
        if not any(s == block or s.startswith(f"{block}.") or not name for s in seen):
            if _UNSEEN in reason and any(block.endswith(f".{r}") for r in relative):
                continue
            module = model.get_submodule(name)
            report.layers.append(BlockReport(block, reason=reason, source=_source(module)))


def _relative(report: Report, model: torch.nn.Module) -> set[str]:
    """Names of blocks that are no paths in ``model``: after a graph break, a path begins where the graph does.

    Such a graph may be run for any number of layers, so nobody can tell which of them it shows.
    """
    paths = {name for name, _ in model.named_modules()}
    return {b.name for b in report.layers if b.name not in paths}


def _following(model: torch.nn.Module) -> dict[str, str]:
    """Modules that follow transformers' experts interface, with why they may be missing."""
    found = {}
    for name, module in followers(model).items():
        chosen = vars(module)["config"]._experts_implementation
        other = f"{_UNSEEN} (experts implementation {chosen!r})"
        found[name] = _LOOP if chosen == "eager" else _adapter(model, name) or other
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


def _rewritten(model: torch.nn.Module) -> dict[str, str]:
    """Modules that ``moec.prepare`` rewrote, with why they may be missing: in some modes their own forward runs."""
    found = {}
    for name, rewriter in rewritten(model).items():
        if not rewriter.runs_experts:
            continue
        note = rewriter.note(model.get_submodule(name))
        found[name] = f"it is rewritten; {note}" if note else f"it is rewritten, but {_UNSEEN}"
    return found


def _looping(model: torch.nn.Module) -> dict[str, str]:
    """Modules that run experts in their own way, with why they may be missing."""
    found = {}
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
