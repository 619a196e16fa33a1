"""Which classes are known, by import path. A class is looked up by name: nothing of transformers is imported."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from moec.readiness.rewriters import (
    dbrx,
    fp8_experts,
    fp8_linear,
    jetmoe_attention,
    jetmoe_moe,
    llama4,
    longcat_flash,
    nllb_moe,
    peft_parameters,
    step3p7,
    switch_transformers,
)
from moec.readiness.rewriters.declined import DECLINED
from moec.readiness.rewriters.known import Rewriter, is_rewritten

REWRITERS: dict[str, Rewriter] = {
    r.target: r
    for r in (
        dbrx.REWRITER,
        fp8_experts.REWRITER,
        fp8_linear.REWRITER,
        jetmoe_attention.REWRITER,
        jetmoe_moe.REWRITER,
        llama4.REWRITER,
        longcat_flash.REWRITER,
        nllb_moe.REWRITER,
        peft_parameters.REWRITER,
        step3p7.REWRITER,
        switch_transformers.REWRITER,
    )
}
_REASONS = {d.target: d.reason for d in DECLINED}


@dataclass(frozen=True)
class Verdict:
    """What is known about a module's class: a rewriter that may be used, or why the module is left as it is."""

    rewriter: Rewriter | None = None
    reason: str = ""


def verdict(module: nn.Module) -> Verdict | None:
    """What is known about ``module``, or None if its class is unknown."""
    kind = type(module)
    name = _path(kind)
    if name in _REASONS:
        return Verdict(reason=_REASONS[name])
    if name in REWRITERS:
        reason = REWRITERS[name].obstacle(module)
        return Verdict(REWRITERS[name]) if reason is None else Verdict(reason=reason)
    base = next((b for b in kind.__mro__[1:] if _path(b) in REWRITERS), None)
    if base is not None:
        return Verdict(
            reason=f"it derives from {base.__name__} and may compute something else; that class alone is known"
        )
    return None


def runs_experts(module: nn.Module) -> bool:
    """False for a module of a class, or derived from one, that is known to stand around or beside experts."""
    base = next((b for b in type(module).__mro__ if _path(b) in REWRITERS), None)
    return base is None or REWRITERS[_path(base)].runs_experts


def rewritten(model: nn.Module) -> dict[str, Rewriter]:
    """The modules of ``model`` that carry a rewriter's methods now, by dotted path."""
    known = (
        (name, REWRITERS.get(_path(type(module)))) for name, module in model.named_modules() if is_rewritten(module)
    )
    return {name: rewriter for name, rewriter in known if rewriter is not None}


def _path(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"
