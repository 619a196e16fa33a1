"""Which parameters of a model are stacked experts: those are dealt out to the ranks, all others are replicated."""

from __future__ import annotations

from fnmatch import fnmatch
from typing import TypeGuard

import torch

from moec.parallel.plan import ParallelError
from moec.readiness.experts import followers

_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")


def expert_parameters(model: torch.nn.Module, patterns: tuple[str, ...] | None = None) -> dict[str, int]:
    """The stacked experts' parameters by dotted name, and how many experts each holds.

    Without patterns these are, of modules that run experts by transformers' interface, the parameters whose first
    dimension counts the experts; of other modules, three-dimensional parameters of which the module holds two or more
    with one first dimension, and biases with the same.

    Args:
        model: Any module.
        patterns: Shell patterns of dotted names (``"*.gate_up"``), instead of the rule.

    Raises:
        ParallelError: A pattern matches nothing; or without patterns, experts are a list of modules.
    """
    if patterns is not None:
        named = dict(model.named_parameters(remove_duplicate=False))
        idle = next((p for p in patterns if not any(fnmatch(n, p) for n in named)), None)
        if idle is not None:
            raise ParallelError(f"no parameter is called {idle!r}", hint="give patterns such as '*.experts.gate_up'")
        return {n: int(v.shape[0]) for n, v in named.items() if any(fnmatch(n, p) for p in patterns)}
    found: dict[str, int] = {}
    interface = followers(model)
    for name, module in model.named_modules():
        if _is_list(name, module):
            raise ParallelError(
                f"{name} is a list of {len(module)} experts, each a module of its own; stacked experts are dealt out",
                hint=f"hold each projection of all experts in one parameter [{len(module)}, out, in], "
                "as transformers' models do; or name what is to be dealt out: experts=['*.gate_up', '*.down']",
            )
        count = _stacked(module, name in interface)
        for own, p in module._parameters.items():
            if count and p is not None and _is_share(own, p, count, name in interface):
                found[f"{name}.{own}" if name else own] = count
    return found


def _is_list(name: str, module: torch.nn.Module) -> TypeGuard[torch.nn.ModuleList]:
    """True for modules that are alike and are called experts, but not shared ones: those run on every token."""
    own = name.rpartition(".")[2]
    if not isinstance(module, torch.nn.ModuleList) or "expert" not in own or "shared" in own or len(module) < 2:
        return False
    shapes = [[(n, p.shape) for n, p in each.named_parameters()] for each in module]
    return any(len(shape) == 2 for _, shape in shapes[0]) and all(s == shapes[0] for s in shapes)


def _stacked(module: torch.nn.Module, follows: bool) -> int:
    """How many experts a module stacks; 0 for none."""
    sizes = [p.shape[0] for p in module._parameters.values() if p is not None and p.dim() == 3]
    named = next((getattr(module, n) for n in _COUNTS if isinstance(module.__dict__.get(n), int)), 0)
    if follows and named in sizes:
        return int(named)
    return next((int(s) for s in sizes if s > 1 and sizes.count(s) > 1), 0)


def _is_share(name: str, p: torch.Tensor, count: int, follows: bool) -> bool:
    return p.shape[0] == count and (p.dim() == 3 or (p.dim() == 2 and (follows or "bias" in name)))
