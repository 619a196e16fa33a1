"""Which modules of a model run experts, and how: by transformers' interface, a method of moec's, or their own loop.

transformers' ``use_experts_implementation`` decorator replaces an experts class's forward by one that looks its
implementation up, in an interface, under the name that the module's config holds. An undecorated class ignores the
setting without a word, so the modules are counted one by one and the ones that do not follow are named.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

import torch

from moec.ir.errors import MoecError, nearest
from moec.readiness.adapters import is_adapter
from moec.readiness.report import ExpertsSite, LeftOut
from moec.readiness.rewriters import is_rewritten, runs_experts, verdict

# Locked when the weights are loaded: they are laid out for it, and another implementation would read garbage.
_LOCKED = "deepgemm_megamoe"
_EXPERTS_NAME = re.compile(r"Experts?(V\d+)?$")
_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")


class ImplementationError(MoecError):
    """An experts implementation that no interface in the model knows."""

    code = "unknown-implementation"


def experts_interface(module: torch.nn.Module) -> Mapping[str, Any] | None:
    """The interface that the module's forward looks its implementation up in, or None if it follows none.

    It is a free variable of the decorator's forward; no attribute of the module tells as much, because a subclass
    that overrides forward keeps all attributes and ignores the interface.
    """
    forward = module.__dict__.get("forward", type(module).forward)
    code = getattr(forward, "__code__", None)
    if code is None or "experts_interface" not in code.co_freevars or "config" not in module.__dict__:
        return None
    cell: Mapping[str, Any] = forward.__closure__[code.co_freevars.index("experts_interface")].cell_contents
    return cell


def followers(model: torch.nn.Module) -> dict[str, torch.nn.Module]:
    """The modules that follow an experts interface, by dotted path."""
    return {name: module for name, module in model.named_modules() if experts_interface(module) is not None}


def lookalikes(model: torch.nn.Module) -> list[LeftOut]:
    """Modules that run experts, follow no interface and are not rewritten."""
    following = followers(model)
    found: list[LeftOut] = []
    inside: list[str] = []
    for name, module in model.named_modules():
        if name in following and (known := verdict(module)) is not None and known.reason:
            found.append(LeftOut(name, type(module).__name__, known.reason))
        if name in following or is_adapter(module) or any(name.startswith(prefix) for prefix in inside):
            continue
        below = f"{name}." if name else ""
        if is_rewritten(module):
            inside.append(below)
            continue
        reason = _known_reason(module) or _unknown_reason(module)
        if reason is not None and not any(f.startswith(below) for f in following):
            found.append(LeftOut(name, type(module).__name__, reason))
            inside.append(below)
    return found


def _known_reason(module: torch.nn.Module) -> str | None:
    """Why a module of a class that the rewriters know is as it is; None for other classes."""
    known = verdict(module)
    if known is None or not runs_experts(module):
        return None
    return known.reason or "its own forward does not fit into one graph; moec.prepare(model) rewrites it"


def _unknown_reason(module: torch.nn.Module) -> str | None:
    why = _looks_like_experts(module)
    if why is None:
        return None
    return f"{why}, but its forward does not ask the experts interface: it runs as it is written"


def _looks_like_experts(module: torch.nn.Module) -> str | None:
    children = list(module._modules.values())
    if isinstance(module, torch.nn.ModuleList | torch.nn.ModuleDict):
        return None  # its owner is judged
    if _EXPERTS_NAME.search(type(module).__name__) and any(True for _ in module.parameters()):
        return "named as experts"
    count = next((getattr(module, a) for a in _COUNTS if isinstance(getattr(module, a, None), int)), None)
    stacked = [p for p in module._parameters.values() if p is not None and p.dim() == 3]
    if count is not None and count > 1 and any(p.shape[0] == count for p in stacked):
        return "holds weights stacked by expert"
    for child_name, child in zip(module._modules, children, strict=True):
        if isinstance(child, torch.nn.ModuleList | torch.nn.ModuleDict) and "expert" in child_name and len(child) > 1:
            return f"holds a list of experts ({child_name})"
    return None


class ImplementationChange:
    """Sets the experts implementation of modules (None: leaves it), and can put the old one back."""

    def __init__(self, modules: Mapping[str, torch.nn.Module], implementation: str | None) -> None:
        self._before: list[tuple[Any, Any]] = []
        self.sites: list[ExpertsSite] = []
        known = {name for module in modules.values() for name in _known(module)}
        if implementation is not None and implementation not in known:
            raise ImplementationError(
                f"unknown experts implementation {implementation!r}", hint=nearest(implementation, known)
            )
        before = {name: _config(module)._experts_implementation for name, module in modules.items()}
        for name, module in modules.items():
            reason = self._set(module, implementation) if implementation is not None else None
            after = _config(module)._experts_implementation
            self.sites.append(ExpertsSite(name, type(module).__name__, before[name], after, reason))

    def _set(self, module: torch.nn.Module, implementation: str) -> str | None:
        config = _config(module)
        current = config._experts_implementation
        if current == implementation:
            return None
        if current == _LOCKED or implementation == _LOCKED:
            return f"{_LOCKED} is chosen when the weights are loaded and cannot be switched to or from"
        if implementation not in _known(module):
            return f"the interface of {type(module).__name__} does not know {implementation!r}"
        self._before.append((config, current))
        # Not the public property: that would also overwrite the sub-configs of other, perhaps undecorated, parts.
        config._experts_implementation_internal = implementation
        return None

    def undo(self) -> None:
        for config, value in reversed(self._before):
            config._experts_implementation_internal = value
        self._before.clear()


def _config(module: torch.nn.Module) -> Any:
    """The config that the module asks; a plain attribute, and transformers need not be importable to say its type."""
    return vars(module)["config"]


def _known(module: torch.nn.Module) -> Iterator[str]:
    interface = experts_interface(module)
    yield "eager"
    if interface is not None:
        yield from interface.keys()
