"""Rewriting the modules of one model, and undoing it."""

from __future__ import annotations

import types
from typing import Any

from torch import nn

from moec.readiness.adapters import is_adapter
from moec.readiness.report import LeftOut, RewrittenSite
from moec.readiness.rewriters.known import Rewriter, is_ours
from moec.readiness.rewriters.registry import REWRITERS, runs_experts, verdict
from moec.sizes import size_text


class RewriteChange:
    """Puts the methods of rewriters on the modules of a model that they know, and can take them off again.

    Attributes:
        sites: What was rewritten.
        left: What stands beside experts, is of a known class and was not, with the reason; of adapters layers tell.
    """

    def __init__(self, model: nn.Module, *, free_unused: bool = False) -> None:
        self.sites: list[RewrittenSite] = []
        self.left: list[LeftOut] = []
        self._methods: list[tuple[nn.Module, str, Any]] = []
        _drop_inherited(model)
        for name, module in list(model.named_modules()):
            found = verdict(module)
            if found is not None and found.rewriter is not None:
                self._rewrite(name, module, found.rewriter, free_unused)
            elif found is not None and not runs_experts(module) and not is_adapter(module):
                self.left.append(LeftOut(name, type(module).__name__, found.reason))

    def _rewrite(self, name: str, module: nn.Module, rewriter: Rewriter, free_unused: bool) -> None:
        unused = rewriter.unused_bytes(module)
        note = rewriter.note(module)
        if unused and free_unused:
            rewriter.free(module)
        elif unused:
            hint = f"{size_text(unused)} of its weights are never read: prepare(model, free_unused=True) frees them"
            note = f"{note}; {hint}" if note else hint
        for path, function in rewriter.methods.items():
            owner, _, method = path.rpartition(".")
            self._put(module.get_submodule(owner), method, function)
        freed = unused if free_unused else 0
        kind = type(module).__name__
        self.sites.append(RewrittenSite(name, kind, rewriter.how, note, freed, rewriter.runs_experts))

    def _put(self, module: nn.Module, method: str, function: Any) -> None:
        bound = types.MethodType(function, module)
        # Through __dict__: it is no parameter, buffer or module, and undo must leave no trace.
        module.__dict__[method] = bound
        self._methods.append((module, method, bound))

    def undo(self) -> None:
        """Take the methods off. Freed weights stay freed: the modules' own methods never read them."""
        for module, method, bound in self._methods:
            if module.__dict__.get(method) is bound:
                del module.__dict__[method]
        self._methods.clear()


def _drop_inherited(model: nn.Module) -> None:
    """Take off what a copied or unpickled model brought along from one that was prepared.

    A copy brings the rewritten methods; pickle stores a bound method by its name and finds the class's own under it.
    """
    names = {path.rpartition(".")[2] for rewriter in REWRITERS.values() for path in rewriter.methods}
    for module in model.modules():
        for name in names & vars(module).keys():
            value = vars(module)[name]
            own = isinstance(value, types.MethodType) and value.__self__ is module
            if own and (is_ours(value) or value.__func__ is getattr(type(module), name, None)):
                del module.__dict__[name]
